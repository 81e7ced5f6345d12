"""``subset``, ``join`` and ``annotate``: embedding files made of embedding files, without a model.

``file -> rows, or files -> all rows, or file and table -> more columns -> file``. What is written is a file
of genoembed like any other, with a seal. Its provenance is that of its sources, and ``history`` in it says
what was done, to which files (by SHA-256).

N rows.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genoembed._version import __version__
from genoembed.config.fields import named_options
from genoembed.config.files import AnnotateConfig, JoinConfig, SubsetConfig
from genoembed.config.paths import check_paths
from genoembed.errors import ConfigError, DuplicateIdError, LabelError, Problem, Remedy, StoreError
from genoembed.pipeline.embedding_file import (
    computed_dtype,
    joinable_settings,
    reading_differences,
    record_names,
    setting_differences,
)
from genoembed.sequences.compression import decode_text, file_facts, iter_lines, iter_text
from genoembed.sequences.tables import as_text, iter_rows, typed_column
from genoembed.store import check_output, open_embeddings
from genoembed.store.rewriting import TakenRows, write_rows
from genoembed.store.schema import OBS_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.store import EmbeddingFile

logger = logging.getLogger(__name__)

_SHOWN = 3
_CONDITION = re.compile(r"(?P<column>[^!=<>]+)(?P<sign>!=|==|<=|>=|=|<|>)(?P<value>.*)", re.DOTALL)
_SIGNS: dict[str, Callable[[Any, Any], Any]] = {
    "=": np.equal,
    "==": np.equal,
    "!=": np.not_equal,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
}
_ID = "id"
"""Names the record id in a condition."""
_WORDS = {"true": True, "false": False}
_UNREADABLE = "read in different ways (%s): keep the files; verify and search by sequence need them"
_SUMMED = ("counts", "stats")
_LISTED = ("inputs", "regions")


@dataclass(frozen=True, kw_only=True, slots=True)
class SubsetReport:
    """What ``subset`` wrote."""

    output: Path
    num_rows: int
    num_in_file: int
    """Rows of the file that they were taken from."""
    missing: tuple[str, ...]
    """Requested ids that the file does not have."""
    dropped: tuple[str, ...] = ()
    """Parts that could not be taken along, by their places in the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinReport:
    """What ``join`` wrote."""

    output: Path
    num_rows: int
    layers: tuple[str, ...]
    dropped: tuple[str, ...]
    """Parts of the files that mean nothing for joined rows, or are in some of the files only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotateReport:
    """What ``annotate`` wrote."""

    output: Path
    num_rows: int
    columns: tuple[str, ...]
    """Columns that were added or replaced."""
    without_values: tuple[str, ...]
    """Ids of rows that the table does not have: their values are missing."""
    num_unknown_ids: int
    """Rows of the table whose ids the file does not have."""
    dropped: tuple[str, ...] = ()
    """Parts that could not be taken along, by their places in the file."""


@named_options(SubsetConfig)
def subset(
    path: str | PathLike[str],
    *,
    output: str | PathLike[str],
    ids: str | PathLike[str] | Sequence[str] | None = None,
    where: str | Sequence[str] = (),
    overwrite: bool = False,
) -> SubsetReport:
    """Write some rows of an embedding file as another one, in the order of the file.

    All that belongs to the rows is taken along: every layer, token vectors, columns, other matrices.

    Args:
        path: An embedding file, pooled or per-token.
        output: The file to write.
        ids: A file with one id per line (``-`` is standard input), or a list of ids. The id of a record
            stands for all its windows.
        where: Conditions on columns of the table of records, such as ``"strand=-"`` or ``"length>=500"``; all
            must hold. ``id`` is the id. ``=`` and ``!=`` compare text or numbers; ``<``, ``<=``, ``>`` and
            ``>=`` compare numbers.
        overwrite: Replace an existing file.

    Returns:
        What was written.

    Raises:
        ConfigError: If nothing is requested, a condition is wrong, or no row is left.
        StoreError: If a file cannot be read or written; the output is then as it was before.
    """
    conditions = [where] if isinstance(where, str) else list(where)
    parsed = [_parse(text) for text in conditions]
    list_file = fspath(ids) if isinstance(ids, str | PathLike) else None
    if ids is None and not parsed:
        raise ConfigError(Problem("no rows are requested", Remedy("ids", words="a list, or set where")))
    check_paths([path, *([] if list_file is None else [list_file])], [(output, "hdf5")], overwrite=overwrite)
    check_output(output, overwrite=overwrite)
    wanted = None if ids is None else list(dict.fromkeys(_read_ids(ids)))
    with open_embeddings(path) as file:
        is_kept = np.ones(len(file), np.bool_)
        missing: tuple[str, ...] = ()
        if wanted is not None:
            is_kept, missing = _rows_of(file, wanted)
        for condition in parsed:
            is_kept &= condition.holds(file)
        taken = TakenRows(file=file, rows=np.flatnonzero(is_kept))
        if not len(taken.rows):
            message = f"{file.path}: no row of {len(file):,} is left; check the ids and conditions"
            raise ConfigError(message)
        if missing:
            logger.warning(
                "%s: %d of the %d requested ids are not there (%s)",
                file.path,
                len(missing),
                len(wanted or ()),
                _shown(missing),
            )
        provenance = _with_step(
            {**file.provenance, "matrices": file.layers, **_failed_of(file, set(taken.ids))},
            "subset",
            [file],
            {"ids": list_file or (None if wanted is None else "a list"), "where": conditions},
            num_rows=len(taken.rows),
        )
        dropped = write_rows(output, [taken], provenance=provenance, overwrite=overwrite)
        return SubsetReport(
            output=Path(output),
            num_rows=len(taken.rows),
            num_in_file=len(file),
            missing=missing,
            dropped=dropped,
        )


@named_options(JoinConfig)
def join(
    paths: Sequence[str | PathLike[str]],
    *,
    output: str | PathLike[str],
    overwrite: bool = False,
) -> JoinReport:
    """Write the rows of several embedding files, made in the same way, as one file.

    Columns that some of the files lack are missing there. Matrices of other programs are joined where all
    files have them, in one width; what else other programs added is left out, and named in the report.

    Args:
        paths: Embedding files, two or more, in the order of the rows.
        output: The file to write.
        overwrite: Replace an existing file.

    Returns:
        What was written.

    Raises:
        ConfigError: If there are fewer than two files, or they were made in different ways.
        DuplicateIdError: If an id is in two of them.
        StoreError: If a file cannot be read or written; the output is then as it was before.
    """
    names = [fspath(path) for path in ([paths] if isinstance(paths, str | PathLike) else paths)]
    if len(names) < 2:
        message = f"{len(names)} file, expected two or more to join; name them"
        raise ConfigError(message)
    check_paths(names, [(output, "hdf5")], overwrite=overwrite)
    check_output(output, overwrite=overwrite)
    with ExitStack() as stack:
        files = [stack.enter_context(open_embeddings(name)) for name in names]
        for other in files[1:]:
            _check_alike(files[0], other)
        _check_ids_differ(files)
        sources = [TakenRows(file=file, rows=np.arange(len(file))) for file in files]
        num_rows = sum(map(len, files))
        others = [reading_differences(files[0].provenance, file.provenance) for file in files[1:]]
        if unlike := _union(why for found in others for why in found):
            logger.warning(_UNREADABLE, "; ".join(unlike))
        made_of = _joined(files, is_readable=not unlike)
        provenance = _with_step(made_of, "join", files, {"read_differently": unlike}, num_rows=num_rows)
        dropped = write_rows(output, sources, provenance=provenance, overwrite=overwrite)
        if dropped:
            logger.warning(
                "left out what other programs added and joined rows cannot have: %s", _shown(dropped)
            )
        return JoinReport(
            output=Path(output), num_rows=num_rows, layers=tuple(files[0].layers), dropped=dropped
        )


@named_options(AnnotateConfig)
def annotate(
    path: str | PathLike[str],
    table: str | PathLike[str],
    *,
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> AnnotateReport:
    """Add the columns of a table to the records of an embedding file, by id.

    A column whose values are all whole numbers, or all numbers, is stored as numbers, any other as text, also
    one with leading zeros (``007``). Rows that the table does not have get NaN, or no text.

    Args:
        path: An embedding file, pooled or per-token.
        table: TSV, CSV, JSON lines or Parquet, with ids in the first column and the names of columns in the
            first row. The id of a record stands for all its windows.
        output: The file to write; None writes the file again, which stays as it is until the new one is
            complete.
        overwrite: Replace columns of the same names that were added earlier, and an existing output.

    Returns:
        What was written.

    Raises:
        ConfigError: If a column is there already, or is one that genoembed writes.
        LabelError: If an id is in the table twice, or none of its ids is in the file.
        StoreError: If a file cannot be read or written; the output is then as it was before.
    """
    is_in_place = output is None
    target = path if output is None else output
    check_paths([path, table], [] if is_in_place else [(target, "hdf5")], overwrite=overwrite)
    if is_in_place:
        # only what is whole, and ours, may be replaced
        check_paths([table], [(target, "hdf5")], overwrite=True)
    check_output(target, overwrite=overwrite or is_in_place)
    before = Path(path).stat() if is_in_place and Path(path).is_file() else None
    with open_embeddings(path) as file:
        rows, names, num_rows = _read_table(fspath(table), file)
        _check_columns(file, fspath(table), names, overwrite=overwrite)
        records = record_names(file)
        found = [rows.get(row_id, rows.get(record)) for row_id, record in zip(file.ids, records, strict=True)]
        known = {*file.ids, *records}
        num_unknown = sum(record_id not in known for record_id in rows)
        without = tuple(name for name, values in zip(file.ids, found, strict=True) if values is None)
        if len(without) == len(file):
            shown = _shown(list(rows))
            problem = f"none of its ids ({shown}) is in {file.path} ({file.ids[0]!r} ...); use the same ids"
            raise LabelError(problem, path=fspath(table))
        columns = {
            name: typed_column([None if values is None else values.get(name) for values in found])
            for name in names
        }
        if without:
            logger.warning(
                "%s: %d of %d rows are not in %s (%s)", path, len(without), len(file), table, _shown(without)
            )
        if num_unknown:
            logger.warning("%s: %d of its %d ids are not in %s", table, num_unknown, num_rows, path)
        provenance = _with_step(
            {**file.provenance, "matrices": file.layers},
            "annotate",
            [file],
            {"table": file_facts(fspath(table)), "columns": names},
            num_rows=len(file),
        )
        taken = TakenRows(file=file, rows=np.arange(len(file)))
        if before and not _is_same(Path(path).stat(), before):
            problem = "was written by another process meanwhile; annotate it again"
            raise StoreError(problem, path=fspath(path))
        dropped = write_rows(
            target, [taken], provenance=provenance, columns=columns, overwrite=overwrite or is_in_place
        )
        if before:
            Path(path).chmod(before.st_mode & 0o777)
    return AnnotateReport(
        output=Path(target),
        num_rows=len(found),
        columns=tuple(names),
        without_values=without,
        num_unknown_ids=num_unknown,
        dropped=dropped,
    )


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    return os.path.samestat(one, other) and one.st_mtime_ns == other.st_mtime_ns


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")


# ---------------------------------------------------------------------------------------------- which rows


def _read_ids(ids: str | PathLike[str] | Iterable[str]) -> Iterable[str]:
    """List ids, of a file one per line; blanks around them and empty lines do not count."""
    if not isinstance(ids, str | PathLike):
        yield from map(str, ids)
        return
    name = fspath(ids)
    for number, line in enumerate(iter_lines(iter_text(name), path=name), start=1):
        if text := decode_text(line, path=name, line=number, kind="a list of ids").strip():
            yield text


def _rows_of(file: EmbeddingFile, wanted: Sequence[str]) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Find the rows of ids, and the ids without a row; a record's id stands for its windows."""
    records, requested = record_names(file), set(wanted)
    is_kept = np.array(
        [
            row_id in requested or record in requested
            for row_id, record in zip(file.ids, records, strict=True)
        ],
        np.bool_,
    )
    known = {*file.ids, *records}
    return is_kept, tuple(name for name in wanted if name not in known)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Condition:
    """A column, a sign and a value."""

    text: str
    column: str
    sign: str
    value: str

    def holds(self, file: EmbeddingFile) -> NDArray[np.bool_]:
        """Return for which rows it holds."""
        if self.column != _ID and self.column not in file.obs:
            names = ", ".join((_ID, *file.obs))
            message = (
                f"where is {self.text!r}, but {file.path} has no such column; set where to one of {names}"
            )
            raise ConfigError(message)
        values = np.array(file.ids, object) if self.column == _ID else file.obs[self.column]
        compare, is_equality = _SIGNS[self.sign], self.sign in ("=", "==", "!=")
        if values.dtype.kind in "iuf":
            try:
                return np.asarray(compare(values, float(self.value)), np.bool_)
            except ValueError:
                message = f"where is {self.text!r}, but {self.column} holds numbers; set where to a number"
                raise ConfigError(message) from None
        if not is_equality:
            message = f"where is {self.text!r}, but {self.column} holds text; set where with = or !="
            raise ConfigError(message)
        texts = np.array([str(value) for value in values.tolist()], object)
        wanted = self.value
        if wanted.lower() in _WORDS and {*texts} <= {"True", "False", ""}:
            wanted = str(_WORDS[wanted.lower()])
        return np.asarray(compare(texts, wanted), np.bool_)


