"""Rows of embedding files as another file: some rows of one, or those of several, or with more columns.

In: open files, and which of their rows. Out: a file of the schema, with a seal, which AnnData opens.
Promised: it appears whole or not at all; matrices are read and written a block at a time; what belongs to the
rows of a single file goes with them: every layer, other matrices, sparse ones too, columns, and ``uns``.

N rows, D features.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from genoembed.atomic import AtomicFile, check_output, reporting_writes
from genoembed.errors import StoreError
from genoembed.store.columns import (
    PARTS,
    column_names,
    encoding_of,
    has_categories_elsewhere,
    index_name,
    joined_column,
    read_column,
    shape_of,
)
from genoembed.store.layout import read_layout
from genoembed.store.reader import changed_x_of, hdf5_of, names_own_features
from genoembed.store.schema import (
    ARRAY,
    CATEGORICAL,
    DICT,
    EMPTY_GROUPS,
    INDEX,
    INTEGER,
    LAYERS_ATTR,
    OBS_COLUMNS,
    PROVENANCE,
    ROOT_ENCODINGS,
    SCHEMA_ATTR,
    SCHEMA_VERSION,
    SLAB_BYTES,
    SPANS,
    STRING_ARRAY,
    escape_name,
    reading,
    set_encoding,
)
from genoembed.store.seal import number_chunks, write_seal
from genoembed.store.writer import (
    TEXT,
    GrowingDataset,
    mark_dataframe,
    write_provenance,
    write_text_array,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from os import PathLike

    from numpy.typing import NDArray

    from genoembed.store.reader import EmbeddingFile
    from genoembed.store.schema import JSON

logger = logging.getLogger(__name__)

_SPARSE = ("csr_matrix", "csc_matrix")
_CODES = np.dtype("<i4")
_Check = Callable[[], None]
"""Raises what ended a write that failed: HDF5 is not told, and would keep the rest in memory."""
CHANGED_X = "X"
"""In ``layers``: what another program made of ``X``, where the layer itself is whole in ``obsm``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TakenRows:
    """Some rows of an open file, ascending; or all of them."""

    file: EmbeddingFile
    rows: NDArray[np.int64]
    """``(N,)``."""

    @property
    def takes_all(self) -> bool:
        """Whether no row is left out."""
        return len(self.rows) == len(self.file)

    @property
    def ids(self) -> list[str]:
        """Their record ids."""
        return [self.file.ids[row] for row in self.rows.tolist()]


