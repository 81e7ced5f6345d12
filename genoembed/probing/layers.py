"""Layers of an embedding file as a mapping: some rows of one layer at a time, kept where there is room."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from genoembed.analysis.fitting import load_transform
from genoembed.analysis.recipes import check_comparable, recipe_of
from genoembed.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from genoembed.analysis.transform import FittedTransform
    from genoembed.store import EmbeddingFile

ROOM_BYTES = 1 << 29
"""Layers are kept in memory if all of them need no more than this; else each is read when it is asked for."""


class RowsOfLayers(Mapping[str, "NDArray[np.floating]"]):
    """Some rows of each layer of a file."""

    def __init__(
        self,
        file: EmbeddingFile,
        layers: Sequence[str],
        rows: NDArray[np.int64],
        *,
        transforms: Mapping[str, FittedTransform] | None = None,
        room_bytes: int = ROOM_BYTES,
    ) -> None:
        self._matrices = {name: file[name] for name in layers}
        self._rows = rows
        self._file, self._room_bytes = file, room_bytes
        self._transforms = transforms or {}
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
        """Take fewer rows."""
        return RowsOfLayers(
            self._file,
            list(self),
            self._rows[is_kept],
            transforms=self._transforms,
            room_bytes=self._room_bytes,
        )

    def _read(self, name: str) -> NDArray[np.floating]:
        rows = np.asarray(self._matrices[name])[self._rows]
        return self._transforms[name].apply(rows) if name in self._transforms else rows


def load_transforms(
    file: EmbeddingFile, layers: Sequence[str], paths: Sequence[str]
) -> dict[str, FittedTransform]:
    """Read fitted transforms, and make sure that they are for vectors as the file has them."""
    found: dict[str, FittedTransform] = {}
    for path in paths:
        loaded = load_transform(path)
        layer = str(loaded.recipe.get("layer"))
        if layer not in layers:
            message = (
                f"transform {path}: fitted on layer {layer!r}, which is not among those probed; leave it out"
            )
            raise ConfigError(message)
        if layer in found:
            message = f"transform {path}: a second one for layer {layer!r}; give one a layer"
            raise ConfigError(message)
        check_comparable(loaded.recipe, recipe_of(file.provenance, layer), names=(path, str(file.path)))
        found[layer] = loaded.transform
    return found
