"""The blocks of StripedHyena 2: norms, mixer, gated MLP.

Parameter names, shapes and stored layouts are the original's.

B sequences, L positions, D hidden size, I inner size, H heads, E head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from genoembed.models.striped_hyena2.attention import Attention
from genoembed.models.striped_hyena2.hyena import HyenaFilter, Projections, project
from genoembed.models.striped_hyena2.modules import StreamLinear, is_watched, multiply_into

if TYPE_CHECKING:
    from collections.abc import Callable

    from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
    from genoembed.models.striped_hyena2.state import BlockContext


class RMSNorm(nn.Module):
    """Divide by the root mean square (eps outside the root); each step rounds to the input dtype."""

    def __init__(self, config: StripedHyena2Config) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.scale = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Normalise the last axis."""
        # ||x|| / sqrt(D) + eps, not sqrt(mean(x^2) + eps) as in Llama: other values where x is small. In half
        # precision norm, root mean square, quotient and product are rounded one by one, as in the original.
        norm_BL1 = torch.linalg.vector_norm(x_BLD, dim=-1, keepdim=True)
        rms_BL1 = norm_BL1.to(x_BLD.dtype) * x_BLD.shape[-1] ** -0.5
        normed_BLD = multiply_into(x_BLD / (rms_BL1 + self.eps), self.scale.to(x_BLD.dtype))
        # the float32 residual stream would make the next Linear cast it again, for each of its uses
        if torch.is_autocast_enabled(x_BLD.device.type):
            normed_BLD = normed_BLD.to(torch.get_autocast_dtype(x_BLD.device.type))
        return normed_BLD


class GatedMLP(nn.Module):
    """``l3(act(l1 x) * l2 x)``; Evo 2 has GELU in block 0 and no activation elsewhere."""

    def __init__(self, config: StripedHyena2Config, layer_idx: int) -> None:
        super().__init__()
        self.l1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.l2 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.l3 = StreamLinear(config.intermediate_size, config.hidden_size, bias=False)
        is_linear = config.evo2_style_activations and layer_idx > 0
        self.act: Callable[[Tensor], Tensor] | None = (
            None if is_linear else _ACTIVATIONS[config.mlp_activation]
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Apply the gated product."""
        gate_BLI = self.l1(x_BLD)
        if self.act is not None:
            gate_BLI = self.act(gate_BLI)
        # l1's output is ours to overwrite, unless a hook (a captured layer) holds it
        is_owned = self.act is not None or not is_watched(self.l1)
        return self.l3((multiply_into if is_owned else torch.mul)(gate_BLI, self.l2(x_BLD)))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}


class OutFilterDense(StreamLinear):
    """Linear whose product is rounded before the bias is added.

    The original multiplies a transposed view here, which PyTorch does not fuse with the bias. In bfloat16 a
    fused bias changes about 40 % of the block's output values, in float32 only the last bit.
    """

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Multiply, round, add."""
        product_BLD = F.linear(x_BLD, self.weight)
        return product_BLD if self.bias is None else product_BLD.add_(self.bias.to(product_BLD.dtype))


class HyenaBlock(GradientCheckpointingLayer):
    """Pre-norm Hyena mixer and gated MLP, each with its residual."""

    def __init__(self, config: StripedHyena2Config, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_idx = layer_idx
        self.pre_norm = RMSNorm(config)
        self.projections: nn.Module = Projections(config)
        self.filter = HyenaFilter(config, config.block_kind(layer_idx))
        self.out_filter_dense = OutFilterDense(width, width, bias=config.hyena_out_proj_bias)
        self.post_norm = RMSNorm(config)
        self.mlp = GatedMLP(config, layer_idx)

    def forward(self, x_BLD: Tensor, context: BlockContext) -> Tensor:
        """Mix positions, then channels."""
        parts_BLD = project(self.projections, self.pre_norm(x_BLD), is_interleaved=self.filter.interleave)
        if context.key_mask_BT is not None:
            # filters have no bias: a zero that goes in adds nothing anywhere
            is_padding = ~context.key_mask_BT[:, -x_BLD.shape[1] :, None]
            first, second, third = (part.masked_fill(is_padding, 0) for part in parts_BLD)
            parts_BLD = first, second, third
        # two sums, never in place: the stream is what hooks and `hidden_states` hold
        x_BLD = x_BLD + self.out_filter_dense(self._filter(parts_BLD, context))
        return x_BLD + self.mlp(self.post_norm(x_BLD))

    def _filter(self, parts_BLD: tuple[Tensor, Tensor, Tensor], context: BlockContext) -> Tensor:
        if context.cache is None:
            starts_BM = None if context.segments is None else context.segments.starts_1M
            filtered: Tensor = self.filter(parts_BLD, starts_BM)
            return filtered
        states = context.cache.hyena
        filtered, states[self.layer_idx] = self.filter.go_on(parts_BLD, states.get(self.layer_idx))
        return filtered


class AttentionBlock(GradientCheckpointingLayer):
    """Pre-norm attention and gated MLP, each with its residual."""

    def __init__(self, config: StripedHyena2Config, layer_idx: int) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(config)
        self.inner_mha_cls = Attention(config, layer_idx)
        self.post_norm = RMSNorm(config)
        self.mlp = GatedMLP(config, layer_idx)

    def forward(self, x_BLD: Tensor, context: BlockContext) -> Tensor:
        """Mix positions, then channels."""
        x_BLD = x_BLD + self.inner_mha_cls(self.pre_norm(x_BLD), context)
        return x_BLD + self.mlp(self.post_norm(x_BLD))
