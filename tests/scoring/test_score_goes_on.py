"""`score` and `score_variants` where something fails: records are left out, or the next run goes on."""

from __future__ import annotations

import logging
import math
from functools import partial

import h5py
import numpy as np
import pytest
import torch

import genoembed
from genoembed.errors import InputError, Interrupted, NonFiniteError, StoreError, VariantError
from genoembed.models import precision
from genoembed.models.language_model import LanguageModel
from genoembed.scoring import alleles, sequences
from tests.by_hand import random_dna
from tests.scoring.by_plain_torch import CAUSAL, folder_of, loaded

RECORDS = {f"r{number}": random_dna(20 + number, number) for number in range(6)}
CONTIG = random_dna(400, 11)
PLACES = (30, 110, 190, 270, 350)


def write(folder, records=RECORDS):
    path = folder / "in.fa"
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records.items()))
    return path


def score(folder, records=RECORDS, **options):
    options = {
        "model": loaded("llama"),
        "output": folder / "out.tsv",
        "per_base": folder / "bases.tsv",
    } | options
    return genoembed.score(write(folder, records), **options)


def score_variants(folder, *, contig=CONTIG, **options):
    (folder / "ref.fa").write_text(f">c\n{contig}\n")
    rows = [
        f"c\t{at}\tv{at}\t{contig[at - 1]}\t{'ACGT'['ACGT'.index(contig[at - 1]) - 1]}\n" for at in PLACES
    ]
    (folder / "calls.vcf").write_text("".join(rows))
    options = {"model": loaded("llama"), "output": folder / "out.tsv", "layer": 0, "flank": 20} | options
    return genoembed.score_variants(
        folder / "calls.vcf", folder / "ref.fa", vectors=folder / "deltas.h5", **options
    )


WAYS = {"sequences": (score, "bases.tsv"), "variants": (score_variants, "deltas.h5")}


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(sequences, "PART_RECORDS", 2)
    monkeypatch.setattr(alleles, "PART_BASES", 150)


@pytest.fixture
def passes(monkeypatch):
    """Passes of the model, which may fail: at a number, or for rows that begin with a text."""
    return Passes(monkeypatch)


class Passes:
    def __init__(self, monkeypatch):
        self.rows, self.stop_after, self.error = 0, math.inf, Interrupted()
        self.spoiled = None
        self._original = LanguageModel.log_probs
        monkeypatch.setattr(LanguageModel, "log_probs", lambda *args, **options: self._run(*args, **options))

    def _run(self, model, batch, **options):
        if self.rows >= self.stop_after:
            raise self.error
        self.rows += len(batch.rows)
        found = self._original(model, batch, **options)
        if self.spoiled is not None:
            wanted = torch.tensor(model.model.tokenizer(self.spoiled, add_special_tokens=False)["input_ids"])
            for row, ids in enumerate(batch.input_ids):
                places = ids.unfold(0, len(wanted), 1)
                if bool((places == wanted).all(dim=1).any()):
                    found[row, 3] = math.nan
        return found


def texts(folder):
    return {
        path.name: path.read_text() if path.suffix == ".tsv" else h5py.File(path)["X"][:].tobytes()
        for path in folder.iterdir()
        if path.suffix in {".tsv", ".h5"}
    }


