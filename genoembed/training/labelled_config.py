"""What a reading of labelled sequences is asked to do, and the counts of what it did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from genoembed.config import field_problems
from genoembed.errors import ConfigError
from genoembed.sequences import InputCounts

if TYPE_CHECKING:
    from collections.abc import Iterator

LabelKind: TypeAlias = Literal["class", "multilabel", "regression", "token", "none"]
"""One class a sequence; any number of them; a number or several; one class a base; no label at all."""

UnlabelledPolicy: TypeAlias = Literal["error", "skip"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TableColumns:
    """Where sequences and labels stand in a table."""

    sequence_column: str = "sequence"
    """Column of the sequences."""
    label_columns: tuple[str, ...] = ("label",)
    """Column of the labels; several for ``multilabel`` (0 or 1 each) and ``regression``."""
    label_delimiter: str | None = None
    """Separates names in one cell, for ``multilabel`` and ``token``."""
    ignore_label: str | None = None
    """For ``token``: the name that stands for a base without label, such as ``.``."""
    id_column: str | None = None
    """Column of the ids. None: ``row_1``, ``row_2`` ...; for a table of labels, the column ``id``."""
    split_column: str | None = None
    """Column that says to which side of the split a row belongs."""
    group_column: str | None = None
    """Column of groups that no split may cut, instead of clusters of homologs."""
    unlabelled: UnlabelledPolicy = "error"
    """A sequence whose id is not in the table of labels: stop, or leave it out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledConfig(TableColumns):
    """Where sequences and labels stand, and what a label is."""

    kind: LabelKind = "class"
    """``class``, ``multilabel``, ``regression``, ``token`` (one a base) or ``none`` (sequences only)."""

    def __post_init__(self) -> None:
        problems = list(field_problems(self))
        if not problems:
            problems += self._rule_problems()
        if problems:
            raise ConfigError(*problems)

    def _rule_problems(self) -> Iterator[str]:
        columns = self.label_columns
        if self.kind != "none" and not columns:
            yield "label_columns is empty; name the column of the labels"
        if len(columns) > 1 and self.kind in ("class", "token"):
            yield (
                f"label_columns names {len(columns)} columns, but kind {self.kind!r} has one; name one, or "
                "set kind='multilabel' or 'regression'"
            )
        if self.label_delimiter is not None and (
            self.kind not in ("multilabel", "token") or len(columns) > 1
        ):
            yield (
                "label_delimiter separates names in the one column of kind 'multilabel' or 'token'; "
                "leave it out"
            )
        if self.ignore_label is not None and self.kind != "token":
            yield "ignore_label is for kind 'token'; leave it out"
        named = [*self._wanted(), *filter(None, (self.id_column, self.split_column, self.group_column))]
        if len(set(named)) < len(named):
            yield f"columns {', '.join(named)}: one is named twice; name each column once"

    def _wanted(self) -> tuple[str, ...]:
        return (self.sequence_column, *(self.label_columns if self.kind != "none" else ()))


@dataclass(kw_only=True, slots=True)
class LabelledCounts:
    """How much was read, and how often each policy acted. The reader adds to it."""

    read: InputCounts = field(default_factory=InputCounts)
    """Records, bases, and what the policies for letters did."""
    skipped_unlabelled: int = 0
    """Records left out because the table of labels does not have them."""
    unused_labels: int = 0
    """Labels of the table that no record asked for."""
