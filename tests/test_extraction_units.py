"""Runs that are cut off, divided or hit by failures: what is kept and refused, and that nothing is lost."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections import namedtuple
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from genoembed import extract, extraction, merge, open_embeddings
from genoembed.errors import AlphabetError, ConfigError, ForeignCodeError, StoreError
from genoembed.models import precision
from genoembed.models.genomic_model import GenomicModel
from genoembed.models.load import load_model
from genoembed.pipeline.embedder import UnitEmbedder
from genoembed.store import EmbeddingWriter, Parts
from tests.by_hand import STRIPED, folder_of, model_of, random_dna, write_fasta

RECORDS = {f"r{number}": random_dna(20 + number, number) for number in range(12)}
UNIT_BASES = 80
SETTINGS = {"layers": [0, "final"], "unit_bases": UNIT_BASES}


class PowerCutError(BaseException):
    """Ends a run where nothing of ours catches it."""


@pytest.fixture(autouse=True)
def a_fixed_day(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture
def fasta(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_fasta(tmp_path / "in.fa", RECORDS)


def run(fasta, folder, **options):
    """Extract to ``out.h5`` of a folder, named the same in each."""
    folder.mkdir(exist_ok=True)
    settings = {"model": model_of("llama"), **SETTINGS, **options}
    return extract(fasta, output=folder / "out.h5", **settings)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def units_run(monkeypatch):
    """Count the units whose rows are built."""
    numbers = []
    original = UnitEmbedder.rows

    def rows(self, embedded):
        numbers.append(embedded.unit.number)
        return original(self, embedded)

    monkeypatch.setattr(UnitEmbedder, "rows", rows)
    return numbers


def cut_off(monkeypatch, method, at):
    """Make the ``at``-th call of a method of Parts end the run as a power cut would."""
    original, calls = getattr(Parts, method), []

    def call(self, *args, **options):
        calls.append(method)
        if len(calls) == at:
            raise PowerCutError("no power")
        return original(self, *args, **options)

    monkeypatch.setattr(Parts, method, call)


def values_of(path):
    with open_embeddings(path) as file:
        return file.ids, {layer: file[layer][:] for layer in file.layers}, file.provenance


def same_but_place(one, other):
    """Compare two files; only what says where the output lies may differ."""
    (ids, matrices, told), (other_ids, other_matrices, other_told) = values_of(one), values_of(other)
    assert ids == other_ids
    for layer, matrix in matrices.items():
        np.testing.assert_array_equal(matrix, other_matrices[layer])
    for provenance in (told, other_told):
        del provenance["config"]["output"]
    assert told == other_told


@pytest.mark.parametrize("at", [1, 2, 4])
def test_run_that_was_cut_off_goes_on_where_it_was(at, fasta, tmp_path, monkeypatch):
    run(fasta, tmp_path / "whole")
    with monkeypatch.context() as patched:
        cut_off(patched, "save", at)
        with pytest.raises(PowerCutError, match="no power"):
            run(fasta, tmp_path / "cut")
    assert not (tmp_path / "cut" / "out.h5").exists()
    numbers = units_run(monkeypatch)
    report = run(fasta, tmp_path / "cut")
    assert numbers == list(range(at - 1, 5))
    assert (report.stats.units_kept, report.stats.units) == (at - 1, 5 - at + 1)
    assert report.stats.records + report.stats.records_kept == len(RECORDS) == report.num_rows
    same_but_place(tmp_path / "whole" / "out.h5", tmp_path / "cut" / "out.h5")
    assert names_in(tmp_path / "cut") == ["out.h5"]


def test_file_is_the_same_byte_for_byte_whether_cut_off_or_not(fasta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def go():
        return extract(fasta, model=model_of("llama"), output="out.h5", **SETTINGS)

    go()
    whole = (tmp_path / "out.h5").read_bytes()
    (tmp_path / "out.h5").unlink()
    for method, at in (("save", 3), ("close_input", 1), ("input_facts", 1), ("remove", 1)):
        with monkeypatch.context() as patched:
            cut_off(patched, method, at)
            with pytest.raises(PowerCutError, match="no power"):
                go()
        assert (tmp_path / "out.parts").is_dir()
    go()  # the last cut came between the output and the removal of its parts
    assert (tmp_path / "out.h5").read_bytes() == whole
    assert names_in(tmp_path) == ["in.fa", "out.h5"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": ["final"]}, r"layers was \['layers\.0', 'norm'\] and is \['norm'\]"),
        ({"pooling": "max"}, r"pooling was 'mean' and is 'max'"),
        ({"unit_bases": 99}, r"unit_bases was 80 and is 99"),
        (
            {"invalid": "mask", "rc": "mean"},
            r"rc was 'none' and is 'mean'",
        ),
    ],
)
def test_other_settings_are_refused_with_the_difference_and_dropped_where_asked(
    change, said, fasta, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        cut_off(patched, "save", 3)
        with pytest.raises(PowerCutError, match="no power"):
            run(fasta, tmp_path)
    with pytest.raises(
        StoreError, match=rf"holds 2 finished units of another run: {said}; set these as they"
    ):
        run(fasta, tmp_path, **change)
    numbers = units_run(monkeypatch)
    run(fasta, tmp_path, **change, overwrite=True)
    assert numbers[0] == 0


def test_other_weights_are_refused(fasta, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        cut_off(patched, "save", 2)
        with pytest.raises(PowerCutError, match="no power"):
            run(fasta, tmp_path)
    loaded = model_of("llama")
    other = GenomicModel(loaded.module, loaded.tokenizer, name="other")  # of no folder: its tensors count
    with pytest.raises(StoreError, match="another run: weights has other content"):
        extract(fasta, model=other, output=tmp_path / "out.h5", **SETTINGS)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda text: text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.001')),
        ("tokenizer_config.json", lambda text: text.replace("{", '{"do_lower_case": true, ', 1)),
    ],
)
def test_shards_of_a_changed_model_folder_never_merge(name, change, fasta, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folder_of("llama"), folder)
    settings = {**SETTINGS, "model": folder, "output": tmp_path / "out.h5"}
    extract(fasta, **settings, shard="1/2")
    text = (folder / name).read_text()
    assert change(text) != text
    (folder / name).write_text(change(text))
    with pytest.raises(StoreError, match=rf"another run: {name} has other content; set these as they were"):
        extract(fasta, **settings, shard="2/2")
    with pytest.raises(StoreError, match="units are missing or damaged"):
        merge(tmp_path / "out.h5")


def test_resume_names_the_file_of_the_model_that_changed(fasta, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folder_of("llama"), folder)
    settings = {**SETTINGS, "model": folder, "output": tmp_path / "out.h5"}
    extract(fasta, **settings)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.001'))
    with pytest.raises(StoreError, match=r"another run made it: config\.json has other content"):
        extract(fasta, **settings, resume=True)


def test_a_model_that_was_changed_in_memory_is_another_one(fasta, tmp_path):
    loaded = load_model(str(folder_of("llama")), dtype="float32")
    settings = {**SETTINGS, "model": loaded, "output": tmp_path / "out.h5"}
    extract(fasta, **settings)
    loaded.module.norm.weight.data[0] += 1
    with pytest.raises(StoreError, match="another run made it: weights has other content"):
        extract(fasta, **settings, resume=True)
    loaded.module.config.rms_norm_eps = 0.1
    with pytest.raises(StoreError, match=r"weights has other content, config\.json has other content"):
        extract(fasta, **settings, resume=True)


@pytest.mark.parametrize("policy", [{"invalid": "mask"}, {"invalid": "skip"}, {"on_error": "skip"}])
def test_another_policy_keeps_the_units_that_it_leaves_as_they_are(policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fasta = write_fasta(tmp_path / "in.fa", RECORDS | {"r11": "ACGTZACGT"})
    if "on_error" not in policy:
        with pytest.raises(AlphabetError, match="'Z' at position 5"):
            run(fasta, tmp_path)
    else:
        with monkeypatch.context() as patched:
            cut_off(patched, "save", 4)
            with pytest.raises(PowerCutError):
                run(fasta, tmp_path, invalid="mask")
        policy |= {"invalid": "mask"}
    kept = Parts.find(tmp_path / "out.h5").saved_numbers()
    assert kept
    numbers = units_run(monkeypatch)
    report = run(fasta, tmp_path, **policy)
    assert not set(numbers) & set(kept)
    assert report.stats.units_kept == len(kept)
    with open_embeddings(tmp_path / "out.h5") as file:
        assert file.provenance["config"]["input"]["invalid"] == policy["invalid"]


def test_another_policy_that_changes_a_finished_unit_is_refused_with_the_difference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fasta = write_fasta(tmp_path / "in.fa", {"bad": "ACGTZACGT"} | RECORDS)
    with monkeypatch.context() as patched:
        cut_off(patched, "save", 3)
        with pytest.raises(PowerCutError):
            run(fasta, tmp_path, invalid="skip")
    with pytest.raises(StoreError, match=r"and the same policies .invalid was 'skip' and is 'mask'"):
        run(fasta, tmp_path, invalid="mask")


def test_a_complete_file_is_the_same_under_a_policy_that_had_nothing_to_do(fasta, tmp_path):
    run(fasta, tmp_path)
    report = run(fasta, tmp_path, invalid="mask", resume=True)
    assert report.seconds == 0
    write_fasta(fasta, RECORDS | {"r11": "ACGTZACGT"})
    run(fasta, tmp_path, invalid="mask", overwrite=True)
    with pytest.raises(StoreError, match="another run made it: invalid was 'mask' and is 'skip'"):
        run(fasta, tmp_path, invalid="skip", resume=True)


def test_changed_input_is_refused_and_named(fasta, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        cut_off(patched, "save", 3)
        with pytest.raises(PowerCutError, match="no power"):
            run(fasta, tmp_path)
    write_fasta(fasta, RECORDS | {"r4": "ACGT"})
    with pytest.raises(StoreError, match=r"unit 1 was made from other sequences \(3 records, 'r3' to 'r5'\)"):
        run(fasta, tmp_path)
    write_fasta(fasta, RECORDS | {"r11": "ACGT"})  # in a unit that is not finished yet
    assert run(fasta, tmp_path).num_rows == len(RECORDS)


@pytest.mark.parametrize("damage", ["shard", "record", "swap"])
def test_damaged_units_are_made_again(damage, fasta, tmp_path, monkeypatch):
    run(fasta, tmp_path / "whole")
    with monkeypatch.context() as patched:
        cut_off(patched, "save", 4)
        with pytest.raises(PowerCutError, match="no power"):
            run(fasta, tmp_path / "cut")
    parts = tmp_path / "cut" / "out.parts"
    shard = parts / "unit-000001.h5"
    if damage == "shard":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "record":
        shard.with_suffix(".json").write_text('{"number": 1, "shard_')
    else:
        shutil.copy(parts / "unit-000000.h5", shard)
    numbers = units_run(monkeypatch)
    run(fasta, tmp_path / "cut")
    assert numbers == [1, 3, 4]
    same_but_place(tmp_path / "whole" / "out.h5", tmp_path / "cut" / "out.h5")


def test_folder_of_somebody_else_is_not_touched(fasta, tmp_path):
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts" / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match=r"holds 'thesis\.txt', which no run put there"):
        run(fasta, tmp_path, overwrite=True)
    (tmp_path / "out.parts" / "manifest.json").write_text("[]")
    with pytest.raises(StoreError, match="is not a JSON object"):
        run(fasta, tmp_path)
    assert (tmp_path / "out.parts" / "thesis.txt").read_text() == "precious"


def test_second_process_on_the_same_output_is_refused(fasta, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        cut_off(patched, "save", 2)
        with pytest.raises(PowerCutError, match="no power"):
            run(fasta, tmp_path)
    with (tmp_path / "out.parts" / "shard-1-of-1.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"another process is at work here \(shard-1-of-1\)"):
            run(fasta, tmp_path)
    assert run(fasta, tmp_path).num_rows == len(RECORDS)


def test_shares_merge_to_the_same_file(fasta, tmp_path):
    run(fasta, tmp_path / "whole")
    reports = [run(fasta, tmp_path / "shares", shard=f"{number}/3") for number in (3, 1, 2)]
    assert [report.stats.units for report in reports] == [1, 2, 2]
    assert {report.num_rows for report in reports} == {None}
    merged = merge(tmp_path / "shares" / "out.h5")
    assert (merged.num_rows, merged.width, merged.layers) == (12, 16, ("layers.0", "norm"))
    same_but_place(tmp_path / "whole" / "out.h5", tmp_path / "shares" / "out.h5")
    assert names_in(tmp_path / "shares") == ["out.h5"]


@pytest.fixture
def machine(monkeypatch):
    """Go to a machine that multiplies faster in one of the two types."""
    return lambda dtype: monkeypatch.setitem(precision._decided, "cpu", dtype == "bfloat16")


@pytest.mark.parametrize(("first", "then"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_run_goes_on_in_its_type_on_a_machine_of_another_kind(
    first, then, fasta, tmp_path, monkeypatch, machine
):
    model = str(folder_of("llama"))
    machine(first)
    run(fasta, tmp_path / "whole", model=model)
    with monkeypatch.context() as patched:
        cut_off(patched, "save", 3)
        with pytest.raises(PowerCutError, match="no power"):
            run(fasta, tmp_path / "cut", model=model)
    machine(then)
    assert run(fasta, tmp_path / "cut", model=model).stats.units_kept == 2
    same_but_place(tmp_path / "whole" / "out.h5", tmp_path / "cut" / "out.h5")
    assert values_of(tmp_path / "cut" / "out.h5")[2]["model"]["dtype"] == first
    assert run(fasta, tmp_path / "cut", model=model, resume=True).stats.units == 0
    with pytest.raises(StoreError, match=f"dtype was '{first}' and is '{then}'"):
        run(fasta, tmp_path / "cut", model=model, resume=True, dtype=then)
    run(fasta, tmp_path / "cut", model=model, overwrite=True)
    assert values_of(tmp_path / "cut" / "out.h5")[2]["model"]["dtype"] == then


def test_shares_on_machines_of_two_kinds_merge(fasta, tmp_path, monkeypatch, machine):
    """Also where another share begins while the model of this one loads."""
    model = str(folder_of("llama"))
    machine("float32")
    run(fasta, tmp_path / "whole", model=model)
    original, others = extraction.local_engine, ["1/2"]

    @contextmanager
    def slowly(*args, **options):
        with original(*args, **options) as engine:
            if others:
                machine("float32")
                run(fasta, tmp_path / "shares", model=model, shard=others.pop())
                machine("bfloat16")
            yield engine

    monkeypatch.setattr(extraction, "local_engine", slowly)
    machine("bfloat16")
    run(fasta, tmp_path / "shares", model=model, shard="2/2")
    merge(tmp_path / "shares" / "out.h5")
    same_but_place(tmp_path / "whole" / "out.h5", tmp_path / "shares" / "out.h5")


def test_merge_says_which_shares_are_missing(fasta, tmp_path):
    with pytest.raises(StoreError, match=r"there is no '.*out\.parts' to merge"):
        merge(tmp_path / "out.h5")
    run(fasta, tmp_path, shard="2/3")
    message = r"3 of 5 units are missing or damaged \(0, 2, 3\); run extract again with shard set to 1/3, 3/3"
    with pytest.raises(StoreError, match=message):
        merge(tmp_path / "out.h5")
    run(fasta, tmp_path)  # one process may do the rest, too
    assert merge(tmp_path / "out.h5").num_rows == len(RECORDS)  # it is merged already
    (tmp_path / "out.h5").unlink()
    with pytest.raises(StoreError, match="there is no"):
        merge(tmp_path / "out.h5")


def test_merge_that_fails_keeps_the_parts(fasta, tmp_path, monkeypatch):
    for number in (1, 2):
        run(fasta, tmp_path, shard=f"{number}/2")
    with monkeypatch.context() as patched:
        patched.setattr(
            EmbeddingWriter, "finish", lambda *_: (_ for _ in ()).throw(PowerCutError("no power"))
        )
        with pytest.raises(PowerCutError, match="no power"):
            merge(tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()
    (tmp_path / "out.parts" / ".out.h5.0123.tmp").write_bytes(b"left by a process that was killed")
    assert merge(tmp_path / "out.h5").num_rows == len(RECORDS)
    assert not (tmp_path / "out.parts").exists()


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "1/3 "])
def test_share_that_is_none_is_refused(shard, fasta, tmp_path):
    with pytest.raises(ConfigError, match=r"^shard is '.*'; set shard to I/N with I from 1 to N"):
        run(fasta, tmp_path, shard=shard)


def test_resume_leaves_a_complete_output_alone(fasta, tmp_path, monkeypatch):
    run(fasta, tmp_path)
    before = (tmp_path / "out.h5").stat().st_mtime_ns
    numbers = units_run(monkeypatch)
    report = run(fasta, tmp_path, resume=True)
    assert (report.num_rows, report.width, numbers) == (12, 16, [])
    assert (tmp_path / "out.h5").stat().st_mtime_ns == before
    with pytest.raises(StoreError, match="exists already; set overwrite"):
        run(fasta, tmp_path)
    with pytest.raises(StoreError, match="exists already, and another run made it: pooling was"):
        run(fasta, tmp_path, resume=True, pooling="max")
    write_fasta(fasta, RECORDS | {"r0": "ACGT"})
    with pytest.raises(StoreError, match="another run made it: the input has other content"):
        run(fasta, tmp_path, resume=True)
    assert run(fasta, tmp_path, resume=True, overwrite=True).stats.units == 5


Usage = namedtuple("Usage", "total used free")


def test_full_disk_keeps_what_is_finished(fasta, tmp_path, monkeypatch):
    saved = []
    original = EmbeddingWriter.finish

    def finish(self, provenance):
        original(self, provenance)
        saved.append(provenance)

    with monkeypatch.context() as patched:
        patched.setattr(EmbeddingWriter, "finish", finish)
        patched.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 5 << 20 if len(saved) < 2 else 1000))
        with pytest.raises(
            StoreError, match=r"unit 2 needs 1\.0 MB, but the disk has 0\.0 MB left"
        ) as caught:
            run(fasta, tmp_path)
    assert "2 finished units are kept" in caught.value.__notes__[0]
    report = run(fasta, tmp_path)
    assert (report.stats.units_kept, report.num_rows) == (2, 12)


def test_warns_early_that_the_merged_file_will_not_fit(fasta, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 3 << 20))
    run(fasta, tmp_path)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len([text for text in warnings if "fewer than the merged file will need" in text]) == 1


@pytest.fixture
def broken_model():
    """A model that gives NaN wherever a sequence holds N."""
    loaded = model_of("llama")
    model = GenomicModel(loaded.module, loaded.tokenizer, name="broken", location=folder_of("llama"))
    model.is_causal, model.accepts_attention_mask  # noqa: B018 - probed while the model is whole
    token = loaded.tokenizer("N")["input_ids"][0]

    def spoil(_module, inputs, output):
        output = output.clone()
        output[inputs[0] == token] = torch.nan
        return output

    handle = model.module.get_input_embeddings().register_forward_hook(spoil)
    yield model
    handle.remove()


@pytest.mark.parametrize("pooling", ["mean", "none"])
@pytest.mark.parametrize("rc", ["none", "mean"])
def test_failed_records_keep_their_row_without_a_vector(pooling, rc, broken_model, tmp_path):
    records = {"a": "ACGT", "n": "ACNT", "b": "GG", "same": "ACNT", "c": "TTTTT"}
    fasta = write_fasta(tmp_path / "in.fa", records)
    options = {"layers": [0, 1], "pooling": pooling, "rc": rc}
    report = extract(fasta, model=broken_model, output=tmp_path / "out.h5", on_error="skip", **options)
    assert report.failed == {"n": "not finite", "same": "not finite"}
    fine = {name: text for name, text in records.items() if "N" not in text}
    extract(write_fasta(fasta, fine), model=broken_model, output=tmp_path / "fine.h5", **options)
    with open_embeddings(tmp_path / "out.h5") as found, open_embeddings(tmp_path / "fine.h5") as expected:
        assert found.ids == list(records)
        assert list(found.obs["flags"]) == ["", "failed:not finite", "", "failed:not finite", ""]
        assert found.provenance["failed"] == report.failed
        assert found.provenance["counts"]["failed"] == 2
        for row, name in enumerate(found.ids):
            for layer in found.layers:
                mine = found.vectors(row, layer)
                if name in fine:
                    truth = expected.vectors(expected.index_of(name), layer)
                    np.testing.assert_allclose(mine, truth, rtol=1e-5, atol=1e-6)
                else:
                    assert np.isnan(mine).all()
                    assert mine.shape == ((0, 16) if pooling == "none" else (16,))


def test_unit_of_failed_records_only_has_its_rows(broken_model, tmp_path):
    fasta = write_fasta(tmp_path / "in.fa", {"a": "ACGT", "n": "NNNN", "m": "NNNNN"})
    report = extract(
        fasta, model=broken_model, layers=0, on_error="skip", unit_bases=4, output=tmp_path / "o"
    )
    assert (report.num_rows, list(report.failed)) == (3, ["n", "m"])
    write_fasta(fasta, {"n": "NNNN"})
    extract(fasta, model=broken_model, layers=0, on_error="skip", output=tmp_path / "all.h5")
    with open_embeddings(tmp_path / "all.h5") as file:
        assert np.isnan(file.X[:]).all()


def test_nothing_to_pool_is_a_failure_that_can_be_skipped(tmp_path):
    fasta = write_fasta(tmp_path / "in.fa", {"long": "ACGTACGT", "short": "ACG", "other": "GGGGG"})
    options = {"model": model_of("llama"), "layers": 0, "skip_first": 4, "output": tmp_path / "out.h5"}
    report = extract(fasta, on_error="skip", **options)
    assert report.failed == {"short": "nothing to pool"}


class Allocator:
    """Fails forward passes of more than some slots, as a device of little memory would."""

    def __init__(self, monkeypatch, family, slots, error):
        self.shapes = []
        original = type(model_of(family)).forward

        def forward(model, batch, *args):
            self.shapes.append(tuple(batch.input_ids.shape))
            if batch.num_tokens > slots:
                raise error
            return original(model, batch, *args)

        monkeypatch.setattr(type(model_of(family)), "forward", forward)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    ],
)
@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_budget_halves_when_memory_is_short_and_the_result_is_the_same(
    error, pooling, fasta, tmp_path, monkeypatch
):
    run(fasta, tmp_path / "whole", pooling=pooling, unit_bases=1000, batch_tokens=512)
    memory = Allocator(monkeypatch, "llama", 100, error)
    report = run(fasta, tmp_path / "short", pooling=pooling, unit_bases=1000, batch_tokens=512)
    assert memory.shapes[0] == (8, 27)
    assert (report.num_rows, report.stats.halvings) == (12, 2)
    assert max(rows * length for rows, length in memory.shapes[2:]) <= 100
    (ids, whole, _), (other_ids, short, _) = (
        values_of(tmp_path / "whole/out.h5"),
        values_of(tmp_path / "short/out.h5"),
    )
    assert ids == other_ids
    for layer, matrix in whole.items():
        np.testing.assert_allclose(short[layer], matrix, rtol=1e-5, atol=1e-6)


def test_record_that_memory_does_not_hold_is_a_failure(fasta, tmp_path, monkeypatch):
    Allocator(monkeypatch, "llama", 25, torch.OutOfMemoryError("CUDA out of memory"))
    report = run(fasta, tmp_path, on_error="skip")
    assert report.failed == {f"r{number}": "no memory" for number in range(6, 12)}


def test_blocks_get_smaller_when_memory_is_short(tmp_path, monkeypatch):
    monkeypatch.setattr("genoembed.pipeline.forward.LEAST_BLOCK_TOKENS", 8)
    monkeypatch.setattr("genoembed.pipeline.forward._LEAST_BLOCK", 8)
    fasta = write_fasta(tmp_path / "in.fa", {"long": random_dna(60, 1)})
    options = {"model": model_of(STRIPED), "layers": ["final"], "batch_tokens": 48}
    extract(fasta, output=tmp_path / "whole.h5", **options)
    original = type(model_of(STRIPED)).forward_in_blocks

    def forward_in_blocks(model, batch, layers, take, *, block_tokens, **windows):
        if block_tokens > 13:
            raise torch.OutOfMemoryError
        original(model, batch, layers, take, block_tokens=block_tokens, **windows)

    monkeypatch.setattr(type(model_of(STRIPED)), "forward_in_blocks", forward_in_blocks)
    report = extract(fasta, output=tmp_path / "short.h5", **options)
    assert report.stats.halvings == 2
    (_, whole, _), (_, short, _) = values_of(tmp_path / "whole.h5"), values_of(tmp_path / "short.h5")
    np.testing.assert_allclose(short["norm"], whole["norm"], rtol=1e-5, atol=1e-5)


def test_other_failures_of_the_model_are_not_taken_for_a_lack_of_memory(fasta, tmp_path, monkeypatch):
    Allocator(monkeypatch, "llama", 0, RuntimeError("shapes do not fit"))
    with pytest.raises(ForeignCodeError, match="shapes do not fit") as caught:
        run(fasta, tmp_path, on_error="skip")
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    "options", [{}, {"pooling": "none"}, {"window": 16, "stride": 8, "per_window": True}]
)
def test_certificate_measures_rows_of_the_file_against_each_record_alone(options, fasta, tmp_path):
    report = run(fasta, tmp_path, certificate=3, unit_bases=100, **options)
    _, _, provenance = values_of(tmp_path / "out.h5")
    found = provenance["certificate"]
    assert (found["records"], found["is_within"], found["tolerance"]) == (3, True, 1e-5)
    assert 0 <= found["max_relative"] <= 1e-5
    assert found["min_cosine"] > 1 - 1e-6
    assert report.stats.records == len(RECORDS)
    assert "certificate" not in provenance["config"]["run"]


def test_certificate_tells_of_a_model_that_mixes_its_batch(fasta, tmp_path, monkeypatch, caplog):
    original = type(model_of("llama")).forward

    def forward(model, batch, layers, reduce=None):
        found = original(model, batch, layers, reduce)
        return {layer: vectors * (1 + 0.01 * len(batch.rows)) for layer, vectors in found.items()}

    monkeypatch.setattr(type(model_of("llama")), "forward", forward)
    run(fasta, tmp_path, certificate=2)
    _, _, provenance = values_of(tmp_path / "out.h5")
    assert provenance["certificate"]["is_within"] is False
    assert provenance["certificate"]["max_relative"] > 0.005
    assert "vectors depend on what shares their batch: of 2 records" in caplog.text


@pytest.mark.parametrize("is_bad", [lambda rows: rows == 1, lambda rows: rows > 1])
def test_certificate_is_refused_where_one_side_is_nan(is_bad, fasta, tmp_path, monkeypatch):
    original = type(model_of("llama")).forward

    def forward(model, batch, layers, reduce=None):
        found = original(model, batch, layers, reduce)
        spoiled = {layer: vectors * torch.nan for layer, vectors in found.items()}
        return spoiled if is_bad(len(batch.rows)) else found

    monkeypatch.setattr(type(model_of("llama")), "forward", forward)
    run(fasta, tmp_path, certificate=2, on_error="skip")
    _, _, provenance = values_of(tmp_path / "out.h5")
    assert provenance["certificate"]["is_within"] is False
    assert provenance["certificate"]["max_relative"] is None


def test_manifest_says_what_the_run_is(fasta, tmp_path):
    run(fasta, tmp_path, shard="1/2")
    manifest = json.loads((tmp_path / "out.parts" / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["num_shares"]) == ("genoembed-parts", 1, 2)
    assert manifest["identity"]["layers"] == ["layers.0", "norm"]
    assert manifest["identity"]["weights"] == model_of("llama").provenance["weights_sha256"]
    unit = json.loads((tmp_path / "out.parts" / "unit-000000.json").read_text())
    assert (unit["first"], unit["last"], unit["num_records"], unit["num_rows"]) == ("r0", "r2", 3, 3)


def test_refused_second_process_leaves_the_first_ones_units_alone(fasta, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        cut_off(patched, "save", 3)
        with pytest.raises(PowerCutError, match="no power"):
            run(fasta, tmp_path)
    before = names_in(tmp_path / "out.parts")
    with (tmp_path / "out.parts" / "shard-1-of-1.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for options in ({}, {"pooling": "max", "overwrite": True}):
            with pytest.raises(StoreError, match="another process is at work here"):
                run(fasta, tmp_path, **options)
    assert names_in(tmp_path / "out.parts") == before
    (tmp_path / "other").mkdir()
    parts = Parts.begin(tmp_path / "other" / "out.h5", Parts.find(tmp_path / "out.h5").manifest)
    with parts.lock("shard-1-of-1"), pytest.raises(StoreError, match="another process"):
        run(fasta, tmp_path / "other")  # nothing is saved yet, and still the folder is the first one's
    assert parts.folder.is_dir()


def test_older_output_of_another_input_is_not_taken_for_the_runs(fasta, tmp_path, monkeypatch):
    """With a fixed day both say the same of themselves, but for their input."""
    run(fasta, tmp_path)
    write_fasta(fasta, {f"new{number}": random_dna(30, number) for number in range(8)})
    with monkeypatch.context() as patched:
        cut_off(patched, "save", 3)
        with pytest.raises(PowerCutError, match="no power"):
            run(fasta, tmp_path, overwrite=True)
    report = run(fasta, tmp_path, overwrite=True)
    assert (report.num_rows, report.stats.units_kept) == (8, 2)
    assert values_of(tmp_path / "out.h5")[0][0] == "new0"


def test_resume_looks_at_regions_too(tmp_path):
    fasta = write_fasta(tmp_path / "in.fa", {"r0": random_dna(120, 0)})
    options = {"model": model_of("llama"), "output": tmp_path / "out.h5", "layers": 0}
    extract(fasta, regions="r0:1-50", **options)
    assert extract(fasta, regions="r0:1-50", resume=True, **options).num_rows == 1
    with pytest.raises(StoreError, match="another run made it: the regions have other content"):
        extract(fasta, regions="r0:11-90", resume=True, **options)


def test_shares_of_different_inputs_are_refused(fasta, tmp_path):
    run(fasta, tmp_path, shard="1/2")
    write_fasta(fasta, RECORDS | {"more": "ACGT" * 20})
    with pytest.raises(StoreError, match=r"another share was made from another input \(5 units, here 6\)"):
        run(fasta, tmp_path, shard="2/2")


def test_overwrite_starts_over_after_a_change_of_the_input(fasta, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        cut_off(patched, "save", 3)
        with pytest.raises(PowerCutError, match="no power"):
            run(fasta, tmp_path)
    write_fasta(fasta, RECORDS | {"r4": "ACGT"})
    report = run(fasta, tmp_path, overwrite=True)
    assert (report.stats.units_kept, report.num_rows) == (1, 12)


def test_share_whose_first_unit_fails_wholly_goes_on(broken_model, tmp_path):
    fasta = write_fasta(tmp_path / "in.fa", {"a": "ACGT", "n": "NNNN", "b": "GGGG"})
    options = {"model": broken_model, "layers": 0, "unit_bases": 4, "output": tmp_path / "out.h5"}
    for share in ("2/3", "1/3", "3/3"):
        extract(fasta, on_error="skip", shard=share, **options)
    assert merge(tmp_path / "out.h5").failed == {"n": "not finite"}
