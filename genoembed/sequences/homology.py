"""Which sequences are homologs: MinHash sketches of canonical k-mers, and clusters by sequence identity.

In: sequences. Out: sketches, identities of pairs, clusters. A sketch keeps the ``s`` smallest hashes of a
sequence's k-mers, strands counted as one (Mash: Ondov et al. 2016, Genome Biology 17:132). Two sketches are
compared where both are complete: below the largest hash of a sketch that left hashes out. There, the share
of the smaller one's k-mers that the other has too is the containment C, and C**(1/k) the identity of the
part they share if letters change independently (Hera, Pierce-Ward and Koslicki 2023, Genome Research
33:1061). So a fragment is a homolog of what it was cut from. k-mers with letters other than ACGT say nothing
and are left out, and so are microsatellites (poly-A, CACACA ...: units of up to six letters that fit three
times), which unrelated sequences share. A cluster holds sequences that are homologs directly or through
others.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from genoembed.errors import ConfigError, ShapeError
from genoembed.sequences import reverse_complement

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray


logger = logging.getLogger(__name__)

DEFAULT_KMER_SIZE = 16
"""As Mash's clustering of RefSeq: in sequences of up to a megabase, hardly a 16-mer is shared by chance."""
DEFAULT_SKETCH_SIZE = 400
"""As Mash's clustering of RefSeq; a sequence of up to 415 bases is kept whole."""
DEFAULT_IDENTITY = 0.8
"""The 80 % that families of repeats are defined by (Wicker et al. 2007, Nature Reviews Genetics 8:973)."""
MIN_SHARED = 2
"""k-mers that homologs share at least."""

_MAX_KMER_SIZE = 31
_MAX_PERIOD = 6
_ROW_BITS = 11
_CHUNK_BASES = 1 << 17
_PAIRS_AT_ONCE = 1 << _ROW_BITS
_ENTRIES_AT_ONCE = 1 << 15
_NUM_PARTNERS = 16
"""Partners tried for each k-mer of a sequence among all that have it."""

_CODES = np.full(256, 4, dtype=np.uint8)
for _code, _letters in enumerate((b"Aa", b"Cc", b"Gg", b"TtUu")):
    _CODES[list(_letters)] = _code