def _parse(text: str) -> _Condition:
    """Read a condition.

    Example:
        >>> _parse("length >= 500")
        _Condition(text='length >= 500', column='length', sign='>=', value='500')
    """
    found = _CONDITION.fullmatch(text)
    if found is None:
        message = f"where is {text!r}; set where to COLUMN=VALUE, or with !=, <, <=, > or >="
        raise ConfigError(message)
    column, value = found["column"].strip(), found["value"].strip()
    return _Condition(text=text, column=column, sign=found["sign"], value=value)


# ------------------------------------------------------------------------------------- what belongs together


def _check_alike(one: EmbeddingFile, other: EmbeddingFile) -> None:
    """Raise if the vectors of two files were not made in the same way."""
    if one.kind != other.kind:
        message = (
            f"{one.path} is of kind {one.kind}, {other.path} of kind {other.kind}, expected the same; "
            "extract one of them again with the other's pooling"
        )
        raise ConfigError(message)
    widths = [{name: file[name].shape[1] for name in file.layers} for file in (one, other)]
    if list(widths[0].items()) != list(widths[1].items()):
        texts = [", ".join(f"{name} ({width})" for name, width in found.items()) for found in widths]
        message = (
            f"{one.path} has {texts[0]}, {other.path} has {texts[1]}, expected the same layers and features; "
            "extract one of them again with the other's options"
        )
        raise ConfigError(message)
    found = setting_differences(*(joinable_settings(file.provenance, one.layers[0]) for file in (one, other)))
    types = [computed_dtype(file) for file in (one, other)]
    found += [f"dtype: {types[0]!r} against {types[1]!r}"] if types[0] != types[1] else []
    if found:
        message = (
            f"{one.path} and {other.path} hold vectors of another kind ({'; '.join(found)}), expected the "
            "same model and settings; extract one of them again with the other's options"
        )
        raise ConfigError(message)


