"""Regions of an indexed FASTA, with flanks; and the indexed FASTA itself, for whoever looks up places.

In: one FASTA file, plain or bgzip, and intervals. Out: raw records of three pieces, left flank, region and
right flank, as on the forward strand; ``reading`` cleans and turns them. The FASTA is never changed;
pyfaidx writes its index (``.fai``, and ``.gzi`` for bgzip) beside it, and renews one that is older.

Rows of BED and GFF3 files and places such as ``chr1:1001-2000``, brought to one form.
"""

from __future__ import annotations

import re
import struct
import zlib
from bisect import bisect_right
from contextlib import closing
from difflib import get_close_matches
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from Bio.bgzf import make_virtual_offset

from genoembed.errors import (
    DuplicateIdError,
    InputFileError,
    MissingExtraError,
    RegionError,
    SequenceFormatError,
)
from genoembed.sequences.compression import (
    STDIN,
    WHITESPACE,
    check_readable,
    find_codec,
    iter_lines,
    iter_text,
)
from genoembed.sequences.records import RawRecord, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from genoembed.contracts import Strand


_BGZIP_SUFFIXES = (".gz", ".bgz")
# pyfaidx goes by the file's name, so a name that lies has to be refused here.
_COMPRESSED_SUFFIXES = (*_BGZIP_SUFFIXES, ".bz2", ".zip")
_LINE_END_BYTES = 2
_DAMAGE_ERRORS = (
    ValueError, AssertionError, EOFError, LookupError, ArithmeticError, RuntimeError, MemoryError, TypeError,
    zlib.error, struct.error,
)  # fmt: skip


def open_regions(path: str, places: list[str], *, flank: int) -> Iterator[RawRecord]:
    """Fetch regions of a FASTA file."""
    try:
        import pyfaidx
    except ImportError as error:
        raise MissingExtraError(
            package="pyfaidx", extra="regions", purpose="reading regions of a FASTA file"
        ) from error
    for place in places:
        check_regions(place)
    return _iter_regions(pyfaidx, path, places, flank)


def _iter_regions(pyfaidx: Any, path: str, places: list[str], flank: int) -> Iterator[RawRecord]:
    _check_reference(path)
    with closing(_open_index(pyfaidx, path)) as contigs:
        for interval in chain.from_iterable(map(iter_intervals, places)):
            yield _fetch(contigs, path, interval, flank)


def _check_reference(path: str) -> None:
    with Path(path).open("rb") as stream:
        head = stream.read(18)
    codec = find_codec(head)
    is_bgzip = head.startswith(b"\x1f\x8b\x08\x04") and head[12:14] == b"BC"
    name = path.lower()
    if codec is not None and not is_bgzip:
        problem = (
            f"{codec.name} data cannot be read by region, expected plain or bgzip FASTA; "
            "decompress it, then compress it with bgzip if wanted"
        )
        raise SequenceFormatError(problem, path=path)
    if is_bgzip and not name.endswith(_BGZIP_SUFFIXES):
        problem = "bgzip data under a name that does not say so; rename the file to end in .gz"
        raise SequenceFormatError(problem, path=path)
    if not is_bgzip and name.endswith(_COMPRESSED_SUFFIXES):
        problem = "plain text under the name of a compressed file; rename the file to end in .fa"
        raise SequenceFormatError(problem, path=path)
    text = next((block for block in iter_text(path) if block.strip(WHITESPACE)), b"")
    if not text.lstrip(WHITESPACE).startswith((b">", b";")):
        problem = "not FASTA, which regions are read from; convert it to FASTA"
        raise SequenceFormatError(problem, path=path)


