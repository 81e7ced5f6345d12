"""The table of labels: one row a record, with its class or value, and perhaps its group and split."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from genoembed.errors import LabelError, SequenceFormatError
from genoembed.training.tables import iter_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from genoembed.probing.options import ProbeOptions
    from genoembed.training.tables import TableRow

Side = Literal["train", "test"]
_SIDES: Mapping[str, Side | None] = {
    "train": "train",
    "training": "train",
    "test": "test",
    "validation": None,
    "valid": None,
    "val": None,
    "dev": None,
}
"""What a split may be called; None is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelTable:
    """Labels by record id."""

    path: str
    labels: Mapping[str, str | float]
    """Class, or value of a regression."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Empty where there is no column of groups."""
    sides: Mapping[str, Side | None] = field(default_factory=dict)
    """``train`` or ``test``; None for rows that take no part. Empty where nothing is split."""
    num_empty: int = 0
    """Rows without a label, which count as absent."""


def read_labels(path: str, options: ProbeOptions) -> LabelTable:
    """Read a table of labels."""
    group_column = (options.group_column or "group") if options.cv == "grouped" else None
    split_column = None
    if options.preset != "none" and options.split is None:
        split_column = options.split_column or "split"
    labels: dict[str, str | float] = {}
    groups: dict[str, str] = {}
    sides: dict[str, Side | None] = {}
    seen: set[str] = set()
    num_empty = 0
    for row in iter_rows(path):
        name = _cell(row, options.id_column, "id_column")
        if name in seen:
            problem = f"id {name!r} appears twice, expected one row a record; leave one out"
            raise LabelError(problem, path=row.path, line=row.line, record_id=name)
        seen.add(name)
        label = _cell(row, options.label_column, "label_column")
        if not label:
            num_empty += 1
            continue
        labels[name] = _value(row, label, name) if options.task == "regression" else label
        if group_column is not None and (group := _cell(row, group_column, "group_column")):
            groups[name] = group
        if split_column is not None:
            sides[name] = _side(row, _cell(row, split_column, "split_column"), name)
    if options.split is not None:
        sides = {
            name: side
            for name, side in _read_split(options.split, options.id_column).items()
            if name in labels
        }
    return LabelTable(path=path, labels=labels, groups=groups, sides=sides, num_empty=num_empty)


def _read_split(path: str, id_column: str) -> dict[str, Side | None]:
    sides: dict[str, Side | None] = {}
    for row in iter_rows(path):
        name = _cell(row, id_column, "id_column")
        sides[name] = _side(row, _cell(row, "split", "split"), name)
    return sides


def _cell(row: TableRow, column: str, key: str) -> str:
    if column not in row.values:
        problem = f"no column {column!r} ({key}); it has {', '.join(map(repr, row.values))}; set {key} to one"
        raise SequenceFormatError(problem, path=row.path, line=row.line)
    value = row.values[column]
    return "" if value is None else str(value).strip()


def _value(row: TableRow, label: str, name: str) -> float:
    try:
        return float(label)
    except ValueError as error:
        problem = f"label {label!r} is no number, expected one for a regression; set task to 'classification'"
        raise LabelError(problem, path=row.path, line=row.line, record_id=name) from error


def _side(row: TableRow, word: str, name: str) -> Side | None:
    if word.lower() not in _SIDES:
        problem = f"split {word!r}, expected one of {', '.join(_SIDES)}; mend the row"
        raise LabelError(problem, path=row.path, line=row.line, record_id=name)
    return _SIDES[word.lower()]
