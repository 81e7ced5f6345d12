"""Layer specs, over every family: what a number, a path, a glob, ``final`` and ``all`` stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AutoModel, GPT2Config, T5Config, T5EncoderModel

from genoembed.errors import LayerError, ModelError
from genoembed.models.layers import final_candidates, find_blocks, list_layers, num_blocks, resolve_layers

BLOCKS = {
    "bert": ("encoder.layer", "encoder.layer.2"),
    "esm": ("encoder.layer", "encoder.emb_layer_norm_after"),
    "modernbert": ("layers", "final_norm"),
    "llama": ("layers", "norm"),
    "mistral": ("layers", "norm"),
    "gpt_neox": ("layers", "final_layer_norm"),
    "mamba": ("layers", "norm_f"),
    "custom_conv": ("tower", "ln_out"),
}


class Block(nn.Module):
    """Holds an MLP and a norm; never run."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential()
        self.mlp.add_module("l3", nn.Linear(2, 7))
        self.norm = nn.LayerNorm(2)


class Templated(nn.Module):
    """Declares that a number means a module inside the block."""

    embedding_layer_template = "blocks.{index}.mlp.l3"

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(12))
        self.norm = nn.LayerNorm(2)


def paths(module: nn.Module, *specs: int | str) -> list[str]:
    return [layer.path for layer in resolve_layers(module, specs, final_path="norm", name="templated")]


def test_find_blocks_and_final_fit_every_family(family, tiny_model):
    module = tiny_model(family).module
    blocks, final = BLOCKS[family]
    assert find_blocks(module) == blocks
    assert final_candidates(module)[0] == final
    assert num_blocks(module) == (2 if family == "custom_conv" else 3)


@pytest.mark.parametrize(
    ("module", "blocks", "final"),
    [
        (lambda: AutoModel.from_config(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=9)), "h", "ln_f"),
        (
            lambda: T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)),
            "encoder.block",
            "encoder.final_layer_norm",
        ),
    ],
)
def test_find_blocks_fits_more_architectures(module, blocks, final):
    with torch.device("meta"):
        built = module()
    assert find_blocks(built) == blocks
    assert final_candidates(built)[0] == final


def test_find_blocks_refuses_a_model_without_a_list():
    with pytest.raises(ModelError, match="Linear: it holds no list of blocks"):
        find_blocks(nn.Linear(2, 2))


def test_number_counts_from_either_end_and_as_text():
    module = Templated()
    assert paths(module, 3, "3", -9, "-9", "+3") == ["blocks.3.mlp.l3"]
    assert paths(module, -1, 0) == ["blocks.11.mlp.l3", "blocks.0.mlp.l3"]


def test_template_leaves_paths_alone():
    module = Templated()
    assert paths(module, "blocks.3", "norm", "final") == ["blocks.3", "norm"]


def test_all_means_every_number_in_order():
    assert paths(Templated(), "all") == [f"blocks.{index}.mlp.l3" for index in range(12)]


def test_glob_keeps_the_models_order_and_stays_within_dots():
    module = Templated()
    assert paths(module, "blocks.*.mlp.l3") == [f"blocks.{index}.mlp.l3" for index in range(12)]
    assert paths(module, "blocks.1?") == ["blocks.10", "blocks.11"]
    assert paths(module, "blocks.[01].norm") == ["blocks.0.norm", "blocks.1.norm"]
    assert paths(module, "*orm") == ["norm"]


def test_order_is_as_asked_and_duplicates_go():
    module = Templated()
    assert paths(module, "final", 2, "blocks.2.mlp.l3", 1, "norm") == [
        "norm",
        "blocks.2.mlp.l3",
        "blocks.1.mlp.l3",
    ]


def test_layer_info_carries_block_number_and_width(tiny_model):
    block, dense, final = tiny_model("bert").resolve([1, "encoder.layer.2.intermediate.dense", "embeddings"])
    assert (block.path, block.index, block.width) == ("encoder.layer.1", 1, 16)
    assert (dense.index, dense.width) == (2, 24)
    assert (final.index, final.width) == (None, None)


def test_list_layers_leaves_out_containers_and_root(tiny_model):
    found = [layer.path for layer in list_layers(tiny_model("llama").module)]
    assert "layers" not in found
    assert "" not in found
    assert {"embed_tokens", "layers.0", "layers.2.mlp.down_proj", "norm"} <= set(found)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (12, r"layer '12' is not in templated \(blocks 0-11\); name a block from 0 to 11"),
        (-13, r"layer '-13' is not in templated \(blocks 0-11\); .* from -12 to -1"),
        ("blocks.8.mpl.l3", r"layer 'blocks.8.mpl.l3' is not in .*; did you mean 'blocks.8.mlp.l3'"),
        ("blocks.*.mlp.l4", r"layer 'blocks.\*.mlp.l4' is not in .*did you mean"),
        ("fnal", r"did you mean 'final'\?"),
        ("", r"layer '' is not in templated .*; name a block number, a module path such as"),
        ("blocks", r"layer 'blocks' is not in templated"),
    ],
)
def test_unknown_layer_names_range_and_nearest(spec, expected):
    with pytest.raises(LayerError, match=expected) as caught:
        paths(Templated(), spec)
    assert caught.value.spec == str(spec)


def test_no_layer_is_refused():
    with pytest.raises(LayerError, match="none given, expected at least one"):
        resolve_layers(Templated(), [])


def test_number_is_refused_where_blocks_are_shared():
    config = AlbertConfig(hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8)
    with torch.device("meta"):
        module = AutoModel.from_config(config)
    with pytest.raises(LayerError, match=r"states 4 blocks, but its list .* holds 1"):
        resolve_layers(module, -1)