def _open_index(pyfaidx: Any, path: str) -> Any:
    try:
        return pyfaidx.Faidx(path, as_raw=True)
    except OSError as error:
        if "EOF marker" in str(error):
            problem = "the bgzip data stops before its end; copy or download the file again"
            raise SequenceFormatError(problem, path=path) from error
        problem = (
            f"the index {path}.fai cannot be written or read; make the folder writable or copy the FASTA"
        )
        raise InputFileError(problem, path=path) from error
    except (*_DAMAGE_ERRORS, pyfaidx.FastaIndexingError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if reason.startswith("Duplicate key"):
            record_id = reason.split('"')[1]
            problem = "two contigs have this name, so regions on it are ambiguous; rename one"
            raise DuplicateIdError(problem, path=path, record_id=record_id) from error
        problem = (
            f"the FASTA cannot be indexed ({reason}); wrap all lines of a record to one length, "
            f"and remove {path}.fai if there is one"
        )
        raise SequenceFormatError(problem, path=path) from error


def _fetch(contigs: Any, path: str, interval: Interval, flank: int) -> RawRecord:
    length = _contig_length(contigs, path, interval)
    start, end = max(0, interval.start - flank), min(length, interval.end + flank)
    try:
        bases = _read_span(contigs, interval.contig, start, end)
    except (OSError, *_DAMAGE_ERRORS) as error:
        raise _stale_index(path, interval) from error
    if len(bases) != end - start:
        raise _stale_index(path, interval)
    left, right = interval.start - start, interval.end - start
    return RawRecord(
        id=interval.name or interval.place,
        description=interval.place if interval.name else "",
        path=interval.path,
        source=path,
        line=interval.line,
        body=iter(((bases[:left], None), (bases[left:right], None), (bases[right:], None))),
        span=Span(interval.contig, interval.start, interval.end, interval.strand, start),
    )


def _read_span(contigs: Any, contig: str, start: int, end: int) -> bytes:
    """Read bases from where the index has them.

    pyfaidx has the index; its own ``fetch`` fails for bases at the first byte of a bgzip block of 64 KiB.
    """
    entry = contigs.index[contig]

    bases_per_line, bytes_per_line = int(entry.lenc), int(entry.lenb)
    if not 0 < bases_per_line <= bytes_per_line <= bases_per_line + _LINE_END_BYTES:
        message = f"lines of {bases_per_line} bases in {bytes_per_line} bytes"
        raise ValueError(message)

    def offset(base: int) -> int:
        return int(entry.offset) + base // bases_per_line * bytes_per_line + base % bases_per_line

    first, past = offset(start), offset(end - 1) + 1
    blocks = getattr(contigs, "gzi_index", None)
    if blocks:
        block = blocks[bisect_right(blocks, first, key=attrgetter("ustart")) - 1]
        contigs.file.seek(make_virtual_offset(block.cstart, first - block.ustart))
    else:
        contigs.file.seek(first)
    raw: bytes = contigs.file.read(past - first)
    return raw.translate(None, WHITESPACE)


def _stale_index(path: str, interval: Interval) -> SequenceFormatError:
    problem = f"{interval.place} is not where the index has it; remove {path}.fai (and .gzi) and run again"
    return SequenceFormatError(problem, path=path)


def _contig_length(contigs: Any, path: str, interval: Interval) -> int:
    record_id = interval.name or None
    if interval.contig not in contigs.index:
        names = list(contigs.index)
        near = get_close_matches(interval.contig, names[:10_000], n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "correct the name"
        shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        problem = f"contig {interval.contig!r} is not in {path} ({shown}); {hint}"
        raise RegionError(problem, path=interval.path, line=interval.line, record_id=record_id)
    length = int(contigs.index[interval.contig].rlen)
    if interval.end > length:
        problem = (
            f"end {interval.end} lies beyond contig {interval.contig!r} of {length} bases; "
            "correct it, or give the FASTA that the regions were made for"
        )
        raise RegionError(problem, path=interval.path, line=interval.line, record_id=record_id)
    return length


class ReferenceFasta:
    """An indexed FASTA of which stretches are read; a context manager, which opens and closes it."""

    def __init__(self, path: str, *, purpose: str) -> None:
        try:
            import pyfaidx
        except ImportError as error:
            raise MissingExtraError(package="pyfaidx", extra="regions", purpose=purpose) from error
        check_readable(path)
        _check_reference(path)
        self.path = path
        self._pyfaidx = pyfaidx
        self._contigs: Any = None

    def __enter__(self) -> ReferenceFasta:
        self._contigs = _open_index(self._pyfaidx, self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self._contigs.close()

    @property
    def names(self) -> list[str]:
        """Names of the contigs, in the order of the file."""
        return list(self._contigs.index)

    def length(self, contig: str) -> int | None:
        """Return the length of a contig."""
        entry = self._contigs.index.get(contig)
        return None if entry is None else int(entry.rlen)

    def fetch(self, contig: str, start: int, end: int) -> bytes:
        """Read a stretch."""
        if end <= start:
            return b""
        interval = Interval(contig, start, end, "+", "", self.path, None)
        try:
            bases = _read_span(self._contigs, contig, start, end)
        except (OSError, *_DAMAGE_ERRORS) as error:
            raise _stale_index(self.path, interval) from error
        if len(bases) != end - start:
            raise _stale_index(self.path, interval)
        return bases


_PLACE = re.compile(r"(?P<contig>.+):(?P<first>[0-9,]+)-(?P<last>[0-9,]+)(\((?P<strand>[+-])\))?")
_SHOWN_TEXT = 200
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_BED_NOT_ROWS = ("#", "track ", "track\t", "browser ", "browser\t")
_GFF_NAMES = re.compile(r"(?:^|;)\s*(ID|Name)=([^;]*)")
_STRANDS: dict[str, Strand] = {"+": "+", "-": "-", ".": "+", "?": "+", "": "+"}
_EXPECTED_BED = "expected 0-based integers with start < end, as BED has them"
_EXPECTED_ONE_BASED = "expected 1-based integers with start <= end"


class Interval(NamedTuple):
    """A part of a contig."""

    contig: str
    start: int
    end: int
    strand: Strand
    name: str
    """The name its row gives it; empty if none."""
    path: str
    """The file, or the place as written."""
    line: int | None
    """1-based line of the row."""

    @property
    def place(self) -> str:
        """The interval as a place: 1-based, both ends included, with its strand."""
        return f"{self.contig}:{self.start + 1}-{self.end}({self.strand})"


def is_place(text: str) -> bool:
    """Return whether a text is a place such as ``chr1:1001-2000`` or ``chr1:1,001-2,000(-)``, no file."""
    return _PLACE.fullmatch(text) is not None and not _exists(text)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # longer than any file name, say
        return False


def check_regions(text: str) -> None:
    """Make sure that a region file can be opened; a place needs no file."""
    if is_place(text):
        return
    if text != STDIN and not _exists(text):
        problem = "no such file, and not a place such as chr1:1001-2000; check regions"
        raise InputFileError(problem, path=text[:_SHOWN_TEXT])
    check_readable(text)


def iter_intervals(text: str) -> Iterator[Interval]:
    """Read the intervals of a region file, or the one that a place names."""
    found = _PLACE.fullmatch(text) if is_place(text) else None
    if found is not None:
        first, last = found["first"].replace(",", ""), found["last"].replace(",", "")
        strand = found["strand"] or "+"
        yield _one_based(text, None, found["contig"], (first, last), strand, "")
        return
    parse: Callable[[str, int, list[str]], Interval] | None = None
    for line, raw in enumerate(iter_lines(iter_text(text), path=text), start=1):
        row = _decoded(text, line, raw)
        if row.startswith("##FASTA"):
            break
        if not row.strip() or row.startswith(_BED_NOT_ROWS):
            continue
        columns = row.split("\t") if "\t" in row else row.split()
        parse = parse or (_parse_gff if _looks_like_gff(columns) else _parse_bed)
        interval = parse(text, line, [column.strip() for column in columns])
        if found_control := _CONTROL.search(interval.contig + interval.name):
            code = ord(found_control[0])
            problem = (
                f"control character 0x{code:02x} in a name, expected text; the file is binary or damaged"
            )
            raise RegionError(problem, path=text, line=line)
        yield interval
    if parse is None:
        problem = "no regions in the file, expected rows of BED or GFF3; check the step that wrote it"
        raise RegionError(problem, path=text)


def _decoded(path: str, line: int, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        problem = (
            f"the row has byte 0x{raw[error.start]:02x}, expected UTF-8 text; check that it is BED or GFF3"
        )
        raise RegionError(problem, path=path, line=line) from error


def _looks_like_gff(columns: list[str]) -> bool:
    def numbers(first: int) -> bool:
        return all(_INTEGER.fullmatch(column.strip()) for column in columns[first : first + 2])

    return len(columns) >= 8 and numbers(3) and not numbers(1)


def _parse_bed(path: str, line: int, columns: list[str]) -> Interval:
    if len(columns) < 3:
        problem = (
            f"the row has {len(columns)} column(s), expected chrom, start, end; separate columns with tabs"
        )
        raise RegionError(problem, path=path, line=line)
    name = columns[3] if len(columns) > 3 and columns[3] != "." else ""
    start, end = _integers(path, line, (columns[1], columns[2]), _EXPECTED_BED)
    if not 0 <= start < end:
        problem = f"start {start} and end {end}, {_EXPECTED_BED}; correct the row"
        raise RegionError(problem, path=path, line=line)
    strand = _strand(path, line, columns[5] if len(columns) > 5 else ".")
    return Interval(columns[0], start, end, strand, name, path, line)


def _parse_gff(path: str, line: int, columns: list[str]) -> Interval:
    if len(columns) < 8:
        problem = f"the row has {len(columns)} column(s), expected the 9 of GFF3; separate columns with tabs"
        raise RegionError(problem, path=path, line=line)
    names = dict(reversed(_GFF_NAMES.findall(columns[8]))) if len(columns) > 8 else {}
    name = unquote(names.get("ID") or names.get("Name") or "").strip()
    return _one_based(path, line, unquote(columns[0]), (columns[3], columns[4]), columns[6], name)


def _one_based(
    path: str, line: int | None, contig: str, numbers: tuple[str, str], strand: str, name: str
) -> Interval:
    first, last = _integers(path, line, numbers, _EXPECTED_ONE_BASED)
    if not 1 <= first <= last:
        problem = f"start {first} and end {last}, {_EXPECTED_ONE_BASED}; correct the region"
        raise RegionError(problem, path=path, line=line)
    return Interval(contig, first - 1, last, _strand(path, line, strand), name, path, line)


def _integers(path: str, line: int | None, numbers: tuple[str, str], expected: str) -> tuple[int, int]:
    for number in numbers:
        if not _INTEGER.fullmatch(number):
            problem = f"{number!r} is no position, {expected}; correct the region"
            raise RegionError(problem, path=path, line=line)
    return int(numbers[0]), int(numbers[1])


def _strand(path: str, line: int | None, text: str) -> Strand:
    strand = _STRANDS.get(text)
    if strand is None:
        problem = f"strand {text!r}, expected '+', '-' or '.'; correct the row"
        raise RegionError(problem, path=path, line=line)
    return strand
