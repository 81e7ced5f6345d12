"""A fitted transform as one small HDF5 file: arrays, what they mean, and what they were fitted on.

In: arrays and facts. Out: the file, or what it holds. Promised: a file appears whole or not at all; one that
is damaged, or of a newer format, is refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import h5py
import numpy as np

from genoembed.atomic import AtomicFile, check_output, reporting_writes
from genoembed.errors import SchemaVersionError, StoreFormatError
from genoembed.store.schema import TRANSFORM_ATTR, check_size, reading
from genoembed.store.seal import number_chunks, open_hdf5, write_seal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from numpy.typing import NDArray

TRANSFORM_VERSION: Final = 1
_FACTS = "facts_json"
_DIGEST = "sha256"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTransform:
    """What a transform file holds."""

    arrays: Mapping[str, NDArray[np.float64]]
    """By name."""
    facts: Mapping[str, Any]
    """What the arrays mean, and how they were made; what JSON holds."""

    @property
    def digest(self) -> str:
        """SHA-256 of the arrays and facts, as hexadecimal digits."""
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode())
        for name in sorted(self.arrays):
            array = np.ascontiguousarray(self.arrays[name], dtype="<f8")
            digest.update(f"\0{name}{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


def write_transform(stored: StoredTransform, path: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Write a transform."""
    target = check_output(path, overwrite=overwrite)
    with reporting_writes(path), AtomicFile(target) as file:
        with h5py.File(file, "w") as hdf5:
            hdf5.attrs[TRANSFORM_ATTR] = TRANSFORM_VERSION
            hdf5.attrs[_DIGEST] = stored.digest
            hdf5.create_dataset(_FACTS, data=json.dumps(stored.facts), dtype=h5py.string_dtype("utf-8"))
            for name, array in stored.arrays.items():
                hdf5.create_dataset(f"arrays/{name}", data=np.asarray(array, dtype="<f8"))
            gaps = number_chunks(hdf5)
        write_seal(file, gaps)


def read_transform(path: str | PathLike[str]) -> StoredTransform:
    """Read a transform."""
    name = str(path)
    with open_hdf5(Path(name)) as hdf5, reading(name):
        version = hdf5.attrs.get(TRANSFORM_ATTR)
        if not isinstance(version, (int, np.integer)) or version < 1:
            problem = f"has no attribute {TRANSFORM_ATTR}, expected a file of fit-transform; check the path"
            raise StoreFormatError(problem, path=name)
        if version > TRANSFORM_VERSION:
            raise SchemaVersionError(path=name, found=int(version), supported=TRANSFORM_VERSION)
        stored = StoredTransform(
            arrays={key: _whole(dataset, name).astype(np.float64) for key, dataset in hdf5["arrays"].items()},
            facts=json.loads(_whole(hdf5[_FACTS], name)),
        )
        if hdf5.attrs[_DIGEST] != stored.digest:
            problem = "its digest is not that of its values, so the file is damaged; fit the transform again"
            raise StoreFormatError(problem, path=name)
    return stored


def _whole(dataset: h5py.Dataset, path: str) -> Any:
    check_size(dataset, path)
    return dataset[()]