def interrupted(way, folder, passes, **options):
    """Stop a run after its second unit."""
    passes.stop_after = 4
    with pytest.raises(KeyboardInterrupt) as caught:
        WAYS[way][0](folder, **options)
    assert "finished unit" in caught.value.__notes__[0]
    assert [path.name for path in folder.iterdir() if path.suffix in {".tsv", ".h5"}] == []
    passes.stop_after, done = math.inf, passes.rows
    passes.rows = 0
    return done


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_was_cut_off_goes_on_where_it_was(tmp_path, way, passes):
    (tmp_path / "whole").mkdir()
    (tmp_path / "again").mkdir()
    WAYS[way][0](tmp_path / "whole")
    whole, passes.rows = passes.rows, 0
    done = interrupted(way, tmp_path / "again", passes)
    report = WAYS[way][0](tmp_path / "again")
    assert passes.rows == whole - done > 0
    assert report.stats.units_kept > 0
    assert texts(tmp_path / "again") == texts(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.parts"))


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_in_its_type_on_a_machine_of_another_kind(tmp_path, way, passes, monkeypatch):
    options = {"model": str(folder_of("llama")), "dtype": "auto"}
    monkeypatch.setitem(precision._decided, "cpu", False)
    interrupted(way, tmp_path, passes, **options)
    monkeypatch.setitem(precision._decided, "cpu", True)
    assert WAYS[way][0](tmp_path, **options).stats.units_kept > 0


@pytest.mark.parametrize("way", WAYS)
def test_another_option_is_refused_with_the_difference_or_starts_over(tmp_path, way, passes):
    interrupted(way, tmp_path, passes)
    with pytest.raises(
        StoreError, match=r"holds \d finished units? of another run: rc was 'none' and is 'mean'"
    ):
        WAYS[way][0](tmp_path, rc="mean")
    assert list(tmp_path.glob("out.tsv.parts/unit-*.rows"))
    WAYS[way][0](tmp_path, rc="mean", overwrite=True)
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize("way", WAYS)
def test_another_input_is_refused(tmp_path, way, passes):
    interrupted(way, tmp_path, passes)
    changed = {"records": RECORDS | {"r0": "ACGTACGT"}} if way == "sequences" else {"contig": CONTIG[::-1]}
    with pytest.raises(StoreError, match="unit 0 was made from other sequences"):
        WAYS[way][0](tmp_path, **changed)


def test_another_model_is_refused(tmp_path, passes):
    interrupted("sequences", tmp_path, passes)
    with pytest.raises(StoreError, match=r"of another run: .*weights has other content"):
        score(tmp_path, model=loaded(CAUSAL[1] if CAUSAL[0] == "llama" else CAUSAL[0]))


def test_more_records_at_the_end_leave_what_is_finished(tmp_path, passes):
    interrupted("sequences", tmp_path, passes)
    report = score(tmp_path, RECORDS | {"more": "ACGTACGTAA"})
    assert (report.num_rows, report.stats.records_kept) == (7, 4)


def test_damaged_unit_is_made_again(tmp_path, passes):
    interrupted("sequences", tmp_path, passes)
    (file,) = tmp_path.glob("out.tsv.parts/unit-000000.rows")
    file.write_text(file.read_text().replace("1", "2"))
    assert score(tmp_path).stats.units_kept == 1


def test_advice_of_a_bad_letter_keeps_what_is_finished(tmp_path, passes):
    records = RECORDS | {"r5": "ACGTJACGTA"}
    with pytest.raises(InputError, match="set invalid='mask'"):
        score(tmp_path, records)
    passes.rows = 0
    report = score(tmp_path, records, invalid="mask")
    assert (report.num_rows, report.stats.records_kept, passes.rows) == (6, 4, 2)


@pytest.mark.parametrize("way", WAYS)
def test_record_that_fails_stops_the_run_and_skipping_goes_on_from_there(tmp_path, way, passes, caplog):
    passes.spoiled, name = RECORDS["r5"][:12], "r5"
    if way == "variants":
        passes.spoiled, name = CONTIG[340:349], f"c:350:{CONTIG[349]}>"
    with pytest.raises(NonFiniteError, match="the model's head gives values that are not finite") as caught:
        WAYS[way][0](tmp_path)
    assert name in str(caught.value)
    kept = caught.value.__notes__[0]
    assert "kept in" in kept
    with caplog.at_level(logging.INFO):
        report = WAYS[way][0](tmp_path, on_error="skip")
    assert report.stats.units_kept == 2
    ((failed, why),) = report.failed.items()
    assert failed.startswith(name)
    assert why == "not finite"
    lines = (tmp_path / "out.tsv").read_text().splitlines()
    assert [line.count("\tNA") > 3 for line in lines[1:]] == [False] * (len(lines) - 2) + [True]
    if way == "variants":
        with genoembed.open_embeddings(tmp_path / "deltas.h5") as file:
            assert np.isnan(file[file.layers[0]][:]).any(axis=1).tolist() == [False] * 4 + [True]
            assert file.obs["flags"][-1] == "failed:not finite"


def test_units_with_failures_are_made_again_where_the_run_is_to_stop(tmp_path, passes):
    passes.spoiled = RECORDS["r1"][:12]
    interrupted("sequences", tmp_path, passes, on_error="skip")
    with pytest.raises(NonFiniteError, match="record 'r1'"):
        score(tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_no_memory_for_a_record_is_a_failure_like_others(tmp_path, way, passes):
    passes.stop_after, passes.error = 4, torch.OutOfMemoryError("CUDA out of memory")
    report = WAYS[way][0](tmp_path, on_error="skip", batch_tokens=1)
    assert set(report.failed.values()) == {"no memory"}
    assert 0 < len(report.failed) < report.num_rows


def test_allele_beyond_the_context_is_skipped_where_asked(tmp_path):
    (tmp_path / "ref.fa").write_text(f">c\n{CONTIG}\n")
    at = CONTIG.index("A", 100)
    (tmp_path / "calls.vcf").write_text(f"c\t{at + 1}\tlong\tA\tA{'CG' * 300},C\n")
    call = partial(
        genoembed.score_variants, tmp_path / "calls.vcf", tmp_path / "ref.fa", model=loaded("llama"), flank=9
    )
    with pytest.raises(VariantError, match="context holds"):
        call()
    report = call(on_error="skip")
    assert list(report.failed.values()) == ["too long"]
    assert [math.isnan(row.delta) for row in report.rows] == [True, False]


def test_standard_output_and_rows_in_memory_keep_nothing(tmp_path, passes, capsys):
    passes.stop_after = 4
    for output in (None, "-"):
        with pytest.raises(KeyboardInterrupt):
            score(tmp_path, output=output, per_base=None)
    assert [path.name for path in tmp_path.iterdir()] == ["in.fa"]


def test_units_of_a_table_are_not_merged(tmp_path, passes):
    interrupted("sequences", tmp_path, passes)
    with pytest.raises(StoreError, match="holds units of a table, not of vectors"):
        genoembed.merge(tmp_path / "out.tsv")
