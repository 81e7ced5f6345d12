"""Every reader on its seeds, on inputs that broke one before, and on a few hundred mutations of both."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import fuzz
import pytest
from fuzz_targets import TARGETS, Target, outcome_of

from genoembed.sequences import formats as fasta
from genoembed.store import seal

ROOT = Path(__file__).parents[2]
REGRESSIONS = ROOT / "tests" / "fuzz" / "regressions"
SLOW = {
    "model_config": 10,
    "finetune_config": 30,
    "vortex_config": 20,
    "checkpoint": 40,
    "parquet": 40,
    "reference": 40,
    "model_build": 10,
}
IN_PROCESS = sorted(TARGETS.keys() - set(fuzz.FORKED))

pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' opinions on nonsense


@pytest.fixture(autouse=True)
def _trial_stays(monkeypatch):
    """Give back the trial of files without a seal, which targets replace for their whole process."""
    monkeypatch.setattr(seal, "check_in_child", seal.check_in_child)


@pytest.mark.parametrize("name", IN_PROCESS)
def test_fuzz_seeds_and_mutations_give_records_or_our_errors(name, tmp_path):
    target, rng = TARGETS[name], random.Random(zlib.crc32(name.encode()))
    seeds = fuzz.seeds_of(name)
    outcomes = {outcome_of(target, seed, tmp_path) for seed in seeds}
    assert "records" in outcomes  # the seeds get past the door
    for _ in range(SLOW.get(name, 150)):
        outcomes.add(outcome_of(target, fuzz.mutated(rng.choice(seeds), seeds, target.tokens, rng), tmp_path))
    assert (
        len(outcomes) > 1 or name == "model_card"
    )  # a card that is nonsense has no license, and that is all


@pytest.mark.parametrize(
    "path", sorted(REGRESSIONS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_fuzz_finding_of_the_past_stays_mended(path, tmp_path):
    outcome = outcome_of(TARGETS[path.parent.name], path.read_bytes(), tmp_path)
    assert outcome == "records" or outcome.endswith("Error")


def test_fuzz_corpus_is_small_and_every_folder_is_used():
    corpus = ROOT / "tests" / "fuzz" / "corpus"
    assert sum(path.stat().st_size for path in corpus.rglob("*") if path.is_file()) < 200_000
    used = {target.corpus for target in TARGETS.values() if target.corpus}
    assert {path.name for path in corpus.iterdir()} == used


def test_fuzz_outcome_of_a_bad_reader_is_not_hidden(tmp_path):
    def broken(content, folder):
        raise IndexError(len(content))

    with pytest.raises(IndexError, match="3"):
        outcome_of(Target(name="broken", run=broken, corpus=""), b"abc", tmp_path)


def test_fuzz_recorder_keeps_one_input_of_each_finding(tmp_path, monkeypatch):
    def broken(content, folder):
        if content:
            raise KeyError(content)

    monkeypatch.setitem(TARGETS, "broken", Target(name="broken", run=broken, corpus="fasta"))
    monkeypatch.setattr(fuzz.logging, "disable", lambda level: None)
    monkeypatch.setattr(fuzz, "_memory_folder", lambda: str(tmp_path))
    recorder = fuzz.Recorder("broken", tmp_path)
    for content in (b"one", b"", b"two"):
        recorder.run(content)
    assert recorder.outcomes == {"finding": 2, "records": 1}
    (kept,) = tmp_path.glob("finding-*.bin")
    assert kept.read_bytes() == b"one"
    assert kept.with_suffix(".txt").read_text().startswith("KeyError")


def test_fuzz_mutations_change_and_are_the_same_for_a_seed():
    seeds = fuzz.seeds_of("fasta")
    first = [fuzz.mutated(seeds[0], seeds, (b">",), random.Random(3)) for _ in range(5)]
    assert first == [fuzz.mutated(seeds[0], seeds, (b">",), random.Random(3)) for _ in range(5)]
    rng = random.Random(4)
    assert len({fuzz.mutated(seeds[0], seeds, (b">",), rng) for _ in range(50)}) > 30


def test_fuzz_parser_check_notices_a_reader_that_depends_on_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(fasta, "_safe_cut", len)
    monkeypatch.setattr(fasta, "_MAX_HEADER_BYTES", 64)

    def try_all():
        for number in range(40):
            outcome_of(TARGETS["fasta"], b">abc def\nACGT\n>b%d\nGG\n" % number, tmp_path)

    with pytest.raises(AssertionError, match="read differently"):
        try_all()
