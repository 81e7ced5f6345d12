"""The blocks of StripedHyena 2: norms, mixer, gated MLP.

A mixer is attention with rotary positions, or Hyena: projections to two gates and a value, and the filters
between. Parameter names, shapes and stored layouts are the original's. Nothing here needs transformers, whose
blocks (:mod:`genoembed.models.striped_hyena2.modeling`) are these, with gradient checkpointing.

B sequences, L positions, T positions with those of earlier blocks, M chunks, D hidden size, I inner size,
H heads, E head size.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genoembed.models.striped_hyena2.operators import (
    FilterCache,
    causal_convolution,
    causal_fir,
    modal_convolution,
    modal_convolution_from,
    product_dtype,
)
from genoembed.models.striped_hyena2.state import AttentionState, HyenaState, last_positions

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from genoembed.config.choices import Fp8Choice
    from genoembed.models.striped_hyena2.fp8 import Fp8Form
    from genoembed.models.striped_hyena2.shape import StripedHyena2Fields
    from genoembed.models.striped_hyena2.state import BlockContext


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


class HyenaFilter(Float32Keeper):
    """Short filter on the projections, gate, inner filter, gate."""

    float32_names = ("log_poles", "residues")

    def __init__(self, config: StripedHyena2Fields, kind: str) -> None:
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
            # float32 in every model dtype, as released: an error of the logarithm grows with the steps t
            self.log_poles = nn.Parameter(torch.empty(width, config.state_size, 1, dtype=torch.float32))
            self.residues = nn.Parameter(torch.empty(width, config.state_size, dtype=torch.float32))

    def forward(self, parts_BLD: tuple[Tensor, Tensor, Tensor], starts_BM: Tensor | None = None) -> Tensor:
        """Filter projected tokens."""
        post_gate, pre_gate, value = (
            causal_fir(part, taps, starts_BM=starts_BM)
            for part, taps in zip(parts_BLD, self._short_taps(), strict=True)
        )
        # both gates come fresh from their short filters, so the products may overwrite them
        return multiply_into(post_gate, self._inner(multiply_into(pre_gate, value), starts_BM))

    def go_on(
        self, parts_BLD: tuple[Tensor, Tensor, Tensor], state: HyenaState | None
    ) -> tuple[Tensor, HyenaState]:
        """Filter the next block of a sequence."""
        before = (None, None, None) if state is None else state.short
        taps = self._short_taps()
        post_gate, pre_gate, value = (
            causal_fir(part, part_taps, history=history)
            for part, part_taps, history in zip(parts_BLD, taps, before, strict=True)
        )
        first, second, third = (
            last_positions(history, part, count=part_taps.shape[1] - 1)
            for part, part_taps, history in zip(parts_BLD, taps, before, strict=True)
        )
        gated = multiply_into(pre_gate, value)
        filtered, inner = self._inner_from(gated, None if state is None else state.inner)
        return multiply_into(post_gate, filtered), HyenaState(short=(first, second, third), inner=inner)

    def _short_taps(self) -> tuple[Tensor, Tensor, Tensor]:
        return split_projection(self.short_filter_weight[:, 0], is_interleaved=self.interleave)

    def _inner(self, u_BLD: Tensor, starts_BM: Tensor | None) -> Tensor:
        if self.kind == "hcs":
            return causal_fir(u_BLD, self.h[:, 0], starts_BM=starts_BM)
        # chunks of packed rows have the segments' length: a matrix of its own, not worth keeping
        kept = self._kept(u_BLD) if starts_BM is None else None
        if self.kind == "hcm":
            return causal_convolution(u_BLD, self.h[:, 0], self.D, starts_BM=starts_BM, kept=kept)
        poles = self.log_poles[..., 0]
        return modal_convolution(u_BLD, poles, self.residues, self.D, starts_BM=starts_BM, kept=kept)

    def _inner_from(self, u_BLD: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.kind == "hcl":
            modes = (self.log_poles[..., 0], self.residues)
            return modal_convolution_from(u_BLD, *modes, self.D, state_BDS=state, kept=self._kept(u_BLD))
        taps = self.h[:, 0]
        if self.kind == "hcs":
            filtered = causal_fir(u_BLD, taps, history=state)
        else:
            filtered = causal_convolution(u_BLD, taps, self.D, history=state, kept=self._kept(u_BLD))
        return filtered, last_positions(state, u_BLD, count=taps.shape[1] - 1)

    def _kept(self, u_BLD: Tensor) -> FilterCache | None:
        """In training a laid-out filter serves once, and elsewhere than on CPUs building it costs little."""
        return self._cache if u_BLD.device.type == "cpu" and not torch.is_grad_enabled() else None


def split_projection(weight: Tensor, *, is_interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Split what is stored for a projection of three times the width, as views."""
    # Evo 2 stores channel c of the three parts in rows 3c, 3c + 1, 3c + 2
    parts = weight.unflatten(0, (-1, 3)).unbind(1) if is_interleaved else weight.chunk(3)
    return parts[0], parts[1], parts[2]


