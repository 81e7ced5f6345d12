"""The GPU script: every part at tiny shapes on the CPU, and parts that skip, fail, hang or die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_bench
import pytest

FAKE = """
import os, signal, sys, time
sys.path.insert(0, {folder!r})
import gpu
from measuring import SkippedError

class Report:
    def __init__(self, *problems):
        self.problems = problems
    def to_dict(self):
        figures = [dict(name="a figure", value=2.0, at_least=1.0)]
        tables = dict(Things=[dict(a=1)])
        return dict(figures=figures, tables=tables, remarks=["said"], problems=self.problems)

def skip():
    raise SkippedError("there is no such unit here")

def boom():
    raise ValueError("wrong | shape")

def hang():
    time.sleep(600)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def good():
    print("what a library prints")
    return Report()

def off():
    return Report("x is 3, expected at most 1")

parts = dict(good=good, off=off, skip=skip, boom=boom, hang=hang, die=die)
gpu.serve(parts, dict(cpu="a processor", pid=os.getpid()), gpu.own_answers())
"""
PARTS = {name: gpu.Part(name, 30) for name in ("good", "off", "skip", "boom", "die")}
PARTS["hang"] = gpu.Part("hang", 0.5)


@pytest.fixture
def words(tmp_path):
    script = tmp_path / "fake_worker.py"
    script.write_text(FAKE.format(folder=str(Path(gpu.__file__).parent)))
    return [sys.executable, str(script)]


@pytest.fixture
def run(words, tmp_path, monkeypatch):
    """Run the command with parts of the fake worker; exit status and what was filed."""

    def run(*names, **changes):
        monkeypatch.setattr(gpu, "PARTS", PARTS)
        monkeypatch.setattr(gpu, "worker_words", lambda _options: words)
        more = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
        code = gpu.main(["--tiny", "--results", str(tmp_path / "out"), "--parts", *names, *more])
        stored = json.loads((tmp_path / "out" / "gpu.json").read_text())
        page = (tmp_path / "out" / "gpu.md").read_text()
        return code, {part["part"]: part for part in stored["parts"]}, page

    return run


@pytest.fixture(scope="module")
def bench():
    return gpu_bench.Bench("cpu", is_tiny=True)


# torch's compiler makes an instance of each autograd function, of which torch itself then warns
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in gpu.PARTS if name not in ("compiled_training", "vortex")])
def test_every_part_runs_at_tiny_shapes(name, bench):
    report = bench.run(gpu.load_parts()[name])
    assert report.problems == []
    assert report.figures or report.tables
    json.dumps(report.to_dict())


def test_every_part_has_a_budget_and_all_fit_into_eight_minutes():
    assert set(gpu.PARTS) == set(gpu.load_parts())
    assert gpu.TOTAL_S < 480


def test_parts_that_skip_fail_hang_or_die_do_not_stop_the_others(run, capfd):
    code, parts, page = run("boom", "skip", "hang", "die", "off", "good")
    assert code == 1
    assert {name: part["status"] for name, part in parts.items()} == {
        **dict.fromkeys(("boom", "hang", "die"), "failed"),
        **{"skip": "skipped", "off": "off", "good": "done"},
    }
    assert parts["boom"]["reason"] == "ValueError: wrong | shape"
    assert "in boom" in parts["boom"]["trace"]
    assert parts["hang"]["reason"] == "it did not end within 0.5 s"
    assert parts["die"]["reason"] == "its process ended (signal SIGKILL)"
    assert parts["skip"]["reason"] == "there is no such unit here"
    assert parts["off"]["reason"] == "x is 3, expected at most 1"
    assert "| boom | boom | failed |" in page
    assert "| a figure | 2 |  |  | at least 1 | yes |" in page
    assert "No GPU was at hand" in page
    assert capfd.readouterr().err.splitlines()[-1] == "failed: boom, hang, die, off"


def test_a_run_without_failures_ends_with_zero(run):
    code, parts, page = run("skip", "good", note="idle")
    assert code == 0
    assert parts["good"]["report"]["remarks"] == ["said"]
    assert "- note: idle" in page


def test_parts_for_which_no_time_is_left_are_skipped(run):
    code, parts, _ = run("good", "skip", **{"total-s": 0})
    assert code == 0
    assert {part["reason"] for part in parts.values()} == {"no time is left for it"}


def test_a_killed_run_keeps_what_it_has_and_leaves_no_process(words, tmp_path):
    code = (
        "import sys, gpu; gpu.PARTS = {n: gpu.Part(n, 60) for n in ('good', 'hang')};"
        f"gpu.worker_words = lambda o: {words!r};"
        f"gpu.main(['--tiny', '--results', {str(tmp_path)!r}])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(gpu.__file__).parent)}
    stored = tmp_path / "gpu.json"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL
    ) as process:
        until(stored.is_file)
        process.send_signal(signal.SIGKILL)
    found = json.loads(stored.read_text())
    assert [part["status"] for part in found["parts"]] == ["done"]
    assert "| good |" in (tmp_path / "gpu.md").read_text()
    until(lambda: not Path(f"/proc/{found['machine']['pid']}").exists())


def until(is_true, seconds=20):
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_without_the_device_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_bench.torch, "zeros", raise_no_driver)
    answer = gpu_bench.Bench("cuda", is_tiny=False).machine
    assert answer == {"error": "device 'cuda' cannot be used here: no NVIDIA driver"}
    words = [sys.executable, "-c", f"print({json.dumps(answer)!r})"]
    monkeypatch.setattr(gpu, "worker_words", lambda _options: words)
    assert gpu.main(["--results", str(tmp_path)]) == 2
    expected = "device 'cuda' cannot be used here: no NVIDIA driver; --tiny runs small shapes on the CPU\n"
    assert capsys.readouterr().err == expected
    assert not list(tmp_path.iterdir())


def raise_no_driver(*_, **__):
    raise RuntimeError("no NVIDIA driver\nand more")