@dataclass(frozen=True, kw_only=True, slots=True)
class HomologyConfig:
    """What counts as a homolog."""

    kmer_size: int = DEFAULT_KMER_SIZE
    """Bases of a k-mer, 4 to 31."""
    sketch_size: int = DEFAULT_SKETCH_SIZE
    """Hashes kept of a sequence."""
    identity: float = DEFAULT_IDENTITY
    """Sequence identity from which two sequences are homologs, above 0, at most 1."""

    def __post_init__(self) -> None:
        problems = []
        if not 4 <= self.kmer_size <= _MAX_KMER_SIZE:
            problems.append(f"kmer_size is {self.kmer_size}; set kmer_size to 4 to {_MAX_KMER_SIZE}")
        if self.sketch_size < 1:
            problems.append(f"sketch_size is {self.sketch_size}; set sketch_size to 1 or more")
        if not 0 < self.identity <= 1:
            problems.append(f"identity is {self.identity}; set identity above 0, at most 1, such as 0.8")
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sketches:
    """Sketches of many sequences, end to end."""

    hashes: NDArray[np.uint64]
    """Ascending and distinct within a sequence."""
    offsets: NDArray[np.int64]
    """Those of sequence ``i`` are ``hashes[offsets[i]:offsets[i + 1]]``."""
    kmer_size: int
    sketch_size: int
    """A sequence with fewer hashes than this is kept whole."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, index: int) -> NDArray[np.uint64]:
        """Return the sketch of one sequence: ascending, distinct hashes."""
        return self.hashes[self.offsets[index] : self.offsets[index + 1]]


def build_sketches(sequences: Sequence[bytes], *, config: HomologyConfig | None = None) -> Sketches:
    """Sketch sequences.

    Example:
        >>> sketches = build_sketches([b"ACGTTGCAAC", b"GTTGCAACGT"], config=HomologyConfig(kmer_size=6))
        >>> sketches.of(0).tolist() == sketches.of(1).tolist(), len(sketches.of(0))
        (True, 4)
    """
    chosen = config or HomologyConfig()
    parts: list[NDArray[np.uint64]] = []
    lengths = np.zeros(len(sequences) + 1, dtype=np.int64)
    for first, chunk in _chunks(sequences):
        joined = b"N".join(chunk) + b"N"
        hashes, is_kept = _hash_kmers(joined, chosen.kmer_size)
        start = 0
        for index, sequence in enumerate(chunk, start=first):
            end = start + max(0, len(sequence) - chosen.kmer_size + 1)
            ordered = np.sort(hashes[start:end][is_kept[start:end]])
            is_new = np.ones(len(ordered), dtype=np.bool_)
            np.not_equal(ordered[1:], ordered[:-1], out=is_new[1:])
            smallest = ordered[is_new][: chosen.sketch_size]
            parts.append(smallest)
            lengths[index + 1] = len(smallest)
            start += len(sequence) + 1
    hashes_all = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)
    offsets = np.cumsum(lengths)
    return Sketches(
        hashes=hashes_all, offsets=offsets, kmer_size=chosen.kmer_size, sketch_size=chosen.sketch_size
    )


def _chunks(sequences: Sequence[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    chunk: list[bytes] = []
    size = first = 0
    for index, sequence in enumerate(sequences):
        chunk.append(sequence)
        size += len(sequence)
        if size >= _CHUNK_BASES:
            yield first, chunk
            chunk, size, first = [], 0, index + 1
    if chunk:
        yield first, chunk


def _hash_kmers(joined: bytes, k: int) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Hash the canonical k-mer at each position, and say which count."""
    codes = _CODES[np.frombuffer(joined, dtype=np.uint8)]
    size = max(0, len(codes) - k + 1)
    forward = np.zeros(size, dtype=np.uint64)
    reverse = np.zeros(size, dtype=np.uint64)
    for place in range(k):
        letters = (codes[place : place + size] & 3).astype(np.uint64)
        forward = (forward << np.uint64(2)) | letters
        reverse |= (np.uint64(3) - letters) << np.uint64(2 * place)
    # a k-mer with an unknown letter: the running count of those rises within it
    unknown = np.concatenate([[0], np.cumsum(codes == 4)])
    is_kept = unknown[k : k + size] == unknown[:size]
    # a k-mer is periodic if it equals itself shifted by the period, two bits a letter
    for period in range(1, min(_MAX_PERIOD, k // 3) + 1):
        mask = np.uint64((1 << 2 * (k - period)) - 1)
        is_kept &= (forward >> np.uint64(2 * period)) != (forward & mask)
    return mix(np.minimum(forward, reverse)), is_kept


def mix(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble integers with the finalizer of SplitMix64, a bijection: distinct k-mers never collide."""
    keys = keys + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def pair_containments(
    sketches: Sketches, left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the share of k-mers that pairs have in common, of those of the smaller one.

    0 where it is fewer than ``MIN_SHARED``, as by chance; NaN where one of the two has no k-mer.

    Example:
        >>> config = HomologyConfig(kmer_size=4)
        >>> sketches = build_sketches([b"ACGTTGCAAC", b"GCAACC", b"TTTT"], config=config)
        >>> pair_containments(sketches, np.array([0, 0]), np.array([1, 2])).tolist()
        [0.6666666666666666, nan]
    """
    shares = np.full(len(left), np.nan)
    for start in range(0, len(left), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        shared, smaller = _overlaps(sketches, left[part], right[part])
        is_enough = shared >= np.maximum(1, np.minimum(MIN_SHARED, smaller))
        containment = np.where(is_enough, shared / np.maximum(smaller, 1), 0.0)
        shares[part] = np.where(smaller > 0, containment, np.nan)
    return shares


def pair_identities(
    sketches: Sketches, left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Estimate the identities of pairs of sequences; 0 where nothing says that they are related."""
    return np.nan_to_num(pair_containments(sketches, left, right)) ** (1 / sketches.kmer_size)


def _overlaps(
    sketches: Sketches, left: NDArray[np.int64], right: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count hashes below the common bound: shared, and of the smaller side."""
    left_rows, left_hashes = _gather(sketches, left)
    right_rows, right_hashes = _gather(sketches, right)
    bound = np.minimum(_largest(sketches, left), _largest(sketches, right))
    counts = [
        np.bincount(rows[hashes <= bound[rows]], minlength=len(left))
        for rows, hashes in ((left_rows, left_hashes), (right_rows, right_hashes))
    ]
    keys = np.concatenate([_row_keys(left_rows, left_hashes), _row_keys(right_rows, right_hashes)])
    keys.sort(kind="stable")  # two ascending runs, which a merge sort joins in one pass
    shared = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(64 - _ROW_BITS)
    return np.bincount(shared.astype(np.int64), minlength=len(left)), np.minimum(*counts)


def _row_keys(rows: NDArray[np.int64], hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Pack row and hash into one integer; of the hash, 53 bits are enough to distinguish some hundred."""
    return (rows.astype(np.uint64) << np.uint64(64 - _ROW_BITS)) | (hashes >> np.uint64(_ROW_BITS))


def _gather(sketches: Sketches, wanted: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    starts, sizes = sketches.offsets[wanted], sketches.offsets[wanted + 1] - sketches.offsets[wanted]
    rows = np.repeat(np.arange(len(wanted)), sizes)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rows, sketches.hashes[np.repeat(starts, sizes) + within]


def _largest(sketches: Sketches, wanted: NDArray[np.int64]) -> NDArray[np.uint64]:
    starts, ends = sketches.offsets[wanted], sketches.offsets[wanted + 1]
    largest = np.full(len(wanted), np.iinfo(np.uint64).max, dtype=np.uint64)
    # only where hashes were left out: below its largest hash alone is such a sketch complete
    is_cut = ends - starts == sketches.sketch_size
    largest[is_cut] = sketches.hashes[ends[is_cut] - 1]
    return largest


@dataclass(frozen=True, kw_only=True, slots=True)
class Clusters:
    """Which sequences belong together."""

    labels: NDArray[np.int64]
    """Cluster of each sequence, numbered by first appearance. Shape ``(N,)``."""
    unsketched: int = 0
    """Sequences without a k-mer that counts (too short, or repeats only): homologs of equal ones only."""

    def __post_init__(self) -> None:
        if self.labels.ndim != 1:
            message = f"clusters: labels of shape {self.labels.shape}, expected one number per sequence"
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


def cluster_homologs(sequences: Sequence[bytes], *, config: HomologyConfig | None = None) -> Clusters:
    """Cluster sequences that are similar to one another, directly or through others.

    Example:
        >>> config = HomologyConfig(kmer_size=6)
        >>> related = [b"ACGTTGCAACGGAT", b"ATCCGTTGCAACGT", b"GGGTCTAGACTTCA", b"CGTTGCAACGGA"]
        >>> cluster_homologs(related, config=config).labels.tolist()
        [0, 0, 1, 0]
    """
    chosen = config or HomologyConfig()
    first_of: dict[bytes, int] = {}
    representative = np.array(
        [first_of.setdefault(strand_free(sequence), len(first_of)) for sequence in sequences], dtype=np.int64
    )
    sketches = build_sketches(list(first_of), config=chosen)
    labels = _number_by_appearance(_connect(sketches, chosen.identity)[representative])
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


def _connect(sketches: Sketches, identity: float) -> NDArray[np.int64]:
    """Compare sequences that share a hash, and number the connected components of homologs."""
    size = len(sketches)
    labels = np.arange(size)
    rejected: set[int] = set()
    for left, right in _candidates(sketches):
        # pairs that are connected already need no comparison: in a large family that is nearly all of them
        is_open = labels[left] != labels[right]
        low = np.minimum(left[is_open], right[is_open])
        high = np.maximum(left[is_open], right[is_open])
        keys = [key for key in np.unique(low * size + high).tolist() if key not in rejected]
        pairs = np.array(keys, dtype=np.int64)
        low, high = pairs // size, pairs % size
        is_homolog = pair_identities(sketches, low, high) >= identity
        rejected.update(pairs[~is_homolog].tolist())
        if is_homolog.any():
            edges = (labels[low[is_homolog]], labels[high[is_homolog]])
            graph = coo_array((np.ones(len(edges[0])), edges), shape=(size, size))
            labels = connected_components(graph, directed=False)[1].astype(np.int64)[labels]
    return labels


def _candidates(sketches: Sketches) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pair sequences that share a hash, some hashes at a time."""
    hashes, owners = _shared_entries(sketches)
    # parts overlap, so that the last entries of one meet all their partners too
    for start in range(0, len(hashes), _ENTRIES_AT_ONCE):
        part = hashes[start : start + _ENTRIES_AT_ONCE + _NUM_PARTNERS]
        owner = owners[start : start + _ENTRIES_AT_ONCE + _NUM_PARTNERS]
        for distance in range(1, min(_NUM_PARTNERS, len(part) - 1) + 1):
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
    # A k-mer of thousands would pair each sequence with the same few neighbors every time: shuffled for each
    # hash anew, the pairs tried differ, and all homologs of a large family get connected.
    crowded = np.flatnonzero(sizes > _NUM_PARTNERS + 1)
    shuffled = np.lexsort((mix(hashes[crowded] ^ mix(owners[crowded].astype(np.uint64))), hashes[crowded]))
    owners[crowded] = owners[crowded[shuffled]]
    return hashes, owners


def _number_by_appearance(roots: NDArray[np.int64]) -> NDArray[np.int64]:
    _, first, inverse = np.unique(roots, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]
