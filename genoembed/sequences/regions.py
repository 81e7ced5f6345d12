"""Regions of a FASTA file, with flanks: rows of BED and GFF3 files, and places such as ``chr1:1001-2000``.

In: one FASTA file, plain or bgzip, and intervals. Out: raw records of three pieces, left flank, region and
right flank, as on the forward strand; ``reading`` cleans and turns them.

The contigs are read by the parser that reads whole files, laid out in any way. One pass notes where the
pieces of each contig stand; a stretch is then parsed again from its pieces. Nothing is assumed of the lines,
and no index of another program is believed: a blank, a comment or another line end would shift every place
behind it. A file that changes in the meantime is an error.
"""

from __future__ import annotations

import os
import re
from array import array
from bisect import bisect_right
from collections import OrderedDict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from genoembed.config.paths import PLACE_PATTERN, check_paths, is_place
from genoembed.errors import (
    ConfigError,
    DuplicateIdError,
    InputFileError,
    RegionError,
    SequenceFormatError,
)
from genoembed.sequences.compression import (
    BLOCK_BYTES,
    STDIN,
    WHITESPACE,
    check_readable,
    decode_text,
    decompress,
    find_codec,
    is_bgzip,
    iter_blocks,
    iter_lines,
    iter_text,
    iter_text_blocks,
    joined,
)
from genoembed.sequences.formats import Header, blank_comments, iter_fasta_parts
from genoembed.sequences.records import RawRecord, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import BinaryIO

    from genoembed.contracts import Strand
    from genoembed.sequences.compression import InputDigests


def iter_regions(
    path: str, places: list[str], *, flank: int, digests: InputDigests | None = None
) -> Iterator[RawRecord]:
    """Fetch regions of a FASTA file."""
    with FastaContigs(path, digests=digests) as contigs:
        for place in places:
            for interval in iter_intervals(place, digests=digests):
                yield _fetch(contigs, interval, flank)


def _fetch(contigs: FastaContigs, interval: Interval, flank: int) -> RawRecord:
    length = contigs.length(interval.contig)
    if length is None or interval.end > length:
        problem = (
            f"end {interval.end} is beyond contig {interval.contig!r} of {length} bases; "
            "correct it, or give the FASTA that the regions were made for"
        )
        found = problem if length is not None else contigs.no_such(interval.contig)
        raise RegionError(found, path=interval.path, line=interval.line, record_id=interval.name or None)
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


_PIECES_KEPT = 16  # of about a block (1 MiB) each: sorted regions find theirs here again
_TO_BLANK = bytes.maketrans(b"\v\f", b"  ")


class _Contig(NamedTuple):
    first: int
    """Number of its first piece."""
    past: int
    num_bases: int


