"""The rows of a fine-tuning run: read, cleaned, and split into train, validation and test.

In: a :class:`~genoembed.config.finetune.FinetuneConfig`. Out: :class:`Sides` of labeled sequences or of
retrieval examples. Promised: the same files and config give the same sides; what was dropped is counted and
logged; no side is silently empty.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from genoembed.config.fields import raise_all
from genoembed.config.labeled import CleaningConfig, LabeledConfig, SplitConfig, TableColumns
from genoembed.config.tasks import LABEL_KINDS, PREDICTION_TASKS
from genoembed.errors import (
    ConfigError,
    Problem,
    Remedy,
    SequenceFormatError,
    TrainingWarning,
)
from genoembed.finetuning.cleaning import clean_labeled
from genoembed.finetuning.labeled import LabeledSequence, read_labeled
from genoembed.finetuning.labels import LabelSpace, label_names
from genoembed.finetuning.pairs import RetrievalExample, read_pairs
from genoembed.finetuning.splits import SIDES, Splits, check_leaks, group_clusters, split_rows
from genoembed.sequences import Policies
from genoembed.sequences.homology import Clusters, HomologyConfig, cluster_homologs
from genoembed.sequences.tables import iter_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from genoembed.config.choices import Contrast, LabelKind, SplitMethod
    from genoembed.config.finetune import FinetuneConfig, FinetuneDataConfig


logger = logging.getLogger(__name__)

RowT = TypeVar("RowT", LabeledSequence, RetrievalExample)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides(Generic[RowT]):
    """Rows by what they are for."""

    train: list[RowT]
    validation: list[RowT]
    """May be empty: then nothing stops training early."""
    test: list[RowT]

    def held_out(self) -> list[tuple[str, list[RowT]]]:
        """Return the sides that are measured on, ``eval`` and ``test``, if they have rows."""
        return [(name, rows) for name, rows in (("eval", self.validation), ("test", self.test)) if rows]

    @property
    def digest(self) -> str:
        """SHA-256 of all rows, by side: equal for equal data, whatever its files are called."""
        found = hashlib.sha256()
        for side in (self.train, self.validation, self.test):
            found.update(b"side")
            for row in side:
                found.update(repr(_content(row)).encode())
        return found.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRows:
    """What a task learns from and is measured on, before there is a model."""

    sides: Sides[Any]
    space: LabelSpace | None = None
    """What labels mean, for tasks that predict, and for classes that are compared."""
    contrast: Contrast | None = None
    """Where pairs come from, for tasks that compare."""


def read_task_rows(config: FinetuneConfig) -> TaskRows:
    """Read, clean, split and check the rows of a run."""
    task = config.objective.task
    if task == "lm":
        return TaskRows(sides=read_sides(config, kind="none"))
    if task in PREDICTION_TASKS:
        return _with_space(config, read_sides(config, kind=LABEL_KINDS[task]), LABEL_KINDS[task])
    contrast = find_contrast(config)
    raise_all(config.misplaced(contrast))
    if contrast == "examples":
        examples = read_example_sides(config)
        row = next((row for row in examples.train if not row.neg), None)
        if task == "triplet" and row is not None:
            message = (
                f"{row.source}:{row.line}: no neg, but task 'triplet' needs one per row; give each row one"
            )
            raise ConfigError(message)
        return TaskRows(sides=examples, contrast=contrast)
    if contrast == "views" and task == "triplet":
        message = "task 'triplet' needs labels or examples; give labels"
        raise ConfigError(Problem(message, Remedy("task", "contrastive")))
    sides = read_sides(config, kind="class" if contrast == "labels" else "none")
    if contrast == "views":
        return TaskRows(sides=sides, contrast=contrast)
    for name, held in (("validation", sides.validation), ("test", sides.test)):
        if held and len({row.label for row in held}) == len(held):
            message = (
                f"{name}: {len(held)} rows of {len(held)} labels, so none has another of its label to find; "
                "hold out more"
            )
            raise ConfigError(message)
    # an encoder may find classes alike that it never saw: those of held-out rows need no output
    space = LabelSpace.of((row.label for row in sides.train), kind="class")
    return TaskRows(sides=sides, space=space, contrast=contrast)


def _with_space(config: FinetuneConfig, sides: Sides[LabeledSequence], kind: LabelKind) -> TaskRows:
    """List the classes of the rows to train on; others of held-out rows are left out, which is warned of."""
    columns = config.data.label_columns
    space = LabelSpace.of((row.label for row in sides.train), kind=kind, columns=columns)
    if kind == "regression":
        return TaskRows(sides=sides, space=space)
    known = set(space.names)
    if kind == "multilabel" and len(columns) > 1 and (never := sorted({*columns} - known)):
        _warn(f"label_columns: no row to train on has {_quoted(never)}, so nothing is predicted for it")
    held_out = {}
    for name, rows in (("validation", sides.validation), ("test", sides.test)):
        unseen: dict[str, LabeledSequence] = {}
        for row in rows:
            for label in label_names(row.label):
                if label not in known:
                    unseen.setdefault(label, row)
        held_out[name] = rows
        if unseen:
            held_out[name] = [kept for row in rows if (kept := _without(row, known, kind)) is not None]
            first = next(iter(unseen.values()))
            what = {"token": "their bases", "multilabel": "these labels"}.get(kind, "their rows")
            _warn(
                f"{first.source}{f':{first.line}' if first.line else ''}: {name} rows have "
                f"{_quoted(sorted(unseen))}, which no row to train on has, so it cannot be predicted; {what} "
                f"do not count in the metrics ({len(rows) - len(held_out[name])} of {len(rows)} rows left "
                "out); give rows to train on, or remove it"
            )
            if not held_out[name]:
                message = f"{name}: no row is left of a class that rows to train on have; hold out others"
                raise ConfigError(message)
    return TaskRows(sides=replace(sides, **held_out), space=space)


def _without(row: LabeledSequence, known: set[str], kind: LabelKind) -> LabeledSequence | None:
    """Take labels out of a held-out row that no training row has; None if nothing is left to measure."""
    if known.issuperset(label_names(row.label)):
        return row
    if kind == "class" or not isinstance(row.label, tuple):
        return None
    if kind == "multilabel":
        return replace(row, label=tuple(name for name in label_names(row.label) if name in known))
    bases = tuple(str(name) if name in known else None for name in row.label)
    return replace(row, label=bases) if any(bases) else None


def _quoted(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5])) + (" ..." if len(names) > 5 else "")
    return f"class {shown}" if len(names) == 1 else f"classes {shown}"


def _warn(message: str) -> None:
    warnings.warn(message, TrainingWarning, stacklevel=4)


def find_contrast(config: FinetuneConfig) -> Contrast:
    """Determine where the pairs of a contrastive task come from."""
    if config.objective.task == "retrieval":
        return "examples"
    if config.objective.contrast != "auto":
        return config.objective.contrast
    if config.data.labels is not None:
        return "labels"
    columns = _columns(config.data.train[0])
    if "query" in columns:
        found: Contrast = "examples"
    else:
        found = "labels" if columns.issuperset(config.data.label_columns) else "views"
    logger.info("contrast: %s, by the columns of %s", found, config.data.train[0])
    return found


def read_sides(config: FinetuneConfig, *, kind: LabelKind) -> Sides[LabeledSequence]:
    """Read labeled sequences."""
    data = config.data
    columns = {name: getattr(data, name) for name in TableColumns.own_options()}
    cleaning = CleaningConfig(**{name: getattr(data, name) for name in CleaningConfig.own_options()})
    read = []
    for files in _files(data):
        rows = (
            read_labeled(
                files,
                config=LabeledConfig(kind=kind, **columns),
                labels=None if kind == "none" else data.labels,
                policies=_policies(data),
            )
            if files
            else []
        )
        read.append(clean_labeled(rows, kind=kind, config=cleaning))
    # stratified is the default, which rows without labels cannot follow
    split = "random" if kind == "none" and data.split == "stratified" else data.split
    by_group = data.group_column is not None
    return _split_sides(read, _joined(read), config, kind=kind, split=split, by_group=by_group)


def read_example_sides(config: FinetuneConfig) -> Sides[RetrievalExample]:
    """Read retrieval examples. Homologs are found by queries, unless all rows name groups."""
    data = config.data
    read = [
        read_pairs(files, policies=_policies(data), false_negatives=data.false_negatives) if files else []
        for files in _files(data)
    ]
    queries = [
        LabeledSequence(
            id=row.id, sequence=row.query, label=None, source=row.source, line=row.line, group=row.group
        )
        for row in _joined(read)
    ]
    by_group = all(row.group for row in queries)
    return _split_sides(read, queries, config, kind="none", split=data.split, by_group=by_group)


def _policies(data: FinetuneDataConfig) -> Policies:
    return Policies(
        invalid=data.invalid,
        duplicates=data.duplicates,
        empty=data.empty,
        gaps=data.gaps,
        keep_case=data.keep_case,
    )


def _files(data: FinetuneDataConfig) -> tuple[tuple[str, ...], ...]:
    return (data.train, data.validation, data.test)


def _joined(read: Sequence[Sequence[RowT]]) -> list[RowT]:
    return [row for rows in read for row in rows]


def _split_sides(
    read: Sequence[Sequence[RowT]],
    sequences: Sequence[LabeledSequence],
    config: FinetuneConfig,
    *,
    kind: LabelKind,
    split: SplitMethod,
    by_group: bool,
) -> Sides[RowT]:
    """Split rows by their files, or by ``split`` where there are files to train on alone."""
    data, rows = config.data, _joined(read)
    homology = HomologyConfig(identity=data.homolog_identity)
    clusters = None
    if split == "homology" or data.homologs != "ignore":
        clusters = (
            Clusters(labels=group_clusters(sequences))
            if by_group
            else cluster_homologs([row.sequence for row in sequences], config=homology)
        )
    if data.validation or data.test:
        numbers = np.arange(len(rows))
        ends = np.cumsum([len(of_side) for of_side in read])
        splits = Splits(**dict(zip(SIDES, np.split(numbers, ends[:-1]), strict=True)))
    else:
        chosen = SplitConfig(
            split=split,
            validation_fraction=data.validation_fraction,
            test_fraction=data.test_fraction,
            seed=config.recipe.seed,
        )
        splits = split_rows(sequences, kind=kind, config=chosen, clusters=clusters)
    if clusters is not None and data.homologs != "ignore":
        splits = check_leaks(sequences, splits, clusters, policy=data.homologs, config=homology)
    sides = Sides(**{side: [rows[i] for i in members] for side, members in splits.sides().items()})
    if not sides.train:
        message = "train: no row is left to learn from; give more, or change the policies"
        raise ConfigError(message)
    logger.info(
        "rows: %d to train on, %d to validate, %d to test",
        len(sides.train),
        len(sides.validation),
        len(sides.test),
    )
    return sides


def _columns(path: str) -> set[str]:
    """List the columns of a table; empty for a sequence file."""
    try:
        first = next(iter_rows(path), None)
    except SequenceFormatError:
        return set()
    return set() if first is None else set(first.values)


def _content(row: LabeledSequence | RetrievalExample) -> tuple[object, ...]:
    if isinstance(row, LabeledSequence):
        return (row.id, row.sequence, row.label)
    return (row.id, row.query, row.pos, row.neg, row.teacher_scores, row.group)
