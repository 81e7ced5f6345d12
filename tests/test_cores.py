"""How many cores a process may use, on machines of all kinds, and what the command line sets for OpenMP."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from genoembed.config import cores
from genoembed.config.cores import Cores, count_cores, set_openmp_defaults
from genoembed.doctor import checks
from genoembed.pipeline import ray

if TYPE_CHECKING:
    from pathlib import Path

CPUS = frozenset(range(16))
V1 = "32 31 0:29 {root} /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
OTHERS = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "33 31 0:3 / /sys/fs/cgroup/memory rw - cgroup x rw,memory\n"
)
QUOTA = Cores(3, "cgroup quota")


@pytest.fixture(autouse=True)
def sixteen_cpus(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)


def machine(root: Path, files: dict[str, str], *, groups: str = "", mounts: str = "") -> Path:
    """Write what the system says about itself."""
    files = {"proc/self/cgroup": groups, "proc/self/mountinfo": OTHERS + mounts} | files
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("environ", "cpus", "expected"),
    [
        ({}, CPUS, Cores(16, "this machine")),
        ({}, None, Cores(16, "this machine")),
        ({}, frozenset({3, 9}), Cores(2, "affinity")),
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "8"}, CPUS, Cores(4, "SLURM_CPUS_PER_TASK")),
        ({"SLURM_CPUS_ON_NODE": "8"}, CPUS, Cores(8, "SLURM_CPUS_ON_NODE")),
        ({"SLURM_CPUS_PER_TASK": "64"}, CPUS, Cores(16, "this machine")),
        ({"SLURM_CPUS_PER_TASK": "4"}, frozenset({1, 2}), Cores(2, "affinity")),
        ({"NSLOTS": "3"}, CPUS, Cores(3, "NSLOTS")),
        ({"SLURM_CPUS_PER_TASK": "4(x2)", "SLURM_CPUS_ON_NODE": ""}, CPUS, Cores(16, "this machine")),
        ({"SLURM_CPUS_PER_TASK": "0", "NSLOTS": "-1"}, CPUS, Cores(16, "this machine")),
        ({"OMP_NUM_THREADS": "5", "SLURM_CPUS_PER_TASK": "4"}, CPUS, Cores(5, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": " 6,2"}, frozenset({1}), Cores(6, "OMP_NUM_THREADS")),
        ({"MKL_NUM_THREADS": "2"}, CPUS, Cores(2, "MKL_NUM_THREADS")),
        ({"OMP_NUM_THREADS": "many"}, CPUS, Cores(16, "this machine")),
    ],
)
def test_smallest_limit_counts_unless_the_user_set_a_number(environ, cpus, expected, tmp_path):
    assert count_cores(environ, cpus, tmp_path) == expected


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("400000 100000", 4),
        ("250000 100000\n", 2),
        ("50000 100000", 1),
        ("6400000 100000", 16),
        ("max 100000", 16),
        ("max", 16),
        ("", 16),
        ("-1 100000", 16),
        ("400000 0", 16),
        ("cat's file", 16),
    ],
)
def test_quota_of_version_2(text, count, tmp_path):
    root = machine(tmp_path, {"sys/fs/cgroup/cpu.max": text}, groups="0::/\n", mounts=V2.format(root="/"))
    assert count_cores({}, CPUS, root).count == count


def test_smallest_quota_of_nested_groups_counts(tmp_path):
    files = {
        "sys/fs/cgroup/kube/cpu.max": "300000 100000",
        "sys/fs/cgroup/kube/pod/cpu.max": "max 100000",
        "sys/fs/cgroup/kube/pod/box/cpu.max": "500000 100000",
        "sys/fs/cgroup/kube/other/cpu.max": "100000 100000",
    }
    root = machine(tmp_path, files, groups="0::/kube/pod/box\n", mounts=V2.format(root="/"))
    assert count_cores({}, CPUS, root) == Cores(3, "cgroup quota")


@pytest.mark.parametrize(
    ("group", "mounted"),
    [("/docker/abc", "/docker/abc"), ("/", "/"), ("/docker/abc", "/"), ("/../outside", "/")],
)
def test_quota_of_version_1_in_a_container(group, mounted, tmp_path):
    files = {
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    groups = f"9:memory:/elsewhere\n5:cpu,cpuacct:{group}\n1:name=systemd:/\n0::/\n"
    root = machine(tmp_path, files, groups=groups, mounts=V1.format(root=mounted))
    assert count_cores({}, CPUS, root) == Cores(2, "cgroup quota")
    (root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert count_cores({}, CPUS, root) == Cores(16, "this machine")


def test_hardware_threads_of_one_core_count_once(tmp_path):
    files = {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 8},{cpu % 8 + 8}\n"
        for cpu in CPUS
    }
    root = machine(tmp_path, files)
    assert count_cores({}, CPUS, root) == Cores(8, "this machine")
    assert count_cores({}, frozenset({0, 1, 8, 9}), root) == Cores(2, "affinity")


@pytest.fixture
def shell(monkeypatch):
    """A shell in which OpenMP's variables are as given, a quota leaves 3 cores, and torch is not loaded."""

    def begin(found=QUOTA, **variables):
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", *cores._WAITING):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        before = dict(os.environ)
        monkeypatch.setattr(os, "environ", environ := dict(before))
        monkeypatch.setattr(cores, "available_cores", lambda: found)
        monkeypatch.setitem(sys.modules, "torch", None)
        monkeypatch.delitem(sys.modules, "torch")
        set_openmp_defaults()
        return {name: value for name, value in environ.items() if before.get(name) != value}

    return begin


