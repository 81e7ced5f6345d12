"""What variants change in the eyes of a causal model: VCF and reference in, a table out.

Both alleles of a variant are seen in the same stretch of the contig. Promised: REF is checked, changes are
left-aligned, nothing is cut off, and alleles that cannot be scored are counted.

From the scores of both alleles to a row, and from their vectors to a file of differences.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from genoembed._version import __version__
from genoembed.config.fields import named_options
from genoembed.config.paths import check_paths
from genoembed.config.score import DEFAULT_FLANK, VariantConfig
from genoembed.contracts import EmbeddingBlock, ObsRow, SequenceRecord
from genoembed.errors import ConfigError, VariantError
from genoembed.pipeline.request import use_threads
from genoembed.scoring.scorer import ScorerOptions, SequenceScorer
from genoembed.scoring.setup import run_options, warn_of_precision
from genoembed.sequences.records import IdRegistry
from genoembed.sequences.variants import VariantCounts, read_variants
from genoembed.store import EmbeddingWriter
from genoembed.store.tables import open_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from genoembed.config.choices import ScorePooling, UnsupportedPolicy
    from genoembed.contracts import VariantContext
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.pipeline.units import RunStats
    from genoembed.scoring.scorer import StrandScore
    from genoembed.scoring.setup import RunOptions
    from genoembed.store.tables import TableWriter


logger = logging.getLogger(__name__)

_PART_BASES = 1 << 18
"""Bases whose scores are in memory together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantReport:
    """What a run did."""

    output: str | None
    """The table; ``-`` is standard output; None where rows were requested."""
    vectors: str | None
    """The HDF5 file of differences of vectors."""
    rows: tuple[VariantScore, ...]
    """The table's rows, where no output was named; else empty."""
    num_rows: int
    layer: str | None
    """Module path of the layer that vectors come from."""
    start_token: str
    """Id of the token before each stretch's first base, or ``none``."""
    counts: VariantCounts
    """What was read, and what was skipped."""
    stats: RunStats
    """What the forward passes cost."""
    seconds: float
    """Wall time, without loading the model."""


