"""Variants of a VCF against an indexed FASTA, or all of a region's own, each allele with the bases around it.

In: a VCF (plain or compressed, a file or standard input), read row by row, and the reference it was called
against; or a record. Out: one :class:`~genoembed.contracts.VariantContext` an allele. Promised: REF is what
the reference has, or the row is refused; both sequences are the same stretch of the contig; alleles that have
no sequence of their own are counted, never dropped in silence. Each change has one spelling: alleles are
trimmed and moved to the left, as variant callers compare them.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike, fspath
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, NamedTuple, cast

from genoembed.config.score import DEFAULT_FLANK
from genoembed.contracts import Variant, VariantContext
from genoembed.errors import ConfigError, SequenceFormatError, VariantError
from genoembed.sequences.compression import STDIN, check_readable, decode_text, iter_lines, iter_text
from genoembed.sequences.contigs import FastaContigs
from genoembed.sequences.records import Counts, contig_places, reverse_complement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from genoembed.config.choices import UnsupportedPolicy
    from genoembed.contracts import SequenceRecord


_LOG = logging.getLogger(__name__)


BASES = (b"A", b"C", b"G", b"T")
_COLUMNS = ("#CHROM", "POS", "ID", "REF", "ALT")
_REF = re.compile(r"[ACGTNRYSWKMBDHV]+")
_ALT = re.compile(r"[ACGTN]+")
_AMBIGUOUS_ALT = re.compile(r"[ACGTNRYSWKMBDHV]+")
_NO_BASE = re.compile(rb"[^ACGTNRYSWKMBDHV]")
_TO_DNA = bytes.maketrans(b"U", b"T")
_SHOWN_BASES = 20
# VCF has no codes for several bases in REF: they stand as the first of their bases, by the alphabet
_ANY_BASE = ord("N")  # callers of structural variants write it for a base that they did not look up
_FIRST_OF_CODE = dict(zip(b"RYSWKMBDHV", b"ACCAGACAAA", strict=True))


@dataclass(kw_only=True, slots=True)
class VariantCounts(Counts):
    """What was read of a VCF, and what became of it. The reader adds to it row by row."""

    rows: int = 0
    """Rows read."""
    alleles: int = 0
    """Alleles yielded."""
    normalized: int = 0
    """Of these, alleles that were trimmed or moved to the left."""
    symbolic: int = 0
    """Skipped: ``<DEL>``, ``<NON_REF>`` and the like."""
    breakends: int = 0
    """Skipped: breakends, such as ``G]17:198982]``."""
    spanning: int = 0
    """Skipped: ``*``, an allele inside another row's deletion."""
    absent: int = 0
    """Skipped: ``.``, a row without alternative, and an ALT that is the REF."""
    unknown: int = 0
    """Skipped: an ALT of ``N`` only, which callers write where they do not know the sequence."""
    ambiguous: int = 0
    """Skipped: an ALT with an IUPAC code for several bases, such as ``R``."""
    refs_filled: int = 0
    """Alleles handed on whose REF has ``N``, read as the base that the reference has there."""

    @property
    def skipped(self) -> int:
        """Alleles that were left out."""
        named = (self.symbolic, self.breakends, self.spanning, self.absent, self.unknown, self.ambiguous)
        return sum(named)


class _Row(NamedTuple):
    path: str
    line: int
    contig: str
    position: str
    id: str
    ref: str
    alts: list[str]


