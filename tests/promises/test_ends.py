"""Promises 5 to 8 and 13: kills, signals, full disks, closed pipes, two at once, and what is said."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from genoembed.atomic import lock, partial_of
from tests.promises.columns import ALL, having
from tests.promises.test_usage import snapshot

WRITERS = having(5)
LONG = {name: column for name, column in WRITERS.items() if column.runs_forward}
SLOW = (
    "import time, torch.nn as nn; _run = nn.Embedding.forward\n"
    "def slow(self, *a, **k):\n"
    "    open('../.forward', 'w').close()\n"
    "    time.sleep(0.3)\n"
    "    return _run(self, *a, **k)\n"
    "nn.Embedding.forward = slow"
)
"""Each forward pass says that it runs, and takes long enough to be met in the middle."""


def await_forward(running, world) -> None:
    """Wait until a model runs."""
    end = time.monotonic() + 60
    while not (world.parent / ".forward").exists() and not running.has_ended and time.monotonic() < end:
        time.sleep(0.005)
    assert not running.has_ended, running.wait().err


def leftovers(world, before) -> list[str]:
    """Name what a run left beside its outputs."""
    return sorted({path.name for path in world.iterdir()} - before)


def spoken(name: str) -> str:
    return name.split()[0]


@pytest.mark.promise(6)
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("name", LONG)
def test_signal_ends_a_run_in_one_line(name, number, code, warm, world):
    column = LONG[name]
    running = warm.start(*column.call(spoken(name)), cwd=world, patch=SLOW)
    await_forward(running, world)
    running.signal(number)
    ran = running.wait(timeout_s=60)
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    assert ran.lines[-1].startswith("Interrupted")


@pytest.mark.promise(6)
@pytest.mark.parametrize("name", ALL)
def test_interruption_of_the_first_moment_is_one_line(name, warm, world):
    running = warm.start(*ALL[name].call(spoken(name)), cwd=world, patch="import time; time.sleep(0.05)")
    time.sleep(0.06)
    running.signal(signal.SIGINT)
    ran = running.wait(timeout_s=60)
    # before its own handlers are there, the signal itself ends the process, which says nothing
    assert ran.code in (0, 130, -signal.SIGINT), ran.err
    assert "Traceback" not in ran.err


@pytest.mark.promise(5)
@pytest.mark.parametrize("name", WRITERS)
def test_kill_leaves_nothing_half_written_and_the_rerun_cleans_up(name, warm, world):
    column = WRITERS[name]
    words = column.call(spoken(name))
    before = {path.name for path in world.iterdir()}
    running = warm.start(*words, cwd=world, patch=SLOW)
    end = time.monotonic() + 20
    while not leftovers(world, before) and not running.has_ended and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(0.02)
    if not running.has_ended:
        os.kill(running.pid, signal.SIGKILL)
    running.wait()
    again = warm.run(*words, *column.resume, cwd=world)
    if again.code != 0 and column.output[1] in again.err and (world / column.output[1]).exists():
        again = warm.run(*words, "--overwrite", cwd=world)
    assert again.code == 0, again.err
    wanted = {column.output[1], *(f"{column.output[1]}{end}" for end in (".log",))}
    assert set(leftovers(world, before)) <= wanted


@pytest.mark.promise(7)
@pytest.mark.parametrize("name", ALL)
def test_full_standard_output_is_one_line(name, warm, world):
    column = ALL[name]
    call = (
        column.call(spoken(name))
        if column.output and column.output[0] == ""
        else [spoken(name), *column.words]
    )
    if column.is_folder or name in (
        "extract",
        "fit-transform",
        "export",
        "plot",
        "subset",
        "join",
        "annotate",
    ):
        call = column.call(spoken(name))
    ran = warm.run(*call, cwd=world, stdout="/dev/full")
    assert "Traceback" not in ran.err
    assert "Exception ignored" not in ran.err
    assert ran.code in (0, 1)
    assert ran.code == 1 or not ran.err or "No space" not in ran.err


@pytest.mark.promise(7)
@pytest.mark.parametrize("limit", [100, 3_000])
@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_is_one_line_and_leaves_nothing_half_written(name, limit, warm, world):
    column = WRITERS[name]
    before = {path.name for path in world.iterdir()}
    ran = warm.run(*column.call(spoken(name)), cwd=world, max_file_bytes=limit)
    assert "Traceback" not in ran.err, ran.err
    if ran.code == 0:
        return  # what it writes is smaller
    assert ran.code == 1
    if column.output[1] not in before:
        assert not (world / column.output[1]).exists() or column.goes_on
    again = warm.run(*column.call(spoken(name)), *column.resume, cwd=world)
    assert again.code == 0, again.err


@pytest.mark.promise(7)
@pytest.mark.parametrize("name", WRITERS)
def test_output_in_a_place_that_is_no_folder_is_one_line(name, warm, world):
    column = WRITERS[name]
    if not column.output[0]:
        pytest.skip("its output is what is already there")
    ran = warm.run(*column.call(spoken(name), output="seqs.fa/inside"), cwd=world)
    assert ran.code in (1, 2), ran.err
    assert "Traceback" not in ran.err
    assert "seqs.fa" in ran.lines[-1]


@pytest.mark.promise(8)
@pytest.mark.parametrize("name", [name for name in LONG])
def test_second_process_on_one_output_is_refused(name, warm, world):
    column = LONG[name]
    words = column.call(spoken(name))
    before = {path.name for path in world.iterdir()}
    first = warm.start(*words, cwd=world, patch=SLOW)
    await_forward(first, world)  # what is there before may be there before the lock
    while not leftovers(world, before) and not first.has_ended:
        time.sleep(0.005)
    assert not first.has_ended, "nothing appears before the run is over: what would a second one see?"
    os.kill(first.pid, signal.SIGSTOP)
    second = warm.run(*words, cwd=world)
    os.kill(first.pid, signal.SIGCONT)
    ended = first.wait()
    assert (ended.code, second.code) == (0, 1), ended.err + second.err
    assert "Traceback" not in second.err
    assert Path(column.output[1]).stem in second.lines[-1]
    alone = snapshot(world / column.output[1])
    assert alone


@pytest.mark.promise(8)
@pytest.mark.parametrize("name", [name for name in having(8) if name not in LONG])
def test_output_that_another_process_writes_is_refused(name, warm, world):
    """These are over too soon to be met: this process has the lock instead."""
    column = WRITERS[name]
    partial = partial_of(world / column.output[1])
    if name == "merge":
        partial = world / "shared.parts" / "merge.lock"
    if column.is_folder:
        partial.mkdir()
    held = lock(partial, output=column.output[1])
    before = {path.name for path in world.iterdir()}
    refused = warm.run(*column.call(spoken(name)), cwd=world)
    os.close(held)
    assert refused.code == 1, refused.err
    assert "Traceback" not in refused.err
    assert "another process" in refused.lines[-1]
    assert not leftovers(world, before)


@pytest.mark.promise(13)
@pytest.mark.parametrize("name", ALL)
def test_json_is_one_object(name, warm, world):
    ran = warm.run(*ALL[name].call(spoken(name)), "--json", cwd=world)
    assert ran.code == 0, ran.err
    assert isinstance(json.loads(ran.out), dict | list)


@pytest.mark.promise(13)
@pytest.mark.parametrize("name", WRITERS)
def test_last_line_names_what_was_written(name, warm, world):
    column = WRITERS[name]
    ran = warm.run(*column.call(spoken(name)), cwd=world)
    assert ran.code == 0, ran.err
    assert column.output[1] in ran.lines[-1], ran.err
    for sign in ("Counts(", "Config(", "PosixPath(", "<genoembed", "np.float"):
        assert sign not in ran.err + ran.out


def test_merge_that_is_started_again_finds_its_work_done(warm, world):
    first = warm.run("merge", "shared.h5", cwd=world)
    before = (world / "shared.h5").read_bytes()
    again = warm.run("merge", "shared.h5", cwd=world)
    assert (first.code, again.code, again.out) == (0, 0, first.out), again.err
    assert (world / "shared.h5").read_bytes() == before
