"""Filters laid out once for many sequences: matrices that depend on weights and length only.

They are kept for inference on CPUs, where building them costs as much as using them. What was built is used
again as long as the values it was built from are the same, compared each time: no change of a weight, however
it is made, can leave an old filter in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_Built = TypeVar("_Built")


class FilterCache:
    """What was built last of the weights of one filter."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._weights: tuple[Tensor, ...] = ()
        self._built: object = None

    def get(
        self, build: Callable[[], _Built], weights: tuple[Tensor, ...], key: tuple[object, ...]
    ) -> _Built:
        """Give what ``build`` returns, built anew only for another key or other weights.

        Example:
            >>> cache, weight = FilterCache(), torch.ones(2)
            >>> first = cache.get(lambda: weight * 2, (weight,), ())
            >>> cache.get(lambda: weight * 2, (weight,), ()) is first
            True
            >>> weight.data[0] = 5.0
            >>> cache.get(lambda: weight * 2, (weight,), ())
            tensor([10.,  2.])
        """
        is_same = key == self._key and all(
            kept.dtype == now.dtype and kept.device == now.device and torch.equal(kept, now)
            for kept, now in zip(self._weights, weights, strict=True)
        )
        if not is_same:
            self._built = build()
            self._weights = tuple(weight.detach().clone() for weight in weights)
            self._key = key
        built: _Built = self._built  # type: ignore[assignment]
        return built