def read_variants(
    vcf: str | PathLike[str],
    reference: str | PathLike[str],
    *,
    flank: int = DEFAULT_FLANK,
    unsupported: UnsupportedPolicy = "skip",
    counts: VariantCounts | None = None,
    check_first: bool = False,
) -> Iterator[VariantContext]:
    """Read the alleles of a VCF, in constant memory.

    Rows with several alternatives give a variant each. REF is compared with the reference, letter by letter
    and whatever the case. Insertions and deletions are left-aligned and trimmed before the stretch around
    them is cut, so that all spellings of a change give the same sequences. FILTER, QUAL and genotypes are not
    looked at. Alleles without a sequence of their own are judged by nothing else. Options and file names are
    checked at once; rows are read as the iterator is used, with ``check_first`` all of them once before.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "r.fa").write_text(">c\\nGGCACACATT\\n")
        ...     _ = Path(folder, "v.vcf").write_text("c\\t7\\t.\\tCAT\\tT\\n")
        ...     (found,) = read_variants(Path(folder, "v.vcf"), Path(folder, "r.fa"), flank=2)
        >>> found.normalized.position, found.normalized.ref, found.normalized.alt
        (2, 'GCA', 'G')
        >>> found.ref_sequence, found.alt_sequence
        (b'GGCACA', b'GGCA')
    """
    vcf, reference = fspath(vcf), fspath(reference)
    problems = []
    if flank < 1:
        problems.append(f"flank is {flank}; set flank to 1 or more bases")
    if unsupported not in ("skip", "error"):
        problems.append(f"unsupported is {unsupported!r}; set unsupported to one of skip, error")
    if reference == STDIN:
        problems.append("reference is '-', but places are looked up in it; save it to a file first")
    if problems:
        raise ConfigError(*problems)
    check_readable(vcf)
    contigs = FastaContigs(reference)
    rows = partial(_contexts, vcf, contigs, flank=flank, unsupported=unsupported)
    found = VariantCounts() if counts is None else counts
    reading = _read(vcf, contigs, rows, found, check_first=check_first)
    if check_first:
        next(reading)
    return cast("Iterator[VariantContext]", reading)


def _read(
    vcf: str,
    contigs: FastaContigs,
    rows: Callable[..., Iterator[VariantContext]],
    counts: VariantCounts,
    *,
    check_first: bool,
) -> Iterator[VariantContext | None]:
    """Read the rows; or all of them, give None, and read them again: standard input is copied for that."""
    with ExitStack() as stack:
        stack.enter_context(contigs)
        stored = None
        if check_first and vcf == STDIN:
            copy = stack.enter_context(NamedTemporaryFile(prefix="genoembed-", suffix=".vcf"))
            shutil.copyfileobj(sys.stdin.buffer, copy)
            copy.flush()
            stored = copy.name
        if check_first:
            for _ in rows(VariantCounts(), stored=stored):
                pass
            yield None
        yield from rows(counts, stored=stored)
        _LOG.info("%s: %s", vcf, counts)


def _contexts(
    vcf: str,
    contigs: FastaContigs,
    counts: VariantCounts,
    *,
    flank: int,
    unsupported: UnsupportedPolicy,
    stored: str | None = None,
) -> Iterator[VariantContext]:
    for row in _iter_rows(vcf, stored):
        counts.rows += 1
        # a row is judged only by what is done with it: where nothing is scored, REF and POS do not matter
        wanted = _supported_alts(row, counts, unsupported)
        if not wanted:
            continue
        variant = _variant(row)
        length = _check_reference(variant, contigs)
        for alt in wanted:
            found = _show(replace(variant, alt=alt), contigs, length, flank)
            if found is None:
                counts.absent += 1
                continue
            counts.alleles += 1
            counts.refs_filled += "N" in variant.ref
            change = (found.normalized.position, found.normalized.ref, found.normalized.alt)
            counts.normalized += change != (variant.position, variant.ref, alt)
            yield found


def _supported_alts(row: _Row, counts: VariantCounts, unsupported: UnsupportedPolicy) -> list[str]:
    """Take the alleles that have a sequence; count the others, or stop at one."""
    wanted = []
    for alt in row.alts:
        kind = _unsupported_kind(row, alt)
        if kind is None:
            wanted.append(alt)
        elif unsupported == "error":
            problem = f"ALT {_short(alt)!r} has no sequence to look at; set unsupported='skip' or remove it"
            raise _error(row, problem)
        else:
            setattr(counts, kind, getattr(counts, kind) + 1)
    return wanted


