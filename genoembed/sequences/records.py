"""Records on their way from the file's letters to clean DNA: policies, counts, unique ids, the alphabet.

In: pieces of a record as its file has them. Out: the same bases as upper-case IUPAC DNA, and how many letters
each policy touched. A letter that no policy covers stops the reading with its line and position; a byte that
can only come from a damaged file (a control byte, a ``>`` inside a line) always does.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genoembed.contracts import Stretch
from genoembed.errors import AlphabetError, ConfigError, DuplicateIdError, SequenceFormatError
from genoembed.sequences.compression import WHITESPACE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import (
        DuplicatePolicy,
        EmptyPolicy,
        GapPolicy,
        InvalidPolicy,
        RegionPolicy,
    )
    from genoembed.contracts import SequenceRecord, Strand


class Span(NamedTuple):
    """The part of a contig that a record was fetched from; several parts where they are joined."""

    contig: str
    start: int
    """First base of the region, 0-based."""
    end: int
    """One past its last base."""
    strand: Strand
    stretches: tuple[Stretch, ...]
    """What was fetched, flanks included, in the order in which the record reads it."""

    @property
    def is_one_stretch(self) -> bool:
        """Whether all that was fetched lies together on one strand."""
        forward = self.stretches[:: 1 if self.strand == "+" else -1]
        return all(stretch.strand == self.strand for stretch in forward) and all(
            before.end == after.start for before, after in pairwise(forward)
        )

    def place(self, offset: int) -> int:
        """Return the 0-based place of a letter, counted over all that was fetched on the forward strand."""
        for start, end, strand in self.stretches[:: 1 if self.strand == "+" else -1]:
            if offset < end - start:
                return start + offset if strand == self.strand else end - 1 - offset
            offset -= end - start
        return self.end

    def without(self, offsets: Sequence[int]) -> Span:
        """Leave out letters, counted as ``place`` counts them, ascending; both ends of the region stay.

        Example:
            >>> span = Span("c", 2, 9, "-", (Stretch(7, 9, "-"), Stretch(2, 5, "-")))
            >>> [tuple(stretch) for stretch in span.without([1]).stretches]
            [(7, 9, '-'), (4, 5, '-'), (2, 3, '-')]
        """
        order = 1 if self.strand == "+" else -1
        kept, before = [], 0
        for start, end, strand in self.stretches[::order]:
            past = before + end - start
            inside = offsets[bisect_left(offsets, before) : bisect_left(offsets, past)]
            for left, right in pairwise([before - 1, *inside, past]):
                first, last = left + 1 - before, right - before
                if first < last and strand == self.strand:
                    kept.append(Stretch(start + first, start + last, strand))
                elif first < last:
                    kept.append(Stretch(end - last, end - first, strand))
            before = past
        return self._replace(stretches=tuple(kept[::order]))


class RawRecord(NamedTuple):
    """A record as parsed."""

    id: str
    description: str
    path: str
    """File that errors name."""
    source: str
    """File that the finished record names."""
    line: int | None
    """1-based line of the header."""
    body: Iterator[tuple[bytes, int | None]]
    """Pieces of the sequence, in order, white space and all, each with the line it starts on (None where
    lines cannot be distinguished); can be read once. A record with a ``span`` has exactly three: left flank,
    region, right flank, as on the forward strand."""
    span: Span | None = None
    """Where a region came from."""


_PLURAL = re.compile(r"(?<!ou)s\b")  # not of "ambiguous"
_CHOICES = {
    "invalid": ("error", "skip", "mask"),
    "duplicates": ("error", "suffix"),
    "empty": ("error", "skip"),
    "gaps": ("error", "strip"),
    "bad_regions": ("error", "skip"),
}


class Counts:
    """Numbers that print as words, without those that are 0: ``12 records, 3 skipped empty``."""

    __slots__ = ()

    def __str__(self) -> str:
        return ", ".join(self._words()) or "nothing"

    def _words(self) -> Iterator[str]:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Counts):
                yield from value._words()
            elif value:
                words = field.name.replace("_", " ")
                yield f"{value:,} {_PLURAL.sub('', words) if value == 1 else words}"


@dataclass(kw_only=True, slots=True)
class InputCounts(Counts):
    """How much was read, and how often each policy acted. The reader adds to it record by record."""

    files: int = 0
    """Input files opened."""
    records: int = 0
    """Records yielded."""
    bases: int = 0
    """Bases yielded, flanks included."""
    upper_cased: int = 0
    """Soft-masked bases that were upper-cased."""
    rna_to_dna: int = 0
    """Letters ``U`` read as ``T``."""
    masked_bases: int = 0
    """Invalid letters replaced by ``N``."""
    masked_records: int = 0
    """Records with at least one of them."""
    gaps_stripped: int = 0
    """Gap letters taken out."""
    skipped_invalid: int = 0
    """Records left out for invalid letters."""
    skipped_empty: int = 0
    """Records left out because they had no bases."""
    skipped_regions: int = 0
    """Regions left out because they cannot be read: beyond their contig, say."""
    renamed: int = 0
    """Records whose id was taken and got a suffix."""
    windows: int = 0
    """Windows cut; extraction fills it in."""
    unread: int = 0
    """Bases that the model's tokenizer has no words for; extraction fills it in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policies:
    """The choices of one reading, checked together when it is made."""

    invalid: InvalidPolicy = "error"
    """Letters outside the alphabet: stop, leave the record out, or replace each by ``N``."""
    duplicates: DuplicatePolicy = "error"
    """An id seen before: stop, or append ``_2``, ``_3`` ..."""
    empty: EmptyPolicy = "error"
    """A record without bases: stop, or leave it out."""
    gaps: GapPolicy = "error"
    """Gap letters ``-``, ``.`` and ``*``: stop, or take them out."""
    bad_regions: RegionPolicy = "error"
    """A region that cannot be read, beyond its contig, say: stop, or leave it out."""
    keep_case: bool = False
    """True leaves soft-masked (lower-case) bases as they are."""

    def __post_init__(self) -> None:
        problems = []
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                problems.append(f"{name} is {value!r}; set {name} to one of {', '.join(choices)}")
        if not isinstance(self.keep_case, bool):
            problems.append(f"keep_case is {self.keep_case!r}; set keep_case to True or False")
        if problems:
            raise ConfigError(*problems)


