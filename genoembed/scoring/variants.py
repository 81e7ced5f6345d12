"""What variants change in the eyes of a model: VCF and reference in, a table out.

Both alleles of a variant are seen in the same stretch of the contig. Promised: REF is checked, changes are
left-aligned, nothing is cut off, and alleles that cannot be scored are counted.

From the scores of both alleles to a row, and from their vectors to a file of differences.
"""

from __future__ import annotations

import logging
import math
import time
from base64 import b64decode, b64encode
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
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
from genoembed.pipeline.table_parts import keeping_units
from genoembed.pipeline.units import WorkUnit
from genoembed.scoring.scorer import ScorerOptions, SequenceScorer, run_options, warn_of_precision
from genoembed.sequences.records import IdRegistry
from genoembed.sequences.variants import VariantCounts, read_variants
from genoembed.store import EmbeddingWriter
from genoembed.store.tables import open_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from genoembed.config.choices import ScorePooling, UnsupportedPolicy
    from genoembed.contracts import VariantContext
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.pipeline.units import RunStats
    from genoembed.scoring.scorer import RunOptions, StrandScore
    from genoembed.store.tables import TableWriter


logger = logging.getLogger(__name__)

_PART_BASES = 1 << 18
"""Bases whose scores are in memory together."""
LIKELIHOOD, PSEUDO, MARGINAL = "likelihood", "pseudo-likelihood", "masked-marginal"
"""How alleles are compared: by all of the stretch, read from the left or hidden token by token; or where they
differ."""
TOO_LONG = "too long"


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
    failed: Mapping[str, str]
    """Alleles without numbers, by ``contig:pos:ref>alt``: why."""
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
    reference's bases and with the allele's; of a single base and a masked model, only of the words that hold
    it, hidden from the model. With ``layer`` both are embedded as well.
    Columns of the table are the fields of :class:`~genoembed.scoring.variants.VariantScore`; those of
    vectors are left out without ``layer``.

    Args:
        vcf: Plain or compressed; ``-`` is standard input.
        reference: FASTA that the VCF was called against, plain or bgzip; its index is written next to it.
        model: Name or folder of a causal or masked model, or one that is loaded already.
        output: The table; ``-`` is standard output. None writes none and gives the rows in the report.
        flank: Bases on either side of a change, as far as the contig has them.
        unsupported: Alleles without a sequence (symbolic, breakends, ``*``, ``.``): ``skip``, counted, or
            ``error``.
        layer: Where vectors are taken: block number, module path or ``final``.
        pooling: ``mean``, ``max`` or ``last``, over the bases of the stretch.
        vectors: HDF5 file for the differences of vectors, alt - ref, one row per allele; needs ``layer``.
        overwrite: Replace existing files, once the new ones are complete.
        progress: Called with the running totals after each forward pass.
        **options: ``rc``, ``start_token``, ``on_error``, ``revision``, ``trust_remote_code``, ``dtype``
            (float32), ``fp8``, ``device``, ``threads`` and ``batch_tokens``, as for ``score``.

    Returns:
        What was done.

    Raises:
        ConfigError: If options are wrong, alone or together.
        VariantError: If a row is malformed or does not fit the reference or the model's context.
        ModelError: If the model has no head to predict tokens with, or sees both sides and has no mask token.
        GenoembedError: If input, model or output fail; outputs are then as they were before, and what was
            scored is kept for the next run of the same call.
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
        kept = stack.enter_context(keeping_units(table))
        outputs = _Outputs(stack, table, vector_file, has_layer=layer is not None, overwrite=overwrite)
        scorer = _build_scorer(run, layer, pooling, progress)
        kept.begin(
            scorer.identity, policies={"on_error": run.on_error}, stats=scorer.stats, drop_other=overwrite
        )
        started = time.perf_counter()
        for number, part in enumerate(_parts(contexts, min(_PART_BASES, scorer.max_part_bases))):
            make = partial(_compare_part, part, scorer)
            for context, value in zip(part, kept.take(_unit(number, part), make), strict=True):
                outputs.add(context, value, scorer)
        if outputs.num_rows == len(kept.failed) and vector_file is not None:
            problem = f"no allele is left to score ({counts}), so there is no vector; leave vectors out"
            raise VariantError(problem, path=fspath(vcf))
        outputs.finish({"vcf": fspath(vcf), "reference": fspath(reference), "flank": flank}, counts, scorer)
    if counts.skipped:
        logger.warning("%d alleles without a sequence were skipped: %s", counts.skipped, counts)
    return VariantReport(
        output=table,
        vectors=vector_file,
        rows=tuple(outputs.rows),
        num_rows=outputs.num_rows,
        layer=next(iter(scorer.options.layers), None),
        start_token=str(scorer.start_token),
        failed=kept.failed,
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
        on_error=run.on_error,
    )
    return SequenceScorer(loaded, options, on_batch=progress)


