"""Batches for one process or for several: the rows of each step, dealt out, every row of an epoch once.

In: an order of rows. Out: the rows of this process, batch by batch. Promised: batches of different processes
share no row, none is filled up with rows that come again, and laid end to end by rank they are the batches of
one process that takes as many rows as all together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.utils.data import BatchSampler

from genoembed.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sized

    from torch.utils.data import Sampler


class RankBatches(BatchSampler):
    """The batches of one process.

    A last batch that is short is dealt out evenly; it is left out where a process would get too few rows,
    unless it is the only one.

    Example:
        >>> from torch.utils.data import SequentialSampler
        >>> order = SequentialSampler(range(7))
        >>> [list(RankBatches(order, rows=2, rank=rank, world_size=2)) for rank in (0, 1)]
        [[[0, 1], [4]], [[2, 3], [5, 6]]]
    """

    def __init__(
        self, order: Sampler[int], *, rows: int, least: int = 1, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(order, rows, drop_last=False)
        self._least, self._rank, self._world_size = min(least, rows) * world_size, rank, world_size
        self._together = rows * world_size
        if self._count() < world_size:
            message = (
                f"train: {self._count()} rows for {world_size} processes, expected one or more for each; "
                "start fewer processes"
            )
            raise ConfigError(message)

    def __len__(self) -> int:
        full, rest = divmod(self._count(), self._together)
        return full + (rest > 0 and (full == 0 or rest >= self._least))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for number in range(len(self)):
            batch = order[number * self._together :][: self._together]
            first, last = (len(batch) * rank // self._world_size for rank in (self._rank, self._rank + 1))
            yield batch[first:last]

    def _count(self) -> int:
        order: Sized = self.sampler  # type: ignore[assignment]
        return len(order)
