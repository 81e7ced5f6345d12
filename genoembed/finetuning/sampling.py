"""What a step trains on: passages drawn for each row, rows in order, and batches for each process.

In: sizes, lengths or classes of rows. Out: draws, row numbers and batches. Promised: all of it depends on the
seed, the epoch and the rows alone, so that a resumed run goes on as it would have; each row is in each epoch
once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import BatchSampler, Sampler

from genoembed.errors import ConfigError, TrainingWarning

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence, Sized

    from numpy.typing import NDArray


FILLER = -1
"""Place of a group for which the row has no negative; mask it with ``PairIds.passage_mask``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupDraw:
    """One row's group for one epoch."""

    positive: int
    """Index into the row's positives."""
    negatives: tuple[int, ...]
    """``group_size - 1`` indices into the row's negatives, all different; ``FILLER`` at the end of a row that
    has fewer."""


class GroupSampler:
    """Draw ``train_group_size`` passages for each row: one positive and negatives of the row.

    Warns, once, where the numbers are not what they look like: rows with more negatives than a group takes,
    rows with fewer, rows with none.

    Args:
        num_positives: Of each row, at least 1.
        num_negatives: Of each row.
        train_group_size: Passages of a query: 1 positive and this less 1 negatives.
        seed: Random seed of the draws.
        in_batch_negatives: Whether passages of other queries are negatives, too.

    Raises:
        ConfigError: If a row would have no negative.

    Example:
        >>> sampler = GroupSampler([1, 2], [4, 4], train_group_size=5, seed=0)
        >>> sorted(sampler.draw(0, epoch=0).negatives)
        [0, 1, 2, 3]
        >>> sampler.draw(0, epoch=1) == sampler.draw(0, epoch=1)
        True
    """

    def __init__(
        self,
        num_positives: Sequence[int],
        num_negatives: Sequence[int],
        *,
        train_group_size: int,
        seed: int,
        in_batch_negatives: bool = True,
    ) -> None:
        self._positives, self._negatives = tuple(num_positives), tuple(num_negatives)
        self._wanted, self._seed, self._in_batch = train_group_size, seed, in_batch_negatives
        self.group_size = min(train_group_size, 1 + max(num_negatives))
        """Passages of a query, the same for all: no more than the row with the most has."""
        if not in_batch_negatives and min(self.group_size, 1 + min(num_negatives)) < 2:
            row = self._negatives.index(min(num_negatives)) + 1
            message = (
                f"train_group_size is {train_group_size}, row {row} has {self._negatives[row - 1]} negatives "
                "and in_batch_negatives is False: its loss would be 0; set in_batch_negatives to True, or "
                "give negatives to each row and set train_group_size to 2 or more"
            )
            raise ConfigError(message)
        self._warn()

    def draw(self, row: int, *, epoch: int) -> GroupDraw:
        """Draw the group of a row; the same for the same seed, epoch and row, both from 0."""
        # a generator for each draw: workers ask for rows in any order, a resumed run for some of them only
        generator = np.random.default_rng((self._seed, epoch, row))
        places, available = self.group_size - 1, self._negatives[row]
        positive = int(generator.integers(self._positives[row]))
        chosen = generator.permutation(available)[:places].tolist()
        return GroupDraw(positive=positive, negatives=(*chosen, *[FILLER] * (places - len(chosen))))

    def check_batch(self, queries_per_batch: int) -> None:
        """Raise if a query would meet no negative among those compared together: its loss would be 0."""
        others = queries_per_batch - 1 if self._in_batch else 0
        if self.group_size == 1 and others < 1:
            why = "a batch has one query on its own" if self._in_batch else "in_batch_negatives is False"
            message = (
                f"train_group_size is {self._wanted}, a query has no negatives of its own, and {why}: loss "
                "and gradient would be 0; set train_group_size to 2 or more (with negatives in the data), or "
                "make batches of 2 queries or more, with in_batch_negatives"
            )
            raise ConfigError(message)

    def _warn(self) -> None:
        places = self._wanted - 1
        without = sum(count == 0 for count in self._negatives)
        fewer = sum(0 < count < places for count in self._negatives)
        more = sum(count > places for count in self._negatives)
        rows = len(self._negatives)
        if without:
            _warn_once(
                f"neg: {without} of {rows} rows have no negatives; in-batch negatives (the passages of the "
                "other queries) are used for them, so larger batches give more negatives"
            )
        if places > max(self._negatives):
            short = places - max(self._negatives)
            _warn_once(
                f"train_group_size is {self._wanted}, which takes {places} negatives per row, {short} more "
                f"than the row with the most has; groups of {self.group_size} are used; give more negatives, "
                f"or set train_group_size to {self.group_size}"
            )
        elif fewer:
            missing = sum(places - count for count in self._negatives if 0 < count < places)
            _warn_once(
                f"train_group_size is {self._wanted}, which takes {places} negatives per row, but {fewer} of "
                f"{rows} rows have fewer, {missing} negatives short altogether; those places stay empty and "
                "count for nothing"
            )
        if more:
            unused = max(self._negatives) - places
            _warn_once(
                f"{more} of {rows} rows have more negatives than the {places} that train_group_size "
                f"{self._wanted} takes (up to {unused} more): each epoch draws {places} of them afresh, so "
                "more negatives in the data do not make a step harder; raise train_group_size for that"
            )


