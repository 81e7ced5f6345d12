"""Files of mutation maps: what each base in the place of each position of some records does to a score.

In: maps of records, one after the other. Out: one HDF5 file that AnnData reads, positions as rows and bases
as columns (``docs/FORMAT.md``). Promised: it appears whole or not at all; only one process writes it.

P positions of a record.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import h5py
import numpy as np

from genoembed.atomic import AtomicFile, check_output, reporting_writes
from genoembed.store.schema import (
    CATEGORICAL,
    DICT,
    EMPTY_GROUPS,
    INDEX,
    INTEGER,
    MUTATIONS_ATTR,
    PROVENANCE,
    ROOT_ENCODINGS,
    set_encoding,
)
from genoembed.store.seal import number_chunks, write_seal
from genoembed.store.writer import (
    TEXT,
    GrowingDataset,
    mark_dataframe,
    text_array,
    write_provenance,
    write_text_array,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from os import PathLike

    from numpy.typing import NDArray

    from genoembed.contracts import Strand
    from genoembed.store.schema import JSON

MUTATIONS_VERSION: Final = 1
MAP_BASES: Final = "ACGT"
"""Columns of the matrices."""
NO_METHOD: Final = 0
"""Stands where nothing was compared: at the reference's own base, and where there is no score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MutationMap:
    """The scores of all changes of one record, on the forward strand."""

    record: str
    """Its id."""
    contig: str
    start: int
    """First position, 0-based."""
    strand: Strand
    """Which strand the model read."""
    reference: str
    """The bases, upper case, one per position."""
    delta_P4: NDArray[np.float32]
    """``(P, 4)``: 0 at the reference's base, NaN where there is no score."""
    method_P4: NDArray[np.uint8]
    """``(P, 4)``: how the allele was compared, as a number among the file's methods."""
    joined_P: NDArray[np.int64] | None = None
    """``(P,)``: the positions, 0-based, where the record is joined of parts; None: one after the other."""

    @property
    def positions(self) -> NDArray[np.int64]:
        """The positions, 0-based, ``(P,)``."""
        if self.joined_P is not None:
            return self.joined_P
        return np.arange(self.start, self.start + len(self.reference))


@contextmanager
def open_mutation_maps(
    path: str | PathLike[str], *, overwrite: bool = False
) -> Iterator[Callable[[Sequence[MutationMap], Sequence[str], Mapping[str, JSON]], None]]:
    """Open a file to write maps, names of methods, and how they were made to; all of them in one call."""
    target = check_output(path, overwrite=overwrite)
    with reporting_writes(path):
        file = AtomicFile(target)
    is_written = False

    def write(maps: Sequence[MutationMap], methods: Sequence[str], provenance: Mapping[str, JSON]) -> None:
        nonlocal is_written
        with reporting_writes(path):
            with h5py.File(file, "w") as hdf5:
                _write(hdf5, maps, {**provenance, "methods": list(methods)})
                gaps = number_chunks(hdf5)
            write_seal(file, gaps)
        is_written = True

    try:
        yield write
        if is_written:
            check_output(path, overwrite=overwrite)  # another process may have been faster
            with reporting_writes(path):
                file.commit()
    finally:
        file.discard()


def _write(hdf5: h5py.File, maps: Sequence[MutationMap], provenance: Mapping[str, JSON]) -> None:
    layers = hdf5.create_group("layers")
    matrix = GrowingDataset(hdf5, "X", dtype=np.dtype("<f4"), width=len(MAP_BASES))
    methods = GrowingDataset(layers, "method", dtype=np.dtype("u1"), width=len(MAP_BASES))
    for found in maps:
        matrix.append(found.delta_P4)
        methods.append(found.method_P4)
    matrix.close()
    methods.close()
    _write_positions(hdf5.create_group("obs"), maps)
    bases = hdf5.create_group("var")
    write_text_array(bases, INDEX, list(MAP_BASES))
    mark_dataframe(bases, [])
    for name in ("obsm", *EMPTY_GROUPS):
        set_encoding(hdf5.require_group(name), DICT)
    set_encoding(hdf5.require_group("uns"), DICT)
    write_provenance(hdf5.require_group(PROVENANCE), json.dumps(provenance, allow_nan=False))
    set_encoding(hdf5, ROOT_ENCODINGS["pooled"])
    hdf5.attrs[MUTATIONS_ATTR] = MUTATIONS_VERSION
    hdf5.attrs.create("records", text_array([found.record for found in maps]), dtype=TEXT)


def _write_positions(group: h5py.Group, maps: Sequence[MutationMap]) -> None:
    """Write the table of positions; regions may overlap, so a row is named after record and position."""
    lengths = [len(found.reference) for found in maps]
    places = [int(place) + 1 for found in maps for place in found.positions]
    names = [name for found in maps for name in [found.record] * len(found.reference)]
    write_text_array(group, INDEX, [f"{name}:{place}" for name, place in zip(names, places, strict=True)])
    columns: dict[str, list[str]] = {
        "record": [found.record for found in maps],
        "chrom": [found.contig for found in maps],
        "strand": [found.strand for found in maps],
    }
    for name, values in columns.items():
        _write_categories(group, name, np.repeat(text_array(values), lengths))
    _write_categories(group, "ref", text_array([base for found in maps for base in found.reference]))
    positions = GrowingDataset(group, "pos", dtype=INTEGER)
    positions.append(np.array(places, INTEGER))
    positions.close()
    mark_dataframe(group, ["record", "chrom", "pos", "ref", "strand"])


def _write_categories(group: h5py.Group, name: str, values: NDArray[np.object_]) -> None:
    categories, codes = np.unique(values.astype(str), return_inverse=True)
    column = group.create_group(name)
    write_text_array(column, "categories", categories.tolist())
    stored = GrowingDataset(column, "codes", dtype=np.dtype("<i4"))
    stored.append(codes.astype("<i4"))
    stored.close()
    column.attrs["ordered"] = False
    set_encoding(column, CATEGORICAL)
