"""The table of labels: one row per record, with its class or value, and perhaps its group and split.

Which rows of an embedding file take part, with what label, and which of them share a fold.
"""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from genoembed.errors import ConfigError, GenoembedWarning, LabelError
from genoembed.pipeline.embedding_file import read_file_records
from genoembed.probing.cross_validation import check_counts, split_folds
from genoembed.sequences.formats import SEQUENCE_COLUMN, row_id
from genoembed.sequences.homology import HomologyConfig, cluster_homologs
from genoembed.sequences.tables import as_number, iter_rows, parse_split

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from genoembed.config.probe import ProbeConfig
    from genoembed.sequences.tables import SplitSide, TableRow
    from genoembed.store import EmbeddingFile


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelTable:
    """Labels by record id."""

    path: str
    labels: Mapping[str, str | float]
    """Class, or value of a regression."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Empty where there is no column of groups."""
    sides: Mapping[str, SplitSide] = field(default_factory=dict)
    """Side of the split; validation rows take no part. Empty where nothing is split."""
    num_empty: int = 0
    """Rows without a label, which count as absent."""


def read_labels(path: str, options: ProbeConfig, *, has_sequences: bool = False) -> LabelTable:
    """Read a table of labels; one that has the sequences as well may number its rows, as finetune does."""
    group_column = (options.group_column or "group") if options.cv == "grouped" else None
    split_column = None
    if options.preset != "none" and options.split is None:
        split_column = "split"
    labels: dict[str, str | float] = {}
    groups: dict[str, str] = {}
    sides: dict[str, SplitSide] = {}
    seen: set[str] = set()
    num_empty = 0
    for row in iter_rows(path):
        if has_sequences:
            row.cell(SEQUENCE_COLUMN, option="labels")
            name = row_id(row, column=options.id_column)
        else:
            name = row.text(options.id_column, option="id_column")
        if name in seen:
            problem = f"id {name!r} appears twice, expected one row per record; remove one"
            raise LabelError(problem, path=row.path, line=row.line, record_id=name)
        seen.add(name)
        label = row.text(options.label_column, option="label_column")
        if not label:
            num_empty += 1
            continue
        labels[name] = _number(row, label, name) if options.task == "regression" else label
        if group_column is not None and (group := row.text(group_column, option="group_column")):
            groups[name] = group
        if split_column is not None:
            sides[name] = _side(row, split_column, name)
    if options.split is not None:
        for row in iter_rows(options.split):
            name = row.text(options.id_column, option="id_column")
            if name in labels:
                sides[name] = _side(row, "split", name)
    return LabelTable(path=path, labels=labels, groups=groups, sides=sides, num_empty=num_empty)


def check_labels(table: LabelTable, options: ProbeConfig) -> None:
    """Raise if there are too few labels to learn from, whatever records there are; warn if there are few."""
    learned = [label for name, label in table.labels.items() if table.sides.get(name, "train") == "train"]
    check_counts(np.array(learned), options.task, None, options.num_folds, name=table.path)
    if len(learned) < _FEW_ROWS * options.num_folds:
        logger.warning(
            "%s: %d labels, about %d rows in each of %d test folds: scores will vary too much to tell layers "
            "apart; add rows if you can",
            table.path,
            len(learned),
            len(learned) // options.num_folds,
            options.num_folds,
        )


def _number(row: TableRow, label: str, name: str) -> float:
    try:
        return as_number(label)
    except ValueError as error:
        problem = f"label {label!r} is not a number, but the task is regression; set task to 'classification'"
        raise LabelError(problem, path=row.path, line=row.line, record_id=name) from error


def _side(row: TableRow, column: str, name: str) -> SplitSide:
    word = row.text(column, option="split_column")
    return parse_split(word, path=row.path, line=row.line, record_id=name)


logger = logging.getLogger(__name__)

_SHOWN = 3
_FEW_ROWS = 10
"""Rows of a test fold: with fewer, one row more or less moves a score by a tenth."""
_FAILED = re.compile(r"(?:^|,)failed:")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabeledRows:
    """Rows of a file that take part."""

    rows: NDArray[np.int64]
    """Their numbers in the file, ascending."""
    ids: tuple[str, ...]
    target: NDArray[Any]
    """Classes or values."""
    is_test: NDArray[np.bool_] | None
    """Where there is a split: which rows only score."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Rows and labels that were left out, by why."""

    @property
    def is_train(self) -> NDArray[np.bool_]:
        """Rows that are learned from."""
        return np.ones(len(self.rows), np.bool_) if self.is_test is None else ~self.is_test


@dataclass(frozen=True, kw_only=True)
class RecordTable:
    """Records that have no vectors yet, in place of a file of them."""

    path: Path
    ids: list[str]
    sources: list[str]

    @property
    def obs(self) -> dict[str, NDArray[np.str_]]:
        """The columns that rows are chosen and grouped by."""
        return {"source": np.array(self.sources), "flags": np.full(len(self.ids), "")}

    @property
    def X(self) -> NDArray[np.float32]:  # noqa: N802 - as in a file
        """A vector for each: none has failed."""
        return np.zeros((len(self.ids), 1), np.float32)