def _warn_once(message: str) -> None:
    # a sampler is made once a run; two frames up is whoever made it
    warnings.warn(message, TrainingWarning, stacklevel=4)


_ROWS_PER_CLASS = 4
"""In a row: with one alone, a batch of many classes holds no positive for it."""


class EpochOrder(Sampler[int]):
    """An order of rows that is another one in each epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0."""
        self.epoch = epoch


class LengthGroupedSampler(EpochOrder):
    """Order rows so that those of a batch have like lengths, and batches come in random order.

    Rows are shuffled, sorted by length within pools of ``pool_batches`` batches, cut into batches, and the
    batches shuffled. The batch with the longest row comes first: memory that does not suffice shows at once.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows that one step pads together: rows of a device times devices.
        seed: Random seed of the order.
        pool_batches: More make batches more even and less random.

    Example:
        >>> order = list(LengthGroupedSampler([5, 1, 5, 1], batch_size=2, seed=0))
        >>> sorted(order[:2]), sorted(order[2:])
        ([0, 2], [1, 3])
    """

    def __init__(
        self, lengths: Sequence[int], *, batch_size: int, seed: int = 0, pool_batches: int = 50
    ) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._batch_size, self._pool, self._seed = batch_size, pool_batches * batch_size, seed

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self.epoch])
        order = rng.permutation(len(self._lengths))
        batches = []
        for start in range(0, len(order), self._pool):
            pool = order[start : start + self._pool]
            pool = pool[np.argsort(-self._lengths[pool], kind="stable")]
            batches += [pool[at : at + self._batch_size] for at in range(0, len(pool), self._batch_size)]
        # only the last batch may be short, else those after it would be cut elsewhere
        tail = [batches.pop()] if len(batches[-1]) < self._batch_size else []
        # transformers' sampler leaves lengths falling within each pool, and rates with them: shuffle batches
        batches = [batches[index] for index in rng.permutation(len(batches))]
        longest = max(range(len(batches)), key=lambda index: self._lengths[batches[index]].max(), default=0)
        batches[:1], batches[longest : longest + 1] = batches[longest : longest + 1], batches[:1]
        return iter(np.concatenate(batches + tail).tolist())


