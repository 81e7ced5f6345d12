"""From a file to raw records: which format it is in, recognized by its text, and the parsers.

In: a file name, or blocks of text with ``\\n`` line ends. Out: :class:`RawRecord`, one at a time, in file
order; only the record in hand is held. FASTA may be wrapped anyhow or not at all; lines that start with ``;``
are comments. FASTQ may be wrapped too; its qualities are checked and left behind. GenBank and EMBL go through
Biopython. A table with a column ``sequence`` is a file of sequences. The file's name plays no part. Files
that people hand in by mistake (SAM, BAM, VCF, a zip archive, a web page) are named in the error, with advice.
"""

from __future__ import annotations

import logging
import re
import warnings
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from Bio import BiopythonWarning
from Bio.Seq import UndefinedSequenceError

from genoembed.errors import SequenceFormatError
from genoembed.sequences.compression import (
    PARQUET_MAGIC,
    WHITESPACE,
    check_record_size,
    check_text,
    decode_text,
    iter_lines,
    iter_text,
    max_record_bytes,
)
from genoembed.sequences.records import RawRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from Bio.SeqRecord import SeqRecord

    from genoembed.sequences.compression import InputDigests
    from genoembed.sequences.tables import TableRow


_MAX_HEADER_BYTES = 1 << 20  # nr's merged headers reach some 100 kB; more is a binary file without line ends
_INDENTED_HEADER = re.compile(rb"\n[ \t]+>")
_COMMENT = re.compile(rb"\n[ \t]*;[^\n]*")
# Tab is white space and Ctrl-A separates merged headers in NCBI's nr and nt; other control bytes mean damage.
_CONTROL = re.compile(rb"[\x00\x02-\x08\x0b-\x1f\x7f]")
_QUALITIES = bytes(range(33, 127))


def iter_fasta(path: str, blocks: Iterable[bytes], *, lines_before: int = 0) -> Iterator[RawRecord]:
    """Parse FASTA."""
    header: Header | None = None
    pieces: list[tuple[bytes, int | None]] = []
    limit, held = max_record_bytes(), 0
    for found in iter_fasta_parts(path, blocks, lines_before=lines_before):
        if isinstance(found, Header):
            if header is not None:
                yield _fasta_record(path, header, pieces)
            header, pieces, held = found, [], 0
            continue
        assert header is not None, "a piece follows a header"
        held += len(found.letters)
        check_record_size(held, limit, path=path, line=header.line, record_id=header.id)
        if found.letters and not found.letters.isspace():  # a comment, however long, is not held
            pieces.append((found.letters, found.line))
    if header is not None:
        yield _fasta_record(path, header, pieces)


class Header(NamedTuple):
    """The line that a record begins with."""

    id: str
    description: str
    line: int


class Letters(NamedTuple):
    """A part of a record's sequence, white space and all, and where it stands."""

    letters: bytes
    line: int
    offset: int
    """Byte of the text: what is left out (comments, say) is blank, so places do not move."""


def iter_fasta_parts(
    path: str, blocks: Iterable[bytes], *, lines_before: int = 0
) -> Iterator[Header | Letters]:
    """Parse FASTA into headers, each followed by the pieces of its sequence: the one parser."""
    line = lines_before  # ends of lines seen so far: a header's number, as blocks open with one
    is_in_record = False
    offset = -1  # of the block: an end of line is put in front of the first one
    for block in _whole_headers(blocks):
        tail, *parts = block.split(b"\n>") if b">" in block else (block,)
        if is_in_record:
            yield Letters(tail, line, offset)
        elif tail.strip(WHITESPACE):
            raise _no_header(path, line, tail)
        line += tail.count(b"\n")
        place = offset + len(tail)
        for part in parts:
            line += 1
            end = part.find(b"\n")  # none: the block ends with the header, its "\n" opens the next block
            title, body = (part, b"") if end < 0 else (part[:end], part[end:])
            yield Header(*_parse_header(path, line, title, ">"), line)
            is_in_record = True
            yield Letters(body, line, place + len(b"\n>") + len(title))
            line += body.count(b"\n")
            place += len(b"\n>") + len(part)
        offset += len(block)


