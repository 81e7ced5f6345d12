"""The rows of a fine-tuning run: read, cleaned, parted into training, validation and test.

In: a :class:`~genoembed.training.finetune_config.FinetuneConfig`. Out: :class:`Sides` of labelled sequences
or of retrieval examples. Promised: the same files and config give the same sides; what was dropped is counted
and logged; no side is silently empty.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from genoembed.config.finetune import LABEL_KINDS
from genoembed.config.labelled import CleaningConfig, LabelledConfig, SplitConfig, TableColumns
from genoembed.errors import ConfigError, SequenceFormatError
from genoembed.finetuning.cleaning import clean_labelled
from genoembed.finetuning.labelled import LabelledSequence, read_labelled
from genoembed.finetuning.pairs import RetrievalExample, read_pairs
from genoembed.finetuning.splits import Splits, check_leaks, group_clusters, split_rows
from genoembed.sequences import Policies
from genoembed.sequences.homology import Clusters, HomologyConfig, cluster_homologs
from genoembed.sequences.tables import iter_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from genoembed.config.choices import Contrast, LabelKind
    from genoembed.config.finetune import FinetuneConfig, FinetuneDataConfig


logger = logging.getLogger(__name__)

RowT = TypeVar("RowT", LabelledSequence, RetrievalExample)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides(Generic[RowT]):
    """Rows by what they are for."""

    train: list[RowT]
    validation: list[RowT]
    """May be empty: then nothing stops training early."""
    test: list[RowT]

    def held_out(self) -> list[tuple[str, list[RowT]]]:
        """Name the sides that are measured on, ``eval`` and ``test``, as far as they have rows."""
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


def find_contrast(config: FinetuneConfig) -> Contrast:
    """Tell where the pairs of a contrastive task come from."""
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


def without_strata(config: FinetuneConfig) -> FinetuneConfig:
    """Part rows without labels at random, where it is only the default that they be stratified."""
    if config.data.split != "stratified":
        return config
    return replace(config, data=replace(config.data, split="random"))


def read_sides(config: FinetuneConfig, *, kind: LabelKind) -> Sides[LabelledSequence]:
    """Read labelled sequences."""
    data = config.data
    table = None if kind == "none" else data.labels
    read = [
        read_labelled(files, config=_labelled(data, kind), labels=table, policies=_policies(data))
        if files
        else []
        for files in _files(data)
    ]
    cleaning = CleaningConfig(
        both_strands=not data.one_strand, duplicates=data.repeats, conflicts=data.conflicts
    )
    read = [clean_labelled(rows, kind=kind, config=cleaning).rows for rows in read]
    rows = [row for part in read for row in part]
    by_group = data.group_column is not None
    return _parted(rows, rows, [len(part) for part in read], config, kind=kind, by_group=by_group)


def read_example_sides(config: FinetuneConfig) -> Sides[RetrievalExample]:
    """Read retrieval examples. Kin are told by their queries, or by the groups that rows name."""
    data = config.data
    read = [
        read_pairs(files, policies=_policies(data), false_negatives=data.false_negatives) if files else []
        for files in _files(data)
    ]
    rows = [row for part in read for row in part]
    queries = [
        LabelledSequence(
            id=row.id, sequence=row.query, label=None, source=row.source, line=row.line, group=row.group
        )
        for row in rows
    ]
    by_group = all(row.group for row in rows)
    return _parted(rows, queries, [len(part) for part in read], config, kind="none", by_group=by_group)


def _labelled(data: FinetuneDataConfig, kind: LabelKind) -> LabelledConfig:
    return LabelledConfig(kind=kind, **{item.name: getattr(data, item.name) for item in fields(TableColumns)})


def _policies(data: FinetuneDataConfig) -> Policies:
    return Policies(
        invalid=data.invalid,
        duplicates=data.duplicates,
        empty=data.empty,
        gaps=data.gaps,
        keep_case=data.keep_case,
    )


def _split(config: FinetuneConfig) -> SplitConfig:
    data = config.data
    return SplitConfig(
        split=data.split,
        validation_fraction=data.validation_fraction,
        test_fraction=data.test_fraction,
        seed=config.recipe.seed,
    )


def _files(data: FinetuneDataConfig) -> tuple[tuple[str, ...], ...]:
    return (data.train, data.validation, data.test)


def _parted(
    rows: Sequence[RowT],
    sequences: Sequence[LabelledSequence],
    sizes: Sequence[int],
    config: FinetuneConfig,
    *,
    kind: LabelKind,
    by_group: bool,
) -> Sides[RowT]:
    """Part rows by their files, or by what ``split`` says where there is one file alone."""
    data = config.data
    clusters = _clusters(sequences, data, by_group=by_group)
    if any(_files(data)[1:]):
        splits = _splits_of_files(sizes)
    else:
        splits = split_rows(sequences, kind=kind, config=_split(config), clusters=clusters)
    return _sealed(rows, sequences, splits, clusters, data)


def _clusters(
    rows: Sequence[LabelledSequence], data: FinetuneDataConfig, *, by_group: bool
) -> Clusters | None:
    if data.split != "homology" and data.homologs == "ignore":
        return None
    if by_group:
        return Clusters(labels=group_clusters(rows))
    return cluster_homologs([row.sequence for row in rows], config=HomologyConfig(identity=data.kin_identity))


def _splits_of_files(sizes: Sequence[int]) -> Splits:
    bounds = np.cumsum([0, *sizes])
    parts = [np.arange(bounds[i], bounds[i + 1], dtype=np.int64) for i in range(len(sizes))]
    return Splits(train=parts[0], validation=parts[1], test=parts[2])


def _sealed(
    rows: Sequence[RowT],
    sequences: Sequence[LabelledSequence],
    splits: Splits,
    clusters: Clusters | None,
    data: FinetuneDataConfig,
) -> Sides[RowT]:
    if clusters is not None and data.homologs != "ignore":
        kinship = HomologyConfig(identity=data.kin_identity)
        splits = check_leaks(sequences, splits, clusters, policy=data.homologs, config=kinship).splits
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


def _content(row: LabelledSequence | RetrievalExample) -> tuple[object, ...]:
    if isinstance(row, LabelledSequence):
        return (row.id, row.sequence, row.label)
    return (row.id, row.query, row.pos, row.neg, row.teacher_scores, row.group)


def label_kind(task: str, contrast: Contrast | None) -> LabelKind:
    """Say what the labels of a task are."""
    if contrast is not None:
        return "class" if contrast == "labels" else "none"
    return LABEL_KINDS[task]