def _iter_rows(path: str, stored: str | None = None) -> Iterator[_Row]:
    """Read rows; ``stored`` is the file that standard input was copied to."""
    is_empty = True
    for line, raw in enumerate(iter_lines(iter_text(stored or path)), start=1):
        is_empty = False
        if raw.startswith(b"BCF\x02"):
            problem = "BCF, expected VCF; convert it with: bcftools view"
            raise SequenceFormatError(problem, path=path)
        if raw.startswith(b"##") or not raw.strip():
            continue
        text = decode_text(raw, path=path, line=line, what="row", kind="a VCF", error=VariantError)
        # the genotypes of thousands of samples, which are not looked at, stay uncut
        columns = text.split("\t", len(_COLUMNS))[: len(_COLUMNS)]
        if not raw.startswith(b"#"):
            yield _parse(path, line, columns)
        elif tuple(column.strip() for column in columns) != _COLUMNS:
            problem = (
                f"the header has columns {' '.join(columns)}, expected {' '.join(_COLUMNS)}; give a VCF file"
            )
            raise VariantError(problem, path=path, line=line)
    if is_empty:
        problem = "the file is empty, expected a VCF; check the step that wrote it"
        raise SequenceFormatError(problem, path=path)


def _parse(path: str, line: int, columns: list[str]) -> _Row:
    if len(columns) < len(_COLUMNS):
        problem = (
            f"the row has {len(columns)} column(s), expected CHROM, POS, ID, REF, ALT; "
            "separate columns with tabs"
        )
        raise VariantError(problem, path=path, line=line)
    contig, position, name, ref, alts = (column.strip() for column in columns)
    return _Row(
        path=path,
        line=line,
        contig=contig,
        position=position,
        id="" if name == "." else name,
        ref=ref.upper(),
        alts=[alt if alt.startswith("<") else alt.upper() for alt in alts.split(",")],
    )


def _variant(row: _Row) -> Variant:
    """Check the columns of a row of which alleles are scored."""
    if not re.fullmatch("[0-9]{1,15}", row.position) or int(row.position) == 0:
        problem = f"POS is {row.position!r}, expected a whole number from 1 on; correct the row"
        raise _error(row, problem)
    if not _REF.fullmatch(row.ref):
        problem = f"REF is {_short(row.ref)!r}, expected letters A, C, G, T or N; correct the row"
        raise _error(row, problem)
    return Variant(
        contig=row.contig,
        position=int(row.position),
        ref=row.ref,
        alt=",".join(row.alts),
        id=row.id,
        path=row.path,
        line=row.line,
    )


def _unsupported_kind(row: _Row, alt: str) -> str | None:
    """Return the counter for an allele without a sequence of its own; None for all others."""
    if alt == "*":
        return "spanning"
    if alt in (".", row.ref):
        return "absent"
    if alt.startswith("<") and alt.endswith(">"):
        return "symbolic"
    if any(mark in alt for mark in "[].") and len(alt) > 1:
        return "breakends"
    if _ALT.fullmatch(alt):
        return "unknown" if set(alt) == {"N"} else None
    if _AMBIGUOUS_ALT.fullmatch(alt):
        return "ambiguous"
    problem = f"ALT is {_short(alt)!r}, expected letters A, C, G, T or N; correct the row"
    raise _error(row, problem)


def _check_reference(variant: Variant, contigs: FastaContigs) -> int:
    """Compare REF with the reference; gives the length of the contig."""
    length = contigs.length(variant.contig)
    if length is None:
        raise _error(variant, contigs.no_such(variant.contig))
    end = variant.start + len(variant.ref)
    if end > length:
        problem = (
            f"REF ends at base {end}, but contig {variant.contig!r} of {contigs.path} has {length} bases; "
            "give the reference that the VCF was called against"
        )
        raise _error(variant, problem)
    found = _fetch(contigs, variant.contig, variant.start, end)
    if not _agree(variant.ref, found):
        raise _wrong_reference(variant, found, contigs, length)
    return length


def _agree(ref: str, found: bytes) -> bool:
    pairs = zip(ref.encode(), found, strict=True)
    return all(asked in (base, _FIRST_OF_CODE.get(base), _ANY_BASE) for asked, base in pairs)


