"""Features of contigs: rows of BED, GFF3 and GTF files, features of GenBank records, and single places.

In: a region file, a place such as ``chr1:1001-2000``, or a record of Biopython's. Out: :class:`Feature`, with
its parts in the order in which they are read. Rows of one feature are collected until its contig ends in the
file, so that a large file is not held. A row is judged only by what is done with it: of rows of types that
are not chosen nothing but the type is looked at.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from genoembed.config.paths import PLACE_PATTERN, is_place
from genoembed.contracts import Stretch
from genoembed.errors import RegionError
from genoembed.sequences.compression import decode_text, iter_lines, iter_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from Bio.SeqFeature import SeqFeature
    from Bio.SeqRecord import SeqRecord

    from genoembed.contracts import Strand
    from genoembed.sequences.compression import InputDigests
    from genoembed.sequences.records import RawRecord

_LOG = logging.getLogger(__name__)

EACH = "none"
"""Value of ``join_by`` with which nothing is joined."""
CONTIG_TYPES = frozenset(
    (
        *("region", "chromosome", "supercontig", "contig", "scaffold", "source", "plasmid", "golden_path"),
        *("assembly", "assembly_component", "databank_entry", "mitochondrial_chromosome", "sequence"),
    )
)
"""Types of rows that are the contig itself, in GFF3 files of NCBI, Ensembl, Bakta, FlyBase and others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureChoice:
    """Which features of a file are read, and what they are called."""

    types: tuple[str, ...] = ()
    """Types of features; none takes the rows of all types but those that are the contig itself."""
    name_attribute: str | None = None
    """Attribute that features are named by; None goes by the format."""
    join_by: str | None = None
    """Attribute that parts of one feature share; ``none`` reads each part alone; None goes by the format."""

    @property
    def attributes(self) -> tuple[str, ...]:
        """Attributes that rows are asked for by name."""
        join_by = None if self.join_by == EACH else self.join_by
        return tuple(name for name in (self.name_attribute, join_by) if name)

    def takes(self, kind: str) -> bool:
        """Return whether features of a type are read."""
        return kind in self.types if self.types else kind not in CONTIG_TYPES

    def shown(self, kind: str, name: str) -> str:
        """Name a feature where features of different types have the same name: by its type, too."""
        return name if len(self.types) == 1 or not name else f"{kind}-{name}"


class Feature(NamedTuple):
    """A region of a contig, or several that are read as one."""

    contig: str
    parts: tuple[Stretch, ...]
    """In the order in which they are read."""
    name: str
    """The name its row gives it; empty if none."""
    path: str
    """The file, or the place as written."""
    line: int | None
    """1-based line of the row, the first of several."""
    kind: str = ""
    """Its type, where the format has types."""
    product: str = ""
    """What it makes, as the annotation says."""
    is_circular: bool = False
    """Whether the contig is known to be circular."""
    is_ordered: bool = True
    """Whether the order of the parts is given; if not, it is that of their places."""
    problem: str = ""
    """Why it cannot be read."""

    @property
    def strand(self) -> Strand:
        """The strand of the part that is read first."""
        return self.parts[0].strand

    @property
    def place(self) -> str:
        """The feature as a place: 1-based, both ends included, from left to right, with its strand."""
        spans = [f"{start + 1}-{end}" for start, end, _ in self.parts[:: 1 if self.strand == "+" else -1]]
        return f"{self.contig}:{','.join(spans)}({self.strand})"


class _Row(NamedTuple):
    line: int
    contig: str
    start: int
    end: int
    strand: Strand
    kind: str
    name: str
    product: str
    part: str


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_BED_NOT_ROWS = ("#", "track ", "track\t", "browser ", "browser\t")
_STRANDS: dict[str, Strand] = {"+": "+", "-": "-", ".": "+", "?": "+", "": "+"}
_EXPECTED_BED = "expected 0-based integers with start < end, as BED has them"
_EXPECTED_ONE_BASED = "expected 1-based integers with start <= end"