class ClassSampler(EpochOrder):
    """Order rows so that batches hold several rows of several classes, whatever their sizes.

    Rows come in runs of four of a class, and the runs of each class are spread evenly over the epoch. A batch
    that still has one class only gets a row of another from a batch that can spare it.

    Args:
        labels: Class of each row.
        batch_size: Rows that are compared together.
        seed: Random seed of the order.

    Example:
        >>> order = list(ClassSampler(["a"] * 9 + ["b"], batch_size=5, seed=0))
        >>> 9 in order, len(set(order))
        (True, 10)
    """

    def __init__(self, labels: Sequence[object], *, batch_size: int, seed: int) -> None:
        codes: dict[object, int] = {}
        self._codes = np.array([codes.setdefault(label, len(codes)) for label in labels], np.int64)
        self._batch_size, self._seed = batch_size, seed

    def __len__(self) -> int:
        return len(self._codes)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self.epoch])
        shuffled = rng.permutation(len(self._codes))
        rows = shuffled[np.argsort(self._codes[shuffled], kind="stable")]
        codes, counts = self._codes[rows], np.bincount(self._codes)
        runs = (np.arange(len(rows)) - (np.cumsum(counts) - counts)[codes]) // _ROWS_PER_CLASS
        # one offset a class: its runs are equally far apart, so that no stretch of the epoch lacks them
        places = (runs + rng.random(len(counts))[codes]) / -(-counts // _ROWS_PER_CLASS)[codes]
        order = rows[np.argsort(places, kind="stable")]
        batches = [order[at : at + self._batch_size] for at in range(0, len(order), self._batch_size)]
        _mix(batches, self._codes)
        return iter(np.concatenate(batches).tolist())


def _mix(batches: Sequence[NDArray[np.int64]], codes: NDArray[np.int64]) -> None:
    """Swap rows until no batch of two rows or more has one class only, as far as there are others to give."""
    givers: dict[int, Iterator[NDArray[np.int64]]] = {}
    for batch in batches:
        code = int(codes[batch[0]])
        if len(batch) < 2 or (codes[batch] != code).any():
            continue
        giver = next(givers.setdefault(code, _able_to_give(batches, codes, code)), None)
        if giver is None:
            # swaps for other classes may have brought more: look through all of them once again
            givers[code] = _able_to_give(batches, codes, code)
            giver = next(givers[code], None)
        if giver is not None:
            place = int(np.flatnonzero(codes[giver] != code)[-1])
            batch[-1], giver[place] = giver[place], batch[-1]


def _able_to_give(
    batches: Sequence[NDArray[np.int64]], codes: NDArray[np.int64], code: int
) -> Iterator[NDArray[np.int64]]:
    """Yield batches as often as they have a row of another class than this beyond their last one."""
    for batch in batches:
        while int((codes[batch] != code).sum()) > 1:
            yield batch


def new_sampler(
    lengths: Sequence[int],
    *,
    labels: Sequence[object] | None,
    batch_size: int,
    seed: int,
    mixed_lengths: bool,
    rows_compared: int | None = None,
) -> EpochOrder:
    """Choose the order of rows: by class where there are classes, else by length or at random.

    Of ``batch_size`` rows in one step, ``rows_compared`` see each other, or all.
    """
    if labels is not None:
        return ClassSampler(labels, batch_size=rows_compared or batch_size, seed=seed)
    if mixed_lengths:  # a class for each row: at random
        return ClassSampler(range(len(lengths)), batch_size=batch_size, seed=seed)
    return LengthGroupedSampler(lengths, batch_size=batch_size, seed=seed)


class RankBatches(BatchSampler):
    """Select the rows of each batch that one process has.

    A last batch that is short is shared out evenly; it is left out where a process would get too few rows,
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
        # of a short last batch each process gets `least` rows, or all leave it out: none may wait for others
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
            # products before the division: shares differ by one row at most, and add up to the batch
            first, last = (len(batch) * rank // self._world_size for rank in (self._rank, self._rank + 1))
            yield batch[first:last]

    def _count(self) -> int:
        order: Sized = self.sampler  # type: ignore[assignment]
        return len(order)
