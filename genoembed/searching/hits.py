"""What a search found, as a table in the spirit of BLAST's tabular output.

In: neighbors by row, and the tables of records of both files. Out: one hit at a time, columns, or rows of a
table. Coordinates are 0-based and half-open, in the file's own tables of records.

Q queries, k neighbors, H hits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from genoembed.searching.neighbors import NO_ROW, Neighbors

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from genoembed.store import EmbeddingFile


class Places(NamedTuple):
    """What the tables of hits say about rows of a file."""

    ids: Sequence[str]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    strands: Sequence[str]
    descriptions: Sequence[str]

    @classmethod
    def of(cls, file: EmbeddingFile) -> Places:
        """Read them."""
        obs = file.obs
        return cls(file.ids, obs["start"], obs["end"], list(obs["strand"]), list(obs["description"]))


class HybridScores(NamedTuple):
    """Scores of the heads of one hit, and what matched."""

    dense: float
    sparse: float
    multi_vector: float
    matches: str
    """``qstart-qend:sstart-send:similarity`` of the best vectors, with commas."""
    terms: str
    """``k-mer:product`` of the terms that give most, with commas."""
    num_terms: int
    """Terms that both have."""


class Hit(NamedTuple):
    """A query and a row of the database that is near it."""

    query: str
    subject: str
    score: float
    """Cosine, dot product or hybrid score (higher is closer), or distance (lower is closer)."""
    rank: int
    """1 is the nearest."""
    query_start: int
    """In the coordinates of the parent sequence, from 0."""
    query_end: int
    """One past the last base."""
    subject_start: int
    subject_end: int
    subject_strand: str
    subject_description: str
    hybrid: HybridScores | None = None


COLUMNS = Hit._fields[:-1]
HYBRID_COLUMNS = HybridScores._fields


@dataclass(frozen=True, kw_only=True)
class Hits:
    """All hits of a search: iterate, index by query, or take columns."""

    neighbors: Neighbors
    queries: Places
    subjects: Places
    hybrid: Mapping[tuple[int, int], HybridScores] = field(default_factory=dict)
    """By row of the query and row of the subject; empty without."""

    def __len__(self) -> int:
        return int((self.neighbors.rows != NO_ROW).sum())

    def __iter__(self) -> Iterator[Hit]:
        for query in range(len(self.neighbors.rows)):
            yield from self.of_row(query)

    def of_row(self, query: int) -> Iterator[Hit]:
        """List the hits of one query, the nearest first."""
        asked, found = self.queries, self.subjects
        for rank, (row, score) in enumerate(
            zip(self.neighbors.rows[query].tolist(), self.neighbors.scores[query].tolist(), strict=True), 1
        ):
            if row == NO_ROW:
                return
            yield Hit(
                query=asked.ids[query],
                subject=found.ids[row],
                score=score,
                rank=rank,
                query_start=int(asked.starts[query]),
                query_end=int(asked.ends[query]),
                subject_start=int(found.starts[row]),
                subject_end=int(found.ends[row]),
                subject_strand=found.strands[row],
                subject_description=found.descriptions[row],
                hybrid=self.hybrid.get((query, row)),
            )

    def columns(self) -> dict[str, list[object]]:
        """Return all hits as columns, as ``pandas.DataFrame`` takes them."""
        hits = list(self)
        named: dict[str, list[object]] = {name: [getattr(hit, name) for hit in hits] for name in COLUMNS}
        if self.hybrid:
            for name in HYBRID_COLUMNS:
                named[name] = [getattr(hit.hybrid, name) for hit in hits]
        return named

    def header(self) -> list[str]:
        """Return the column names of the table."""
        return ["#query", *COLUMNS[1:], *(HYBRID_COLUMNS if self.hybrid else ())]

    def rows(self, failed: Container[str] = ()) -> Iterator[tuple[object, ...]]:
        """List the rows of the table; a query that failed has one, without a subject."""
        asked, width = self.queries, len(self.header())
        for query, name in enumerate(asked.ids):
            if name in failed:
                place = (int(asked.starts[query]), int(asked.ends[query]))
                yield (name, None, None, None, *place, *[None] * (width - 6))
            for hit in self.of_row(query):
                yield hit[:-1] + (hit.hybrid or ())
