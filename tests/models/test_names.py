"""Names of models: all are known without torch, and a wrong one is refused with the nearest."""

from __future__ import annotations

import pytest
from huggingface_hub import constants

from genoembed.errors import ModelNotFoundError
from genoembed.models.names import BUNDLED_NAME, EVO2_NAMES, check_model_name, model_names, suggestion
from genoembed.models.registry import find_model, known_models


def test_names_are_those_of_the_registry_and_of_the_table():
    assert (BUNDLED_NAME, *EVO2_NAMES) == tuple(model.name for model in known_models())
    assert len(model_names()) == len(set(model_names())) == 9 + 40


@pytest.mark.parametrize(
    "name", ["genoembed-mini", "evo2_7b", "dnabert-2", "NT-v2-50M-MS", "someone/model", ".", "~"]
)
def test_what_may_be_there_passes(name):
    check_model_name(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("evo2-7b", r"not found: not a name from .*; did you mean 'evo2_7b'\?"),
        ("dnabert2", r"; did you mean 'dnabert-2' or 'dnabert-s'\?"),
        ("xyz", "; use a local folder, a Hugging Face id, or one of genoembed-mini, .* and the others of"),
        ("./evo2_7b", r"file or folder not found; did you mean 'evo2_7b'"),
        ("models/of/mine", "file or folder not found; "),
        ("weights.pt", "file or folder not found; "),
    ],
)
def test_what_cannot_be_there_is_refused(name, message):
    with pytest.raises(ModelNotFoundError, match=message):
        check_model_name(name)


def test_repository_without_owner_is_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError):
        check_model_name("gpt2")
    (tmp_path / "models--gpt2").mkdir()
    check_model_name("gpt2")


def test_converted_models_are_suggested_among_themselves():
    assert suggestion("dnabert2", is_converted=True).startswith("use a local folder")
    with pytest.raises(ModelNotFoundError, match=r"'evo2-7b' is not known \(.*\); did you mean 'evo2_7b'"):
        find_model("evo2-7b")
