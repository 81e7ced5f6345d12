"""Labels: how they stand in a table, and the numbers a loss takes.

In: cells of a table (text, or typed values from JSON lines and Parquet). Out: one checked :data:`Label` a
row, by kind; and :class:`LabelSpace`, the names of the classes in a fixed order, which turns labels into
indices, multi-hot rows or floats, and is stored with the model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from genoembed.contracts import IGNORE_INDEX
from genoembed.errors import ConfigError, LabelError
from genoembed.sequences.tables import as_number

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import LabelKind


Label: TypeAlias = "str | tuple[float, ...] | tuple[str | None, ...] | None"
"""``class``: a name. ``multilabel``: names, sorted. ``regression``: floats, one per column. ``token``: names,
one per base, None where a base has no label. ``none``: None."""

_TRUE, _FALSE = ("1", "1.0", "true"), ("0", "0.0", "false")


def parse_label(
    cells: Mapping[str, object],
    *,
    kind: LabelKind,
    delimiter: str | None = None,
    ignore_label: str | None = None,
) -> Label:
    """Read the label of one row.

    Example:
        >>> parse_label({"label": "sigma70"}, kind="class")
        'sigma70'
        >>> parse_label({"label": "b|a"}, kind="multilabel", delimiter="|")
        ('a', 'b')
        >>> parse_label({"label": "..1"}, kind="token", ignore_label=".")
        (None, None, '1')
    """
    if kind == "none":
        return None
    if kind == "regression":
        return tuple(_number(column, value) for column, value in cells.items())
    if kind == "multilabel":
        return _names_of_row(cells, delimiter)
    ((column, value),) = cells.items()  # the configuration allows one column for these kinds
    if kind == "class":
        return _name(column, value)
    names = _token_names(column, value, delimiter)
    return tuple(None if name == ignore_label else name for name in names)


def _missing(column: str) -> LabelError:
    problem = f"column {column!r} has no label; fill it in or remove the row"
    return LabelError(problem)


def _name(column: str, value: object) -> str:
    """Spell a class as text: 1 and 1.0 from typed files are one class."""
    # Parquet makes floats of an integer column that has an empty cell, and NaN of the cell
    if isinstance(value, float) and math.isnan(value):
        raise _missing(column)
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, str) and value.strip():
        return value.strip()
    if value is None or isinstance(value, str):
        raise _missing(column)
    problem = (
        f"column {column!r} has {value!r}, expected the name of one class; fix the row or set another task"
    )
    raise LabelError(problem)


def _number(column: str, value: object) -> float:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _missing(column)
    try:
        if isinstance(value, str):
            number = as_number(value)
        else:
            number = float(value) if isinstance(value, int | float) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    # float(True) is 1.0: a column of true and false is a class, not a number
    if isinstance(value, bool) or not math.isfinite(number):
        problem = f"column {column!r} has {value!r}, expected a finite number; fix or remove the row"
        raise LabelError(problem)
    return number


def _names_of_row(cells: Mapping[str, object], delimiter: str | None) -> tuple[str, ...]:
    if len(cells) > 1:
        return tuple(sorted(column for column, value in cells.items() if _flag(column, value)))
    ((column, value),) = cells.items()
    if isinstance(value, list):
        names = [_name(column, item) for item in value]
    elif value is None:
        raise _missing(column)
    else:
        text = str(value) if isinstance(value, str) else _name(column, value)
        names = [name.strip() for name in (text.split(delimiter) if delimiter else [text]) if name.strip()]
    if len(set(names)) < len(names):
        problem = f"column {column!r} names {Counter(names).most_common(1)[0][0]!r} twice; fix the row"
        raise LabelError(problem)
    return tuple(sorted(names))


def _flag(column: str, value: object) -> bool:
    text = str(value).strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if value is None or not text or text == "nan":
        raise _missing(column)
    problem = f"column {column!r} has {value!r}, expected 0 or 1; fix the row"
    raise LabelError(problem)


def _token_names(column: str, value: object, delimiter: str | None) -> list[str | None]:
    if isinstance(value, list):
        return [None if item is None else _name(column, item) for item in value]
    if not isinstance(value, str) or not value.strip():
        if value is None or isinstance(value, str):
            raise _missing(column)
        problem = (
            f"column {column!r} has {value!r}, expected a text or a list with one label per base; fix the row"
        )
        raise LabelError(problem)
    if delimiter is None:
        return list(value.strip())
    return [_name(column, item) for item in value.strip().split(delimiter)]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelSpace:
    """The classes of a task in a fixed order, or its targets; what the head's outputs mean."""

    kind: LabelKind
    names: tuple[str, ...]
    """Class ``i`` is output ``i``; for ``regression``, the columns."""

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.names):
            twice = Counter(self.names).most_common(1)[0][0]
            message = f"label space: {twice!r} appears twice; name every class once"
            raise ConfigError(message)

    @classmethod
    def of(cls, labels: Iterable[Label], *, kind: LabelKind, columns: Sequence[str] = ()) -> LabelSpace:
        """List the classes that labels have: those of the rows to train on, for others are never learned.

        Example:
            >>> LabelSpace.of(["10", "2", "b", "2"], kind="class").names
            ('2', '10', 'b')
        """
        if kind in ("regression", "none"):
            return cls(kind=kind, names=tuple(columns) if kind == "regression" else ())
        found: set[str] = set()
        for label in labels:
            found.update(set(label_names(label)))
        least = 1 if kind == "multilabel" else 2  # a single label can still be there or not
        if len(found) < least:
            shown = f"only {min(found)!r}" if found else "none"
            message = (
                f"classes: {shown} among the rows to train on, expected at least {least}; check label_columns"
            )
            raise ConfigError(message)
        return cls(kind=kind, names=tuple(sorted(found, key=_natural)))

    @property
    def num_outputs(self) -> int:
        """Outputs that a head for this task has."""
        return len(self.names)

    def encode(self, label: Label) -> NDArray[np.int64] | NDArray[np.float32]:
        """Turn a label into what a loss takes.

        Example:
            >>> space = LabelSpace(kind="multilabel", names=("a", "b", "c"))
            >>> space.encode(("a", "c")).tolist()
            [1.0, 0.0, 1.0]
        """
        if self.kind == "none" or label is None:
            message = "labels: none were read, but the task needs them; set label_columns"
            raise ConfigError(message)
        if self.kind == "regression":
            return np.array(label, dtype=np.float32)
        if self.kind == "class":
            assert isinstance(label, str), "a class is one name"
            return np.array(self._index(label), dtype=np.int64)
        if self.kind == "multilabel":
            row = np.zeros(len(self.names), dtype=np.float32)
            row[[self._index(name) for name in set(label_names(label))]] = 1
            return row
        # each name is looked up once, not once per base: there may be a million bases
        index = {name: self._index(name) for name in set(label_names(label))}
        return np.array(
            [IGNORE_INDEX if name is None else index[str(name)] for name in label], dtype=np.int64
        )

    def counts(self, labels: Iterable[Label]) -> NDArray[np.int64]:
        """Count how often each class occurs, for class weights."""
        totals = np.zeros(len(self.names), dtype=np.int64)
        for label in labels:
            for name, times in Counter(label_names(label)).items():
                totals[self._index(name)] += times
        return totals

    def _index(self, name: str) -> int:
        try:
            return self.names.index(name)
        except ValueError:
            near = get_close_matches(name, self.names, n=1)
            shown = ", ".join(self.names[:5]) + (" ..." if len(self.names) > 5 else "")
            remedy = f"did you mean {near[0]!r}?" if near else "train with it, or remove the row"
            problem = f"label {name!r} is none of the {len(self.names)} classes ({shown}); {remedy}"
            raise LabelError(problem) from None


def label_names(label: Label) -> list[str]:
    """List the classes that a label names, of bases one for each; none for numbers."""
    if isinstance(label, str):
        return [label]
    return [name for name in label or () if isinstance(name, str)]


def _natural(name: str) -> tuple[int, float, str]:
    # as text, "10" comes before "9"; float() alone would also take "nan" and "1e3", which are names here
    is_number = re.fullmatch(r"[-+]?\d+(\.\d+)?", name) is not None
    return (0, float(name), name) if is_number else (1, 0.0, name)


def reverse_label(label: Label, *, kind: LabelKind) -> Label:
    """Return the label of the other strand: that of the last base first for ``token``, unchanged otherwise.

    Example:
        >>> reverse_label(("a", None, "b"), kind="token")
        ('b', None, 'a')
    """
    return label[::-1] if kind == "token" and isinstance(label, tuple) else label
