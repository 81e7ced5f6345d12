"""Regions and features as raw records: stretches of contigs, joined and with flanks.

In: one FASTA file and features of region files, or files that bring their own features. Out: raw records of
three pieces, left flank, region and right flank, as on the forward strand; ``reading`` cleans and turns them.
Parts are joined in the order in which the feature is read; on a circular contig, features and flanks go on
beyond the origin. What cannot be read is an error or is left out and counted, as the policy says.
"""

from __future__ import annotations

import logging
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genoembed.config.paths import check_paths, is_place
from genoembed.contracts import Stretch
from genoembed.errors import ConfigError, RegionError
from genoembed.sequences.annotation import EACH, FeatureChoice, iter_features, record_features, report_types
from genoembed.sequences.compression import STDIN, check_readable
from genoembed.sequences.contigs import FastaContigs, RecordContigs
from genoembed.sequences.formats import feature_format, iter_annotated
from genoembed.sequences.records import RawRecord, Span, reverse_complement

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from genoembed.config.choices import RegionPolicy
    from genoembed.sequences.annotation import Feature
    from genoembed.sequences.compression import InputDigests
    from genoembed.sequences.contigs import Contigs
    from genoembed.sequences.records import InputCounts

_LOG = logging.getLogger(__name__)


def region_reader(
    types: tuple[str, ...], *, name_attribute: str | None, join_by: str | None, **options: Any
) -> RegionReader:
    """Build a reader of the features that are chosen."""
    choice = FeatureChoice(types=types, name_attribute=name_attribute, join_by=join_by)
    return RegionReader(choice, **options)


class RegionReader:
    """Reads regions or features; what cannot be read follows a policy."""

    def __init__(
        self,
        choice: FeatureChoice,
        *,
        flank: int,
        policy: RegionPolicy,
        counts: InputCounts,
        digests: InputDigests | None,
    ) -> None:
        self._choice = choice
        self._flank = flank
        self._policy = policy
        self._counts = counts
        self._digests = digests

    def iter_regions(self, names: Sequence[str], places: Sequence[str] | None) -> Iterator[RawRecord]:
        """Check the files, and read regions of the one FASTA file, or without any the files' own features."""
        if places is not None:
            for place in places:
                check_paths(places=[place])
                if not is_place(place):
                    check_readable(place)
                elif self._choice.types:
                    wanted = ", ".join(self._choice.types)
                    message = (
                        f"feature is {wanted}, but the place {place!r} has no type; leave one of them out"
                    )
                    raise ConfigError(message)
            return self._of_fasta(names[0], places)
        for name in names:
            if Path(name).is_file():  # a pipe is looked at when it is read
                feature_format(name)
        return chain.from_iterable(map(self._of_file, names))

    def _of_fasta(self, path: str, places: Sequence[str]) -> Iterator[RawRecord]:
        with FastaContigs(path, digests=self._digests) as contigs:
            for place in places:
                for feature in iter_features(place, self._choice, digests=self._digests):
                    yield from self._cut(contigs, feature)

    def _of_file(self, path: str) -> Iterator[RawRecord]:
        """Fetch the features that a GenBank, EMBL or GFF3 file with sequences has itself."""
        if path != STDIN and Path(path).is_file() and feature_format(path) == "GFF3":
            yield from self._of_fasta(path, [path])
            return
        if self._choice.join_by not in (None, EACH):
            problem = (
                f"join_by is {self._choice.join_by}, but the locations of GenBank and EMBL say what is "
                f"joined; leave it out, or set join_by='{EACH}'"
            )
            raise RegionError(problem, path=path)
        types: Counter[str] = Counter()
        lacking: Counter[str] = Counter()
        num_features = 0
        for raw, record in iter_annotated(path, digests=self._digests):
            contigs = RecordContigs(path, raw.id, bytes(record.seq))
            for feature in record_features(raw, record, self._choice, types=types, lacking=lacking):
                num_features += 1
                yield from self._cut(contigs, feature)
        report_types(path, types, self._choice, num_features=num_features, lacking=lacking)

    def _cut(self, contigs: Contigs, feature: Feature) -> Iterator[RawRecord]:
        """Fetch a feature with its flanks, unless it cannot be read and the policy is to leave it out."""
        length = contigs.length(feature.contig)
        reason = feature.problem or _misfit(contigs, feature, length)
        if reason and self._policy == "skip":
            self._counts.skipped_regions += 1
            _LOG.info("%s:%s: region %r skipped: %s", feature.path, feature.line, feature.name, reason)
            return
        if reason or length is None:
            if length is not None:
                reason += ", or set bad_regions='skip'"
            raise RegionError(reason, path=feature.path, line=feature.line, record_id=feature.name or None)
        yield _fetch(contigs, feature, length, self._flank)


