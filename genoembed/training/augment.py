"""Other views of a sequence for training: its reverse complement, a crop of it, a mutated copy.

In: a sequence, the labels of its bases where it has them, and a NumPy generator. Out: an
:class:`Augmented` of both. All functions are pure: the same generator state gives the same view, and labels
of bases follow their bases through crops and strands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genoembed.errors import ShapeError
from genoembed.sequences import reverse_complement

if TYPE_CHECKING:
    from genoembed.config.labeled import AugmentConfig

_BASES = np.frombuffer(b"ACGT", dtype=np.uint8)
_INDEX = np.full(256, 4, dtype=np.uint8)
_INDEX[_BASES] = _INDEX[_BASES + 32] = np.arange(4)


class Augmented(NamedTuple):
    """A sequence, and the labels of its bases where it has them."""

    sequence: bytes
    token_labels: tuple[str | None, ...] | None = None


def augmentation_rng(*, seed: int, epoch: int, row: int) -> np.random.Generator:
    """Build the generator of one row in one epoch.

    It depends on nothing else, so the order of rows, the number of worker processes and a resumed run change
    no view.

    Example:
        >>> a, b = (augmentation_rng(seed=1, epoch=0, row=7) for _ in range(2))
        >>> bool(a.random() == b.random())
        True
    """
    return np.random.default_rng([seed, epoch, row])


def augment(view: Augmented, rng: np.random.Generator, *, config: AugmentConfig) -> Augmented:
    """Crop, mutate and turn a sequence, as configured and in this order."""
    view = random_crop(view, rng, min_fraction=config.crop_fraction, max_bp=config.max_crop_bp)
    view = point_mutations(view, rng, rate=config.mutation_rate)
    return random_strand(view, rng, probability=config.reverse_complement)


def random_strand(view: Augmented, rng: np.random.Generator, *, probability: float) -> Augmented:
    """Read the other strand with some probability; labels of bases turn with their bases.

    Example:
        >>> random_strand(Augmented(b"AAC", ("x", "y", "z")), np.random.default_rng(0), probability=1.0)
        Augmented(sequence=b'GTT', token_labels=('z', 'y', 'x'))
    """
    _check(view)
    if not rng.random() < probability:
        return view
    labels = view.token_labels
    return Augmented(reverse_complement(view.sequence), labels[::-1] if labels is not None else None)


def random_crop(
    view: Augmented, rng: np.random.Generator, *, min_fraction: float = 1.0, max_bp: int | None = None
) -> Augmented:
    """Take a piece of random length from a random place; labels of bases go with their bases.

    Example:
        >>> piece = random_crop(Augmented(b"AACCGGTT"), np.random.default_rng(0), min_fraction=0.5, max_bp=6)
        >>> 4 <= len(piece.sequence) <= 6, piece.sequence in b"AACCGGTT"
        (True, True)
    """
    _check(view)
    length = len(view.sequence)
    longest = length if max_bp is None else min(length, max_bp)
    # less a little, so that 0.7 of 10 bases is 7 and not, by rounding up 7.000000000000001, 8
    shortest = min(longest, max(1, int(np.ceil(length * min_fraction - 1e-9))))
    size = int(rng.integers(shortest, longest + 1))
    start = int(rng.integers(0, length - size + 1))
    labels = view.token_labels
    return Augmented(
        view.sequence[start : start + size], labels[start : start + size] if labels is not None else None
    )


def point_mutations(view: Augmented, rng: np.random.Generator, *, rate: float) -> Augmented:
    """Replace bases by others at a rate; labels of bases stay where they are.

    Example:
        >>> mutated = point_mutations(Augmented(b"AAAA"), np.random.default_rng(0), rate=1.0).sequence
        >>> len(mutated), b"A" in mutated
        (4, False)
    """
    _check(view)
    letters = np.frombuffer(view.sequence, dtype=np.uint8)
    index = _INDEX[letters]
    is_hit = (rng.random(len(letters)) < rate) & (index < 4)
    if not is_hit.any():
        return view
    mutated = letters.copy()
    # 1 to 3 places on in ACGT is always another base; bit 32 is the case of ASCII letters
    shift = rng.integers(1, 4, size=int(is_hit.sum()), dtype=np.uint8)
    case = letters[is_hit] & 32
    mutated[is_hit] = _BASES[(index[is_hit] + shift) % 4] | case
    return Augmented(mutated.tobytes(), view.token_labels)


def indels(view: Augmented, rng: np.random.Generator, *, rate: float) -> Augmented:
    """Leave bases out, or insert a random one before them, each at half the rate.

    Example:
        >>> view = indels(Augmented(b"ACGTACGTACGT"), np.random.default_rng(1), rate=0.3)
        >>> view.sequence
        b'ACTACGTAGT'
    """
    if view.token_labels is not None:
        message = "indels: bases have labels, expected none; leave insertions and deletions out"
        raise ShapeError(message)
    letters = np.frombuffer(view.sequence, dtype=np.uint8)
    drawn = rng.random(len(letters))
    kept = drawn >= rate / 2
    is_insertion = kept & (drawn < rate)
    copies = np.repeat(letters, kept.astype(np.int64) + is_insertion)
    # of a base and its copy, the first becomes the inserted one
    places = (np.cumsum(kept + is_insertion * 1) - 2)[is_insertion]
    copies[places] = _BASES[rng.integers(0, 4, size=len(places))]
    return Augmented(copies.tobytes() or view.sequence)


_LEAST_CROP = 0.5
_MOST_SUBSTITUTED, _MOST_INDELS = 0.4, 0.04
"""Shares of bases; each copy draws its own, from 0 up."""


def mutated_copy(piece: bytes, rng: np.random.Generator) -> bytes:
    """Crop a piece, substitute, delete and insert bases, and read either strand; never longer than the piece.

    Example:
        >>> len(mutated_copy(b"ACGT" * 50, np.random.default_rng(0))) <= 200
        True
    """
    view = random_crop(Augmented(piece), rng, min_fraction=_LEAST_CROP)
    view = point_mutations(view, rng, rate=rng.uniform(0, _MOST_SUBSTITUTED))
    view = indels(view, rng, rate=rng.uniform(0, _MOST_INDELS))
    return random_strand(Augmented(view.sequence[: len(piece)]), rng, probability=0.5).sequence


def _check(view: Augmented) -> None:
    if view.token_labels is not None and len(view.token_labels) != len(view.sequence):
        message = (
            f"augment: {len(view.token_labels)} labels for {len(view.sequence)} bases, expected one each"
        )
        raise ShapeError(message)
