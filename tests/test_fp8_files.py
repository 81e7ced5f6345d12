"""FP8 in files: it is recorded, decides what may be joined and compared, and is repeated by readers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import yaml

import genoembed
from genoembed.errors import ConfigError, PrecisionWarning, StoreError
from genoembed.models.striped_hyena2.blocks import Projections
from genoembed.models.striped_hyena2.convert import convert_checkpoint
from genoembed.sklearn import SequenceEmbedder
from tests.models.test_fp8_models import CHECKPOINT, GOLDEN
from tests.oracles import hopper_product

RECORDS = {"a": "ACGTACGTTTAGGACCA" * 3, "b": "GGGATATTTACCCACAGAGT" * 2, "c": "TTTACGCGAT" * 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose projections need FP8."""
    root = tmp_path_factory.mktemp("fp8")
    content = yaml.safe_load((GOLDEN / "config.yml").read_text()) | {"use_fp8_input_projections": True}
    (root / "config.yml").write_text(yaml.safe_dump(content))
    return str(convert_checkpoint(CHECKPOINT, root / "model", config=root / "config.yml"))


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "records.fa"
    path.write_text("".join(f">{name}\n{bases}\n" for name, bases in RECORDS.items()))
    return path


@pytest.fixture(scope="module")
def files(folder, fasta, tmp_path_factory):
    """The same vectors with FP8 and without."""
    root = tmp_path_factory.mktemp("files")
    options = {"model": folder, "dtype": "float32", "device": "cpu"}
    genoembed.extract(fasta, output=root / "on.h5", **options)
    with pytest.warns(PrecisionWarning, match="FP8 is off"):
        genoembed.extract(fasta, output=root / "off.h5", fp8="off", **options)
    return root / "on.h5", root / "off.h5"


def test_files_say_whether_fp8_was_on(files):
    for path, requested, found, numbers in zip(
        files, ("auto", "off"), ("emulated", "off"), ("on", "off"), strict=True
    ):
        with genoembed.open_embeddings(path) as file:
            assert file.provenance["config"]["model"]["fp8"] == requested
            assert file.provenance["model"]["fp8"] == found
            assert file.provenance["identity"]["fp8"] == numbers


def test_vectors_are_those_of_exact_integers(folder, tmp_path, monkeypatch):
    fasta = tmp_path / "short.fa"
    fasta.write_text(">a\nACGT\n")
    options = {"model": folder, "layers": "final", "dtype": "float32", "device": "cpu"}
    found = {}
    for fp8 in ("auto", "off"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrecisionWarning)
            genoembed.extract(fasta, output=tmp_path / f"{fp8}.h5", fp8=fp8, **options)
        with genoembed.open_embeddings(tmp_path / f"{fp8}.h5") as file:
            found[fp8] = file.X[0]

    def multiply(projections, x_BLD):
        operands = x_BLD[0].tolist(), projections.weight.tolist(), projections.fp8_scales.tolist()
        return torch.tensor([hopper_product(*operands)])

    model = genoembed.load_model(folder, device="cpu", dtype="float32")
    monkeypatch.setattr(Projections, "forward", multiply)
    with torch.inference_mode():
        states = model.module(torch.tensor([list(b"ACGT")])).last_hidden_state
    expected = states[0].mean(0).numpy()
    assert np.allclose(found["auto"], expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(found["off"], expected, rtol=1e-3, atol=1e-3)


def test_compare_finds_the_difference_and_its_reason(files):
    report = genoembed.compare(*files)
    assert not report.is_within
    assert "fp8: 'on' against 'off'" in report.setting_differences


def test_verify_repeats_what_the_file_says(files):
    on, off = files
    assert genoembed.verify(on).is_within
    with pytest.warns(PrecisionWarning):
        assert genoembed.verify(off).is_within
    assert not genoembed.verify(off, fp8="auto").is_within


def test_batches_may_round_otherwise_in_fp8(files, fasta, folder, tmp_path):
    """The last bit of a float32 may decide between two numbers of four bits: no reason for a warning."""
    on, off = files
    for one, other, tolerance in ((on, on, 2e-2), (off, off, 1e-5), (on, off, 1e-5)):
        assert genoembed.compare(one, other).tolerance == tolerance
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionWarning)
        for path, options, tolerance in ((on, {}, 2e-2), (off, {}, 1e-5), (off, {"fp8": "auto"}, 1e-5)):
            assert genoembed.verify(path, sample=1, **options).tolerance == tolerance
    options = {"model": folder, "dtype": "float32", "device": "cpu"}
    assert genoembed.certify(fasta, sample=1, **options).tolerance == 2e-2
    genoembed.extract(fasta, output=tmp_path / "out.h5", certificate=1, **options)
    with genoembed.open_embeddings(tmp_path / "out.h5") as file:
        assert file.provenance["certificate"]["tolerance"] == 2e-2


def test_search_embeds_queries_as_the_file_was(files, fasta):
    on, off = files
    with pytest.warns(PrecisionWarning):
        found = genoembed.search(fasta, off, k=1)
    assert [hit.score for hit in found.hits] == pytest.approx([1.0] * 3, abs=1e-6)
    with pytest.raises(ConfigError, match="fp8: 'on' against 'off'"):
        genoembed.search(fasta, off, fp8="auto")
    assert len(genoembed.search(fasta, on, fp8="emulate").hits) >= 3


def test_shards_with_and_without_fp8_never_merge(folder, fasta, tmp_path, monkeypatch):
    options = {"model": folder, "dtype": "float32", "device": "cpu", "output": tmp_path / "out.h5"}
    genoembed.extract(fasta, shard="1/2", **options)
    with (
        pytest.warns(PrecisionWarning),
        pytest.raises(StoreError, match=r"another run: fp8 was 'on' and is 'off'"),
    ):
        genoembed.extract(fasta, shard="2/2", fp8="off", **options)
    # the same numbers, by another option and as if another machine had computed them in hardware
    monkeypatch.setattr(Projections, "fp8_form", "native")
    genoembed.extract(fasta, shard="2/2", fp8="emulate", **options)
    assert genoembed.merge(tmp_path / "out.h5").num_rows == len(RECORDS)


def test_every_verb_takes_it(folder, fasta):
    options = {"model": folder, "device": "cpu"}
    with pytest.warns(PrecisionWarning):
        off = genoembed.embed(list(RECORDS.values()), fp8="off", dtype="float32", **options)
    on = genoembed.embed(list(RECORDS.values()), dtype="float32", **options)
    assert not np.allclose(on.X, off.X, rtol=1e-3)
    scores = []
    for choice in ("auto", "emulate"):
        scores.append([row.log_likelihood for row in genoembed.score(fasta, fp8=choice, **options).rows])
    with pytest.warns(PrecisionWarning):
        scores.append([row.log_likelihood for row in genoembed.score(fasta, fp8="off", **options).rows])
    assert scores[0] == scores[1] != scores[2]
    estimator = SequenceEmbedder(folder, fp8="emulate", dtype="float32", device="cpu")
    assert np.allclose(estimator.fit_transform(list(RECORDS.values())), on.X, rtol=1e-3, atol=1e-3)


def test_a_loaded_model_has_decided_it(folder):
    model = genoembed.load_model(folder, device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match="fp8: the model is loaded already"):
        genoembed.embed(["ACGT"], model=model, fp8="off")
    with pytest.raises(ConfigError, match="fp8 is 'no'; set fp8 to one of auto, emulate, off"):
        genoembed.embed(["ACGT"], model=folder, fp8="no")
