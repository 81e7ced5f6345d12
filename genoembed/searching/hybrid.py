"""Scores of sparse and multi-vector representations, with what matched.

Beside a dense cosine, BGE-M3 (Chen et al. 2024) scores the terms that two sequences share and, for each
vector of the query, the most similar vector of the subject (MaxSim). Both say where a hit comes from.

U terms, M vectors, E features.

Score what a dense search found once more, with the sparse and multi-vector heads of a retrieval model.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genoembed.errors import ConfigError
from genoembed.pipeline.embedding_file import read_file_records, read_file_settings
from genoembed.retrieval.models import HeadVectors, Retriever, load_retriever
from genoembed.searching.hits import HybridScores
from genoembed.searching.neighbors import NO_ROW, Neighbors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from os import PathLike

    from numpy.typing import NDArray

    from genoembed.retrieval.weights import HybridWeights
    from genoembed.store import EmbeddingFile


class SharedTerms(NamedTuple):
    """Terms that two sequences have in common."""

    score: float
    """Sum of the products of their weights."""
    query: NDArray[np.int64]
    """Their places in the query's list, those that give most first. ``(U,)``."""
    subject: NDArray[np.int64]
    """Their places in the subject's list."""
    products: NDArray[np.float64]
    """What each gives."""


def shared_terms(
    query_ids: NDArray[np.int64],
    query_weights: NDArray[np.floating],
    subject_ids: NDArray[np.int64],
    subject_weights: NDArray[np.floating],
) -> SharedTerms:
    """Score the terms that two sequences share.

    Example:
        >>> ids, weights = np.array([5, 7]), np.array([2.0, 1.0])
        >>> found = shared_terms(ids, weights, np.array([7, 9]), np.array([3.0, 1.0]))
        >>> found.score, found.query.tolist(), found.subject.tolist()
        (3.0, [1], [0])
    """
    _, query, subject = np.intersect1d(query_ids, subject_ids, assume_unique=True, return_indices=True)
    products = query_weights[query].astype(np.float64) * subject_weights[subject]
    order = np.lexsort((query, -products))
    order = order[products[order] > 0]
    return SharedTerms(float(products.sum()), query[order], subject[order], products[order])


class BestMatches(NamedTuple):
    """The most similar vector of the subject for each of the query."""

    score: float
    """Mean of the similarities (MaxSim)."""
    subject: NDArray[np.int64]
    """Which vector of the subject; ``(M,)``."""
    similarities: NDArray[np.float64]
    """``(M,)``."""


def best_matches(query: NDArray[np.floating], subject: NDArray[np.floating]) -> BestMatches:
    """Find for each vector of the query the most similar one of the subject.

    Example:
        >>> best_matches(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0], [0.5, 0.0]]))
        BestMatches(score=0.5, subject=array([1]), similarities=array([0.5]))
    """
    products = query.astype(np.float64) @ subject.astype(np.float64).T
    best = products.argmax(axis=1)
    similarities = products[np.arange(len(query)), best]
    return BestMatches(float(similarities.mean()), best, similarities)


logger = logging.getLogger(__name__)

SHOWN = 5
"""Matching places and terms that are named."""
_ENCODED_TOGETHER = 64
_KEPT_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridOptions:
    """What is scored again."""

    weights: HybridWeights | None = None
    """None takes those of the model."""
    depth: int = 100
    """Rows per query."""
    subject_sequences: tuple[str, ...] = ()
    """Files of the database's sequences; empty takes those that it names."""

    def __post_init__(self) -> None:
        if self.depth < 1:
            message = f"depth is {self.depth}; set depth to 1 or more"
            raise ConfigError(message)