class _Outputs:
    """The table, or rows in memory; and the file of vectors, if one is requested."""

    def __init__(
        self,
        stack: ExitStack,
        table: str | None,
        vector_file: str | None,
        *,
        has_layer: bool,
        overwrite: bool,
    ) -> None:
        columns = VariantScore._fields if has_layer else COLUMNS_WITHOUT_VECTORS
        self.rows: list[VariantScore] = []
        self.num_rows = 0
        self._width = len(columns)
        self._writer: TableWriter | None = None
        self._deltas: DeltaFile | None = None
        if table is not None:
            self._writer = stack.enter_context(open_table(table, columns, overwrite=overwrite))
        if vector_file is not None:
            writer = EmbeddingWriter(vector_file, kind="pooled", overwrite=overwrite)
            self._deltas = DeltaFile(stack.enter_context(writer))

    def add(self, context: VariantContext, value: Sequence[Any] | str, scorer: SequenceScorer) -> None:
        """Write or keep the rows of an allele; text says why it failed."""
        self.num_rows += 1
        compared = _FAILED if isinstance(value, str) else _Compared(*value)
        row = variant_row(context, compared, start_token=str(scorer.start_token))
        if self._writer is None:
            self.rows.append(row)
        else:
            self._writer.write(row[: self._width])
        if self._deltas is not None:
            flags = f"failed:{value}" if isinstance(value, str) else ""
            self._deltas.add(context, compared.delta, layer=scorer.options.layers[0], flags=flags)

    def finish(self, inputs: dict[str, object], counts: VariantCounts, scorer: SequenceScorer) -> None:
        """Complete the file of vectors; the table is complete when its stack ends."""
        if self._deltas is None:
            return
        layers = list(scorer.options.layers)
        self._deltas.finish(
            layers[0],
            {
                "genoembed_version": __version__,
                "kind": "variant deltas, alt - ref",
                "model": dict(scorer.model.model.provenance),
                "layers": layers,
                "config": {**inputs, "pooling": scorer.options.pooling, "rc": scorer.options.rc},
                "start_token": str(scorer.start_token),
                "counts": asdict(counts),
            },
        )


class _Compared(NamedTuple):
    """What is kept of an allele until the outputs are complete: what JSON holds."""

    ref_total: float
    ref_mean: float
    alt_total: float
    alt_mean: float
    l2: float = math.nan
    cosine_distance: float = math.nan
    delta: str = ""
    """Difference of the pooled vectors, base64 of float32; empty without a layer."""
    method: str = LIKELIHOOD


_FAILED = _Compared(math.nan, math.nan, math.nan, math.nan)


def _unit(number: int, part: Sequence[VariantContext]) -> WorkUnit:
    # an allele is one record, and it depends on the reference's stretch as well
    pairs = map(allele_records, part)
    records = [replace(alt, description=ref.sequence.decode("ascii")) for ref, alt in pairs]
    return WorkUnit(number=number, records=tuple(records))


