"""``export_model``: what sentence-transformers encodes equals what ``embed`` gives."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from genoembed import embed, export_model
from genoembed.errors import ModelError, StoreError
from tests.tiny_models import build_striped_hyena, build_tiny

SEQUENCES = ["ACGTACGTTTGA", "GGC", "T", "NNACGTTTACCCAGGATTA"]


def encoder(folder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
        return lambda sequences, **options: model.encode(sequences, **options)


@pytest.mark.parametrize("family", ["bert", "esm", "modernbert", "llama", "gpt_neox"])
def test_encode_equals_embed(family, tmp_path):
    pytest.importorskip("sentence_transformers")
    folder = build_tiny(family, tmp_path / family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = export_model(folder, tmp_path / "out")
    assert report.width == 16
    assert not report.needs_genoembed
    expected = embed(SEQUENCES, model=str(folder), layers="final", dtype="float32").X
    found = encoder(tmp_path / "out")
    for size in (1, 4):
        np.testing.assert_allclose(found(SEQUENCES, batch_size=size), expected, rtol=1e-4, atol=1e-5)
    assert report.layer in (tmp_path / "out" / "README.md").read_text()


def test_our_architecture_is_exported_and_said_to_need_us(tmp_path):
    pytest.importorskip("sentence_transformers")
    from genoembed import CharTokenizer

    build_striped_hyena().save_pretrained(tmp_path / "striped")
    CharTokenizer().save_pretrained(tmp_path / "striped")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = export_model(tmp_path / "striped", tmp_path / "out")
    assert report.needs_genoembed
    assert "import genoembed" in (tmp_path / "out" / "README.md").read_text()
    expected = embed(SEQUENCES, model=str(tmp_path / "striped"), layers="final", dtype="float32").X
    np.testing.assert_allclose(encoder(tmp_path / "out")(SEQUENCES), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "is_ours"), [("nt_v1", False), ("nt_v2", True), ("dnabert2", True)])
def test_published_folders_are_exported(family, is_ours, tmp_path):
    """One has tokens without an embedding, one no stated length."""
    pytest.importorskip("sentence_transformers")
    folder = Path(__file__).parents[1] / "golden" / "families" / family
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = export_model(folder, tmp_path / "out")
    assert report.needs_genoembed is is_ours
    expected = embed(SEQUENCES, model=str(folder), layers="final", dtype="float32").X
    np.testing.assert_allclose(encoder(tmp_path / "out")(SEQUENCES), expected, rtol=1e-4, atol=1e-5)


def test_model_that_sees_padding_and_existing_folders_are_refused(tmp_path):
    folder = build_tiny("custom_conv", tmp_path / "conv")
    with pytest.raises(ModelError, match=r"sees padding .* use genoembed\.embed"):
        export_model(folder, tmp_path / "out", trust_remote_code=True)
    with pytest.raises(StoreError, match="exists already; set overwrite=True"):
        export_model(folder, tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_package_is_not_needed_to_write_the_folder(tmp_path, monkeypatch):
    folder = build_tiny("bert", tmp_path / "bert")
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    export_model(folder, tmp_path / "out")
    assert (tmp_path / "out" / "modules.json").is_file()