def _fasta_record(path: str, header: Header, pieces: list[tuple[bytes, int | None]]) -> RawRecord:
    body = iter(pieces) if len(pieces) == 1 else _drain(pieces)
    return RawRecord(header.id, header.description, path, path, header.line, body)


def _drain(pieces: list[tuple[bytes, int | None]]) -> Iterator[tuple[bytes, int | None]]:
    """Yield pieces and drop them one by one: a long record is not held both raw and clean."""
    pieces.reverse()
    while pieces:
        yield pieces.pop()


def _whole_headers(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Re-cut blocks so that each header and comment line is whole and has its ``\\n`` in front.

    Comments become blanks, as long as they were, so that lines and places still count right.
    """
    held = b"\n"
    is_in_comment = False
    for raw in blocks:
        if is_in_comment:  # one so long that its beginning is gone
            end = raw.find(b"\n")
            blank = b" " * (len(raw) if end < 0 else end)
            yield blank
            if end < 0:
                continue
            raw, is_in_comment = raw[end:], False
        block = held + raw
        cut = _safe_cut(block)
        if len(block) - cut > _MAX_HEADER_BYTES:
            opening = block[cut:].lstrip(WHITESPACE)
            if not opening or len(opening) > _MAX_HEADER_BYTES + 1:  # the mark counted
                is_in_comment = opening.startswith(b";")
                cut = len(block)  # given up: _parse_header refuses a header of this length
        block, held = block[:cut], block[cut:]
        if block:
            yield blank_comments(block)
    yield blank_comments(held)


def _safe_cut(block: bytes) -> int:
    """Where a block can end: not in a header or comment, nor between a line's start and its first letter."""
    last = block.rfind(b"\n")
    if last < 0:
        return len(block)
    start = block[last : last + 256].lstrip(WHITESPACE) or block[last:].lstrip(WHITESPACE)
    return last if not start or start[:1] in (b">", b";") else len(block)


def blank_comments(block: bytes) -> bytes:
    """Write blanks over comment lines, and take the blanks before a header to the line above."""
    # A single byte is found ten times faster than two, and long stretches of sequence have none of these.
    if (b" " in block and b" >" in block) or (b"\t" in block and b"\t>" in block):
        block = _INDENTED_HEADER.sub(lambda found: b" " * (len(found[0]) - 2) + b"\n>", block)
    if b";" in block:
        block = _COMMENT.sub(lambda found: b"\n" + b" " * (len(found[0]) - 1), block)
    return block


def _no_header(path: str, line: int, text: bytes) -> SequenceFormatError:
    before = text[: len(text) - len(text.lstrip(WHITESPACE))].count(b"\n")
    problem = "sequence without a header, expected a line that starts with '>'; add '>id' above it"
    return SequenceFormatError(problem, path=path, line=line + before)


def _parse_header(path: str, line: int, title: bytes, mark: str) -> tuple[str, str]:
    if len(title) > _MAX_HEADER_BYTES:
        problem = f"a header line of over {_MAX_HEADER_BYTES} bytes; the file is binary or damaged"
        raise SequenceFormatError(problem, path=path, line=line)
    text = decode_text(title, path=path, line=line, what="header")
    if text.isprintable():
        words = text.split(None, 1)
    else:
        found = _CONTROL.search(title)
        if found:
            problem = f"control byte 0x{found[0][0]:02x} in a header; the file is binary or damaged"
            raise SequenceFormatError(problem, path=path, line=line)
        words = [word.decode() for word in title.split(None, 1)]
    if not words:
        problem = f"a header without an id, expected '{mark}id description'; name the record"
        raise SequenceFormatError(problem, path=path, line=line)
    return words[0], words[1].rstrip() if len(words) > 1 else ""


def iter_fastq(path: str, blocks: Iterable[bytes], *, lines_before: int = 0) -> Iterator[RawRecord]:
    """Parse FASTQ, wrapped or not."""
    lines = zip(count(lines_before + 1), iter_lines(blocks, path=path))
    for line, raw in lines:
        title = raw.strip(WHITESPACE)
        if not title:
            continue
        if not title.startswith(b"@"):
            problem = (
                "expected a header that starts with '@'; every FASTQ record is header, bases, '+', qualities"
            )
            raise SequenceFormatError(problem, path=path, line=line)
        record_id, description = _parse_header(path, line, title[1:], "@")
        rows = _fastq_bases(path, line, record_id, title, lines)
        _skip_qualities(path, record_id, rows, line, lines)
        yield RawRecord(record_id, description, path, path, line, iter(((b"\n".join(rows), line + 1),)))


def _fastq_bases(
    path: str, line: int, record_id: str, title: bytes, lines: Iterator[tuple[int, bytes]]
) -> list[bytes]:
    rows: list[bytes] = []
    limit, held = max_record_bytes(), 0
    for number, row in lines:
        if row.startswith((b"@", b">")):
            problem = "another header before the '+' line; the file is damaged or not FASTQ"
            raise SequenceFormatError(problem, path=path, line=number, record_id=record_id)
        if not row.startswith(b"+"):
            rows.append(row)
            held += len(row) + 1
            check_record_size(held, limit, path=path, line=line, record_id=record_id)
            continue
        repeated = row[1:].strip(WHITESPACE)
        if repeated and repeated not in (title[1:].strip(WHITESPACE), record_id.encode()):
            problem = "the '+' line names another record; lines are missing or out of order"
            raise SequenceFormatError(problem, path=path, line=number, record_id=record_id)
        return rows
    raise _cut_short(path, line, record_id, "'+' line")


def _cut_short(path: str, line: int, record_id: str, missing: str) -> SequenceFormatError:
    problem = f"the file ends before the record's {missing}; copy or download the file again"
    return SequenceFormatError(problem, path=path, line=line, record_id=record_id)


def _skip_qualities(
    path: str, record_id: str, rows: list[bytes], line: int, lines: Iterator[tuple[int, bytes]]
) -> None:
    num_bases = sum(len(row.translate(None, WHITESPACE)) for row in rows)
    num_qualities = 0
    if not num_bases:  # a blank line of no qualities is skipped with the other blank lines
        return
    for number, row in lines:
        scores = row.strip(WHITESPACE)
        if scores.translate(None, _QUALITIES):
            problem = "a quality outside '!' to '~' (33 to 126); the file is damaged or not FASTQ"
            raise SequenceFormatError(problem, path=path, line=number, record_id=record_id)
        num_qualities += len(scores)
        # Bases on one line have their qualities on one line, so a short one is found at once.
        if num_qualities >= num_bases or len(rows) == 1:
            break
    else:
        raise _cut_short(path, line, record_id, "qualities")
    if num_qualities != num_bases:
        problem = f"{num_qualities} qualities for {num_bases} bases, expected as many; repair the record"
        raise SequenceFormatError(problem, path=path, line=number, record_id=record_id)


_LOG = logging.getLogger(__name__)

# What Biopython's parser lets through when a file is not as it expects.
_PARSER_ERRORS = (
    ValueError, AssertionError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError,
    NameError, MemoryError, BiopythonWarning,
)  # fmt: skip
# Warnings of Biopython after which the sequence itself is in doubt; the others are about its annotation.
_DAMAGE = "Expected sequence length|Premature end of file"
# "LOCUS  NODE_1_length_20_cov_1.520 bp": a name too long for its column, with the length run into it.
_JOINED_LOCUS = re.compile(r"LOCUS +(\S*\d) +bp\s")
_EXPECTED = "expected FASTA, FASTQ, GenBank or EMBL"
_FOREIGN = (
    (re.compile(rb"BAM\x01"), "a BAM file", "convert it, for example with samtools fasta"),
    (re.compile(rb"CRAM"), "a CRAM file", "convert it, for example with samtools fasta"),
    (re.compile(rb"@(HD|SQ|RG|PG|CO)\t"), "a SAM file", "convert it, for example with samtools fasta"),
    (re.compile(rb"##fileformat=VCF"), "a VCF file", "give the FASTA of the reference as input"),
    (
        re.compile(rb"##gff-version"),
        "a GFF3 file",
        "give the FASTA as input and this file as regions, or, if it holds its sequences, set feature",
    ),
    (re.compile(rb"PK\x03\x04"), "a zip archive", "unzip it"),
    (re.compile(rb"\x89HDF"), "an HDF5 file", "give the sequences it was made from"),
    (re.compile(rb"C'A\x1a|\x1aA'C"), "a 2bit file", "convert it with twoBitToFa"),
    (re.compile(rb"\xff\xfe|\xfe\xff"), "UTF-16 text", "save it as UTF-8"),
    (re.compile(rb"<"), "a web page or XML", "download the FASTA itself"),
)
_CONTROL_IN_ID = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
_TAR = re.compile(rb".{257}ustar", re.DOTALL)


def iter_records(path: str, *, digests: InputDigests | None = None) -> Iterator[RawRecord]:
    """Parse a file of any format."""
    blocks = iter_text(path, digests=digests)
    lines_before = 0
    for block in blocks:
        head = block.lstrip(WHITESPACE)
        lines_before += block.count(b"\n", 0, len(block) - len(head))
        if head:
            if _is_table(path, head):  # read from its beginning: Parquet has no lines to go on with
                from genoembed.sequences.tables import iter_rows

                rows = iter_rows(path, digests=digests)
                yield from (row_record(row, column=SEQUENCE_COLUMN, record_id=row_id(row)) for row in rows)
                return
            parse = _choose_parser(path, head, lines_before + 1)
            yield from parse(path, chain((head,), blocks), lines_before=lines_before)
            return
    problem = f"the file is empty, {_EXPECTED}; check the step that wrote it"
    raise SequenceFormatError(problem, path=path)


SEQUENCE_COLUMN, ID_COLUMN = "sequence", "id"
"""Columns of a table that is given in place of sequence files."""


def _is_table(path: str, head: bytes) -> bool:
    """Return whether a file is a table with a column of sequences, by its first line."""
    if head.startswith(tuple(_PARSERS)) or not Path(path).is_file():  # a pipe cannot be read again
        return False
    line = head.split(b"\n", maxsplit=1)[0]
    if line.startswith(b"{"):
        return f'"{SEQUENCE_COLUMN}"'.encode() in line
    cells = {cell.strip(b' \t"') for cell in re.split(rb"[\t,;]", line)}
    return head.startswith(PARQUET_MAGIC) or SEQUENCE_COLUMN.encode() in cells


def holds_records(path: str) -> bool:
    """Return whether a file begins as sequence files do, and not as a table; a pipe is not looked at."""
    if not Path(path).is_file():
        return path == "-"
    heads = (block.lstrip(WHITESPACE) for block in iter_text(path))
    return next(filter(None, heads), b"").startswith(tuple(_PARSERS))


def row_id(row: TableRow, *, column: str = ID_COLUMN) -> str:
    """Return what a row is called: its id, or its number where the table has none."""
    return (row.text(column, option="id_column") if column in row.values else "") or row.name


def row_record(row: TableRow, *, column: str, record_id: str) -> RawRecord:
    """Take the sequence out of a row of a table."""
    value = row.cell(column, option="sequence_column")
    if value is not None and not isinstance(value, str):
        problem = f"the sequence is {value!r}, expected text; fix the row or set sequence_column"
        raise SequenceFormatError(problem, path=row.path, line=row.line, record_id=record_id)
    body = iter([((value or "").encode(), row.line)])
    return RawRecord(id=record_id, description="", path=row.path, source=row.path, line=row.line, body=body)


def _choose_parser(path: str, head: bytes, line: int) -> Callable[..., Iterator[RawRecord]]:
    for pattern, what, remedy in _FOREIGN:
        if pattern.match(head):
            problem = f"this is {what}, {_EXPECTED}; {remedy}"
            raise SequenceFormatError(problem, path=path)
    if _TAR.match(head):
        problem = f"this is a tar archive, {_EXPECTED}; unpack it and give the files in it"
        raise SequenceFormatError(problem, path=path)
    for opening, parse in _PARSERS.items():
        if head.startswith(opening):
            return parse
    check_text(head, path=path, expected=_EXPECTED)
    shown = head[:20].split(b"\n")[0].decode("ascii", "replace")
    problem = f"no header: the text begins with {shown!r}, {_EXPECTED}; for FASTA, add '>id' above it"
    raise SequenceFormatError(problem, path=path, line=line)


class _LineHandle:
    """The part of a text file that Biopython's scanners use, counting lines."""

    def __init__(self, path: str, blocks: Iterable[bytes], lines_before: int, opening: str) -> None:
        self._path = path
        self._lines = iter_lines(blocks, path=path)
        self._limit = max_record_bytes()
        self._record_bytes = 0
        self._opening = opening
        self.line = lines_before
        self.record_line = lines_before + 1
        self.joined_name: str | None = None
        """Name and length of the current record, if its LOCUS line has run them together."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.readline, "")

    def read(self, size: int) -> str:
        """Answer Biopython's test for text mode, ``read(0)``; nothing else calls it."""
        assert size == 0, "GenBank and EMBL are scanned by lines"
        return ""

    def readline(self) -> str:
        raw = next(self._lines, None)
        if raw is None:
            return ""
        self.line += 1
        self._record_bytes += len(raw) + 1
        check_record_size(self._record_bytes, self._limit, path=self._path, line=self.record_line)
        text = decode_text(raw, path=self._path, line=self.line)
        if text.startswith(self._opening):
            self.record_line = self.line
            self._record_bytes = len(raw)
            joined = _JOINED_LOCUS.match(text)
            self.joined_name = joined and joined[1]
            if joined:  # Biopython would refuse the line; where to cut it is known after the sequence
                return f"LOCUS       {joined[1]}\n"
        return text + "\n"


def feature_format(path: str) -> str:
    """Return which format with features a regular file has: GenBank, EMBL or GFF3; raise if it has none."""
    head = next(filter(None, (block.lstrip(WHITESPACE) for block in iter_text(path))), b"")
    return _WITH_FEATURES[_feature_opening(path, head)]


def _feature_opening(path: str, head: bytes) -> bytes:
    found = next((opening for opening in _WITH_FEATURES if head.startswith(opening)), None)
    found = _GFF3 if found is None and is_gff3(head) else found
    if found is None:
        problem = (
            "features are chosen, but the file has none: it is not GenBank, EMBL or GFF3 with sequences; set "
            "regions to a GFF3 or GTF file"
        )
        raise SequenceFormatError(problem, path=path)
    return found


def iter_annotated(
    path: str, *, digests: InputDigests | None = None
) -> Iterator[tuple[RawRecord, SeqRecord]]:
    """Parse a GenBank or EMBL file into records, each also as Biopython has it, with its features."""
    blocks = iter_text(path, digests=digests)
    lines_before = 0
    for block in blocks:
        head = block.lstrip(WHITESPACE)
        lines_before += block.count(b"\n", 0, len(block) - len(head))
        if head:
            opening = _feature_opening(path, head)
            if opening == _GFF3:  # its sequences come last, so that it is read twice
                problem = "GFF3 with its sequences cannot be read from a pipe; save it to a file first"
                raise SequenceFormatError(problem, path=path)
            yield from _iter_bio_pairs(
                _WITH_FEATURES[opening],
                opening.decode(),
                path,
                chain((head,), blocks),
                lines_before=lines_before,
            )
            return


def _iter_bio(
    name: str, opening: str, path: str, blocks: Iterable[bytes], *, lines_before: int
) -> Iterator[RawRecord]:
    return (raw for raw, _ in _iter_bio_pairs(name, opening, path, blocks, lines_before=lines_before))


def _iter_bio_pairs(
    name: str, opening: str, path: str, blocks: Iterable[bytes], *, lines_before: int
) -> Iterator[tuple[RawRecord, SeqRecord]]:
    from Bio import SeqIO  # a moment that FASTA need not wait for

    handle = _LineHandle(path, blocks, lines_before, opening)
    records = None
    kinds: set[tuple[str, int]] = set()
    while True:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", BiopythonWarning)
                warnings.filterwarnings("error", _DAMAGE, BiopythonWarning)
                # made here: its constructor reads the first line already
                records = SeqIO.parse(handle, name.lower()) if records is None else records
                record = next(records, None)
        except SequenceFormatError:
            raise
        except _PARSER_ERRORS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            problem = f"Biopython cannot read this as {name} ({reason}); repair the record or give FASTA"
            raise SequenceFormatError(problem, path=path, line=handle.line) from error
        record_id = None if record is None else record.id
        _log_once(f"{path}:{handle.record_line}: record {record_id!r}", caught, kinds)
        if record is None:
            return
        yield _from_bio(path, handle, record, name), record


def _log_once(place: str, caught: Iterable[warnings.WarningMessage], kinds: set[tuple[str, int]]) -> None:
    """Log what Biopython found odd, each kind once a file; a kind is the line of its code that warns."""
    for warning in caught:
        if not issubclass(warning.category, BiopythonWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif (kind := (warning.filename, warning.lineno)) not in kinds:
            kinds.add(kind)
            text = " ".join(str(warning.message).split())
            _LOG.warning("%s: read, but Biopython warns: %s (said once a file)", place, text)


def _from_bio(path: str, handle: _LineHandle, record: SeqRecord, form: str) -> RawRecord:
    line = handle.record_line
    names = [n for n in (record.id, record.name) if n and not n.startswith("<unknown")]
    record_id = names[0] if names else ""
    if not record_id or record_id.split() != [record_id]:
        problem = f"the {form} record has no accession and no name; give it one"
        raise SequenceFormatError(problem, path=path, line=line)
    if found := _CONTROL_IN_ID.search(record_id.encode()):
        problem = f"control byte 0x{found[0][0]:02x} in the id; the file is binary or damaged"
        raise SequenceFormatError(problem, path=path, line=line)
    try:
        sequence = bytes(record.seq)
    except UndefinedSequenceError as error:
        problem = f"the {form} record has annotation but no sequence; download it with its sequence"
        raise SequenceFormatError(problem, path=path, line=line, record_id=record_id) from error
    if handle.joined_name is not None:
        name = _cut_joined(handle.joined_name, len(sequence), path, line)
        record_id = name if record_id == handle.joined_name else record_id
    description = "" if record.description.startswith("<unknown") else record.description
    return RawRecord(record_id, description, path, path, line, iter(((sequence, None),)))


def _cut_joined(joined: str, length: int, path: str, line: int) -> str:
    """Take the length off a name that it has been run into."""
    name = joined.removesuffix(str(length))
    if name in ("", joined):
        problem = (
            f"the LOCUS line has {joined!r} for name and length, but the sequence has {length} bases; "
            "repair the line or give FASTA"
        )
        raise SequenceFormatError(problem, path=path, line=line)
    _LOG.warning("%s:%s: record %r: name and length %d are run together in LOCUS", path, line, name, length)
    return name


_GFF3 = b"##gff-version"
_GFF3_HEAD = re.compile(rb"(?:#[^\n]*\n\s*)*?##gff")  # comments may stand before the version


def is_gff3(head: bytes) -> bool:
    """Return whether a text, without white space before it, begins as GFF3 does.

    Example:
        >>> is_gff3(b"# of our lab\\n##gff-version 3\\n"), is_gff3(b"##fileformat=VCFv4.2\\n")
        (True, False)
    """
    return _GFF3_HEAD.match(head) is not None


_WITH_FEATURES = {b"LOCUS ": "GenBank", b"ID   ": "EMBL", _GFF3: "GFF3"}
_PARSERS: Mapping[bytes, Callable[..., Iterator[RawRecord]]] = {
    b">": iter_fasta,
    b";": iter_fasta,
    b"@": iter_fastq,
    b"LOCUS ": partial(_iter_bio, "GenBank", "LOCUS "),
    b"ID   ": partial(_iter_bio, "EMBL", "ID   "),
}
