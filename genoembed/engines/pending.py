"""Which units of the input a process has still to embed: those of its share that are not finished."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from genoembed.contracts import SequenceRecord
    from genoembed.engines.stats import RunStats
    from genoembed.engines.units import WorkUnit
    from genoembed.store import Parts


class PendingUnits:
    """Passes on the units that are to be made, and counts them all."""

    def __init__(
        self,
        units: Iterable[WorkUnit],
        parts: Parts,
        stats: RunStats,
        *,
        first: int,
        step: int,
        sample: int = 0,
    ) -> None:
        self.num_units = 0
        """Units seen so far, of all shares."""
        self.sample: tuple[SequenceRecord, ...] = ()
        """The first records of the first unit, if it belongs to the share."""
        self._sample = sample
        self._units = units
        self._parts = parts
        self._stats = stats
        self._first = first
        self._step = step

    def __iter__(self) -> Iterator[WorkUnit]:
        for unit in self._units:
            self.num_units += 1
            if unit.number % self._step != self._first:
                continue
            if unit.number == 0:
                self.sample = unit.records[: self._sample]
            if self._parts.finished(unit.number, unit.content) is None:
                yield unit
                continue
            self._stats.units_kept += 1
            self._stats.bases_kept += unit.num_bases
            self._stats.records_kept += len(unit.records)