# File number and line share one integer: a tuple for each of a million ids would cost 60 bytes more apiece.
_LINE_BITS = 40


class IdRegistry:
    """Remembers where each id was first seen."""

    def __init__(self, policy: DuplicatePolicy) -> None:
        self._policy = policy
        self._places: dict[str, int] = {}
        self._paths: list[str] = []
        self._next_suffix: dict[str, int] = {}

    def admit(self, record_id: str, *, path: str, line: int | None) -> str:
        """Take an id in, under another name if it is taken.

        A new name is ``id_2``, ``id_3`` ..., the first that nothing before has. A later record that was given
        such a name by its file is a duplicate like any other, so no two records ever share an id.

        Example:
            >>> ids = IdRegistry("suffix")
            >>> [ids.admit(name, path="a.fa", line=1) for name in ("x", "x", "x_2", "x")]
            ['x', 'x_2', 'x_2_2', 'x_3']
        """
        if not self._paths or self._paths[-1] != path:
            self._paths.append(path)
        name = record_id
        if record_id in self._places:
            if self._policy == "error":
                raise self._duplicate(record_id, path, line)
            name = self._free_name(record_id)
        self._places[name] = (len(self._paths) - 1) << _LINE_BITS | (line or 0)
        return name

    def _free_name(self, record_id: str) -> str:
        number = self._next_suffix.get(record_id, 2)
        while f"{record_id}_{number}" in self._places:
            number += 1
        self._next_suffix[record_id] = number + 1
        return f"{record_id}_{number}"

    def _duplicate(self, record_id: str, path: str, line: int | None) -> DuplicateIdError:
        place = self._places[record_id]
        first_path, first_line = self._paths[place >> _LINE_BITS], place & ((1 << _LINE_BITS) - 1)
        number = f"line {first_line}" if first_line else first_path
        first = number if first_path == path else f"{first_path}:{first_line}" if first_line else first_path
        problem = f"appears again (first at {first}); rename one or set duplicates='suffix'"
        return DuplicateIdError(problem, path=path, line=line, record_id=record_id)


