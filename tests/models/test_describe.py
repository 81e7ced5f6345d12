"""Layers without weights: equal to those of the loaded model, offline, and small."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from transformers import AlbertConfig, T5Config

import genoembed
from genoembed.errors import ModelError, ModelNotFoundError
from genoembed.models import hub
from genoembed.models.describe import describe_layers
from genoembed.models.load import load_model
from genoembed.models.registry import known_models

OFFICIAL = [model.name for model in known_models() if model.repo_id]


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))


def test_family_has_the_layers_of_its_loaded_model(family, tiny_folder, tiny_model):
    folder, model = str(tiny_folder(family)), tiny_model(family)
    described = describe_layers(folder, trust_remote_code=family == "custom_conv")
    assert described.name == folder
    assert described.layers == model.layers
    assert described.numbered == tuple(layer.path for layer in model.resolve("all"))
    assert described.num_blocks == len(described.numbered) > 1
    assert [described.final] == [layer.path for layer in model.resolve("final")]


def test_striped_hyena_has_the_layers_of_its_loaded_model(tmp_path):
    config = genoembed.StripedHyena2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        hcs_layer_idxs=[0],
        hcm_layer_idxs=[1],
        hcl_layer_idxs=[2],
        attn_layer_idxs=[3],
    )
    genoembed.StripedHyena2ForCausalLM(config).save_pretrained(tmp_path)
    described, model = describe_layers(str(tmp_path)), load_model(str(tmp_path), device="cpu")
    assert described.layers == model.layers
    assert described.numbered == tuple(layer.path for layer in model.resolve("all"))
    assert [described.final] == [layer.path for layer in model.resolve("final")]


@pytest.mark.parametrize("name", [*OFFICIAL, "genoembed-mini"])
def test_registry_model_is_described_without_files(name, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HOME", str(tmp_path / "home"))
    entry = next(model for model in known_models() if model.name == name)
    described = describe_layers(name)
    assert described.num_blocks == entry.config["num_hidden_layers"]
    assert (described.template, described.final) == ("blocks.{index}.mlp.l3", "norm")
    layers = {layer.path: layer for layer in described.layers}
    width = entry.config["hidden_size"]
    for index, path in enumerate(described.numbered):
        assert (layers[path].index, layers[path].width) == (index, width)
        assert layers[f"blocks.{index}"].width == width
        assert layers[f"blocks.{index}.mlp.l1"].width == entry.config["intermediate_size"]
    assert layers["norm"].width == layers["embedding_layer"].width == width
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is counted in other units elsewhere")
def test_largest_model_is_described_in_little_memory():
    code = """
import resource
import genoembed, genoembed.models.load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert genoembed.describe_layers("evo2_40b").num_blocks == 50
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(ran.stdout) < 200_000  # kilobytes; the weights are 82 GB


def test_weights_are_not_read(tiny_folder, tmp_path):
    config = (tiny_folder("llama") / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert describe_layers(str(tmp_path)).num_blocks == 3
    with pytest.raises((ModelError, SafetensorError), match="cannot be read"):
        load_model(str(tmp_path), device="cpu")


def test_encoder_of_an_encoder_decoder_is_described(tmp_path):
    T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=32).save_pretrained(tmp_path)
    described = describe_layers(str(tmp_path))
    assert described.numbered == ("block.0", "block.1")
    assert described.final == "final_layer_norm"


def test_shared_blocks_have_no_numbers(tmp_path):
    AlbertConfig(
        hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8, embedding_size=8
    ).save_pretrained(tmp_path)
    described = describe_layers(str(tmp_path))
    assert (described.template, described.numbered) == (None, ())
    assert described.final == "encoder.albert_layer_groups.0"


def test_remote_code_needs_trust(tiny_folder):
    with pytest.raises(ModelError, match=r"its own Python code, .* then set trust_remote_code=True"):
        describe_layers(str(tiny_folder("custom_conv")))


def test_unknown_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-kind"}))
    with pytest.raises(ModelError, match="of no kind that transformers reads"):
        describe_layers(str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        describe_layers(str(tmp_path / "nothing"))


def test_default_device_and_dtype_are_left_alone():
    before = torch.get_default_dtype(), torch.get_default_device()
    describe_layers("evo2_1b_base")
    assert (torch.get_default_dtype(), torch.get_default_device()) == before