def _check_ids_differ(files: Sequence[EmbeddingFile]) -> None:
    """Raise if an id is in two files: ids are unique."""
    home: dict[str, EmbeddingFile] = {}
    for file in files:
        twice = [name for name in file.ids if name in home]
        if twice:
            problem = (
                f"{len(twice)} ids are also in {home[twice[0]].path} ({_shown(twice)}); leave them out of "
                "one file with subset, or extract one again under other ids"
            )
            raise DuplicateIdError(problem, path=str(file.path), record_id=twice[0])
        home |= dict.fromkeys(file.ids, file)


def _joined(files: Sequence[EmbeddingFile], *, is_readable: bool) -> dict[str, Any]:
    """Join how files were made: inputs, counts and failures of all, the rest as in the first."""
    first = files[0].provenance
    made = {name: value for name, value in first.items() if name not in ("run", "identity", "certificate")}
    made["matrices"] = files[0].layers
    made["failed"] = {name: why for file in files for name, why in file.provenance.get("failed", {}).items()}
    for name in _SUMMED:
        parts = [found for file in files if isinstance(found := file.provenance.get(name), dict)]
        made[name] = {
            key: sum(part.get(key, 0) for part in parts)
            for key in dict.fromkeys(key for part in parts for key in part)
        }
    for name in _LISTED:
        made[name] = _union(item for file in files for item in file.provenance.get(name) or ())
    if isinstance(config := first.get("config"), dict) and isinstance(config.get("input"), dict):
        read = {
            name: _union(
                item
                for file in (files if is_readable else ())
                for item in file.provenance.get("config", {}).get("input", {}).get(name) or ()
            )
            for name in _LISTED
        }
        made["config"] = {**config, "input": {**config["input"], **read}}
    return made


