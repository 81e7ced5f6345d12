"""The registry against the configurations: names, sizes and parameter counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from genoembed.errors import ModelNotFoundError
from genoembed.models import registry
from genoembed.models.registry import (
    BUNDLED_FOLDER,
    count_parameters,
    find_model,
    known_models,
)
from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
from genoembed.models.striped_hyena2.modeling import StripedHyena2ForCausalLM

# exact counts; published as 1B, 7B (6.5e9), 20B and 40B (40.3e9)
PARAMETERS = {
    "evo2_1b_base": 1_107_989_760,
    "evo2_7b": 6_581_722_880,
    "evo2_7b_base": 6_481_059_584,
    "evo2_7b_262k": 6_481_059_584,
    "evo2_7b_microviridae": 6_481_059_584,
    "evo2_20b": 19_738_780_160,
    "evo2_40b": 41_117_574_144,
    "evo2_40b_base": 40_331_142_144,
}
# tensors in the released files, the tied output embedding included
TENSORS = {"evo2_1b_base": 270, "evo2_7b": 345, "evo2_20b": 261, "evo2_40b": 537}


def count_by_hand(config) -> int:
    """Add up the shapes of the original file format."""
    width, inner, state = config.hidden_size, config.intermediate_size, config.state_size
    mlp_and_norms = 3 * width * inner + 2 * width
    hyena = 3 * width * width + 3 * width * 3 + width * width + width
    attention = 3 * width * width + width * width + width
    return (
        config.vocab_size * width
        + width
        + config.num_hidden_layers * mlp_and_norms
        + len(config.attn_layer_idxs) * attention
        + len(config.hcs_layer_idxs) * (hyena + config.hcs_filter_groups * 7)
        + len(config.hcm_layer_idxs) * (hyena + config.hcm_filter_groups * 128 + width)
        + len(config.hcl_layer_idxs) * (hyena + 2 * width * state + width)
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_on_the_meta_device(name):
    entry = find_model(name)
    config = StripedHyena2Config.from_dict(entry.shape.to_dict())
    with torch.device("meta"):
        module = StripedHyena2ForCausalLM(config)
    assert module.num_parameters() == PARAMETERS[name] == entry.num_parameters == count_by_hand(config)
    assert count_parameters(config) == PARAMETERS[name]
    assert len(module.state_dict()) + 1 == TENSORS.get(name, len(module.state_dict()) + 1)


@pytest.mark.parametrize("name", PARAMETERS)
def test_file_size_fits_the_parameter_count(name):
    entry = find_model(name)
    if name == "evo2_7b_microviridae":
        assert entry.num_bytes is None
        return
    # bfloat16, plus 8-bit metadata and whatever the files hold besides; 1B and 20B hold wider projections
    assert 2.0 <= entry.num_bytes / entry.num_parameters < 2.5


def test_registry_lists_the_official_checkpoints():
    assert {model.name for model in known_models()} == {*PARAMETERS, "genoembed-mini"}
    assert known_models()[0].name == "genoembed-mini"
    for model in known_models()[1:]:
        assert model.license == "Apache-2.0"
        assert model.repo_id is not None
        assert model.files[0].name.removesuffix(".part0") == f"{model.name}.pt"
        assert model.context == model.shape.max_position_embeddings
        assert model.shape.checkpoint_name == model.name


def test_registry_says_which_models_need_fp8():
    needing = {model.name for model in known_models() if model.needs_fp8}
    assert needing == {"evo2_1b_base", "evo2_20b", "evo2_40b", "evo2_40b_base"}
    for model in known_models()[1:]:
        assert ("much worse than published" in model.precision_note) == model.needs_fp8


def test_long_context_models_interpolate_positions():
    factors = {m.name: m.config["rotary_emb_scaling_factor"] for m in known_models() if m.config}
    assert {name: factor for name, factor in factors.items() if factor != 1.0} == {
        "evo2_7b": 128.0,
        "evo2_7b_262k": 32.0,
        "evo2_20b": 128.0,
        "evo2_40b": 128.0,
    }


def test_unknown_name_gets_near_names():
    with pytest.raises(ModelNotFoundError, match=r"model 'evo2_7B_bas' is not known .*'evo2_7b_base'"):
        find_model("evo2_7B_bas")


def test_bundled_model_has_the_default_shape_where_its_folder_is_empty(tmp_path):
    entry = registry._bundled(tmp_path)
    assert entry.num_parameters == 6_580_472
    assert (entry.config["num_hidden_layers"], entry.config["hidden_size"], entry.context) == (32, 128, 8192)
    assert entry.shape.num_attention_heads == 2
    assert find_model("genoembed-mini") == registry._bundled(BUNDLED_FOLDER)


def test_bundled_model_is_described_by_its_folder(tmp_path):
    config = StripedHyena2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=40,
        hcs_layer_idxs=[0],
        hcm_layer_idxs=[1],
        hcl_layer_idxs=[2],
        attn_layer_idxs=[3],
        hcs_filter_groups=4,
        max_position_embeddings=512,
        qkv_proj_bias=True,
        hyena_out_proj_bias=False,
    )
    config.save_pretrained(tmp_path)
    entry = registry._bundled(tmp_path)
    assert (entry.context, entry.config["num_hidden_layers"], entry.config["hidden_size"]) == (512, 4, 32)
    with torch.device("meta"):
        module = StripedHyena2ForCausalLM(StripedHyena2Config.from_dict(entry.shape.to_dict()))
    assert entry.num_parameters == module.num_parameters()
    kept = {key: value for key, value in config.to_dict().items() if key in entry.config}
    assert kept == dict(entry.config)


@pytest.mark.skipif(
    not (BUNDLED_FOLDER / "model.safetensors").is_file(), reason="the bundled weights are not in this tree"
)
def test_registry_agrees_with_the_bundled_folder():
    entry = find_model("genoembed-mini")
    stated = json.loads((BUNDLED_FOLDER / "config.json").read_text())
    assert {key: stated[key] for key in entry.config if key in stated} == {
        key: value for key, value in entry.config.items() if key in stated
    }
    assert {"num_hidden_layers", "hidden_size", "num_attention_heads"} <= stated.keys()
    assert entry.context == stated["max_position_embeddings"]
    with safe_open(BUNDLED_FOLDER / "model.safetensors", framework="pt") as stored:
        sizes = {key: stored.get_slice(key).get_shape() for key in stored.keys()}
    weights = [shape for key, shape in sizes.items() if not key.endswith("inv_freq")]
    assert entry.num_parameters == sum(torch.Size(shape).numel() for shape in weights)


def test_damaged_bundled_configuration_is_named(tmp_path):
    for content in ("{", "[]", json.dumps({"hidden_size": 0})):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ModelNotFoundError, match=r"config.json is damaged .*; install genoembed again"):
            registry._bundled(tmp_path)


def test_docs_say_which_digests_are_recorded():
    text = (Path(__file__).parents[2] / "docs" / "CLI.md").read_text().replace("\n", " ")
    stated = text.partition("SHA-256 digests are recorded for ")[2].partition(";")[0]
    recorded = {model.name for model in known_models() if any(file.sha256 for file in model.files)}
    assert set(re.findall(r"`(\w+)`", stated)) == recorded
    assert len(recorded) == 5


def test_bundled_model_states_its_vectors_and_the_weights_before():
    entry = find_model("genoembed-mini")
    assert dict(entry.vectors) == {"layers": ("28", "24", "final"), "pooling": "mean", "fusion": "concat"}
    before = "7ea4ecbd0aadca8f4f9b1937885ba3ad9e606c6c59ecd854714a75494f3b384e"
    assert entry.earlier_weights == (before,)
    assert registry.name_earlier_weights(before).startswith("genoembed-mini of version 1, whose weights")
    assert registry.name_earlier_weights("00") is None
