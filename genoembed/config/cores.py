"""How many CPU cores this process may use, and how OpenMP is set up on the command line.

In: the affinity of the process, the quotas of its control groups, what a batch system or the user set. Out: a
number and where it comes from. Nothing here is done on import, and variables that the user has set are never
changed. OpenMP reads its variables when torch is loaded, so they are set before.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_JOBS = ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "NSLOTS", "PBS_NUM_PPN", "LSB_DJOB_NUMPROC")
"""Cores that a batch system gave (Slurm, Grid Engine, Torque, LSF); the first that is set counts."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_WAITING = {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""How threads wait for the next parallel region: what users may set, and what is set where they have not.

While it spins, a thread keeps its core from others; once asleep, it takes longer to wake. GNU's OpenMP, which
is in torch's wheels for Linux, spins 300,000 times, LLVM's and Intel's for 200 ms. Waits are far shorter than
that, except where another job has the core. Measured there, on the bundled model in two threads, CPU seconds
were 1.08 times those of sleeping at once with 1,000 turns (some 0.1 ms), 1.4 times with 3,000, 2 times with
10,000.
"""


@dataclass(frozen=True, slots=True)
class Cores:
    """Cores that this process may use."""

    count: int
    """1 or more."""
    source: str
    """What limits the number: a variable, ``cgroup quota``, ``affinity`` or ``this machine``."""

    @property
    def is_set(self) -> bool:
        """Whether the user set the number, for each process."""
        return self.source in _THREADS


@cache
def available_cores() -> Cores:
    """Count the cores that this process may use; once, as the command line sets variables by it."""
    return count_cores(os.environ, _own_cpus())


def threads_of_each(num_processes: int) -> int:
    """Divide the cores among processes; a number that the user set for OpenMP is each one's."""
    cores = available_cores()
    return cores.count if cores.is_set else max(1, cores.count // num_processes)


def set_openmp_defaults() -> None:
    """Set how many threads OpenMP has and how they wait, unless the user has or torch is loaded already."""
    if "torch" in sys.modules:
        return
    cores = available_cores()
    # where nothing but the machine limits them, torch's own number is as good: cores, not hardware threads
    if not _is_set(*_THREADS) and cores.source not in (_AFFINITY, _MACHINE):
        os.environ["OMP_NUM_THREADS"] = str(cores.count)
    if not _is_set(*_WAITING):
        os.environ.update({name: value for name, value in _WAITING.items() if value is not None})


def describe_waiting() -> str:
    """Say how threads wait for the next parallel region: by which variables, set by the user or here."""
    found = [f"{name}={os.environ[name]}" for name in _WAITING if _is_set(name)]
    return f"waiting by {', '.join(found)}" if found else "waiting as OpenMP does by default"


_AFFINITY, _MACHINE, _QUOTA = "affinity", "this machine", "cgroup quota"


def count_cores(environ: Mapping[str, str], cpus: frozenset[int] | None, root: Path = Path("/")) -> Cores:
    """Find the smallest limit; what the user set for OpenMP is taken as it is.

    Args:
        environ: Variables of the process.
        cpus: Numbers of the CPUs that it may run on; None where the system does not say.
        root: Where ``proc`` and ``sys`` are.

    Example:
        >>> count_cores({"OMP_NUM_THREADS": "3,2"}, None)
        Cores(count=3, source='OMP_NUM_THREADS')
    """
    for name in _THREADS:
        if (found := _positive(environ.get(name, "").partition(",")[0])) is not None:
            return Cores(found, name)
    on_machine = os.cpu_count() or 1
    is_bound = cpus is not None and len(cpus) < on_machine
    limits = [
        Cores(on_machine if cpus is None else _physical(cpus, root), _AFFINITY if is_bound else _MACHINE)
    ]
    quotas = [*_quotas(root)]
    if quotas:
        # a part of a core is left to others: a thread that is throttled keeps all others waiting
        limits.append(Cores(max(1, int(min(quotas))), _QUOTA))
    jobs = [Cores(found, name) for name in _JOBS if (found := _positive(environ.get(name, ""))) is not None]
    return min(limits + jobs[:1], key=lambda limit: limit.count)


def _positive(text: str) -> int | None:
    return int(text) if re.fullmatch(r"0*[1-9]\d{0,11}", text.strip(), re.ASCII) else None


def _is_set(*names: str) -> bool:
    return any(os.environ.get(name, "").strip() for name in names)


def _own_cpus() -> frozenset[int] | None:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return None


def _physical(cpus: frozenset[int], root: Path) -> int:
    """Count cores: two hardware threads of one share what multiplies."""
    folder = root / "sys/devices/system/cpu"
    try:
        return len({(folder / f"cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in cpus})
    except OSError:
        return len(cpus)


def _quotas(root: Path) -> Iterator[float]:
    """Read the quotas of this process's control groups and all above them, in cores; of either version."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (root / "proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return
    for mount in mounts:
        # "36 25 0:32 /its/root /where/it/is rw,... optional fields - cgroup cgroup rw,cpu,cpuacct"
        if "-" not in mount or len(mount) < 5:
            continue
        kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
        if kind == "cgroup2":
            paths = [path for number, names, path in groups if number == "0" and not names]
        elif kind == "cgroup" and "cpu" in options:
            paths = [path for _, names, path in groups if "cpu" in names.split(",")]
        else:
            continue
        top = root / mount[4].lstrip("/")
        for path in paths:
            # in a container without a namespace of its own, the group's path begins with the mount's root
            inner = path.removeprefix(mount[3]) if mount[3] != "/" else path
            places = [part for part in inner.split("/") if part not in ("", "..")]
            for depth in range(len(places), -1, -1):
                yield from _quota(top.joinpath(*places[:depth]))


def _quota(group: Path) -> Iterator[float]:
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
    except (OSError, ValueError):
        return
    if (allowed := _positive(quota)) is not None and (whole := _positive(period)) is not None:
        yield allowed / whole
