"""Clusters of kin: sequences that resemble one another, directly or through others.

In: sequences. Out: one cluster number each. Sequences that are equal, on one strand or the other, are one
cluster; beyond that, sequences that share a k-mer of their sketches are compared, and joined if their
identity is high enough (single linkage, by union-find). A k-mer that many sequences have does not compare
them all: each meets ``_NEIGHBOURS`` others, in an order that differs from k-mer to k-mer.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from genoembed.errors import ShapeError
from genoembed.sequences import reverse_complement
from genoembed.training.sketches import KinshipConfig, Sketches, build_sketches, mix, pair_identities

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_NEIGHBOURS = 16
"""Partners tried for each k-mer of a sequence among all that have it."""
_ENTRIES_AT_ONCE = 1 << 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Clusters:
    """Which sequences belong together."""

    labels: NDArray[np.int64]
    """Cluster of each sequence, numbered by first appearance. Shape ``(N,)``."""
    unsketched: int = 0
    """Sequences without a k-mer that counts (too short, or repeats only): kin to their equals alone."""

    def __post_init__(self) -> None:
        if self.labels.ndim != 1:
            message = f"clusters: labels of shape {self.labels.shape}, expected one number a sequence"
            raise ShapeError(message)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Sequences of each cluster. Shape ``(num_clusters,)``."""
        return np.bincount(self.labels)

    def members(self) -> list[NDArray[np.int64]]:
        """List the sequences of each cluster, in input order."""
        order = np.argsort(self.labels, kind="stable")
        return np.split(order, np.cumsum(self.sizes)[:-1]) if len(order) else []


def strand_free(sequence: bytes) -> bytes:
    """Spell a sequence the same on either strand: the one that sorts first, in upper case.

    Example:
        >>> strand_free(b"ttg"), strand_free(b"CAA")
        (b'CAA', b'CAA')
    """
    forward = sequence.upper()
    return min(forward, reverse_complement(forward))


def cluster_kin(sequences: Sequence[bytes], *, config: KinshipConfig | None = None) -> Clusters:
    """Put sequences that resemble one another, directly or through others, into one cluster.

    Example:
        >>> config = KinshipConfig(kmer_size=6)
        >>> kin = [b"ACGTTGCAACGGAT", b"ATCCGTTGCAACGT", b"GGGTCTAGACTTCA", b"CGTTGCAACGGA"]
        >>> cluster_kin(kin, config=config).labels.tolist()
        [0, 0, 1, 0]
    """
    chosen = config or KinshipConfig()
    first_of: dict[bytes, int] = {}
    representative = np.array(
        [first_of.setdefault(strand_free(sequence), len(first_of)) for sequence in sequences], dtype=np.int64
    )
    sketches = build_sketches(list(first_of), config=chosen)
    forest = _Forest(len(first_of))
    _join_kin(sketches, forest, chosen.identity)
    labels = _number_by_appearance(forest.roots()[representative])
    is_empty = np.diff(sketches.offsets) == 0
    clusters = Clusters(labels=labels, unsketched=int(is_empty[representative].sum()) if len(labels) else 0)
    logger.info(
        "%d sequences are %d distinct ones (strands count as one) in %d clusters at identity %s; %d too "
        "short or too repetitive to compare",
        len(sequences),
        len(first_of),
        len(clusters.sizes),
        chosen.identity,
        clusters.unsketched,
    )
    return clusters


class _Forest:
    """Union-find over numbers."""

    def __init__(self, size: int) -> None:
        self._parents = np.arange(size, dtype=np.int64)

    def roots(self) -> NDArray[np.int64]:
        """Give the root of every number."""
        parents = self._parents
        while True:
            above = parents[parents]
            if (above == parents).all():
                break
            parents = above
        self._parents = parents
        return parents.copy()

    def join(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
        """Make one tree of the trees of each pair."""
        parents = self._parents
        for one, other in zip(left.tolist(), right.tolist(), strict=True):
            a, b = _root(parents, one), _root(parents, other)
            parents[max(a, b)] = min(a, b)


def _root(parents: NDArray[np.int64], node: int) -> int:
    while (above := int(parents[node])) != node:
        parents[node] = parents[above]
        node = above
    return node


def _join_kin(sketches: Sketches, forest: _Forest, identity: float) -> None:
    unlike: set[int] = set()
    size = len(sketches)
    for left, right in _candidates(sketches):
        roots = forest.roots()
        is_open = roots[left] != roots[right]
        low = np.minimum(left[is_open], right[is_open])
        high = np.maximum(left[is_open], right[is_open])
        keys = [key for key in np.unique(low * size + high).tolist() if key not in unlike]
        if not keys:
            continue
        pairs = np.array(keys, dtype=np.int64)
        low, high = pairs // size, pairs % size
        is_kin = pair_identities(sketches, low, high) >= identity
        forest.join(low[is_kin], high[is_kin])
        unlike.update(pairs[~is_kin].tolist())


def _candidates(sketches: Sketches) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pair sequences that share a hash, some hashes at a time."""
    hashes, owners = _shared_entries(sketches)
    for start in range(0, len(hashes), _ENTRIES_AT_ONCE):
        part = hashes[start : start + _ENTRIES_AT_ONCE + _NEIGHBOURS]
        owner = owners[start : start + _ENTRIES_AT_ONCE + _NEIGHBOURS]
        for distance in range(1, min(_NEIGHBOURS, len(part) - 1) + 1):
            is_same = part[distance:] == part[:-distance]
            if not is_same.any():
                break
            yield owner[:-distance][is_same], owner[distance:][is_same]


def _shared_entries(sketches: Sketches) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Sort all hashes that several sequences have; those of many, in an order of their own for each hash."""
    owners = np.repeat(np.arange(len(sketches), dtype=np.int64), np.diff(sketches.offsets))
    order = np.argsort(sketches.hashes, kind="stable")
    hashes = sketches.hashes[order]
    follows = np.zeros(len(hashes), dtype=np.bool_)
    np.equal(hashes[1:], hashes[:-1], out=follows[1:])
    is_shared = follows.copy()
    is_shared[:-1] |= follows[1:]
    hashes, owners = hashes[is_shared], owners[order[is_shared]]
    run = np.cumsum(~follows[is_shared]) - 1
    sizes = np.bincount(run)[run] if len(run) else np.zeros(0, np.int64)
    crowded = np.flatnonzero(sizes > _NEIGHBOURS + 1)
    shuffled = np.lexsort((mix(hashes[crowded] ^ mix(owners[crowded].astype(np.uint64))), hashes[crowded]))
    owners[crowded] = owners[crowded[shuffled]]
    return hashes, owners


def _number_by_appearance(roots: NDArray[np.int64]) -> NDArray[np.int64]:
    _, first, inverse = np.unique(roots, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]
