"""Work units: consecutive records of about a fixed number of bases.

Memory does not grow with the input, and a run that is cut off loses one unit's work at most. Promised: the
same input gives the same units, with the same contents, in every process that reads it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from genoembed.contracts import SequenceRecord

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