class FastaContigs:
    """The contigs of a FASTA file; a context manager, which opens and closes it."""

    def __init__(self, path: str, *, digests: InputDigests | None = None) -> None:
        if path == STDIN:
            message = "reference is '-', but places are looked up in it; save it to a file first"
            raise ConfigError(message)
        check_readable(path)
        if not Path(path).is_file():
            problem = "is not a regular file, but places are looked up in it; save it to a file first"
            raise InputFileError(problem, path=path)
        self.path = path
        self._digests = digests
        self._contigs: dict[str, _Contig] = {}
        # of each piece: bases of its contig before it; its first byte and length in the decompressed text
        self._bases, self._starts, self._sizes = array("q"), array("q"), array("q")
        # of each bgzip block: its first byte in the file, and in the decompressed text
        self._members: list[tuple[int, int]] = []
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        with Path(path).open("rb") as stream:
            self._check_kind(stream)

    def __enter__(self) -> FastaContigs:
        self._stream = Path(self.path).open("rb")
        try:
            self._state = self._file_state()
            self._scan()
            self._check_unchanged()
        except BaseException:
            self._stream.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    @property
    def names(self) -> list[str]:
        """Names of the contigs, in the order of the file."""
        return list(self._contigs)

    def length(self, contig: str) -> int | None:
        """Return the length of a contig; None if there is no such contig."""
        found = self._contigs.get(contig)
        return None if found is None else found.num_bases

    def no_such(self, contig: str) -> str:
        """Say that there is no such contig, and which may be meant."""
        names = self.names
        # "1" and "chr1": the commonest reason; near spellings are slow to look for among millions of contigs
        same = [name for name in names if name.removeprefix("chr") == contig.removeprefix("chr")]
        near = same or get_close_matches(contig, names[:10_000], n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "correct the name"
        hint += " Rename the contigs of one of the two" if same else ""
        shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        problem = f"contig {contig!r} is not in {self.path} ({shown}); {hint}"
        return problem

    def fetch(self, contig: str, start: int, end: int) -> bytes:
        """Read a stretch, as the file has its letters."""
        first, past, num_bases = self._contigs[contig]
        end = min(end, num_bases)
        if end <= start:
            return b""
        number = bisect_right(self._bases, start, first, past) - 1
        found = []
        while number < past and (before := self._bases[number]) < end:
            found.append(self._letters(number, contig)[max(0, start - before) : end - before])
            number += 1
        return b"".join(found)

    # ------------------------------------------------------------------------------------------ the one pass

    def _check_kind(self, stream: BinaryIO) -> None:
        head = stream.read(18)
        self._codec = find_codec(head)
        if self._codec is not None and not is_bgzip(head):
            problem = (
                f"{self._codec.name} data cannot be read by region, expected plain or bgzip FASTA; "
                "decompress it, or compress it with bgzip instead"
            )
            raise SequenceFormatError(problem, path=self.path)
        stream.seek(0)
        text = next(filter(bytes.strip, self._plain(iter_blocks(stream, self.path))), b"")
        if not text.lstrip(WHITESPACE).startswith((b">", b";")):
            problem = "not FASTA, which regions are read from; convert it to FASTA"
            raise SequenceFormatError(problem, path=self.path)

    def _scan(self) -> None:
        blocks: Iterable[bytes] = iter_blocks(self._stream, self.path)
        if self._digests is not None:
            blocks = self._digests.watch(self.path, blocks)
        name, first, num_bases = "", 0, 0
        for part in iter_fasta_parts(
            self.path, _from_first_header(self._plain(blocks, members=self._members))
        ):
            if isinstance(part, Header):
                self._add(name, first, num_bases)
                name, first, num_bases = part.id, len(self._bases), 0
                if name in self._contigs:
                    problem = "two contigs have this name, so regions on it are ambiguous; rename one"
                    raise DuplicateIdError(problem, path=self.path, line=part.line, record_id=name)
                continue
            letters = part.letters.strip(WHITESPACE)
            if letters:
                # to begin at a letter: what stands before may be the end of a comment
                lead = len(part.letters) - len(part.letters.lstrip(WHITESPACE))
                self._bases.append(num_bases)
                self._starts.append(part.offset + lead)
                self._sizes.append(len(letters))
                num_bases += len(letters.translate(None, WHITESPACE))
        self._add(name, first, num_bases)

    def _plain(
        self, blocks: Iterable[bytes], members: list[tuple[int, int]] | None = None
    ) -> Iterator[bytes]:
        """Decompress blocks; no byte of the text moves, so that places count as in the file."""
        if self._codec is not None:
            blocks = joined(decompress(self.path, self._codec, blocks, members=members))
        return iter_text_blocks(blocks, keep_places=True)

    def _add(self, name: str, first: int, num_bases: int) -> None:
        if name:
            self._contigs[name] = _Contig(first, len(self._bases), num_bases)

    # ------------------------------------------------------------------------------------- pieces, read again

    def _letters(self, number: int, contig: str) -> bytes:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        self._check_unchanged()
        raw = self._read_text(self._starts[number], self._sizes[number])
        letters = blank_comments(b"".join(iter_text_blocks([raw]))).translate(None, WHITESPACE)
        _, past, num_bases = self._contigs[contig]
        after = self._bases[number + 1] if number + 1 < past else num_bases
        if len(letters) != after - self._bases[number]:
            raise self._changed()
        self._kept[number] = letters
        if len(self._kept) > _PIECES_KEPT:
            self._kept.popitem(last=False)
        return letters

    def _read_text(self, start: int, size: int) -> bytes:
        place, skipped = start, 0
        if self._codec is not None:
            member = bisect_right(self._members, start, key=lambda pair: pair[1]) - 1
            place, skipped = self._members[member][0], start - self._members[member][1]
        self._stream.seek(place)
        blocks: Iterable[bytes] = iter_blocks(self._stream, self.path, min(size, BLOCK_BYTES))
        if self._codec is not None:
            blocks = decompress(self.path, self._codec, blocks)
        found, held = [], 0
        for block in blocks:
            found.append(block)
            held += len(block)
            if held >= skipped + size:
                break
        return b"".join(found)[skipped : skipped + size]

    def _file_state(self) -> tuple[int, int]:
        state = os.fstat(self._stream.fileno())
        return state.st_size, state.st_mtime_ns

    def _check_unchanged(self) -> None:
        if self._file_state() != self._state:
            raise self._changed()

    def _changed(self) -> InputFileError:
        problem = "has changed while it was read; run again when nothing writes to it"
        return InputFileError(problem, path=self.path)


def _from_first_header(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Blank what the reader of whole files skips before the first header."""
    for block in blocks:
        head = block.lstrip(WHITESPACE)
        yield block[: len(block) - len(head)].translate(_TO_BLANK) + head
        if head:
            yield from blocks


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


def check_regions(text: str) -> None:
    """Make sure that a region file can be opened; a place needs no file."""
    check_paths(places=[text])
    if not is_place(text):
        check_readable(text)


def iter_intervals(text: str, *, digests: InputDigests | None = None) -> Iterator[Interval]:
    """Read the intervals of a region file, or the one that a place names."""
    found = PLACE_PATTERN.fullmatch(text) if is_place(text) else None
    if found is not None:
        first, last = found["first"].replace(",", ""), found["last"].replace(",", "")
        strand = found["strand"] or "+"
        yield _one_based(text, None, found["contig"], (first, last), strand, "")
        return
    parse: Callable[[str, int, list[str]], Interval] | None = None
    lines = enumerate(iter_lines(iter_text(text, digests=digests), path=text), start=1)
    for line, raw in lines:
        row = decode_text(raw, path=text, line=line, what="row", kind="BED or GFF3", error=RegionError)
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


def _looks_like_gff(columns: list[str]) -> bool:
    def numbers(first: int) -> bool:
        return all(_INTEGER.fullmatch(column.strip()) for column in columns[first : first + 2])

    # a BED row may have numbers for name and score, where GFF3 has its places, but has them in 2 and 3 too
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
    # reversed: of an attribute that is there twice, the first counts
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
            problem = f"{number!r} is not a position,  {expected}; correct the region"
            raise RegionError(problem, path=path, line=line)
    return int(numbers[0]), int(numbers[1])


def _strand(path: str, line: int | None, text: str) -> Strand:
    strand = _STRANDS.get(text)
    if strand is None:
        problem = f"strand {text!r}, expected '+', '-' or '.'; correct the row"
        raise RegionError(problem, path=path, line=line)
    return strand
