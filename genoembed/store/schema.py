"""Names, encodings and columns of schema 2, and files held against it; ``docs/FORMAT.md`` says it in words.

The parts of a file are checked to belong together, and matrices are read where they are indexed.

N rows (one per record), T tokens of all records together, D width of a layer.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, NoReturn, TypeAlias

import h5py
import numpy as np

from genoembed.errors import GenoembedError, SchemaVersionError, StoreError, StoreFormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import DTypeLike, NDArray

    from genoembed.config.choices import StorageDtype

    Index: TypeAlias = "int | slice | Sequence[int] | NDArray[np.integer] | NDArray[np.bool_]"


JSON: TypeAlias = "str | int | float | bool | Sequence[JSON] | Mapping[str, JSON] | None"
Kind: TypeAlias = Literal["pooled", "tokens"]
ColumnType: TypeAlias = Literal["text", "integer", "category"]


class Encoding(NamedTuple):
    """What ``encoding-type`` and ``encoding-version`` of an HDF5 object say."""

    type: str
    version: str


SCHEMA_VERSION: Final = 2
"""The version this package writes, and the newest that it reads."""
SCHEMA_ATTR: Final = "genoembed-schema"
LAYERS_ATTR: Final = "genoembed-layers"
TRANSFORM_ATTR: Final = "genoembed-transform"
MUTATIONS_ATTR: Final = "genoembed-mutations"
OTHER_FILES: Final[Mapping[str, str]] = {
    TRANSFORM_ATTR: "a transform that fit-transform wrote",
    MUTATIONS_ATTR: "a matrix of score --mutagenesis, which anndata.read_h5ad opens",
}
"""Files of ours that hold no embeddings, by the attribute that they have."""

ROOT_ENCODINGS: Final[Mapping[Kind, Encoding]] = {
    "pooled": Encoding("anndata", "0.1.0"),
    "tokens": Encoding("genoembed-tokens", "0.1.0"),
}
ARRAY: Final = Encoding("array", "0.2.0")
CATEGORICAL: Final = Encoding("categorical", "0.2.0")
DATAFRAME: Final = Encoding("dataframe", "0.2.0")
DICT: Final = Encoding("dict", "0.1.0")
NUMBER: Final = Encoding("numeric-scalar", "0.2.0")
STRING: Final = Encoding("string", "0.2.0")
STRING_ARRAY: Final = Encoding("string-array", "0.2.0")

STORAGE_DTYPES: Final[Mapping[StorageDtype, np.dtype[np.floating]]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
}
INTEGER: Final = np.dtype("<i8")

INDEX: Final = "_index"
OBS_COLUMNS: Final[Mapping[str, ColumnType]] = {
    "description": "text",
    "length": "integer",
    "start": "integer",
    "end": "integer",
    "strand": "category",
    "source": "category",
    "n_windows": "integer",
    "sha256": "text",
    "flags": "text",
    "unread": "integer",
}
"""Columns of ``/obs``, in order: the fields of ``ObsRow`` after the id."""
SINCE: Final[Mapping[str, int]] = {"unread": 2}
"""Columns that the first schema lacks, and the one that they came with."""
NOT_KNOWN: Final = -1
"""What stands for a number that a file of an earlier schema does not hold."""
SPANS: Final = ("start", "end")
"""Datasets of a per-token file that say which bases each token has; since schema 2."""
TOKENS_PARTS: Final = ("offsets", *SPANS)
"""Datasets of a per-token file that no layer may be called like."""

FAILED: Final = "failed"
"""Flag of a row without a vector; a reason may follow after a colon."""
PROVENANCE: Final = "uns/genoembed"
PROVENANCE_JSON: Final = "provenance_json"
EMPTY_GROUPS: Final = ("layers", "obsp", "varm", "varp")


def escape_name(name: str) -> str:
    """Turn any name into one HDF5 link name that is never a path.

    ``%`` becomes ``%25``, ``/`` becomes ``%2F``, the whole name ``.`` (HDF5's "here") ``%2E``
    and the empty name ``%``; different names stay different.

    Example:
        >>> escape_name("blocks.28.mlp.l3"), escape_name("a/b%")
        ('blocks.28.mlp.l3', 'a%2Fb%25')
    """
    special = {".": "%2E", "": "%"}
    return special.get(name) or name.replace("%", "%25").replace("/", "%2F")


def storable_text(text: str) -> str:
    r"""Spell what HDF5 text cannot hold (NUL, lone surrogates) as backslash escapes.

    Example:
        >>> storable_text("a\0b") == r"a\x00b"
        True
    """
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")


def has_failed(flags: str) -> bool:
    """Return whether a row has no vector because its record failed.

    Example:
        >>> has_failed("masked:3,failed:not finite"), has_failed("renamed")
        (True, False)
    """
    return any(flag == FAILED or flag.startswith(f"{FAILED}:") for flag in flags.split(","))


def set_encoding(node: h5py.Group | h5py.Dataset, encoding: Encoding) -> None:
    """Mark a group or dataset with its encoding."""
    node.attrs["encoding-type"] = encoding.type
    node.attrs["encoding-version"] = encoding.version


_BEST_COMPRESSION = 1100  # deflate, which HDF5 uses, makes at most a thousandth
SLAB_BYTES = 4 * 1024 * 1024
"""What is read at once where rows or columns are picked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The checked parts of an open file."""

    kind: Kind
    schema_version: int
    num_rows: int
    matrices: Mapping[str, LazyMatrix]
    """By layer, in the requested order: ``(N, D)``, in per-token files ``(T, D)``."""
    offsets: NDArray[np.int64] | None
    """First token of each record and the end, ``(N + 1,)``; None in pooled files."""
    spans: tuple[h5py.Dataset, ...]
    """First base of each token, and one past its last, ``(T,)`` each; empty where the file does not say."""


def _refuse(problem: str, path: str) -> NoReturn:
    """Raise for a file that is not what was written."""
    problem += "; the file is damaged; make it again or restore it from a copy"
    raise StoreFormatError(problem, path=path)


def closed(path: str) -> StoreError:
    """Build the error for a file that is read after it was closed."""
    return StoreError("is closed; open it again with open_embeddings and read inside the 'with'", path=path)


def check_size(dataset: h5py.Dataset, path: str) -> None:
    """Raise if a dataset claims more than its file can hold, before memory is taken for it."""
    file_bytes = Path(path).stat().st_size
    if dataset.size and dataset.size * dataset.dtype.itemsize > _BEST_COMPRESSION * file_bytes:
        _refuse(f"{dataset.name} claims shape {dataset.shape} in a file of {file_bytes} bytes", path)


def read_layout(hdf5: h5py.File, path: str) -> Layout:
    """Check an open file against the schema."""
    with reading(path):
        # first of all: a file of a newer format is no damaged one, whatever else is not as expected
        version = _read_version(hdf5, path)
        kind = _read_kind(hdf5, path)
        num_rows = _check_obs(hdf5, path, version)
        _member(hdf5, f"{PROVENANCE}/{PROVENANCE_JSON}", path)
        layers = [str(name) for name in hdf5.attrs[LAYERS_ATTR]]
        if not layers:
            _refuse(f"attribute {LAYERS_ATTR} is empty, expected one layer or more", path)
        offsets = _read_offsets(hdf5, num_rows, path) if kind == "tokens" else None
        rows = num_rows if offsets is None else int(offsets[-1])
        matrices = {name: _matrix(hdf5, where, rows, path) for name, where in _places(kind, layers).items()}
        spans = (
            () if offsets is None or version < 2 else tuple(_span(hdf5, name, rows, path) for name in SPANS)
        )
        if kind == "pooled":
            width = matrices[layers[0]].shape[1]
            _check_length(_member(hdf5, f"var/{INDEX}", path), width, "features of X", path)
    return Layout(
        kind=kind,
        schema_version=version,
        num_rows=num_rows,
        matrices=matrices,
        offsets=offsets,
        spans=spans,
    )


def _read_version(hdf5: h5py.File, path: str) -> int:
    version = hdf5.attrs.get(SCHEMA_ATTR)
    others = [words for name, words in OTHER_FILES.items() if name in hdf5.attrs]
    if version is None and others:
        problem = f"is {others[0]}, expected a file of embeddings; check the path"
        raise StoreFormatError(problem, path=path)
    if version is None:
        problem = f"has no attribute {SCHEMA_ATTR}, so genoembed did not write it; check the path"
        if hdf5.attrs.get("encoding-type") == "anndata":
            problem += ", or open it with anndata.read_h5ad"
        raise StoreFormatError(problem, path=path)
    if not isinstance(version, (int, np.integer)) or version < 1:
        _refuse(f"attribute {SCHEMA_ATTR} is {version!r}, expected 1 to {SCHEMA_VERSION}", path)
    if version > SCHEMA_VERSION:
        raise SchemaVersionError(path=path, found=int(version), supported=SCHEMA_VERSION)
    return int(version)


def _read_kind(hdf5: h5py.File, path: str) -> Kind:
    found = hdf5.attrs.get("encoding-type")
    for kind, encoding in ROOT_ENCODINGS.items():
        if found == encoding.type:
            return kind
    expected = " or ".join(encoding.type for encoding in ROOT_ENCODINGS.values())
    _refuse(f"attribute encoding-type is {found!r}, expected {expected}", path)


def _places(kind: Kind, layers: list[str]) -> dict[str, str]:
    """Return where each layer's matrix is."""
    if kind == "tokens":
        return {name: f"tokens/{escape_name(name)}/values" for name in layers}
    return {name: f"obsm/{escape_name(name)}" if index else "X" for index, name in enumerate(layers)}


def _member(hdf5: h5py.File, where: str, path: str) -> h5py.Dataset:
    node = hdf5.get(where)
    if not isinstance(node, h5py.Dataset):
        found = "is missing" if node is None else "is a group"
        _refuse(f"/{where} {found}, expected a dataset", path)
    check_size(node, path)
    return node


def _check_length(dataset: h5py.Dataset, expected: int, of_what: str, path: str) -> None:
    if dataset.shape != (expected,):
        _refuse(f"{dataset.name} has shape {dataset.shape}, expected ({expected},), the {of_what}", path)


def _matrix(hdf5: h5py.File, where: str, rows: int, path: str) -> LazyMatrix:
    dataset = _member(hdf5, where, path)
    if dataset.ndim != 2 or dataset.shape[0] != rows or not dataset.shape[1] or dataset.dtype.kind != "f":
        problem = (
            f"/{where} has shape {dataset.shape} and dtype {dataset.dtype}, expected ({rows}, D) "
            "and floating point"
        )
        _refuse(problem, path)
    return LazyMatrix(dataset, path)


def _check_obs(hdf5: h5py.File, path: str, version: int) -> int:
    index = _member(hdf5, f"obs/{INDEX}", path)
    rows = index.shape[0] if index.ndim == 1 else -1
    _check_length(index, rows, "rows", path)
    for name, column_type in OBS_COLUMNS.items():
        if SINCE.get(name, 1) > version:
            continue
        where = f"obs/{name}/codes" if column_type == "category" else f"obs/{name}"
        _check_length(_member(hdf5, where, path), rows, "rows of /obs", path)
        if column_type == "category":
            _member(hdf5, f"obs/{name}/categories", path)
    return rows


def _read_offsets(hdf5: h5py.File, num_rows: int, path: str) -> NDArray[np.int64]:
    dataset = _member(hdf5, "tokens/offsets", path)
    _check_length(dataset, num_rows + 1, "rows of /obs and one more", path)
    offsets: NDArray[np.int64] = dataset[:].astype(np.int64)
    if offsets[0] != 0 or (np.diff(offsets) < 0).any():
        _refuse("/tokens/offsets does not rise from 0", path)
    return offsets


def _span(hdf5: h5py.File, name: str, rows: int, path: str) -> h5py.Dataset:
    dataset = _member(hdf5, f"tokens/{name}", path)
    _check_length(dataset, rows, "tokens of all records", path)
    if dataset.dtype.kind != "i":
        _refuse(f"{dataset.name} has dtype {dataset.dtype}, expected integers", path)
    return dataset


DAMAGE = (OSError, RuntimeError, LookupError, ArithmeticError, ValueError, TypeError, AttributeError)
"""What h5py and NumPy raise at a damaged file."""


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Report what HDF5 or NumPy say about a damaged file as one error that names the file."""
    try:
        yield
    except GenoembedError:
        raise
    except DAMAGE as error:
        reason = " ".join(str(error).split())
        problem = f"cannot be read ({reason}), the file is damaged; make it again or restore it from a copy"
        raise StoreFormatError(problem, path=path) from error


class LazyMatrix:
    """Rows of one layer, read from the file when they are needed.

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
        self.origin: tuple[Callable[..., LazyMatrix], tuple[object, ...]] | None = None
        """How to open it again in another process."""

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazyMatrix({self.shape[0]} x {self.shape[1]}, {self.dtype.name})"

    def __reduce__(self) -> tuple[Callable[..., LazyMatrix], tuple[object, ...]]:
        if self.origin is None or not self._dataset:
            raise closed(self._path)
        return self.origin

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
            # a range checks the bounds, and counts negative numbers from the end, as a list does
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
            raise closed(self._path)
        with reading(self._path):
            return self._dataset[start:stop]

    def _span(self, start: int, stop: int, columns: Index) -> NDArray[np.floating]:
        """Consecutive rows; where columns are picked, never more than a slab of whole rows at once."""
        if isinstance(columns, slice) and columns == slice(None):
            return self._read(start, stop)
        step = self._slab_rows()
        # where there are no rows, one read of none still gives the width that the columns have
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
        # as in NumPy: a list of columns next to a list of rows goes with it, one value for each pair
        is_paired = not isinstance(columns, (slice, int, np.integer))
        return picked[np.arange(len(picked)), columns] if is_paired else picked[:, columns]
