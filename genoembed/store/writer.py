"""Write embedding files: rows in the order they come, complete or not at all.

In: ``EmbeddingBlock`` or ``TokenBlock``. Out: one HDF5 file of schema 1. Promised: an interrupted or failed
run leaves no file behind and an earlier file as it was; nothing that is not finite is stored, but for the NaN
of records that failed and say so in their flags.
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
from genoembed.store.columns import (
    GrowingDataset,
    ObsWriter,
    mark_dataframe,
    write_provenance,
    write_text_array,
)
from genoembed.store.schema import (
    DICT,
    EMPTY_GROUPS,
    INDEX,
    INTEGER,
    LAYERS_ATTR,
    PROVENANCE,
    ROOT_ENCODINGS,
    SCHEMA_ATTR,
    SCHEMA_VERSION,
    STORAGE_DTYPES,
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
                self._offsets = GrowingDataset(self._hdf5.create_group("tokens"), "offsets", dtype=INTEGER)
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
            if self._kind == "tokens":
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
            f"could not be written ({reason}), nothing is left of it; look at the free space, quota and "
            f"rights of {str(self._target.parent)!r}, or set output to another disk"
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
            if self._kind == "tokens" and name == "offsets":
                problem = "layer 'offsets' has the name of a part of the file; rename it"
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
        """Copy to the dtype of the file, refusing what is not finite."""
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and is refused below
            converted = np.array(matrix, dtype=self._dtype)
        finite = np.isfinite(converted)
        if finite.all():
            return converted
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
            self._offsets.close()
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
