"""From the scores of both alleles to a row, and from their vectors to a file of differences.

In: variants in their context, with the scores of both stretches. Out: rows of the table; an HDF5 file that
``open_embeddings`` and anndata read. Promised: differences are taken in float64 and stored in float32.

D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from genoembed.contracts import EmbeddingBlock, ObsRow, SequenceRecord
from genoembed.sequences.identity import IdRegistry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from genoembed.contracts import VariantContext
    from genoembed.scoring.scorer import StrandScore
    from genoembed.store import EmbeddingWriter

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
    """Give the stretch with either allele."""
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
