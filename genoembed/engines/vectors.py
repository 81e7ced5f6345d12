"""What the pieces of a unit gave, held until the unit's rows are built.

Pooled vectors are copied side by side into one matrix a layer. To keep the small tensors that come from the
forward passes would cost many times their size: each is carved out of the hole that a large activation left,
so that the next activation takes new memory.

P pieces, D hidden size, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


class PieceVectors:
    """Vectors of pieces, numbered as they come."""

    def __init__(self, num_pieces: int) -> None:
        self._block_rows = max(1, num_pieces)
        self._blocks: dict[str, list[Tensor]] = {}
        self._num_pieces = 0

    def add(self, vectors: Mapping[str, Tensor | Sequence[Tensor]]) -> range:
        """Take the pieces of a batch in."""
        first = self._num_pieces
        for layer, batch in vectors.items():
            blocks = self._blocks.setdefault(layer, [])
            if isinstance(batch, torch.Tensor):
                self._copy(blocks, first, batch)
            else:
                blocks.extend(batch)
            self._num_pieces = first + len(batch)
        return range(first, self._num_pieces)

    def pooled(self, layer: str, numbers: Sequence[int]) -> Tensor:
        """Gather the vectors of pooled pieces."""
        blocks = self._blocks[layer]
        if len(blocks) == 1:
            return blocks[0][torch.tensor(numbers, dtype=torch.int64)]
        places = (divmod(number, self._block_rows) for number in numbers)
        return torch.stack([blocks[block][row] for block, row in places])

    def tokens(self, layer: str, numbers: Sequence[int]) -> Tensor:
        """Join the token vectors of pieces."""
        return torch.cat([self._blocks[layer][number] for number in numbers])

    def num_tokens(self, layer: str, numbers: Sequence[int]) -> int:
        """Count the token vectors of pieces."""
        return sum(len(self._blocks[layer][number]) for number in numbers)

    def _copy(self, blocks: list[Tensor], first: int, batch_PD: Tensor) -> None:
        done = 0
        while done < len(batch_PD):
            block, row = divmod(first + done, self._block_rows)
            if block == len(blocks):
                blocks.append(batch_PD.new_empty((self._block_rows, batch_PD.shape[1])))
            room = min(self._block_rows - row, len(batch_PD) - done)
            blocks[block][row : row + room] = batch_PD[done : done + room]
            done += room