ALPHABET_NAME = "dna-iupac"
DNA_IUPAC = b"ACGTRYSWKMBDHVN"
GAPS = b"-.*"

# One pass of bytes.translate cleans a piece and marks what must be looked at: `in` then finds the marks.
_INVALID, _DAMAGE, _GAP = b"\x00", b"\x01", b"-"
_DAMAGED_BYTES = b">" + bytes(set(range(32)) - set(WHITESPACE)) + b"\x7f"
_LOWER = bytes(range(97, 123))
_SMALL_PIECE = 2048  # below, the calls of NumPy cost more than counting saves: short reads are millions


def _cleaning_table(*, keep_case: bool) -> bytes:
    table = bytearray(_INVALID * 256)
    for letter in DNA_IUPAC:
        table[letter] = letter
        table[letter + 32] = letter + 32 if keep_case else letter
    table[ord("U")] = ord("T")
    table[ord("u")] = ord("t") if keep_case else ord("T")
    for gap in GAPS:
        table[gap] = _GAP[0]
    for byte in _DAMAGED_BYTES:
        table[byte] = _DAMAGE[0]
    return bytes(table)


_TABLES = {keep_case: _cleaning_table(keep_case=keep_case) for keep_case in (False, True)}
_FIND = {
    _INVALID: re.compile(
        b"[^" + re.escape(DNA_IUPAC + DNA_IUPAC.lower() + b"Uu" + GAPS + _DAMAGED_BYTES + WHITESPACE) + b"]"
    ),
    _DAMAGE: re.compile(b"[" + re.escape(_DAMAGED_BYTES) + b"]"),
    _GAP: re.compile(b"[" + re.escape(GAPS) + b"]"),
}
_NO_CODE = frozenset(b"EFILPQ")  # amino acids whose letter is no IUPAC code of bases
_LETTERS_TO_JUDGE = 4096
_COMPLEMENT = bytes.maketrans(b"ACGTURYSWKMBDHVNacgturyswkmbdhvn", b"TGCAAYRSWMKVHDBNtgcaayrswmkvhdbn")


def reverse_complement(sequence: bytes) -> bytes:
    """Read the other strand.

    Knows all IUPAC codes and keeps the case; ``U`` pairs like ``T``. Other bytes stay as they are.

    Example:
        >>> reverse_complement(b"AACGTRYn")
        b'nRYACGTT'
    """
    return sequence.translate(_COMPLEMENT)[::-1]


class ContigPlaces(NamedTuple):
    """Where the bases of a record are on its contig, flanks included, in reading order."""

    places: NDArray[np.int64]
    """0-based."""
    is_turned: NDArray[np.bool_]
    """True where the reverse strand is read."""


def contig_places(record: SequenceRecord) -> ContigPlaces:
    """Return where each base of a record is on the contig.

    Example:
        >>> from genoembed.contracts import SequenceRecord, Stretch
        >>> parts = (Stretch(7, 9, "-"), Stretch(2, 4, "-"))
        >>> joined = SequenceRecord(id="r", sequence=b"ACGT", start=2, end=9, strand="-", stretches=parts)
        >>> contig_places(joined).places.tolist()
        [8, 7, 3, 2]
    """
    stretches = record.stretches
    if not stretches:
        length, is_reverse = len(record.sequence), record.strand == "-"
        first = record.start - (length - record.core_end if is_reverse else record.core_start)
        stretches = (Stretch(first, first + length, record.strand),)
    runs = [np.arange(start, end)[:: 1 if strand == "+" else -1] for start, end, strand in stretches]
    turned = np.repeat([part.strand == "-" for part in stretches], [len(run) for run in runs])
    return ContigPlaces(np.concatenate(runs).astype(np.int64), turned)


class CleanedBody(NamedTuple):
    """The bases of a record after the policies."""

    pieces: list[bytes]
    """One for each raw piece."""
    masked: int
    gaps: int
    stripped: list[int]
    """Offsets of the gaps among all letters of a record with a ``span``."""
    rna: int
    upper_cased: int


