"""The alphabet of genomes: cleaning raw letters under the policies, and the reverse complement.

In: pieces of a record as its file has them. Out: the same bases as upper-case IUPAC DNA, and how many letters
each policy touched. A letter that no policy covers stops the reading with its line and position; a byte that
can only come from a damaged file (a control byte, a ``>`` inside a line) always does.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genoembed.errors import AlphabetError, SequenceFormatError
from genoembed.sequences.compression import WHITESPACE

if TYPE_CHECKING:
    from genoembed.sequences.records import Policies, RawRecord

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
_COMPLEMENT = bytes.maketrans(b"ACGTURYSWKMBDHVNacgturyswkmbdhvn", b"TGCAAYRSWMKVHDBNtgcaayrswmkvhdbn")


def reverse_complement(sequence: bytes) -> bytes:
    """Read the other strand.

    Knows all IUPAC codes and keeps the case; ``U`` pairs like ``T``. Other bytes stay as they are.

    Example:
        >>> reverse_complement(b"AACGTRYn")
        b'nRYACGTT'
    """
    return sequence.translate(_COMPLEMENT)[::-1]


class CleanedBody(NamedTuple):
    """The bases of a record after the policies."""

    pieces: list[bytes]
    """One for each raw piece."""
    masked: int
    gaps: int
    rna: int
    upper_cased: int


def clean_body(record: RawRecord, policies: Policies) -> CleanedBody | None:
    """Turn a record's raw letters into bases.

    White space goes, ``U`` becomes ``T``, lower case becomes upper case (unless kept), and invalid letters
    and gaps are treated as the policies say.
    """
    table = _TABLES[policies.keep_case]
    pieces: list[bytes] = []
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
            text = text.replace(_GAP, b"")
        if _INVALID in text:
            if policies.invalid == "error":
                raise _error(record, raw, place, _INVALID)
            if policies.invalid == "skip":
                return None
            masked += text.count(_INVALID)
            text = text.replace(_INVALID, b"N")
        # in the raw letters: after the translation a U is a T like any other
        if b"U" in raw or b"u" in raw:
            rna += raw.count(b"U") + raw.count(b"u")
        if not policies.keep_case:
            upper_cased += _count_lower(raw)
        pieces.append(text)
    return CleanedBody(pieces, masked, gaps, rna, upper_cased)


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
        where = f"position {record.span.fetch_start + position} of {record.span.contig!r}"
    problem = f"{shown} at {where} is not in alphabet {ALPHABET_NAME}; set invalid='mask' or fix it"
    if mark == _GAP:
        problem = f"gap {shown} at {where} is not in alphabet {ALPHABET_NAME}; set gaps='strip' or fix it"
    return AlphabetError(problem, path=record.path, line=line, record_id=record.id)
