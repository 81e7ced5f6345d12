"""Read the YAML that describes a StripedHyena 2 checkpoint in its original format.

In: a YAML file. Out: a ``StripedHyena2Config``. Strict: a key that is not known, or that asks for a variant
which no released model uses, is refused; keys that never had an effect on the numbers are accepted.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub.errors import StrictDataclassError

from genoembed.errors import ConfigError, InputFileError
from genoembed.models.striped_hyena2.configuration import StripedHyena2Config

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_RENAMED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "inner_mlp_size": "intermediate_size",
    "attn_layer_idxs": "attn_layer_idxs",
    "hcl_layer_idxs": "hcl_layer_idxs",
    "hcm_layer_idxs": "hcm_layer_idxs",
    "hcs_layer_idxs": "hcs_layer_idxs",
    "short_filter_length": "short_filter_length",
    "hcs_filter_length": "hcs_filter_length",
    "hcm_filter_length": "hcm_filter_length",
    "hcs_filter_groups": "hcs_filter_groups",
    "hcm_filter_groups": "hcm_filter_groups",
    "state_size": "state_size",
    "eps": "rms_norm_eps",
    "rotary_emb_base": "rotary_emb_base",
    "max_seqlen": "max_position_embeddings",
    "interleave": "interleave",
    "evo2_style_activations": "evo2_style_activations",
    "mlp_activation": "mlp_activation",
    "qkv_proj_bias": "qkv_proj_bias",
    "mha_out_proj_bias": "mha_out_proj_bias",
    "hyena_out_proj_bias": "hyena_out_proj_bias",
}
# what a text or a list in the place of a number leads to
_NONSENSE = (
    ValueError,
    TypeError,
    ArithmeticError,
    AttributeError,
    KeyError,
    IndexError,
    StrictDataclassError,
)
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "attn_layer_idxs",
    "hcl_layer_idxs",
    "hcm_layer_idxs",
    "hcs_layer_idxs",
    "hcs_filter_groups",
    "hcm_filter_groups",
    "state_size",
    "max_seqlen",
)
_FIXED: dict[str, Any] = {
    "column_split": True,
    "column_split_hyena": False,
    "hyena_flip_x1x2": False,
    "proj_groups": 1,
    "final_norm": True,
    "tie_embeddings": True,
    "short_filter_bias": False,
    "tokenizer_type": "CharLevelTokenizer",
}
_DERIVED = (
    "rotary_emb_scaling_factor",
    "use_interpolated_rotary_pos_emb",
    "inner_size_multiple_of",
    "model_parallel_size",
)
_WITHOUT_EFFECT = frozenset(
    (
        "model_name",
        "num_filters",
        "hcl_filter_groups",
        "hyena_filter_groups",
        "mlp_init_method",
        "mlp_output_init_method",
        "make_vocab_size_divisible_by",
        "log_intermediate_values",
        "pipe_parallel_size",
        "max_batch_size",
        "use_flash_attn",
        "use_flash_rmsnorm",
        "use_flash_depthwise",
        "use_flashfft",
        "use_laughing_hyena",
        "use_fp8_input_projections",
        "use_hcs_kernel",
        "use_hcm_kernel",
        "use_hcl_kernel",
        "inference_mode",
        "prefill_style",
        "print_activations",
    )
)


def read_vortex_config(path: Path) -> StripedHyena2Config:
    """Read a model description."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"cannot be read ({error.strerror}); check the path of config"
        raise InputFileError(message, path=str(path)) from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        message = f"{path}: is not YAML ({type(error).__name__}), expected one mapping; check config"
        raise ConfigError(message) from error
    if not isinstance(content, dict):
        message = f"{path}: holds a {type(content).__name__}, expected one mapping; check config"
        raise ConfigError(message)
    problems = [*_unknown_keys(content), *_missing_keys(content), *_contradictions(content)]
    if problems:
        raise ConfigError(*(f"{path}: {problem}" for problem in problems))
    try:
        return StripedHyena2Config(**vortex_arguments(content))
    except ConfigError:
        raise
    except _NONSENSE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        message = f"{path}: a value is of another kind than its key needs ({reason}); check config"
        raise ConfigError(message) from error


def vortex_arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a checked description into arguments of ``StripedHyena2Config``.

    Example:
        >>> vortex_arguments({"hidden_size": 48, "eps": "1e-6"})["intermediate_size"]
        128
    """
    arguments = {_RENAMED[key]: value for key, value in content.items() if key in _RENAMED}
    if "rms_norm_eps" in arguments:
        arguments["rms_norm_eps"] = float(arguments["rms_norm_eps"])  # YAML 1.1 reads 1e-6 as text
    if "rotary_emb_base" in arguments:
        arguments["rotary_emb_base"] = float(arguments["rotary_emb_base"])
    if content.get("use_interpolated_rotary_pos_emb"):
        arguments["rotary_emb_scaling_factor"] = float(content["rotary_emb_scaling_factor"])
    if arguments.get("intermediate_size") is None:
        multiple = content.get("inner_size_multiple_of", 64) * content.get("model_parallel_size", 1)
        inner = int(2 * content["hidden_size"] * 4 / 3)
        arguments["intermediate_size"] = -(-inner // multiple) * multiple
    return arguments


def _unknown_keys(content: Mapping[str, Any]) -> list[str]:
    known = [*_RENAMED, *_FIXED, *_DERIVED, *sorted(_WITHOUT_EFFECT)]
    problems = []
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it"
            problems.append(f"key {key!r} is not known; {hint}")
    return problems


def _missing_keys(content: Mapping[str, Any]) -> list[str]:
    return [f"key {key!r} is missing; add it" for key in _REQUIRED if key not in content]


def _contradictions(content: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{key} is {content[key]!r}, expected {value!r} in every StripedHyena 2 model; check config"
        for key, value in _FIXED.items()
        if content.get(key, value) != value
    ]
    if content.get("use_interpolated_rotary_pos_emb") and "rotary_emb_scaling_factor" not in content:
        problems.append(
            "use_interpolated_rotary_pos_emb is set without rotary_emb_scaling_factor; add the factor"
        )
    return problems
