"""Kinds of modules that the mixers and blocks of StripedHyena 2 share, and when memory may be used again."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self


class StreamLinear(nn.Linear):
    """Linear that writes to the residual stream; a class of its own because it starts small, by depth."""


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
    """Check whether what a module returns may be held by someone else than its caller."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
