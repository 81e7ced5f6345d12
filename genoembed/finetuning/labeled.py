"""Labeled sequences: tables of sequences and labels, or sequence files with a table of their labels.

In: files of any format and compression. Out: :class:`LabeledSequence`, one at a time in file order, letters
cleaned by the policies of ``extract``. Promised: each label fits its sequence; what policies leave out is
counted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import count
from os import fspath
from typing import TYPE_CHECKING, NamedTuple

from genoembed.config.labeled import LabeledConfig
from genoembed.errors import (
    ConfigError,
    InputError,
    LabelError,
    MissingOptionError,
    Problem,
    Remedy,
    SequenceFormatError,
)
from genoembed.finetuning.labels import Label, parse_label
from genoembed.sequences import InputCounts, Policies
from genoembed.sequences.compression import STDIN, WHITESPACE, check_readable
from genoembed.sequences.formats import holds_records, iter_records, row_record
from genoembed.sequences.reading import clean_record, file_names
from genoembed.sequences.records import GAPS, Counts, IdRegistry, RawRecord
from genoembed.sequences.tables import TableRow, iter_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from genoembed.sequences.reading import PathInput


logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class LabeledCounts(Counts):
    """How much was read, and how often each policy acted. The reader adds to it."""

    read: InputCounts = field(default_factory=InputCounts)
    """Records, bases, and what the policies for letters did."""
    skipped_unlabeled: int = 0
    """Records left out because the table of labels does not have them."""
    unused_labels: int = 0
    """Labels of the table that belong to no record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabeledSequence:
    """One sequence to learn from, cleaned, with its label and where both came from."""

    id: str
    """Unique within a run."""
    sequence: bytes
    """ASCII letters, one byte per base, after all policies."""
    label: Label
    """What ``kind`` says; for ``token``, one name per base of ``sequence``."""
    source: str
    """File name as the user gave it."""
    line: int | None = None
    """1-based line of the row, or of the record's header, where the format has lines."""
    split: str | None = None
    """What the column of the split says."""
    group: str | None = None
    """What the column of groups says."""


class _Cells(NamedTuple):
    """What a table says about one sequence."""

    label: Label
    split: str | None
    group: str | None


def iter_labeled(
    paths: PathInput | Sequence[PathInput],
    *,
    config: LabeledConfig | None = None,
    labels: PathInput | None = None,
    policies: Policies | None = None,
    counts: LabeledCounts | None = None,
) -> Iterator[LabeledSequence]:
    """Read labeled sequences, one at a time.

    Compression and format are found by content. Options and file names are checked at once; rows are read as
    the iterator is used. A table of labels is held in memory.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from pathlib import Path
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "two.csv")
        ...     _ = path.write_text("sequence,label\\nacgu,promoter\\nGG,other\\n")
        ...     [(row.id, row.sequence, row.label, row.line) for row in iter_labeled(path)]
        [('row_1', b'ACGT', 'promoter', 2), ('row_2', b'GG', 'other', 3)]
    """
    names = file_names(paths)
    chosen = LabeledConfig() if config is None else config
    table = None if labels is None else fspath(labels)
    _check_files(names, table, chosen)
    reader = _Reader(chosen, Policies() if policies is None else policies, counts or LabeledCounts())
    return reader.tables(names) if table is None else reader.joined(names, table)


def read_labeled(
    paths: PathInput | Sequence[PathInput],
    *,
    config: LabeledConfig | None = None,
    labels: PathInput | None = None,
    policies: Policies | None = None,
    counts: LabeledCounts | None = None,
) -> list[LabeledSequence]:
    """Read all labeled sequences into memory, for training. As :func:`iter_labeled`."""
    tally = LabeledCounts() if counts is None else counts
    rows = list(iter_labeled(paths, config=config, labels=labels, policies=policies, counts=tally))
    if not rows:
        message = f"input: no sequence is left ({tally}); give more, or change the policies"
        raise ConfigError(message)
    return rows


def _check_files(names: list[str], table: str | None, config: LabeledConfig) -> None:
    problems = []
    if not names:
        problems.append("no input file; name at least one, or '-' for standard input")
    if [*names, table].count(STDIN) > 1:
        problems.append("standard input '-' is named twice, but can be read once; name it once")
    if table is not None and config.kind == "none":
        problems.append("labels are given, but kind is 'none'; set kind, or leave labels out")
    if problems:
        raise ConfigError(*problems)
    for name in filter(None, [*names, table]):
        check_readable(name)
    for name in names:
        if table is None and config.kind != "none" and name != STDIN and holds_records(name):
            remedy = Remedy("labels", words="the table of their labels")
            raise MissingOptionError(Problem(f"{name} has sequences, but no labels", remedy), key="labels")


