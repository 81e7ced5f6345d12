"""Work units: consecutive records of about a fixed number of bases.

Memory does not grow with the input, and a run that is cut off loses one unit's work at most. Promised: the
same input gives the same units, with the same contents, in every process that reads it.

Also the running totals of a run, and which units of the input a process has still to embed: those of its
share that are not finished.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from genoembed.store import UnitRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from genoembed.contracts import SequenceRecord
    from genoembed.store import Parts


UNIT_BASES = 1_000_000
UNIT_RECORDS = 20_000


@dataclass(frozen=True, kw_only=True)
class WorkUnit:
    """Records that are embedded and written together."""

    number: int
    """Position in the run, from 0."""
    records: tuple[SequenceRecord, ...]

    @cached_property
    def content(self) -> str:
        """SHA-256 of all that a row is made from, of each record; hexadecimal digits."""
        digest = hashlib.sha256()
        for record in self.records:
            facts = (
                record.id,
                record.description,
                record.source,
                record.start,
                record.end,
                record.strand,
                record.core_start,
                record.core_end,
                record.flags,
                len(record.sequence),
            )
            digest.update(repr(facts).encode("utf-8", "surrogatepass"))
            digest.update(record.sequence)
        return digest.hexdigest()

    @property
    def num_bases(self) -> int:
        """Bases of all records."""
        return sum(len(record.sequence) for record in self.records)

    def record(self, *, num_rows: int, stats: Mapping[str, float], failed: Mapping[str, str]) -> UnitRecord:
        """Say what is known about the unit when it is finished."""
        return UnitRecord(
            number=self.number,
            content=self.content,
            first=self.records[0].id,
            last=self.records[-1].id,
            num_records=len(self.records),
            num_bases=self.num_bases,
            num_rows=num_rows,
            stats=stats,
            failed=failed,
        )


def iter_units(
    records: Iterable[SequenceRecord], *, max_bases: int = UNIT_BASES, max_records: int = UNIT_RECORDS
) -> Iterator[WorkUnit]:
    """Group consecutive records.

    Example:
        >>> from genoembed.contracts import SequenceRecord
        >>> records = [SequenceRecord(id=str(n), sequence=b"A" * n) for n in (3, 3, 9, 1)]
        >>> [[record.id for record in unit.records] for unit in iter_units(records, max_bases=6)]
        [['3', '3'], ['9'], ['1']]
    """
    held: list[SequenceRecord] = []
    number = bases = 0
    for record in records:
        length = len(record.sequence)
        if held and (bases + length > max_bases or len(held) == max_records):
            yield WorkUnit(number=number, records=tuple(held))
            number, held, bases = number + 1, [], 0
        held.append(record)
        bases += length
    if held:
        yield WorkUnit(number=number, records=tuple(held))


@dataclass(kw_only=True, slots=True)
class RunStats:
    """What the forward passes cost; grows batch by batch."""

    records: int = 0
    """Records that are done."""
    bases: int = 0
    """Bases of records that are done."""
    bases_under_way: int = 0
    """Bases of other records that are done; overlap of windows and the other strand count once."""
    windows: int = 0
    """Windows cut from them, on one strand."""
    repeats: int = 0
    """Windows (of either strand) that were not run: the model would have seen what it had seen before."""
    unread: int = 0
    """Bases that the model's tokenizer has no words for, on one strand."""
    batches: int = 0
    """Forward passes."""
    real_tokens: int = 0
    """Tokens that were run and are no padding."""
    slots: int = 0
    """Tokens that were run, padding included."""
    forward_s: float = 0.0
    """Seconds in forward passes, without pooling."""
    pooling_s: float = 0.0
    """Seconds in pooling, which happens while a forward pass is under way."""
    halvings: int = 0
    """How often memory was too small for a forward pass, which was then divided."""
    units: int = 0
    """Work units of the input that are done, those among them that were done before."""
    units_kept: int = 0
    """Units that an earlier run had finished."""
    bases_kept: int = 0
    """Their bases."""
    records_kept: int = 0
    """Their records."""

    @property
    def padding_share(self) -> float:
        """Share of the slots that hold padding."""
        return 1 - self.real_tokens / self.slots if self.slots else 0.0


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
