"""Every change of a single base of some records: a table, a matrix and a picture of what they do.

``read -> all changes of each base -> alleles -> table, matrix, heat map``. Promised: the numbers are those of
``score_variants`` for the same changes; all is read and checked before the model is loaded; all outputs
appear whole or not at all.

P positions of a record.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from genoembed._version import __version__
from genoembed.atomic import replacing, reporting_writes
from genoembed.config.fields import named_options
from genoembed.config.paths import STANDARD_STREAM, check_paths, path_strings
from genoembed.config.score import DEFAULT_FLANK, MutationConfig
from genoembed.errors import ConfigError, EmptyRecordError, RegionError
from genoembed.pipeline.request import use_threads
from genoembed.pipeline.table_parts import keeping_units
from genoembed.scoring.alleles import (
    LIKELIHOOD,
    MARGINAL,
    PSEUDO,
    Compared,
    allele_unit,
    build_allele_scorer,
    compare_part,
    failed_allele,
    iter_parts,
)
from genoembed.scoring.heat_map import MOST_LINES, draw_heat_map, num_lines
from genoembed.scoring.scorer import run_options
from genoembed.sequences import InputCounts, read_sequences
from genoembed.sequences.compression import InputDigests
from genoembed.sequences.records import contig_places, reverse_complement
from genoembed.sequences.variants import iter_substitutions
from genoembed.store.mutation_map import MAP_BASES, NO_METHOD, MutationMap, open_mutation_maps
from genoembed.store.tables import open_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from genoembed.contracts import SequenceRecord
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.pipeline.units import RunStats
    from genoembed.scoring.alleles import Allele
    from genoembed.scoring.scorer import SequenceScorer
    from genoembed.store.tables import TableWriter


logger = logging.getLogger(__name__)

_POLICIES = (
    *("invalid", "duplicates", "empty", "gaps", "keep_case"),
    *("feature", "name_attribute", "join_by", "bad_regions"),
)
METHOD_NAMES = ("none", LIKELIHOOD, PSEUDO, MARGINAL)
"""By their numbers in the file of the matrix."""


class MutationScore(NamedTuple):
    """One row of the table: a change of one base. All but ``id`` and ``strand`` is as for variants."""

    chrom: str
    """The contig, or the record where whole records are read."""
    pos: int
    """1-based, on the contig's forward strand, as are ``ref`` and ``alt``."""
    id: str
    """The record or region."""
    ref: str
    alt: str
    strand: str
    """Which strand the model read; with ``rc='mean'`` both."""
    window_start: int
    """First base of the stretch that the model sees, 0-based."""
    window_end: int
    """One past its last base."""
    ref_log_likelihood: float
    """Sum over the stretch as it is; masked-marginal: the hidden word with its base."""
    alt_log_likelihood: float
    """Sum over the stretch with the change; masked-marginal: the hidden word with the other base."""
    delta: float
    """``alt_log_likelihood - ref_log_likelihood``: below 0, the model prefers the reference."""
    delta_mean: float
    """The same of the means a scored base."""
    start_token: str
    """Id of the token before the stretch, or ``none``."""
    method: str
    """``likelihood``, ``masked-marginal`` or ``pseudo-likelihood``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MutationReport:
    """What a run did."""

    output: str | None
    """The table; ``-`` is standard output; None where rows were requested."""
    matrix: str | None
    """The HDF5 file of the scores."""
    heat_map: str | None
    """The picture."""
    rows: tuple[MutationScore, ...]
    """The table's rows, where no output was named; else empty."""
    num_rows: int
    """Changes: three for each position that has any."""
    num_positions: int
    num_records: int
    skipped: int
    """Positions that are not A, C, G or T, and have no changes."""
    methods: Mapping[str, int]
    """How many changes were compared in which way."""
    start_token: str
    """Id of the token before each stretch's first base, or ``none``."""
    failed: Mapping[str, str]
    """Changes without numbers, by ``contig:pos:ref>alt``: why."""
    counts: InputCounts
    """What was read, and what the input policies did."""
    stats: RunStats
    """What the forward passes cost."""
    seconds: float
    """Wall time, without loading the model."""


