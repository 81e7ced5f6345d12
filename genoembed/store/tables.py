"""The tables that commands write: TSV, CSV or Parquet, and FASTA; a file appears whole or not at all.

In: rows, or columns of some rows at a time; or sequences. Out: a file, or lines on standard output. Numbers
have nine significant digits, with which every float32 reads back as it was; what does not exist is ``NA``.
"""

from __future__ import annotations

import csv
import math
import sys
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np

from genoembed.atomic import replacing, reporting_writes
from genoembed.errors import ConfigError, MissingExtraError, visible

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from os import PathLike
    from pathlib import Path

    from genoembed.config.choices import TableFormat


STDOUT = "-"
_SEPARATORS = str.maketrans("\t\n\r", "   ")
_ROW_GROUP = 4096
_FASTA_WIDTH = 80


class TableWriter(Protocol):
    """Takes rows."""

    def write(self, row: Sequence[object]) -> None:
        """Write one row."""

    def write_columns(self, columns: Mapping[str, Sequence[object]]) -> None:
        """Write several rows, given as columns."""

    def close(self) -> None:
        """Write what is left."""


def cell(value: object) -> str:
    """Write one cell.

    Example:
        >>> [cell(value) for value in (-1234.567890123, float("nan"), 7, "a\\tb", None)]
        ['-1234.56789', 'NA', '7', 'a b', 'NA']
    """
    if isinstance(value, float | np.floating):
        return "NA" if math.isnan(value) else f"{value:.9g}"
    return "NA" if value is None else visible(str(value).translate(_SEPARATORS))


def table_format(output: str, format: TableFormat = "auto") -> TableFormat:
    """Choose a format by the ending of a name; what ends otherwise is TSV.

    Example:
        >>> table_format("a.parquet"), table_format("a.csv"), table_format("a.txt")
        ('parquet', 'csv', 'tsv')
    """
    if format != "auto":
        return format
    ending = output.lower().rpartition(".")[2]
    return "parquet" if ending == "parquet" else "csv" if ending == "csv" else "tsv"


@contextmanager
def open_table(
    output: str | PathLike[str],
    columns: Sequence[str] | None = None,
    *,
    format: TableFormat = "auto",
    overwrite: bool = False,
) -> Iterator[TableWriter]:
    """Open a table for writing; without names of columns, the first ``write_columns`` gives them."""
    name = str(output)
    chosen = table_format(name, format)
    if name == STDOUT:
        if chosen == "parquet":
            message = "format is 'parquet', which standard output cannot take; set output to a file name"
            raise ConfigError(message)
        yield _TextWriter(sys.stdout, name, chosen, columns)
        return
    with replacing(name, overwrite=overwrite) as part:
        writer = (
            _ParquetWriter(part, name, columns)
            if chosen == "parquet"
            else _TextFile(part, name, chosen, columns)
        )
        try:
            yield writer
        except BaseException:
            with suppress(OSError):  # a full disk shows again as the rest of the buffer is written
                writer.close()
            raise
        writer.close()


class _TextWriter:
    """Lines; tabs and line ends within a cell become spaces, and CSV quotes its commas."""

    def __init__(
        self, stream: IO[str], path: str, format: TableFormat, columns: Sequence[str] | None
    ) -> None:
        self._stream, self._path = stream, path
        self._csv = csv.writer(stream, lineterminator="\n") if format == "csv" else None
        self._has_header = columns is not None
        if columns is not None:
            self.write(columns)

    def write(self, row: Sequence[object]) -> None:
        cells = list(map(cell, row))
        with reporting_writes(self._path):
            if self._csv is not None:
                self._csv.writerow(cells)
            else:
                self._stream.write("\t".join(cells) + "\n")

    def write_columns(self, columns: Mapping[str, Sequence[object]]) -> None:
        if not self._has_header:
            self._has_header = True
            self.write(list(columns))
        for row in zip(*columns.values(), strict=True):
            self.write(row)

    def close(self) -> None:
        """Leave the stream as it is: others own it."""


class _TextFile(_TextWriter):
    def __init__(self, part: Path, path: str, format: TableFormat, columns: Sequence[str] | None) -> None:
        with reporting_writes(path):
            stream = part.open("w", encoding="utf-8", newline="")  # the same line ends on every system
        super().__init__(stream, path, format, columns)

    def close(self) -> None:
        with reporting_writes(self._path):
            self._stream.close()


class FastaWriter:
    """Writes sequences in lines of 80 letters."""

    def __init__(self, stream: IO[str], path: str) -> None:
        self._stream, self._path = stream, path

    def write(self, header: str, sequence: str) -> None:
        """Write one record; one without letters has a header only."""
        with reporting_writes(self._path):
            self._stream.write(f">{visible(header)}\n")
            for start in range(0, len(sequence), _FASTA_WIDTH):
                self._stream.write(f"{sequence[start : start + _FASTA_WIDTH]}\n")


@contextmanager
def open_fasta(output: str | PathLike[str], *, overwrite: bool = False) -> Iterator[FastaWriter]:
    """Open a FASTA file to write; ``-`` is standard output."""
    name = str(output)
    if name == STDOUT:
        yield FastaWriter(sys.stdout, name)
        return
    with replacing(name, overwrite=overwrite) as part:
        with reporting_writes(name):
            stream = part.open("w", encoding="utf-8", newline="")
        try:
            yield FastaWriter(stream, name)
        except BaseException:
            with suppress(OSError):  # a full disk shows again as the rest of the buffer is written
                stream.close()
            raise
        with reporting_writes(name):
            stream.close()


class _ParquetWriter:
    """Parquet through pyarrow; the first row group decides the types of the columns."""

    def __init__(self, part: Path, path: str, columns: Sequence[str] | None) -> None:
        self._arrow, self._parquet = import_pyarrow("writing Parquet")
        self._part, self._path, self._columns = part, path, list(columns or ())
        self._rows: list[Sequence[object]] = []
        self._schema: Any = None
        self._writer: Any = None

    def write(self, row: Sequence[object]) -> None:
        self._rows.append(row)
        if len(self._rows) == _ROW_GROUP:
            self._write_rows()

    def write_columns(self, columns: Mapping[str, Sequence[object]]) -> None:
        with reporting_writes(self._path):
            if self._writer is None:
                # a column without values would have no type
                is_empty = {name: all(value is None for value in values) for name, values in columns.items()}
                arrays = {
                    name: self._arrow.array(values, type=self._arrow.string() if is_empty[name] else None)
                    for name, values in columns.items()
                }
                table = self._arrow.table(arrays)
                self._schema = table.schema
                self._writer = self._parquet.ParquetWriter(self._part, self._schema)
            else:
                arrays = {
                    name: self._arrow.array(values, type=self._schema.field(name).type)
                    for name, values in columns.items()
                }
                table = self._arrow.table(arrays, schema=self._schema)
            self._writer.write_table(table)

    def close(self) -> None:
        """Write the end of the file; a table without rows still has its columns."""
        if self._rows or self._writer is None:
            self._write_rows()
        with reporting_writes(self._path):
            self._writer.close()

    def _write_rows(self) -> None:
        values = zip(*self._rows, strict=True) if self._rows else [()] * len(self._columns)
        self._rows = []
        self.write_columns(dict(zip(self._columns, map(list, values), strict=True)))


def import_pyarrow(purpose: str) -> tuple[Any, Any]:
    """Import pyarrow and its Parquet module; the error names the extra that brings them."""
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError(package="pyarrow", extra="parquet", purpose=purpose) from error