def _compare_part(part: Sequence[VariantContext], scorer: SequenceScorer) -> list[_Compared | str]:
    """Score both alleles of some variants."""
    pairs = [allele_records(context) for context in part]
    fits = [_fits(context, pair, scorer) for context, pair in zip(part, pairs, strict=True)]
    methods = [_method(pair, scorer) if fit else TOO_LONG for pair, fit in zip(pairs, fits, strict=True)]
    chosen = {
        name: [pair for pair, method in zip(pairs, methods, strict=True) if method == name]
        for name in (LIKELIHOOD, PSEUDO, MARGINAL)
    }
    chosen[MARGINAL] = [_changed(*pair) for pair in chosen[MARGINAL]]
    scores = {
        name: iter(scorer.score([record for pair in mine for record in pair], whole_words=name == MARGINAL))
        for name, mine in chosen.items()
    }
    found: list[_Compared | str] = []
    for context, method in zip(part, methods, strict=True):
        if method == TOO_LONG:
            found.append(TOO_LONG)
            continue
        # an allele is one record: the reference's stretch runs only to be compared with it
        scorer.stats.records -= 1
        scorer.stats.bases -= len(context.ref_sequence)
        scorer.stats.windows -= 1
        ref, alt = next(scores[method]), next(scores[method])
        compared = _compare(ref, alt, layers=scorer.options.layers)
        found.append(compared if isinstance(compared, str) else compared._replace(method=method))
    return found


def _method(pair: tuple[SequenceRecord, SequenceRecord], scorer: SequenceScorer) -> str:
    """Choose how the alleles of a variant are compared."""
    if not scorer.is_masked:
        return LIKELIHOOD
    ref, alt = (record.sequence for record in pair)
    is_snv = len(ref) == len(alt) and sum(a != b for a, b in zip(ref, alt, strict=True)) == 1
    return MARGINAL if is_snv and scorer.has_same_words(ref, alt) else PSEUDO


def _changed(ref: SequenceRecord, alt: SequenceRecord) -> tuple[SequenceRecord, SequenceRecord]:
    """Only the changed base counts: its words are hidden, and what is left to see is the same of both."""
    place = next(
        at for at, pair in enumerate(zip(ref.sequence, alt.sequence, strict=True)) if len({*pair}) > 1
    )
    return (
        replace(ref, core_start=place, core_end=place + 1, end=-1),
        replace(alt, core_start=place, core_end=place + 1, end=-1),
    )


def _fits(context: VariantContext, pair: Sequence[SequenceRecord], scorer: SequenceScorer) -> bool:
    """Tell whether no windows are needed: the alleles of a variant would be cut at different places."""
    if all(scorer.num_windows(record) == 1 for record in pair):
        return True
    variant, longest = context.variant, max(len(record.sequence) for record in pair)
    problem = (
        f"the stretch around {variant.contig}:{variant.position} has {longest} bases, but the model's "
        f"context holds {scorer.context_bases}; set flank lower, or leave long variants out"
    )
    error = VariantError(problem, path=variant.path, line=variant.line, record_id=variant.id or None)
    if scorer.options.on_error == "stop":
        raise error
    logger.warning("%s: left without numbers", error)
    return False


def _parts(contexts: Iterable[VariantContext], most_bases: int) -> Iterator[list[VariantContext]]:
    part: list[VariantContext] = []
    bases = 0
    for context in contexts:
        part.append(context)
        bases += len(context.ref_sequence) + len(context.alt_sequence)
        if bases >= most_bases:
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
    """Sum over the stretch with the reference's bases; masked-marginal: the hidden word with its base."""
    alt_log_likelihood: float
    """Sum over the stretch with the allele's bases; masked-marginal: the hidden word with its base."""
    delta: float
    """``alt_log_likelihood - ref_log_likelihood``: below 0, the model prefers the reference."""
    delta_mean: float
    """The same of the means a scored base, for alleles of unequal length."""
    start_token: str
    """Id of the token before the stretch, or ``none``."""
    method: str
    """``likelihood`` of a causal model; of a masked one ``masked-marginal``, where a single base changes and
    no word's place, else ``pseudo-likelihood``."""
    l2: float
    """Euclidean length of the difference of the pooled vectors, alt - ref; NaN without a layer."""
    cosine_distance: float
    """1 - cosine of the two vectors; NaN without a layer."""


