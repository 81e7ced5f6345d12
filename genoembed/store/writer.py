"""Write embedding files: rows in the order they come, complete or not at all.

In: ``EmbeddingBlock`` or ``TokenBlock``. Out: one HDF5 file of schema 2: parts that grow by appending, then
those written once at its end. Promised: an interrupted or failed run leaves no file behind and an earlier
file as it was; nothing that is not finite is stored, but for the NaN of records that failed and say so in
their flags.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import h5py
import numpy as np

from genoembed.atomic import AtomicFile, check_output
from genoembed.contracts import EmbeddingBlock, TokenBlock
from genoembed.errors import ConfigError, DuplicateIdError, NonFiniteError, ShapeError, StoreError
from genoembed.store.schema import (
    ARRAY,
    CATEGORICAL,
    DATAFRAME,
    DICT,
    EMPTY_GROUPS,
    INDEX,
    INTEGER,
    LAYERS_ATTR,
    NUMBER,
    OBS_COLUMNS,
    PROVENANCE,
    PROVENANCE_JSON,
    ROOT_ENCODINGS,
    SCHEMA_ATTR,
    SCHEMA_VERSION,
    SPANS,
    STORAGE_DTYPES,
    STRING,
    STRING_ARRAY,
    TOKENS_PARTS,
    Encoding,
    escape_name,
    has_failed,
    set_encoding,
    storable_text,
)
from genoembed.store.seal import number_chunks, write_seal

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from genoembed.config.choices import StorageDtype
    from genoembed.contracts import ObsRow
    from genoembed.store.schema import JSON, Kind


CHUNK_BYTES = 256 * 1024
"""A chunk of this size is read in one go and fits HDF5's cache of 1 MiB per dataset."""
MAX_CHUNK_ROWS = 4096
TEXT = h5py.string_dtype("utf-8")
_CODES = np.dtype("<i4")
_INT64 = np.iinfo(np.int64)


