"""Pooling of rows that come block by block: what :func:`~genoembed.pooling.reduce.pool` gives at once.

B rows, L positions of a block, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from genoembed.pooling.reduce import pool, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

    from genoembed.pooling.reduce import Pooling


class RunningPool:
    """Pools the blocks of rows from left to right; memory does not grow with their number.

    Example:
        >>> running = RunningPool("mean")
        >>> running.add(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[True, True]]))
        >>> running.add(torch.tensor([[[6.0], [9.0]]]), torch.tensor([[True, False]]))
        >>> running.pooled()
        tensor([[3.]])
    """

    def __init__(self, method: Pooling) -> None:
        self._method = method
        self._dtype = torch.float32
        self._sum_BD: Tensor | None = None
        self._weight_B1: Tensor | None = None
        self._kept_B1: Tensor | None = None
        self._chosen_BD: Tensor | None = None

    def add(self, hidden_BLD: Tensor, mask_BL: Tensor) -> None:
        """Take the next block in."""
        if hidden_BLD.dtype == torch.float64:
            self._dtype = torch.float64
        if self._method in ("mean", "weighted_mean"):
            self._add_sum(hidden_BLD, mask_BL)
            return
        block_BD = pool(hidden_BLD, mask_BL, method=self._method, empty="nan")
        count_B1 = mask_BL.sum(dim=1, keepdim=True)
        if self._chosen_BD is None or self._kept_B1 is None:
            self._chosen_BD, self._kept_B1 = block_BD, count_B1
        elif self._method != "cls":
            joined_BD = torch.where(self._kept_B1 == 0, block_BD, self._joined(self._chosen_BD, block_BD))
            self._chosen_BD = torch.where(count_B1 == 0, self._chosen_BD, joined_BD)
            self._kept_B1 = self._kept_B1 + count_B1

    def pooled(self) -> Tensor:
        """Give one vector a row."""
        if self._sum_BD is not None and self._weight_B1 is not None:
            return (self._sum_BD / self._weight_B1).to(self._dtype)
        assert self._chosen_BD is not None, "a batch has a block"
        return self._chosen_BD

    def _add_sum(self, hidden_BLD: Tensor, mask_BL: Tensor) -> None:
        count_BL = mask_BL.cumsum(dim=1)
        if self._method == "mean":
            weights_BL = torch.ones_like(count_BL)
        else:
            weights_BL = count_BL if self._kept_B1 is None else count_BL + self._kept_B1
        sum_BD, weight_B1 = weighted_sum(hidden_BLD, mask_BL, weights_BL)
        self._sum_BD = sum_BD if self._sum_BD is None else self._sum_BD + sum_BD
        self._weight_B1 = weight_B1 if self._weight_B1 is None else self._weight_B1 + weight_B1
        block_B1 = count_BL[:, -1:]
        self._kept_B1 = block_B1 if self._kept_B1 is None else self._kept_B1 + block_B1

    def _joined(self, before_BD: Tensor, block_BD: Tensor) -> Tensor:
        if self._method == "max":
            return torch.maximum(before_BD, block_BD)
        return before_BD if self._method == "first" else block_BD
