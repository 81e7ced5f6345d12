"""`extract` when something is wrong: what is said, when, and that nothing is left behind."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from genoembed import extract, plan
from genoembed.errors import (
    AlphabetError,
    ConfigError,
    DuplicateIdError,
    EmptyRecordError,
    GenoembedError,
    InputFileError,
    NonFiniteError,
    StoreError,
)
from genoembed.models.genomic_model import GenomicModel
from genoembed.pipeline.cutting import Cutter
from genoembed.store import EmbeddingWriter
from tests.by_hand import STRIPED, embed, folder_of, model_of, random_dna, write_fasta

RECORDS = {"a": random_dna(40, 1), "b": random_dna(10, 2)}


@pytest.fixture
def no_model(monkeypatch):
    """Make any attempt to load a model fail."""

    def refuse(*_args, **_options):
        pytest.fail("the model was loaded")

    monkeypatch.setattr("genoembed.pipeline.request.load_model", refuse)


@pytest.fixture
def fasta(tmp_path):
    return write_fasta(tmp_path / "input.fa", RECORDS)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("no_model")
def test_existing_output_is_refused_before_the_model_loads(fasta, tmp_path):
    output = tmp_path / "input.h5"
    output.write_bytes(b"precious")
    with pytest.raises(StoreError, match=r"input\.h5: exists already; set overwrite=True"):
        extract(fasta)
    assert output.read_bytes() == b"precious"


@pytest.mark.usefixtures("no_model")
def test_missing_folder_is_refused_before_the_model_loads(fasta, tmp_path):
    with pytest.raises(StoreError, match=r"folder .*nowhere' does not exist"):
        extract(fasta, output=tmp_path / "nowhere" / "out.h5")


@pytest.mark.usefixtures("no_model")
def test_missing_input_is_refused_before_the_model_loads(tmp_path):
    with pytest.raises(InputFileError, match=r"absent\.fa: file not found"):
        extract(tmp_path / "absent.fa", output=tmp_path / "out.h5")


GFF = "##gff-version 3\na\tprodigal\tCDS\t1\t9\t.\t+\t0\tID=g1\n"


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("work", [extract, plan])
def test_features_that_are_not_there_are_said_before_the_model_loads(work, fasta, tmp_path):
    (tmp_path / "a.gff").write_text(GFF)
    with pytest.raises(
        GenoembedError, match="no feature has type 'CSD'; there are: CDS 1; did you mean 'CDS'"
    ):
        work(fasta, regions=tmp_path / "a.gff", feature="CSD", output=tmp_path / "out.h5")
    with pytest.raises(GenoembedError, match="features are chosen, but the file has none"):
        work(fasta, feature="CDS", output=tmp_path / "out.h5")


@pytest.mark.usefixtures("no_model")
def test_first_record_is_checked_before_the_model_loads(tmp_path):
    protein = write_fasta(tmp_path / "p.fa", {"p": "MKVLATRELEQWPDFIMK"})
    with pytest.raises(AlphabetError, match="those of a protein"):
        extract(protein, output=tmp_path / "out.h5")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("role", ["inputs", "regions"])
def test_output_that_is_read_is_refused(role, fasta, tmp_path):
    bed = tmp_path / "regions.bed"
    bed.write_text("a\t0\t4\n")
    regions = {"regions": bed} if role == "regions" else {}
    link = tmp_path / "link.h5"
    link.symlink_to(bed if regions else fasta)
    before = fasta.read_bytes(), bed.read_bytes()
    with pytest.raises(
        StoreError, match=r"link\.h5: is also read, as .*, and would be lost; set output to another name"
    ):
        extract(fasta, output=link, overwrite=True, **regions)
    assert (fasta.read_bytes(), bed.read_bytes()) == before


@pytest.mark.usefixtures("no_model")
def test_unknown_option_is_refused_with_a_suggestion(fasta):
    with pytest.raises(ConfigError, match=r"'poolin' is not an option; did you mean 'pooling'\?"):
        extract(fasta, poolin="max")


@pytest.mark.usefixtures("no_model")
def test_no_input_is_refused():
    with pytest.raises(ConfigError, match="inputs is empty"):
        extract([])


@pytest.mark.parametrize("option", ["revision", "dtype", "device", "trust_remote_code"])
def test_loading_options_for_a_loaded_model_are_refused(option, fasta):
    value = {"dtype": "float32", "trust_remote_code": True}.get(option, "cpu")
    with pytest.raises(ConfigError, match=rf"^{option}: the model is loaded already; leave it out"):
        extract(fasta, model=model_of("llama"), **{option: value})


def test_weights_must_be_as_many_as_layers(fasta):
    with pytest.raises(ConfigError, match=r"^fusion_weights has 3 numbers for 2 layers; give one per layer$"):
        extract(fasta, model=model_of("llama"), layers=[0, 1], fusion="weighted", fusion_weights=[1, 2, 3])


def test_what_does_not_go_with_the_model_is_reported_at_once(fasta):
    with pytest.raises(ConfigError, match="causal") as caught:
        extract(
            fasta,
            model=model_of("llama"),
            pooling="cls",
            layers=[0, 1],
            fusion="weighted",
            fusion_weights=[1],
        )
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("tail", "error", "message"),
    [
        (">bad\nACGJ\n", AlphabetError, r"input\.fa:6: record 'bad': 'J' at position 4"),
        (">a\nACGT\n", DuplicateIdError, r"input\.fa:5: record 'a': appears again \(first at line 1\)"),
        (">none\n", EmptyRecordError, r"record 'none': has no bases"),
    ],
)
def test_bad_record_at_the_end_keeps_what_is_finished(tail, error, message, tmp_path):
    fasta = write_fasta(tmp_path / "input.fa", RECORDS)
    with fasta.open("a") as file:
        file.write(tail)
    appended = []
    with pytest.raises(error, match=message) as caught:
        extract(
            fasta,
            model=model_of("llama"),
            progress=lambda stats: appended.append(stats.records),
            unit_bases=5,  # the first record is saved when the bad one is read
        )
    assert max(appended) == 1
    assert names_in(tmp_path) == ["input.fa", "input.parts"]
    (note,) = caught.value.__notes__
    assert (
        note == f"1 finished unit is kept in {tmp_path / 'input.parts'}: run the same command again to go on"
    )


def test_error_in_the_middle_leaves_an_earlier_output_as_it_was(tmp_path):
    output = tmp_path / "output.h5"
    embed(tmp_path, RECORDS, model_of("llama"))
    before = output.read_bytes()
    with pytest.raises(AlphabetError, match="'J' at position 2"):
        embed(tmp_path, {**RECORDS, "bad": "AJ"}, model_of("llama"))
    assert output.read_bytes() == before
    assert names_in(tmp_path) == ["input.fa", "output.h5"]


def test_interrupt_leaves_nothing_behind(fasta, tmp_path):
    def interrupt(stats):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        extract(fasta, model=model_of("llama"), progress=interrupt)
    assert names_in(tmp_path) == ["input.fa"]


def test_all_records_skipped_says_why_and_writes_nothing(tmp_path):
    fasta = tmp_path / "input.fa"
    fasta.write_text(">x\nJJ\n>y\n>z\nACJ\n")
    message = r"input\.fa: no record is left to embed \(2 skipped as invalid, 1 as empty\).*invalid='mask'"
    with pytest.raises(EmptyRecordError, match=message):
        extract(fasta, model=model_of("llama"), invalid="skip", empty="skip")
    assert names_in(tmp_path) == ["input.fa"]


@pytest.fixture
def broken_model():
    """A model whose third position is not finite where the token is G."""
    loaded = model_of("llama")
    model = GenomicModel(loaded.module, loaded.tokenizer, name="broken", location=folder_of("llama"))
    model.is_causal, model.accepts_attention_mask  # noqa: B018 - probed while the model is whole
    embedding = model.module.get_input_embeddings()

    def spoil(_module, inputs, output):
        spoiled = output.clone()
        spoiled[inputs[0] == 7] = torch.nan
        return spoiled

    handle = embedding.register_forward_hook(spoil)
    yield model
    handle.remove()


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_values_that_are_not_finite_name_the_record(pooling, broken_model, tmp_path):
    records = {"fine": "ACTACT", "spoiled": "ACTGA", "other": "AAAAA"}
    message = r"record 'spoiled': layer 'layers\.1' gives values that are not finite; set dtype='float32'"
    with pytest.raises(NonFiniteError, match=message) as caught:
        embed(tmp_path, records, broken_model, layers=1, pooling=pooling)
    assert caught.value.record_id == "spoiled"
    assert names_in(tmp_path) == ["input.fa"]


def test_batch_mates_of_a_spoiled_record_are_not_touched(broken_model, tmp_path):
    records = {"fine": "ACTACT", "other": "AAAAA"}
    found = embed(tmp_path, records, broken_model, layers=1)
    whole = embed(tmp_path, records, model_of("llama"), layers=1)
    np.testing.assert_array_equal(found.matrices["layers.1"], whole.matrices["layers.1"])


def test_every_error_is_one_of_ours(tmp_path):
    for options in ({"layers": 99}, {"model": str(tmp_path / "absent")}, {"regions": "absent.bed"}):
        fasta = write_fasta(tmp_path / "input.fa", RECORDS)
        with pytest.raises(GenoembedError, match=r"99|absent"):
            extract(fasta, **{"model": model_of(STRIPED), "output": tmp_path / "o.h5", **options})
    assert names_in(tmp_path) == ["input.fa"]


def test_threads_are_set_for_the_run_and_back(fasta, tmp_path):
    before = torch.get_num_threads()
    seen = []
    extract(
        fasta,
        model=model_of("llama"),
        threads=before + 1,
        progress=lambda stats: seen.append(torch.get_num_threads()),
    )
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_reading_and_writing_happen_beside_the_forward_passes(fasta, tmp_path, monkeypatch):
    """Torch stays in the caller's thread, where Ctrl-C arrives."""
    where = {"model": set(), "encode": set(), "append": set()}

    def watch(owner, name, key):
        original = getattr(owner, name)

        def call(*args, **options):
            where[key].add(threading.current_thread().name)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)

    model = model_of("llama")
    watch(type(model), "forward", "model")
    watch(EmbeddingWriter, "append", "append")
    watch(Cutter, "_piece", "encode")
    extract(fasta, model=model, output=tmp_path / "o.h5")
    assert where == {
        "model": {threading.current_thread().name},
        "encode": {"genoembed-reading"},
        "append": {"genoembed-writing", threading.current_thread().name},  # saved, then merged
    }


@pytest.mark.parametrize("tail", ["", ">bad\nACGJ\n"])
def test_no_thread_outlives_a_run(tail, tmp_path):
    fasta = write_fasta(tmp_path / "input.fa", RECORDS)
    with fasta.open("a") as file:
        file.write(tail)
    before = set(threading.enumerate())  # a server of other tests has one
    with pytest.raises(AlphabetError, match="'J'") if tail else nullcontext():
        extract(fasta, model=model_of("llama"), output=tmp_path / "o.h5")
    after = set(threading.enumerate()) - before
    assert [thread.name for thread in after if thread.name.startswith("genoembed")] == []


def test_error_of_writing_is_the_error_of_the_run(tmp_path, monkeypatch):
    fasta = write_fasta(tmp_path / "input.fa", {str(index): "ACGTA" for index in range(30)})
    appended = []

    def append(self, block):
        appended.append(len(block.rows))
        raise StoreError("the disk is full", path=str(tmp_path))

    monkeypatch.setattr(EmbeddingWriter, "append", append)
    with pytest.raises(StoreError, match="the disk is full"):
        extract(fasta, model=model_of("llama"), unit_bases=5)
    assert appended == [1]
    assert names_in(tmp_path) == ["input.fa"]