SPINS = {"GOMP_SPINCOUNT": cores._WAITING["GOMP_SPINCOUNT"], "KMP_BLOCKTIME": "1"}


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_waiting_is_left_as_the_user_set_it(name, shell):
    assert shell(**{name: "ACTIVE"}) == {"OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_number_of_threads_is_left_as_the_user_set_it(name, shell):
    assert shell(**{name: "7"}) == SPINS


def test_threads_are_as_many_as_the_quota_allows(shell):
    assert shell() == {**SPINS, "OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize("source", ["affinity", "this machine"])
def test_number_is_torchs_own_where_no_quota_limits_it(source, shell):
    assert shell(Cores(3, source)) == SPINS


PROGRAM = """
import os, sys
import genoembed.config.embed
from genoembed.cli import main
print(os.environ.get("GOMP_SPINCOUNT"))
main(["extract", "--help"], standalone_mode=False)
print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


def test_command_line_sets_it_before_torch_is_loaded_and_the_library_never():
    kept = {name: value for name, value in os.environ.items() if name not in cores._WAITING}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=kept, capture_output=True, text=True, check=True, timeout=60
    )
    lines = ran.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("None", f"{SPINS['GOMP_SPINCOUNT']} False")


def test_nothing_is_set_once_torch_is_loaded(shell, monkeypatch):
    shell(OMP_WAIT_POLICY="ACTIVE")
    monkeypatch.setitem(sys.modules, "torch", object())
    before = dict(os.environ)
    set_openmp_defaults()
    assert before == os.environ


def test_doctor_says_how_many_and_why(monkeypatch):
    monkeypatch.setattr(checks, "available_cores", lambda: Cores(2, "SLURM_CPUS_PER_TASK"))
    monkeypatch.setattr(checks, "bfloat16_speedup", lambda: 2.04)
    monkeypatch.setattr(checks.torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    said = checks._describe_device()
    assert "on 2 cores (SLURM_CPUS_PER_TASK), waiting by OMP_WAIT_POLICY=PASSIVE" in said
    assert said.endswith("products in bfloat16 2.0 times as fast as in float32")


@pytest.mark.parametrize(("source", "threads"), [("affinity", 3), ("OMP_NUM_THREADS", 6)])
def test_workers_share_the_cores_but_not_a_number_that_the_user_set(source, threads, monkeypatch):
    monkeypatch.setattr(cores, "available_cores", lambda: Cores(6, source))
    assert ray.threads_of_each(2) == threads


@pytest.mark.parametrize(("source", "seen"), [("cgroup quota", None), ("OMP_NUM_THREADS", "6")])
def test_workers_do_not_inherit_the_number_that_this_process_was_given(source, seen, monkeypatch):
    monkeypatch.setattr(ray, "available_cores", lambda: Cores(6, source))
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    with ray._threads_left_to_ray():
        assert os.environ.get("OMP_NUM_THREADS") == seen
    assert os.environ["OMP_NUM_THREADS"] == "6"
