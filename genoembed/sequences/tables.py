"""The one reader of tables: TSV, CSV (commas or semicolons), JSON lines or Parquet, compressed or not.

In: a file name, or ``-``. Out: one :class:`TableRow` after the other, in file order and constant memory.
Compression and kind are recognized by content, never by the file's name. Text is UTF-8, with any line ends
and with or without a byte order mark; a field may be quoted as spreadsheets do, over several lines even;
every row has the columns of the header. A damaged row is an error with its line. What a column of splits may
say is decided here too, for all who read one.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from difflib import get_close_matches
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from genoembed.errors import LabelError, MissingExtraError, SequenceFormatError
from genoembed.sequences.compression import (
    PARQUET_MAGIC,
    WHITESPACE,
    check_readable,
    check_record_size,
    check_text,
    decode_text,
    iter_decompressed,
    iter_lines,
    iter_text_blocks,
    max_record_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.sequences.compression import InputDigests


EXPECTED = "expected TSV, CSV, JSON lines or Parquet"
_DELIMITERS = ("\t", ",", ";")
_PARQUET_ROWS = 4096
_COLUMNS_SHOWN = 20


class TableRow(NamedTuple):
    """One row, and where it stands."""

    path: str
    line: int | None
    """1-based line the row starts on; None where the file has no lines (Parquet)."""
    number: int
    """1-based number of the row, header and blank lines not counted."""
    values: Mapping[str, object]
    """Values by column: texts from TSV and CSV, typed values from JSON lines and Parquet."""

    @property
    def name(self) -> str:
        """What errors and records call a row that has no id."""
        return f"row_{self.number}"

    def cell(self, column: str, *, option: str) -> object:
        """Return the value of a column; if there is no such column, the error says which option names it."""
        if column in self.values:
            return self.values[column]
        names = [name if len(name) <= 30 else f"{name[:27]}..." for name in list(self.values)[:6]]
        shown = ", ".join(map(repr, names)) or "none"
        near = get_close_matches(column, self.values, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]!r}? Set {option}" if near else f"set {option}, or add the column"
        problem = f"no column {column!r} (there are {shown}); {remedy}"
        record_id = self.name if self.line is None else None
        raise SequenceFormatError(problem, path=self.path, line=self.line, record_id=record_id)

    def text(self, column: str, *, option: str) -> str:
        """Return the value of a column as text; empty where it has none."""
        return as_text(self.cell(column, option=option))


def as_text(value: object) -> str:
    """Spell a value the same in typed and in text files: 1, 1.0 and True are ``1``, NaN is empty.

    Example:
        >>> [as_text(value) for value in (2.0, 0.5, " a ", None, True)]
        ['2', '0.5', 'a', '', '1']
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    return str(value).strip()


_NO_VALUE = ("", "na", "nan", "none", "null", "n/a")


def typed_column(cells: Sequence[object]) -> NDArray[Any]:
    """Make a column of cells: whole numbers, numbers, truth values, or text.

    Example:
        >>> typed_column(["1", "2"]), typed_column(["1", None, "2.5"]), typed_column(["a", "NA", "1"])
        (array([1, 2]), array([1. , nan, 2.5]), array(['a', '', '1'], dtype=object))
        >>> typed_column(["007", "7"])
        array(['007', '7'], dtype=object)
    """
    there = [cell for cell in cells if cell is not None]
    if there and all(isinstance(cell, bool) for cell in there):
        if len(there) == len(cells):
            return np.array(cells, np.bool_)
        return np.array(["" if cell is None else str(cell) for cell in cells], object)
    texts = ["" if (text := as_text(cell)).lower() in _NO_VALUE else text for cell in cells]
    known = [text for text in texts if text]
    try:
        numbers = [as_number(text) for text in known]
    except ValueError:
        numbers = []
    if not numbers or any(re.match(r"[+-]?0\d", text) for text in known):  # 007 and 7 are two names
        return np.array(texts, object)
    if len(known) == len(texts) and all(re.fullmatch(r"[+-]?\d{1,18}", text) for text in known):
        return np.array([int(text) for text in known], np.int64)
    return np.array([float(text) if text else np.nan for text in texts])


SplitSide: TypeAlias = Literal["train", "validation", "test"]
SPLIT_WORDS: Mapping[str, SplitSide] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "development": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
}
"""What a column may call the sides of a split, in any case."""


