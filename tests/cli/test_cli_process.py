"""Real processes: interruptions, closed pipes, terminals, light start."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

import genoembed
from genoembed.cli.outcome import _StopSignals
from genoembed.errors import Interrupted

RECORDS_OF_A_UNIT = 20_000
HEAVY = ("torch", "transformers", "h5py", "rich", "numpy")


def wait_for(condition, *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "overwrite", "line"),
    [
        (signal.SIGINT, False, "nothing was written to out.h5"),
        (signal.SIGTERM, True, "out.h5 is as it was, nothing was written"),
    ],
)
def test_interruption_keeps_finished_units_only(number, overwrite, line, spawn, fasta, tiny):
    output = fasta.parent / "out.h5"
    if overwrite:
        genoembed.extract(fasta, model=tiny, layers=0, output=output, threads=1)
    precious = output.read_bytes() if overwrite else b""
    before = sorted(fasta.parent.iterdir())
    words = ["extract", "-", "--model", tiny, "--layer", 0, "-o", "out.h5", "-q", "--threads", 1]
    process = spawn(
        *words,
        *["--overwrite"] * overwrite,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    # more records than a unit holds, and more bytes than are read at once: the first unit is saved when the
    # command waits for more input
    records = (b">%d %s\nACGT\n" % (index, b"-" * 100) for index in range(RECORDS_OF_A_UNIT * 3 // 2))
    process.stdin.write(b"".join(records))
    process.stdin.flush()
    wait_for(lambda: list(Path().glob("out.parts/unit-*.json")) or process.poll() is not None)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr.decode()
    parts = fasta.parent / "out.parts"
    kept = f"1 finished unit is kept in {parts}: run the same command again to go on"
    last = f"Interrupted: {line}; {kept}."
    assert stderr.decode().splitlines()[-1] == last
    assert "Traceback" not in stderr.decode()
    assert stdout == b""
    assert sorted(fasta.parent.iterdir()) == sorted([*before, parts])
    assert not list(parts.glob("*.tmp"))
    assert not overwrite or output.read_bytes() == precious


def test_reader_that_went_away_is_no_failure(spawn, fasta, tiny):
    process = spawn("layers", tiny, "--all", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr.decode()) == (0, "options checked; loading PyTorch and the model\n")


def test_closed_stdout_and_stderr_do_not_stop_an_extraction(spawn, fasta, tiny):
    reading, writing = os.pipe()
    process = spawn("extract", fasta, "--model", tiny, "--layer", 0, stdout=writing, stderr=writing)
    os.close(writing)
    os.close(reading)
    assert process.wait(timeout=60) == 0
    with genoembed.open_embeddings("seqs.h5") as embeddings:
        assert embeddings.ids == ["a", "b", "c"]


def test_pipe_in_and_json_out(spawn, fasta, tiny):
    process = spawn(
        *("extract", "-", "--model", tiny, "--layer", 3, "--json"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    stdout, stderr = process.communicate(fasta.read_bytes(), timeout=60)
    assert process.returncode == 0, stderr.decode()
    assert json.loads(stdout)["layers"] == ["blocks.3.mlp.l3"]
    with genoembed.open_embeddings("embeddings.h5") as embeddings:
        assert embeddings.provenance["command"].endswith("--layer 3 --json")


def test_terminal_gets_a_bar(spawn, fasta, tiny):
    master, terminal = pty.openpty()
    words = ["extract", fasta, "--model", tiny, "--layer", 0]
    process = spawn(*words, stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        # a terminal holds 4 kB only, then who writes to it waits
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # how Linux says that the other side of a terminal is closed
        pass
    stdout, _ = process.communicate(timeout=60)
    os.close(master)
    assert process.returncode == 0
    assert stdout.decode().splitlines() == [f"{fasta.parent / 'seqs.h5'}: 3 rows x 32, blocks.0.mlp.l3"]
    assert b"b/s" in shown
    assert b"% padding" in shown
    assert b"tokens/s" in shown


@pytest.mark.parametrize(
    "words", [[], ["extract"], ["layers"], ["models"], ["info"], ["convert"], ["doctor"]]
)
def test_help_loads_nothing_heavy(words):
    code = f"""
import sys
from genoembed.cli import main
try:
    main([*{words!r}, "--help"], prog_name="genoembed")
except SystemExit as end:
    assert not end.code
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.startswith("Usage: genoembed")
    assert ran.stdout.splitlines()[-1] == "[]"


def test_help_answers_at_once():
    started = time.process_time(), os.times().children_user
    subprocess.run([sys.executable, "-m", "genoembed", "extract", "--help"], capture_output=True, check=True)
    assert os.times().children_user - started[1] < 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_that_a_callback_swallows_comes_again(number):
    class Thing:
        pass

    def callback(_reference):
        signal.raise_signal(number)
        time.sleep(0)  # here the handler runs, and what it raises is ignored

    things = [Thing()]
    reference = weakref.ref(things[0], callback)

    def work():
        things.clear()
        time.sleep(5)

    with pytest.raises(Interrupted) as caught, _StopSignals().taken():
        work()
    assert caught.value.number == number
    assert reference() is None
