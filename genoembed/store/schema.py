"""Names, encodings and columns of schema 2 (``docs/FORMAT.md``), and matrices that are read where indexed.

N rows (one per record), D width of a layer.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, NoReturn, TypeAlias

import h5py
import numpy as np

from genoembed.errors import GenoembedError, StoreError, StoreFormatError

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


def unescape_name(link: str) -> str:
    """Return the name that ``escape_name`` made a link name of.

    Example:
        >>> [unescape_name(escape_name(name)) for name in ("a/b%", ".", "")]
        ['a/b%', '.', '']
    """
    return "" if link == "%" else link.replace("%2E", ".").replace("%2F", "/").replace("%25", "%")


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
    # two attributes of every object: by h5py's high-level calls, half of the time that a small file takes
    for name, text in ((b"encoding-type", encoding.type), (b"encoding-version", encoding.version)):
        if h5py.h5a.exists(node.id, name):
            h5py.h5a.delete(node.id, name)
        h5py.h5a.create(node.id, name, _TEXT, _SCALAR).write(np.array(text, dtype=object))


_TEXT = h5py.h5t.py_create(h5py.string_dtype("utf-8"), logical=True)
_SCALAR = h5py.h5s.create(h5py.h5s.SCALAR)


_BEST_COMPRESSION = 1100  # deflate, which HDF5 uses, makes at most a thousandth
SLAB_BYTES = 4 * 1024 * 1024
"""What is read at once where rows or columns are picked."""


def refuse(problem: str, path: str) -> NoReturn:
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
        refuse(f"{dataset.name} claims shape {dataset.shape} in a file of {file_bytes} bytes", path)


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

    def is_at(self, dataset: h5py.Dataset) -> bool:
        """Return whether this is the matrix of a data set."""
        return bool(self._dataset == dataset)

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