def as_number(text: str) -> float:
    """Read a number; raise ``ValueError`` where Python alone would read one, as the name ``1_0``.

    Example:
        >>> as_number("1e3")
        1000.0
        >>> as_number("1_0")
        Traceback (most recent call last):
        ...
        ValueError: '1_0' is not a number
    """
    if "_" in text:  # float() takes it for a separator; no table does
        message = f"{text!r} is not a number"
        raise ValueError(message)
    return float(text)


def parse_split(
    word: str | None, *, path: str, line: int | None = None, record_id: str | None = None
) -> SplitSide:
    """Read the side of a split that a table names.

    Example:
        >>> parse_split("Dev", path="labels.tsv")
        'validation'
    """
    side = SPLIT_WORDS.get((word or "").strip().lower())
    if side is None:
        problem = f"the split column has {word!r}, expected one of {', '.join(SPLIT_WORDS)}; fix the row"
        raise LabelError(problem, path=path, line=line, record_id=record_id)
    return side


def iter_rows(
    path: str, *, ids: Container[str] = (), digests: InputDigests | None = None
) -> Iterator[TableRow]:
    """Read the rows of a table.

    Args:
        path: File name, or ``-``.
        digests: Takes the file's SHA-256.
        ids: Ids of records. A TSV or CSV whose first cell is one of them has no header: its columns are
            then called ``column_1``, ``column_2`` ...

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "two.tsv")
        ...     _ = path.write_text("sequence\\tlabel\\nACGT\\t1\\n\\nGG\\t0\\n")
        ...     [(row.line, row.values["sequence"], row.values["label"]) for row in iter_rows(str(path))]
        [(2, 'ACGT', '1'), (4, 'GG', '0')]
    """
    check_readable(path)
    blocks = iter_decompressed(path, digests=digests)
    first = next(blocks, b"")
    while len(first) < len(PARQUET_MAGIC) and (more := next(blocks, b"")):
        first += more
    if first.startswith(PARQUET_MAGIC):
        yield from _iter_parquet(path, chain((first,), blocks))
        return
    lines = enumerate(iter_lines(iter_text_blocks(chain((first,), blocks)), path=path), start=1)
    for line, raw in lines:
        if raw.strip(WHITESPACE):
            _check_kind(path, raw)
            numbered = chain(((line, raw),), lines)
            if raw.lstrip(WHITESPACE).startswith(b"{"):
                yield from _iter_json(path, numbered)
            else:
                yield from _iter_delimited(path, numbered, ids)
            return
    problem = f"the file is empty, {EXPECTED}; check the step that wrote it"
    raise SequenceFormatError(problem, path=path)


def _check_kind(path: str, head: bytes) -> None:
    """Raise, and name it, if this is something that people hand in by mistake."""
    check_text(head, path=path, expected=EXPECTED)
    if head.lstrip(WHITESPACE).startswith(b"["):
        problem = f"this is one JSON array, {EXPECTED}; write one object per line"
    elif head.lstrip(WHITESPACE).startswith((b">", b"@")):
        problem = f"this is FASTA or FASTQ, {EXPECTED}; name a table with one row per record"
    else:
        return
    raise SequenceFormatError(problem, path=path)


# ---------------------------------------------------------------------------------------------- JSON lines