def _misfit(contigs: Contigs, feature: Feature, length: int | None) -> str:
    """Say why a feature cannot be fetched; empty if it can."""
    if length is None:
        return contigs.no_such(feature.contig)
    for start, end, _ in feature.parts:
        if end <= length or (feature.is_circular and end - start <= length and end <= 2 * length):
            continue
        problem = f"end {end} is beyond contig {feature.contig!r} of {length} bases; "
        if feature.is_circular:
            return problem + "on a circular contig a feature goes round once at most; correct it"
        return problem + "correct it, or give the FASTA that the regions were made for"
    return ""


def _fetch(contigs: Contigs, feature: Feature, length: int, flank: int) -> RawRecord:
    parts = _in_contig(feature, length)
    strand = parts[0].strand
    start, end = _extent(parts, length, is_circular=feature.is_circular)
    before, after = _flanks(parts, end - start, length, flank, is_circular=feature.is_circular)
    # in the order of the forward strand: cleaning turns the whole record if it is read on the other
    pieces = [before, parts, after][:: 1 if strand == "+" else -1]
    bodies = [
        b"".join(
            _letters(contigs, feature.contig, part, strand) for part in piece[:: 1 if strand == "+" else -1]
        )
        for piece in pieces
    ]
    return RawRecord(
        id=feature.name or feature.place,
        description=_description(feature),
        path=feature.path,
        source=contigs.path,
        line=feature.line,
        body=iter([(body, None) for body in bodies]),
        span=Span(feature.contig, start, end, strand, (*before, *parts, *after)),
    )


def _letters(contigs: Contigs, contig: str, part: Stretch, strand: str) -> bytes:
    letters = contigs.fetch(contig, part.start, part.end)
    return letters if part.strand == strand else reverse_complement(letters)


def _description(feature: Feature) -> str:
    words = [feature.place if feature.name else "", feature.kind, feature.product]
    return " ".join(filter(None, words))


def _in_contig(feature: Feature, length: int) -> tuple[Stretch, ...]:
    """Return the parts of a feature in reading order, none of them beyond the contig's end."""
    parts = [piece for part in feature.parts for piece in _pieces(part, length)]
    if not feature.is_circular or feature.is_ordered or len(feature.parts) < 2:
        return tuple(parts)
    # a row that lies beyond the origin as a whole says itself that it follows the others
    if any(part.start >= length for part in feature.parts):
        return tuple(parts)
    forward = sorted(parts)
    if forward[0].start != 0 or max(part.end for part in parts) != length:
        return tuple(parts)
    # rows that meet at the origin, or one that goes over it: the feature begins behind the largest gap
    gaps = [after.start - before.end for before, after in pairwise(forward)]
    cut = gaps.index(max(gaps)) + 1
    forward = forward[cut:] + forward[:cut]
    return tuple(forward[:: 1 if feature.strand == "+" else -1])


def _pieces(part: Stretch, length: int) -> list[Stretch]:
    """Cut a stretch where it goes over the origin of a circular contig; in reading order."""
    start, end, strand = part
    if 0 <= start and end <= length:
        return [part] if start < end else []
    turns = start // length * length
    start, end = start - turns, end - turns
    pieces = [Stretch(start, min(end, length), strand)]
    if end > length:
        pieces.append(Stretch(0, end - length, strand))
    return pieces[:: 1 if strand == "+" else -1]


def _extent(parts: Sequence[Stretch], length: int, *, is_circular: bool) -> tuple[int, int]:
    """Return the first base of a feature and one past its last, introns and all.

    The end of one that goes over the origin is beyond the contig's length, as GFF3 writes it.
    """
    forward = parts[:: 1 if parts[0].strand == "+" else -1]
    if is_circular and all(part.strand == parts[0].strand for part in parts):
        steps = [after.start < before.start for before, after in pairwise(forward)]
        end = forward[-1].end + length
        if sum(steps) == 1 and end - forward[0].start <= length:
            return forward[0].start, end
    return min(part.start for part in parts), max(part.end for part in parts)


def _flanks(
    parts: Sequence[Stretch], extent: int, length: int, flank: int, *, is_circular: bool
) -> tuple[list[Stretch], list[Stretch]]:
    """Return what lies before the first part and after the last, each in reading order."""
    first, last = parts[0], parts[-1]
    # on a circle, no base is shown twice: both flanks share what the feature leaves
    rest = length - extent
    upstream, downstream = (flank, flank)
    if is_circular and 2 * flank > rest:
        upstream, downstream = rest - rest // 2, rest // 2
    before = _beside(first, upstream, length, at_start=first.strand == "+", is_circular=is_circular)
    after = _beside(last, downstream, length, at_start=last.strand == "-", is_circular=is_circular)
    return before, after


def _beside(part: Stretch, flank: int, length: int, *, at_start: bool, is_circular: bool) -> list[Stretch]:
    start, end = (part.start - flank, part.start) if at_start else (part.end, part.end + flank)
    if not is_circular:
        start, end = max(0, start), min(length, end)
    return _pieces(Stretch(start, end, part.strand), length)
