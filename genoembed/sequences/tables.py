"""Rows of a table, whatever it is written in: TSV, CSV, JSON lines or Parquet, compressed or not.

In: a file name, or ``-``. Out: one :class:`TableRow` after the other, in file order and constant memory.
Compression and kind are told by content, never by the file's name. Text is UTF-8; a field may be quoted as
spreadsheets do, over several lines even; every row has the columns of the header. A damaged row is an error
with its line.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from genoembed.errors import MissingExtraError, SequenceFormatError
from genoembed.sequences.compression import (
    WHITESPACE,
    check_readable,
    check_record_size,
    find_codec,
    iter_decompressed,
    iter_lines,
    iter_text,
    iter_text_blocks,
    max_record_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence


PARQUET_MAGIC = b"PAR1"
EXPECTED = "expected TSV, CSV, JSON lines or Parquet"
_DELIMITERS = ("\t", ",", ";")
_PARQUET_ROWS = 4096
_COLUMNS_SHOWN = 20
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")


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


def iter_rows(path: str) -> Iterator[TableRow]:
    """Read the rows of a table.

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
    blocks = iter_decompressed(path)
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
            parse = _iter_json if raw.lstrip(WHITESPACE).startswith(b"{") else _iter_delimited
            yield from parse(path, numbered)
            return
    problem = f"the file is empty, {EXPECTED}; check the step that wrote it"
    raise SequenceFormatError(problem, path=path)


def _check_kind(path: str, head: bytes) -> None:
    """Refuse by name what people hand in by mistake."""
    if find_codec(head) is not None:
        problem = f"the file is compressed twice, {EXPECTED}; decompress it once"
    elif found := _CONTROL.search(head, 0, 1024):
        problem = f"this is a binary file (byte 0x{found[0][0]:02x}), {EXPECTED}; check the file name"
    elif head.lstrip(WHITESPACE).startswith(b"["):
        problem = f"this is one JSON array, {EXPECTED}; write one object a line"
    elif head.lstrip(WHITESPACE).startswith((b">", b"@")):
        problem = f"this is FASTA or FASTQ, {EXPECTED}; give the table of its labels as labels"
    else:
        return
    raise SequenceFormatError(problem, path=path)


def _decode(path: str, line: int, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        problem = (
            f"the line has byte 0x{raw[error.start]:02x}, which is not UTF-8; convert the file, for example "
            "with iconv -f latin1 -t utf-8"
        )
        raise SequenceFormatError(problem, path=path, line=line) from error


# ---------------------------------------------------------------------------------------------- JSON lines


def iter_json_lines(path: str) -> Iterator[TableRow]:
    """Read a file of one JSON object a line."""
    check_readable(path)
    lines = enumerate(iter_lines(iter_text(path), path=path), start=1)
    for first in lines:
        if first[1].strip(WHITESPACE):
            if find_codec(first[1]) or _CONTROL.search(first[1], 0, 1024):
                _check_kind(path, first[1])
            yield from _iter_json(path, chain((first,), lines))
            return
    problem = "the file is empty, expected JSON lines; check the step that wrote it"
    raise SequenceFormatError(problem, path=path)


def _iter_json(path: str, lines: Iterable[tuple[int, bytes]]) -> Iterator[TableRow]:
    number = 0
    for line, raw in lines:
        if not raw.strip(WHITESPACE):
            continue
        number += 1
        text = _decode(path, line, raw)
        try:
            values = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
            if "\\u" in text:  # an escape can spell half a character, which no file and no id can hold
                json.dumps(values, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            problem = f"not JSON ({error}), expected one object a line; mend the line"
            raise SequenceFormatError(problem, path=path, line=line) from error
        if not isinstance(values, dict):
            problem = f"a JSON {_json_kind(values)}, expected one object a line; mend the line"
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
    message = f"{name} is no JSON number"
    raise ValueError(message)


def _json_kind(value: object) -> str:
    kinds = {list: "array", str: "string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "number")


# ---------------------------------------------------------------------------------------------- TSV and CSV


def _iter_delimited(path: str, lines: Iterable[tuple[int, bytes]]) -> Iterator[TableRow]:
    rest = iter(lines)
    line, raw = next(rest)
    text = _decode(path, line, raw)
    delimiter = max(_DELIMITERS, key=text.count)  # the first of equals
    header = [name.strip() for name in _fields(path, line, text, delimiter, rest)]
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        problem = f"column {twice[0]!r} appears twice in the header; rename one"
        raise SequenceFormatError(problem, path=path, line=line)
    number = 0
    for line, raw in rest:
        if not raw.strip(b" \r"):  # a row of tabs is a row
            continue
        number += 1
        fields = _fields(path, line, _decode(path, line, raw), delimiter, rest)
        if len(fields) != len(header):
            shown = ", ".join(" ".join(name.split()) for name in header[:_COLUMNS_SHOWN])
            problem = (
                f"the row has {len(fields)} column(s), expected the {len(header)} of the header "
                f"({shown}{' ...' * (len(header) > _COLUMNS_SHOWN)}); mend the row"
            )
            raise SequenceFormatError(problem, path=path, line=line)
        yield TableRow(path, line, number, dict(zip(header, fields, strict=True)))


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
        pieces.append(_decode(path, number, raw))
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