def clean_body(record: RawRecord, policies: Policies) -> CleanedBody | None:
    """Turn a record's raw letters into bases.

    White space goes, ``U`` becomes ``T``, lower case becomes upper case (unless kept), and invalid letters
    and gaps are treated as the policies say.
    """
    table = _TABLES[policies.keep_case]
    pieces: list[bytes] = []
    stripped: list[int] = []
    masked = gaps = rna = upper_cased = letters = 0
    for raw, line in record.body:
        place = letters, line  # where the piece begins
        text = raw.translate(table, WHITESPACE)
        letters += len(text)
        if _DAMAGE in text:
            raise _error(record, raw, place, _DAMAGE)
        if _GAP in text:
            if policies.gaps == "error":
                raise _error(record, raw, place, _GAP)
            gaps += text.count(_GAP)
            if record.span is not None:
                found = np.flatnonzero(np.frombuffer(text, np.uint8) == _GAP[0])
                stripped.extend((place[0] + found).tolist())
            text = text.replace(_GAP, b"")
        if _INVALID in text:
            if policies.invalid == "error":
                raise _error(record, raw, place, _INVALID)
            if policies.invalid == "skip":
                return None
            if is_protein(raw):  # of which masking would leave little but N
                raise _error(record, raw, place, _INVALID)
            masked += text.count(_INVALID)
            text = text.replace(_INVALID, b"N")
        # in the raw letters: after the translation a U is a T like any other
        if b"U" in raw or b"u" in raw:
            rna += raw.count(b"U") + raw.count(b"u")
        if not policies.keep_case:
            upper_cased += _count_lower(raw)
        pieces.append(text)
    return CleanedBody(pieces, masked, gaps, stripped, rna, upper_cased)


def is_protein(letters: bytes) -> bool:
    """Say whether letters read like amino acids: half of them are no bases, one of them is no IUPAC code.

    Example:
        >>> is_protein(b"MKVLAAGWWLKE*"), is_protein(b"ACGTRYKLACGTACGT")
        (True, False)
    """
    letters = letters[:_LETTERS_TO_JUDGE].upper().translate(None, WHITESPACE + GAPS)
    residues = letters.translate(None, b"ACGTUN")
    return letters.isalpha() and 2 * len(residues) >= len(letters) and not _NO_CODE.isdisjoint(residues)


def _count_lower(raw: bytes) -> int:
    if len(raw) < _SMALL_PIECE:
        return len(raw) - len(raw.translate(None, _LOWER))
    letters = np.frombuffer(raw, dtype=np.uint8)
    return int(np.count_nonzero(letters >= _LOWER[0])) - int(np.count_nonzero(letters > _LOWER[-1]))


def _error(
    record: RawRecord, raw: bytes, place: tuple[int, int | None], mark: bytes
) -> AlphabetError | SequenceFormatError:
    """Name the first letter of a piece that got a mark, by line and position."""
    letters_before, line = place
    found = _FIND[mark].search(raw)
    assert found is not None, "a mark stands for a byte of its own class"
    offset, byte = found.start(), raw[found.start()]
    position = letters_before + len(raw[:offset].translate(None, WHITESPACE)) + 1
    line = record.line if line is None else line + raw.count(b"\n", 0, offset)
    shown = repr(chr(byte)) if 32 <= byte < 127 else f"byte 0x{byte:02x}"
    where = f"position {position}"
    if mark == _DAMAGE:
        problem = f"control {shown} at {where}; the file is binary or damaged"
        if byte == ord(">"):
            problem = f"'>' inside a line of sequence ({where}); a line end is missing before it"
        return SequenceFormatError(problem, path=record.path, line=line, record_id=record.id)
    if record.span is not None:
        where = f"position {record.span.place(position - 1) + 1} of {record.span.contig!r}"
    problem = f"{shown} at {where} is not in alphabet {ALPHABET_NAME}; set invalid='mask' or fix it"
    if is_protein(raw):
        problem = (
            f"{shown} at {where}: the letters are those of a protein, and the models read DNA or RNA; "
            "give the gene's own sequence, or set invalid='skip'"
        )
    elif mark == _GAP:
        problem = f"gap {shown} at {where} is not in alphabet {ALPHABET_NAME}; set gaps='strip' or fix it"
    return AlphabetError(problem, path=record.path, line=line, record_id=record.id)