class Projections(Float32Keeper, nn.Linear):
    """Linear to both gates and the value, whose parts can be had apart, without ever standing interleaved.

    With the scales of a checkpoint it computes in FP8, if ``fp8`` says so.
    """

    float32_names = ("fp8_scales",)
    fp8_scales: Tensor
    """What inputs and weights are multiplied with before their rounding to E4M3; float32, ``(2,)``."""

    def __init__(self, config: StripedHyena2Fields) -> None:
        super().__init__(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_proj_bias)
        self.is_interleaved = config.interleave
        self.fp8: Fp8Choice = "auto" if config.fp8_projections == "needed" else "off"
        if config.fp8_projections != "none":
            self.register_buffer("fp8_scales", torch.ones(2, dtype=torch.float32))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Project to all parts at once."""
        if self.fp8 == "off":
            return super().forward(x_BLD)
        from genoembed.models.striped_hyena2.fp8 import fp8_linear

        product_BLP = fp8_linear(x_BLD, self.weight, self.fp8_scales, is_native=self.fp8 == "auto")
        device = x_BLD.device.type
        is_cast = torch.is_autocast_enabled(device)
        return product_BLP.to(torch.get_autocast_dtype(device) if is_cast else x_BLD.dtype)

    @property
    def fp8_form(self) -> Fp8Form:
        """How the product is computed."""
        if self.fp8 == "off":
            return "off"
        from genoembed.models.striped_hyena2.fp8 import has_hopper_sums

        return "native" if self.fp8 == "auto" and has_hopper_sums(self.weight.device) else "emulated"

    @property
    def is_separable(self) -> bool:
        """Whether the parts may be had apart: nobody looks at the whole, and it is an ordinary product."""
        return self.fp8 == "off" and not is_watched(self)

    def project_parts(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to each part."""
        weights = split_projection(self.weight, is_interleaved=self.is_interleaved)
        biases = (
            (None, None, None)
            if self.bias is None
            else split_projection(self.bias, is_interleaved=self.is_interleaved)
        )
        first, second, third = (F.linear(x_BLD, w, b) for w, b in zip(weights, biases, strict=True))
        return first, second, third