def rescore(
    queries: Sequence[bytes],
    database: EmbeddingFile,
    found: Neighbors,
    options: HybridOptions,
    *,
    k: int,
    folder: str | PathLike[str] | None = None,
    device: str | None = None,
    trust_remote_code: bool | None = None,
) -> tuple[Neighbors, dict[tuple[int, int], HybridScores]]:
    """Score neighbors again and rank them by the weighted sum."""
    check_whole_records(database)
    made = read_file_settings(database, remedy="search by vectors alone")
    folder = made.model if folder is None else folder
    retriever = load_retriever(folder, device=device, trust_remote_code=bool(trust_remote_code))
    digest = retriever.genomic.provenance.get("weights_sha256")
    if digest != made.weights_sha256:
        message = (
            f"{folder}: weights {digest}, but {database.path} was embedded with {made.weights_sha256}; name "
            "the model that it was embedded with"
        )
        raise ConfigError(message)
    weights = _weights(options.weights, retriever)
    rows = np.unique(found.rows[found.rows != NO_ROW]).tolist()
    sequences = read_file_records(database, rows, paths=options.subject_sequences, option="subject_sequences")
    subjects = _Encoded(
        retriever, {row: record.sequence for row, record in zip(rows, sequences, strict=True)}
    )
    ranked = Neighbors(
        np.full((len(found.rows), min(k, found.rows.shape[1])), NO_ROW, np.int64),
        np.full((len(found.rows), min(k, found.rows.shape[1])), np.nan),
    )
    parts: dict[tuple[int, int], HybridScores] = {}
    for query in range(len(queries)):
        near = [int(row) for row in found.rows[query] if row != NO_ROW]
        (mine,) = retriever.encode([queries[query]]) if near else (None,)
        scored: list[tuple[float, int, HybridScores]] = []
        for row, theirs in subjects.take(near):
            assert mine is not None, "a query with neighbors was encoded"
            dense = float(found.scores[query][near.index(row)])
            scored.append((*_score(mine, theirs, dense, weights, queries[query], retriever, row),))
        scored.sort(key=lambda item: (-item[0], item[1]))
        for place, (score, row, part) in enumerate(scored[:k]):
            ranked.rows[query, place], ranked.scores[query, place] = row, score
            parts[query, row] = part
    return ranked, parts


def _weights(requested: HybridWeights | None, retriever: Retriever) -> HybridWeights:
    """Choose how scores are added, and say it."""
    own = retriever.model.hybrid_weights
    if requested is None or requested == own:
        logger.info("hybrid weights %s (dense : sparse : multi-vector), those of the model", own)
        return own
    logger.info(
        "hybrid weights %s (dense : sparse : multi-vector), as requested; those of the model are %s",
        requested,
        own,
    )
    return requested


def _score(
    query: HeadVectors,
    subject: HeadVectors,
    dense: float,
    weights: HybridWeights,
    sequence: bytes,
    retriever: Retriever,
    row: int,
) -> tuple[float, int, HybridScores]:
    terms = shared_terms(query.term_ids, query.term_weights, subject.term_ids, subject.term_weights)
    best = best_matches(query.vectors, subject.vectors)
    total = weights.total(dense=dense, sparse=terms.score, multi_vector=best.score)
    shown = []
    for place, product in zip(terms.query[:SHOWN], terms.products[:SHOWN], strict=True):
        start = int(query.term_starts[place])
        shown.append(f"{sequence[start : start + retriever.kmers.k].decode()}:{product:.4g}")
    part = HybridScores(
        dense=dense,
        sparse=terms.score,
        multi_vector=best.score,
        matches=_matches(query, subject, best),
        terms=",".join(shown),
        num_terms=len(terms.query),
    )
    return total, row, part


def _matches(query: HeadVectors, subject: HeadVectors, best: BestMatches) -> str:
    """Return the places that match best, in the bases of the sequences that the model saw."""
    order = np.argsort(-best.similarities, kind="stable")[:SHOWN]
    spans = []
    for place in order:
        (start, end), (from_, to) = query.spans[place], subject.spans[best.subject[place]]
        spans.append(f"{start}-{end}:{from_}-{to}:{best.similarities[place]:.4g}")
    return ",".join(spans)


class _Encoded:
    """What the heads make of sequences, kept as far as there is room."""

    def __init__(self, retriever: Retriever, sequences: dict[int, bytes]) -> None:
        self._retriever = retriever
        self._sequences = sequences
        self._kept: dict[int, HeadVectors] = {}
        self._bytes = 0

    def take(self, rows: list[int]) -> Iterable[tuple[int, HeadVectors]]:
        """Return the vectors of rows."""
        for start in range(0, len(rows), _ENCODED_TOGETHER):
            part = rows[start : start + _ENCODED_TOGETHER]
            missing = [row for row in part if row not in self._kept]
            if self._bytes > _KEPT_BYTES:
                self._kept = {row: self._kept[row] for row in part if row in self._kept}
                self._bytes = sum(map(_size, self._kept.values()))
            encoded = self._retriever.encode([self._sequences[row] for row in missing])
            self._kept |= dict(zip(missing, encoded, strict=True))
            self._bytes += sum(map(_size, encoded))
            yield from ((row, self._kept[row]) for row in part)


def _size(vectors: HeadVectors) -> int:
    return sum(array.nbytes for array in vectors)


def check_whole_records(file: EmbeddingFile) -> None:
    """Raise unless the file has one row per record, and says so."""
    settings = read_file_settings(file, remedy="search by vectors alone")
    if settings.per_window:
        message = (
            f"{file.path}: it has one row per window, expected one per record for the heads of a retrieval "
            "model; embed without per_window"
        )
        raise ConfigError(message)
