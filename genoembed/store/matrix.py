"""A matrix that stays in its file and is read where it is indexed, as NumPy would index it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from genoembed.errors import GenoembedError, StoreError, StoreFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import h5py
    from numpy.typing import DTypeLike, NDArray

    Index: TypeAlias = "int | slice | Sequence[int] | NDArray[np.integer] | NDArray[np.bool_]"

SLAB_BYTES = 4 * 1024 * 1024


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Report what HDF5 or NumPy say about a damaged file as one error that names the file."""
    try:
        yield
    except GenoembedError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        problem = f"cannot be read ({reason}), the file is damaged; make it again or restore it from a copy"
        raise StoreFormatError(problem, path=path) from error


class LazyMatrix:
    """Rows of one layer, read from the file where they are asked for.

    ``matrix[5]``, ``matrix[10:20]``, ``matrix[[7, 3, 3]]``, ``matrix[mask]`` and ``matrix[rows, columns]``
    mean what they mean in NumPy, and give NumPy arrays; ``numpy.asarray(matrix)`` reads all of it.
    """

    def __init__(self, dataset: h5py.Dataset, path: str) -> None:
        self._dataset = dataset
        self._path = path
        self.shape: tuple[int, int] = tuple(dataset.shape)
        """Rows and features."""
        self.dtype: np.dtype[np.floating] = dataset.dtype
        """How the values are stored."""
        self.ndim = 2

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazyMatrix({self.shape[0]} x {self.shape[1]}, {self.dtype.name})"

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[np.floating]:
        if copy is False:
            message = f"{self._path}: a matrix in a file cannot become an array without a copy; set copy=None"
            raise ValueError(message)
        return np.asarray(self[:], dtype=dtype)

    def __getitem__(self, key: Index | tuple[Index, Index]) -> NDArray[np.floating]:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(len(self))
            return self._span(start, max(start, stop), columns)
        if isinstance(rows, (int, np.integer)):
            position = range(len(self))[rows]
            return self._span(position, position + 1, columns)[0]
        positions = np.arange(len(self))[rows]
        if positions.ndim != 1:
            message = (
                f"{self._path}: rows must be a number, a slice or one list, found {rows!r}; name rows first"
            )
            raise IndexError(message)
        return self._gather(positions, columns)

    def _slab_rows(self) -> int:
        return max(1, SLAB_BYTES // (self.shape[1] * self.dtype.itemsize))

    def _read(self, start: int, stop: int) -> NDArray[np.floating]:
        if not self._dataset:
            problem = "is closed; open it again with open_embeddings and read inside the 'with'"
            raise StoreError(problem, path=self._path)
        with reading(self._path):
            return self._dataset[start:stop]

    def _span(self, start: int, stop: int, columns: Index) -> NDArray[np.floating]:
        """Consecutive rows; where columns are picked, never more than a slab of whole rows at once."""
        if isinstance(columns, slice) and columns == slice(None):
            return self._read(start, stop)
        step = self._slab_rows()
        starts = range(start, stop, step) or range(start, start + 1)
        return np.concatenate([self._read(first, min(first + step, stop))[:, columns] for first in starts])

    def _gather(self, positions: NDArray[np.int64], columns: Index) -> NDArray[np.floating]:
        """Rows in any order, read slab by slab: HDF5's own lists of rows are slow and must be sorted."""
        slab_of = positions // self._slab_rows()
        picked: NDArray[np.floating] = np.empty((len(positions), self.shape[1]), self.dtype)
        for slab in np.unique(slab_of):
            chosen = slab_of == slab
            wanted = positions[chosen]
            first = int(wanted.min())
            picked[chosen] = self._read(first, int(wanted.max()) + 1)[wanted - first]
        is_paired = not isinstance(columns, (slice, int, np.integer))
        return picked[np.arange(len(picked)), columns] if is_paired else picked[:, columns]
