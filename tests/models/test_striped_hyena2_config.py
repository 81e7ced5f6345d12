"""StripedHyena2Config: every refusal, and what it keeps through files."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from genoembed import StripedHyena2Config
from genoembed.errors import ConfigError
from genoembed.models.striped_hyena2.shape import EVO2_7B_PATTERN
from tests.models.test_striped_hyena2_model import tiny_config

REFUSED = [
    ({"hcs_layer_idxs": []}, r"must name each of the 5 blocks .* exactly once; they name \[0, 1, 2, 4\]"),
    ({"hcs_layer_idxs": [3, 4]}, r"exactly once; they name \[0, 1, 2, 3, 4, 4\]"),
    ({"hcs_layer_idxs": [5]}, r"exactly once; they name \[0, 1, 2, 4, 5\]"),
    ({"hcs_layer_idxs": [-2]}, r"exactly once; they name \[-2, 0, 1, 2, 4\]"),
    ({"num_hidden_layers": 6}, r"each of the 6 blocks \(num_hidden_layers\)"),
    (
        {"hyena_layer_idxs": [3]},
        "hyena_layer_idxs is not a kind of block; use attn_, hcl_, hcm_ or hcs_layer_idxs",
    ),
    ({"num_attention_heads": 3}, "hidden_size 32 is not an even multiple of num_attention_heads 3"),
    ({"num_attention_heads": 32}, "hidden_size 32 is not an even multiple of num_attention_heads 32"),
    ({"hcs_filter_groups": 5}, "hidden_size 32 is not a multiple of hcs_filter_groups 5"),
    ({"hcm_filter_groups": 64}, "hidden_size 32 is not a multiple of hcm_filter_groups 64"),
    ({"hcs_filter_length": 128}, "hcs_filter_length must be below 128 and hcm_filter_length 128 or more"),
    ({"hcm_filter_length": 127}, "hcs_filter_length must be below 128 and hcm_filter_length 128 or more"),
    ({"mlp_activation": "relu"}, "mlp_activation is 'relu'; it must be 'gelu' or 'silu'"),
    ({"short_filter_bias": True}, "short_filter_bias must be False"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', expected a number from 0 on"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a number from 0 on"),
    ({"rotary_emb_base": "10000"}, "rotary_emb_base is '10000', expected a number above 0"),
    ({"state_size": 4.5}, "state_size is 4.5, expected a whole number above 0"),
    ({"hcm_filter_length": "128"}, "hcm_filter_length is '128', expected a whole number above 0"),
    ({"interleave": "false"}, "interleave is 'false', expected true or false"),
    ({"attn_layer_idxs": "2"}, "attn_layer_idxs is '2', expected a list of block numbers"),
    ({"attn_layer_idxs": ["2"]}, r"attn_layer_idxs is \['2'\], expected a list of block numbers"),
    *(
        ({name: 0}, f"{name} is 0, expected a ")
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "short_filter_length",
            "hcs_filter_length",
            "hcs_filter_groups",
            "hcm_filter_groups",
            "state_size",
            "rotary_emb_base",
            "rotary_emb_scaling_factor",
            "max_position_embeddings",
        )
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_config_refuses_what_is_no_model(changes, message) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        tiny_config(**changes)
    assert len(caught.value.problems) == 1


def test_config_reports_all_problems_at_once() -> None:
    with pytest.raises(ConfigError, match="relu") as caught:
        tiny_config(mlp_activation="relu", hcs_filter_groups=5, num_hidden_layers=9, odd_layer_idxs=[])
    assert len(caught.value.problems) == 4


def test_config_without_lists_has_the_pattern_of_evo2_7b() -> None:
    config = StripedHyena2Config()
    assert config.num_hidden_layers == 32
    assert {name: getattr(config, name) for name in EVO2_7B_PATTERN} == EVO2_7B_PATTERN
    assert [config.block_kind(index) for index in (0, 1, 2, 3, 31)] == [
        "hcs",
        "hcm",
        "hcl",
        "attention",
        "attention",
    ]
    with pytest.raises(ConfigError, match="block 32 is in none of attn_, hcl_, hcm_ and hcs_layer_idxs"):
        config.block_kind(32)


def test_config_given_one_list_takes_no_other_from_the_default() -> None:
    with pytest.raises(ConfigError, match=r"each of the 32 blocks .* they name \[0, 1\]"):
        StripedHyena2Config(hcs_layer_idxs=[0, 1])
    only_short = StripedHyena2Config(num_hidden_layers=2, hcs_layer_idxs=(0, 1))
    assert only_short.hcs_layer_idxs == [0, 1]
    assert only_short.attn_layer_idxs == []


def test_config_does_not_share_its_lists() -> None:
    first = StripedHyena2Config()
    first.attn_layer_idxs.append(99)
    assert StripedHyena2Config().attn_layer_idxs == [3, 10, 17, 24, 31]
    assert EVO2_7B_PATTERN["attn_layer_idxs"] == [3, 10, 17, 24, 31]


@pytest.mark.parametrize(
    "config",
    [
        StripedHyena2Config(),
        tiny_config(
            rms_norm_eps=1e-5,
            rotary_emb_scaling_factor=128.0,
            interleave=False,
            mlp_activation="silu",
            dtype="bfloat16",
        ),
    ],
    ids=["default", "tiny"],
)
def test_config_survives_json_and_folders(config, tmp_path) -> None:
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "striped_hyena2"
    for again in (
        StripedHyena2Config(**json.loads(config.to_json_string(use_diff=False))),
        StripedHyena2Config.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
    ):
        assert type(again) is StripedHyena2Config
        ours, theirs = config.to_dict(), again.to_dict()
        assert {key: theirs[key] for key in ours if key != "_name_or_path"} == {
            key: value for key, value in ours.items() if key != "_name_or_path"
        }


def test_config_knows_the_tokenizer_and_the_tie() -> None:
    config = StripedHyena2Config()
    assert (config.eos_token_id, config.pad_token_id, config.tie_word_embeddings) == (0, 1, True)
    assert StripedHyena2Config(pad_token_id=0).pad_token_id == 0
