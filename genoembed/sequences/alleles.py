"""One spelling for each change: alleles trimmed and moved to the left, as variant callers compare them.

In: a place, two alleles and the reference around them. Out: the same change as early and as short as it can
be written. Promised: the haplotype stays what it was. Definition: Tan, Abecasis and Kang, "Unified
representation of genetic variants", Bioinformatics 31 (2015), 2202-2204.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

_FIRST_BLOCK, _LARGEST_BLOCK = 64, 1 << 16


class Change(NamedTuple):
    """Bases of a contig, and what stands there instead; one of the two may be empty."""

    start: int
    """0-based."""
    ref: bytes
    alt: bytes

    @property
    def end(self) -> int:
        """One past the last base that is replaced."""
        return self.start + len(self.ref)


def trim_change(change: Change) -> Change:
    """Take off what both alleles share, at the end first, then at the start.

    Example:
        >>> trim_change(Change(9, b"CAG", b"CG"))
        Change(start=10, ref=b'A', alt=b'')
    """
    start, ref, alt = change
    tail = _shared(ref[::-1], alt[::-1])
    ref, alt = ref[: len(ref) - tail], alt[: len(alt) - tail]
    head = _shared(ref, alt)
    return Change(start + head, ref[head:], alt[head:])


def _shared(first: bytes, second: bytes) -> int:
    pairs = zip(first, second, strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def left_align(change: Change, fetch: Callable[[int, int], bytes]) -> Change:
    """Move an insertion or deletion to the first place where it makes the same haplotype.

    What has both alleles after trimming can be written at one place only, and stays.

    Example:
        >>> contig = b"GGCACACATT"
        >>> left_align(Change(6, b"CA", b""), lambda start, end: contig[start:end])
        Change(start=2, ref=b'CA', alt=b'')
    """
    start, ref, alt = trim_change(change)
    if ref and alt:
        return Change(start, ref, alt)
    bases = ref or alt
    moved = _steps_to_the_left(start, bases, fetch)
    turn = moved % len(bases)
    bases = bases[len(bases) - turn :] + bases[: len(bases) - turn]
    return Change(start - moved, bases if ref else b"", bases if alt else b"")


def _steps_to_the_left(start: int, bases: bytes, fetch: Callable[[int, int], bytes]) -> int:
    """Count the bases before ``start`` that repeat ``bases``, read backwards and round and round."""
    moved, block = 0, _FIRST_BLOCK
    size = len(bases)
    while start > moved:
        stretch = fetch(max(0, start - moved - block), start - moved)
        for base in reversed(stretch):
            if base != bases[size - 1 - moved % size]:
                return moved
            moved += 1
        block = min(2 * block, _LARGEST_BLOCK)
    return moved


def anchor(change: Change, fetch: Callable[[int, int], bytes]) -> Change:
    """Give an insertion or deletion the neighbouring base that VCF asks for: the one before, if there is one.

    Example:
        >>> anchor(Change(2, b"CA", b""), lambda start, end: b"GGCACACATT"[start:end])
        Change(start=1, ref=b'GCA', alt=b'G')
    """
    start, ref, alt = change
    if ref and alt:
        return change
    if start > 0:
        base = fetch(start - 1, start)
        return Change(start - 1, base + ref, base + alt)
    base = fetch(change.end, change.end + 1)
    return Change(start, ref + base, alt + base)
