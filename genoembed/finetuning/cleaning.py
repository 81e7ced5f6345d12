"""Duplicates and contradictions among labeled sequences: found, counted, shown, and treated by a policy.

In: labeled sequences. Out: those that stay, in order; what was found is logged. Nothing is left out unless a
policy says so. Sequences that are merely similar are handled in ``splits``.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING

from genoembed.config.labeled import CleaningConfig
from genoembed.errors import LabelError
from genoembed.finetuning.labels import reverse_label
from genoembed.sequences.homology import strand_free

if TYPE_CHECKING:
    from collections.abc import Sequence

    from genoembed.config.choices import LabelKind
    from genoembed.finetuning.labeled import LabeledSequence
    from genoembed.finetuning.labels import Label


logger = logging.getLogger(__name__)


def clean_labeled(
    rows: Sequence[LabeledSequence], *, kind: LabelKind, config: CleaningConfig | None = None
) -> list[LabeledSequence]:
    """Look for equal sequences and contradicting labels, and drop what the policies say.

    Example:
        >>> from genoembed.finetuning.labeled import LabeledSequence
        >>> rows = [
        ...     LabeledSequence(id=name, sequence=bases, label=label, source="a.tsv")
        ...     for name, bases, label in (("x", b"AAC", "1"), ("y", b"GTT", "1"), ("z", b"AAC", "0"))
        ... ]
        >>> config = CleaningConfig(duplicate_sequences="drop")
        >>> [row.id for row in clean_labeled(rows, kind="class", config=config)]
        ['x', 'z']
    """
    chosen = config or CleaningConfig()
    by_sequence: dict[bytes, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        # a soft-masked copy of a sequence is a copy: case is not compared
        key = strand_free(row.sequence) if chosen.both_strands else row.sequence.upper()
        by_sequence[key].append(index)
    groups = [group for group in by_sequence.values() if len(group) > 1]
    dropped_duplicates: set[int] = set()
    dropped_conflicts: set[int] = set()
    num_reversed = 0
    duplicates, conflicts = [], []
    for group in groups:
        first = rows[group[0]]
        is_reversed = [rows[index].sequence.upper() != first.sequence.upper() for index in group]
        num_reversed += sum(is_reversed)
        # labels of bases are compared on the strand of the first row
        labels = [
            reverse_label(rows[index].label, kind=kind) if turned else rows[index].label
            for index, turned in zip(group, is_reversed, strict=True)
        ]
        duplicates.append((group, labels))
        # a group may hold both: equal labels are duplicates even where a third one contradicts
        if len(set(labels)) > 1:
            conflicts.append((group, labels))
            if chosen.conflicts == "error":
                raise _found(rows, group, labels, "conflicts", "labels differ for one sequence")
            if chosen.conflicts == "drop":
                dropped_conflicts.update(group)
                continue
        if len(set(labels)) < len(labels):
            if chosen.duplicate_sequences == "error":
                raise _found(rows, group, labels, "duplicate_sequences", "one sequence several times")
            if chosen.duplicate_sequences == "drop":
                # only a row whose label also stood before repeats anything
                dropped_duplicates.update(i for at, i in enumerate(group) if labels[at] in labels[:at])
    if duplicates:
        logger.info(
            "%d of %d rows repeat a sequence (%d as its reverse complement), %d dropped; first: %s",
            sum(len(group) - 1 for group in groups),
            len(rows),
            num_reversed,
            len(dropped_duplicates),
            _shown(rows, *duplicates[0]),
        )
    if conflicts:
        logger.warning(
            "%d sequences have contradicting labels (%d rows, %d dropped); first: %s",
            len(conflicts),
            sum(len(group) for group, _ in conflicts),
            len(dropped_conflicts),
            _shown(rows, *conflicts[0]),
        )
    dropped = dropped_duplicates | dropped_conflicts
    return [row for index, row in enumerate(rows) if index not in dropped]


def _shown(rows: Sequence[LabeledSequence], group: list[int], labels: list[Label]) -> str:
    """Describe rows with one sequence: id, file and line, and label of the first four."""
    texts = [text if len(text) <= 30 else f"{text[:27]}..." for text in map(repr, labels[:4])]
    shown = [f"{rows[i].id} ({place(rows[i])}, {text})" for i, text in zip(group[:4], texts, strict=True)]
    return ", ".join(shown) + (f" and {len(group) - 4} more" if len(group) > 4 else "")


def _found(
    rows: Sequence[LabeledSequence], group: list[int], labels: list[Label], key: str, what: str
) -> LabelError:
    first = rows[group[0]]
    problem = f"{what}: {_shown(rows, group, labels)}; fix the rows, or set {key}='drop' or 'keep'"
    return LabelError(problem, path=first.source, line=first.line, record_id=first.id)


def place(row: LabeledSequence) -> str:
    """Return the file and line of a row."""
    return row.source if row.line is None else f"{row.source}:{row.line}"
