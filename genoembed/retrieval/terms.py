"""Lexical terms of DNA: hashed canonical k-mers, and the token that carries each.

Single letters have no lexical power; k-mers do. A k-mer and its reverse complement are one term, so that a
sequence and its other strand have the same terms. A k-mer with an ambiguous letter is no term, and neither is
a special token. The term of a k-mer belongs to the token of its last base: a causal model has seen all of the
k-mer there, and no earlier.

L bases, B rows, T terms of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from genoembed.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor


NO_TERM = -1
"""Where there is no term."""

_CODES = np.full(256, -1, dtype=np.int64)
for _letters, _code in ((b"Aa", 0), (b"Cc", 1), (b"Gg", 2), (b"TtUu", 3)):
    _CODES[list(_letters)] = _code
_MAX_K = 31  # 2 bits a base in an int64 with its sign


@dataclass(frozen=True, kw_only=True, slots=True)
class KmerTerms:
    """Which k-mers are terms, and how they are numbered."""

    k: int = 9
    """Bases of a term, 1 to 31; an odd number, so that no k-mer is its own reverse complement."""
    num_terms: int = 2**18
    """Terms are numbered from 0 to this. With 4^k of them or more no two k-mers share a number."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value!r}; set {name} to {least} or more{unit}"
            for name, value, least, unit in (("k", self.k, 1, " bases"), ("num_terms", self.num_terms, 2, ""))
            if isinstance(value, bool) or not isinstance(value, int) or value < least
        ]
        if not problems and self.k > _MAX_K:
            problems.append(f"k is {self.k}; set k to {_MAX_K} bases or less")
        if problems:
            raise ConfigError(*problems)

    def of(self, sequence: bytes) -> NDArray[np.int64]:
        """Number the k-mer that ends at each base.

        Args:
            sequence: Letters, one byte a base; U is T, and case does not count.

        Returns:
            Terms, ``NO_TERM`` at the first ``k - 1`` bases and for k-mers with another letter. int64,
            shape ``(len(sequence),)``.

        Example:
            >>> KmerTerms(k=3).of(b"ACGT").tolist()
            [-1, -1, 6, 6]
            >>> KmerTerms(k=3).of(b"ACNGTT").tolist()
            [-1, -1, -1, -1, -1, 1]
        """
        codes = _CODES[np.frombuffer(sequence, dtype=np.uint8)]
        terms = np.full(len(codes), NO_TERM, dtype=np.int64)
        num_kmers = len(codes) - self.k + 1
        if num_kmers < 1:
            return terms
        forward = np.zeros(num_kmers, dtype=np.int64)
        backward = np.zeros(num_kmers, dtype=np.int64)
        is_term = np.ones(num_kmers, dtype=np.bool_)
        for offset in range(self.k):
            letters = codes[offset : offset + num_kmers]
            is_term &= letters >= 0
            # two bits per base, the other strand built from its other end: complement of code c is 3 - c
            forward = (forward << 2) | (letters & 3)
            backward |= (3 - (letters & 3)) << (2 * offset)
        numbered = self._number(np.minimum(forward, backward))
        terms[self.k - 1 :] = np.where(is_term, numbered, NO_TERM)
        return terms

    def _number(self, codes: NDArray[np.int64]) -> NDArray[np.int64]:
        if 4**self.k <= self.num_terms:
            return codes
        # the finalizer of splitmix64: every bit of the code moves every bit of the number
        mixed = codes.astype(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        return (mixed % np.uint64(self.num_terms)).astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTerms:
    """Terms of a padded batch, and which token carries each."""

    ids: Tensor
    """Terms, ``NO_TERM`` where a row has fewer. int64, ``(B, T)``."""
    positions: Tensor
    """Token of the row that carries the term, 0 where there is none. int64, ``(B, T)``."""

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.positions.shape:
            shapes = f"ids {tuple(self.ids.shape)} and positions {tuple(self.positions.shape)}"
            message = f"terms: {shapes}, expected (B, T) for both"
            raise ShapeError(message)

    def to(self, device: torch.device) -> TokenTerms:
        """Move to a device."""
        return TokenTerms(ids=self.ids.to(device), positions=self.positions.to(device))


def collate_terms(
    sequences: Sequence[bytes],
    kmers: KmerTerms,
    *,
    base_starts: Sequence[NDArray[np.int64] | None] | None = None,
) -> TokenTerms:
    """Stack the terms of several sequences.

    Args:
        sequences: Letters, one byte a base.
        kmers: Which k-mers are terms.
        base_starts: First base of each token of each sequence, -1 for special tokens, int64, shape ``(L,)``;
            None stands for one token per base.

    Returns:
        Terms, and the token that carries each.

    Raises:
        ShapeError: If there are not as many ``base_starts`` as sequences.

    Example:
        >>> terms = collate_terms([b"ACGT", b"NACG"], KmerTerms(k=3))
        >>> terms.ids.tolist(), terms.positions.tolist()
        ([[6, 6], [6, -1]], [[2, 3], [3, 0]])
    """
    starts = [None] * len(sequences) if base_starts is None else base_starts
    if len(starts) != len(sequences):
        message = f"base_starts: {len(starts)} for {len(sequences)} sequences, expected one for each"
        raise ShapeError(message)
    found = [kmers.of(sequence) for sequence in sequences]
    bases = [np.flatnonzero(terms != NO_TERM) for terms in found]
    width = max((len(where) for where in bases), default=0)
    ids = np.full((len(sequences), width), NO_TERM, dtype=np.int64)
    positions = np.zeros((len(sequences), width), dtype=np.int64)
    for row, (terms, where, start) in enumerate(zip(found, bases, starts, strict=True)):
        ids[row, : len(where)] = terms[where]
        positions[row, : len(where)] = where if start is None else _token_of(where, start)
    return TokenTerms(ids=torch.from_numpy(ids), positions=torch.from_numpy(positions))


def _token_of(bases: NDArray[np.intp], base_start: NDArray[np.int64]) -> NDArray[np.int64]:
    # the last token that starts at or before the base; special tokens start at -1
    tokens = np.flatnonzero(base_start >= 0)
    last = np.searchsorted(base_start[tokens], bases, side="right") - 1
    return tokens[np.maximum(last, 0)].astype(np.int64)
