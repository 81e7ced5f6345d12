"""Search by shared k-mers, alone or beside vectors, and what sequences of hits have in common.

In: sequences of queries and of rows, read again from their files as they stream by. Out: neighbors, scores.
No model is needed, and nothing is learned.

Rows are ranked by the Jaccard index of the sets of canonical k-mers of both sequences (a k-mer and its
reverse complement are one), the quantity that Mash estimates (Ondov et al. 2016, Genome Biology 17:132).
Counts are whole numbers, so results do not depend on blocks or order. Short k-mers find more distant
relatives, and more by chance; beside each hit stands what longer ones say, of which hardly one is shared by
chance.

Q queries, S rows of a block, k neighbors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genoembed.searching.neighbors import NO_ROW, Neighbors, Owners
from genoembed.sequences.homology import (
    DEFAULT_KMER_SIZE,
    MIN_SHARED,
    HomologyConfig,
    Sketches,
    build_sketches,
    pair_containments,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

_WHOLE = np.iinfo(np.int64).max
"""Size of a sketch that leaves nothing out."""
_BLOCK_BASES = 1 << 22
_BLOCK_PAIRS = 1 << 22
_MATCHES_AT_ONCE = 1 << 22
_DECIMALS = 10
"""Sums of scores are rounded: products of matrices differ in their last bits from block to block."""


class KmerIndex:
    """The k-mers of some queries, and which queries have each."""

    def __init__(self, sequences: Sequence[bytes], kmer_size: int) -> None:
        self._config = HomologyConfig(kmer_size=kmer_size, sketch_size=_WHOLE)
        sketches = build_sketches(sequences, config=self._config)
        self._sizes = np.diff(sketches.offsets)
        owners = np.repeat(np.arange(len(sequences)), self._sizes)
        order = np.argsort(sketches.hashes, kind="stable")
        self._owners = owners[order]
        self._hashes, self._starts, self._counts = np.unique(
            sketches.hashes[order], return_index=True, return_counts=True
        )

    def __len__(self) -> int:
        return len(self._sizes)

    def jaccard(self, sequences: Sequence[bytes]) -> NDArray[np.float64]:
        """Return the share of k-mers in common of each sequence and each query: ``(S, Q)``.

        Example:
            >>> KmerIndex([b"ACGTTG", b"GGGGGC"], 4).jaccard([b"CAACGT", b"ACGT"]).round(3).tolist()
            [[1.0, 0.0], [0.333, 0.0]]
        """
        sketches = build_sketches(sequences, config=self._config)
        shared = self._count_shared(sketches)
        either = np.diff(sketches.offsets)[:, None] + self._sizes - shared
        return shared / np.maximum(either, 1)

    def _count_shared(self, sketches: Sketches) -> NDArray[np.int64]:
        num_queries = len(self)
        total = np.zeros(len(sketches) * num_queries, dtype=np.int64)
        if not len(self._hashes):
            return total.reshape(len(sketches), num_queries)
        places = np.minimum(np.searchsorted(self._hashes, sketches.hashes), len(self._hashes) - 1)
        is_known = self._hashes[places] == sketches.hashes
        rows = np.repeat(np.arange(len(sketches)), np.diff(sketches.offsets))[is_known]
        places = places[is_known]
        counts = self._counts[places]
        ends = np.cumsum(counts)
        # a k-mer that many queries have gives as many matches: some k-mers at a time
        for start, stop in _slices(ends):
            number = counts[start:stop]
            within = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
            queries = self._owners[np.repeat(self._starts[places[start:stop]], number) + within]
            pairs = np.repeat(rows[start:stop], number) * num_queries + queries
            total += np.bincount(pairs, minlength=len(total))
        return total.reshape(len(sketches), num_queries)


def _slices(ends: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _MATCHES_AT_ONCE, side="right")))
        yield start, stop
        start = stop


class HybridTerms(NamedTuple):
    """How cosines join shares of k-mers."""

    cosines: Callable[[NDArray[np.int64]], NDArray[np.float64]]
    """Of some rows with all queries, ``(S, Q)``; NaN where there is no vector."""
    dense: float
    """Weight of the cosine."""
    sparse: float
    """Weight of the share of k-mers."""


class KmerNeighbors(NamedTuple):
    """What was found by k-mers, and its parts."""

    neighbors: Neighbors
    shares: NDArray[np.float64]
    """Share of k-mers of each hit, ``(Q, k)``."""
    cosines: NDArray[np.float64]
    """Cosine of each hit, ``(Q, k)``; NaN without vectors."""


def kmer_neighbors(
    queries: KmerIndex,
    rows: Iterable[tuple[int, bytes]],
    *,
    k: int,
    owners: Owners | None = None,
    hybrid: HybridTerms | None = None,
    block_bases: int = _BLOCK_BASES,
) -> KmerNeighbors:
    """Find the rows with the highest score for each query; equal scores in the order of the rows.

    Without vectors, rows that share no k-mer are nobody's neighbors.

    Example:
        >>> found = kmer_neighbors(KmerIndex([b"ACGTTG"], 4), [(0, b"GGGGGC"), (1, b"CAACGT")], k=2)
        >>> found.neighbors.rows.tolist(), found.neighbors.scores.tolist()
        ([[1, -1]], [[1.0, nan]])
    """
    # score, row, share and cosine of the best so far: (Q, k)
    shape = (len(queries), k)
    best = [np.full(shape, -np.inf), np.full(shape, NO_ROW, np.int64), *np.full((2, *shape), np.nan)]
    for numbers, sequences in _row_blocks(rows, block_bases, max(1, _BLOCK_PAIRS // max(1, len(queries)))):
        shares = queries.jaccard(sequences).T
        cosines = np.full(shares.shape, np.nan) if hybrid is None else hybrid.cosines(numbers).T
        if hybrid is None:
            scores = np.where(shares > 0, shares, -np.inf)
        else:
            total = np.round(hybrid.dense * cosines + hybrid.sparse * shares, _DECIMALS)
            scores = np.where(np.isfinite(total), total, -np.inf)
        if owners is not None:
            scores[owners.queries[:, None] == owners.rows[numbers][None, :]] = -np.inf
        new = (scores, np.broadcast_to(numbers, scores.shape), shares, cosines)
        both = [np.concatenate(pair, axis=1) for pair in zip(best, new, strict=True)]
        order = np.lexsort((both[1], -both[0]), axis=1)[:, :k]
        best = [np.take_along_axis(values, order, axis=1) for values in both]
    is_found = best[0] > -np.inf
    scores, shares, cosines = (np.where(is_found, best[part], np.nan) for part in (0, 2, 3))
    return KmerNeighbors(Neighbors(np.where(is_found, best[1], NO_ROW), scores), shares, cosines)


def _row_blocks(
    rows: Iterable[tuple[int, bytes]], bases: int, most: int
) -> Iterator[tuple[NDArray[np.int64], list[bytes]]]:
    numbers: list[int] = []
    sequences: list[bytes] = []
    size = 0
    for number, sequence in rows:
        numbers.append(number)
        sequences.append(sequence)
        size += len(sequence)
        if size >= bases or len(numbers) >= most:
            yield np.array(numbers, dtype=np.int64), sequences
            numbers, sequences, size = [], [], 0
    if numbers:
        yield np.array(numbers, dtype=np.int64), sequences


# -------------------------------------------------------------------------------- what hits have in common

SKETCH_SIZE = 10_000
"""k-mers compared of two long sequences: of up to 10 kb all of them."""
_EXACT_RATIO = 10
"""Of sequences that differ more in length, all k-mers are compared."""
_PAIRS_AT_ONCE = 128
_SKETCHED_BASES = 1 << 24


class Likeness(NamedTuple):
    """What the sequences of hits have in common, ``(Q, k)``; NaN where it cannot be said."""

    shared_kmers: NDArray[np.float64]
    """Share of the canonical 16-mers of the one that has fewer which the other has, too."""
    identity: NDArray[np.float64]
    """Estimate of the sequence identity of what they share; NaN where they share nothing."""


def no_likeness(found: Neighbors) -> Likeness:
    """Return that nothing can be said."""
    return Likeness(np.full(found.rows.shape, np.nan), np.full(found.rows.shape, np.nan))


def measure_likeness(found: Neighbors, queries: Sequence[bytes], subjects: Mapping[int, bytes]) -> Likeness:
    """Compare each query with the rows that were found for it, by k-mers that chance hardly repeats.

    The share C of the k-mers of the smaller sequence gives the identity ``C**(1/k)``: that of Mash Screen
    (Ondov et al. 2019, Genome Biology 20:232). Mash's distance ``-ln(2j/(1+j))/k`` is the same to first order
    where both have equally many k-mers, but calls a fragment unlike the sequence it was cut from.

    Example:
        >>> sequence = bytes(np.random.default_rng(0).choice(list(b"ACGT"), 60).astype(np.uint8))
        >>> found = Neighbors(np.array([[0, 1]]), np.zeros((1, 2)))
        >>> measure_likeness(found, [sequence], {0: sequence[10:40], 1: sequence[::-1]})
        Likeness(shared_kmers=array([[1., 0.]]), identity=array([[ 1., nan]]))
    """
    shares = np.full(found.rows.shape, np.nan)
    asked, places = np.nonzero(found.rows != NO_ROW)
    rows = found.rows[asked, places]
    config = HomologyConfig(kmer_size=DEFAULT_KMER_SIZE, sketch_size=_WHOLE)
    for start, stop in _pair_slices(asked, rows, queries, subjects):
        mine, mine_of = np.unique(asked[start:stop], return_inverse=True)
        theirs, theirs_of = np.unique(rows[start:stop], return_inverse=True)
        whole = build_sketches(
            [*(queries[query] for query in mine), *(subjects[row] for row in theirs)], config=config
        )
        sketches = _cut(whole)
        for first in range(0, stop - start, _PAIRS_AT_ONCE):
            part = slice(first, first + _PAIRS_AT_ONCE)
            shares[asked[start:stop][part], places[start:stop][part]] = _containments(
                whole, sketches, mine_of[part], len(mine) + theirs_of[part]
            )
    return Likeness(shares, np.where(shares > 0, shares, np.nan) ** (1 / DEFAULT_KMER_SIZE))


def _cut(whole: Sketches) -> Sketches:
    """Keep the smallest hashes of each sequence."""
    sizes = np.minimum(np.diff(whole.offsets), SKETCH_SIZE)
    parts = [whole.of(index)[:size] for index, size in enumerate(sizes)]
    return Sketches(
        hashes=np.concatenate(parts),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        kmer_size=whole.kmer_size,
        sketch_size=SKETCH_SIZE,
    )


def _containments(
    whole: Sketches, sketches: Sketches, left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the share of k-mers in common, exact where one has far fewer: a sample of them may be empty."""
    shares = pair_containments(sketches, left, right)
    sizes = np.diff(whole.offsets)
    small, large = np.minimum(sizes[left], sizes[right]), np.maximum(sizes[left], sizes[right])
    is_exact = (large >= SKETCH_SIZE) & ((small < SKETCH_SIZE) | (small < large / _EXACT_RATIO)) & (small > 0)
    for pair in np.flatnonzero(is_exact):
        few, many = sorted((whole.of(left[pair]), whole.of(right[pair])), key=len)
        places = np.minimum(np.searchsorted(many, few), len(many) - 1)
        shared = int(np.count_nonzero(many[places] == few))
        shares[pair] = shared / len(few) if shared >= min(MIN_SHARED, len(few)) else 0.0
    return shares


def _pair_slices(
    asked: NDArray[np.intp], rows: NDArray[np.int64], queries: Sequence[bytes], subjects: Mapping[int, bytes]
) -> Iterator[tuple[int, int]]:
    """Divide pairs so that the sequences of each part, sketched together, fit into memory."""
    start, size = 0, 0
    seen: set[tuple[bool, int]] = set()
    for place, (query, row) in enumerate(zip(asked.tolist(), rows.tolist(), strict=True)):
        for key, sequence in (((False, query), queries[query]), ((True, row), subjects[row])):
            if key not in seen:
                seen.add(key)
                size += len(sequence)
        if size >= _SKETCHED_BASES:
            yield start, place + 1
            start, size, seen = place + 1, 0, set()
    if start < len(asked):
        yield start, len(asked)
