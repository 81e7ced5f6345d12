"""Duplicates and contradictions among labeled sequences: found, counted, shown, and treated by a policy.

In: labeled sequences. Out: those that stay, in order, and a :class:`CleaningReport`. Nothing is left out
unless a policy says so. What merely resembles something else is the business of ``leaks`` and ``splits``.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from genoembed.config.labeled import CleaningConfig
from genoembed.errors import LabelError
from genoembed.finetuning.labels import reverse_label
from genoembed.sequences.homology import strand_free

if TYPE_CHECKING:
    from collections.abc import Sequence

    from genoembed.config.choices import FindingPolicy, LabelKind
    from genoembed.finetuning.labeled import LabeledSequence
    from genoembed.finetuning.labels import Label


logger = logging.getLogger(__name__)


_NUM_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class EqualRows:
    """Rows with one sequence, as an example for the report."""

    ids: tuple[str, ...]
    places: tuple[str, ...]
    """File and line of each."""
    labels: tuple[Label, ...]
    """Each read on the strand of the first row."""

    def __str__(self) -> str:
        shown = [
            f"{i} ({p}, {_short(v)})" for i, p, v in zip(self.ids, self.places, self.labels, strict=True)
        ]
        return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class CleaningReport:
    """What was found, and what became of it. A group is all rows with one sequence."""

    rows: int
    """Rows looked at."""
    duplicate_groups: int
    duplicate_rows: int
    """Rows beyond the first of each group."""
    reverse_duplicate_rows: int
    """Those among them that are the reverse complement of the first."""
    conflict_groups: int
    """Groups whose labels differ."""
    conflict_rows: int
    """All rows of these groups."""
    dropped_duplicates: int
    dropped_conflicts: int
    duplicate_examples: tuple[EqualRows, ...]
    conflict_examples: tuple[EqualRows, ...]


class Cleaned(NamedTuple):
    """Rows that stay, and what was found."""

    rows: list[LabeledSequence]
    report: CleaningReport


def clean_labeled(
    rows: Sequence[LabeledSequence], *, kind: LabelKind, config: CleaningConfig | None = None
) -> Cleaned:
    """Look for equal sequences and contradicting labels.

    Example:
        >>> from genoembed.finetuning.labeled import LabeledSequence
        >>> rows = [
        ...     LabeledSequence(id=name, sequence=bases, label=label, source="a.tsv")
        ...     for name, bases, label in (("x", b"AAC", "1"), ("y", b"GTT", "1"), ("z", b"AAC", "0"))
        ... ]
        >>> report = clean_labeled(rows, kind="class").report
        >>> report.duplicate_rows, report.reverse_duplicate_rows, report.conflict_groups
        (2, 1, 1)
    """
    chosen = config or CleaningConfig()
    groups = _equal_groups(rows, both_strands=chosen.both_strands)
    dropped_duplicates: set[int] = set()
    dropped_conflicts: set[int] = set()
    duplicates, conflicts = [], []
    for group in groups:
        labels = _labels_on_one_strand(rows, group, kind)
        equal = _describe(rows, group, labels)
        duplicates.append(equal)
        # a group may hold both: equal labels are duplicates even where a third one contradicts
        if len(set(labels)) > 1:
            conflicts.append(equal)
            _refuse(chosen.conflicts, "conflicts", "labels differ for one sequence", rows[group[0]], equal)
            if chosen.conflicts == "drop":
                dropped_conflicts.update(group)
                continue
        if len(set(labels)) < len(labels):
            _refuse(
                chosen.duplicate_sequences,
                "duplicate_sequences",
                "one sequence several times",
                rows[group[0]],
                equal,
            )
            if chosen.duplicate_sequences == "drop":
                dropped_duplicates.update(_repeats(group, labels))
    report = CleaningReport(
        rows=len(rows),
        duplicate_groups=len(groups),
        duplicate_rows=sum(len(group) - 1 for group in groups),
        reverse_duplicate_rows=sum(
            rows[index].sequence.upper() != rows[group[0]].sequence.upper()
            for group in groups
            for index in group
        ),
        conflict_groups=len(conflicts),
        conflict_rows=sum(len(equal.ids) for equal in conflicts),
        dropped_duplicates=len(dropped_duplicates),
        dropped_conflicts=len(dropped_conflicts),
        duplicate_examples=tuple(duplicates[:_NUM_EXAMPLES]),
        conflict_examples=tuple(conflicts[:_NUM_EXAMPLES]),
    )
    _log(report)
    dropped = dropped_duplicates | dropped_conflicts
    return Cleaned([row for index, row in enumerate(rows) if index not in dropped], report)


def _equal_groups(rows: Sequence[LabeledSequence], *, both_strands: bool) -> list[list[int]]:
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[strand_free(row.sequence) if both_strands else row.sequence.upper()].append(index)
    return [group for group in groups.values() if len(group) > 1]


def _labels_on_one_strand(rows: Sequence[LabeledSequence], group: list[int], kind: LabelKind) -> list[Label]:
    first = rows[group[0]].sequence.upper()
    labels = []
    for index in group:
        is_turned = rows[index].sequence.upper() != first
        labels.append(reverse_label(rows[index].label, kind=kind) if is_turned else rows[index].label)
    return labels


def _repeats(group: list[int], labels: list[Label]) -> list[int]:
    """List the rows whose sequence and label an earlier row has."""
    return [index for place, index in enumerate(group) if labels[place] in labels[:place]]


def _describe(rows: Sequence[LabeledSequence], group: list[int], labels: list[Label]) -> EqualRows:
    return EqualRows(
        ids=tuple(rows[index].id for index in group),
        places=tuple(place(rows[index]) for index in group),
        labels=tuple(labels),
    )


def place(row: LabeledSequence) -> str:
    """Return the file and line of a row."""
    return row.source if row.line is None else f"{row.source}:{row.line}"


def _short(label: Label) -> str:
    text = repr(label)
    return text if len(text) <= 30 else f"{text[:27]}..."


def _refuse(policy: FindingPolicy, key: str, what: str, row: LabeledSequence, equal: EqualRows) -> None:
    if policy == "error":
        problem = f"{what}: {equal}; fix the rows, or set {key}='drop' or 'keep'"
        raise LabelError(problem, path=row.source, line=row.line, record_id=row.id)


def _log(report: CleaningReport) -> None:
    if report.duplicate_groups:
        logger.info(
            "%d of %d rows repeat a sequence (%d as its reverse complement), %d dropped; first: %s",
            report.duplicate_rows,
            report.rows,
            report.reverse_duplicate_rows,
            report.dropped_duplicates,
            report.duplicate_examples[0],
        )
    if report.conflict_groups:
        logger.warning(
            "%d sequences have contradicting labels (%d rows, %d dropped); first: %s",
            report.conflict_groups,
            report.conflict_rows,
            report.dropped_conflicts,
            report.conflict_examples[0],
        )
