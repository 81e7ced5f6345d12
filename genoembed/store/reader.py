"""Read embedding files lazily: only what is requested is read from the disk."""

from __future__ import annotations

import difflib
import logging
import os
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np

from genoembed.errors import LayerError, MissingExtraError, StoreError
from genoembed.store.columns import ObsTable, encoding_of, read_text
from genoembed.store.layout import read_layout, read_provenance
from genoembed.store.schema import NOT_KNOWN, closed, reading
from genoembed.store.seal import has_seal, open_hdf5

if TYPE_CHECKING:
    from collections.abc import Callable

    import anndata
    import pandas as pd
    import torch
    from numpy.typing import NDArray

    from genoembed.store.schema import Kind, LazyMatrix


_LOG = logging.getLogger(__name__)


@lru_cache(maxsize=256)
def _say_once(_path: str, message: str) -> None:
    """Warn of a file; a command may open it several times."""
    _LOG.warning("%s", message)


def open_embeddings(path: str | os.PathLike[str], *, untrusted: bool = False) -> EmbeddingFile:
    """Open an embedding file, of any published schema version, for reading.

    Args:
        path: A file that genoembed wrote, or an AnnData file of vectors. A file that went through AnnData is
            read by its provenance and structure, and ``changes`` says what is not as it was written.
        untrusted: True has a child process try the file first, which a file without a seal is in any case:
            for files from strangers, who can forge a seal.

    Returns:
        The open file; use it in a ``with``, or close it.

    Raises:
        StoreError: If the file is missing or not readable.
        StoreFormatError: If it is neither genoembed's nor an AnnData file, or it is damaged.
        SchemaVersionError: If a newer genoembed wrote it in a newer format.

    Example:
        >>> import tempfile
        >>> from genoembed.contracts import EmbeddingBlock, ObsRow
        >>> from genoembed.store.writer import EmbeddingWriter
        >>> row = ObsRow(id="chr1", description="", length=4, start=0, end=4, strand="+", source="a.fa",
        ...              n_windows=1, sha256="", flags="")
        >>> block = EmbeddingBlock(rows=(row,), matrices={"blocks.1": np.array([[0.5, 1.0]])})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with EmbeddingWriter(f"{folder}/a.h5", kind="pooled") as writer:
        ...         writer.append(block)
        ...         writer.finish({"version": "1.0"})
        ...     with open_embeddings(f"{folder}/a.h5") as embeddings:
        ...         embeddings.ids, embeddings.layers, embeddings.X[0], embeddings.provenance["version"]
        (['chr1'], ['blocks.1'], array([0.5, 1. ], dtype=float32), '1.0')
    """
    return EmbeddingFile(path, untrusted=untrusted)