@named_options(MutationConfig)
def score_mutations(
    inputs: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    regions: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
    model: str | PathLike[str] | GenomicModel = "genoembed-mini",
    output: str | PathLike[str] | None = None,
    matrix: str | PathLike[str] | None = None,
    heat_map: str | PathLike[str] | None = None,
    flank: int = DEFAULT_FLANK,
    overwrite: bool = False,
    progress: Callable[[RunStats], None] | None = None,
    **options: Any,
) -> MutationReport:
    """Score every change of a single base of sequences, or of regions of them.

    Each of the three other bases in the place of each A, C, G and T is an allele, and is compared as in
    :func:`~genoembed.score_variants`, in a stretch of ``flank`` bases on either side. Columns of the table
    are the fields of :class:`~genoembed.scoring.mutagenesis.MutationScore`.

    Args:
        inputs: Sequence files in any format of ``extract``; ``-`` is standard input. All are held in memory.
        regions: A BED or GFF3 file, a place such as ``chr1:1001-1300``, or several: only their bases are
            changed. A region on the reverse strand is read there; its rows have the places and letters of the
            forward strand all the same.
        model: Name or folder of a causal or masked model, or one that is loaded already.
        output: The table; ``-`` is standard output. None writes none and gives the rows in the report.
        matrix: HDF5 file of ``delta``, float32, one row per position and one column per base: 0 at the
            reference's base, NaN where there is no score. AnnData reads it.
        heat_map: Picture of the matrix (PNG).
        flank: Bases on either side of a change, as far as the contig has them.
        overwrite: Replace existing files, once the new ones are complete.
        progress: Called with the running totals after each forward pass.
        **options: ``rc``, ``start_token``, ``on_error``, ``revision``, ``trust_remote_code``, ``dtype``
            (float32), ``fp8``, ``device``, ``threads``, ``batch_tokens``; and ``feature``,
            ``name_attribute``, ``join_by``, ``bad_regions``, ``invalid``, ``duplicates``, ``empty``,
            ``gaps``, ``keep_case``, as for ``extract``.

    Returns:
        What was done.

    Raises:
        ConfigError: If options are wrong, alone or together.
        ModelError: If the model has no head to predict tokens with, or sees both sides and has no mask token.
        GenoembedError: If input, model or output fail; outputs are then as they were before, and what was
            scored is kept for the next run of the same call.
    """
    policies = {
        name: options.pop(name) for name in _POLICIES if name in options and options[name] is not None
    }
    run = run_options(model, options, call=MutationConfig)
    run.check()
    places = path_strings(regions)
    table, matrix_file, picture = (
        None if path is None else fspath(path) for path in (output, matrix, heat_map)
    )
    MutationConfig.build({"flank": flank, "regions": places, "heat_map": picture, **policies})
    check_paths(
        path_strings(inputs),
        [(table, "table"), (matrix_file, "hdf5"), (picture, "picture")],
        may_read=[model] if isinstance(model, str | PathLike) else [],
        places=places,
        overwrite=overwrite,
    )
    counts, digests = InputCounts(), InputDigests()
    records = list(
        read_sequences(
            inputs,
            regions=places or None,
            flank=flank if places or policies.get("feature") else 0,
            counts=counts,
            digests=digests,
            **policies,
        )
    )
    maps = {record.id: _empty_map(record) for record in records}
    num_positions = sum(len(found.reference) for found in maps.values())
    skipped = num_positions - sum(
        found.reference.count(base) for found in maps.values() for base in MAP_BASES
    )
    if skipped == num_positions:
        problem = f"no base A, C, G or T is there to change ({counts}); check the input"
        raise EmptyRecordError(problem, path=", ".join(path_strings(inputs)))
    if picture is not None:
        _check_lines([len(found.reference) for found in maps.values()])
    with ExitStack() as stack:
        stack.enter_context(use_threads(run.threads))
        files = [name for name in (table, matrix_file, picture) if name not in (None, STANDARD_STREAM)]
        kept = stack.enter_context(keeping_units(files[0] if files else None))
        # before the model is loaded: a second process with the same output is refused at once
        outputs = _Outputs(stack, table, matrix_file, picture, maps, overwrite=overwrite)
        run = replace(run, dtype=kept.dtype(run.dtype))
        scorer = build_allele_scorer(run, None, "mean", progress)
        kept.begin(
            lambda: {**scorer.identity(), "changes": "all single bases"},
            policies={**policies, "on_error": run.on_error},
            stats=scorer.stats,
            drop_other=overwrite,
        )
        started = time.perf_counter()
        contexts = (found for record in records for found in iter_substitutions(record, flank=flank))
        for number, part in enumerate(iter_parts(contexts, scorer)):
            values = kept.take(allele_unit(number, part), partial(compare_part, part, scorer))
            for allele, value in zip(part, values, strict=True):
                outputs.add(allele, value, scorer)
        outputs.finish(
            {
                "inputs": [digests.facts(name) for name in path_strings(inputs)],
                "regions": [digests.facts(name) for name in places],
                "config": {"flank": flank, "rc": run.rc, **policies},
                "counts": asdict(counts),
            },
            scorer,
        )
    if skipped:
        logger.warning("%d positions were skipped: their letter is not A, C, G or T", skipped)
    return MutationReport(
        output=table,
        matrix=matrix_file,
        heat_map=picture,
        rows=tuple(outputs.rows),
        num_rows=outputs.num_rows,
        num_positions=num_positions,
        num_records=len(maps),
        skipped=skipped,
        methods=dict(outputs.methods),
        start_token=str(scorer.start_token),
        failed=kept.failed,
        counts=counts,
        stats=scorer.stats,
        seconds=time.perf_counter() - started,
    )