def _wrong_reference(variant: Variant, found: bytes, contigs: FastaContigs, length: int) -> VariantError:
    start, end = variant.position, variant.start + len(variant.ref)
    remedy = "give the reference that the VCF was called against, or correct the row"
    if end < length and _agree(variant.ref, _fetch(contigs, variant.contig, variant.start + 1, end + 1)):
        remedy = "it fits one base further on: count POS from 1, as VCF does"
    problem = (
        f"REF is {_short(variant.ref)!r}, but {contigs.path} has {_short(found.decode())!r} at "
        f"{variant.contig}:{start}-{end}; {remedy}"
    )
    return _error(variant, problem)


def iter_substitutions(record: SequenceRecord, *, flank: int) -> Iterator[VariantContext]:
    """Yield every change of a single base of a record's core, in the order of the contig.

    Places and letters are those of the contig's forward strand, as in a VCF; the stretches are as the record
    reads. A letter other than A, C, G and T has no changes.

    Example:
        >>> from genoembed.contracts import SequenceRecord
        >>> record = SequenceRecord(id="r", contig="c", sequence=b"AACNT", start=7, strand="-", core_start=1)
        >>> found = list(iter_substitutions(record, flank=1))
        >>> [(change.variant.position, change.variant.ref, change.variant.alt) for change in found[:4]]
        [(8, 'A', 'C'), (8, 'A', 'G'), (8, 'A', 'T'), (10, 'G', 'A')]
        >>> found[3].ref_sequence, found[3].alt_sequence, found[3].start, found[3].end
        (b'ACN', b'ATN', 8, 11)
    """
    length, is_reverse = len(record.sequence), record.strand == "-"
    places, is_turned = contig_places(record)

    def fetch(start: int, end: int) -> bytes:
        return record.sequence[start:end]

    for number in range(record.core_end - record.core_start):
        place = record.core_end - 1 - number if is_reverse else record.core_start + number
        own = fetch(place, place + 1)
        letter = reverse_complement(own.upper()) if is_turned[place] else own.upper()
        if letter not in BASES:
            continue
        for base in BASES:
            if base == letter:
                continue
            alt = reverse_complement(base) if is_turned[place] else base
            variant = Variant(
                contig=record.contig or record.id,
                position=int(places[place]) + 1,
                ref=letter.decode(),
                alt=base.decode(),
                id=record.id,
                path=record.source,
                line=record.line,
            )
            # soft-masked letters, where they are kept, stay soft-masked when they change
            change = Change(place, own, alt.lower() if own.islower() else alt)
            found = _cut(variant, variant, change, fetch, length=length, flank=flank)
            seen = places[found.start : found.end]
            yield replace(found, start=int(seen.min()), end=int(seen.max()) + 1)


def _cut(
    variant: Variant,
    normalized: Variant,
    change: Change,
    fetch: Callable[[int, int], bytes],
    *,
    length: int,
    flank: int,
) -> VariantContext:
    """Cut the stretch around a change: what the model sees, with either allele."""
    start, end = max(0, change.start - flank), min(length, change.end + flank)
    stretch = fetch(start, end)
    first, past = change.start - start, change.end - start
    return VariantContext(
        variant=variant,
        normalized=normalized,
        start=start,
        end=end,
        ref_sequence=stretch,
        alt_sequence=stretch[:first] + change.alt + stretch[past:],
    )


def _show(variant: Variant, contigs: FastaContigs, length: int, flank: int) -> VariantContext | None:
    """Normalize a variant and cut the stretch around it; None if REF has ``N`` and ALT is the reference's."""

    def fetch(start: int, end: int) -> bytes:
        return _fetch(contigs, variant.contig, start, end)

    end = variant.start + len(variant.ref)
    # the reference's own letters: REF may have one base where the reference has a code for several
    own, alt = fetch(variant.start, end), bytearray(variant.alt.encode())
    for place, letter in enumerate(variant.ref[: len(alt)]):
        if not letter == "N" == chr(alt[place]):
            break
        alt[place] = own[place]  # the base before a change, which neither allele names
    if own == alt:
        return None
    change = left_align(Change(variant.start, own, bytes(alt)), fetch)
    spelled = anchor(change, fetch)
    normalized = replace(
        variant, position=spelled.start + 1, ref=spelled.ref.decode(), alt=spelled.alt.decode()
    )
    found = _cut(variant, normalized, change, fetch, length=length, flank=flank)
    if wrong := _NO_BASE.search(found.ref_sequence):
        problem = (
            f"the reference has {wrong.group().decode(errors='replace')!r} at base "
            f"{found.start + wrong.start() + 1} of {variant.contig!r}, expected IUPAC letters; "
            "fix the reference"
        )
        raise _error(variant, problem)
    return found