def iter_features(
    text: str, choice: FeatureChoice | None = None, *, digests: InputDigests | None = None
) -> Iterator[Feature]:
    """Read the features of a region file, or the one that a place names."""
    choice = choice or FeatureChoice()
    found = PLACE_PATTERN.fullmatch(text) if is_place(text) else None
    if found is not None:
        first, last = found["first"].replace(",", ""), found["last"].replace(",", "")
        start, end = _one_based(text, None, (first, last))
        strand = _strand(text, None, found["strand"] or "+")
        yield Feature(found["contig"], (Stretch(start, end, strand),), "", text, None)
        return
    read: Callable[[int, list[str]], Iterable[Feature]] | None = None
    rows: _GffRows | None = None
    lines = enumerate(iter_lines(iter_text(text, digests=digests), path=text), start=1)
    for line, raw in lines:
        row = decode_text(raw, path=text, line=line, what="row", kind="BED or GFF3", error=RegionError)
        if row.startswith(("##FASTA", ">")):
            for _ in lines:  # read to its end all the same: it may be cut off, and is digested
                pass
            break
        if row.startswith("###") and not row.strip("# \t") and rows is not None:
            yield from map(_without_control, rows.close())
        if not row.strip() or row.startswith(_BED_NOT_ROWS):
            continue
        columns = row.split("\t") if "\t" in row else row.split()
        if read is None:
            if row.startswith(("LOCUS ", "ID   ")):
                problem = (
                    "this is GenBank or EMBL, expected BED or GFF3; give it as the input, without regions"
                )
                raise RegionError(problem, path=text)
            if _looks_like_gff(columns):
                rows = _GffRows(text, choice)
                read = rows.add
            else:
                _check_bed_choice(text, choice)
                read = _BedRows(text, choice).add
        yield from map(_without_control, read(line, columns))
    if read is None:
        problem = "no regions in the file, expected rows of BED or GFF3; check the step that wrote it"
        raise RegionError(problem, path=text)
    if rows is not None:
        yield from map(_without_control, rows.close())
        report_types(
            text,
            rows.types,
            choice,
            num_features=rows.num_features,
            num_rows=rows.num_rows,
            lacking=rows.lacking,
        )


def _without_control(feature: Feature) -> Feature:
    if found := _CONTROL.search(feature.contig + feature.name):
        code = ord(found[0])
        problem = f"control character 0x{code:02x} in a name, expected text; the file is binary or damaged"
        raise RegionError(problem, path=feature.path, line=feature.line)
    return feature


