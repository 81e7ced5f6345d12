"""Rows of an embedding file, a block at a time.

N records, T tokens, D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from genoembed.store import EmbeddingFile

_BLOCK_VALUES = 1 << 21
_MOST_ROWS = 8192


class RowBlock(NamedTuple):
    """Consecutive records."""

    start: int
    stop: int
    """One past the last record."""
    matrices: dict[str, NDArray[np.floating]]
    """By layer, ``(stop - start, D)``; in a per-token file ``(T, D)`` of their tokens."""
    offsets: NDArray[np.int64]
    """First row of each record within the block and the end, ``(stop - start + 1,)``."""


def row_blocks(file: EmbeddingFile, layers: Sequence[str]) -> Iterator[RowBlock]:
    """Read a file, a block at a time."""
    widths = sum(file[name].shape[1] for name in layers)
    ends = np.arange(1, len(file) + 1) if file.kind == "pooled" else np.cumsum(file.num_tokens)
    most = max(1, _BLOCK_VALUES // widths)
    start = first = 0
    while start < len(file):
        stop = int(np.searchsorted(ends, first + most, side="right"))
        stop = min(max(stop, start + 1), start + _MOST_ROWS, len(file))
        last = int(ends[stop - 1])
        offsets = np.concatenate([[first], ends[start:stop]]).astype(np.int64) - first
        yield RowBlock(start, stop, {name: file[name][first:last] for name in layers}, offsets)
        start, first = stop, last
