"""Features that need no model: what an embedding has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from genoembed.errors import ConfigError, EmptyRecordError, SequenceLengthError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray


_UNKNOWN = 4
_CODES = np.full(256, _UNKNOWN, dtype=np.uint8)
for _letters in (b"ACGT", b"acgt", b"ACGU", b"acgu"):
    _CODES[np.frombuffer(_letters, dtype=np.uint8)] = np.arange(4)
_MAX_K = 8
_LONGEST_ONE_HOT = 4**6 // 4
"""Letters up to which one-hot features are no wider than counts of 6-mers."""


def composition(sequences: Sequence[bytes]) -> NDArray[np.float32]:
    """Describe each sequence by its share of G and C and its length.

    Example:
        >>> composition([b"ACGG"]).round(3).tolist()
        [[0.75, 1.3860000371932983]]
    """
    rows = np.zeros((len(sequences), 2), dtype=np.float32)
    for row, codes in enumerate(_encode(sequences)):
        known = codes[codes != _UNKNOWN]
        rows[row] = ((known == 1) | (known == 2)).sum() / max(len(known), 1), np.log(len(codes))
    return rows


def kmer_frequencies(sequences: Sequence[bytes], *, k: int) -> NDArray[np.float32]:
    """Count the overlapping k-mers of each sequence, on the strand as given.

    k-mers with letters other than A, C, G, T and U are left out.

    Example:
        >>> kmer_frequencies([b"AAC", b"ANC"], k=2)[:, :3].tolist()
        [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    """
    if not 1 <= k <= _MAX_K:
        message = f"k: {k}, expected 1 to {_MAX_K}; set k to one of them"
        raise ConfigError(message)
    rows = np.zeros((len(sequences), 4**k), dtype=np.float32)
    for row, codes in enumerate(_encode(sequences)):
        if len(codes) < k:
            continue
        pieces = np.lib.stride_tricks.sliding_window_view(codes, k)
        known = pieces[(pieces != _UNKNOWN).all(axis=1)].astype(np.int64)
        numbers = known @ (4 ** np.arange(k)[::-1])
        rows[row] = np.bincount(numbers, minlength=4**k) / max(len(numbers), 1)
    return rows


def one_hot(sequences: Sequence[bytes]) -> NDArray[np.float32]:
    """Mark which of A, C, G and T stands at each position.

    Example:
        >>> one_hot([b"AT"]).tolist()
        [[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]
    """
    codes = _encode(sequences)
    if len(lengths := {len(row) for row in codes}) > 1:
        problem = (
            f"one_hot: lengths from {min(lengths)} to {max(lengths)}, expected one length; leave one_hot out"
        )
        raise SequenceLengthError(problem)
    letters = np.eye(5, 4, dtype=np.float32)
    return letters[np.stack(codes)].reshape(len(codes), -1) if codes else np.zeros((0, 0), dtype=np.float32)


BASELINES: Mapping[str, Callable[[Sequence[bytes]], NDArray[np.float32]]] = {
    "GC content and length": composition,
    "4-mer counts": lambda sequences: kmer_frequencies(sequences, k=4),
    "6-mer counts": lambda sequences: kmer_frequencies(sequences, k=6),
    "one-hot letters": one_hot,
}


def usable_baselines(sequences: Sequence[bytes]) -> tuple[str, ...]:
    """List the baselines that fit some sequences: one-hot letters need one length, and not a long one.

    Example:
        >>> usable_baselines([b"ACGT", b"GGGG"])[-1], usable_baselines([b"ACGT", b"GGG"])[-1]
        ('one-hot letters', '6-mer counts')
    """
    lengths = {len(sequence) for sequence in sequences}
    has_one_hot = len(lengths) == 1 and max(lengths) <= _LONGEST_ONE_HOT
    return tuple(BASELINES)[: None if has_one_hot else -1]


def _encode(sequences: Sequence[bytes]) -> list[NDArray[np.uint8]]:
    for row, sequence in enumerate(sequences):
        if not sequence:
            problem = f"sequence {row}: no letters, expected at least one; leave it out"
            raise EmptyRecordError(problem)
    return [_CODES[np.frombuffer(sequence, dtype=np.uint8)] for sequence in sequences]
