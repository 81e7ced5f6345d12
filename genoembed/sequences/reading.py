"""Files in, clean records out.

Parsing (``formats``, ``regions``), cleaning (``alphabet``) and unique ids (``records``) meet here. Nothing
is dropped or changed without a policy, a count and a log line.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from os import PathLike, fspath
from typing import TYPE_CHECKING, TypeAlias

from Bio.Seq import MutableSeq, Seq, UndefinedSequenceError
from Bio.SeqRecord import SeqRecord

from genoembed.contracts import SequenceRecord
from genoembed.errors import ConfigError, EmptyRecordError
from genoembed.sequences.compression import STDIN, check_readable
from genoembed.sequences.formats import iter_records
from genoembed.sequences.records import (
    CleanedBody,
    IdRegistry,
    InputCounts,
    Policies,
    Span,
    clean_body,
    reverse_complement,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from genoembed.config.choices import (
        DuplicatePolicy,
        EmptyPolicy,
        GapPolicy,
        InvalidPolicy,
        RegionPolicy,
    )
    from genoembed.sequences.compression import InputDigests
    from genoembed.sequences.records import RawRecord

_LOG = logging.getLogger(__name__)

PathInput: TypeAlias = "str | PathLike[str]"
SequenceInput: TypeAlias = "str | bytes | bytearray | Seq | MutableSeq | SeqRecord"
"""A sequence in memory, as callers have it."""


def begin_reading(records: Iterator[SequenceRecord]) -> Iterator[SequenceRecord]:
    """Read the first record at once: what is wrong with the input is said before a model is loaded."""
    return chain(list(islice(records, 1)), records)


def read_sequences(  # noqa: PLR0913 - all that is said about an input
    paths: PathInput | Sequence[PathInput],
    *,
    invalid: InvalidPolicy = "error",
    duplicates: DuplicatePolicy = "error",
    empty: EmptyPolicy = "error",
    gaps: GapPolicy = "error",
    keep_case: bool = False,
    regions: PathInput | Sequence[PathInput] | None = None,
    flank: int = 0,
    feature: str | Sequence[str] | None = None,
    name_attribute: str | None = None,
    join_by: str | None = None,
    bad_regions: RegionPolicy = "error",
    counts: InputCounts | None = None,
    digests: InputDigests | None = None,
) -> Iterator[SequenceRecord]:
    """Read sequences, whole or by region, in constant memory.

    FASTA, FASTQ, GenBank and EMBL, plain or compressed with gzip, bgzip, bzip2, xz or zstd; format and
    compression are recognized by content. Options, file names and region files are checked at once; the
    sequences are read as the iterator is used. SequenceInput are upper-cased and ``U`` becomes ``T``.

    Args:
        paths: One file or several; ``-`` is standard input.
        invalid: SequenceInput outside IUPAC DNA: ``error``, ``skip`` the record, or ``mask`` each to ``N``.
        duplicates: An id seen before in this call: ``error``, or ``suffix`` (``_2``, ``_3`` ...).
        empty: A record without bases: ``error`` or ``skip``.
        gaps: Gap letters ``-``, ``.`` and ``*``: ``error``, or ``strip`` them out.
        keep_case: True leaves lower-case (soft-masked) bases as they are.
        regions: A BED, GFF3 or GTF file, a place such as ``chr1:1001-2000`` (1-based, both ends included), or
            several of these. Needs exactly one FASTA file, plain or bgzip, which is read once to find them.
        flank: Bases on either side of each region that the model sees but pooling does not count.
        feature: Types of features to read, such as ``CDS``: of the region files, or, without ``regions``, of
            files that bring their own (GenBank, EMBL, GFF3 with sequences). None reads all rows of region
            files but those that are the contig itself.
        name_attribute: Attribute that features are named by, such as ``locus_tag``. None: ``ID``,
            ``locus_tag``, ``gene`` or ``Name``, the first that is there; ``transcript_id`` or ``gene_id`` in
            GTF; ``locus_tag``, ``gene`` or ``label`` in GenBank and EMBL.
        join_by: Attribute that the parts of a feature share; ``none`` reads each part alone. None: ``ID`` in
            GFF3, ``transcript_id`` in GTF.
        bad_regions: A region beyond the end of its contig or on none of the file, or with parts on both
            strands in no known order: ``error``, or ``skip`` it.
        counts: Filled in as records are read.
        digests: Filled in with the SHA-256 of each file that was read to its end, region files too.

    Returns:
        Records in input order, or in the order of the regions.

    Raises:
        ConfigError: If options are wrong alone or together.
        InputFileError: If a file is missing or cannot be read.
        SequenceFormatError: If a file is in no known format or is damaged.
        AlphabetError: If a letter is invalid under the policies.
        DuplicateIdError: If an id appears twice and ``duplicates`` is ``error``.
        EmptyRecordError: If a record has no bases and ``empty`` is ``error``.
        RegionError: If a region does not fit the FASTA.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "two.fa")
        ...     _ = path.write_text(">a first one\\nacgu\\n>b\\nAC\\nGT\\n")
        ...     [(r.id, r.sequence, r.flags) for r in read_sequences(path)]
        [('a', b'ACGT', ('upper_cased:4', 'rna')), ('b', b'ACGT', ())]
    """
    policies = Policies(
        invalid=invalid,
        duplicates=duplicates,
        empty=empty,
        gaps=gaps,
        keep_case=keep_case,
        bad_regions=bad_regions,
    )
    names = file_names(paths)
    places = None if regions is None else file_names(regions)
    types = (
        () if feature is None else (feature,) if isinstance(feature, str) else tuple(dict.fromkeys(feature))
    )
    _check_options(names, places, flank, types)
    for name in names:
        check_readable(name)
    tally = InputCounts() if counts is None else counts
    tally.files += len(names)
    raw: Iterator[RawRecord]
    if places is None and not types:
        raw = chain.from_iterable(iter_records(name, digests=digests) for name in names)
    else:
        from genoembed.sequences.regions import region_reader

        reader = region_reader(
            types,
            name_attribute=name_attribute,
            join_by=join_by,
            flank=flank,
            policy=bad_regions,
            counts=tally,
            digests=digests,
        )
        raw = reader.iter_regions(names, places)
    return _finish(raw, policies, tally)


def file_names(paths: PathInput | Iterable[PathInput]) -> list[str]:
    """List what was given as one file name or several."""
    many = [paths] if isinstance(paths, str | PathLike) else list(paths)
    return [fspath(path) for path in many]


def _check_options(names: list[str], places: list[str] | None, flank: int, types: tuple[str, ...]) -> None:
    problems = []
    if not names:
        problems.append("no input file; name at least one, or '-' for standard input")
    if names.count(STDIN) > 1:
        problems.append("standard input '-' is named twice, but can be read once; name it once")
    if flank < 0:
        problems.append(f"flank is {flank}; set flank to 0 or more")
    if places is None and flank > 0 and not types:
        problems.append(
            f"flank is {flank}, but there are no regions to flank; set regions or leave flank at 0"
        )
    if places is not None:
        if not places:
            problems.append("regions is empty; name a BED or GFF3 file, or a place such as chr1:1001-2000")
        if len(names) > 1:
            problems.append(
                f"regions needs one FASTA file, but {len(names)} are given; join them or run one by one"
            )
        if STDIN in names:
            problems.append(
                "regions needs a FASTA file to look them up in, but the input is '-'; save it to a file first"
            )
    if problems:
        raise ConfigError(*problems)


def _finish(
    raw_records: Iterable[RawRecord], policies: Policies, counts: InputCounts
) -> Iterator[SequenceRecord]:
    ids = IdRegistry(policies.duplicates)
    for raw in raw_records:
        record = clean_record(raw, policies=policies, ids=ids, counts=counts)
        if record is not None:
            yield record
    _LOG.info("input: %s", counts)


_ONE_SEQUENCE = (str, bytes, bytearray, memoryview, Seq, MutableSeq, SeqRecord, SequenceRecord)


def list_sequences(sequences: object, name: str = "sequences") -> list[object]:
    """List sequences that are in memory; refuse what would be taken for other ones when it is gone through.

    Example:
        >>> list_sequences("ACGT")
        Traceback (most recent call last):
        ...
        genoembed.errors.ConfigError: sequences is one sequence, expected a list of them; put it into a list
    """
    kind = type(sequences).__name__
    if isinstance(sequences, _ONE_SEQUENCE):
        message = f"{name} is one sequence, expected a list of them; put it into a list"
    elif isinstance(sequences, set | frozenset):
        message = f"{name} is a {kind}, which has no order for the rows; give a list of sequences"
    elif isinstance(sequences, Mapping):
        message = f"{name} is a {kind}, which has names and sequences; give the sequences alone, as a list"
    elif getattr(sequences, "ndim", 1) != 1:
        shape = getattr(sequences, "shape", "?")
        message = f"{name} has shape {shape}, expected (N,): one sequence per row; pass one column"
    # tables of pandas, polars, Arrow and datasets: some are gone through by names of columns, some by rows
    elif hasattr(sequences, "columns") or hasattr(sequences, "column_names"):
        message = f"{name} is a {kind}, expected a list of sequences; pass one column"
    elif not isinstance(sequences, Iterable):
        message = f"{name} is {kind}, expected a list of sequences; give one"
    else:
        return list(sequences)
    raise ConfigError(message)


def sequence_letters(sequence: object, place: str) -> bytes:
    """Return the letters of a sequence that is in memory, as they are given."""
    if isinstance(sequence, SeqRecord):
        sequence = sequence.seq
    if isinstance(sequence, str):
        # what is not ASCII is invalid, and one letter for the error to point at
        return sequence.encode("ascii", "replace")
    if isinstance(sequence, bytes | bytearray | Seq | MutableSeq):
        try:
            return bytes(sequence)
        except UndefinedSequenceError:
            message = f"{place} has a length but no letters; give a sequence with letters"
            raise ConfigError(message) from None
    message = (
        f"{place} is {type(sequence).__name__}, expected letters as str, bytes, Seq or SeqRecord; give those"
    )
    raise ConfigError(message)


def clean_record(
    raw: RawRecord, *, policies: Policies, ids: IdRegistry, counts: InputCounts
) -> SequenceRecord | None:
    """Apply the policies to one parsed record: letters first, then emptiness, then its id."""
    cleaned = clean_body(raw, policies)
    if cleaned is None:
        counts.skipped_invalid += 1
        _LOG.info("%s:%s: record %r skipped: letters outside the alphabet", raw.path, raw.line, raw.id)
        return None
    pieces = cleaned.pieces
    # a chromosome is mostly one piece: join would copy it
    sequence = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    left, num_bases = (0, len(sequence)) if raw.span is None else (len(pieces[0]), len(pieces[1]))
    if num_bases == 0:
        if policies.empty == "error":
            problem = "has no bases; set empty='skip' or remove it"
            raise EmptyRecordError(problem, path=raw.path, line=raw.line, record_id=raw.id)
        counts.skipped_empty += 1
        _LOG.info("%s:%s: record %r skipped: no bases", raw.path, raw.line, raw.id)
        return None
    # only now: a record that is left out does not take its id from a later one
    name = ids.admit(raw.id, path=raw.path, line=raw.line)
    # parsed, flanked and stripped on the forward strand, so that places count as in the file; turned last
    span = raw.span or Span(raw.id, 0, num_bases, "+", ())
    if cleaned.stripped:
        span = span.without(cleaned.stripped)
    if span.strand == "-":
        sequence, left = reverse_complement(sequence), len(sequence) - left - num_bases
    _count(cleaned, counts, num_bases=len(sequence), is_renamed=name != raw.id)
    return SequenceRecord(
        id=name,
        sequence=sequence,
        description=raw.description,
        contig=name if raw.span is None else span.contig,
        source=raw.source,
        line=raw.line,
        start=span.start,
        end=span.end,
        strand=span.strand,
        stretches=() if span.is_one_stretch and not cleaned.stripped else span.stretches,
        core_start=left,
        core_end=left + num_bases,
        flags=_flags(cleaned, is_renamed=name != raw.id),
    )


def _flags(cleaned: CleanedBody, *, is_renamed: bool) -> tuple[str, ...]:
    found = {
        f"masked:{cleaned.masked}": cleaned.masked,
        f"gaps:{cleaned.gaps}": cleaned.gaps,
        "renamed": is_renamed,
        f"upper_cased:{cleaned.upper_cased}": cleaned.upper_cased,
        "rna": cleaned.rna,
    }
    return tuple(flag for flag, count in found.items() if count)


def _count(cleaned: CleanedBody, counts: InputCounts, *, num_bases: int, is_renamed: bool) -> None:
    counts.records += 1
    counts.bases += num_bases
    counts.upper_cased += cleaned.upper_cased
    counts.rna_to_dna += cleaned.rna
    counts.masked_bases += cleaned.masked
    counts.masked_records += cleaned.masked > 0
    counts.gaps_stripped += cleaned.gaps
    counts.renamed += is_renamed
