"""What the parsers hand to the cleaning: a record as its file has it, before any policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from genoembed.contracts import Strand


class Span(NamedTuple):
    """The part of a contig that a record was fetched from."""

    contig: str
    start: int
    """First base of the region, 0-based."""
    end: int
    """One past its last base."""
    strand: Strand
    fetch_start: int
    """First base fetched: ``start`` less the left flank."""


class RawRecord(NamedTuple):
    """A record as parsed."""

    id: str
    description: str
    path: str
    """File that errors name."""
    source: str
    """File that the finished record names."""
    line: int | None
    """1-based line of the header."""
    body: Iterator[tuple[bytes, int | None]]
    """Pieces of the sequence, in order, white space and all, each with the line it starts on (None where
    lines cannot be told apart); can be read once. A record with a ``span`` has exactly three: left flank,
    region, right flank, as on the forward strand."""
    span: Span | None = None
    """Where a region came from."""
