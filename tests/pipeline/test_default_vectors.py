"""Layers that a model takes where the caller names none, and weights that it had before."""

from __future__ import annotations

import json
import shutil

import h5py
import numpy as np
import pytest

import genoembed
from genoembed.errors import ConfigError, ModelNotFoundError, StoreError
from genoembed.models import registry
from genoembed.models.registry import BUNDLED_FACTS, BUNDLED_FOLDER
from genoembed.pipeline.request import read_request

EARLIER = "ab" * 32


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """A folder that describes the bundled model: layers 3 and 1 concatenated, and earlier weights."""
    folder = tmp_path / "described"
    folder.mkdir()
    shutil.copy(BUNDLED_FOLDER / "config.json", folder)
    facts = {
        "vectors": {"layers": ["3", "1"], "pooling": "mean", "fusion": "concat"},
        "earlier_weights": [EARLIER],
    }
    (folder / BUNDLED_FACTS).write_text(json.dumps(facts))
    monkeypatch.setattr(registry, "BUNDLED_FOLDER", folder)
    return folder


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "few.fa"
    path.write_text(">a\nACGTTGCAAC\n>b\nGGGTTTAAAC\n")
    return path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (("3", "1"), "mean", "concat")),
        ({"pooling": "mean_std"}, (("3", "1"), "mean_std", "concat")),
        ({"pooling": "none"}, (("3", "1"), "none", "none")),
        ({"fusion": "none"}, (("3", "1"), "mean", "none")),
        ({"layers": 28}, (("28",), "mean", "none")),
        ({"layers": ["3", "1"], "pooling": "max"}, (("3", "1"), "max", "none")),
        ({"model": "evo2_7b"}, (("final",), "mean", "none")),
    ],
)
def test_options_of_the_caller_win(bundled, given, expected):
    config = read_request("a.fa", **{"model": "genoembed-mini", **given}).config.embedding
    assert (config.layers, config.pooling, config.fusion) == expected


def test_every_verb_takes_the_default_and_the_file_records_it(bundled, fasta, tmp_path, caplog):
    model = genoembed.load_model("genoembed-mini", dtype="float32")
    with caplog.at_level("INFO", logger="genoembed"):
        report = genoembed.extract(fasta, model=model, output=tmp_path / "few.h5")
    first = caplog.messages[0]
    own = "layers 3, 1; pooling mean; fusion concat"
    assert first == f"genoembed-mini: no layer is named, so its own default is taken: {own}"
    named = genoembed.extract(
        fasta, model=model, layers=["3", "1"], fusion="concat", output=tmp_path / "named.h5"
    )
    with genoembed.open_embeddings(report.output) as one, genoembed.open_embeddings(named.output) as other:
        assert one.provenance["config"]["embedding"] == other.provenance["config"]["embedding"]
        assert "finetuned" not in one.provenance
        np.testing.assert_array_equal(one[one.layers[0]][:], other[other.layers[0]][:])
        stored = one[one.layers[0]][:]
    found = genoembed.embed(["ACGTTGCAAC", "GGGTTTAAAC"], model=model)
    np.testing.assert_allclose(found.X, stored, rtol=1e-5, atol=1e-6)
    plan = genoembed.plan(fasta, model=model, output=tmp_path / "planned.h5")
    assert plan.layers == ("blocks.3.mlp.l3", "blocks.1.mlp.l3")


def test_a_folder_without_facts_has_none(tmp_path):
    entry = registry._bundled(tmp_path)
    assert (dict(entry.vectors), entry.earlier_weights) == ({}, ())


def test_damaged_facts_are_named(tmp_path):
    (tmp_path / BUNDLED_FACTS).write_text("{")
    with pytest.raises(ModelNotFoundError, match=r"bundled.json is damaged .*; install genoembed again"):
        registry._bundled(tmp_path)


@pytest.fixture
def before(fasta, tmp_path, bundled):
    """A file whose provenance names the earlier weights, as files of an earlier release do."""
    output = tmp_path / "before.h5"
    genoembed.extract(fasta, layers=1, dtype="float32", output=output)
    with h5py.File(output, "r+") as file:
        text = file["uns/genoembed/provenance_json"].asstr()[()]
        now = json.loads(text)["model"]["weights_sha256"]
        file["uns/genoembed/provenance_json"][()] = text.replace(now, EARLIER)
    return output


WHOSE = r"genoembed-mini of version 1, whose weights were exchanged since"


def test_earlier_weights_are_named_wherever_a_file_is_used_again(before, fasta, tmp_path, caplog):
    with pytest.raises(ConfigError, match=rf"before.h5: made with {WHOSE}, .*; extract the sequences again"):
        genoembed.verify(before)
    with pytest.raises(ConfigError, match=rf"model: .* against '{EARLIER}' \({WHOSE}\)"):
        genoembed.search(fasta, before, output=tmp_path / "hits.tsv")
    now = tmp_path / "now.h5"
    genoembed.extract(fasta, layers=1, dtype="float32", output=now)
    compared = genoembed.compare(before, now)
    assert any(WHOSE in line for line in compared.setting_differences)
    with pytest.raises(StoreError, match="weights has other content"):
        genoembed.extract(fasta, layers=1, dtype="float32", output=before, resume=True)
    assert f"{before}: begun with {WHOSE}" in caplog.messages
