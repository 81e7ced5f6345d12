"""Columns of AnnData's tables, in every encoding that AnnData has had since version 0.7.

In: the group of a table in an open file. Out: NumPy arrays. The columns of ours are text or integers however
another program stored them: text becomes categorical, and integers floating point, on the way through pandas.

N rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from genoembed.store.schema import INDEX, INTEGER, NOT_KNOWN, OBS_COLUMNS, closed, reading

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

NO_STRAND = "."
"""Strand of a row of which none is known, as BED and GFF3 write it."""
PARTS = {
    "categorical": ("codes", "categories"),
    "nullable-integer": ("values", "mask"),
    "nullable-boolean": ("values", "mask"),
    "nullable-string-array": ("values", "mask"),
}
"""Columns that are groups: what is in them, first what has one element per row."""


def encoding_of(node: h5py.Group | h5py.Dataset) -> str:
    """Return the encoding that an element says it has; empty where it says none, as before AnnData 0.8."""
    found = node.attrs.get("encoding-type", "")
    return found if isinstance(found, str) else ""


def has_categories_elsewhere(node: h5py.Group | h5py.Dataset) -> bool:
    """Tell a column of AnnData before 0.8: its categories are a reference, which means nothing in a copy."""
    return isinstance(node.attrs.get("categories"), h5py.Reference)


def shape_of(node: h5py.Group | h5py.Dataset) -> tuple[int, ...]:
    """Return the shape of a matrix, sparse or not; of anything else none."""
    if isinstance(node, h5py.Dataset):
        return tuple(node.shape)
    return tuple(int(size) for size in node.attrs.get("shape", node.attrs.get("h5sparse_shape", ())))


def index_name(table: h5py.Group) -> str:
    """Return the name of the dataset that is the index of a table."""
    return str(table.attrs.get("_index", INDEX))


def column_names(table: h5py.Group) -> list[str]:
    """Return the names of a table's columns, in order."""
    # AnnData writes the names of no columns as an empty array of numbers
    return [str(name) for name in table.attrs["column-order"]]


def read_column(column: h5py.Group | h5py.Dataset) -> NDArray[Any]:
    """Read a column: text as objects (missing text is empty), numbers as they are (missing ones are NaN)."""
    if isinstance(column, h5py.Dataset):
        return _read_dataset(column)
    kind = encoding_of(column)
    if kind == "categorical":
        return _decoded(column["codes"][:], read_column(column["categories"]), column.name)
    if kind not in PARTS:
        message = f"{column.name} is encoded as {kind or 'nothing known'!r}, expected a column of a table"
        raise TypeError(message)
    values, is_missing = read_column(column["values"]), column["mask"][:]
    if is_missing.any():
        values = values.astype(object if values.dtype.kind in "Ob" else float)
        values[is_missing] = "" if values.dtype.kind == "O" else np.nan
    return values


def read_text(column: h5py.Group | h5py.Dataset) -> list[str]:
    """Read a column of names; one of numbers raises ``TypeError``."""
    values = read_column(column)
    if values.dtype.kind != "O":
        message = f"{column.name} has dtype {values.dtype}, expected text"
        raise TypeError(message)
    return list(values)


def _read_dataset(column: h5py.Dataset) -> NDArray[Any]:
    categories = column.attrs.get("categories")
    if isinstance(categories, h5py.Reference):  # AnnData before 0.8: codes that refer to a dataset elsewhere
        return _decoded(column[:], _read_dataset(column.file[categories]), column.name)
    if h5py.check_string_dtype(column.dtype) is not None:
        return column.asstr()[:]
    return column[:]


def _decoded(codes: NDArray[np.integer], categories: NDArray[Any], where: str) -> NDArray[Any]:
    """Replace codes by categories; -1 is a value that is missing."""
    if len(codes) and not -1 <= codes.min() <= codes.max() < len(categories):
        message = f"{where} has codes {codes.min()} to {codes.max()} for {len(categories)} categories"
        raise ValueError(message)
    is_missing = codes < 0
    if not is_missing.any():
        return categories[codes]
    if categories.dtype.kind == "O":
        missing: object = ""
    else:
        missing, categories = np.nan, categories.astype(float)
    return np.append(categories, np.array([missing], categories.dtype))[codes]


def is_known_column(column: h5py.Group | h5py.Dataset) -> bool:
    """Return whether a column can be read."""
    return isinstance(column, h5py.Dataset) or encoding_of(column) in PARTS


def joined_column(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Join parts of a column; where a file lacks it, numbers are NaN and text is empty."""
    kinds = {part.dtype.kind for part in parts if not _is_missing(part)}
    if kinds <= set("iuf"):
        is_whole = all(not _is_missing(part) for part in parts) and kinds <= set("iu")
        kind = INTEGER if is_whole else np.dtype(float)
        return np.concatenate(
            [np.full(len(part), np.nan) if _is_missing(part) else part.astype(kind) for part in parts]
        )
    if kinds == {"b"} and not any(map(_is_missing, parts)):
        return np.concatenate(parts)
    return np.concatenate([part.astype(object) for part in parts])


def _is_missing(part: NDArray[Any]) -> bool:
    return part.dtype.kind == "O" and all(value is None for value in part)


class ObsTable(Mapping[str, "NDArray[Any]"]):
    """Columns of the table of records: text as object arrays of ``str``, numbers as int64.

    The columns that every embedding file has are there by name even where another program took them out: with
    -1, no text, or ``.`` for the strand. Iterating gives what is in the file.
    """

    def __init__(self, group: h5py.Group, path: str, num_rows: int) -> None:
        self._group = group
        self._path = path
        self._num_rows = num_rows
        self._read: dict[str, NDArray[Any]] = {}
        with reading(path):
            self._names = [name for name in column_names(group) if is_known_column(group[name])]

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, column: object) -> bool:
        return column in self._names

    def __getitem__(self, column: str) -> NDArray[Any]:
        if column not in self._names and column not in OBS_COLUMNS:
            raise KeyError(column)
        if column not in self._read:
            self._read[column] = self._found(column)
        return self._read[column]

    def _found(self, column: str) -> NDArray[Any]:
        if column not in self._names:
            return _as_ours(np.full(self._num_rows, "", object), column)
        if not self._group:
            raise closed(self._path)
        with reading(self._path):
            values = read_column(self._group[column])
            return _as_ours(values, column) if column in OBS_COLUMNS else values

    def __repr__(self) -> str:
        return f"ObsTable({', '.join(self._names)})"


def _as_ours(values: NDArray[Any], column: str) -> NDArray[Any]:
    """Bring one of the columns that every embedding file has to its own type."""
    if OBS_COLUMNS[column] == "integer":
        if values.dtype.kind in "iu":
            return values.astype(np.int64)
        numbers = np.array([NOT_KNOWN if value in ("", None) else value for value in values], dtype=float)
        return np.where(np.isfinite(numbers), numbers, NOT_KNOWN).astype(np.int64)
    if values.dtype.kind != "O":
        values = np.array(["" if value != value else str(value) for value in values], dtype=object)
    if column == "strand":
        values = np.where(values == "", NO_STRAND, values)
    return values
