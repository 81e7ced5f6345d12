"""Folders of native models with words of their own: recognized, and no others with them."""

from __future__ import annotations

import json
import shutil

import pytest

from genoembed.models.families import Published, family_of
from tests.models.families.test_goldens import GOLDEN


def published(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    return Published({key: value for key, value in values.items() if value is not None}, folder)


@pytest.mark.parametrize(("golden", "name"), [("dnabert_k6", "DNABERT"), ("generator", "GENERator")])
def test_kmer_models_are_recognized_by_their_words(golden, name, tmp_path):
    folder = GOLDEN / golden
    assert family_of(published(folder)).name == name
    assert family_of(published(folder, model_type=None, architectures=None, auto_map=None)).name == name
    other = shutil.copytree(folder, tmp_path / "x")
    (other / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\n##word\n")
    assert family_of(published(other, architectures=None, auto_map=None)) is None


def test_kmer_models_are_recognized_before_their_files_are_fetched():
    assert family_of(Published({"architectures": ["BertForMaskedLM"], "vocab_size": 4101})).name == "DNABERT"
    assert family_of(Published({"architectures": ["BertForMaskedLM"], "vocab_size": 30522})) is None
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert family_of(Published(llama)) is None
    assert family_of(Published(llama | {"architectures": ["GENERatorForCausalLM"]})).name == "GENERator"
