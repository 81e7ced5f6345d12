"""Layers without weights: equal to those of the loaded model, offline, and small."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModel,
    BigBirdConfig,
    BloomConfig,
    DebertaV2Config,
    GPT2Config,
    LongformerConfig,
    T5Config,
)

import genoembed
from genoembed.errors import LayerError, ModelError, ModelNotFoundError
from genoembed.models import hub, locate
from genoembed.models.behavior import Probe
from genoembed.models.describe import describe_layers
from genoembed.models.load import load_model
from genoembed.models.registry import known_models

SHAPE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
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
    monkeypatch.setattr(locate.constants, "HF_HOME", str(tmp_path / "home"))
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


LAYOUTS = {
    "norm_before_blocks": "norm",  # registered before the blocks and run after them, as in Evo 1
    "norm_inside_backbone": "backbone.closing",
    "norm_of_embeddings": "blocks.1",  # registered after the blocks and run before them
    "no_norm": "blocks.1",
    "norm_after_head": "norm",
    "norm_never_called": "backbone",  # a fused kernel takes its weights, as in Caduceus
    "scaled": None,  # no module returns the last state
    "needs_values": "blocks.1",  # seen only when the model runs with its weights
}
LAYOUT_CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

class LayoutConfig(PreTrainedConfig):
    model_type = "layout"

    def __init__(self, layout="no_norm", vocab_size=32, d_model=16, n_layer=2, **kwargs):
        self.layout, self.vocab_size, self.d_model, self.n_layer = layout, vocab_size, d_model, n_layer
        super().__init__(**kwargs)

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x):
        return x + self.dense(x).tanh()

class Backbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.is_fused = config.layout == "norm_never_called"
        self.closing = nn.LayerNorm(config.d_model)
        self.layers = nn.ModuleList(Block(config.d_model) for _ in range(config.n_layer))

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        norm = self.closing
        if self.is_fused:
            return nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias)
        return norm(x)

class LayoutModel(PreTrainedModel):
    config_class = LayoutConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        if config.layout in ("norm_inside_backbone", "norm_never_called"):
            self.backbone = Backbone(config)
        else:
            if config.layout == "norm_before_blocks":
                self.norm = nn.LayerNorm(config.d_model)
            self.blocks = nn.ModuleList(Block(config.d_model) for _ in range(config.n_layer))
            if config.layout == "norm_after_head":
                self.head = nn.Linear(config.d_model, config.vocab_size)
            if config.layout in ("norm_after_head", "norm_of_embeddings"):
                self.norm = nn.LayerNorm(config.d_model)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        if self.config.layout == "needs_values":
            x = x[:, torch.nonzero(input_ids[0] >= 0)[:, 0]]
        if (input_ids < 0).any():  # what a pass without values cannot answer
            raise ValueError(input_ids)
        if hasattr(self, "backbone"):
            return BaseModelOutput(last_hidden_state=self.backbone(x))
        if self.config.layout == "norm_of_embeddings":
            x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        if self.config.layout in ("norm_before_blocks", "norm_after_head"):
            x = self.norm(x)
        return BaseModelOutput(last_hidden_state=x * 2 if self.config.layout == "scaled" else x)
"""


@pytest.mark.parametrize(("layout", "final"), LAYOUTS.items())
def test_final_is_the_last_hidden_state_with_and_without_weights(layout, final, tmp_path, tiny_folder, batch):
    folder = shutil.copytree(tiny_folder("custom_conv"), tmp_path / "model")
    (folder / "layout.py").write_text(LAYOUT_CODE)
    auto_map = {"AutoConfig": "layout.LayoutConfig", "AutoModel": "layout.LayoutModel"}
    shape = {"layout": layout, "vocab_size": 32, "d_model": 16, "n_layer": 2}
    config = {"model_type": "layout", "auto_map": auto_map, "architectures": ["LayoutModel"], **shape}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    built = AutoModel.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    save_file(built.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})

    described = describe_layers(str(folder), trust_remote_code=True)
    model = load_model(str(folder), device="cpu", dtype="float32", trust_remote_code=True)
    assert described.final == (None if layout == "needs_values" else final)
    if final is None:
        with pytest.raises(LayerError, match=r"nothing in .* returns last_hidden_state; name a block number"):
            model.resolve("final")
        return
    assert [layer.path for layer in model.resolve("final")] == [final]
    with torch.inference_mode():
        last = model.module(batch.input_ids).last_hidden_state
    assert torch.equal(model.forward(batch, [final])[final], last)
    for names in (described.layers, model.layers):
        assert final in [layer.path for layer in names]


def test_shared_blocks_have_no_numbers_and_their_stack_gives_the_last_state(tmp_path):
    config = AlbertConfig(
        hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8, embedding_size=8
    )
    config.save_pretrained(tmp_path)
    described = describe_layers(str(tmp_path))
    assert (described.template, described.numbered) == (None, ())
    assert described.final == "encoder"
    module = AutoModel.from_config(config)
    assert Probe(module, special_ids=[0], pad_token_id=0).final_path() == described.final


@pytest.mark.parametrize(
    ("config", "final"),
    [
        (GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=32), "ln_f"),
        (BloomConfig(hidden_size=8, n_layer=2, n_head=2, vocab_size=32), "ln_f"),
        (BigBirdConfig(vocab_size=32, **SHAPE), "encoder.layer.1"),
        (LongformerConfig(vocab_size=32, attention_window=4, **SHAPE), "encoder.layer.1"),
        (
            DebertaV2Config(vocab_size=32, relative_attention=True, norm_rel_ebd="layer_norm", **SHAPE),
            "encoder.layer.1",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_final_is_found_without_weights_as_with_them(config, final, tmp_path):
    config.save_pretrained(tmp_path)
    assert describe_layers(str(tmp_path)).final == final
    assert Probe(AutoModel.from_config(config), special_ids=[0], pad_token_id=0).final_path() == final


def test_remote_code_needs_trust(tiny_folder):
    with pytest.raises(ModelError, match=r"its own Python code, .* then set trust_remote_code=True"):
        describe_layers(str(tiny_folder("custom_conv")))


def test_unknown_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-kind"}))
    with pytest.raises(ModelError, match="of no kind that transformers reads"):
        describe_layers(str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="file or folder not found"):
        describe_layers(str(tmp_path / "nothing"))


def test_default_device_and_dtype_are_left_alone():
    before = torch.get_default_dtype(), torch.get_default_device()
    describe_layers("evo2_1b_base")
    assert (torch.get_default_dtype(), torch.get_default_device()) == before
