"""Run the reference implementation (package ``vtx``) on a CPU: for the live comparison and the benchmarks.

It needs three stand-ins for parts that want CUDA, opens a log file in the current folder and takes over the
root logger: use it in a process of its own, in a folder that may be littered.
"""

from __future__ import annotations

import importlib.util
import sys
from contextlib import nullcontext
from types import ModuleType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

HAS_VTX = all(importlib.util.find_spec(name) for name in ("vortex", "einops", "tqdm"))
EXACT = ("log_poles", "residues", "inv_freq")
"""Tensors that stay float32 in every precision."""
CONSTANTS: dict[str, object] = {
    "vocab_size": 512,
    "short_filter_length": 3,
    "hcm_filter_length": 128,
    "eps": 1e-6,
    "evo2_style_activations": True,
    "hyena_out_proj_bias": True,
    "mha_out_proj_bias": True,
    "qkv_proj_bias": False,
    "interleave": True,
    "column_split": True,
    "column_split_hyena": False,
    "tie_embeddings": True,
    "final_norm": True,
    "proj_groups": 1,
    "short_filter_bias": False,
    "mlp_activation": "gelu",
    "use_flash_attn": False,
    "use_flashfft": False,
    "use_fp8_input_projections": False,
    "inner_size_multiple_of": 1,
    "model_parallel_size": 1,
    "make_vocab_size_divisible_by": 8,
    "hyena_filter_groups": 1,
    "mlp_init_method": "torch.nn.init.zeros_",
    "mlp_output_init_method": "torch.nn.init.zeros_",
    "inference_mode": True,
    "prefill_style": "fft",
}
"""What all models of the comparison share, in the reference's own keys."""


def stirred_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a new model's weights for both implementations; everything that starts at a constant is moved.

    Args:
        model: One of ours, in float32.

    Returns:
        float32 tensors by their stored names, representable in bfloat16 except those of ``EXACT``.
    """
    weights = {
        key: value if key.endswith(EXACT) else _stirred(key, value).bfloat16().float()
        for key, value in model.state_dict().items()
    }
    weights["unembed.weight"] = weights["embedding_layer.weight"].clone()
    return weights


def _stirred(key: str, value: Tensor) -> Tensor:
    """Move a tensor, and make the embedding large enough to matter."""
    scale = 0.5 if "embedding" in key else 0.1
    return value + scale * torch.randn_like(value) * (1.0 if value.dim() < 2 or "embedding" in key else 0.1)


def build_reference(description: Mapping[str, object], weights: dict[str, Tensor]) -> nn.Module:
    """Build the reference model.

    Args:
        description: Its configuration, in its own keys.
        weights: float32 tensors by name.

    Returns:
        The model in float32 and eval mode; ``model(input_ids)[0]`` are the logits.
    """
    _install_stand_ins()
    from vortex.model.model import StripedHyena
    from vortex.model.utils import dotdict

    model = StripedHyena(dotdict(dict(description))).float().eval()
    model.custom_load_state_dict(weights, strict=False)
    return model


def cast_reference(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a reference model as it is run: everything but poles, residues and rotary frequencies.

    Args:
        model: Of ``build_reference``; changed in place.
        dtype: The new type.

    Returns:
        The same model.
    """
    for key, parameter in model.named_parameters():
        if not key.endswith(EXACT):
            parameter.data = parameter.data.to(dtype)
    return model


def _install_stand_ins() -> None:
    """Replace rotary embedding by Triton with plain PyTorch, and CUDA's context with nothing."""

    def apply_rotary(x, cos, sin, *, seqlen_offsets=0, inplace=False, **_):
        length = x.shape[1]
        cos, sin = (table[seqlen_offsets : seqlen_offsets + length, None].float() for table in (cos, sin))
        first, second = x.float().chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)
        return x.copy_(turned) if inplace else turned

    for name in ("vortex.ops", "vortex.ops.embedding", "vortex.ops.embedding.rotary"):
        sys.modules[name] = ModuleType(name)
    sys.modules["vortex.ops.embedding.rotary"].apply_rotary = apply_rotary
    torch.cuda.device = lambda _device: nullcontext()
