"""Exact nearest neighbors: every row is looked at, in blocks, and what is near is scored in float64.

A product in float32 says which rows of a block can be among the best, by a bound on its own error; those
alone are scored again, pair by pair, in float64. So the result is that of comparing everything in float64,
whatever the sizes of the blocks, and rows that score alike come in the order of the file.

Q queries, N rows, B rows of a block, D features, P pairs, k neighbors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genoembed.errors import ShapeError
from genoembed.pipeline.embedding_file import block_rows
from genoembed.pooling.transform import unit_rows, usable_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from genoembed.config.choices import Metric
    from genoembed.pipeline.embedding_file import VectorSource


NO_ROW = -1
"""Where there are fewer neighbors than requested."""
_QUERY_ROWS = 2048
_PAIR_VALUES = 1 << 22
_UNIT_ROUNDOFF = 2.0**-24


class Neighbors(NamedTuple):
    """The nearest rows of each query, the nearest first."""

    rows: NDArray[np.int64]
    """``(Q, k)``; ``NO_ROW`` where there is none."""
    scores: NDArray[np.float64]
    """Cosines or dot products (higher is closer), or distances (lower is closer); NaN where there is none.
    ``(Q, k)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owners:
    """Who owns which row: a query and a row of one owner are never neighbors."""

    queries: NDArray[np.int64]
    """``(Q,)``."""
    rows: NDArray[np.int64]
    """``(N,)``."""

    def of(self, queries: NDArray[np.int64]) -> Owners:
        """Take some of the queries."""
        return Owners(queries=self.queries[queries], rows=self.rows)


def exact_neighbors(
    queries: NDArray[np.floating],
    source: VectorSource,
    *,
    k: int,
    metric: Metric = "cosine",
    owners: Owners | None = None,
    rows_per_block: int | None = None,
) -> Neighbors:
    """Find the nearest rows of each query.

    Rows that hold NaN or infinity (and, for cosines, rows of zeros) are nobody's neighbors, and queries of
    that kind have none.

    Example:
        >>> from genoembed.pipeline.embedding_file import VectorSource
        >>> rows = VectorSource(np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]))
        >>> found = exact_neighbors(np.array([[1.0, 0.0]]), rows, k=2)
        >>> found.rows.tolist(), found.scores.tolist()
        ([[0, 2]], [[1.0, 1.0]])
    """
    check_widths(queries, source)
    wide = np.asarray(queries, dtype=np.float64)
    k = min(k, len(source))
    rows = np.full((len(queries), k), NO_ROW, dtype=np.int64)
    scores = np.full((len(queries), k), np.nan)
    usable = np.flatnonzero(usable_rows(wide, allow_zero=metric != "cosine"))
    for start in range(0, len(usable) if k else 0, _QUERY_ROWS):
        mine = usable[start : start + _QUERY_ROWS]
        ranking = _Ranking(
            _prepared(wide[mine], metric),
            k=k,
            metric=metric,
            num_rows=len(source),
            owners=None if owners is None else owners.of(mine),
        )
        for first, block in source.blocks(rows_per_block or block_rows(source.width)):
            ranking.take(first, block)
        rows[mine], scores[mine] = ranking.neighbors()
    return Neighbors(rows, scores)


def check_widths(queries: NDArray[np.floating], source: VectorSource) -> None:
    """Raise if queries are not vectors of this source."""
    if queries.ndim != 2 or queries.shape[1] != source.width:
        message = f"queries: shape {queries.shape}, expected (Q, {source.width}), the width of the rows"
        raise ShapeError(message)


def _prepared(vectors: NDArray[np.float64], metric: Metric) -> NDArray[np.float64]:
    if metric != "cosine":
        return vectors
    return unit_rows(vectors)