@named_options(VariantConfig)
def score_variants(
    vcf: str | PathLike[str],
    reference: str | PathLike[str],
    *,
    model: str | PathLike[str] | GenomicModel = "genoembed-mini",
    output: str | PathLike[str] | None = None,
    flank: int = DEFAULT_FLANK,
    unsupported: UnsupportedPolicy = "skip",
    layer: int | str | None = None,
    pooling: ScorePooling = "mean",
    vectors: str | PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Callable[[RunStats], None] | None = None,
    **options: Any,
) -> VariantReport:
    """Score the alleles of a VCF against the reference.

    For each allele the log-likelihood of the stretch of ``flank`` bases on either side is taken with the
    reference's bases and with the allele's. With ``layer`` both are embedded as well, in the same pass.
    Columns of the table are the fields of :class:`~genoembed.scoring.variants.VariantScore`; those of
    vectors are left out without ``layer``.

    Args:
        vcf: Plain or compressed; ``-`` is standard input.
        reference: FASTA that the VCF was called against, plain or bgzip; its index is written next to it.
        model: Name or folder of a causal model, or one that is loaded already.
        output: The table; ``-`` is standard output. None writes none and gives the rows in the report.
        flank: Bases on either side of a change, as far as the contig has them.
        unsupported: Alleles without a sequence (symbolic, breakends, ``*``, ``.``): ``skip``, counted, or
            ``error``.
        layer: Where vectors are taken: block number, module path or ``final``.
        pooling: ``mean``, ``max`` or ``last``, over the bases of the stretch.
        vectors: HDF5 file for the differences of vectors, alt - ref, one row per allele; needs ``layer``.
        overwrite: Replace existing files, once the new ones are complete.
        progress: Called with the running totals after each forward pass.
        **options: ``rc``, ``start_token``, ``revision``, ``trust_remote_code``, ``dtype`` (float32),
            ``device``, ``threads`` and ``batch_tokens``, as for ``score``.

    Returns:
        What was done.

    Raises:
        ConfigError: If options are wrong, alone or together.
        VariantError: If a row is malformed or does not fit the reference or the model's context.
        ModelError: If the model is not causal, or has no next-token head.
        GenoembedError: If input, model or output fail; outputs are then as they were before.
    """
    run = run_options(model, options, call=VariantConfig)
    run.check(pooling=pooling)
    table, vector_file = (None if path is None else fspath(path) for path in (output, vectors))
    if vector_file is not None and layer is None:
        message = "vectors are requested without a layer; set layer, too"
        raise ConfigError(message)
    check_paths(
        [vcf, reference],
        [(table, "table"), (vector_file, "hdf5")],
        may_read=[model] if isinstance(model, str | PathLike) else [],
        overwrite=overwrite,
    )
    counts = VariantCounts()
    # all rows are read once before the model is loaded: a bad one late in the file wastes no work
    contexts = read_variants(
        vcf, reference, flank=flank, unsupported=unsupported, counts=counts, check_first=True
    )
    with ExitStack() as stack:
        stack.enter_context(use_threads(run.threads))
        scorer = _build_scorer(run, layer, pooling, progress)
        started = time.perf_counter()
        outputs = _Outputs(stack, scorer, table, vector_file, overwrite=overwrite)
        for scored in _scored(contexts, scorer):
            outputs.add(scored)
        if not outputs.num_rows and vector_file is not None:
            problem = f"no allele is left to score ({counts}), so there is no vector; leave vectors out"
            raise VariantError(problem, path=fspath(vcf))
        outputs.finish({"vcf": fspath(vcf), "reference": fspath(reference), "flank": flank}, counts)
    if counts.skipped:
        logger.warning("%d alleles without a sequence were skipped: %s", counts.skipped, counts)
    return VariantReport(
        output=table,
        vectors=vector_file,
        rows=tuple(outputs.rows),
        num_rows=outputs.num_rows,
        layer=next(iter(scorer.options.layers), None),
        start_token=str(scorer.start_token),
        counts=counts,
        stats=scorer.stats,
        seconds=time.perf_counter() - started,
    )


def _build_scorer(
    run: RunOptions,
    layer: int | str | None,
    pooling: ScorePooling,
    progress: Callable[[RunStats], None] | None,
) -> SequenceScorer:
    loaded = run.load()
    warn_of_precision(loaded.model)
    layers = () if layer is None else tuple(info.path for info in loaded.model.resolve(layer))
    if len(layers) > 1:
        message = f"layer {layer!r} means {len(layers)} layers; set layer to one of them"
        raise ConfigError(message)
    options = ScorerOptions(
        rc=run.rc,
        start_token=run.start_token,
        batch_tokens=run.batch_tokens,
        layers=layers,
        pooling=pooling,
    )
    return SequenceScorer(loaded, options, on_batch=progress)


class _Outputs:
    """The table, or rows in memory; and the file of vectors, if one is requested."""

    def __init__(
        self,
        stack: ExitStack,
        scorer: SequenceScorer,
        table: str | None,
        vector_file: str | None,
        *,
        overwrite: bool,
    ) -> None:
        layers = scorer.options.layers
        columns = VariantScore._fields if layers else COLUMNS_WITHOUT_VECTORS
        self.rows: list[VariantScore] = []
        self.num_rows = 0
        self._scorer = scorer
        self._width = len(columns)
        self._writer: TableWriter | None = None
        self._deltas: DeltaFile | None = None
        if table is not None:
            self._writer = stack.enter_context(open_table(table, columns, overwrite=overwrite))
        if vector_file is not None:
            writer = EmbeddingWriter(vector_file, kind="pooled", overwrite=overwrite)
            self._deltas = DeltaFile(stack.enter_context(writer), layers[0])

    def add(self, scored: ScoredVariant) -> None:
        """Write or keep a row."""
        self.num_rows += 1
        if self._writer is None:
            self.rows.append(scored.row)
        else:
            self._writer.write(scored.row[: self._width])
        if self._deltas is not None:
            self._deltas.add(scored)

    def finish(self, inputs: dict[str, object], counts: VariantCounts) -> None:
        """Complete the file of vectors; the table is complete when its stack ends."""
        if self._deltas is None:
            return
        scorer = self._scorer
        self._deltas.finish(
            {
                "genoembed_version": __version__,
                "kind": "variant deltas, alt - ref",
                "model": dict(scorer.model.model.provenance),
                "layers": list(scorer.options.layers),
                "config": {**inputs, "pooling": scorer.options.pooling, "rc": scorer.options.rc},
                "start_token": str(scorer.start_token),
                "counts": asdict(counts),
            }
        )


