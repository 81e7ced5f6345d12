"""A table of values for records: the first column holds their ids, every further one a value.

In: a text file, tab-separated (comma-separated if its name ends in ``.csv``). Out: the columns in the order
of given ids. A first line whose first cell is none of these ids is the header.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING

from genoembed.errors import InputFileError, LabelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike


_MISSING = ("", "na", "n/a", "nan", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueTable:
    """Values by column."""

    columns: Mapping[str, tuple[str | None, ...]]
    """One text an id, None where it has none."""
    num_unknown: int
    """Ids of the table that were not asked for."""


def read_value_table(path: str | PathLike[str], ids: Sequence[str]) -> ValueTable:
    """Read the values of records."""
    lines = _read(path)
    name = fspath(path)
    if not lines or len(lines[0][1]) < 2:
        problem = "has no column of values, expected ids and values with a tab between; check the separator"
        raise LabelError(problem, path=name, line=lines[0][0] if lines else None)
    known = set(ids)
    header = None if lines[0][1][0] in known else lines[0][1]
    body = lines if header is None else lines[1:]
    width = len(lines[0][1])
    rows: dict[str, list[str]] = {}
    for number, cells in body:
        if len(cells) != width:
            problem = f"{len(cells)} cells, expected {width} as in the first line; fill in the missing ones"
            raise LabelError(problem, path=name, line=number)
        if cells[0] in rows:
            problem = "has a line already; leave one"
            raise LabelError(problem, path=name, line=number, record_id=cells[0])
        rows[cells[0]] = cells
    found = known & rows.keys()
    if not found:
        shown = ", ".join(map(repr, [*rows][:3]))
        problem = f"none of its ids ({shown} ...) is in the embedding file ({ids[0]!r} ...); use the same ids"
        raise LabelError(problem, path=name)
    names = _column_names(Path(path), header, width)
    columns = {
        column: tuple(_value(rows[one][index]) if one in rows else None for one in ids)
        for index, column in enumerate(names, start=1)
    }
    return ValueTable(columns=columns, num_unknown=len(rows) - len(found))


def _read(path: str | PathLike[str]) -> list[tuple[int, list[str]]]:
    separator = "," if fspath(path).lower().endswith(".csv") else "\t"
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = (
                csv.reader(file, delimiter=separator)
                if separator == ","
                else csv.reader(file, delimiter=separator, quoting=csv.QUOTE_NONE)
            )
            return [(reader.line_num, cells) for cells in reader if any(cells)]
    except UnicodeDecodeError as error:
        problem = "is not UTF-8 text; save it as tab-separated text"
        raise InputFileError(problem, path=fspath(path)) from error
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        problem = f"cannot be read ({reason}); check the name"
        raise InputFileError(problem, path=fspath(path)) from error


def _column_names(path: Path, header: Sequence[str] | None, width: int) -> list[str]:
    if header is None:
        return [path.stem] if width == 2 else [f"{path.stem}_{index}" for index in range(1, width)]
    names = [cell.strip() or f"{path.stem}_{index}" for index, cell in enumerate(header[1:], start=1)]
    if len(set(names)) < len(names):
        problem = "names a column twice; rename one"
        raise LabelError(problem, path=fspath(path), line=1)
    return names


def _value(cell: str) -> str | None:
    return None if cell.strip().lower() in _MISSING else cell.strip()
