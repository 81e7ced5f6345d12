"""In which order rows come: of like length together, of one class together, or at random.

In: lengths or classes of rows. Out: samplers. Promised: every row is in every epoch once, and the order
depends on rows, seed and epoch alone.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Sampler

from genoembed.training.collate import LengthGroupedSampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ROWS_PER_CLASS = 4


class ClassSampler(Sampler[int]):
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
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0.

        Args:
            epoch: Its number.
        """
        self.epoch = epoch

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
