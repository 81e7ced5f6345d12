"""Starting weights of StripedHyena 2, for training from scratch.

transformers' own initialisers leave alone what a checkpoint has filled already.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import initialization as init

from genoembed.models.striped_hyena2.attention import RotaryEmbedding
from genoembed.models.striped_hyena2.blocks import RMSNorm
from genoembed.models.striped_hyena2.hyena import HyenaFilter
from genoembed.models.striped_hyena2.layers import StreamLinear

if TYPE_CHECKING:
    from torch import Tensor

    from genoembed.models.striped_hyena2.configuration import StripedHyena2Config


@torch.no_grad()
def initialize_module(module: nn.Module, config: StripedHyena2Config) -> None:
    """Give the tensors that a module holds itself their starting values.

    What writes to the residual stream starts smaller, by the square root of twice the depth.
    """
    if isinstance(module, nn.Linear):
        depth = 2 * config.num_hidden_layers if isinstance(module, StreamLinear) else 1
        init.normal_(module.weight, std=(depth * module.in_features) ** -0.5)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=config.initializer_range)
    elif isinstance(module, RMSNorm):
        init.ones_(module.scale)
    elif isinstance(module, HyenaFilter):
        _initialize_filter(module)
    elif isinstance(module, RotaryEmbedding):
        init.copy_(module.inv_freq, module.default_frequencies(2 * module.inv_freq.shape[0]))


def _initialize_filter(module: HyenaFilter) -> None:
    """Initialise as Evo 2's training did: decaying modes, small residues; short filters near the identity."""
    init.copy_(module.short_filter_weight, _near_identity(module.short_filter_weight))
    if module.kind == "hcs":
        init.copy_(module.h, _near_identity(module.h))
        return
    init.ones_(module.D)
    if module.kind == "hcl":
        # log_poles = -exp(p) exp(gamma), p = -1, exp(gamma) uniform in (0.01, 0.1)
        init.uniform_(module.log_poles, -math.exp(-1) * 0.1, -math.exp(-1) * 0.01)
        init.normal_(module.residues, std=0.1 * module.residues.shape[1] ** -0.5)
        return
    groups, _, num_taps = module.h.shape
    # each group forgets at its own rate, from 4 taps to the whole filter
    rates = torch.logspace(math.log10(4), math.log10(num_taps), groups, device=module.h.device)
    fading = torch.exp(-torch.arange(num_taps, device=module.h.device) / rates[:, None])
    init.copy_(module.h, 0.2 * torch.randn_like(module.h) * fading[:, None, :])


def _near_identity(taps: Tensor) -> Tensor:
    """Random taps, the last one (the current position) about one."""
    values = 0.2 * torch.randn_like(taps)
    values[..., -1] += 1.0
    return values