def report_types(
    path: str,
    types: Mapping[str, int],
    choice: FeatureChoice,
    *,
    num_features: int,
    num_rows: int | None = None,
    lacking: Mapping[str, int],
) -> None:
    """Log the types of a file and what is read of them; raise if that is nothing."""
    listed = [kind for kind, _ in sorted(types.items(), key=lambda item: (-item[1], item[0]))]
    words = ", ".join(f"{kind} {types[kind]:,}" for kind in listed) or "none"
    if not num_features:
        if choice.types:
            wanted = choice.types[0]
            near = [kind for kind in listed if kind.lower() == wanted.lower()]
            near = near or get_close_matches(wanted, listed, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "set feature to one of them"
            problem = (
                f"no feature has type {' or '.join(map(repr, choice.types))}; there are: {words}; {hint}"
            )
        else:
            problem = f"all rows are the contig itself ({words}); set feature to the type to read them anyway"
        raise RegionError(problem, path=path)
    num_asked = num_features if num_rows is None else num_rows
    for name, number in lacking.items():
        if number == num_asked:
            problem = f"no feature that is read has an attribute {name!r}; correct its name"
            raise RegionError(problem, path=path)
        _LOG.warning("%s: %s of %s have no attribute %r", path, f"{number:,}", f"{num_asked:,}", name)
    for kind in choice.types:
        if kind not in types:
            _LOG.warning("%s: no feature has type %r", path, kind)
    read = f"{num_features:,} features read" if num_features > 1 else "1 feature read"
    read += f", joined from {num_rows:,} rows" if (num_rows or 0) > num_features else ""
    left_out = [kind for kind in listed if not choice.takes(kind)]
    if not choice.types and left_out:
        read += f"; left out as the contig itself: {', '.join(left_out)}"
    if not choice.types and len(listed) - len(left_out) > 1:
        read += "; option feature chooses types"
    _LOG.info("%s: %s by type: %s; %s", path, "features" if num_rows is None else "rows", words, read)


# -------------------------------------------------------------------------------------------------------- BED


class _BedRows:
    """Rows of a BED file, each of which is a feature; the blocks of a row with 12 columns are joined."""

    def __init__(self, path: str, choice: FeatureChoice) -> None:
        self._path = path
        self._joins = choice.join_by != EACH

    def add(self, line: int, columns: list[str]) -> Iterator[Feature]:
        """Read a row."""
        path, columns = self._path, [column.strip() for column in columns]
        if len(columns) < 3:
            problem = (
                f"the row has {len(columns)} column(s), expected chrom, start, end; "
                "separate columns with tabs"
            )
            raise RegionError(problem, path=path, line=line)
        name = columns[3] if len(columns) > 3 and columns[3] != "." else ""
        start, end = _integers(path, line, (columns[1], columns[2]), _EXPECTED_BED)
        if not 0 <= start < end:
            problem = f"start {start} and end {end}, {_EXPECTED_BED}; correct the row"
            raise RegionError(problem, path=path, line=line)
        strand = _strand(path, line, columns[5] if len(columns) > 5 else ".")
        parts = self._blocks(line, columns, start, end, strand)
        if strand == "-":
            parts.reverse()
        if self._joins:
            yield Feature(columns[0], tuple(parts), name, path, line)
            return
        for number, part in enumerate(parts, start=1):
            own = f"{name}_part{number}" if name and len(parts) > 1 else name
            yield Feature(columns[0], (part,), own, path, line)

    def _blocks(self, line: int, columns: list[str], start: int, end: int, strand: Strand) -> list[Stretch]:
        # rows of other kinds have 12 columns as well: two BED rows side by side, with a strand in the last
        if (
            len(columns) < 12
            or columns[11] in _STRANDS
            or not all(_INTEGER.fullmatch(columns[index]) for index in (6, 7, 9))
        ):
            return [Stretch(start, end, strand)]
        expected = (
            "expected as many block sizes and starts as the row says, ascending, from its start to its end"
        )
        texts = [columns[index].rstrip(",").split(",") for index in (10, 11)]
        sizes, starts = ([int(text) if text.isdecimal() else -1 for text in found] for found in texts)
        blocks = [
            Stretch(start + first, start + first + size, strand)
            for first, size in zip(starts, sizes, strict=False)
        ]
        is_sound = (
            len(sizes) == len(starts) == int(columns[9])
            and min(starts) == 0 < min(sizes)
            and blocks[-1].end == end
            and all(before.end <= after.start for before, after in pairwise(blocks))
        )
        if not is_sound:
            problem = (
                f"{columns[9]} blocks, sizes {columns[10]}, starts {columns[11]}: {expected}; correct the "
                "row, or keep its first six columns"
            )
            raise RegionError(problem, path=self._path, line=line)
        return blocks


def _check_bed_choice(path: str, choice: FeatureChoice) -> None:
    given = [
        f"feature is {', '.join(choice.types)}" if choice.types else "",
        f"name_attribute is {choice.name_attribute}" if choice.name_attribute else "",
        f"join_by is {choice.join_by}" if choice.join_by not in (None, EACH) else "",
    ]
    if found := next(filter(None, given), ""):
        problem = f"{found}, but the file is BED, whose rows have no types and no attributes; leave it out"
        raise RegionError(problem, path=path)


# ----------------------------------------------------------------------------------------------- GFF3 and GTF

_GTF_PAIR = re.compile(r'\s*([^\s;="]+)\s+(?:"([^"]*)"|([^\s;"]+))\s*(?:;|$)')
_NAMES = ("ID", "locus_tag", "gene", "Name")
_GENBANK_NAMES = ("locus_tag", "gene", "label", "standard_name", "protein_id")
_IS_CIRCULAR = re.compile(r"(?:^|;)\s*Is_circular=true\s*(?:;|$)", re.IGNORECASE)


class _GffRows:
    """Rows of a GFF3 or GTF file: those of one feature are held until their contig ends."""

    def __init__(self, path: str, choice: FeatureChoice) -> None:
        self.types: Counter[str] = Counter()
        """How many rows there are of each type."""
        self.lacking: Counter[str] = Counter()
        """How many rows that are read lack an attribute that is asked for, by its name."""
        self.num_features = 0
        self.num_rows = 0
        self._path = path
        self._choice = choice
        self._column = self._contig = ""
        self._circular: set[str] = set()
        self._groups: dict[tuple[str, str] | int, list[_Row]] = {}
        # rows of features that are complete: one more, behind another contig's, would not be joined
        self._closed: dict[int, int] = {}

    def add(self, line: int, columns: list[str]) -> Iterator[Feature]:
        """Take a row in, and yield the features of the contig before it."""
        path = self._path
        if len(columns) < 8:
            problem = (
                f"the row has {len(columns)} column(s), expected the 9 of GFF3; separate columns with tabs"
            )
            raise RegionError(problem, path=path, line=line)
        kind = sys.intern(columns[2].strip())
        self.types[kind] += 1
        if columns[0] != self._column:
            yield from self.close(may_go_on=True)
            is_gtf, _ = _read_attributes(" ".join(columns[8:]))  # only GFF3 has letters as %20
            name = columns[0].strip()
            self._column, self._contig = columns[0], sys.intern(name if is_gtf else unquote(name))
        contig = self._contig
        if kind in CONTIG_TYPES and _IS_CIRCULAR.search(columns[-1]):
            self._circular.add(contig)
        if not self._choice.takes(kind):
            return
        columns = [column.strip() for column in columns]
        self.num_rows += 1
        start, end = _one_based(path, line, (columns[3], columns[4]))
        strand = _strand(path, line, columns[6])
        is_gtf, values = _read_attributes(" ".join(columns[8:]))
        self.lacking.update(name for name in self._choice.attributes if not values.get(name))
        keys = self._keys(kind, values, is_gtf=is_gtf)
        product, part = values.get("product", ""), values.get("part", "")
        for key in keys or [""]:
            name = self._name(kind, values, key, is_gtf=is_gtf)
            row = _Row(line, contig, start, end, strand, kind, name, product, part)
            self._groups.setdefault((kind, key) if key else line, []).append(row)

    def _keys(self, kind: str, values: Mapping[str, str], *, is_gtf: bool) -> list[str]:
        """Return what rows of the same feature share; several where a row belongs to several features."""
        wanted = self._choice.join_by
        if wanted not in (None, EACH):
            return _several(values.get(wanted, ""), wanted)
        if is_gtf:
            key = "" if kind == "gene" else values.get("transcript_id", "")
            return [found] if (found := key or values.get("gene_id", "")) else []
        if own := unquote(values.get("ID", "")).strip():
            return [own]
        # TAIR and others give coding sequences no ID: the transcript is what their parts have in common
        return _several(values.get("Parent", ""), "Parent") if kind == "CDS" else []

    def _name(self, kind: str, values: Mapping[str, str], key: str, *, is_gtf: bool) -> str:
        wanted = self._choice.name_attribute
        own = unquote(values.get(wanted, "")).strip() if wanted is not None else ""
        if is_gtf:
            # NCBI's GTF numbers transcripts that have no name
            if key.startswith("unassigned_transcript"):
                key = values.get("gene_id", "") or key
            return self._choice.shown(kind, own or key)
        if own:
            return self._told_apart(kind, own, wanted)
        # a name that is its transcript's is that row's id, too
        shared = self._choice.shown(kind, key)
        if self._choice.join_by not in (None, EACH, "ID") and key:
            return shared
        named = (self._told_apart(kind, unquote(values.get(name, "")).strip(), name) for name in _NAMES)
        return next(filter(None, named), "") or shared

    def _told_apart(self, kind: str, name: str, attribute: str | None) -> str:
        # a gene and its coding sequence have the same locus_tag, but never the same ID
        return name if attribute == "ID" or len(self._choice.types) < 2 else self._choice.shown(kind, name)

    def close(self, *, may_go_on: bool = False) -> Iterator[Feature]:
        """Yield the features of the rows so far, in the order of their first rows."""
        groups, self._groups = self._groups, {}
        for key, rows in groups.items():
            before = 0
            if not isinstance(key, int):
                mark = hash((rows[0].contig, key))
                before = self._closed.get(mark, 0)
                if before and self._choice.join_by != EACH:
                    problem = (
                        f"other rows of {key[0]} {key[1]!r} stand before those of another contig; sort the "
                        "file by contig"
                    )
                    raise RegionError(problem, path=self._path, line=rows[0].line, record_id=key[1])
                if may_go_on:
                    self._closed[mark] = before + len(rows)
            for feature in self._joined(rows, before):
                self.num_features += 1
                yield feature

    def _joined(self, rows: list[_Row], before: int) -> Iterator[Feature]:
        is_split = any(row.strand != rows[0].strand for row in rows)
        parts = [row.part.partition("/")[0] for row in rows]
        has_order = len(rows) > 1 and all(part.isdecimal() for part in parts)
        problem = ""
        ordered = sorted(rows, key=lambda row: (row.start, row.end))
        if is_split and not has_order:
            lines = ", ".join(str(row.line) for row in rows)
            problem = (
                f"its parts are on both strands (lines {lines}), and no attribute 'part' gives their order; "
                f"set join_by='{EACH}' to read each part alone"
            )
        elif has_order:
            # within a part of a trans-spliced feature, exons are in the order of its strand
            direction = {"+": 1, "-": -1}
            ordered = sorted(
                rows, key=lambda row: (int(row.part.partition("/")[0]), direction[row.strand] * row.start)
            )
        else:
            pairs = pairwise(ordered)
            if any(not (first.start < second.start and first.end < second.end) for first, second in pairs):
                # one in the other: not parts of one feature, but features with the same id
                for row in rows:
                    yield self._feature([row], row.name)
                return
            if rows[0].strand == "-":
                ordered.reverse()
        if self._choice.join_by == EACH and before + len(rows) > 1:
            for number, row in enumerate(ordered, start=before + 1):
                yield self._feature([row], f"{row.name}_part{number}" if row.name else "")
            return
        yield self._feature(ordered, rows[0].name, problem=problem, is_ordered=has_order)

    def _feature(
        self, rows: list[_Row], name: str, *, problem: str = "", is_ordered: bool = False
    ) -> Feature:
        first = min(rows, key=lambda row: row.line)
        return Feature(
            first.contig,
            tuple(Stretch(row.start, row.end, row.strand) for row in rows),
            name,
            self._path,
            first.line,
            first.kind,
            unquote(first.product),
            is_circular=first.contig in self._circular,
            is_ordered=is_ordered,
            problem=problem,
        )


def _several(text: str, name: str | None) -> list[str]:
    """Split the values of an attribute that may have several."""
    many = text.split(",") if name in ("Parent", "Alias", "Dbxref", "Note") else [text]
    return [found for value in many if (found := unquote(value).strip())]


def _read_attributes(text: str) -> tuple[bool, dict[str, str]]:
    """Read the attributes of a row, and say whether it is GTF; of one that is there twice, the first counts.

    Example:
        >>> _read_attributes('gene_id "g1"; transcript_id "g1.t1"; exon_number 2;')
        (True, {'gene_id': 'g1', 'transcript_id': 'g1.t1', 'exon_number': '2'})
        >>> _read_attributes("ID=cds-a;Parent=r1,r2;Note=a%3Bb")
        (False, {'ID': 'cds-a', 'Parent': 'r1,r2', 'Note': 'a%3Bb'})
    """
    values: dict[str, str] = {}
    if _GTF_PAIR.match(text):
        for name, quoted, plain in _GTF_PAIR.findall(text):
            values.setdefault(name, quoted or plain)
        return True, values
    if "=" not in text:  # genes and transcripts of BRAKER's GTF: their name and nothing else
        bare = text.strip(" ;")
        return bool(bare) and bare != ".", {"gene_id": bare, "transcript_id": bare} if bare != "." else {}
    for pair in text.split(";"):
        name, _, value = pair.partition("=")
        values.setdefault(name.strip(), value.strip())
    return False, values


def _looks_like_gff(columns: list[str]) -> bool:
    def numbers(first: int) -> bool:
        return all(_INTEGER.fullmatch(column.strip()) for column in columns[first : first + 2])

    # a BED row may have numbers for name and score, where GFF3 has its places, but has them in 2 and 3 too
    return len(columns) >= 8 and numbers(3) and not numbers(1)


def _one_based(path: str, line: int | None, numbers: tuple[str, str]) -> tuple[int, int]:
    first, last = _integers(path, line, numbers, _EXPECTED_ONE_BASED)
    if not 1 <= first <= last:
        problem = f"start {first} and end {last}, {_EXPECTED_ONE_BASED}; correct the region"
        raise RegionError(problem, path=path, line=line)
    return first - 1, last


def _integers(path: str, line: int | None, numbers: tuple[str, str], expected: str) -> tuple[int, int]:
    for number in numbers:
        if not _INTEGER.fullmatch(number):
            problem = f"{number!r} is not a position, {expected}; correct the region"
            raise RegionError(problem, path=path, line=line)
    return int(numbers[0]), int(numbers[1])


def _strand(path: str, line: int | None, text: str) -> Strand:
    strand = _STRANDS.get(text)
    if strand is None:
        problem = f"strand {text!r}, expected '+', '-' or '.'; correct the row"
        raise RegionError(problem, path=path, line=line)
    return strand


# ------------------------------------------------------------------------------------------- GenBank and EMBL


def record_features(
    raw: RawRecord,
    record: SeqRecord,
    choice: FeatureChoice,
    *,
    types: Counter[str],
    lacking: Counter[str],
) -> Iterator[Feature]:
    """Take the chosen features of a GenBank or EMBL record, and count all of them by type."""
    is_circular = record.annotations.get("topology") == "circular"
    for found in record.features:
        types[found.type] += 1
        if not choice.takes(found.type):
            continue
        name = choice.shown(found.type, _qualifier(found, choice.name_attribute))
        feature = Feature(
            raw.id,
            (),
            name,
            raw.path,
            raw.line,
            found.type,
            " ".join(found.qualifiers.get("product", [""])[0].split()),
            is_circular=is_circular,
        )
        parts, problem = _parts(found)
        missing = [name for name in choice.attributes if not found.qualifiers.get(name)]
        if choice.join_by == EACH and len(parts) > 1:
            lacking.update(missing * len(parts))
            for number, part in enumerate(parts, start=1):
                own = f"{name}_part{number}" if name else ""
                yield _without_control(feature._replace(parts=(part,), name=own))
        else:
            lacking.update(missing)
            yield _without_control(feature._replace(parts=parts, problem=problem))


def _qualifier(found: SeqFeature, wanted: str | None) -> str:
    for name in ((wanted,) if wanted else ()) + _GENBANK_NAMES:
        value = found.qualifiers.get(name, [""])[0]
        if value.strip():
            return " ".join(value.split())
    return ""


def _parts(found: SeqFeature) -> tuple[tuple[Stretch, ...], str]:
    """Return the parts of a location as Biopython has them, in the order of the transcript."""
    parts = []
    for part in [] if found.location is None else found.location.parts:
        try:
            start, end = int(part.start), int(part.end)
        except TypeError:  # a position that is only known as '?'
            return (), f"its location {found.location} is not known; correct it"
        if part.ref is not None:
            return (), f"a part of it lies on another record, {part.ref}"
        if start < end:  # not a place between two bases
            parts.append(Stretch(start, end, "-" if part.strand == -1 else "+"))
    return tuple(parts), "" if parts else f"its location {found.location} has no base; leave it out"
