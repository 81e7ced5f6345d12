"""Both alleles of a variant in one stretch: how they are compared, and the rows of the table.

In: contexts of variants, read from a VCF or made of each base of a region. Out: for each allele what the
model thinks of it and of the reference. Promised: an allele's numbers depend on its stretch alone, whatever
else is scored with it and wherever it came from.
"""

from __future__ import annotations

import logging
import math
from base64 import b64encode
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from genoembed.contracts import SequenceRecord
from genoembed.errors import ConfigError, VariantError
from genoembed.pipeline.units import WorkUnit
from genoembed.scoring.scorer import ScorerOptions, SequenceScorer, warn_of_precision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from genoembed.config.choices import ScorePooling
    from genoembed.contracts import VariantContext
    from genoembed.pipeline.units import RunStats
    from genoembed.scoring.scorer import RunOptions, StrandScore


logger = logging.getLogger(__name__)

PART_BASES = 1 << 18
"""Bases whose scores are in memory together."""
LIKELIHOOD, PSEUDO, MARGINAL = "likelihood", "pseudo-likelihood", "masked-marginal"
"""How alleles are compared: by all of the stretch, read from the left or hidden token by token; or where they
differ."""
TOO_LONG = "too long"


class Allele(NamedTuple):
    """An allele with its stretch."""

    context: VariantContext
    ref: SequenceRecord
    """The stretch as the reference has it."""
    alt: SequenceRecord
    """The stretch with the allele."""
    method: str
    """How they are compared, or ``TOO_LONG``."""

    @property
    def num_bases(self) -> int:
        """Bases of both."""
        return len(self.ref.sequence) + len(self.alt.sequence)


class Compared(NamedTuple):
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


def failed_allele(allele: Allele) -> Compared:
    """Return what is kept of an allele without scores."""
    method = "" if allele.method == TOO_LONG else allele.method
    return Compared(math.nan, math.nan, math.nan, math.nan, method=method)


def build_allele_scorer(
    run: RunOptions,
    layer: int | str | None,
    pooling: ScorePooling,
    progress: Callable[[RunStats], None] | None,
) -> SequenceScorer:
    """Load the model, and make what scores alleles with it."""
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


def iter_parts(contexts: Iterable[VariantContext], scorer: SequenceScorer) -> Iterator[list[Allele]]:
    """Group alleles that are scored, and kept, together; those of one base stay together.

    Raises:
        VariantError: If a stretch does not fit the context, where that is not skipped.
    """
    part: list[Allele] = []
    share = 0.0
    for context in contexts:
        if part and share >= 1 and not _is_same_place(part[-1].context, context):
            yield part
            part, share = [], 0.0
        allele = _allele(context, scorer)
        part.append(allele)
        share += allele.num_bases / PART_BASES
        if allele.method == PSEUDO:  # a pass for each token
            share += allele.num_bases / scorer.max_part_bases
    if part:
        yield part


def _is_same_place(first: VariantContext, second: VariantContext) -> bool:
    places = (
        (one.variant.contig, one.normalized.position, one.start, one.ref_sequence) for one in (first, second)
    )
    return next(places) == next(places)


def _allele(context: VariantContext, scorer: SequenceScorer) -> Allele:
    variant = context.variant
    name = f"{variant.contig}:{variant.position}:{variant.ref}>{variant.alt}"
    ref, alt = (
        SequenceRecord(id=name, sequence=sequence, source=variant.path, line=variant.line)
        for sequence in (context.ref_sequence, context.alt_sequence)
    )
    method = _method(ref, alt, scorer) if _fits(context, (ref, alt), scorer) else TOO_LONG
    return Allele(context, ref, alt, method)


def _method(ref: SequenceRecord, alt: SequenceRecord, scorer: SequenceScorer) -> str:
    """Choose how alleles are compared."""
    if not scorer.is_masked:
        return LIKELIHOOD
    is_snv = len(ref.sequence) == len(alt.sequence)
    is_snv = is_snv and sum(a != b for a, b in zip(ref.sequence, alt.sequence, strict=True)) == 1
    return MARGINAL if is_snv and scorer.has_same_words(ref.sequence, alt.sequence) else PSEUDO


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


def allele_unit(number: int, part: Sequence[Allele]) -> WorkUnit:
    """Make the unit under which a part is kept."""
    # an allele is one record, and it depends on the reference's stretch as well
    records = [replace(allele.alt, description=allele.ref.sequence.decode("ascii")) for allele in part]
    return WorkUnit(number=number, records=tuple(records))


def compare_part(part: Sequence[Allele], scorer: SequenceScorer) -> list[Compared | str]:
    """Score both alleles of some variants; text says why one failed."""
    layers = scorer.options.layers
    pairs = iter(scorer.score_pairs([(a.ref, a.alt) for a in part if a.method in (LIKELIHOOD, PSEUDO)]))
    hidden = iter(scorer.score_hidden([(a.ref, a.alt) for a in part if a.method == MARGINAL]))
    found: list[Compared | str] = []
    for allele in part:
        if allele.method == TOO_LONG:
            found.append(TOO_LONG)
            continue
        if allele.method == MARGINAL:
            pair = next(hidden)
            compared = pair if isinstance(pair, str) else _compare_strands(*pair, layers=layers)
        else:
            compared = _compare_strands(*next(pairs), layers=layers)
        found.append(compared if isinstance(compared, str) else compared._replace(method=allele.method))
    return found


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


def _compare_strands(
    ref: Sequence[StrandScore] | str, alt: Sequence[StrandScore] | str, *, layers: Sequence[str]
) -> Compared | str:
    """Compare the alleles of a variant; text says why one failed."""
    if isinstance(ref, str) or isinstance(alt, str):
        return ref if isinstance(ref, str) else str(alt)
    means = (*_means(ref), *_means(alt))
    if not layers:
        return Compared(*means)
    ref_D, alt_D = (_vector(strands, layers[0]) for strands in (ref, alt))
    delta_D = alt_D - ref_D
    return Compared(
        *means,
        l2=float(torch.linalg.vector_norm(delta_D)),
        cosine_distance=_cosine_distance(ref_D, alt_D),
        delta=b64encode(delta_D.float().numpy().astype("<f4").tobytes()).decode("ascii"),
    )


def variant_row(context: VariantContext, compared: Compared, *, start_token: str) -> VariantScore:
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