def _empty_map(record: SequenceRecord) -> MutationMap:
    """Make the map of a record before anything is scored: its own bases have 0, all else nothing."""
    pooled = slice(record.core_start, record.core_end)
    found = contig_places(record)
    places, is_turned = found.places[pooled], found.is_turned[pooled]
    if len(np.unique(places)) < len(places):
        problem = (
            "its parts overlap, so that a base of the contig is in it twice and has no change of its own; "
            "set join_by='none'"
        )
        raise RegionError(problem, path=record.source, line=record.line, record_id=record.id)
    core = record.sequence[pooled].upper()
    other = reverse_complement(core)[::-1]
    letters = np.where(is_turned, np.frombuffer(other, np.uint8), np.frombuffer(core, np.uint8))
    if record.strand == "-":
        letters, places = letters[::-1], places[::-1]
    reference = letters.tobytes()
    is_own_P4 = np.frombuffer(reference, np.uint8)[:, None] == np.frombuffer(MAP_BASES.encode(), np.uint8)
    return MutationMap(
        record=record.id,
        contig=record.contig,
        start=record.start,
        strand=record.strand,
        reference=reference.decode("ascii"),
        delta_P4=np.where(is_own_P4, np.float32(0), np.float32(np.nan)),
        method_P4=np.full(is_own_P4.shape, NO_METHOD, np.uint8),
        joined_P=places if record.stretches else None,
    )


def _check_lines(lengths: Sequence[int]) -> None:
    """Raise if a picture would be taller than programs show, before anything is scored."""
    lines = num_lines(lengths)
    if lines > MOST_LINES:
        message = (
            f"heat_map would have {lines:,} lines for {sum(lengths):,} positions, and {MOST_LINES} is the "
            "most; leave heat_map out and draw parts of the matrix, or set regions"
        )
        raise ConfigError(message)


class _Outputs:
    """The table, or rows in memory; the matrix and the picture, if they are requested."""

    def __init__(
        self,
        stack: ExitStack,
        table: str | None,
        matrix: str | None,
        picture: str | None,
        maps: Mapping[str, MutationMap],
        *,
        overwrite: bool,
    ) -> None:
        self.rows: list[MutationScore] = []
        self.num_rows = 0
        self.methods: Counter[str] = Counter()
        self._maps = maps
        self._rows_of: dict[str, dict[int, int]] = {
            name: {int(place): row for row, place in enumerate(found.joined_P)}
            for name, found in maps.items()
            if found.joined_P is not None
        }
        self._writer: TableWriter | None = None
        self._write_maps: Callable[..., None] | None = None
        self._part: Path | None = None
        self._picture = picture
        if table is not None:
            self._writer = stack.enter_context(open_table(table, MutationScore._fields, overwrite=overwrite))
        if matrix is not None:
            self._write_maps = stack.enter_context(open_mutation_maps(matrix, overwrite=overwrite))
        if picture is not None:
            self._part = stack.enter_context(replacing(picture, overwrite=overwrite))

    def add(self, allele: Allele, value: Sequence[Any] | str, scorer: SequenceScorer) -> None:
        """Write or keep the row of a change; text says why it failed."""
        self.num_rows += 1
        compared = failed_allele(allele) if isinstance(value, str) else Compared(*value)
        found = self._maps[allele.context.variant.id]
        row = _row(allele, compared, found, start_token=str(scorer.start_token))
        if self._writer is None:
            self.rows.append(row)
        else:
            self._writer.write(row)
        if not math.isnan(row.delta):
            rows = self._rows_of.get(found.record)
            position = row.pos - 1 - found.start if rows is None else rows[row.pos - 1]
            place = position, MAP_BASES.index(row.alt)
            found.delta_P4[place] = row.delta
            found.method_P4[place] = METHOD_NAMES.index(row.method)
            self.methods[row.method] += 1

    def finish(self, facts: Mapping[str, Any], scorer: SequenceScorer) -> None:
        """Write the matrix and the picture; the table is complete when its stack ends."""
        maps = list(self._maps.values())
        if self._write_maps is not None:
            self._write_maps(
                maps,
                METHOD_NAMES,
                {
                    "genoembed_version": __version__,
                    "kind": "changes of single bases, alt - ref",
                    "model": dict(scorer.model.model.provenance),
                    "start_token": str(scorer.start_token),
                    **facts,
                },
            )
        if self._part is not None and self._picture is not None:
            config = facts["config"]
            strands = "both strands" if config["rc"] == "mean" else "one strand"
            notes = [
                scorer.model.model.name,
                f"flanks of {config['flank']:,} bases",
                strands,
                *(f"{number:,} by {name}" for name, number in self.methods.items() if name != LIKELIHOOD),
            ]
            drawn = draw_heat_map(maps, notes)
            with reporting_writes(self._picture):
                self._part.write_bytes(drawn)


def _row(allele: Allele, compared: Compared, found: MutationMap, *, start_token: str) -> MutationScore:
    context = allele.context
    return MutationScore(
        chrom=context.variant.contig,
        pos=context.variant.position,
        id=context.variant.id,
        ref=context.variant.ref,
        alt=context.variant.alt,
        strand=found.strand,
        window_start=context.start,
        window_end=context.end,
        ref_log_likelihood=compared.ref_total,
        alt_log_likelihood=compared.alt_total,
        delta=compared.alt_total - compared.ref_total,
        delta_mean=compared.alt_mean - compared.ref_mean,
        start_token=start_token,
        method=compared.method,
    )