class _Reader:
    """One reading: ids and counts run over all files."""

    def __init__(self, config: LabeledConfig, policies: Policies, counts: LabeledCounts) -> None:
        self._config = config
        self._policies = policies
        self._counts = counts
        self._ids = IdRegistry(policies.duplicates)

    def tables(self, names: list[str]) -> Iterator[LabeledSequence]:
        number = count(1)
        for name in names:
            self._counts.read.files += 1
            if self._config.kind == "none" and holds_records(name):
                found = (self._finish(raw, _Cells(None, None, None)) for raw in iter_records(name))
            else:
                found = (self._row(row, next(number)) for row in iter_rows(name))
            yield from (finished for finished in found if finished is not None)
        logger.info("input: %s", self._counts)

    def joined(self, names: list[str], table: str) -> Iterator[LabeledSequence]:
        cells = self._read_table(table)
        unused = set(cells)
        for name in names:
            self._counts.read.files += 1
            for raw in iter_records(name):
                unused.discard(raw.id)
                of_record = cells.get(raw.id)
                if of_record is not None:
                    finished = self._finish(raw, of_record)
                    if finished is not None:
                        yield finished
                elif self._config.unlabeled == "error":
                    raise _unlabeled(raw, table, cells)
                else:
                    self._counts.skipped_unlabeled += 1
                    logger.info("%s:%s: record %r skipped: no label in %s", name, raw.line, raw.id, table)
        self._counts.unused_labels += len(unused)
        if unused:
            logger.warning(
                "%s: %d of %d labels belong to no record (%s ...)",
                table,
                len(unused),
                len(cells),
                min(unused),
            )
        logger.info("input: %s", self._counts)

    def _row(self, row: TableRow, number: int) -> LabeledSequence | None:
        record_id = self._id(row) if self._config.id_column else f"row_{number}"
        raw = row_record(row, column=self._config.sequence_column, record_id=record_id)
        return self._finish(raw, self._cells(row, record_id))

    def _cells(self, row: TableRow, record_id: str) -> _Cells:
        config = self._config
        wanted = config.label_columns if config.kind != "none" else ()
        try:
            label = parse_label(
                {column: row.cell(column, option="label_columns") for column in wanted},
                kind=config.kind,
                delimiter=config.label_delimiter,
                ignore_label=config.ignore_label,
            )
        except LabelError as error:
            raise LabelError(error.problem, path=row.path, line=row.line, record_id=record_id) from None
        return _Cells(
            label,
            _text(row, config.split_column, "split_column"),
            _text(row, config.group_column, "group_column"),
        )

    def _id(self, row: TableRow) -> str:
        column = self._config.id_column or "id"
        value = row.text(column, option="id_column")
        if not value:
            problem = f"column {column!r} has no id; name the row"
            raise SequenceFormatError(
                problem, path=row.path, line=row.line, record_id=row.name if row.line is None else None
            )
        return value

    def _read_table(self, path: str) -> dict[str, _Cells]:
        cells: dict[str, _Cells] = {}
        ids = IdRegistry("error")
        for row in iter_rows(path):
            record_id = self._id(row)
            ids.admit(record_id, path=path, line=row.line)
            cells[record_id] = self._cells(row, record_id)
        return cells

    def _finish(self, raw: RawRecord, cells: _Cells) -> LabeledSequence | None:
        pieces = list(raw.body)
        label = cells.label
        record = clean_record(
            raw._replace(body=iter(pieces)),
            policies=self._policies,
            ids=self._ids,
            counts=self._counts.read,
        )
        if record is None:
            return None
        if self._config.kind == "token":
            assert isinstance(label, tuple), "token labels are a row of names"
            label = _fit_token_label(label, pieces, raw)
        return LabeledSequence(
            id=record.id,
            sequence=record.sequence,
            label=label,
            source=raw.path,
            line=raw.line,
            split=cells.split,
            group=cells.group,
        )


def _fit_token_label(label: Label, pieces: list[tuple[bytes, int | None]], raw: RawRecord) -> Label:
    """Match labels to letters as the file has them, and take out those of stripped gaps."""
    assert isinstance(label, tuple), "token labels are a row of names"
    letters = b"".join(piece.translate(None, WHITESPACE) for piece, _ in pieces)
    if len(label) != len(letters):
        problem = f"{len(label)} labels for {len(letters)} letters, expected one per letter; fix the row"
        raise LabelError(problem, path=raw.path, line=raw.line, record_id=raw.id)
    names = (name for letter, name in zip(letters, label, strict=True) if letter not in GAPS)
    return tuple(name for name in names if name is None or isinstance(name, str))


def _unlabeled(raw: RawRecord, table: str, cells: dict[str, _Cells]) -> InputError:
    near = get_close_matches(raw.id, list(cells)[:10_000], n=1)
    hint = f"did you mean {near[0]!r}?" if near else "add it"
    problem = f"no label in {table}; {hint}, or set unlabeled='skip'"
    return LabelError(problem, path=raw.path, line=raw.line, record_id=raw.id)


def _text(row: TableRow, column: str | None, option: str) -> str | None:
    return None if column is None else row.text(column, option=option)
