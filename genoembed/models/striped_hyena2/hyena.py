"""The mixer of StripedHyena 2's Hyena blocks: projections to two gates and a value, and the filters between.

Parameter names, shapes and stored layouts are the original's.

B sequences, L positions, M chunks, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genoembed.models.striped_hyena2.filters import FilterCache
from genoembed.models.striped_hyena2.operators import (
    causal_convolution,
    causal_fir,
    modal_convolution,
    modal_convolution_from,
)
from genoembed.models.striped_hyena2.state import HyenaState, last_positions

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from genoembed.models.striped_hyena2.configuration import StripedHyena2Config


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


class Projections(nn.Linear):
    """Linear to both gates and the value, whose parts can be had apart, without ever standing interleaved."""

    def __init__(self, config: StripedHyena2Config) -> None:
        super().__init__(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_proj_bias)
        self.is_interleaved = config.interleave

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
    if type(projections) is Projections and not is_watched(projections):
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