class EmbeddingFile:
    """An open embedding file; ``open_embeddings`` makes it.

    Pickled, as for workers of a ``DataLoader``, it is opened again where it is unpickled; a matrix likewise.

    Args:
        path: A file that genoembed wrote.
        untrusted: As for ``open_embeddings``.

    Raises:
        StoreError: If the file is missing or not readable.
        StoreFormatError: If it is neither genoembed's nor an AnnData file, or it is damaged.
        SchemaVersionError: If a newer genoembed wrote it in a newer format.
    """

    def __init__(self, path: str | os.PathLike[str], *, untrusted: bool = False) -> None:
        self.path = Path(path)
        """The file."""
        self._hdf5: h5py.File | None = None
        hdf5 = open_hdf5(self.path, untrusted=untrusted)
        try:
            self._layout = read_layout(hdf5, str(self.path))
        except BaseException:
            hdf5.close()
            raise
        self._hdf5 = hdf5
        for change in self.changes:
            _say_once(str(self.path.absolute()), f"{self.path}: {change}")
        self._origin = (str(self.path.absolute()), untrusted, _state(self.path))
        for name, matrix in {**self._layout.more, **self._layout.matrices}.items():
            matrix.origin = (_open_matrix, (*self._origin, name))

    def __reduce__(self) -> tuple[Callable[..., EmbeddingFile], tuple[object, ...]]:
        # an open file cannot go to another process, such as a worker of a DataLoader, but its name can
        self._open_file()
        return _open_again, self._origin

    def __enter__(self) -> EmbeddingFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was read stays, what was not cannot be read any more."""
        if self._hdf5 is not None:
            self._hdf5.close()
            self._hdf5 = None

    def __len__(self) -> int:
        return self._layout.num_rows

    def __repr__(self) -> str:
        layers = ", ".join(f"{name} ({matrix.shape[1]})" for name, matrix in self._layout.matrices.items())
        state = "" if self._hdf5 is not None else ", closed"
        return f"EmbeddingFile({str(self.path)!r}, {self.kind}, {len(self)} records, {layers}{state})"

    def _open_file(self) -> h5py.File:
        if self._hdf5 is None:
            raise closed(str(self.path))
        return self._hdf5

    @property
    def kind(self) -> Kind:
        """``pooled`` (one vector per record) or ``tokens`` (one vector per token)."""
        return self._layout.kind

    @property
    def schema_version(self) -> int:
        """Version of the file's format."""
        return self._layout.schema_version

    @property
    def layers(self) -> list[str]:
        """Names of the stored matrices, in the order they were requested; the first one is ``X``."""
        return list(self._layout.matrices)

    @cached_property
    def changes(self) -> tuple[str, ...]:
        """What other programs are known to have changed, in words; empty for a file as genoembed wrote it."""
        if self._layout.changes or has_seal(self.path):
            return self._layout.changes
        return ("has no seal, so another program changed or wrote it; verify embeds a sample again",)

    @property
    def more_matrices(self) -> list[str]:
        """Names of other matrices in ``obsm``, as scanpy's ``X_umap``; index the file with one to read it."""
        return list(self._layout.more)

    @cached_property
    def ids(self) -> list[str]:
        """Record ids, in the order of the rows."""
        with reading(str(self.path)):
            return read_text(self._open_file()[self._layout.index])

    @cached_property
    def obs(self) -> ObsTable:
        """Columns of the table of records by name; each is read when it is needed."""
        return ObsTable(self._open_file()["obs"], str(self.path), len(self))

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """How the file was made, as the writer put it, or what another program left of that."""
        if self._layout.provenance is not None:
            return dict(self._layout.provenance)
        with reading(str(self.path)):
            return read_provenance(self._open_file(), str(self.path))

    @cached_property
    def feature_names(self) -> list[str]:
        """Names of the columns of ``X``; in a per-token file of its first layer."""
        if self._layout.features is None:
            name, matrix = next(iter(self._layout.matrices.items()))
            return [f"{name}:{index}" for index in range(matrix.shape[1])]
        with reading(str(self.path)):
            return read_text(self._open_file()[self._layout.features])

    @property
    def X(self) -> LazyMatrix:  # noqa: N802 - the field's name for it
        """The primary embedding: float32 or float16, ``(N, D)``, read where it is indexed."""
        if self.kind != "pooled":
            problem = "holds a vector for every token, and so no X; use tokens(id), or extract with a pooling"
            raise StoreError(problem, path=str(self.path))
        return self[self.layers[0]]

    def __getitem__(self, layer: str) -> LazyMatrix:
        matrix = self._layout.matrices.get(layer, self._layout.more.get(layer))
        if matrix is None:
            names = [*self.layers, *self.more_matrices]
            near = difflib.get_close_matches(str(layer), names, n=1) or names[:1]
            problem = f"{self.path}: layer {layer!r} is not among {names}; did you mean {near[0]!r}?"
            raise LayerError(problem, spec=str(layer))
        return matrix

    def index_of(self, record_id: str) -> int:
        """Find the row of a record.

        Args:
            record_id: Its id.

        Returns:
            The row, from 0.

        Raises:
            StoreError: If the file has no such record.
        """
        row = self._rows_by_id.get(record_id)
        if row is None:
            # of some thousands at most: comparing with millions of ids would take minutes
            near = difflib.get_close_matches(str(record_id), self.ids[:10_000], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "'ids' lists what is there"
            problem = f"record {record_id!r} is not among the {len(self)} records of this file; {hint}"
            raise StoreError(problem, path=str(self.path))
        return row

    @cached_property
    def _rows_by_id(self) -> dict[str, int]:
        return {record_id: row for row, record_id in enumerate(self.ids)}

    def tokens(self, record_id: str, layer: str | None = None) -> NDArray[np.floating]:
        """Read the token vectors of a record.

        Args:
            record_id: Its id.
            layer: Name of a layer; None for the first.

        Returns:
            One vector per token, ``(T, D)``, in the dtype of the file.

        Raises:
            StoreError: If the file holds pooled vectors, or no such record.
            LayerError: If the file has no such layer.
        """
        self._offsets()
        return self.vectors(self.index_of(record_id), layer)

    def token_spans(self, record_id: str) -> NDArray[np.int64]:
        """Read which bases each token of a record has.

        Bases are counted from the row's first, in reading order: base ``b`` of a row is ``obs["start"] + b``
        of its parent, on the reverse strand ``obs["end"] - 1 - b``. A token that reaches beyond the row has
        the part of its bases that is in the row; overlapping k-mers have bases in common.

        Args:
            record_id: Its id.

        Returns:
            Half-open spans, one per token. int64, ``(T, 2)``.

        Raises:
            StoreError: If the file holds pooled vectors, no such record, or no spans, as files of the first
                schema do.
        """
        row = self.index_of(record_id)
        spans = self.all_spans[self._tokens_of(row)]
        if (spans == NOT_KNOWN).any():
            problem = (
                "does not say which bases each token has, as an earlier genoembed wrote it; extract again"
            )
            raise StoreError(problem, path=str(self.path))
        return spans

    def bases(self, record_id: str, layer: str | None = None) -> NDArray[np.floating]:
        """Read one vector per base of a record: that of the token that has the base.

        Args:
            record_id: Its id.
            layer: Name of a layer; None for the first.

        Returns:
            ``(length, D)``, in the dtype of the file; the mean of its tokens for a base of several, as of
            overlapping k-mers, and NaN for a base without a token.

        Raises:
            StoreError: As for `token_spans`.
            LayerError: If the file has no such layer.
        """
        values = self.tokens(record_id, layer)
        found = spread(values, self.token_spans(record_id))
        length = int(self.obs["length"][self.index_of(record_id)])
        rows = np.full((length, values.shape[1]), np.nan, values.dtype)
        rows[found.bases] = found.values
        return rows

    @cached_property
    def all_spans(self) -> NDArray[np.int64]:
        """Bases of each token of all records, ``(T, 2)``; -1 where the file does not say; per-token files."""
        total = int(self._offsets()[-1])
        self._open_file()
        with reading(str(self.path)):
            parts = [dataset[:] for dataset in self._layout.spans]
        return np.stack(parts, axis=1) if parts else np.full((total, 2), NOT_KNOWN, np.int64)

    def _tokens_of(self, row: int) -> slice:
        offsets = self._offsets()
        return slice(int(offsets[row]), int(offsets[row + 1]))

    def _offsets(self) -> NDArray[np.int64]:
        if self._layout.offsets is None:
            problem = "holds one pooled vector a record, and so no tokens; extract with pooling set to none"
            raise StoreError(problem, path=str(self.path))
        return self._layout.offsets

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """Tokens of each record, ``(N,)``; per-token files only."""
        return np.diff(self._offsets())

    def vectors(self, row: int, layer: str | None = None) -> NDArray[np.floating]:
        """Read what the file holds for one row: its vector, or in a per-token file those of its tokens.

        Args:
            row: The row, from 0 up.
            layer: Name of a layer; None for the first.

        Returns:
            ``(D,)``, or ``(T, D)`` in a per-token file, in the dtype of the file.

        Raises:
            LayerError: If the file has no such layer.
        """
        matrix = self[self.layers[0] if layer is None else layer]
        return matrix[row] if self.kind == "pooled" else matrix[self._tokens_of(row)]

    def to_anndata(self) -> anndata.AnnData:
        """Read a pooled file into memory as AnnData; the other layers are in ``obsm``.

        Returns:
            What ``anndata.read_h5ad`` gives.

        Raises:
            StoreError: If the file holds token vectors.
            MissingExtraError: If anndata is not installed.
        """
        if self.kind != "pooled":
            problem = "holds a vector for every token, which AnnData cannot; extract with a pooling"
            raise StoreError(problem, path=str(self.path))
        try:
            import anndata
        except ImportError as error:
            raise MissingExtraError(package="anndata", extra="analysis", purpose="to_anndata") from error
        with reading(str(self.path)):
            if not encoding_of(self._open_file()):  # written by AnnData before 0.8
                return anndata.read_h5ad(self.path)
            # not by its name: what was checked is the file that is open
            return anndata.io.read_elem(self._open_file())

    def to_pandas(self, layer: str | None = None) -> pd.DataFrame:
        """Read one layer as a table.

        Args:
            layer: Name of a layer; None for the first.

        Returns:
            Record ids by feature names; in a per-token file (id, token) pairs by feature names.

        Raises:
            LayerError: If the file has no such layer.
            MissingExtraError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError(package="pandas", extra="analysis", purpose="to_pandas") from error
        name = self.layers[0] if layer is None else layer
        values = self[name][:]
        columns = self.feature_names
        if name != self.layers[0]:
            columns = [f"{name}:{index}" for index in range(values.shape[1])]
        if self.kind == "pooled":
            return pd.DataFrame(values, index=pd.Index(self.ids, name="id"), columns=columns)
        lengths = np.diff(self._offsets())
        token = np.arange(len(values)) - np.repeat(self._offsets()[:-1], lengths)
        rows = [np.repeat(np.array(self.ids, dtype=object), lengths), token]
        return pd.DataFrame(
            values, index=pd.MultiIndex.from_arrays(rows, names=["id", "token"]), columns=columns
        )

    def to_torch(self, layer: str | None = None) -> EmbeddingDataset:
        """Make a dataset for ``torch.utils.data.DataLoader``, which reads from the file as it goes.

        Args:
            layer: Name of a layer; None for the first.

        Returns:
            A map-style dataset of (id, vector) pairs, in per-token files (id, ``(T, D)`` tensor). It opens
            the file by itself in every process, so it works in workers and after this file is closed.

        Raises:
            LayerError: If the file has no such layer.
        """
        import torch

        name = self.layers[0] if layer is None else layer
        self[name]  # an unknown layer is an error here, not in a worker
        return EmbeddingDataset(self.path, name, torch.from_numpy)


def hdf5_of(file: EmbeddingFile) -> h5py.File:
    """Return the HDF5 file below, for parts of it that have no name of their own here."""
    return file._open_file()


def names_own_features(file: EmbeddingFile) -> bool:
    """Return whether the table of features of the file is that of its first matrix."""
    return file._layout.features is not None


def changed_x_of(file: EmbeddingFile) -> h5py.Dataset | None:
    """Return ``/X`` where another program changed it, and the first layer is whole elsewhere."""
    found = hdf5_of(file).get("X")
    layer = file.X
    if not isinstance(found, h5py.Dataset) or layer.is_at(found):
        return None
    is_equal = found.shape == layer.shape and all(
        np.array_equal(
            found[start : start + _COMPARED_ROWS], layer[start : start + _COMPARED_ROWS], equal_nan=True
        )
        for start in range(0, len(layer), _COMPARED_ROWS)
    )
    return None if is_equal else found


_COMPARED_ROWS = 1024


class BaseValues(NamedTuple):
    """Values of the bases that have a token."""

    bases: NDArray[np.int64]
    """Ascending, each once. ``(K,)``."""
    values: NDArray[np.floating]
    """``(K, C)``, in the dtype of the tokens' values."""


def spread(values_TC: NDArray[np.floating], spans_T2: NDArray[np.int64]) -> BaseValues:
    """Repeat the values of each token over its bases; a base of several tokens has their mean.

    Example:
        >>> spread(np.array([[1.0], [5.0]]), np.array([[0, 3], [2, 4]]))._asdict()
        {'bases': array([0, 1, 2, 3]), 'values': array([[1.],
               [1.],
               [3.],
               [5.]])}
    """
    widths_T = spans_T2[:, 1] - spans_T2[:, 0]
    token_K = np.repeat(np.arange(len(spans_T2)), widths_T)
    within_K = np.arange(len(token_K)) - np.repeat(np.cumsum(widths_T) - widths_T, widths_T)
    bases_K = spans_T2[token_K, 0] + within_K
    if not len(bases_K) or (np.diff(bases_K) > 0).all():
        return BaseValues(bases_K, values_TC[token_K])
    bases, place_K, counts = np.unique(bases_K, return_inverse=True, return_counts=True)
    sums = np.zeros((len(bases), values_TC.shape[1]))
    np.add.at(sums, place_K, values_TC[token_K])
    return BaseValues(bases, (sums / counts[:, None]).astype(values_TC.dtype))


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _open_again(path: str, untrusted: bool, state: tuple[int, int]) -> EmbeddingFile:
    file = EmbeddingFile(path, untrusted=untrusted)
    if _state(file.path) != state:
        file.close()
        problem = "has changed since it was opened in another process; open it again there"
        raise StoreError(problem, path=path)
    return file


def _open_matrix(path: str, untrusted: bool, state: tuple[int, int], layer: str) -> LazyMatrix:
    return _open_again(path, untrusted, state)[layer]


class EmbeddingDataset:
    """A map-style dataset of (id, vector) pairs over one file, safe to fork and to pickle."""

    def __init__(
        self, path: Path, layer: str, as_tensor: Callable[[NDArray[np.floating]], torch.Tensor]
    ) -> None:
        self._path = path.absolute()
        self._layer = layer
        self._as_tensor = as_tensor
        self._process = -1
        self._file: EmbeddingFile | None = None

    def _embeddings(self) -> EmbeddingFile:
        # a forked worker has its parent's file handle, and HDF5 would read where the other one moved it to
        if self._file is None or self._process != os.getpid():
            self._file, self._process = EmbeddingFile(self._path), os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __len__(self) -> int:
        return len(self._embeddings())

    def __getitem__(self, row: int) -> tuple[str, torch.Tensor]:
        file = self._embeddings()
        position = range(len(file))[row]
        return file.ids[position], self._as_tensor(file.vectors(position, self._layer))