COLUMNS_WITHOUT_VECTORS = VariantScore._fields[:-2]


def allele_records(context: VariantContext) -> tuple[SequenceRecord, SequenceRecord]:
    """Return the stretch with either allele."""
    variant = context.variant
    name = f"{variant.contig}:{variant.position}:{variant.ref}>{variant.alt}"
    return (
        SequenceRecord(id=name, sequence=context.ref_sequence, source=variant.path, line=variant.line),
        SequenceRecord(id=name, sequence=context.alt_sequence, source=variant.path, line=variant.line),
    )


def _compare(
    ref: Sequence[StrandScore] | str, alt: Sequence[StrandScore] | str, *, layers: Sequence[str]
) -> _Compared | str:
    """Compare the alleles of a variant; text says why one failed."""
    if isinstance(ref, str) or isinstance(alt, str):
        return ref if isinstance(ref, str) else str(alt)
    means = (*_means(ref), *_means(alt))
    if not layers:
        return _Compared(*means)
    ref_D, alt_D = (_vector(strands, layers[0]) for strands in (ref, alt))
    delta_D = alt_D - ref_D
    return _Compared(
        *means,
        l2=float(torch.linalg.vector_norm(delta_D)),
        cosine_distance=_cosine_distance(ref_D, alt_D),
        delta=b64encode(delta_D.float().numpy().astype("<f4").tobytes()).decode("ascii"),
    )


def variant_row(context: VariantContext, compared: _Compared, *, start_token: str) -> VariantScore:
    """Build the table's row of an allele."""
    variant, normalized = context.variant, context.normalized
    return VariantScore(
        chrom=variant.contig,
        pos=variant.position,
        id=variant.id or ".",
        ref=variant.ref,
        alt=variant.alt,
        normalized=f"{normalized.position}:{normalized.ref}>{normalized.alt}",
        window_start=context.start,
        window_end=context.end,
        ref_log_likelihood=compared.ref_total,
        alt_log_likelihood=compared.alt_total,
        delta=compared.alt_total - compared.ref_total,
        delta_mean=compared.alt_mean - compared.ref_mean,
        start_token=start_token,
        method=compared.method,
        l2=compared.l2,
        cosine_distance=compared.cosine_distance,
    )


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

    def __init__(self, writer: EmbeddingWriter) -> None:
        self._writer = writer
        self._width = 0
        self._ids = IdRegistry("suffix")
        self._rows: list[ObsRow] = []
        self._deltas: list[NDArray[np.float32]] = []

    def add(self, context: VariantContext, delta: str, *, layer: str, flags: str) -> None:
        """Take a row in."""
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
                flags=flags,
            )
        )
        self._deltas.append(np.frombuffer(b64decode(delta), dtype="<f4"))
        if len(self._rows) >= _BLOCK_ROWS and (self._width or any(map(len, self._deltas))):
            self._append(layer)

    def finish(self, layer: str, provenance: Mapping[str, object]) -> None:
        """Write the rest and give the file its name."""
        if self._rows:
            self._append(layer)
        self._writer.finish(dict(provenance))  # type: ignore[arg-type]

    def _append(self, layer: str) -> None:
        self._width = max(map(len, self._deltas), default=0) or self._width
        # an allele that failed has a row of NaN, as in files of embeddings
        matrix = np.full((len(self._rows), self._width), np.nan, dtype=np.float32)
        for row, delta in zip(matrix, self._deltas, strict=True):
            if len(delta):
                row[:] = delta
        self._writer.append(EmbeddingBlock(rows=tuple(self._rows), matrices={layer: matrix}))
        self._rows, self._deltas = [], []