def _scored(contexts: Iterable[VariantContext], scorer: SequenceScorer) -> Iterator[ScoredVariant]:
    layer = next(iter(scorer.options.layers), None)
    for part in _parts(contexts):
        pairs = [allele_records(context) for context in part]
        for context, pair in zip(part, pairs, strict=True):
            _check_fit(context, pair, scorer)
        scores = scorer.score([record for pair in pairs for record in pair])
        for index, context in enumerate(part):
            # an allele is one record: the reference's stretch runs only to be compared with it
            scorer.stats.records -= 1
            scorer.stats.bases -= len(context.ref_sequence)
            scorer.stats.windows -= 1
            yield score_alleles(
                context,
                scores[2 * index],
                scores[2 * index + 1],
                layer=layer,
                start_token=str(scorer.start_token),
            )


def _check_fit(context: VariantContext, pair: Sequence[SequenceRecord], scorer: SequenceScorer) -> None:
    """Raise if windows would be needed: the alleles of a variant would be cut at different places."""
    if all(scorer.num_windows(record) == 1 for record in pair):
        return
    variant, longest = context.variant, max(len(record.sequence) for record in pair)
    problem = (
        f"the stretch around {variant.contig}:{variant.position} has {longest} bases, but the model's "
        f"context holds {scorer.context_bases}; set flank lower, or leave long variants out"
    )
    raise VariantError(problem, path=variant.path, line=variant.line, record_id=variant.id or None)


def _parts(contexts: Iterable[VariantContext]) -> Iterator[list[VariantContext]]:
    part: list[VariantContext] = []
    bases = 0
    for context in contexts:
        part.append(context)
        bases += len(context.ref_sequence) + len(context.alt_sequence)
        if bases >= _PART_BASES:
            yield part
            part, bases = [], 0
    if part:
        yield part


_BLOCK_ROWS = 256


class VariantScore(NamedTuple):
    """One row of the table: an allele."""

    chrom: str
    pos: int
    """As in the VCF, as are ``id``, ``ref`` and ``alt``."""
    id: str
    ref: str
    alt: str
    normalized: str
    """``pos:ref>alt`` of the change, left-aligned and trimmed."""
    window_start: int
    """First base of the stretch that the model sees, 0-based."""
    window_end: int
    """One past its last base, on the reference."""
    ref_log_likelihood: float
    """Sum over the stretch with the reference's bases."""
    alt_log_likelihood: float
    """Sum over the stretch with the allele's bases."""
    delta: float
    """``alt_log_likelihood - ref_log_likelihood``: below 0, the model prefers the reference."""
    delta_mean: float
    """The same of the means a scored base, for alleles of unequal length."""
    start_token: str
    """Id of the token before the stretch, or ``none``."""
    l2: float
    """Euclidean length of the difference of the pooled vectors, alt - ref; NaN without a layer."""
    cosine_distance: float
    """1 - cosine of the two vectors; NaN without a layer."""


COLUMNS_WITHOUT_VECTORS = VariantScore._fields[:-2]


class ScoredVariant(NamedTuple):
    """A row of the table, and the vectors behind it."""

    context: VariantContext
    row: VariantScore
    delta_D: Tensor | None
    """Difference of the pooled vectors. float32; None without a layer."""


