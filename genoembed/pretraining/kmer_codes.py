"""Codes of k-mers: one vector for each k-mer on either strand, whose means over bases tell sequences apart.

They are linear discriminants (Fisher 1936, Rao 1948): of the counts of canonical k-mers in pieces of a
corpus, the directions in which pieces differ much and a piece from a mutated copy of itself little. Each is
scaled so that copies differ by the same in all, times a small power of how much more pieces differ than
copies: directions that say more weigh more in a cosine. What layers learn is the codes turned at random,
so that every number holds a part of each direction. Standardized numbers, which most classifiers take, would
otherwise give the last direction the weight of the first.

N pieces, C canonical k-mers, W width of the codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from genoembed.errors import ConfigError, Problem, Remedy
from genoembed.training.augment import mutated_copy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from torch import Tensor

    from genoembed.training.start import TokenRules

_BASES = np.frombuffer(b"ACGT", dtype=np.uint8)
_NUMBER = np.full(256, -1, dtype=np.int64)
_NUMBER[_BASES] = np.arange(4)
_RIDGE = 0.1
"""Of the mean variance between copies, added to each direction: rare k-mers are known from few counts."""
_PIECES_BP = (150, 450)
_POWER = 0.25
"""Of the variance between pieces over that between copies; 0.15 to 0.25 found most mutated fragments."""
_LEAST_BP = 20
"""Shorter documents say too little."""


def canonical_numbers(k: int) -> NDArray[np.int64]:
    """Number k-mers so that both strands have one number.

    Returns:
        int64, shape ``(4**k,)``: by the code of a k-mer (A=0 to T=3, first base highest).

    Example:
        >>> canonical_numbers(2).tolist()  # AA AC AG AT CA ...
        [0, 1, 2, 3, 4, 5, 6, 2, 7, 8, 5, 1, 9, 7, 4, 0]
    """
    code = np.arange(4**k)
    reverse, rest = np.zeros_like(code), code.copy()
    for _ in range(k):
        reverse, rest = (reverse << 2) | (3 - (rest & 3)), rest >> 2
    return np.unique(np.minimum(code, reverse), return_inverse=True)[1].astype(np.int64)


def count_kmers(sequence: bytes, k: int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count canonical k-mers; those with other letters are left out.

    Example:
        >>> count_kmers(b"AACGN", 2, canonical_numbers(2)).tolist()
        [1, 1, 0, 0, 0, 0, 1, 0, 0, 0]
    """
    base = _NUMBER[np.frombuffer(sequence, dtype=np.uint8)]
    code = np.zeros(max(len(base) - k + 1, 0), dtype=np.int64)
    is_clean = np.ones(len(code), dtype=bool)
    for offset in range(k):
        here = base[offset : offset + len(code)]
        code, is_clean = (code << 2) | np.maximum(here, 0), is_clean & (here >= 0)
    return np.bincount(numbers[code[is_clean]], minlength=int(numbers.max()) + 1)


def discriminant_codes(
    documents: Iterable[bytes], *, k: int, width: int, seed: int = 0, pieces: int = 6000
) -> NDArray[np.float32]:
    """Make the codes of a corpus.

    Args:
        documents: Sequences; as many are read as are needed for the pieces.
        k: Length of the k-mers.
        width: Numbers of a code at most; there are no more than canonical k-mers.
        seed: Decides pieces and copies.
        pieces: How many pieces to look at, each with one copy.

    Returns:
        A vector of length 1 for each canonical k-mer, shape ``(C, W)``; their mean over the corpus is 0.

    Raises:
        ConfigError: If the corpus has too few k-mers to tell directions apart.

    Example:
        >>> codes = discriminant_codes([b"ACGGTTACCA" * 40, b"TTGACGATCA" * 40], k=2, width=4)
        >>> codes.shape, bool(np.allclose(np.linalg.norm(codes, axis=1), 1))
        ((10, 4), True)
    """
    rng = np.random.default_rng([seed, k])
    numbers = canonical_numbers(k)
    drawn = list(_pieces(documents, rng, pieces))
    if not drawn:
        message = f"kmer_codes: the corpus has no document of {_LEAST_BP} bases"
        raise ConfigError(Problem(message, Remedy("kmer_codes", 0), ", or give longer sequences"))
    counts_N2C = np.array([[count_kmers(view, k, numbers) for view in pair] for pair in drawn], dtype=float)
    shares_N2C = counts_N2C / np.maximum(counts_N2C.sum(axis=2, keepdims=True), 1)
    mean_C = shares_N2C.mean(axis=(0, 1))
    centered_MC = (shares_N2C - mean_C).reshape(-1, len(mean_C))
    between_CC = centered_MC.T @ centered_MC / len(centered_MC)
    change_NC = shares_N2C[:, 0] - shares_N2C[:, 1]
    within_CC = change_NC.T @ change_NC / (2 * len(change_NC))
    within_CC += np.eye(len(mean_C)) * max(np.trace(within_CC) / len(mean_C) * _RIDGE, 1e-12)
    # whitened by the copies, the directions of most difference between pieces are eigenvectors
    half_CC = np.linalg.inv(np.linalg.cholesky(within_CC))
    ratios_C, directions_CC = np.linalg.eigh(half_CC @ between_CC @ half_CC.T)
    weights_C = np.maximum(ratios_C, 1e-12) ** _POWER
    codes_CW = (half_CC.T @ directions_CC * weights_C)[:, ::-1][:, :width]
    for _ in range(_ROUNDS):
        codes_CW = codes_CW - mean_C @ codes_CW
        codes_CW /= np.maximum(np.linalg.norm(codes_CW, axis=1, keepdims=True), 1e-12)
    return codes_CW.astype(np.float32)


