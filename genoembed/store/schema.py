"""Names, encodings and columns of schema 1; ``docs/FORMAT.md`` is the same in words.

N rows (one per record), T tokens of all records together, D width of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import h5py

    from genoembed.config.choices import StorageDtype

JSON: TypeAlias = "str | int | float | bool | Sequence[JSON] | Mapping[str, JSON] | None"
Kind: TypeAlias = Literal["pooled", "tokens"]
ColumnType: TypeAlias = Literal["text", "integer", "category"]


class Encoding(NamedTuple):
    """What ``encoding-type`` and ``encoding-version`` of an HDF5 object say."""

    type: str
    version: str


SCHEMA_VERSION: Final = 1
"""The version this package writes, and the newest that it reads."""
SCHEMA_ATTR: Final = "genoembed-schema"
LAYERS_ATTR: Final = "genoembed-layers"

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
}
"""Columns of ``/obs``, in order: the fields of ``ObsRow`` after the id."""

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
