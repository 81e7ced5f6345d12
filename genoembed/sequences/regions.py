"""Regions of a FASTA file, with flanks.

In: one FASTA file, plain or bgzip, and intervals. Out: raw records of three pieces, left flank, region and
right flank, as on the forward strand; ``reading`` cleans and turns them.

Rows of BED and GFF3 files and places such as ``chr1:1001-2000``, brought to one form.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from genoembed.errors import InputFileError, RegionError
from genoembed.sequences.compression import STDIN, check_readable, iter_lines, iter_text
from genoembed.sequences.contigs import FastaContigs
from genoembed.sequences.records import RawRecord, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from genoembed.contracts import Strand
    from genoembed.sequences.compression import InputDigests


def open_regions(
    path: str, places: list[str], *, flank: int, digests: InputDigests | None = None
) -> Iterator[RawRecord]:
    """Fetch regions of a FASTA file."""
    for place in places:
        check_regions(place)
    return _iter_regions(path, places, flank, digests)


def _iter_regions(
    path: str, places: list[str], flank: int, digests: InputDigests | None
) -> Iterator[RawRecord]:
    with FastaContigs(path, digests=digests) as contigs:
        for place in places:
            for interval in iter_intervals(place, digests=digests):
                yield _fetch(contigs, interval, flank)


def _fetch(contigs: FastaContigs, interval: Interval, flank: int) -> RawRecord:
    length = _contig_length(contigs, interval)
    start, end = max(0, interval.start - flank), min(length, interval.end + flank)
    bases = contigs.fetch(interval.contig, start, end)
    left, right = interval.start - start, interval.end - start
    return RawRecord(
        id=interval.name or interval.place,
        description=interval.place if interval.name else "",
        path=interval.path,
        source=contigs.path,
        line=interval.line,
        body=iter(((bases[:left], None), (bases[left:right], None), (bases[right:], None))),
        span=Span(interval.contig, interval.start, interval.end, interval.strand, start),
    )


def _contig_length(contigs: FastaContigs, interval: Interval) -> int:
    record_id = interval.name or None
    length = contigs.length(interval.contig)
    if length is None:
        names = contigs.names
        near = get_close_matches(interval.contig, names[:10_000], n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "correct the name"
        shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        problem = f"contig {interval.contig!r} is not in {contigs.path} ({shown}); {hint}"
        raise RegionError(problem, path=interval.path, line=interval.line, record_id=record_id)
    if interval.end > length:
        problem = (
            f"end {interval.end} is beyond contig {interval.contig!r} of {length} bases; "
            "correct it, or give the FASTA that the regions were made for"
        )
        raise RegionError(problem, path=interval.path, line=interval.line, record_id=record_id)
    return length


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


def iter_intervals(text: str, *, digests: InputDigests | None = None) -> Iterator[Interval]:
    """Read the intervals of a region file, or the one that a place names."""
    found = _PLACE.fullmatch(text) if is_place(text) else None
    if found is not None:
        first, last = found["first"].replace(",", ""), found["last"].replace(",", "")
        strand = found["strand"] or "+"
        yield _one_based(text, None, found["contig"], (first, last), strand, "")
        return
    parse: Callable[[str, int, list[str]], Interval] | None = None
    lines = enumerate(iter_lines(iter_text(text, digests=digests), path=text), start=1)
    for line, raw in lines:
        row = _decoded(text, line, raw)
        if row.startswith("##FASTA"):
            for _ in lines:  # read to its end all the same: it may be cut off, and is digested
                pass
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
