"""The blocks of StripedHyena 2: norms, gated MLP, attention, Hyena filters.

Parameter names, shapes and stored layouts are the original's.

B sequences, L positions, D hidden size, I inner size, H heads, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from genoembed.models.striped_hyena2.filter_cache import FilterCache
from genoembed.models.striped_hyena2.operators import causal_convolution, causal_fir, modal_convolution

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
    from genoembed.models.striped_hyena2.segments import SegmentLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockContext:
    """What every block of a forward pass must know about the rows."""

    position_ids_BL: Tensor
    """Rotary positions. int64, ``(B, L)`` or ``(1, L)``."""
    key_mask_BL: Tensor | None = None
    """False where a position is padding on the left. Bool, ``(B, L)``; None where there is none."""
    segments: SegmentLayout | None = None
    """Where packed neighbours begin, if they are to be kept apart; the rows are one long row then."""


class StreamLinear(nn.Linear):
    """Linear that writes to the residual stream; told apart because it starts small, by depth."""


class Float32Keeper(nn.Module):
    """Module of which some tensors stay float32 when the model is cast to half precision."""

    float32_names: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = set()
        for name in self.float32_names:
            tensor = getattr(self, name, None)
            if tensor is not None:
                kept |= {id(tensor), id(tensor.grad)}

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_rounded = id(tensor) in kept and moved.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(moved.device) if is_rounded else moved

        return super()._apply(keep, recurse)


class RMSNorm(nn.Module):
    """Divide by the root mean square; eps is added outside the root, each step rounds to the input's dtype.

    Args:
        config: Gives ``hidden_size`` and ``rms_norm_eps``.
    """

    def __init__(self, config: StripedHyena2Config) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.scale = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Normalise the last axis.

        Args:
            x_BLD: Floating, shape ``(B, L, D)``.

        Returns:
            Shape ``(B, L, D)``, dtype of the input.
        """
        norm_BL1 = torch.linalg.vector_norm(x_BLD, dim=-1, keepdim=True)
        rms_BL1 = norm_BL1.to(x_BLD.dtype) * x_BLD.shape[-1] ** -0.5
        return x_BLD / (rms_BL1 + self.eps) * self.scale.to(x_BLD.dtype)


class GatedMLP(nn.Module):
    """``l3(act(l1 x) * l2 x)``; Evo 2 has GELU in block 0 and no activation elsewhere.

    Args:
        config: Gives the widths and the activation.
        layer_idx: Block number; decides about the activation.
    """

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
        """Apply the gated product.

        Args:
            x_BLD: Floating, shape ``(B, L, D)``.

        Returns:
            Shape ``(B, L, D)``.
        """
        gate_BLI = self.l1(x_BLD)
        if self.act is not None:
            gate_BLI = self.act(gate_BLI)
        return self.l3(gate_BLI * self.l2(x_BLD))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}


