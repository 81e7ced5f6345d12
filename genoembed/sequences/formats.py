"""Which format a file is in, recognized by its text, and GenBank and EMBL through Biopython.

In: a file name. Out: raw records, whatever the format. The file's name plays no part. Files that people hand
in by mistake (SAM, BAM, VCF, a zip archive, a web page) are named in the error, with what to do.
"""

from __future__ import annotations

import logging
import re
import warnings
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from Bio import BiopythonWarning, SeqIO
from Bio.Seq import UndefinedSequenceError

from genoembed.errors import SequenceFormatError
from genoembed.sequences.compression import (
    WHITESPACE,
    check_record_size,
    check_text,
    decode_text,
    iter_lines,
    iter_text,
    max_record_bytes,
)
from genoembed.sequences.fasta import iter_fasta, iter_fastq
from genoembed.sequences.records import RawRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from genoembed.sequences.compression import InputDigests

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
    (re.compile(rb"##gff-version"), "a GFF3 file", "give the FASTA as input and this file as regions"),
    (re.compile(rb"PK\x03\x04"), "a zip archive", "unzip it"),
    (re.compile(rb"\x89HDF"), "an HDF5 file", "give the sequences it was made from"),
    (re.compile(rb"C'A\x1a|\x1aA'C"), "a 2bit file", "convert it with twoBitToFa"),
    (re.compile(rb"\xff\xfe|\xfe\xff"), "UTF-16 text", "save it as UTF-8"),
    (re.compile(rb"<"), "a web page or XML", "download the FASTA itself"),
)
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
_TAR = re.compile(rb".{257}ustar", re.DOTALL)


def iter_records(path: str, *, digests: InputDigests | None = None) -> Iterator[RawRecord]:
    """Parse a file of any format."""
    blocks = iter_text(path, digests=digests)
    lines_before = 0
    for block in blocks:
        head = block.lstrip(WHITESPACE)
        lines_before += block.count(b"\n", 0, len(block) - len(head))
        if head:
            parse = _choose_parser(path, head, lines_before + 1)
            yield from parse(path, chain((head,), blocks), lines_before=lines_before)
            return
    problem = f"the file is empty, {_EXPECTED}; check the step that wrote it"
    raise SequenceFormatError(problem, path=path)


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


def _iter_bio(
    name: str, opening: str, path: str, blocks: Iterable[bytes], *, lines_before: int
) -> Iterator[RawRecord]:
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
        yield _from_bio(path, handle, record, name)


def _log_once(place: str, caught: Iterable[warnings.WarningMessage], kinds: set[tuple[str, int]]) -> None:
    """Log what Biopython found odd, each kind once a file; a kind is the line of its code that warns."""
    for warning in caught:
        if not issubclass(warning.category, BiopythonWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif (kind := (warning.filename, warning.lineno)) not in kinds:
            kinds.add(kind)
            text = " ".join(str(warning.message).split())
            _LOG.warning("%s: read, but Biopython warns: %s (said once a file)", place, text)


def _from_bio(path: str, handle: _LineHandle, record: SeqIO.SeqRecord, form: str) -> RawRecord:
    line = handle.record_line
    names = [n for n in (record.id, record.name) if n and not n.startswith("<unknown")]
    record_id = names[0] if names else ""
    if not record_id or record_id.split() != [record_id]:
        problem = f"the {form} record has no accession and no name; give it one"
        raise SequenceFormatError(problem, path=path, line=line)
    if found := _CONTROL.search(record_id.encode()):
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


_PARSERS: Mapping[bytes, Callable[..., Iterator[RawRecord]]] = {
    b">": iter_fasta,
    b";": iter_fasta,
    b"@": iter_fastq,
    b"LOCUS ": partial(_iter_bio, "GenBank", "LOCUS "),
    b"ID   ": partial(_iter_bio, "EMBL", "ID "),
}
