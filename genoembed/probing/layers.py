"""Layers of an embedding file as a mapping: some rows of one layer at a time, kept where there is room."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from genoembed.store import EmbeddingFile

ROOM_BYTES = 1 << 29
"""Layers are kept in memory if all of them need no more than this; else each is read when it is asked for."""


class RowsOfLayers(Mapping[str, "NDArray[np.floating]"]):
    """Some rows of each layer of a file.

    Args:
        file: Open, and staying so.
        layers: Which ones, in this order.
        rows: Which rows, ascending.
        room_bytes: See ``ROOM_BYTES``.

    Raises:
        LayerError: If the file has no such layer.
    """

    def __init__(
        self,
        file: EmbeddingFile,
        layers: Sequence[str],
        rows: NDArray[np.int64],
        *,
        room_bytes: int = ROOM_BYTES,
    ) -> None:
        self._matrices = {name: file[name] for name in layers}
        self._rows = rows
        self._file, self._room_bytes = file, room_bytes
        needed = sum(
            len(rows) * matrix.shape[1] * matrix.dtype.itemsize for matrix in self._matrices.values()
        )
        self._kept: dict[str, NDArray[np.floating]] | None = {} if needed <= room_bytes else None

    def __getitem__(self, name: str) -> NDArray[np.floating]:
        if self._kept is None:
            return self._read(name)
        if name not in self._kept:
            self._kept[name] = self._read(name)
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)

    def of(self, is_kept: NDArray[np.bool_]) -> RowsOfLayers:
        """Take fewer rows.

        Args:
            is_kept: Which of these rows, bool.

        Returns:
            The same layers, of these rows.
        """
        return RowsOfLayers(self._file, list(self), self._rows[is_kept], room_bytes=self._room_bytes)

    def _read(self, name: str) -> NDArray[np.floating]:
        return np.asarray(self._matrices[name])[self._rows]