def project(projections: nn.Module, x_BLD: Tensor, *, is_interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts of a projection."""
    # an adapter (another type) or a hook must see the one product it expects
    if type(projections) is Projections and projections.is_separable:
        return projections.project_parts(x_BLD)
    z_BLP = projections(x_BLD)
    parts = z_BLP.unflatten(-1, (-1, 3)).unbind(-1) if is_interleaved else z_BLP.chunk(3, dim=-1)
    return parts[0], parts[1], parts[2]


def multiply_into(owned: Tensor, other: Tensor) -> Tensor:
    """Multiply into memory that nobody else holds; into new memory while gradients are recorded.

    Example:
        >>> x = torch.tensor([2.0])
        >>> with torch.no_grad():
        ...     multiply_into(x, torch.tensor([3.0])) is x
        True
    """
    return owned * other if torch.is_grad_enabled() else owned.mul_(other)


def is_watched(module: nn.Module) -> bool:
    """Check whether what a module returns may be held by someone else than its caller."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class StreamLinear(nn.Linear):
    """Linear that writes to the residual stream; a class of its own because it starts small, by depth."""


class RMSNorm(nn.Module):
    """Divide by the root mean square (eps outside the root); each step rounds to the input dtype."""

    def __init__(self, config: StripedHyena2Fields) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.scale = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Normalize the last axis."""
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

    def __init__(self, config: StripedHyena2Fields, layer_idx: int) -> None:
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


def rotary_frequencies(head_size: int, base: float) -> Tensor:
    """Compute the rotary frequencies as released files hold them: rounded to bfloat16, ``(E / 2,)``."""
    # on the CPU in any case: on the meta device, arithmetic would import torch's compiler
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size
    return (base**-exponents).to(torch.bfloat16).float()


class RotaryEmbedding(Float32Keeper):
    """Half-split rotary positions whose frequencies come from the checkpoint.

    Released Evo 2 files hold bfloat16-rounded frequencies in a buffer; exact ones give other phases, by more
    than a turn within 10,000 positions. Where a checkpoint has none, they are rounded the same way.
    """

    inv_freq: Tensor
    float32_names = ("inv_freq",)

    def __init__(self, config: StripedHyena2Fields) -> None:
        super().__init__()
        self.factor = config.rotary_emb_scaling_factor
        self.base = config.rotary_emb_base
        head_size = config.hidden_size // config.num_attention_heads
        frequencies = torch.empty(head_size // 2, dtype=torch.float32)
        if not frequencies.is_meta:
            frequencies.copy_(rotary_frequencies(head_size, self.base))
        self.register_buffer("inv_freq", frequencies, persistent=True)

    def forward(self, x_BLHE: Tensor, position_ids_BL: Tensor) -> Tensor:
        """Rotate queries or keys to their positions."""
        # Interpolation divides the positions, not the frequencies, as in the original: these are rounded, so
        # the two would differ. Integers up to 2**24 are exact in float32; contexts reach 2**20.
        return rotate(x_BLHE, (position_ids_BL.float() / self.factor)[..., None] * self.inv_freq.float())


def rotate(x_BLHE: Tensor, angles_BLF: Tensor) -> Tensor:
    """Rotate the pairs of an input's first and second half; ``F = E / 2`` angles in float32."""
    # cos and sin are rounded to the input's dtype, as the original's tables are; the rotation is float32
    cos = angles_BLF.cos().to(x_BLHE.dtype).float()[:, :, None, :]
    sin = angles_BLF.sin().to(x_BLHE.dtype).float()[:, :, None, :]
    first, second = x_BLHE.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.to(x_BLHE.dtype)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions.

    ``Wqkv`` keeps the stored order of rows: query, key and value head by head.
    """

    def __init__(self, config: StripedHyena2Fields, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_proj_bias)
        self.out_proj = StreamLinear(config.hidden_size, config.hidden_size, bias=config.mha_out_proj_bias)
        self.rotary_emb: nn.Module = RotaryEmbedding(config)

    def split_heads(self, qkv_BLP: Tensor) -> tuple[Tensor, ...]:
        """Split a projection into query, key and value, each ``(B, L, H, E)``."""
        # (heads, 3, size), not (3, heads, size): the released files hold query, key and value head by head
        return qkv_BLP.unflatten(-1, (self.num_heads, 3, -1)).unbind(dim=3)

    def forward(self, x_BLD: Tensor, context: BlockContext) -> Tensor:
        """Attend to this and earlier positions."""
        batch, length, width = x_BLD.shape
        query, unrotated, value = self.split_heads(self.Wqkv(x_BLD))
        query = self.rotary_emb(query, context.position_ids_BL).transpose(1, 2)
        key = self.rotary_emb(unrotated, context.position_ids_BL).transpose(1, 2)
        value = value.transpose(1, 2)
        if context.segments is not None:
            # segment by segment: a block-diagonal mask of the long row would need its square
            parts = (each.split(context.segments.lengths, dim=2) for each in (query, key, value))
            mixed = torch.cat([_attend(*part) for part in zip(*parts, strict=True)], dim=2)
        else:
            if context.cache is not None:
                key, value = self._after_earlier(context, key, value, unrotated.transpose(1, 2))
            mixed = _attend(query, key, value, context.key_mask_BT)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))

    def _after_earlier(
        self, context: BlockContext, key: Tensor, value: Tensor, unrotated: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put keys and values behind those of the earlier blocks that attention still sees."""
        assert context.cache is not None
        state = context.cache.attention.setdefault(self.layer_idx, AttentionState())
        # keys are kept rotated: positions count from the window's start, so they change with it only
        if context.num_kept is None:
            return state.append(key, value)
        if state.length > context.num_kept:
            positions_1K = torch.arange(context.num_kept, device=key.device)[None]
            state.keep_last(
                context.num_kept,
                lambda kept: self.rotary_emb(kept.transpose(1, 2), positions_1K).transpose(1, 2),
            )
        return state.append(key, value, unrotated_BHLE=unrotated)


_MAX_MASK_ELEMENTS = 1 << 24
"""Queries that come after kept keys are masked at most this many elements at a time."""


def _attend(
    query_BHLE: Tensor, key_BHTE: Tensor, value_BHTE: Tensor, key_mask_BT: Tensor | None = None
) -> Tensor:
    """Causal attention of the last L of T positions; ``key_mask_BT`` is False where a key is padding."""
    length, total = query_BHLE.shape[2], key_BHTE.shape[2]
    if key_mask_BT is None and length == total:
        if _attends_by_products(query_BHLE):
            return attend_by_products(query_BHLE, key_BHTE, value_BHTE)
        return F.scaled_dot_product_attention(query_BHLE, key_BHTE, value_BHTE, is_causal=True)
    if key_mask_BT is None and length == 1:
        return F.scaled_dot_product_attention(query_BHLE, key_BHTE, value_BHTE)
    if key_mask_BT is None and query_BHLE.device.type == "cpu" and not torch.is_grad_enabled():
        return _attend_in_two(query_BHLE, key_BHTE, value_BHTE)
    step = max(1, _MAX_MASK_ELEMENTS // total)
    keys_T = torch.arange(total, device=query_BHLE.device)
    parts = []
    for first in range(0, length, step):
        queries_L1 = keys_T[total - length + first :][:step, None]
        mask = keys_T <= queries_L1
        if key_mask_BT is not None:
            # the diagonal stays, so that a padded query has something to attend to
            mask = mask & (key_mask_BT[:, None, None, :] | (keys_T == queries_L1))
        query = query_BHLE[:, :, first : first + step]
        parts.append(F.scaled_dot_product_attention(query, key_BHTE, value_BHTE, attn_mask=mask))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _attend_in_two(query_BHLE: Tensor, key_BHTE: Tensor, value_BHTE: Tensor) -> Tensor:
    """Attend to what came before a block and within it, one by one: no mask, and no product that one hides.

    On CPUs 1.5 (bfloat16) to 1.8 times (float32) as fast as with a mask.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    before = key_BHTE.shape[2] - query_BHLE.shape[2]
    past, past_BHL = attend(query_BHLE, key_BHTE[:, :, :before], value_BHTE[:, :, :before], 0.0, False)
    within, within_BHL = attend(query_BHLE, key_BHTE[:, :, before:], value_BHTE[:, :, before:], 0.0, True)
    # each was divided by the sum of its exponentials, whose logarithm comes with it: they share by these
    share_BHL1 = torch.sigmoid(past_BHL - within_BHL)[..., None]
    return torch.lerp(within.to(share_BHL1.dtype), past.to(share_BHL1.dtype), share_BHL1).to(query_BHLE.dtype)


_QUERIES = 256
"""Queries of a product of :func:`attend_by_products`: enough for full speed, few keys beyond the diagonal."""
_MAX_SCORES = 1 << 20
"""Scores of a product: they are written and read several times, so they should stay in cache."""


def _has(instructions: str) -> bool:
    return bool(getattr(torch.cpu, f"_is_{instructions}_supported", bool)())


# torch's own attention multiplies in bfloat16 with AMX only; with AVX-512 it takes as long as in float32
_LIBRARY_ATTENDS_IN_FLOAT32 = _has("avx512_bf16") and not _has("amx_tile")


def _attends_by_products(query_BHLE: Tensor) -> bool:
    """Decide by machine and dtype alone; in training the library's attention saves the scores' memory."""
    return (
        _LIBRARY_ATTENDS_IN_FLOAT32
        and query_BHLE.dtype == torch.bfloat16
        and query_BHLE.device.type == "cpu"
        and product_dtype(query_BHLE) == torch.bfloat16
        and not torch.is_grad_enabled()
        and query_BHLE.numel() > 0
    )


def attend_by_products(query_BHLE: Tensor, key_BHLE: Tensor, value_BHLE: Tensor) -> Tensor:
    """Causal attention by ordinary products, block by block of queries.

    Scores are rounded to the dtype of the input, as in attention without a fused kernel. In the bundled
    model, whose scores reach 85, vectors do not err more than with the library's attention.

    Example:
        >>> x = torch.randn(1, 2, 5, 4)
        >>> expected = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        >>> torch.allclose(attend_by_products(x, x, x), expected, atol=1e-6)
        True
    """
    batch, heads, length, size = query_BHLE.shape
    query, key, value = (each.reshape(-1, length, size) for each in (query_BHLE, key_BHLE, value_BHLE))
    mixed = torch.empty_like(value)
    is_later = torch.full((_QUERIES, _QUERIES), -torch.inf, dtype=query.dtype).triu_(1)
    rows = max(1, _MAX_SCORES // (min(_QUERIES, length) * length))
    for row, first in itertools.product(range(0, batch * heads, rows), range(0, length, _QUERIES)):
        part, last = slice(row, row + rows), min(first + _QUERIES, length)
        keys = key[part, :last].transpose(1, 2)
        # beta is 0: what is added is not read
        scores = torch.baddbmm(query.new_empty(()), query[part, first:last], keys, beta=0, alpha=size**-0.5)
        scores[:, :, first:] += is_later[: last - first, : last - first]
        mixed[part, first:last] = torch.bmm(scores.softmax(-1), value[part, :last])
    return mixed.view(batch, heads, length, size)


class PlainHyenaBlock(nn.Module):
    """Pre-norm Hyena mixer and gated MLP, each with its residual."""

    def __init__(self, config: StripedHyena2Fields, layer_idx: int) -> None:
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


class PlainAttentionBlock(nn.Module):
    """Pre-norm attention and gated MLP, each with its residual."""

    def __init__(self, config: StripedHyena2Fields, layer_idx: int) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(config)
        self.inner_mha_cls = Attention(config, layer_idx)
        self.post_norm = RMSNorm(config)
        self.mlp = GatedMLP(config, layer_idx)

    def forward(self, x_BLD: Tensor, context: BlockContext) -> Tensor:
        """Mix positions, then channels."""
        x_BLD = x_BLD + self.inner_mha_cls(self.pre_norm(x_BLD), context)
        return x_BLD + self.mlp(self.post_norm(x_BLD))