_ROUNDS = 5
"""Mean 0 and length 1 cannot be had at once; a few rounds bring both to within rounding."""


def _pieces(
    documents: Iterable[bytes], rng: np.random.Generator, wanted: int
) -> Iterable[tuple[bytes, bytes]]:
    found = 0
    for document in documents:
        # long documents give several, so that small corpora give some, too
        for _ in range(1 + len(document) // (4 * _PIECES_BP[1])):
            size = int(rng.integers(_PIECES_BP[0], _PIECES_BP[1] + 1))
            if len(document) < _LEAST_BP:
                break
            at = int(rng.integers(0, max(len(document) - size, 0) + 1))
            piece = document[at : at + size].upper()
            yield piece, mutated_copy(piece, rng)
            found += 1
            if found == wanted:
                return


class KmerCodes:
    """The loss of token states against codes."""

    def __init__(self, codes_CW: Tensor, rules: TokenRules, *, k: int) -> None:
        self.codes_CW, self._k = codes_CW, k
        self._turned: dict[int, Tensor] = {}
        self._numbers = torch.from_numpy(canonical_numbers(k))
        ids = [int(i) for i in rules.encode(b"ACGT")]
        if len(set(ids)) != 4 or list(map(int, rules.encode(b"TTGCA"))) != [ids[i] for i in (3, 3, 2, 1, 0)]:
            message = "kmer_codes: the tokenizer has no token for each base"
            raise ConfigError(Problem(message, Remedy("kmer_codes", 0), ", or go on from another model"))
        self._bases = torch.full((max(ids) + 2,), -1)
        self._bases[ids] = torch.arange(4)

    def loss(self, states_BLD: Tensor, ids_BL: Tensor) -> Tensor:
        """Return 1 - cosine of states and codes, averaged over tokens at which a k-mer ends.

        Only the first W numbers of a state take part, less their mean over these tokens: with the large
        constant that states of language models have, the cosine would have no gradient. A state with less
        than W numbers learns the first directions.
        """
        bases_BL = self._bases.to(ids_BL.device)[ids_BL.clamp(max=len(self._bases) - 1)]
        kmers_BLK = bases_BL.unfold(1, self._k, 1)
        is_kmer_BL = (kmers_BLK >= 0).all(dim=-1)
        powers_K = 4 ** torch.arange(self._k - 1, -1, -1, device=ids_BL.device)
        numbers_N = self._numbers.to(ids_BL.device)[(kmers_BLK[is_kmer_BL] * powers_K).sum(dim=-1)]
        states_ND = states_BLD[:, self._k - 1 :][is_kmer_BL]
        if not len(states_ND):
            return states_BLD.sum() * 0
        codes_CW = self.targets(states_ND.shape[1]).to(states_ND.device)
        states_NW = states_ND[:, : codes_CW.shape[1]]
        varying_NW = states_NW - states_NW.mean(dim=0)
        return 1 - F.cosine_similarity(varying_NW, codes_CW[numbers_N], dim=1).mean()

    def targets(self, width: int) -> Tensor:
        """Return the first numbers of all codes, turned at random, shape ``(C, min(width, W))``."""
        width = min(width, self.codes_CW.shape[1])
        if width not in self._turned:
            normal_WW = np.random.default_rng(width).standard_normal((width, width))
            turn_WW = torch.from_numpy(np.linalg.qr(normal_WW)[0]).to(self.codes_CW.dtype)
            self._turned[width] = self.codes_CW[:, :width] @ turn_WW
        return self._turned[width]