def _iter_json(path: str, lines: Iterable[tuple[int, bytes]]) -> Iterator[TableRow]:
    number = 0
    for line, raw in lines:
        if not raw.strip(WHITESPACE):
            continue
        number += 1
        text = decode_text(raw, path=path, line=line)
        try:
            values = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
            if "\\u" in text:  # an escape can spell half a character, which no file and no id can hold
                json.dumps(values, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            problem = f"not JSON ({error}), expected one object per line; fix the line"
            raise SequenceFormatError(problem, path=path, line=line) from error
        if not isinstance(values, dict):
            problem = f"a JSON {_json_kind(values)}, expected one object per line; fix the line"
            raise SequenceFormatError(problem, path=path, line=line)
        yield TableRow(path, line, number, values)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            message = f"key {key!r} twice"
            raise ValueError(message)
        values[key] = value
    return values


def _no_constant(name: str) -> float:
    message = f"{name} is not a JSON number"
    raise ValueError(message)


def _json_kind(value: object) -> str:
    kinds = {list: "array", str: "string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "number")


# ---------------------------------------------------------------------------------------------- TSV and CSV


def _iter_delimited(path: str, lines: Iterator[tuple[int, bytes]], ids: Container[str]) -> Iterator[TableRow]:
    line, raw = next(lines)
    text = decode_text(raw, path=path, line=line)
    delimiter, has_header = _delimiter(text, ids)
    cells = _fields(path, line, text, delimiter, lines)
    number = 0
    if has_header:
        header = [name.strip() for name in cells]
        if twice := [name for name, count in Counter(header).items() if count > 1]:
            problem = f"column {twice[0]!r} appears twice in the header; rename one"
            raise SequenceFormatError(problem, path=path, line=line)
    else:
        number = 1
        header = [f"column_{place}" for place in range(1, len(cells) + 1)]
        yield TableRow(path, line, number, dict(zip(header, cells, strict=True)))
    for line, raw in lines:
        if not raw.strip(b" \r"):  # a row of tabs is a row
            continue
        number += 1
        fields = _fields(path, line, decode_text(raw, path=path, line=line), delimiter, lines)
        if len(fields) != len(header):
            shown = ", ".join(" ".join(name.split()) for name in header[:_COLUMNS_SHOWN])
            problem = (
                f"the row has {len(fields)} column(s), expected the {len(header)} of the "
                f"{'header' if has_header else 'first row'} "
                f"({shown}{' ...' * (len(header) > _COLUMNS_SHOWN)}); fix the row"
            )
            raise SequenceFormatError(problem, path=path, line=line)
        yield TableRow(path, line, number, dict(zip(header, fields, strict=True)))


def _delimiter(text: str, ids: Container[str]) -> tuple[str, bool]:
    """Find the delimiter by the first line, and whether that line is a header."""
    for delimiter in _DELIMITERS:
        if text.split(delimiter, 1)[0].strip().strip('"') in ids:
            return delimiter, False
    # a tab is never part of a name, but a comma may be: "id<tab>one, two, three"
    return "\t" if "\t" in text else max(_DELIMITERS, key=text.count), True


def _fields(
    path: str, line: int, text: str, delimiter: str, following: Iterator[tuple[int, bytes]]
) -> list[str]:
    """Cut a row into fields. The csv module refuses quoted fields of over 131,072 letters, or changes that
    limit for the whole process."""
    if '"' not in text:
        return text.split(delimiter)
    fields: list[str] = []
    start = 0
    while True:
        if not text.startswith('"', start):
            end = text.find(delimiter, start)
            fields.append(text[start:] if end < 0 else text[start:end])
        else:
            end = _closing_quote(text, start + 1)
            if end < 0:
                text, start = _until_closed(path, line, text[start:], following), 0
                end = _closing_quote(text, text.rfind("\n") + 1)
            fields.append(text[start + 1 : end].replace('""', '"'))
            end += 1
            if end == len(text):
                end = -1
            elif not text.startswith(delimiter, end):
                problem = (
                    f"text after the closing quote of column {len(fields)}; double quotes inside a field"
                )
                raise SequenceFormatError(problem, path=path, line=line)
        if end < 0:
            return fields
        start = end + 1


def _until_closed(path: str, line: int, text: str, following: Iterator[tuple[int, bytes]]) -> str:
    """Join the lines of a quoted field, up to the line with its closing quote; each is looked at once."""
    limit, held = max_record_bytes(), len(text)
    pieces = [text]
    for number, raw in following:
        pieces.append(decode_text(raw, path=path, line=number))
        held += len(raw) + 1
        check_record_size(held, limit, path=path, line=line)
        if _closing_quote(pieces[-1], 0) >= 0:
            return "\n".join(pieces)
    problem = "a quoted field is not closed before the file ends; close its quotes"
    raise SequenceFormatError(problem, path=path, line=line)


_QUOTE = re.compile('"("?)')


def _closing_quote(text: str, start: int) -> int:
    return next((found.start() for found in _QUOTE.finditer(text, start) if not found[1]), -1)


# -------------------------------------------------------------------------------------------------- Parquet


def _iter_parquet(path: str, blocks: Iterable[bytes]) -> Iterator[TableRow]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(package="pyarrow", extra="parquet", purpose="reading Parquet") from error
    # Parquet is read from its end: what is piped or compressed has to be held.
    held = None if _is_plain_file(path) else BytesIO(b"".join(_limited(path, blocks)))
    number = 0
    try:
        with parquet.ParquetFile(held or path) as table:
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield TableRow(path, None, number, values)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, TypeError) as error:
        reason = " ".join(str(error).split())
        problem = f"damaged Parquet ({reason}); copy or write the file again"
        raise SequenceFormatError(problem, path=path) from error


def _limited(path: str, blocks: Iterable[bytes]) -> Iterator[bytes]:
    limit, held = max_record_bytes(), 0
    for block in blocks:
        held += len(block)
        check_record_size(held, limit, path=path)
        yield block


def _is_plain_file(path: str) -> bool:
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as stream:
        return stream.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