def join_labels(
    file: EmbeddingFile | RecordTable, table: LabelTable, options: ProbeConfig, *, is_checked: bool = False
) -> LabeledRows:
    """Match labels with the rows of a file; leave out rows that failed, and those without a label.

    What was checked before, and warned of, is not warned of again.
    """
    ids, has_failed = file.ids, _failed_rows(file)
    known = set(ids)
    strays = [name for name in table.labels if name not in known]
    if strays and (options.unmatched == "error" or len(strays) == len(table.labels)):
        remedy = (
            "set unmatched to 'warn'"
            if len(strays) < len(table.labels)
            else "give the labels of these records"
        )
        problem = (
            f"{len(strays)} label(s) without a record ({_shown(strays)}), expected ids of the input such as "
            f"{ids[0]!r}; {remedy}"
        )
        raise LabelError(problem, path=table.path)
    if strays and not is_checked:
        message = f"{table.path}: {len(strays)} label(s) without a record ({_shown(strays)}) are left out"
        warnings.warn(message, GenoembedWarning, stacklevel=2)
    rows = np.array(
        [
            row
            for row, name in enumerate(ids)
            if name in table.labels and not has_failed[row] and table.sides.get(name) != "validation"
        ],
        dtype=np.int64,
    )
    if failed := [name for name, lacks in zip(ids, has_failed, strict=True) if lacks]:
        logger.warning(
            "%s: %d record(s) without a vector are left out (%s)", file.path, len(failed), _shown(failed)
        )
    counts = {
        "rows in the file": len(ids),
        "rows without a label": sum(name not in table.labels for name in ids),
        "rows without a vector": int(has_failed.sum()),
        "labels without a record": len(strays),
        "rows of neither train nor test": sum(
            name in table.labels and table.sides.get(name) == "validation" for name in ids
        ),
    }
    if not len(rows):
        message = f"{table.path}: no row of {file.path} is left ({counts}); check the ids"
        raise ConfigError(message)
    names = tuple(ids[row] for row in rows)
    is_test = None
    if options.preset != "none":
        if lost := [name for name in names if name not in table.sides]:
            problem = f"{len(lost)} record(s) are in no split ({_shown(lost)}); say train or test for each"
            raise LabelError(problem, path=options.split or table.path)
        is_test = np.array([table.sides[name] == "test" for name in names])
    return LabeledRows(
        rows=rows,
        ids=names,
        target=np.array([table.labels[name] for name in names]),
        is_test=is_test,
        counts=counts,
    )


def assign_folds(
    labeled: LabeledRows, groups: NDArray[np.int64] | None, options: ProbeConfig
) -> NDArray[np.int64]:
    """Assign the rows that are learned from to folds."""
    is_train = labeled.is_train
    return split_folds(
        labeled.target[is_train],
        task=options.task,
        groups=None if groups is None else groups[is_train],
        num_folds=options.num_folds,
        seed=options.seed,
    )


def group_rows(
    file: EmbeddingFile | RecordTable,
    labeled: LabeledRows,
    table: LabelTable,
    options: ProbeConfig,
    sequences: Sequence[bytes] | None,
) -> NDArray[np.int64] | None:
    """Number the groups of rows that must share a fold; None if any rows may be apart."""
    if options.cv == "stratified":
        return None
    if options.cv == "grouped":
        if lost := [name for name in labeled.ids if name not in table.groups]:
            problem = f"{len(lost)} record(s) have no group ({_shown(lost)}), expected one each; add them"
            raise LabelError(problem, path=table.path)
        return _numbered([table.groups[name] for name in labeled.ids])
    if options.cv == "chromosome":
        return _numbered(_chromosomes(file, labeled))
    if sequences is None:
        message = (
            f"cv is 'homology', but the sequences of {file.path} are not where it says; set sequences to "
            "their files"
        )
        raise ConfigError(message)
    clusters = cluster_homologs(sequences, config=HomologyConfig(identity=options.homolog_identity))
    return clusters.labels


def _chromosomes(file: EmbeddingFile | RecordTable, labeled: LabeledRows) -> list[str]:
    """Return the chromosome of each row: its id up to the last colon, or the file it came from."""
    if any(":" in name for name in labeled.ids):
        return [name.rpartition(":")[0] or name for name in labeled.ids]
    sources = [str(source) for source in file.obs["source"][labeled.rows]]
    if len(set(sources)) > 1:
        return sources
    message = (
        f"cv is 'chromosome', but ids such as {labeled.ids[0]!r} name none before a colon and all come from "
        f"{sources[0]!r}; name records CHROMOSOME:PLACE, or set cv to 'grouped'"
    )
    raise ConfigError(message)


def read_row_sequences(file: EmbeddingFile, labeled: LabeledRows, paths: Sequence[str]) -> list[bytes] | str:
    """Read the sequences of rows again: what was pooled of each, without flanks."""
    try:
        records = read_file_records(file, labeled.rows.tolist(), paths=paths)
    except ConfigError as error:
        return str(error)
    return [record.sequence[record.core_start : record.core_end] for record in records]


def _failed_rows(file: EmbeddingFile | RecordTable) -> NDArray[np.bool_]:
    """Find the rows that are flagged as failed, or hold NaN in the first matrix."""
    flagged = np.array([bool(_FAILED.search(flags)) for flags in file.obs["flags"]], dtype=np.bool_)
    vectors: NDArray[np.floating] = np.asarray(file.X[:])
    is_finite: NDArray[np.bool_] = np.isfinite(vectors).all(axis=1)
    return flagged | ~is_finite


def _numbered(names: Sequence[str]) -> NDArray[np.int64]:
    return np.unique(np.array(names), return_inverse=True)[1].reshape(-1).astype(np.int64)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
