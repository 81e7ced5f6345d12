"""In which order rows come: of like length together, of one class together, or at random.

In: lengths or classes of rows. Out: samplers. Promised: every row is in every epoch once, and the order
depends on rows, seed and epoch alone.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Sampler

from genoembed.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ROWS_PER_CLASS = 4


class EpochOrder(Sampler[int]):
    """An order of rows that is another one in each epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0.

        Args:
            epoch: Its number.
        """
        self.epoch = epoch


class LengthGroupedSampler(EpochOrder):
    """Orders rows so that those of a batch have like lengths, and batches come in random order.

    Rows are shuffled, sorted by length within pools of ``pool_batches`` batches, cut into batches, and the
    batches shuffled (so lengths do not run down within a pool). The batch with the longest row comes first:
    memory that does not suffice shows at once. Every row is in every epoch once; the order depends on
    lengths, seed and epoch only.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows that one step pads together: rows of a device times devices.
        seed: Decides about the order.
        pool_batches: More make batches more even and less random.

    Raises:
        ConfigError: If there is no row, or a number is out of range.

    Example:
        >>> list(LengthGroupedSampler([5, 1, 5, 1], batch_size=2, seed=0)) in ([0, 2, 1, 3], [2, 0, 3, 1],
        ...     [0, 2, 3, 1], [2, 0, 1, 3])
        True
    """

    def __init__(
        self, lengths: Sequence[int], *, batch_size: int, seed: int = 0, pool_batches: int = 50
    ) -> None:
        numbers = (("batch_size", batch_size, 1), ("seed", seed, 0), ("pool_batches", pool_batches, 1))
        problems = [
            f"{n} is {value}; set {n} to {least} or more" for n, value, least in numbers if value < least
        ]
        if not len(lengths):
            problems.append("lengths: no row to order; give at least one")
        if problems:
            raise ConfigError(*problems)
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._batch_size = batch_size
        self._pool = pool_batches * batch_size
        self._seed = seed

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
        batches = [batches[index] for index in rng.permutation(len(batches))]
        longest = max(range(len(batches)), key=lambda index: self._lengths[batches[index]].max(), default=0)
        batches[:1], batches[longest : longest + 1] = batches[longest : longest + 1], batches[:1]
        return iter(np.concatenate(batches + tail).tolist())


class ClassSampler(EpochOrder):
    """Orders rows so that batches hold several of a class: those of a class come four at a time,
    beside those of others.

    Each row is in each epoch once; the order depends on labels, seed and epoch alone.

    Args:
        labels: Class of each row.
        seed: Decides about the order.
    """

    def __init__(self, labels: Sequence[object], *, seed: int) -> None:
        by_label: dict[object, list[int]] = defaultdict(list)
        for index, label in enumerate(labels):
            by_label[label].append(index)
        self._classes, self._count, self._seed = list(by_label.values()), len(labels), seed

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        rounds: dict[int, list[list[int]]] = defaultdict(list)
        for members in self._classes:
            order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            for start in range(0, len(order), _ROWS_PER_CLASS):
                rounds[start].append(order[start : start + _ROWS_PER_CLASS])
        # a round has a piece of each class that still has one, so neighbours are of different classes
        for start in sorted(rounds):
            for index in torch.randperm(len(rounds[start]), generator=generator).tolist():
                yield from rounds[start][index]


class RandomOrder(ClassSampler):
    """Orders rows at random, by seed and epoch.

    Args:
        count: Number of rows.
        seed: Decides about the order.
    """

    def __init__(self, count: int, *, seed: int) -> None:
        super().__init__(range(count), seed=seed)  # a class each, so one round


def new_sampler(
    lengths: Sequence[int],
    *,
    labels: Sequence[object] | None,
    batch_size: int,
    seed: int,
    mixed_lengths: bool,
) -> Sampler[int]:
    """Choose the order of rows.

    Args:
        lengths: Of each row.
        labels: Classes that batches should hold several rows of; None for none.
        batch_size: Rows of a step's batch, all devices together.
        seed: Of the run.
        mixed_lengths: Random rows instead of rows of like length.

    Returns:
        The sampler.
    """
    if labels is not None:
        return ClassSampler(labels, seed=seed)
    if mixed_lengths:
        return RandomOrder(len(lengths), seed=seed)
    return LengthGroupedSampler(lengths, batch_size=batch_size, seed=seed)
