"""Write predictions as TSV or Parquet, a part at a time; a file appears whole or not at all.

In: columns of rows. Out: the file, or lines on a text stream.
"""

from __future__ import annotations

import os
import secrets
import sys
from contextlib import contextmanager
from importlib import import_module
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np

from genoembed.errors import ConfigError, MissingExtraError
from genoembed.store.atomic import check_output

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

TableFormat: TypeAlias = Literal["auto", "tsv", "parquet"]

STDOUT = "-"


class TableWriter(Protocol):
    """Takes rows, a part at a time."""

    def write(self, columns: Mapping[str, Sequence[object]]) -> None:
        """Write rows."""


@contextmanager
def open_table(
    output: str, *, format: TableFormat = "auto", overwrite: bool = False
) -> Iterator[TableWriter]:
    """Open a table for writing."""
    is_parquet = format == "parquet" or (format == "auto" and output.endswith(".parquet"))
    if output == STDOUT:
        if is_parquet:
            message = "format is 'parquet', which standard output cannot take; set output to a file name"
            raise ConfigError(message)
        yield _TsvWriter(sys.stdout)
        return
    target = check_output(output, overwrite=overwrite)
    part = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        if is_parquet:
            writer = _ParquetWriter(part)
            yield writer
            writer.close()
        else:
            with part.open("w", encoding="utf-8", newline="") as file:
                yield _TsvWriter(file)
                file.flush()
                os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


class _TsvWriter:
    """Tab-separated values; tabs and line ends in a text become spaces."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._has_header = file, False

    def write(self, columns: Mapping[str, Sequence[object]]) -> None:
        if not self._has_header:
            self._file.write("\t".join(map(_cell, columns)) + "\n")
            self._has_header = True
        for values in zip(*columns.values(), strict=True):
            self._file.write("\t".join(map(_cell, values)) + "\n")


class _ParquetWriter:
    """Parquet through pyarrow, a row group a part."""

    def __init__(self, path: Path) -> None:
        try:
            self._arrow: Any = import_module("pyarrow")
            self._parquet: Any = import_module("pyarrow.parquet")
        except ImportError as error:
            raise MissingExtraError(package="pyarrow", extra="parquet", purpose="writing Parquet") from error
        self._path = path
        self._writer: Any = None

    def write(self, columns: Mapping[str, Sequence[object]]) -> None:
        table = self._arrow.table({name: self._column(values) for name, values in columns.items()})
        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        """Write the end of the file; an empty table if there was no row."""
        if self._writer is None:
            self.write({"id": []})
        self._writer.close()

    def _column(self, values: Sequence[object]) -> Any:
        if isinstance(values, np.ndarray):
            return self._arrow.array(values)
        return self._arrow.array(list(values), type=self._arrow.string())


def _cell(value: object) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.6g}"
    return str(value).replace("\t", " ").replace("\n", " ").replace("\r", " ")
