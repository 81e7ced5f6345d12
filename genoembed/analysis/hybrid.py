"""Scores of sparse and multi-vector representations, with what matched.

Beside a dense cosine, BGE-M3 (Chen et al. 2024) scores the terms that two sequences share and, for each
vector of the query, the most similar vector of the subject (MaxSim). Both say where a hit comes from.

U terms, M vectors, E features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genoembed.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridWeights:
    """How the three scores are added; the defaults are those of BGE-M3."""

    dense: float = 1.0
    sparse: float = 0.3
    multi_vector: float = 1.0

    def __post_init__(self) -> None:
        given = (self.dense, self.sparse, self.multi_vector)
        if not (all(0 <= weight < np.inf for weight in given) and any(given)):
            message = (
                f"hybrid_weights is {list(given)}; set hybrid_weights to three finite numbers, none below 0 "
                "and not all 0"
            )
            raise ConfigError(message)

    def total(self, *, dense: float, sparse: float, multi_vector: float) -> float:
        """Add scores.

        Example:
            >>> HybridWeights().total(dense=1.0, sparse=1.0, multi_vector=0.5)
            1.8
        """
        return self.dense * dense + self.sparse * sparse + self.multi_vector * multi_vector


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