class RotaryEmbedding(Float32Keeper):
    """Half-split rotary positions whose frequencies come from the checkpoint.

    Released Evo 2 files hold bfloat16-rounded frequencies in a buffer; recomputing them gives other
    phases. The fallback, where a checkpoint has none, is rounded the same way.

    Args:
        config: Gives the head size, the base and the interpolation factor.
    """

    inv_freq: Tensor
    float32_names = ("inv_freq",)

    def __init__(self, config: StripedHyena2Config) -> None:
        super().__init__()
        self.factor = config.rotary_emb_scaling_factor
        self.base = config.rotary_emb_base
        head_size = config.hidden_size // config.num_attention_heads
        self.register_buffer("inv_freq", self.default_frequencies(head_size), persistent=True)

    def default_frequencies(self, head_size: int) -> Tensor:
        """Frequencies for a model without a checkpoint.

        Args:
            head_size: Channels of a head; even.

        Returns:
            float32, shape ``(head_size / 2,)``, values representable in bfloat16.
        """
        exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
        return (self.base**-exponents).to(torch.bfloat16).float()

    def forward(self, x_BLHE: Tensor, position_ids_BL: Tensor) -> Tensor:
        """Rotate queries or keys to their positions.

        Args:
            x_BLHE: Floating, shape ``(B, L, H, E)``.
            position_ids_BL: int64, shape ``(B, L)`` or ``(1, L)``.

        Returns:
            Shape ``(B, L, H, E)``, dtype of the input; rotated in float32, rounded once.
        """
        angles_BLF = (position_ids_BL.float() / self.factor)[..., None] * self.inv_freq.float()
        cos = angles_BLF.cos().to(x_BLHE.dtype).float()[:, :, None, :]
        sin = angles_BLF.sin().to(x_BLHE.dtype).float()[:, :, None, :]
        first, second = x_BLHE.float().chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
        return rotated.to(x_BLHE.dtype)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions.

    ``Wqkv`` keeps the stored order of rows: query, key and value head by head.

    Args:
        config: Gives the widths, heads and biases.
    """

    def __init__(self, config: StripedHyena2Config) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_proj_bias)
        self.out_proj = StreamLinear(config.hidden_size, config.hidden_size, bias=config.mha_out_proj_bias)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(self, x_BLD: Tensor, context: BlockContext) -> Tensor:
        """Attend to this and earlier positions.

        Args:
            x_BLD: Floating, shape ``(B, L, D)``.
            context: Positions, padding and segments.

        Returns:
            Shape ``(B, L, D)``.
        """
        batch, length, width = x_BLD.shape
        qkv = self.Wqkv(x_BLD).view(batch, length, self.num_heads, 3, width // self.num_heads)
        query, key, value = qkv.unbind(dim=3)
        query = self.rotary_emb(query, context.position_ids_BL).transpose(1, 2)
        key = self.rotary_emb(key, context.position_ids_BL).transpose(1, 2)
        value = value.transpose(1, 2)
        if context.segments is not None:
            parts = (each.split(context.segments.lengths, dim=2) for each in (query, key, value))
            mixed = torch.cat([_attend(*part) for part in zip(*parts, strict=True)], dim=2)
        else:
            mixed = _attend(query, key, value, context.key_mask_BL)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))


def _attend(
    query_BHLE: Tensor, key_BHLE: Tensor, value_BHLE: Tensor, key_mask_BL: Tensor | None = None
) -> Tensor:
    """Causal attention within a row; ``key_mask_BL`` is False where a key is padding."""
    attention_mask = None
    if key_mask_BL is not None:
        length = query_BHLE.shape[2]
        square = torch.ones(length, length, dtype=torch.bool, device=query_BHLE.device)
        # the diagonal stays, so that a padded query has something to attend to
        itself = torch.eye(length, dtype=torch.bool, device=query_BHLE.device)
        attention_mask = square.tril() & (key_mask_BL[:, None, None, :] | itself)
    return F.scaled_dot_product_attention(
        query_BHLE, key_BHLE, value_BHLE, attn_mask=attention_mask, is_causal=attention_mask is None
    )


class HyenaFilter(Float32Keeper):
    """Short filter on the projections, gate, inner filter, gate.

    Args:
        config: Gives the widths, lengths and groups.
        kind: Which inner filter: ``hcs`` (correlation), ``hcm`` (convolution, skip) or ``hcl`` (modal, skip).
    """

    float32_names = ("log_poles", "residues")

    def __init__(self, config: StripedHyena2Config, kind: str) -> None:
        super().__init__()
        width = config.hidden_size
        self.kind = kind
        self.interleave = config.interleave
        self._cache = FilterCache()
        self.short_filter_weight = nn.Parameter(torch.empty(3 * width, 1, config.short_filter_length))
        if kind == "hcs":
            self.h = nn.Parameter(torch.empty(config.hcs_filter_groups, 1, config.hcs_filter_length))
            return
        self.D = nn.Parameter(torch.empty(width))
        if kind == "hcm":
            self.h = nn.Parameter(torch.empty(config.hcm_filter_groups, 1, config.hcm_filter_length))
        else:
            self.log_poles = nn.Parameter(torch.empty(width, config.state_size, 1, dtype=torch.float32))
            self.residues = nn.Parameter(torch.empty(width, config.state_size, dtype=torch.float32))

    def forward(self, parts_BLD: tuple[Tensor, Tensor, Tensor], starts_BM: Tensor | None = None) -> Tensor:
        """Filter projected tokens.

        Args:
            parts_BLD: Gate after the inner filter, gate before it, and value. Floating, each ``(B, L, D)``.
            starts_BM: True where a chunk starts a segment. Bool, shape ``(B, M)``.

        Returns:
            Shape ``(B, L, D)``, dtype of the input.
        """
        taps = split_rows(self.short_filter_weight[:, 0], is_interleaved=self.interleave)
        post_gate, pre_gate, value = (
            causal_fir(part, part_taps, starts_BM=starts_BM)
            for part, part_taps in zip(parts_BLD, taps, strict=True)
        )
        return post_gate * self._inner(pre_gate * value, starts_BM)

    def _inner(self, u_BLD: Tensor, starts_BM: Tensor | None) -> Tensor:
        if self.kind == "hcs":
            return causal_fir(u_BLD, self.h[:, 0], starts_BM=starts_BM)
        # in training a laid-out filter serves once, and elsewhere building it costs little
        is_kept = starts_BM is None and not torch.is_grad_enabled() and u_BLD.device.type == "cpu"
        kept = self._cache if is_kept else None
        if self.kind == "hcm":
            return causal_convolution(u_BLD, self.h[:, 0], self.D, starts_BM=starts_BM, kept=kept)
        poles = self.log_poles[..., 0]
        return modal_convolution(u_BLD, poles, self.residues, self.D, starts_BM=starts_BM, kept=kept)


def split_rows(weight: Tensor, *, is_interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Give the three parts of what is stored for a projection of three times the width, as views.

    Args:
        weight: Stored rows. Shape ``(3 D, ...)``.
        is_interleaved: Whether row ``3 d + p`` belongs to part p, or row ``p D + d``.

    Returns:
        Rows of the gate after the inner filter, of the gate before it, of the value; each ``(D, ...)``.
    """
    parts = weight.unflatten(0, (-1, 3)).unbind(1) if is_interleaved else weight.chunk(3)
    return parts[0], parts[1], parts[2]