def allele_records(context: VariantContext) -> tuple[SequenceRecord, SequenceRecord]:
    """Return the stretch with either allele."""
    variant = context.variant
    name = f"{variant.contig}:{variant.position}:{variant.ref}>{variant.alt}"
    return (
        SequenceRecord(id=name, sequence=context.ref_sequence, source=variant.path, line=variant.line),
        SequenceRecord(id=name, sequence=context.alt_sequence, source=variant.path, line=variant.line),
    )


def score_alleles(
    context: VariantContext,
    ref: Sequence[StrandScore],
    alt: Sequence[StrandScore],
    *,
    layer: str | None,
    start_token: str,
) -> ScoredVariant:
    """Compare the alleles of a variant."""
    ref_total, ref_mean = _means(ref)
    alt_total, alt_mean = _means(alt)
    delta_D, l2, distance = None, float("nan"), float("nan")
    if layer is not None:
        ref_D, alt_D = (_vector(strands, layer) for strands in (ref, alt))
        delta_D = (alt_D - ref_D).float()
        l2 = float(torch.linalg.vector_norm(alt_D - ref_D))
        distance = _cosine_distance(ref_D, alt_D)
    variant, normalized = context.variant, context.normalized
    row = VariantScore(
        chrom=variant.contig,
        pos=variant.position,
        id=variant.id or ".",
        ref=variant.ref,
        alt=variant.alt,
        normalized=f"{normalized.position}:{normalized.ref}>{normalized.alt}",
        window_start=context.start,
        window_end=context.end,
        ref_log_likelihood=ref_total,
        alt_log_likelihood=alt_total,
        delta=alt_total - ref_total,
        delta_mean=alt_mean - ref_mean,
        start_token=start_token,
        l2=l2,
        cosine_distance=distance,
    )
    return ScoredVariant(context, row, delta_D)


def _means(strands: Sequence[StrandScore]) -> tuple[float, float]:
    """Total of a stretch, the mean of its strands, and the mean a scored base."""
    total = sum(strand.log_likelihood for strand in strands) / len(strands)
    bases = sum(strand.scored_bases for strand in strands) / len(strands)
    return total, total / bases if bases else float("nan")


def _vector(strands: Sequence[StrandScore], layer: str) -> Tensor:
    return torch.stack([strand.vectors[layer].double() for strand in strands]).mean(dim=0)


def _cosine_distance(first_D: Tensor, second_D: Tensor) -> float:
    """1 - cosine, from the difference of the unit vectors: exact where the cosine rounds to 1."""
    unit_1, unit_2 = (vector / torch.linalg.vector_norm(vector) for vector in (first_D, second_D))
    return float(((unit_1 - unit_2) ** 2).sum() / 2)


class DeltaFile:
    """An embedding file whose vectors are differences, alt - ref."""

    def __init__(self, writer: EmbeddingWriter, layer: str) -> None:
        self._writer = writer
        self._layer = layer
        self._ids = IdRegistry("suffix")
        self._rows: list[ObsRow] = []
        self._deltas: list[Tensor] = []

    def add(self, scored: ScoredVariant) -> None:
        """Take a row in."""
        assert scored.delta_D is not None, "vectors are taken where a layer is"
        context = scored.context
        record = allele_records(context)[1]
        self._rows.append(
            ObsRow(
                id=self._ids.admit(record.id, path=record.source, line=record.line),
                description=context.variant.id,
                length=len(record.sequence),
                start=context.start,
                end=context.end,
                strand="+",
                source=record.source,
                n_windows=1,
                sha256=record.sha256,
                flags="",
            )
        )
        self._deltas.append(scored.delta_D)
        if len(self._rows) == _BLOCK_ROWS:
            self._append()

    def finish(self, provenance: Mapping[str, object]) -> None:
        """Write the rest and give the file its name."""
        if self._rows:
            self._append()
        self._writer.finish(dict(provenance))  # type: ignore[arg-type]

    def _append(self) -> None:
        matrix = np.stack([delta.numpy() for delta in self._deltas])
        self._writer.append(EmbeddingBlock(rows=tuple(self._rows), matrices={self._layer: matrix}))
        self._rows, self._deltas = [], []
