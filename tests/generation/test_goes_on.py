"""`generate` where it is cut off: the next run goes on, and something else is refused."""

from __future__ import annotations

import math

import pytest

import genoembed
from genoembed.errors import EmptyRecordError, Interrupted, StoreError
from genoembed.generation import run
from genoembed.generation.sampler import SequenceGenerator
from tests.by_hand import random_dna
from tests.scoring.by_plain_torch import loaded

PROMPTS = {f"p{number}": random_dna(12 + number, number) for number in range(6)}


def generate(folder, prompts=PROMPTS, **options):
    path = folder / "in.fa"
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in prompts.items()))
    options = {"model": loaded("llama"), "output": folder / "out.fa", "num_samples": 2, "length": 6} | options
    return genoembed.generate(path, **options)


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(run, "_UNIT_SAMPLES", 4)


class Stops:
    """Ends a run after some prompts."""

    def __init__(self, monkeypatch):
        self.prompts, self.after = 0, math.inf
        original = SequenceGenerator.generate

        def generate(generator, records):
            if self.prompts >= self.after:
                raise Interrupted
            self.prompts += len(records)
            return original(generator, records)

        monkeypatch.setattr(SequenceGenerator, "generate", generate)


@pytest.fixture
def stops(monkeypatch):
    return Stops(monkeypatch)


def interrupted(folder, stops, **options):
    stops.after = 4
    with pytest.raises(KeyboardInterrupt) as caught:
        generate(folder, **options)
    assert "finished unit" in caught.value.__notes__[0]
    assert not (folder / "out.fa").exists()
    stops.prompts, stops.after = 0, math.inf


def test_a_run_that_was_cut_off_goes_on_where_it_was(tmp_path, stops):
    (tmp_path / "whole").mkdir()
    generate(tmp_path / "whole")
    stops.prompts = 0
    interrupted(tmp_path, stops)
    report = generate(tmp_path)
    assert (stops.prompts, report.stats.units_kept, report.stats.records_kept) == (2, 2, 4)
    assert (report.num_prompts, report.num_sequences) == (6, 12)
    assert (tmp_path / "out.fa").read_text() == (tmp_path / "whole" / "out.fa").read_text()
    assert not list(tmp_path.rglob("*.parts"))


@pytest.mark.parametrize(
    ("option", "value", "difference"),
    [
        ("seed", 1, "seed was 0 and is 1"),
        ("temperature", 0.5, "temperature was 1.0 and is 0.5"),
        ("top_k", 2, "top_k was None and is 2"),
        ("length", 7, "length was 6 and is 7"),
        ("tag", "ACG", "tag was None and is 'ACG'"),
        ("start_token", "none", "start_token was '2' and is 'none'"),
        ("model", "mistral", "weights has other content"),
    ],
)
def test_what_decides_the_sequences_may_not_change(tmp_path, stops, option, value, difference):
    interrupted(tmp_path, stops)
    value = loaded(value) if option == "model" else value
    with pytest.raises(StoreError, match=rf"of another run: .*{difference}"):
        generate(tmp_path, **{option: value})
    generate(tmp_path, **{option: value}, overwrite=True)
    assert not list(tmp_path.rglob("*.parts"))


def test_what_does_not_decide_them_may_change(tmp_path, stops):
    interrupted(tmp_path, stops)
    report = generate(tmp_path, batch_rows=1, cache=False, with_prompt=True, on_error="skip")
    assert report.stats.units_kept == 2
    records = list(genoembed.read_sequences(tmp_path / "out.fa", empty="skip"))
    assert all(record.sequence.decode().startswith(PROMPTS[record.id[:2]]) for record in records)


def test_another_prompt_is_refused(tmp_path, stops):
    interrupted(tmp_path, stops)
    with pytest.raises(StoreError, match="unit 0 was made from other sequences"):
        generate(tmp_path, PROMPTS | {"p1": "ACGTACGT"})


def test_standard_output_and_rows_in_memory_keep_nothing(tmp_path, stops, capsys):
    for output in (None, "-"):
        stops.prompts, stops.after = 0, 4
        with pytest.raises(KeyboardInterrupt):
            generate(tmp_path, output=output)
    assert [path.name for path in tmp_path.iterdir()] == ["in.fa"]
    assert capsys.readouterr().out.count(">") == 8


def test_no_prompt_at_all_is_an_error(tmp_path):
    with pytest.raises(EmptyRecordError, match="no record is left to continue"):
        generate(tmp_path, {"a": ""}, empty="skip")


def test_only_a_file_of_generate_is_replaced(tmp_path):
    out = tmp_path / "out.fa"
    out.write_text(">chr1\nACGT\n")
    with pytest.raises(StoreError, match="was not written by genoembed"):
        generate(tmp_path, overwrite=True)
    assert out.read_text() == ">chr1\nACGT\n"
    out.unlink()
    generate(tmp_path)
    before = out.read_text()
    with pytest.raises(StoreError, match="exists already"):
        generate(tmp_path)
    generate(tmp_path, overwrite=True, seed=1)
    assert out.read_text() != before


def test_long_first_header_is_still_known_as_ours(tmp_path):
    generate(tmp_path, {"n" * 5000: "ACGTACGT"})
    generate(tmp_path, {"n" * 5000: "ACGTACGT"}, overwrite=True)
