"""What the mixers of StripedHyena 2 share: the state of a pass, and kinds of modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from genoembed.models.striped_hyena2.cache import StripedHyena2Cache
    from genoembed.models.striped_hyena2.segments import SegmentLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockContext:
    """What every block of a forward pass must know about the rows."""

    position_ids_BL: Tensor
    """Rotary positions. int64, ``(B, L)`` or ``(1, L)``."""
    key_mask_BT: Tensor | None = None
    """False where a position is padding on the left. Bool, ``(B, T)``, the positions before this block of the
    sequence first; None where there is none."""
    segments: SegmentLayout | None = None
    """Where packed neighbours begin, if they are to be kept apart; the rows are one long row then."""
    cache: StripedHyena2Cache | None = None
    """What earlier blocks of the sequence left; brought up to date by every block."""


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
    """Say whether what a module returns may be held by someone else than its caller."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
