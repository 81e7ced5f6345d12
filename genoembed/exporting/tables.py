"""Tables: CSV with a column a feature, Parquet with a column a layer; a block of rows is in memory."""

from __future__ import annotations

import csv
import json
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from genoembed.errors import ConfigError, MissingExtraError
from genoembed.exporting.blocks import row_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from genoembed.exporting.blocks import RowBlock
    from genoembed.store import EmbeddingFile


def write_csv(file: EmbeddingFile, layers: Sequence[str], target: Path) -> None:
    """Write a line a record: its id, then its features, so that every value reads back as it was."""
    (layer,) = layers
    width = file[layer].shape[1]
    names = file.feature_names if layer == file.layers[0] else [f"{layer}:{index}" for index in range(width)]
    with target.open("x", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["id", *names])
        for block in row_blocks(file, [layer]):
            for record_id, vector in zip(
                file.ids[block.start : block.stop], block.matrices[layer], strict=True
            ):
                # NumPy's text of a value is the shortest that reads back as the value
                writer.writerow([record_id, *map(str, vector)])


def write_parquet(file: EmbeddingFile, layers: Sequence[str], target: Path) -> None:
    """Write a row a record: id, the columns about it, and a list of numbers a layer, named as the layer is.

    In a per-token file the column of a layer holds a list of lists. The provenance is the key ``genoembed``
    of the file's metadata.
    """
    try:
        arrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError(package="pyarrow", extra="parquet", purpose="export to Parquet") from error
    taken = [name for name in layers if name in ("id", *file.obs)]
    if taken:
        message = f"layer {taken[0]!r} is named like a column about the records; export to npz instead"
        raise ConfigError(message)
    fields = [("id", arrow.string())]
    for name in file.obs:
        is_number = file.obs[name].dtype.kind in "iu"
        fields.append((name, arrow.int64() if is_number else arrow.string()))
    for name in layers:
        vector = arrow.list_(arrow.from_numpy_dtype(file[name].dtype), file[name].shape[1])
        fields.append((name, vector if file.kind == "pooled" else arrow.list_(vector)))
    schema = arrow.schema(fields, metadata={"genoembed": json.dumps(file.provenance)})
    with parquet.ParquetWriter(target, schema) as writer:
        for block in row_blocks(file, layers):
            columns = [arrow.array(file.ids[block.start : block.stop], type=arrow.string())]
            for name in file.obs:
                values = file.obs[name][block.start : block.stop]
                columns.append(arrow.array(values.tolist(), type=schema.field(name).type))
            columns += [_vectors(arrow, block, name, schema.field(name).type) for name in layers]
            writer.write_table(arrow.table(columns, schema=schema))


def _vectors(arrow: Any, block: RowBlock, layer: str, kind: Any) -> Any:
    values: NDArray[np.floating] = np.ascontiguousarray(block.matrices[layer])
    rows = arrow.FixedSizeListArray.from_arrays(arrow.array(values.reshape(-1)), values.shape[1])
    if arrow.types.is_fixed_size_list(kind):
        return rows
    return arrow.ListArray.from_arrays(arrow.array(block.offsets.astype(np.int32)), rows)
