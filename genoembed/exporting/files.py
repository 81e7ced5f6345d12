"""Rows of an embedding file, a block at a time.

N records, T tokens, D features.

NumPy's ``.npz``, written as a stream: nothing but a block of rows is in memory.
HDF5 of other kinds: AnnData's ``.h5ad``, and one dataset per record, as UniProt ships embeddings.
Tables: CSV with one column per feature, Parquet with one column per layer; a block of rows is in memory.
``export``: an embedding file in the container that another tool wants.
"""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import h5py
import numpy as np
from numpy.lib import format as npy

from genoembed.atomic import AtomicFile, replacing, reporting_writes
from genoembed.config.choices import ExportFormat
from genoembed.config.fields import named_options
from genoembed.config.files import ExportConfig
from genoembed.config.paths import check_paths
from genoembed.errors import ConfigError, MissingExtraError
from genoembed.store import check_output, open_embeddings
from genoembed.store.schema import escape_name
from genoembed.store.tables import import_pyarrow, open_table

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


NUMBERS = ("length", "start", "end", "n_windows")
"""Columns of the records that are taken along."""
_RESERVED = ("ids", "X", "feature_names", "offsets", "spans", "provenance", *NUMBERS)


def write_npz(file: EmbeddingFile, layers: Sequence[str], target: Path) -> None:
    """Write ``ids``, numbers about the records, ``provenance`` (JSON) and the matrices.

    The first matrix is ``X``, every further one has its layer's name. A per-token file has ``offsets``, too:
    the tokens of record ``i`` are the rows ``offsets[i]`` to ``offsets[i + 1] - 1``; and ``spans``, the first
    base of each token and one past its last (-1 where the file does not say). No array needs pickle.
    """
    taken = [name for name in layers[1:] if name in _RESERVED]
    if taken:
        message = f"layer {taken[0]!r} is named like another array of the file; set layer to export it alone"
        raise ConfigError(message)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _put(archive, "ids", np.array(file.ids, dtype=np.str_))
        for name in NUMBERS:
            _put(archive, name, file.obs[name])
        _put(archive, "provenance", np.array(json.dumps(file.provenance)))
        _put(archive, "layers", np.array(layers, dtype=np.str_))
        if file.kind == "pooled" and layers[0] == file.layers[0]:
            _put(archive, "feature_names", np.array(file.feature_names, dtype=np.str_))
        if file.kind == "tokens":
            _put(archive, "offsets", np.concatenate([[0], np.cumsum(file.num_tokens)]).astype(np.int64))
            _put(archive, "spans", file.all_spans)
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


def write_h5ad(file: EmbeddingFile, layers: Sequence[str], target: Path) -> None:
    """Write an AnnData file: a copy, since a pooled file is one; or one with another layer as ``X``."""
    if list(layers) == file.layers:
        shutil.copyfile(file.path, target)
        return
    try:
        import anndata
    except ImportError as error:
        raise MissingExtraError(package="anndata", extra="analysis", purpose="a layer as h5ad") from error
    (layer,) = layers
    whole = file.to_anndata()
    names = [f"{layer}:{index}" for index in range(file[layer].shape[1])]
    made = anndata.AnnData(X=file[layer][:], obs=whole.obs, uns=dict(whole.uns))
    made.var_names = names
    output = AtomicFile(target)
    try:
        # not ``write_h5ad``: HDF5 would lock the file that is locked for this process already
        with h5py.File(output, "w") as written:
            anndata.io.write_elem(written, "/", made)
        output.commit()
    finally:
        output.discard()


def write_one_dataset_a_record(file: EmbeddingFile, layers: Sequence[str], target: Path) -> None:
    """Write a dataset for each record at the root: ``(D,)``, in a per-token file ``(T, D)``.

    A dataset's name is the id, in which ``%`` is ``%25`` and ``/`` is ``%2F``; its attribute ``original_id``
    is the id as it was. The root's attribute ``layer`` names the layer.
    """
    (layer,) = layers
    output = AtomicFile(target)
    try:
        with h5py.File(output, "w", libver=("earliest", "v110")) as made:
            made.attrs["layer"] = layer
            for block in row_blocks(file, [layer]):
                for index in range(block.start, block.stop):
                    first, last = block.offsets[index - block.start : index - block.start + 2]
                    values = block.matrices[layer]
                    vectors = values[first] if file.kind == "pooled" else values[first:last]
                    record_id = file.ids[index]
                    dataset = made.create_dataset(escape_name(record_id), data=vectors)
                    dataset.attrs["original_id"] = record_id
        output.commit()
    finally:
        output.discard()


def write_csv(file: EmbeddingFile, layers: Sequence[str], target: Path) -> None:
    """Write one line per record: its id, then its features, so that every value reads back as it was."""
    (layer,) = layers
    width = file[layer].shape[1]
    names = file.feature_names if layer == file.layers[0] else [f"{layer}:{index}" for index in range(width)]
    with open_table(target, ["id", *names], format="csv", overwrite=True) as table:
        for block in row_blocks(file, [layer]):
            ids = file.ids[block.start : block.stop]
            for record_id, vector in zip(ids, block.matrices[layer].tolist(), strict=True):
                table.write([record_id, *vector])


