"""Parts of a file that grow by appending, and the parts written once at its end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import h5py
import numpy as np

from genoembed.store.schema import (
    ARRAY,
    CATEGORICAL,
    DATAFRAME,
    DICT,
    INDEX,
    INTEGER,
    NUMBER,
    OBS_COLUMNS,
    PROVENANCE_JSON,
    STRING,
    STRING_ARRAY,
    Encoding,
    escape_name,
    set_encoding,
    storable_text,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.contracts import ObsRow
    from genoembed.store.schema import JSON

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
        self._waiting.append(rows)
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
            self._dataset[written:] = np.concatenate(self._waiting)
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
