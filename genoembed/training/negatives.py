"""Which positive and which negatives of a row a step gets: drawn afresh each epoch, and counted.

In: how many positives and negatives each row has. Out: for a row and an epoch, indices into them. Promised: a
draw depends on seed, epoch and row alone, so a run that goes on draws as the run that was never stopped; no
negative is drawn twice into one group; what the data cannot fill is a filler that no loss looks at.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from genoembed.errors import ConfigError, InputError, TrainingWarning

if TYPE_CHECKING:
    from collections.abc import Sequence

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

    @property
    def num_fillers(self) -> int:
        """Places that the row could not fill."""
        return sum(index == FILLER for index in self.negatives)


@dataclass(slots=True)
class NegativeCounts:
    """What was really drawn since the sampler was made."""

    groups: int = 0
    negatives: int = 0
    """Real negatives in those groups."""
    fillers: int = 0
    """Places that stayed without one."""

    @property
    def negatives_per_group(self) -> float:
        """Negatives of its own that a query really got, on average; 0 before the first group."""
        return self.negatives / self.groups if self.groups else 0.0


class GroupSampler:
    """Draw ``train_group_size`` passages for each row: one positive and negatives of the row.

    Warns, once, where the numbers are not what they look like: rows with more negatives than a group takes,
    rows with fewer, rows with none.

    Args:
        num_positives: Of each row, at least 1.
        num_negatives: Of each row.
        train_group_size: Passages of a query: 1 positive and this less 1 negatives.
        seed: Decides what is drawn.
        in_batch_negatives: Whether passages of other queries are negatives, too.

    Raises:
        ConfigError: If ``train_group_size`` is below 1, or no query would have a negative.
        InputError: If there is no row, or a row has no positive; ``line`` is the row's number from 1.

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
        if train_group_size < 1:
            message = f"train_group_size is {train_group_size}; set train_group_size to 2 or more"
            raise ConfigError(message)
        if len(num_positives) == 0 or len(num_positives) != len(num_negatives):
            message = (
                f"rows: positives of {len(num_positives)}, negatives of {len(num_negatives)}, expected the "
                "same number, at least one"
            )
            raise InputError(message)
        for row, count in enumerate(num_positives, start=1):
            if count < 1:
                message = "pos is empty, expected at least one positive; give one or leave the row out"
                raise InputError(message, line=row)
        self._positives, self._negatives = tuple(num_positives), tuple(num_negatives)
        self._wanted, self._seed = train_group_size, seed
        self.group_size = min(train_group_size, 1 + max(num_negatives))
        """Passages of a query: no more than the richest row has."""
        self.counts = NegativeCounts()
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
        """Draw the group of a row.

        Args:
            row: Number of the row, from 0.
            epoch: Number of the epoch, from 0.

        Returns:
            The group; the same for the same seed, epoch and row.
        """
        generator = np.random.default_rng((self._seed, epoch, row))
        places, available = self.group_size - 1, self._negatives[row]
        positive = int(generator.integers(self._positives[row]))
        chosen = generator.permutation(available)[:places].tolist()
        self.counts.groups += 1
        self.counts.negatives += len(chosen)
        self.counts.fillers += places - len(chosen)
        return GroupDraw(positive=positive, negatives=(*chosen, *[FILLER] * (places - len(chosen))))

    def check_batch(self, queries_per_batch: int, *, in_batch_negatives: bool = True) -> None:
        """Refuse batches in which a query would meet no negative.

        Args:
            queries_per_batch: Queries that are compared together, those of other devices included if they
                are compared, too.
            in_batch_negatives: Whether passages of other queries are negatives.

        Raises:
            ConfigError: If there would be none: loss and gradient would be 0.
        """
        others = queries_per_batch - 1 if in_batch_negatives else 0
        if self.group_size == 1 and others < 1:
            why = (
                "in_batch_negatives is False"
                if not in_batch_negatives
                else "a batch has one query on its own"
            )
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
                f"train_group_size is {self._wanted}, which takes {places} negatives a row, {short} more "
                f"than the row with the most has; groups of {self.group_size} are used; give more negatives, "
                f"or set train_group_size to {self.group_size}"
            )
        elif fewer:
            missing = sum(places - count for count in self._negatives if 0 < count < places)
            _warn_once(
                f"train_group_size is {self._wanted}, which takes {places} negatives a row, but {fewer} of "
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