def write_rows(
    path: str | PathLike[str],
    sources: Sequence[TakenRows],
    *,
    provenance: Mapping[str, JSON],
    columns: Mapping[str, NDArray[Any]] | None = None,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Write rows of files that have the same kind and layers, in this order.

    Args:
        path: The file to write.
        sources: Rows, by file.
        provenance: How the file was made.
        columns: More columns of the table of records, ``(N,)``; they replace those of the same name.
        overwrite: Replace an existing file.

    Returns:
        Parts of the files that could not be taken along, by their places.

    Raises:
        StoreError: If a file cannot be read or written, or has a part that cannot be cut into rows.
    """
    with _sealed(path, overwrite=overwrite) as (hdf5, check):
        writer = _Rows(hdf5, sources, columns or {}, check)
        if sources[0].file.kind == "tokens":
            writer.write_tokens()
        else:
            writer.write_pooled()
        set_encoding(hdf5.require_group("uns"), DICT)
        write_provenance(hdf5.require_group(PROVENANCE), json.dumps(provenance, allow_nan=False))
        set_encoding(hdf5, ROOT_ENCODINGS[sources[0].file.kind])
        hdf5.attrs[SCHEMA_ATTR] = SCHEMA_VERSION
        hdf5.attrs[LAYERS_ATTR] = sources[0].file.layers
    dropped = tuple(dict.fromkeys(writer.dropped))
    if dropped and len(sources) == 1:
        logger.warning(
            "%s: left out what cannot be taken along: %s", sources[0].file.path, ", ".join(dropped)
        )
    return dropped


@contextmanager
def _sealed(path: str | PathLike[str], *, overwrite: bool) -> Iterator[tuple[h5py.File, _Check]]:
    """Open a file to write that gets its name, under a seal, where nothing failed; and how to learn of it."""
    target = check_output(path, overwrite=overwrite)
    with reporting_writes(path):
        file = AtomicFile(target)
    try:
        with reporting_writes(path):
            try:
                with h5py.File(file, "w") as hdf5:
                    yield hdf5, file.check
                    gaps = number_chunks(hdf5)
            except (RuntimeError, ValueError):
                if file.error is not None:  # HDF5 fails on what a full disk did not take
                    raise file.error from None
                raise
            file.check()
            with h5py.File(file, "r") as hdf5:  # as anybody will, while what it may replace is still there
                read_layout(hdf5, str(file.temporary))
            write_seal(file, gaps)
        check_output(path, overwrite=overwrite)  # another process may have been faster
        with reporting_writes(path):
            file.commit()
    finally:
        file.discard()


class _Rows:
    """The rows of some files, on their way to another."""

    def __init__(
        self,
        root: h5py.File,
        sources: Sequence[TakenRows],
        columns: Mapping[str, NDArray[Any]],
        check: _Check,
    ) -> None:
        self._root, self._sources, self._columns, self._check = root, sources, columns, check
        self._is_one = len(sources) == 1
        self._first = sources[0].file
        self.dropped: list[str] = []

    def write_pooled(self) -> None:
        """Write all parts of a pooled file."""
        self._write_obs()
        first, *others = self._first.layers
        self._matrix(self._root, "X", first)
        obsm = self._root.create_group("obsm")
        set_encoding(obsm, DICT)
        for name in others:
            self._matrix(obsm, escape_name(name), name)
        if others:
            obsm[escape_name(first)] = self._root["X"]
        self._write_var(first)
        for name in EMPTY_GROUPS:
            set_encoding(self._root.require_group(name), DICT)
        if self._is_one:
            self._take_the_rest(self._sources[0])
        else:
            self._join_the_rest()

    def write_tokens(self) -> None:
        """Write all parts of a per-token file."""
        self._write_obs()
        tokens = self._root.create_group("tokens")
        lengths = np.concatenate([source.file.num_tokens[source.rows] for source in self._sources])
        offsets = GrowingDataset(tokens, "offsets", dtype=INTEGER)
        offsets.append(np.concatenate([np.zeros(1, INTEGER), np.cumsum(lengths, dtype=INTEGER)]))
        offsets.close()
        spans = [GrowingDataset(tokens, name, dtype=INTEGER) for name in SPANS]
        for source in self._sources:
            found = source.file.all_spans
            for first, last in _token_runs(source):
                for dataset, places in zip(spans, found[first:last].T, strict=True):
                    dataset.append(places.astype(INTEGER))
                self._check()
        for dataset in spans:
            dataset.close()
        for name in self._first.layers:
            made = self._growing(tokens.create_group(escape_name(name)), "values", name)
            for source in self._sources:
                matrix = source.file[name]
                step = _block_rows(matrix.shape[1] * matrix.dtype.itemsize)
                for first, last in _token_runs(source):
                    for start in range(first, last, step):
                        made.append(matrix[start : min(start + step, last)].astype(self._dtype(name)))
                        self._check()
            made.close()

    def _dtype(self, layer: str) -> np.dtype[np.floating]:
        return np.result_type(*(source.file[layer].dtype for source in self._sources))

    def _growing(self, group: h5py.Group, link: str, layer: str) -> GrowingDataset:
        return GrowingDataset(group, link, dtype=self._dtype(layer), width=self._first[layer].shape[1])

    def _matrix(self, group: h5py.Group, link: str, layer: str) -> None:
        made = self._growing(group, link, layer)
        for source in self._sources:
            matrix = source.file[layer]
            for positions in _blocks(source.rows, matrix.shape[1] * matrix.dtype.itemsize):
                made.append(matrix[positions].astype(self._dtype(layer)))
                self._check()
        made.close()

    def _write_obs(self) -> None:
        obs = self._root.create_group("obs")
        ids = [name for source in self._sources for name in source.ids]
        write_text_array(obs, INDEX, ids)
        for name, kind in OBS_COLUMNS.items():
            values = np.concatenate([source.file.obs[name][source.rows] for source in self._sources])
            if kind == "category":
                known = ["+", "-"] if name == "strand" else []
                write_categories(obs, name, values, [*known, *sorted({*values} - {*known})])
            else:
                write_column(obs, name, values)
            self._check()
        for source in self._sources:
            listed = column_names(hdf5_of(source.file)["obs"])
            lost = {*listed} - {*source.file.obs, *self._columns}  # in an encoding of later versions
            self.dropped += [f"obs/{name}" for name in listed if name in lost]
        more = [name for source in self._sources for name in source.file.obs if name not in OBS_COLUMNS]
        names = [name for name in dict.fromkeys(more) if name not in self._columns]
        for name in names:
            self._more_column(obs, name)
            self._check()
        for name, values in self._columns.items():
            write_column(obs, name, values)
        mark_dataframe(obs, [*OBS_COLUMNS, *names, *self._columns])

    def _more_column(self, obs: h5py.Group, name: str) -> None:
        if self._is_one:
            (source,) = self._sources
            node = hdf5_of(source.file)[f"obs/{name}"]
            if not has_categories_elsewhere(node):
                _copy_rows(node, obs, name, source.rows, str(source.file.path), self._check)
                return
        parts = [
            source.file.obs[name][source.rows]
            if name in source.file.obs
            else np.full(len(source.rows), None, object)
            for source in self._sources
        ]
        write_column(obs, name, joined_column(parts))

    def _write_var(self, layer: str) -> None:
        source = self._first
        if names_own_features(source):
            _copy_whole(source, "var", self._root)
            return
        var = self._root.create_group("var")
        write_text_array(var, INDEX, [f"{layer}:{place}" for place in range(source[layer].shape[1])])
        mark_dataframe(var, [])

    def _take_the_rest(self, source: TakenRows) -> None:
        """Copy what belongs to the rows, or to the file, of one file."""
        file, path = source.file, str(source.file.path)
        layers = {escape_name(name) for name in file.layers}
        for name in _members(file, "obsm"):
            if name not in layers:
                _copy_rows(
                    hdf5_of(file)[f"obsm/{name}"], self._root["obsm"], name, source.rows, path, self._check
                )
        beside = {
            f"layers/{name}": (name, hdf5_of(file)[f"layers/{name}"]) for name in _members(file, "layers")
        }
        if (x := _other_x(file)) is not None:
            beside["X"] = CHANGED_X, x
        for where, (name, node) in beside.items():
            # AnnData opens no file with a layer of other features than those of X, here the first matrix
            if shape_of(node) == file.X.shape:
                _copy_rows(node, self._root["layers"], name, source.rows, path, self._check)
            else:
                self.dropped.append(where)
        for name in _members(file, "obsp"):
            _copy_pairs(
                hdf5_of(file)[f"obsp/{name}"], self._root["obsp"], name, source.rows, path, self._check
            )
        if names_own_features(file):
            for group in ("varm", "varp"):
                for name in _members(file, group):
                    _copy_whole(file, f"{group}/{name}", self._root[group])
        else:
            self.dropped += _lost_features(file)
        if isinstance(raw := hdf5_of(file).get("raw"), h5py.Group):
            made = self._root.create_group("raw")
            made.attrs.update(raw.attrs)
            _copy_rows(raw["X"], made, "X", source.rows, path, self._check)
            for name in set(raw) & {"var", "varm"}:
                _copy_whole(file, f"raw/{name}", made)
        uns = self._root.require_group("uns")
        for name in _members(file, "uns"):
            if f"uns/{name}" != PROVENANCE:
                _copy_whole(file, f"uns/{name}", uns)

    def _join_the_rest(self) -> None:
        """Join the matrices that all files have, of one width; the rest has no meaning for joined rows."""
        shared = [
            name
            for name in self._first.more_matrices
            if all(
                name in source.file.more_matrices and source.file[name].shape[1] == self._first[name].shape[1]
                for source in self._sources
            )
        ]
        for name in shared:
            self._matrix(self._root["obsm"], name, name)
        for source in self._sources:
            layers = {escape_name(name) for name in source.file.layers}
            for group in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
                self.dropped += [
                    f"{group}/{name}"
                    for name in _members(source.file, group)
                    if f"{group}/{name}" != PROVENANCE
                    and not (group == "obsm" and (name in layers or name in shared))
                ]
            if _other_x(source.file) is not None:
                self.dropped.append("X")
            if not names_own_features(source.file):
                self.dropped += _lost_features(source.file)
            if "raw" in hdf5_of(source.file):
                self.dropped.append("raw")


# ------------------------------------------------------------------------------------------------- columns


def write_column(table: h5py.Group, name: str, values: NDArray[Any]) -> None:
    """Write a column: numbers as they are, text as categories where it repeats, as AnnData does."""
    if values.dtype.kind != "O":
        _write_numbers(table, name, values)
        return
    texts = np.array(["" if value is None else str(value) for value in values.tolist()], dtype=object)
    known = sorted({*texts} - {""})
    if name in OBS_COLUMNS or len(known) == len(texts):
        write_text_array(table, name, texts.tolist())
    else:
        write_categories(table, name, texts, known)


def _write_numbers(group: h5py.Group, name: str, values: NDArray[Any]) -> None:
    made = GrowingDataset(group, name, dtype=values.dtype)
    made.append(values)
    made.close()


def write_categories(
    table: h5py.Group, name: str, values: NDArray[np.object_], categories: Sequence[str]
) -> None:
    """Write a categorical column; a value that is not among the categories is missing."""
    column = table.create_group(name)
    write_text_array(column, "categories", categories)
    code_of = {value: code for code, value in enumerate(categories)}
    _write_numbers(column, "codes", np.array([code_of.get(value, -1) for value in values], _CODES))
    column.attrs["ordered"] = False
    set_encoding(column, CATEGORICAL)


# ------------------------------------------------------------------------------------- elements of one file


def _members(file: EmbeddingFile, group: str) -> list[str]:
    """Return the names in a group of a file; none where it is not there."""
    found = hdf5_of(file).get(group)
    return list(found) if isinstance(found, h5py.Group) else []


def _other_x(file: EmbeddingFile) -> h5py.Group | h5py.Dataset | None:
    """Return ``/X`` where it is not the first layer: what another program made of it, or counts of genes."""
    found = hdf5_of(file).get("X")
    return found if isinstance(found, h5py.Group) else changed_x_of(file)


def _lost_features(file: EmbeddingFile) -> list[str]:
    """Name the tables of features that are not those of the first layer."""
    var = hdf5_of(file)["var"]
    of_them = [f"{group}/{name}" for group in ("varm", "varp") for name in _members(file, group)]
    return ["var", *of_them] if len(var[index_name(var)]) else of_them


def _copy_whole(file: EmbeddingFile, where: str, to: h5py.Group) -> None:
    """Copy a part of a file to a group of another one; its tables as the schema has them."""
    with reading(str(file.path)):
        _copy_part(hdf5_of(file)[where], to, where.rpartition("/")[2])


def _copy_part(node: h5py.Group | h5py.Dataset, to: h5py.Group, name: str) -> None:
    if isinstance(node, h5py.Group) and encoding_of(node) == "dataframe":
        made, names = to.create_group(name), column_names(node)
        _copy_part(node[index_name(node)], made, INDEX)  # whatever pandas calls it
        for column in names:
            _copy_part(node[column], made, column)
        mark_dataframe(made, names)
    elif isinstance(node, h5py.Group) and encoding_of(node) in ("", DICT[0]):
        made = to.create_group(name)
        made.attrs.update(node.attrs)
        for part in node:
            _copy_part(node[part], made, part)
    elif has_categories_elsewhere(node):
        write_column(to, name, read_column(node))
    else:
        node.file.copy(node, to, name=name)


def _block_rows(row_bytes: int) -> int:
    return max(1, SLAB_BYTES // max(1, row_bytes))


def _blocks(rows: NDArray[np.int64], row_bytes: int) -> Iterator[NDArray[np.int64]]:
    """Cut ascending rows where a block of the file ends, so that each block is read once."""
    step = _block_rows(row_bytes)
    starts = np.flatnonzero(np.diff(rows // step)) + 1
    yield from np.split(rows, starts)


def _token_runs(source: TakenRows) -> Iterator[tuple[int, int]]:
    """List the tokens of the rows, those of consecutive rows together."""
    lengths = source.file.num_tokens  # computed anew for all rows at each look
    ends = np.cumsum(lengths)
    for run in np.split(source.rows, np.flatnonzero(np.diff(source.rows) != 1) + 1):
        if len(run):
            yield int(ends[run[0]] - lengths[run[0]]), int(ends[run[-1]])


def _copy_rows(
    node: h5py.Group | h5py.Dataset,
    to: h5py.Group,
    name: str,
    rows: NDArray[np.int64],
    path: str,
    check: _Check,
) -> None:
    """Copy some rows of an element that has a row per record, whatever it is encoded as."""
    with reading(path):
        if has_categories_elsewhere(node):
            write_column(to, name, read_column(node)[rows])
            return
        if isinstance(node, h5py.Dataset):
            _copy_dense(node, to, name, rows, check)
            return
        kind = encoding_of(node)
        if kind in _SPARSE or "h5sparse_format" in node.attrs:
            _copy_sparse(node, to, name, rows, None, check)
            return
        if kind not in PARTS and kind != "dataframe":
            problem = (
                f"{node.name} is encoded as {kind or 'nothing known'!r}, which cannot be cut into rows; "
                "remove it with anndata first"
            )
            raise StoreError(problem, path=path)
        made = to.create_group(name)
        made.attrs.update(node.attrs)
        for part in sorted({*node} - {"__categories"}):  # where AnnData before 0.8 kept them
            if kind == "categorical" and part == "categories":
                made.create_dataset(part, data=node[part][()], dtype=node[part].dtype)
                made[part].attrs.update(node[part].attrs)
            else:
                _copy_rows(node[part], made, part, rows, path, check)


def _copy_dense(
    node: h5py.Dataset, to: h5py.Group, name: str, rows: NDArray[np.int64], check: _Check
) -> None:
    is_text = h5py.check_string_dtype(node.dtype) is not None
    row_shape = node.shape[1:]
    made = to.create_dataset(
        name,
        shape=(len(rows), *row_shape),
        dtype=TEXT if is_text else node.dtype,
        chunks=None if is_text else _chunks((len(rows), *row_shape), node.dtype.itemsize),
    )
    row_bytes = node.dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))
    written = 0
    for positions in _blocks(rows, row_bytes) if len(rows) else ():
        first = int(positions[0])
        block = node.asstr() if is_text else node
        made[written : written + len(positions)] = block[first : int(positions[-1]) + 1][positions - first]
        check()
        written += len(positions)
    for key, value in node.attrs.items():
        made.attrs[key] = value
    if not encoding_of(node):
        set_encoding(made, STRING_ARRAY if is_text else ARRAY)


def _chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...] | None:
    """Chunk by whole rows; what is empty has no chunks."""
    if not all(shape):
        return None
    width = int(np.prod(shape[1:], dtype=np.int64)) * itemsize
    return (min(shape[0], max(1, SLAB_BYTES // 16 // width)), *shape[1:])


def _copy_pairs(
    node: h5py.Group | h5py.Dataset,
    to: h5py.Group,
    name: str,
    rows: NDArray[np.int64],
    path: str,
    check: _Check,
) -> None:
    """Copy the pairs of some rows, as of a graph of neighbors."""
    with reading(path):
        if isinstance(node, h5py.Group):
            _copy_sparse(node, to, name, rows, rows, check)
            return
        made = to.create_dataset(
            name, data=node[rows[0] : rows[-1] + 1][rows - rows[0]][:, rows] if len(rows) else node[:0, :0]
        )
        made.attrs.update(node.attrs)


def _copy_sparse(
    node: h5py.Group,
    to: h5py.Group,
    name: str,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64] | None,
    check: _Check,
) -> None:
    """Copy some rows, and some columns, of a sparse matrix, a block of its values at a time."""
    by_rows = "csr" in (encoding_of(node) or str(node.attrs.get("h5sparse_format")))
    shape = [int(size) for size in node.attrs.get("shape", node.attrs.get("h5sparse_shape"))]
    wanted = [rows, np.arange(shape[1]) if columns is None else columns]
    major, minor = wanted if by_rows else wanted[::-1]
    sizes = shape if by_rows else shape[::-1]
    place = np.full(sizes[1], -1, np.int64)
    place[minor] = np.arange(len(minor))
    is_kept = np.zeros(sizes[0], np.bool_)
    is_kept[major] = True
    made = to.create_group(name)
    made.attrs.update(node.attrs)
    made.attrs["shape"] = np.array([len(part) for part in wanted], np.int64)
    values = GrowingDataset(made, "data", dtype=node["data"].dtype)
    places = GrowingDataset(made, "indices", dtype=node["indices"].dtype)
    starts = node["indptr"][:].astype(np.int64)
    counts = np.zeros(sizes[0], np.int64)
    step = SLAB_BYTES // 16
    first = 0
    while first < sizes[0]:
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + step, side="right")) - 1)
        last = min(last, sizes[0])
        span = slice(int(starts[first]), int(starts[last]))
        owner = np.repeat(np.arange(first, last), np.diff(starts[first : last + 1]))
        found = place[node["indices"][span]]
        chosen = is_kept[owner] & (found >= 0)
        values.append(node["data"][span][chosen])
        places.append(found[chosen].astype(node["indices"].dtype))
        check()
        counts[first:last] = np.bincount(owner[chosen] - first, minlength=last - first)
        first = last
    values.close()
    places.close()
    pointers = np.concatenate([[0], np.cumsum(counts[major])]).astype(node["indptr"].dtype)
    made.create_dataset("indptr", data=pointers)