class _Ranking:
    """The best rows so far of some queries."""

    def __init__(
        self, queries: NDArray[np.float64], *, k: int, metric: Metric, num_rows: int, owners: Owners | None
    ) -> None:
        self._queries, self._k, self._metric, self._owners = queries, k, metric, owners
        self._keys = np.full((len(queries), k), -np.inf)
        self._rows = np.full((len(queries), k), num_rows, dtype=np.int64)
        self._num_rows = num_rows
        self._center: NDArray[np.float64] | None = None

    def take(self, first: int, block: NDArray[np.float64]) -> None:
        """Look at the rows of a block."""
        usable = usable_rows(block, allow_zero=self._metric != "cosine")
        rows = first + np.flatnonzero(usable)
        if not len(rows):
            return
        block = _prepared(block if usable.all() else block[usable], self._metric)
        query_of, row_of = np.nonzero(self._can_be_near(block, rows))
        step = max(1, _PAIR_VALUES // block.shape[1])
        for start in range(0, len(query_of), step):
            pairs_of, pairs_at = query_of[start : start + step], row_of[start : start + step]
            self._merge(pairs_of, rows[pairs_at], self._exact_keys(pairs_of, block, pairs_at))

    def _can_be_near(self, block: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which pairs may be among the best: bool, ``(Q, B)``.

        Vectors of a language model share a large part; it is taken out before rounding to float32, where it
        would hide what distinguishes rows. What is taken out is the same for all rows, so it changes no
        order.
        """
        if self._center is None:
            self._center = block.mean(axis=0)
        moved = block - self._center
        queries = self._queries - self._center if self._metric == "euclidean" else self._queries
        lengths, query_lengths = (np.sqrt((v * v).sum(axis=1)) for v in (moved, queries))
        approximate = queries.astype(np.float32) @ moved.astype(np.float32).T
        slack = (block.shape[1] + 8) * _UNIT_ROUNDOFF * query_lengths * lengths.max()
        if self._metric == "euclidean":
            approximate *= 2
            approximate -= (lengths * lengths).astype(np.float32)
            offset = -(query_lengths * query_lengths)
            slack = 2 * slack + 8 * _UNIT_ROUNDOFF * (lengths.max() ** 2)
        else:
            offset = queries @ self._center
        # of sums in float64, which the pairs' own scores are compared with
        slack += 1e-13 * (np.abs(offset) + query_lengths * (lengths.max() + np.abs(self._center).max()))
        if self._owners is not None:
            approximate[self._owners.queries[:, None] == self._owners.rows[rows][None, :]] = -np.inf
        least = self._keys[:, -1] - offset - slack
        if approximate.shape[1] >= self._k and np.isneginf(least).any():
            kth = np.partition(approximate, -self._k, axis=1)[:, -self._k].astype(np.float64)
            least = np.maximum(least, kth - 2 * slack)
        found: NDArray[np.bool_] = approximate >= _rounded_down(least)[:, None]
        return found & (approximate > -np.inf) if self._owners is not None else found

    def _exact_keys(
        self, query_of: NDArray[np.intp], block: NDArray[np.float64], at: NDArray[np.intp]
    ) -> NDArray[np.float64]:
        """Score pairs in float64, higher is closer: ``(P,)``."""
        queries, rows = self._queries[query_of], block[at]
        if self._metric == "euclidean":
            difference = queries - rows
            return -(difference * difference).sum(axis=1)  # type: ignore[no-any-return]
        return (queries * rows).sum(axis=1)  # type: ignore[no-any-return]

    def _merge(self, query_of: NDArray[np.intp], rows: NDArray[np.int64], keys: NDArray[np.float64]) -> None:
        """Keep the best of what is there and what is new; of equal ones, the first rows."""
        touched = np.unique(query_of)
        owner = np.concatenate([np.repeat(touched, self._k), query_of])
        all_keys = np.concatenate([self._keys[touched].ravel(), keys])
        all_rows = np.concatenate([self._rows[touched].ravel(), rows])
        order = np.lexsort((all_rows, -all_keys, owner))
        starts = np.searchsorted(owner[order], touched)
        best = order[starts[:, None] + np.arange(self._k)]
        self._keys[touched], self._rows[touched] = all_keys[best], all_rows[best]

    def neighbors(self) -> Neighbors:
        """Return what was found."""
        is_there = self._rows < self._num_rows
        scores = np.where(is_there, keys_to_scores(self._keys, self._metric), np.nan)
        return Neighbors(np.where(is_there, self._rows, NO_ROW), scores)


def keys_to_scores(keys: NDArray[np.float64], metric: Metric) -> NDArray[np.float64]:
    """Turn what is ranked by into what is shown.

    Example:
        >>> keys_to_scores(np.array([-9.0]), "euclidean").tolist()
        [3.0]
    """
    if metric == "euclidean":
        return np.sqrt(np.maximum(-keys, 0))
    return np.clip(keys, -1, 1) if metric == "cosine" else keys


def _rounded_down(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Round to float32, never up."""
    rounded = values.astype(np.float32)
    lower: NDArray[np.float32] = np.nextafter(rounded, np.float32(-np.inf))
    return np.where(np.isfinite(rounded), lower, rounded)