def write_parquet(file: EmbeddingFile, layers: Sequence[str], target: Path) -> None:
    """Write one row per record: id, the columns about it, and a list of numbers per layer.

    In a per-token file the column of a layer holds a list of lists. The provenance is the key ``genoembed``
    of the file's metadata.
    """
    arrow, parquet = import_pyarrow("export to Parquet")
    taken = [name for name in layers if name in ("id", *file.obs)]
    if taken:
        message = f"layer {taken[0]!r} is named like a column about the records; export to npz instead"
        raise ConfigError(message)
    fields = [("id", arrow.string())]
    types = {"i": arrow.int64(), "u": arrow.int64(), "f": arrow.float64(), "b": arrow.bool_()}
    for name in file.obs:
        fields.append((name, types.get(file.obs[name].dtype.kind, arrow.string())))
    for name in layers:
        vector = arrow.list_(arrow.from_numpy_dtype(file[name].dtype), file[name].shape[1])
        fields.append((name, vector if file.kind == "pooled" else arrow.list_(vector)))
    schema = arrow.schema(fields, metadata={"genoembed": json.dumps(file.provenance)})
    with parquet.ParquetWriter(target, schema) as writer:
        for block in row_blocks(file, layers):
            columns = [arrow.array(file.ids[block.start : block.stop], type=arrow.string())]
            for name in file.obs:
                values = file.obs[name][block.start : block.stop].tolist()
                kind = schema.field(name).type
                # annotations may mix numbers and texts
                values = [str(value) for value in values] if kind == arrow.string() else values
                columns.append(arrow.array(values, type=kind))
            columns += [_vectors(arrow, block, name, schema.field(name).type) for name in layers]
            writer.write_table(arrow.table(columns, schema=schema))


def _vectors(arrow: Any, block: RowBlock, layer: str, kind: Any) -> Any:
    values: NDArray[np.floating] = np.ascontiguousarray(block.matrices[layer])
    rows = arrow.FixedSizeListArray.from_arrays(arrow.array(values.reshape(-1)), values.shape[1])
    if arrow.types.is_fixed_size_list(kind):
        return rows
    return arrow.ListArray.from_arrays(arrow.array(block.offsets.astype(np.int32)), rows)


logger = logging.getLogger(__name__)


_SUFFIXES = {
    "h5ad": ".h5ad",
    "npz": ".npz",
    "parquet": ".parquet",
    "csv": ".csv",
    "uniprot-h5": ".uniprot.h5",
}
_WRITERS = {
    "h5ad": write_h5ad,
    "npz": write_npz,
    "parquet": write_parquet,
    "csv": write_csv,
    "uniprot-h5": write_one_dataset_a_record,
}
_ONE_MATRIX = ("csv", "uniprot-h5")
_POOLED_ONLY = {
    "h5ad": "AnnData has one row per record; export to npz or parquet, or extract with a pooling",
    "csv": "one line per token is too much; export to npz, parquet or uniprot-h5, or extract with a pooling",
}
_MANY_DATASETS = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was written."""

    output: Path
    to: ExportFormat
    layers: tuple[str, ...]
    """Matrices that were taken along."""
    num_records: int
    num_bytes: int


@named_options(ExportConfig)
def export(
    path: str | PathLike[str],
    to: ExportFormat,
    *,
    output: str | PathLike[str] | None = None,
    layer: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write an embedding file as another kind of file.

    Args:
        path: A file that genoembed wrote.
        to: ``h5ad``, ``npz``, ``parquet``, ``csv``, or ``uniprot-h5``: one dataset per record under its id,
            in which ``%`` is ``%25`` and ``/`` is ``%2F``.
        output: The file to write; None is ``path`` with the ending of the format.
        layer: Which matrix alone; None takes all. ``csv`` and ``uniprot-h5`` hold one.
        overwrite: Replace an existing file.

    Returns:
        What was written.

    Raises:
        ConfigError: If the file does not fit into the format, or the format is unknown.
        LayerError: If the file has no such layer.
        MissingExtraError: If a package that the format needs is not installed.
        StoreError: If a file cannot be read or written; the output is then as it was before.
    """
    if to not in get_args(ExportFormat):
        message = f"to is {to!r}, expected one of {', '.join(get_args(ExportFormat))}"
        raise ConfigError(message)
    name = Path(path).with_suffix(_SUFFIXES[to]) if output is None else output
    check_paths([path], [(name, "export")], overwrite=overwrite)
    target = check_output(name, overwrite=overwrite)
    with open_embeddings(path) as file:
        layers = _layers(file, to, layer)
        if to == "uniprot-h5" and len(file) > _MANY_DATASETS:
            logger.warning("%s: %d datasets are slow to write and to open", fspath(name), len(file))
        with replacing(name, overwrite=overwrite) as part, reporting_writes(name):
            _WRITERS[to](file, layers, part)
        return ExportReport(
            output=Path(name),
            to=to,
            layers=layers,
            num_records=len(file),
            num_bytes=target.stat().st_size,
        )


def _layers(file: EmbeddingFile, to: ExportFormat, layer: str | None) -> tuple[str, ...]:
    """Choose the matrices; refuse what the format does not hold."""
    problems = []
    if layer is not None:
        _ = file[layer]  # an unknown layer is an error that names those that are there
    layers = tuple(file.layers) if layer is None else (layer,)
    if file.kind == "tokens" and to in _POOLED_ONLY:
        problems.append(f"{file.path} holds a vector for every token, but {_POOLED_ONLY[to]}")
    if to in _ONE_MATRIX and len(layers) > 1:
        problems.append(
            f"{file.path} holds {len(layers)} layers ({', '.join(layers)}), but {to} one; set layer to one"
        )
    if problems:
        raise ConfigError(*problems)
    return layers
