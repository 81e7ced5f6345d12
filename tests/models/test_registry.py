"""The registry against the configurations: names, sizes and parameter counts."""

from __future__ import annotations

import pytest
import torch

from genoembed.errors import ModelNotFoundError
from genoembed.models.registry import find_model, known_models, suggestion
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
    config = entry.build_config()
    with torch.device("meta"):
        module = StripedHyena2ForCausalLM(config)
    assert module.num_parameters() == PARAMETERS[name] == entry.num_parameters == count_by_hand(config)
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
        assert model.context == model.build_config().max_position_embeddings
        assert model.build_config().checkpoint_name == model.name


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
    assert suggestion("xyz").startswith("use a local folder, a Hugging Face id, or one of genoembed-mini")
