"""``export``: an embedding file in the container that another tool wants.

In: an embedding file. Out: a file of another kind, which appears complete or not at all. What does not fit is
refused, with the way out. Blocks of rows are in memory, but for ``h5ad`` with another layer as ``X``.
"""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from genoembed.errors import ConfigError, StoreError
from genoembed.exporting.arrays import write_npz
from genoembed.exporting.hdf5 import write_h5ad, write_one_dataset_a_record
from genoembed.exporting.tables import write_csv, write_parquet
from genoembed.store import check_output, open_embeddings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from genoembed.store import EmbeddingFile

logger = logging.getLogger(__name__)

ExportFormat: TypeAlias = Literal["h5ad", "npz", "parquet", "csv", "uniprot-h5"]

SUFFIXES = {
    "h5ad": ".h5ad",
    "npz": ".npz",
    "parquet": ".parquet",
    "csv": ".csv",
    "uniprot-h5": ".uniprot.h5",
}
_WRITERS = {
    "h5ad": write_h5ad,
    "npz": write_npz,
    "parquet": write_parquet,
    "csv": write_csv,
    "uniprot-h5": write_one_dataset_a_record,
}
_ONE_MATRIX = ("csv", "uniprot-h5")
_POOLED_ONLY = {
    "h5ad": "AnnData has one row a record; export to npz or parquet, or extract with a pooling",
    "csv": "a line a token would be vast; export to npz, parquet or uniprot-h5, or extract with a pooling",
}
_MANY_DATASETS = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was written."""

    output: Path
    to: ExportFormat
    layers: tuple[str, ...]
    """Matrices that were taken along."""
    num_records: int
    num_bytes: int


def export(
    path: str | PathLike[str],
    to: ExportFormat,
    *,
    output: str | PathLike[str] | None = None,
    layer: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write an embedding file as another kind of file.

    Args:
        path: A file that genoembed wrote.
        to: ``h5ad``, ``npz``, ``parquet``, ``csv``, or ``uniprot-h5``: one dataset a record under its id, in
            which ``%`` is ``%25`` and ``/`` is ``%2F``.
        output: The file to write; None is ``path`` with the ending of the format.
        layer: Which matrix alone; None takes all. ``csv`` and ``uniprot-h5`` hold one.
        overwrite: Replace an existing file.

    Returns:
        What was written.

    Raises:
        ConfigError: If the file does not fit into the format, or the format is unknown.
        LayerError: If the file has no such layer.
        MissingExtraError: If a package that the format needs is not installed.
        StoreError: If a file cannot be read or written; the output is then as it was before.
    """
    if to not in get_args(ExportFormat):
        message = f"to is {to!r}; set to to one of {', '.join(get_args(ExportFormat))}"
        raise ConfigError(message)
    name = Path(path).with_suffix(SUFFIXES[to]) if output is None else output
    target = check_output(name, overwrite=overwrite)
    with open_embeddings(path) as file:
        if target.exists() and target.samefile(file.path):
            message = f"output is {fspath(name)!r}, which is to be read; set output to another name"
            raise ConfigError(message)
        layers = _layers(file, to, layer)
        if to == "uniprot-h5" and len(file) > _MANY_DATASETS:
            logger.warning("%s: %d datasets are slow to write and to open", fspath(name), len(file))
        with _appearing(target, fspath(name)) as part:
            _WRITERS[to](file, layers, part)
        return ExportReport(
            output=Path(name),
            to=to,
            layers=layers,
            num_records=len(file),
            num_bytes=target.stat().st_size,
        )


def _layers(file: EmbeddingFile, to: ExportFormat, layer: str | None) -> tuple[str, ...]:
    """Choose the matrices; refuse what the format does not hold."""
    problems = []
    if layer is not None:
        _ = file[layer]  # an unknown layer is an error that names those that are there
    layers = tuple(file.layers) if layer is None else (layer,)
    if file.kind == "tokens" and to in _POOLED_ONLY:
        problems.append(f"{file.path} holds a vector for every token, but {_POOLED_ONLY[to]}")
    if to in _ONE_MATRIX and len(layers) > 1:
        problems.append(
            f"{file.path} holds {len(layers)} layers ({', '.join(layers)}), but {to} one; set layer to one"
        )
    if problems:
        raise ConfigError(*problems)
    return layers


@contextmanager
def _appearing(target: Path, name: str) -> Iterator[Path]:
    """Give a temporary name beside the target, which becomes the target if all goes well."""
    part = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        problem = f"cannot be written ({error.strerror or error}); free space, or set output to another name"
        raise StoreError(problem, path=name) from error
    finally:
        part.unlink(missing_ok=True)
