"""Tab-separated tables, written row by row; a file appears whole or not at all.

In: rows of texts and numbers. Out: a file, or lines on standard output. Numbers that do not exist are ``NA``.
"""

from __future__ import annotations

import math
import os
import secrets
import sys
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from genoembed.errors import StoreError
from genoembed.store import check_output

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


STDOUT = "-"
_SEPARATORS = str.maketrans("\t\n\r", "   ")


class TableWriter:
    """Writes rows as lines."""

    def __init__(self, stream: IO[str], path: str, columns: Sequence[str]) -> None:
        self._stream = stream
        self._path = path
        self.write(columns)

    def write(self, row: Sequence[object]) -> None:
        """Write a row."""
        with _reporting(self._path):
            self._stream.write("\t".join(map(cell, row)) + "\n")


def cell(value: object) -> str:
    """Write one cell.

    Example:
        >>> [cell(value) for value in (-1234.567890123, float("nan"), 7, "a\\tb")]
        ['-1234.56789', 'NA', '7', 'a b']
    """
    if isinstance(value, float):
        return "NA" if math.isnan(value) else f"{value:.9g}"
    return str(value).translate(_SEPARATORS)


@contextmanager
def open_table(output: str, columns: Sequence[str], *, overwrite: bool = False) -> Iterator[TableWriter]:
    """Open a table for writing."""
    if output == STDOUT:
        yield TableWriter(sys.stdout, output, columns)
        return
    target = check_output(output, overwrite=overwrite)
    part = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        with _reporting(output):
            file = part.open("w", encoding="utf-8", newline="")
        with file:
            yield TableWriter(file, output, columns)
            with _reporting(output):
                file.flush()
                os.fsync(file.fileno())
        check_output(output, overwrite=overwrite)
        with _reporting(output):
            part.replace(target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _reporting(path: str) -> Iterator[None]:
    """Say which table could not be written; a reader of standard output that went away is no failure."""
    try:
        yield
    except OSError as error:
        if path == STDOUT:
            raise
        problem = f"cannot be written ({error.strerror or error}); make room, or set output to another place"
        raise StoreError(problem, path=path) from error