def _fetch(contigs: FastaContigs, contig: str, start: int, end: int) -> bytes:
    return contigs.fetch(contig, start, end).upper().translate(_TO_DNA)


def _short(letters: str) -> str:
    return letters if len(letters) <= _SHOWN_BASES else f"{letters[:_SHOWN_BASES]}..."


def _error(row: _Row | Variant, problem: str) -> VariantError:
    return VariantError(problem, path=row.path, line=row.line, record_id=row.id or None)


# Most changes move by a few bases; one in a satellite array moves far, in few reads, as blocks double.
_FIRST_BLOCK, _LARGEST_BLOCK = 64, 1 << 16


class Change(NamedTuple):
    """Bases of a contig, and what stands there instead; one of the two may be empty."""

    start: int
    """0-based."""
    ref: bytes
    alt: bytes

    @property
    def end(self) -> int:
        """One past the last base that is replaced."""
        return self.start + len(self.ref)


def trim_change(change: Change) -> Change:
    """Take off what both alleles share, at the end first, then at the start.

    Example:
        >>> trim_change(Change(9, b"CAG", b"CG"))
        Change(start=10, ref=b'A', alt=b'')
    """
    start, ref, alt = change
    # the end first, as bcftools norm does: what the alleles share at both ends is then kept out on the left
    tail = _shared(ref[::-1], alt[::-1])
    ref, alt = ref[: len(ref) - tail], alt[: len(alt) - tail]
    head = _shared(ref, alt)
    return Change(start + head, ref[head:], alt[head:])


def _shared(first: bytes, second: bytes) -> int:
    pairs = zip(first, second, strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def left_align(change: Change, fetch: Callable[[int, int], bytes]) -> Change:
    """Move an insertion or deletion to the first place where it makes the same haplotype.

    What has both alleles after trimming can be written at one place only, and stays.

    Example:
        >>> contig = b"GGCACACATT"
        >>> left_align(Change(6, b"CA", b""), lambda start, end: contig[start:end])
        Change(start=2, ref=b'CA', alt=b'')
    """
    start, ref, alt = trim_change(change)
    if ref and alt:
        return Change(start, ref, alt)
    bases = ref or alt
    moved = _steps_to_the_left(start, bases, fetch)
    # the same haplotype begins at another base of the repeat's unit: CACA(CA) is also C(AC)ACA
    turn = moved % len(bases)
    bases = bases[len(bases) - turn :] + bases[: len(bases) - turn]
    return Change(start - moved, bases if ref else b"", bases if alt else b"")


def _steps_to_the_left(start: int, bases: bytes, fetch: Callable[[int, int], bytes]) -> int:
    """Count the bases before ``start`` that repeat ``bases``, read backwards and round and round."""
    moved, block = 0, _FIRST_BLOCK
    size = len(bases)
    while start > moved:
        stretch = fetch(max(0, start - moved - block), start - moved)
        for base in reversed(stretch):
            if base != bases[size - 1 - moved % size]:
                return moved
            moved += 1
        block = min(2 * block, _LARGEST_BLOCK)
    return moved


def anchor(change: Change, fetch: Callable[[int, int], bytes]) -> Change:
    """Add to an insertion or deletion the neighboring base that VCF requires: the one before, if any.

    Example:
        >>> anchor(Change(2, b"CA", b""), lambda start, end: b"GGCACACATT"[start:end])
        Change(start=1, ref=b'GCA', alt=b'G')
    """
    start, ref, alt = change
    if ref and alt:
        return change
    if start > 0:
        base = fetch(start - 1, start)
        return Change(start - 1, base + ref, base + alt)
    base = fetch(change.end, change.end + 1)
    return Change(start, ref + base, alt + base)