class Projections(nn.Linear):
    """Linear to both gates and the value, whose parts can be had apart, without ever standing interleaved.

    Args:
        config: Gives the width, the bias and the order of rows.
    """

    def __init__(self, config: StripedHyena2Config) -> None:
        super().__init__(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_proj_bias)
        self.is_interleaved = config.interleave

    def project_parts(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to each part.

        Args:
            x_BLD: Floating, shape ``(B, L, D)``.

        Returns:
            Gate after the inner filter, gate before it, value; each ``(B, L, D)``.
        """
        weights = split_rows(self.weight, is_interleaved=self.is_interleaved)
        biases = (
            (None, None, None)
            if self.bias is None
            else split_rows(self.bias, is_interleaved=self.is_interleaved)
        )
        first, second, third = (F.linear(x_BLD, w, b) for w, b in zip(weights, biases, strict=True))
        return first, second, third


def _project(projections: nn.Module, x_BLD: Tensor, *, is_interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of the projection; a module that is watched, wrapped or replaced is called as a whole."""
    is_plain = type(projections) is Projections and not (
        projections._forward_hooks or projections._forward_pre_hooks or "forward" in vars(projections)
    )
    if is_plain:
        return cast("Projections", projections).project_parts(x_BLD)
    z_BLP = projections(x_BLD)
    parts = z_BLP.unflatten(-1, (-1, 3)).unbind(-1) if is_interleaved else z_BLP.chunk(3, dim=-1)
    return parts[0], parts[1], parts[2]


class OutFilterDense(StreamLinear):
    """Linear whose product is rounded before the bias is added.

    The original multiplies a transposed view here, which PyTorch does not fuse with the bias. In bfloat16 a
    fused bias changes about 40 % of the block's output values, in float32 only the last bit.
    """

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Multiply, round, add.

        Args:
            x_BLD: Floating, shape ``(B, L, D)``.

        Returns:
            Shape ``(B, L, D)``.
        """
        product_BLD = F.linear(x_BLD, self.weight)
        return product_BLD if self.bias is None else product_BLD + self.bias.to(product_BLD.dtype)


class HyenaBlock(GradientCheckpointingLayer):
    """Pre-norm Hyena mixer and gated MLP, each with its residual.

    Args:
        config: Shape of the model.
        layer_idx: Block number.
    """

    def __init__(self, config: StripedHyena2Config, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.pre_norm = RMSNorm(config)
        self.projections: nn.Module = Projections(config)
        self.filter = HyenaFilter(config, config.block_kind(layer_idx))
        self.out_filter_dense = OutFilterDense(width, width, bias=config.hyena_out_proj_bias)
        self.post_norm = RMSNorm(config)
        self.mlp = GatedMLP(config, layer_idx)

    def forward(self, x_BLD: Tensor, context: BlockContext) -> Tensor:
        """Mix positions, then channels.

        Args:
            x_BLD: Residual stream. Floating, shape ``(B, L, D)``.
            context: Positions, padding and segments.

        Returns:
            Residual stream, shape ``(B, L, D)``.
        """
        parts_BLD = _project(self.projections, self.pre_norm(x_BLD), is_interleaved=self.filter.interleave)
        if context.key_mask_BL is not None:
            # filters have no bias: a zero that goes in adds nothing anywhere
            is_padding = ~context.key_mask_BL[..., None]
            first, second, third = (part.masked_fill(is_padding, 0) for part in parts_BLD)
            parts_BLD = first, second, third
        starts_BM = None if context.segments is None else context.segments.starts_1M
        x_BLD = x_BLD + self.out_filter_dense(self.filter(parts_BLD, starts_BM))
        return x_BLD + self.mlp(self.post_norm(x_BLD))


class AttentionBlock(GradientCheckpointingLayer):
    """Pre-norm attention and gated MLP, each with its residual.

    Args:
        config: Shape of the model.
        layer_idx: Block number.
    """

    def __init__(self, config: StripedHyena2Config, layer_idx: int) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(config)
        self.inner_mha_cls = Attention(config)
        self.post_norm = RMSNorm(config)
        self.mlp = GatedMLP(config, layer_idx)

    def forward(self, x_BLD: Tensor, context: BlockContext) -> Tensor:
        """Mix positions, then channels.

        Args:
            x_BLD: Residual stream. Floating, shape ``(B, L, D)``.
            context: Positions, padding and segments.

        Returns:
            Residual stream, shape ``(B, L, D)``.
        """
        x_BLD = x_BLD + self.inner_mha_cls(self.pre_norm(x_BLD), context)
        return x_BLD + self.mlp(self.post_norm(x_BLD))
