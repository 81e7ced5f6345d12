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

    from genoembed.searching.kmers import Likeness
    from genoembed.store import EmbeddingFile


def known_place(place: np.int64) -> int | None:
    """Return a coordinate; None where the file has none, as AnnData files from elsewhere.

    Example:
        >>> import numpy as np
        >>> known_place(np.int64(7)), known_place(np.int64(-1))
        (7, None)
    """
    return int(place) if place >= 0 else None


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
    """Scores that make up that of one hit, and what matched; without trained heads the first two alone."""

    dense: float
    """Of the vectors."""
    sparse: float
    """Of the terms: the share of k-mers in common, or the score of the trained head."""
    multi_vector: float | None = None
    matches: str | None = None
    """``qstart-qend:sstart-send:similarity`` of the best vectors, with commas."""
    terms: str | None = None
    """``k-mer:product`` of the terms that give most, with commas."""
    num_terms: int | None = None
    """Terms that both have."""


class Hit(NamedTuple):
    """A query and a row of the database that is near it."""

    query: str
    subject: str
    score: float
    """Cosine, dot product, share of k-mers or hybrid score (higher is closer), or distance (lower is
    closer)."""
    rank: int
    """1 is the nearest."""
    shared_kmers: float
    """Share of the canonical 16-mers of the sequence that has fewer which the other has, too; NaN where the
    sequences are not at hand, or too short."""
    identity: float
    """Sequence identity of what they share, estimated from that; NaN where they share nothing."""
    query_start: int | None
    """In the coordinates of the parent sequence, from 0."""
    query_end: int | None
    """One past the last base."""
    subject_start: int | None
    subject_end: int | None
    subject_strand: str
    subject_description: str
    hybrid: HybridScores | None = None


COLUMNS = Hit._fields[:-1]
HYBRID_COLUMNS = HybridScores._fields
_PLAIN_PARTS = 2


@dataclass(frozen=True, kw_only=True)
class Hits:
    """All hits of a search: iterate, index by query, or take columns."""

    neighbors: Neighbors
    queries: Places
    subjects: Places
    likeness: Likeness
    hybrid: Mapping[tuple[int, int], HybridScores] = field(default_factory=dict)
    """By row of the query and row of the subject; empty without."""
    has_heads: bool = False
    """Whether hybrid scores are those of trained heads."""

    def __len__(self) -> int:
        return int((self.neighbors.rows != NO_ROW).sum())

    def __iter__(self) -> Iterator[Hit]:
        for query in range(len(self.neighbors.rows)):
            yield from self.of_row(query)

    def of_row(self, query: int) -> Iterator[Hit]:
        """List the hits of one query, the nearest first."""
        asked, found = self.queries, self.subjects
        columns = (
            matrix[query].tolist()
            for matrix in (*self.neighbors, self.likeness.shared_kmers, self.likeness.identity)
        )
        for rank, (row, score, shared_kmers, identity) in enumerate(zip(*columns, strict=True), 1):
            if row == NO_ROW:
                return
            yield Hit(
                query=asked.ids[query],
                subject=found.ids[row],
                score=score,
                rank=rank,
                shared_kmers=shared_kmers,
                identity=identity,
                query_start=known_place(asked.starts[query]),
                query_end=known_place(asked.ends[query]),
                subject_start=known_place(found.starts[row]),
                subject_end=known_place(found.ends[row]),
                subject_strand=found.strands[row],
                subject_description=found.descriptions[row],
                hybrid=self.hybrid.get((query, row)),
            )

    def columns(self) -> dict[str, list[object]]:
        """Return all hits as columns, as ``pandas.DataFrame`` takes them."""
        hits = list(self)
        named: dict[str, list[object]] = {name: [getattr(hit, name) for hit in hits] for name in COLUMNS}
        for name in self._parts:
            named[name] = [getattr(hit.hybrid, name) for hit in hits]
        return named

    @property
    def _parts(self) -> tuple[str, ...]:
        """Names of the columns of hybrid scores."""
        if not self.hybrid:
            return ()
        return HYBRID_COLUMNS if self.has_heads else HYBRID_COLUMNS[:_PLAIN_PARTS]

    def header(self) -> list[str]:
        """Return the column names of the table."""
        return ["#query", *COLUMNS[1:], *self._parts]

    def rows(self, failed: Container[str] = ()) -> Iterator[tuple[object, ...]]:
        """List the rows of the table; a query that failed has one, without a subject."""
        asked, width = self.queries, len(self.header())
        for query, name in enumerate(asked.ids):
            if name in failed:
                place = (int(asked.starts[query]), int(asked.ends[query]))
                yield (name, *[None] * 5, *place, *[None] * (width - 8))
            for hit in self.of_row(query):
                yield hit[:-1] + (hit.hybrid or ())[: len(self._parts)]
