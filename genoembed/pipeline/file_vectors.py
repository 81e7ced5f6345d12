"""The vectors of an embedding file, read in blocks and, where asked for, transformed.

N rows, D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from genoembed.pooling.transform import FittedTransform
    from genoembed.store.layout import LazyMatrix


_BLOCK_VALUES = 1 << 21
_MIN_ROWS, _MAX_ROWS = 256, 16384


class VectorSource:
    """Rows of a matrix as float64, a block at a time.

    What is stored as float32 or float16 comes out exactly; transformed vectors are rounded to float32 first,
    so that rows that are equal stay equal wherever a block begins.

    Example:
        >>> VectorSource(np.eye(3, dtype=np.float32)).read(1, 3).tolist()
        [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """

    def __init__(
        self, matrix: LazyMatrix | NDArray[np.floating], transform: FittedTransform | None = None
    ) -> None:
        self._matrix = matrix
        self._transform = transform
        self.width: int = matrix.shape[1] if transform is None else transform.output_width
        """Features of a row."""

    def __len__(self) -> int:
        return len(self._matrix)

    def read(self, start: int, stop: int) -> NDArray[np.float64]:
        """Read consecutive rows."""
        return self._finished(self._matrix[start:stop])

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Read some rows."""
        return self._finished(self._matrix[rows])

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Read everything, a block at a time."""
        step = rows or block_rows(max(self.width, self._matrix.shape[1]))
        for start in range(0, len(self), step):
            yield start, self.read(start, min(start + step, len(self)))

    def _finished(self, block: NDArray[np.floating]) -> NDArray[np.float64]:
        if self._transform is not None:
            block = self._transform.apply(block)
        return np.ascontiguousarray(block, dtype=np.float64)


def block_rows(width: int) -> int:
    """Choose how many rows are read at a time.

    Example:
        >>> block_rows(128), block_rows(1 << 20)
        (16384, 256)
    """
    return min(_MAX_ROWS, max(_MIN_ROWS, _BLOCK_VALUES // width))


def usable_rows(block: NDArray[np.float64], *, allow_zero: bool) -> NDArray[np.bool_]:
    """Tell which rows can be compared.

    Example:
        >>> usable_rows(np.array([[1.0], [np.nan], [0.0]]), allow_zero=False).tolist()
        [True, False, False]
    """
    usable: NDArray[np.bool_] = np.asarray(np.isfinite(block).all(axis=1))
    if not allow_zero:
        usable &= (block != 0).any(axis=1)
    return usable