class GrowingDataset:
    """A chunked dataset that rows are appended to.

    Rows wait in memory until they fill a chunk, so appending one at a time is as good as in blocks, and a
    dataset smaller than a chunk takes no more space than its rows.
    """

    def __init__(
        self,
        group: h5py.Group,
        name: str,
        *,
        dtype: np.dtype[np.generic],
        encoding: Encoding = ARRAY,
        width: int | None = None,
    ) -> None:
        self._group = group
        self._name = name
        self._dtype = dtype
        self._encoding = encoding
        self._row_shape = () if width is None else (width,)
        row_bytes = max(1, dtype.itemsize * (width or 1))
        self.chunk_rows = max(1, min(MAX_CHUNK_ROWS, CHUNK_BYTES // row_bytes))
        self.num_rows = 0
        self._waiting: list[NDArray[np.generic]] = []
        self._num_waiting = 0
        self._dataset: h5py.Dataset | None = None

    def append(self, rows: NDArray[np.generic]) -> None:
        """Add rows at the end."""
        is_large = len(rows) >= self.chunk_rows
        if is_large and self._waiting:
            self._write(self.chunk_rows)
        # what waits must not change with the caller's array; what is written at once needs no copy
        self._waiting.append(rows if is_large else np.array(rows, copy=True))
        self._num_waiting += len(rows)
        self.num_rows += len(rows)
        if self._num_waiting >= self.chunk_rows:
            self._write(self.chunk_rows)

    def close(self) -> h5py.Dataset:
        """Write what waits."""
        # HDF5 takes room for whole chunks, and a chunk of no rows is none
        return self._write(max(1, min(self.chunk_rows, self.num_rows)))

    def _write(self, chunk_rows: int) -> h5py.Dataset:
        if self._dataset is None:
            self._dataset = self._group.create_dataset(
                self._name,
                shape=(0, *self._row_shape),
                maxshape=(None, *self._row_shape),
                chunks=(chunk_rows, *(max(1, size) for size in self._row_shape)),
                dtype=self._dtype,
            )
            set_encoding(self._dataset, self._encoding)
        if self._waiting:
            written = self._dataset.shape[0]
            self._dataset.resize(self.num_rows, axis=0)
            (rows,) = self._waiting if len(self._waiting) == 1 else (np.concatenate(self._waiting),)
            self._dataset[written:] = rows
            self._waiting.clear()
            self._num_waiting = 0
        return self._dataset


class ObsWriter:
    """The ``/obs`` table of a file, growing by rows."""

    def __init__(self, root: h5py.Group) -> None:
        self._group = root.create_group("obs")
        self._columns = {INDEX: self._text(INDEX)}
        self._categories: dict[str, dict[str, int]] = {}
        for name, column_type in OBS_COLUMNS.items():
            if column_type == "category":
                group = self._group.create_group(name)
                self._columns[name] = GrowingDataset(group, "codes", dtype=_CODES)
                # both strands in any case, so that files do not differ by which came first
                self._categories[name] = {"+": 0, "-": 1} if name == "strand" else {}
            elif column_type == "integer":
                self._columns[name] = GrowingDataset(self._group, name, dtype=INTEGER)
            else:
                self._columns[name] = self._text(name)

    def _text(self, name: str) -> GrowingDataset:
        return GrowingDataset(self._group, name, dtype=TEXT, encoding=STRING_ARRAY)

    def append(self, rows: Sequence[ObsRow]) -> None:
        """Add rows at the end."""
        self._columns[INDEX].append(text_array([row.id for row in rows]))
        for name, column_type in OBS_COLUMNS.items():
            values = [getattr(row, name) for row in rows]
            if column_type == "category":
                known = self._categories[name]
                codes = [known.setdefault(value, len(known)) for value in values]
                self._columns[name].append(np.array(codes, _CODES))
            elif column_type == "integer":
                self._columns[name].append(np.array(values, INTEGER))
            else:
                self._columns[name].append(text_array(values))

    def close(self) -> None:
        """Write what waits, the categories and the table's own attributes."""
        for column in self._columns.values():
            column.close()
        for name, known in self._categories.items():
            write_text_array(self._group[name], "categories", list(known))
            self._group[name].attrs["ordered"] = False
            set_encoding(self._group[name], CATEGORICAL)
        mark_dataframe(self._group, list(OBS_COLUMNS))


def text_array(values: Sequence[str]) -> NDArray[np.object_]:
    """Make the array that h5py stores as UTF-8 text of variable length."""
    # by hand: of a list of texts NumPy makes texts of fixed width, which h5py cannot store
    array = np.empty(len(values), dtype=object)
    array[:] = [storable_text(value) for value in values]
    return array


def write_text_array(group: h5py.Group, name: str, values: Sequence[str]) -> None:
    """Write a string array at once."""
    set_encoding(group.create_dataset(name, data=text_array(values), dtype=TEXT), STRING_ARRAY)


def mark_dataframe(group: h5py.Group, columns: Sequence[str]) -> None:
    """Mark a group as a dataframe whose index is the dataset ``_index``."""
    set_encoding(group, DATAFRAME)
    group.attrs["_index"] = INDEX
    group.attrs.create("column-order", text_array(columns), dtype=TEXT)


def write_provenance(group: h5py.Group, text: str) -> None:
    """Write the provenance as JSON, and once more in AnnData's own types, for people.

    The JSON is the truth. The mirror leaves out null, and holds mixed or nested lists as JSON text.
    """
    _write_scalar(group, PROVENANCE_JSON, text)
    _write_mirror(group, json.loads(text))


def _write_mirror(group: h5py.Group, mapping: Mapping[str, JSON]) -> None:
    set_encoding(group, DICT)
    for key, value in mapping.items():
        name = escape_name(storable_text(key))
        # the JSON itself is there already, and two keys may be spelled the same once they are storable
        if name in group or value is None:
            continue
        if isinstance(value, dict):
            _write_mirror(group.create_group(name), value)
        elif isinstance(value, list):
            _write_list(group, name, value)
        else:
            _write_scalar(group, name, value)


def _write_scalar(group: h5py.Group, name: str, value: JSON) -> None:
    # AnnData's integers have 64 bits; Python's have no end
    if isinstance(value, int) and not _INT64.min <= value <= _INT64.max:
        value = str(value)
    if isinstance(value, str):
        set_encoding(group.create_dataset(name, data=storable_text(value), dtype=TEXT), STRING)
    else:
        set_encoding(group.create_dataset(name, data=value), NUMBER)


def _write_list(group: h5py.Group, name: str, values: Sequence[JSON]) -> None:
    if all(isinstance(value, str) for value in values):
        write_text_array(group, name, [str(value) for value in values])
    # not isinstance: True is an int, and NumPy would make numbers of it, or floats of integers among floats
    elif all(type(value) is float for value in values) or _are_int64(values):
        set_encoding(group.create_dataset(name, data=np.array(values)), ARRAY)
    else:
        _write_scalar(group, name, json.dumps(values))


def _are_int64(values: Sequence[JSON]) -> bool:
    return all(type(value) is int and _INT64.min <= value <= _INT64.max for value in values)


logger = logging.getLogger(__name__)


class EmbeddingWriter:
    """Writes one file, inside a ``with`` statement that ends with ``finish``.

    Everything goes to a temporary file next to the output. ``finish`` completes it, brings it to the disk and
    renames it; leaving the ``with`` without it, by an exception or not, removes it.

    Example:
        >>> import tempfile, numpy as np
        >>> from genoembed.contracts import EmbeddingBlock, ObsRow
        >>> row = ObsRow(id="chr1", description="", length=4, start=0, end=4, strand="+", source="a.fa",
        ...              n_windows=1, sha256="", flags="")
        >>> block = EmbeddingBlock(rows=(row,), matrices={"blocks.1": np.array([[0.5, 1.0]])})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with EmbeddingWriter(f"{folder}/a.h5", kind="pooled") as writer:
        ...         writer.append(block)
        ...         writer.finish({"version": "1.0"})
        ...     h5py.File(f"{folder}/a.h5")["X"][:]
        array([[0.5, 1. ]], dtype=float32)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        kind: Kind,
        dtype: StorageDtype = "float32",
        feature_names: Sequence[str] | None = None,
        overwrite: bool = False,
        staging: Path | None = None,
    ) -> None:
        _check_choices(kind, dtype, feature_names)
        self._target = check_output(path, overwrite=overwrite)
        self._path = str(path)
        self._kind = kind
        self._dtype = STORAGE_DTYPES[dtype]
        self._feature_names = None if feature_names is None else list(feature_names)
        self._overwrite = overwrite
        self._staging = staging
        self._file: AtomicFile | None = None
        self._hdf5: h5py.File | None = None
        self._widths: dict[str, int] = {}
        self._matrices: dict[str, GrowingDataset] = {}
        self._ids: set[str] = set()

    @property
    def num_rows(self) -> int:
        """Rows appended so far."""
        return len(self._ids)

    def __enter__(self) -> EmbeddingWriter:
        with self._reporting():
            self._file = AtomicFile(self._target, staging=self._staging)
            self._hdf5 = h5py.File(self._file, "w")
            self._obs = ObsWriter(self._hdf5)
            if self._kind == "tokens":
                tokens = self._hdf5.create_group("tokens")
                self._spans = [GrowingDataset(tokens, name, dtype=INTEGER) for name in SPANS]
                self._offsets = GrowingDataset(tokens, "offsets", dtype=INTEGER)
                self._offsets.append(np.zeros(1, INTEGER))  # one more than rows: a start and all the ends
                self._num_tokens = 0
        return self

    def __exit__(self, exception_type: object, *exception: object) -> None:
        if exception_type is None and self._file is not None:
            logger.warning("%s: left without finish, so nothing is written", self._path)
        self.close()

    def append(self, block: EmbeddingBlock | TokenBlock) -> None:
        """Add rows at the end. A block that is refused changes nothing, and others may follow."""
        hdf5 = self._require_open()
        matrices, lengths = self._unpack(block)
        self._check_layers(matrices)
        self._check_ids(block.rows)
        ends = np.cumsum(lengths)
        # all that can be refused is refused before the first dataset grows
        stored = {name: self._convert(name, matrix, block, ends) for name, matrix in matrices.items()}
        with self._reporting():
            if not self._matrices:
                self._widths = {name: matrix.shape[1] for name, matrix in stored.items()}
                self._matrices = {name: self._new_matrix(hdf5, name) for name in stored}
            for name, matrix in stored.items():
                self._matrices[name].append(matrix)
            if isinstance(block, TokenBlock):
                for dataset, places in zip(self._spans, block.spans.T, strict=True):
                    dataset.append(places.astype(INTEGER))
                self._offsets.append(ends + self._num_tokens)
                self._num_tokens += int(lengths.sum())
            self._obs.append(block.rows)
        self._ids.update(row.id for row in block.rows)

    def finish(self, provenance: Mapping[str, JSON]) -> None:
        """Complete the file, bring it to the disk and give it its name."""
        hdf5 = self._require_open()
        if not self._matrices:
            problem = "no block was appended, so the width is unknown; append at least one, if without rows"
            raise StoreError(problem, path=self._path)
        text = self._provenance_text(provenance)
        check_output(self._path, overwrite=self._overwrite)  # another process may have been faster
        with self._reporting():
            self._complete(hdf5, text)
            # HDF5 knows where chunks lie only while the file is open, and the seal covers the closed file
            gaps = number_chunks(hdf5)
            hdf5.close()
            if self._file is not None:
                write_seal(self._file, gaps)
                self._file.commit()
        self._file = self._hdf5 = None
        logger.info("%s: wrote %s rows", self._path, self.num_rows)

    def close(self) -> None:
        """Remove the temporary file if it is not finished. Does nothing after ``finish``."""
        file, hdf5, self._file, self._hdf5 = self._file, self._hdf5, None, None
        if file is not None:
            # HDF5 need not write what is thrown away, and must not fail on it
            file.error = file.error or InterruptedError()
        if hdf5 is not None:
            try:
                hdf5.close()
            except (OSError, RuntimeError, ValueError) as error:
                logger.debug("%s: HDF5 could not close the discarded file: %s", self._path, error)
        if file is not None:
            file.discard()

    def _require_open(self) -> h5py.File:
        if self._hdf5 is None:
            problem = "the writer is not open; use it inside 'with EmbeddingWriter(...) as writer:'"
            raise StoreError(problem, path=self._path)
        return self._hdf5

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turn a failed write into one StoreError, after removing the temporary file."""
        failure: BaseException | None = None
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            failure = error
        # the file keeps a failed write from HDF5, which went on then as if nothing had happened
        if self._file is not None and self._file.error is not None:
            failure = self._file.error
        if failure is None:
            return
        self.close()
        if not isinstance(failure, Exception):  # Ctrl-C while HDF5 wrote
            raise failure
        reason = getattr(failure, "strerror", None) or str(failure)
        problem = (
            f"could not be written ({reason}), nothing is left of it; check the free space, quota and "
            f"permissions of {str(self._target.parent)!r}, or set output to another disk"
        )
        raise StoreError(problem, path=self._path) from failure

    def _unpack(
        self, block: EmbeddingBlock | TokenBlock
    ) -> tuple[Mapping[str, NDArray[np.floating]], NDArray[np.int64]]:
        """Return the matrices by layer, and how many rows of them belong to each record."""
        if isinstance(block, EmbeddingBlock) and self._kind == "pooled":
            return block.matrices, np.ones(len(block.rows), INTEGER)
        if isinstance(block, TokenBlock) and self._kind == "tokens":
            if (block.lengths < 0).any():
                message = f"lengths holds {block.lengths.min()}, expected 0 or more tokens a record"
                raise ShapeError(message)
            return block.values, block.lengths.astype(INTEGER)
        message = f"{self._path}: a {type(block).__name__} does not belong in a file of kind {self._kind!r}"
        raise ShapeError(message)

    def _check_layers(self, matrices: Mapping[str, NDArray[np.floating]]) -> None:
        widths = {name: matrix.shape[1] for name, matrix in matrices.items()}
        if self._matrices:
            if list(widths.items()) != list(self._widths.items()):
                message = (
                    f"{self._path}: the block has layers (and widths) {widths}, expected {self._widths} "
                    "as in the first block"
                )
                raise ShapeError(message)
            return
        if not widths or 0 in widths.values():
            message = (
                f"{self._path}: the block has layers (and widths) {widths}, expected one or more, not empty"
            )
            raise ShapeError(message)
        for name in widths:
            if self._kind == "tokens" and name in TOKENS_PARTS:
                problem = f"layer {name!r} has the name of a part of the file; rename it"
                raise StoreError(problem, path=self._path)
            if storable_text(name) != name:
                problem = f"layer {name!r}: holds NUL or is not valid Unicode, which HDF5 refuses; rename it"
                raise StoreError(problem, path=self._path)
        first = next(iter(widths))
        if self._feature_names is not None and len(self._feature_names) != widths[first]:
            message = (
                f"feature_names has {len(self._feature_names)} names, expected {widths[first]} as {first!r}"
            )
            raise ShapeError(message)

    def _check_ids(self, rows: Sequence[ObsRow]) -> None:
        seen: set[str] = set()
        for row in rows:
            if storable_text(row.id) != row.id:
                problem = f"record {row.id!r}: the id holds NUL or is not valid Unicode; rename the record"
                raise StoreError(problem, path=self._path)
            if row.id in seen or row.id in self._ids:
                problem = (
                    "is in this file already, but ids must be unique; rename one or set duplicates='suffix'"
                )
                raise DuplicateIdError(problem, path=self._path, record_id=row.id)
            seen.add(row.id)

    def _convert(
        self,
        name: str,
        matrix: NDArray[np.floating],
        block: EmbeddingBlock | TokenBlock,
        ends: NDArray[np.int64],
    ) -> NDArray[np.floating]:
        """Bring to the dtype of the file, refusing what is not finite."""
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and is refused below
            converted = np.asarray(matrix, dtype=self._dtype)
        # in parts: the tokens of one record may fill most of the memory
        parts = range(0, len(converted), MAX_CHUNK_ROWS)
        if all(np.isfinite(converted[start : start + MAX_CHUNK_ROWS]).all() for start in parts):
            return converted
        finite = np.isfinite(converted)
        if self._kind == "pooled":
            finite |= np.array([[has_failed(row.flags)] for row in block.rows]) & np.isnan(converted)
            if finite.all():
                return converted
        row, column = np.argwhere(~finite)[0]
        # in per-token files a row is a token; its record is the first that ends behind it
        record_id = block.rows[int(np.searchsorted(ends, row, side="right"))].id
        value = matrix[row, column]
        problem = f"layer {name!r} has the value {value} at feature {column}"
        if np.isfinite(value):
            largest = np.finfo(self._dtype).max
            problem += f", over {self._dtype.name}'s largest, {largest}; set out_dtype to float32"
        else:
            problem += ", expected a finite number; set dtype to float32, or leave the record out"
        raise NonFiniteError(problem, record_id=record_id)

    def _new_matrix(self, hdf5: h5py.File, name: str) -> GrowingDataset:
        link = escape_name(name)
        if self._kind == "tokens":
            group, link = hdf5.require_group("tokens").create_group(link), "values"
        elif name == next(iter(self._widths)):
            group, link = hdf5, "X"
        else:
            group = hdf5.require_group("obsm")
        return GrowingDataset(group, link, dtype=self._dtype, width=self._widths[name])

    def _complete(self, hdf5: h5py.File, provenance_text: str) -> None:
        """Write what is known at the end only."""
        for matrix in self._matrices.values():
            matrix.close()
        self._obs.close()
        if self._kind == "tokens":
            for part in (self._offsets, *self._spans):
                part.close()
        else:
            self._complete_anndata(hdf5)
        set_encoding(hdf5.require_group("uns"), DICT)
        write_provenance(hdf5.require_group(PROVENANCE), provenance_text)
        set_encoding(hdf5, ROOT_ENCODINGS[self._kind])
        hdf5.attrs[SCHEMA_ATTR] = SCHEMA_VERSION
        hdf5.attrs[LAYERS_ATTR] = list(self._matrices)

    def _complete_anndata(self, hdf5: h5py.File) -> None:
        first = next(iter(self._widths))
        obsm = hdf5.require_group("obsm")
        set_encoding(obsm, DICT)
        if len(self._matrices) > 1:
            obsm[escape_name(first)] = hdf5["X"]  # a hard link: the same data under a second name
        var = hdf5.create_group("var")
        names = self._feature_names or [f"{first}:{index}" for index in range(self._widths[first])]
        write_text_array(var, INDEX, names)
        mark_dataframe(var, [])
        for name in EMPTY_GROUPS:
            set_encoding(hdf5.create_group(name), DICT)

    def _provenance_text(self, provenance: Mapping[str, JSON]) -> str:
        try:
            return json.dumps(provenance, allow_nan=False, default=_plain_dict)
        except (TypeError, ValueError) as error:
            problem = (
                f"the provenance is not JSON ({error}); give texts, finite numbers, lists and dicts only"
            )
            raise StoreError(problem, path=self._path) from error


def _plain_dict(value: object) -> dict[str, JSON]:
    if isinstance(value, Mapping):
        return dict(value)
    message = f"{value!r} is a {type(value).__name__}"
    raise TypeError(message)


def _check_choices(kind: str, dtype: str, feature_names: Sequence[str] | None) -> None:
    problems = []
    if kind not in ROOT_ENCODINGS:
        problems.append(f"kind is {kind!r}, expected one of {', '.join(ROOT_ENCODINGS)}")
    if dtype not in STORAGE_DTYPES:
        problems.append(f"out_dtype is {dtype!r}, expected one of {', '.join(STORAGE_DTYPES)}")
    if feature_names is not None and kind == "tokens":
        problems.append("feature_names is for kind 'pooled' only; leave it out for 'tokens'")
    if feature_names is not None and len(set(feature_names)) != len(feature_names):
        problems.append("feature_names holds a name twice; give every feature its own name")
    if problems:
        raise ConfigError(*problems)
