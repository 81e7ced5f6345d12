"""Promises 9 to 12 and 14: identity, memory, records that fail, training that diverges, foreign code."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest

from tests.promises.columns import COLUMNS, having
from tests.promises.test_ends import SLOW, spoken
from tests.promises.test_usage import snapshot

FORWARD, TRAINING = having(14), having(12)
INFERENCE = {name: column for name, column in having(10).items() if name != "serve"}
"""A server batches what requests hold: test_serve.py."""

PATCH = """
import torch, torch.nn as nn
_run = nn.Embedding.forward
def patched(self, ids):
    {body}
nn.Embedding.forward = patched
"""
NO_MEMORY = PATCH.format(
    body="if ids.shape[0] > 1: raise torch.OutOfMemoryError('CUDA out of memory')\n    return _run(self, ids)"
)
BROKEN = PATCH.format(body="raise ValueError('boom in a foreign model')")
SPOILED = PATCH.format(
    body="out = _run(self, ids)\n"
    "    bad = (ids == ord('N')).sum(-1) > 4\n"
    "    return torch.where(bad[:, None, None], torch.full_like(out, float('nan')), out)"
)


@pytest.mark.promise(10)
@pytest.mark.parametrize("name", INFERENCE)
def test_short_memory_gives_the_same_result(name, warm, world):
    column = INFERENCE[name]
    plain = warm.run(*column.call(spoken(name)), cwd=world)
    assert plain.code == 0, plain.err
    before = table_of(world, column) if column.output else plain.out
    more = ["--overwrite"] if column.output else []
    short = warm.run(*column.call(spoken(name)), *more, cwd=world, patch=NO_MEMORY)
    assert short.code == 0, short.err
    after = table_of(world, column) if column.output else short.out
    assert close(before, after)


def table_of(world, column) -> str:
    """Read what was written as text; of an HDF5 file, its matrix."""
    import h5py

    target = world / column.output[1]
    if target.is_dir():
        found = json.loads((target / "probe.json").read_text())
        return json.dumps([found["layers"], found["untrained"]], sort_keys=True)
    if target.suffix == ".h5":
        with h5py.File(target) as file:
            return "\n".join(" ".join(f"{value:.6f}" for value in row) for row in file["X"])
    return target.read_text()


def close(before: str, after: str) -> bool:
    """Compare two texts, numbers within rounding."""
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    same = re.sub(number, "#", before) == re.sub(number, "#", after)
    pairs = zip(re.findall(number, before), re.findall(number, after), strict=True) if same else ()
    return same and all(abs(float(a) - float(b)) <= 2e-4 * max(1, abs(float(a))) for a, b in pairs)


@pytest.mark.promise(14)
@pytest.mark.parametrize("name", FORWARD)
def test_failure_of_foreign_code_is_one_line(name, warm, world):
    ran = warm.run(*FORWARD[name].call(spoken(name)), cwd=world, patch=BROKEN)
    assert ran.code == 1, ran.err
    assert "Traceback" not in ran.err, ran.err
    assert "boom in a foreign model" in ran.lines[-1]
    assert re.search(r"\w+\.py:\d+|<string>:\d+", ran.lines[-1]), ran.lines[-1]


READERS = {name: column for name, column in having(11).items() if name != "serve"}
"""A server's records come in requests: test_serve.py."""


@pytest.mark.promise(11)
@pytest.mark.parametrize("name", READERS)
def test_record_that_fails_is_named_and_skipped_where_asked(name, warm, world):
    column = READERS[name]
    file = world / ("reference.fa" if name == "score --vcf" else column.inputs[0])
    file.write_text(file.read_text() + ">spoiled\nACGTNNNNNNNNACGTACGTACGTACGTACGT\n")
    if name == "score --mutagenesis":
        (world / "place.bed").write_text("spoiled\t14\t16\n")
    if name == "score --vcf":
        with (world / "calls.vcf").open("a") as calls:
            calls.write("spoiled\t15\t.\tG\tC\t.\t.\t.\n")
    if name == "probe":
        with (world / "labels.tsv").open("a") as labels:
            labels.write("spoiled\tone\n")
    stopped = warm.run(*column.call(spoken(name)), cwd=world, patch=SPOILED)
    assert stopped.code == 1, stopped.err
    assert "Traceback" not in stopped.err
    assert "spoiled" in stopped.lines[-1]
    skipped = warm.run(*column.call(spoken(name)), "--on-error", "skip", cwd=world, patch=SPOILED)
    assert skipped.code == 3, skipped.err
    assert "spoiled" in skipped.err
    assert (world / column.output[1]).exists()


@pytest.mark.promise(12)
@pytest.mark.parametrize("name", TRAINING)
def test_training_that_diverges_ends_in_a_sentence(name, warm, world):
    column = TRAINING[name]
    ran = warm.run(*column.call(spoken(name)), "--learning-rate", "1e30", "--max-steps", "40", cwd=world)
    assert ran.code == 1, ran.err
    assert "Traceback" not in ran.err
    assert "not a number" in ran.lines[-1] or "not finite" in ran.lines[-1]
    for file in (world / column.output[1]).rglob("*.jsonl"):
        assert not re.search(r"\b(NaN|Infinity)\b", file.read_text())


GO_ON = having(9)


@pytest.mark.promise(9)
@pytest.mark.parametrize("what", ["options", "config.json", "tokenizer"])
@pytest.mark.parametrize("name", GO_ON)
def test_unfinished_work_of_something_else_is_refused(name, what, warm, world):
    column = GO_ON[name]
    more = ["--unit-bases", "100"] if name == "extract" else []
    running = warm.start(*column.call(spoken(name)), *more, cwd=world, patch=SLOW)
    kept = (
        "out.parts/unit-*.json"
        if name == "extract"
        else f"{column.output[1]}*/checkpoint-*/trainer_state.json"
    )
    end = time.monotonic() + 60
    while not list(world.glob(kept)) and not running.has_ended and time.monotonic() < end:
        time.sleep(0.01)
    assert not running.has_ended, running.wait().err
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    changed = [*column.resume]
    if what == "options":
        changed += column.changing
    elif what == "config.json":
        path = world / "model" / "config.json"
        path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03'))
    else:
        path = world / "model" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "do_lower_case": True}))
    before = snapshot(world / "out.parts") if name == "extract" else {}
    ran = warm.run(*column.call(spoken(name)), *more, *changed, cwd=world)
    assert ran.code == 1, ran.err
    assert "Traceback" not in ran.err
    assert not before or snapshot(world / "out.parts") == before


def test_shares_of_different_models_are_never_merged(warm, world):
    words = COLUMNS["extract"].call("extract", output="parts.h5")
    assert warm.run(*words, "--unit-bases", "100", "--shard", "1/2", cwd=world).code == 0
    path = world / "model" / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03'))
    other = warm.run(*words, "--unit-bases", "100", "--shard", "2/2", cwd=world)
    assert other.code == 1, other.err
    assert "model" in other.lines[-1]
