"""NumPy's ``.npz``, written as a stream: nothing but a block of rows is in memory."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib import format as npy

from genoembed.errors import ConfigError
from genoembed.exporting.blocks import row_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from genoembed.store import EmbeddingFile

NUMBERS = ("length", "start", "end", "n_windows")
"""Columns of the records that are taken along."""
_RESERVED = ("ids", "X", "feature_names", "offsets", "provenance", *NUMBERS)


def write_npz(file: EmbeddingFile, layers: Sequence[str], target: Path) -> None:
    """Write ``ids``, numbers about the records, ``provenance`` (JSON) and the matrices.

    The first matrix is ``X``, every further one has its layer's name. A per-token file has ``offsets``, too:
    the tokens of record ``i`` are the rows ``offsets[i]`` to ``offsets[i + 1] - 1``. No array needs pickle.
    """
    taken = [name for name in layers[1:] if name in _RESERVED]
    if taken:
        message = f"layer {taken[0]!r} is named like another array of the file; set layer to export it alone"
        raise ConfigError(message)
    with zipfile.ZipFile(target, "x", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _put(archive, "ids", np.array(file.ids, dtype=np.str_))
        for name in NUMBERS:
            _put(archive, name, file.obs[name])
        _put(archive, "provenance", np.array(json.dumps(file.provenance)))
        _put(archive, "layers", np.array(layers, dtype=np.str_))
        if file.kind == "pooled" and layers[0] == file.layers[0]:
            _put(archive, "feature_names", np.array(file.feature_names, dtype=np.str_))
        if file.kind == "tokens":
            _put(archive, "offsets", np.concatenate([[0], np.cumsum(file.num_tokens)]).astype(np.int64))
        for index, name in enumerate(layers):
            _put_matrix(archive, name if index else "X", file, name)


def _put(archive: zipfile.ZipFile, name: str, values: NDArray[np.generic]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        npy.write_array(member, values, allow_pickle=False)


def _put_matrix(archive: zipfile.ZipFile, name: str, file: EmbeddingFile, layer: str) -> None:
    matrix = file[layer]
    header = {"descr": npy.dtype_to_descr(matrix.dtype), "fortran_order": False, "shape": matrix.shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        npy.write_array_header_2_0(member, header)
        for block in row_blocks(file, [layer]):
            member.write(np.ascontiguousarray(block.matrices[layer]).tobytes())