def _union(items: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


def _failed_of(file: EmbeddingFile, ids: set[str]) -> dict[str, dict[str, str]]:
    """Return which of the rows failed, and why, as a part of the provenance where the file has it."""
    if "failed" not in file.provenance:
        return {}
    return {"failed": {name: why for name, why in file.provenance["failed"].items() if name in ids}}


def _with_step(
    provenance: Mapping[str, Any],
    command: str,
    files: Sequence[EmbeddingFile],
    settings: Mapping[str, Any],
    *,
    num_rows: int,
) -> dict[str, Any]:
    """Add to a provenance what was done to which files."""
    sources = [
        {
            **file_facts(str(file.path)),
            "rows": len(file),
            **({"changed": list(file.changes)} if file.changes else {}),
            **(
                {"history": file.provenance["history"]}
                if len(files) > 1 and "history" in file.provenance
                else {}
            ),
        }
        for file in files
    ]
    step = {
        "command": command,
        "genoembed_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sources": sources,
        **{name: value for name, value in settings.items() if value},
        "rows": num_rows,
    }
    before = [] if len(files) > 1 else list(provenance.get("history", []))
    return {**provenance, "history": [*before, step]}


# --------------------------------------------------------------------------------------------- more columns


def _read_table(name: str, file: EmbeddingFile) -> tuple[dict[str, Mapping[str, object]], list[str], int]:
    """Read the values of a table by id, the names of its columns, and how many rows it has."""
    known = {*file.ids, *record_names(file)}
    rows: dict[str, Mapping[str, object]] = {}
    id_column: str | None = None
    names: dict[str, None] = {}
    for row in iter_rows(name):
        if id_column is None:
            id_column = next(iter(row.values), _ID)
            if id_column in known:
                problem = f"first row begins with the id {id_column!r}, expected names of columns; add them"
                raise LabelError(problem, path=name)
        # rows of JSON lines may have other keys than the first one, in any order
        record_id = as_text(row.values.get(id_column))
        if id_column not in row.values:
            problem = f"no {id_column!r}, expected it in every row, as in the first; add the id"
            raise LabelError(problem, path=name, line=row.line, record_id=row.name)
        if record_id in rows:
            problem = "has a row already; leave one"
            raise LabelError(problem, path=name, line=row.line, record_id=record_id)
        rows[record_id] = row.values
        names |= dict.fromkeys(column for column in row.values if column != id_column)
    if not names:
        problem = (
            "has no column of values, expected ids in the first column and values in others; check the file"
        )
        raise LabelError(problem, path=name)
    return rows, list(names), len(rows)


def _check_columns(file: EmbeddingFile, table: str, names: Sequence[str], *, overwrite: bool) -> None:
    """Raise if a column would replace one of genoembed's, or one that is to stay, or has no name to store."""
    if unfit := [name for name in names if name.strip() in _NO_COLUMN or not _COLUMN.fullmatch(name)]:
        message = f"{table}: column {unfit[0]!r} cannot be a name in the file; rename it"
        raise ConfigError(message)
    if ours := [name for name in names if name in OBS_COLUMNS]:
        message = f"{table}: column {ours[0]!r} is one that genoembed writes about each record; rename it"
        raise ConfigError(message)
    if there := [name for name in names if name in file.obs and not overwrite]:
        shown = ", ".join(map(repr, there))
        raise ConfigError(
            Problem(
                f"{file.path} has {shown} already", Remedy("overwrite", True), ", or rename it in the table"
            )
        )


_NO_COLUMN = ("", ".", "..", "_index", "__categories")
_COLUMN = re.compile(r"[^/\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
