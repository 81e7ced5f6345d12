"""From files to a file: order, ids, provenance, repeatability."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import sys

import anndata
import h5py
import numpy as np
import pytest
import torch

import genoembed
from genoembed import extract, load_model, open_embeddings
from genoembed.errors import ModelError
from tests.by_hand import STRIPED, embed, embed_files, folder_of, model_of, random_dna, write_fasta

RECORDS = {f"contig/{index}": random_dna(length, index) for index, length in enumerate((90, 5, 33, 5, 70, 1))}


def matrix_of(found):
    return next(iter(found.matrices.values()))


@pytest.mark.parametrize("batch_tokens", [1, 100, 8192])
def test_rows_are_in_the_order_of_the_input(batch_tokens, tmp_path):
    found = embed(tmp_path, RECORDS, model_of("llama"), batch_tokens=batch_tokens)
    assert found.ids == list(RECORDS)
    assert found.obs["length"] == [len(sequence) for sequence in RECORDS.values()]
    assert found.obs["sha256"] == [
        hashlib.sha256(sequence.encode()).hexdigest() for sequence in RECORDS.values()
    ]
    matrix = matrix_of(found)
    assert np.isfinite(matrix).all()
    assert len(np.unique(matrix.round(4), axis=0)) == len(RECORDS)


def test_rows_of_several_units_are_in_the_order_of_the_input(tmp_path):
    whole = embed(tmp_path, RECORDS, model_of("llama"))
    found = embed(tmp_path, RECORDS, model_of("llama"), unit_bases=60)
    assert found.ids == list(RECORDS)
    np.testing.assert_allclose(matrix_of(found), matrix_of(whole), rtol=1e-5, atol=1e-5)


def test_several_files_are_read_one_after_the_other(tmp_path):
    names = list(RECORDS)
    first = write_fasta(tmp_path / "first.fa", {name: RECORDS[name] for name in names[:2]})
    second = tmp_path / "second.fa.gz"
    text = "".join(f">{name} some words\n{RECORDS[name].lower()}\n" for name in names[2:])
    second.write_bytes(gzip.compress(text.encode()))
    found = embed_files(tmp_path, [first, str(second)], model_of("llama"))
    assert found.ids == names
    assert found.obs["source"] == [str(first)] * 2 + [str(second)] * 4
    assert found.obs["description"] == [""] * 2 + ["some words"] * 4
    assert found.obs["flags"][2:] == [f"upper_cased:{len(RECORDS[name])}" for name in names[2:]]
    joined = embed(tmp_path, RECORDS, model_of("llama"))
    np.testing.assert_array_equal(matrix_of(found), matrix_of(joined))
    facts = found.provenance["inputs"]
    assert [entry["name"] for entry in facts] == [str(first), str(second)]
    for entry, path in zip(facts, (first, second), strict=True):
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert entry["bytes"] == path.stat().st_size
    counts = found.provenance["counts"]
    assert (counts["files"], counts["records"]) == (2, len(names))
    assert counts["upper_cased"] == sum(len(RECORDS[name]) for name in names[2:])


def test_duplicates_across_files_are_renamed_where_asked_for(tmp_path):
    fasta = write_fasta(tmp_path / "a.fa", {"x": "ACGT", "y": "GGG"})
    found = embed_files(tmp_path, [fasta, fasta], model_of("llama"), duplicates="suffix")
    assert found.ids == ["x", "y", "x_2", "y_2"]
    assert found.provenance["counts"]["renamed"] == 2


@pytest.mark.parametrize("family", ["esm", "mamba", "custom_conv", STRIPED])
@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_same_input_twice_is_bitwise_the_same(family, pooling, tmp_path):
    options = {"pooling": pooling, "layers": ["0", "final"], "rc": "mean", "window": 40, "stride": 30}
    first = embed(tmp_path, RECORDS, model_of(family), **options)
    second = embed(tmp_path, RECORDS, model_of(family), **options)
    assert first.ids == second.ids
    for layer, matrix in first.matrices.items():
        assert matrix.tobytes() == second.matrices[layer].tobytes()


def test_provenance_says_how_the_file_was_made(tmp_path):
    options = {
        "layers": [1, "final"],
        "pooling": "max",
        "rc": "mean",
        "window": 40,
        "stride": np.int64(20),
        "skip_first": 0,
        "fusion": "weighted",
        "fusion_weights": np.array([1, 3], dtype=np.float32),
    }
    found = embed(tmp_path, RECORDS, model_of("esm"), **options)
    provenance = found.provenance
    assert provenance["genoembed_version"] == genoembed.__version__
    assert provenance["command"]
    assert provenance["layers"] == ["encoder.layer.1", "encoder.emb_layer_norm_after"]
    weights = folder_of("esm") / "model.safetensors"
    model = provenance["model"]
    assert model["id"] == str(folder_of("esm"))
    assert model["weights_sha256"] == model_of("esm").provenance["weights_sha256"]
    assert len(model["weights_sha256"]) == 64
    assert weights.exists()
    assert (model["dtype"], model["padding"], model["is_causal"]) == ("float32", "mask", False)
    config = provenance["config"]
    assert config["embedding"]["layers"] == ["1", "final"]
    assert config["embedding"]["fusion_weights"] == [1.0, 3.0]
    assert config["windows"] == {
        "window": 40,
        "stride": 20,
        "per_window": False,
        "carry_state": False,
    }
    assert config["input"]["inputs"] == [str(tmp_path / "input.fa")]
    assert provenance["counts"]["windows"] == sum(found.obs["n_windows"]) > len(RECORDS)
    assert provenance["counts"]["bases"] == sum(map(len, RECORDS.values()))
    stats = provenance["stats"]
    assert (stats["windows"], provenance["units"]) == (provenance["counts"]["windows"], 1)
    assert stats["real_tokens"] > provenance["counts"]["bases"]
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["versions"]["python"] == sys.version.split()[0]


def test_report_equals_the_file(tmp_path):
    found = embed(tmp_path, RECORDS, model_of("llama"), layers=["0", "final"])
    report = found.report
    assert report.num_rows == len(RECORDS)
    assert report.width == 16
    assert list(report.layers) == found.layers
    assert report.output == tmp_path / "output.h5"
    assert dataclasses.asdict(report.counts) | {"failed": 0} == found.provenance["counts"]
    stats = dataclasses.asdict(report.stats)
    assert {name: stats[name] for name in found.provenance["stats"]} == found.provenance["stats"]
    assert (report.failed, report.shard) == ({}, None)
    assert report.seconds > 0


def test_feature_names_follow_layers_and_strands(tmp_path):
    def names(**options):
        embed(tmp_path, {"x": "ACGT"}, model_of("llama"), layers=[0, 1], **options)
        with open_embeddings(tmp_path / "output.h5") as file:
            return file.feature_names

    assert names()[:2] == ["layers.0:0", "layers.0:1"]
    assert len(names()) == 16
    assert names(fusion="concat")[15:17] == ["layers.0:15", "layers.1:0"]
    assert names(fusion="mean", rc="concat")[15:17] == ["mean:15", "mean:rc:0"]


def test_output_is_an_anndata_file_and_plain_hdf5(tmp_path):
    found = embed(tmp_path, RECORDS, model_of("llama"), layers=["final", "0"])
    data = anndata.read_h5ad(tmp_path / "output.h5")
    assert list(data.obs_names) == list(RECORDS)
    np.testing.assert_array_equal(data.X, found.matrices["norm"])
    np.testing.assert_array_equal(data.obsm["layers.0"], found.matrices["layers.0"])
    with h5py.File(tmp_path / "output.h5") as file:
        np.testing.assert_array_equal(file["X"][:], found.matrices["norm"])


def test_default_output_lies_beside_the_input(tmp_path):
    fasta = write_fasta(tmp_path / "genome.v2.fa", RECORDS)
    report = extract(fasta, model=model_of("llama"))
    assert report.output == tmp_path / "genome.v2.h5"
    assert report.output.exists()


@pytest.mark.parametrize("family", ["llama", STRIPED])
def test_model_by_name_is_the_model_that_was_loaded(family, tmp_path):
    by_name = embed(tmp_path, RECORDS, str(folder_of(family)), device="cpu", dtype="float32")
    by_path = embed(tmp_path, RECORDS, folder_of(family), device="cpu", dtype="float32")
    np.testing.assert_array_equal(matrix_of(by_path), matrix_of(by_name))
    loaded = embed(tmp_path, RECORDS, model_of(family))
    np.testing.assert_array_equal(matrix_of(by_name), matrix_of(loaded))
    assert by_name.provenance["model"] == loaded.provenance["model"]


def test_code_of_a_model_runs_only_if_trusted(tmp_path):
    folder = str(folder_of("custom_conv"))
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        embed(tmp_path, RECORDS, folder)
    found = embed(tmp_path, RECORDS, folder, trust_remote_code=True, device="cpu")
    assert found.ids == list(RECORDS)


def test_recipe_in_the_file_repeats_the_file(tmp_path):
    """The configuration that the file holds, given back to `extract`, makes the same vectors."""
    first = embed(
        tmp_path, RECORDS, str(folder_of("esm")), device="cpu", layers=[0, 1], fusion="mean", rc="mean"
    )
    stages = json.loads(json.dumps(first.provenance["config"])).values()
    options = {key: value for stage in stages for key, value in stage.items()}
    options["output"] = str(tmp_path / "again.h5")
    extract(**options)
    with open_embeddings(tmp_path / "again.h5") as file:
        np.testing.assert_array_equal(file.X[:], first.matrices["mean"])


def test_half_precision_model_is_close_to_full(tmp_path):
    full = matrix_of(embed(tmp_path, RECORDS, model_of("llama")))
    half = load_model(str(folder_of("llama")), device="cpu", dtype="bfloat16")
    found = embed(tmp_path, RECORDS, half)
    assert matrix_of(found).dtype == np.float32
    assert found.provenance["model"]["dtype"] == "bfloat16"
    error = np.linalg.norm(matrix_of(found) - full, axis=1) / np.linalg.norm(full, axis=1)
    assert error.max() < 3e-2
