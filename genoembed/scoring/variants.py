"""What variants change in the eyes of a model: VCF and reference in, a table out.

Both alleles of a variant are seen in the same stretch of the contig. Promised: REF is checked, changes are
left-aligned, nothing is cut off, and alleles that cannot be scored are counted.

How alleles are compared is in ``alleles``; here are the call, and the file of differences of vectors.
"""

from __future__ import annotations

import logging
import time
from base64 import b64decode
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np

from genoembed._version import __version__
from genoembed.config.fields import named_options
from genoembed.config.paths import check_paths
from genoembed.config.score import DEFAULT_FLANK, VariantConfig
from genoembed.contracts import EmbeddingBlock, ObsRow
from genoembed.errors import ConfigError, VariantError
from genoembed.pipeline.request import use_threads
from genoembed.pipeline.table_parts import keeping_units
from genoembed.scoring.alleles import (
    COLUMNS_WITHOUT_VECTORS,
    Compared,
    VariantScore,
    allele_unit,
    build_allele_scorer,
    compare_part,
    failed_allele,
    iter_parts,
    variant_row,
)
from genoembed.scoring.scorer import SequenceScorer, run_options
from genoembed.sequences.records import IdRegistry
from genoembed.sequences.variants import VariantCounts, read_variants
from genoembed.store import EmbeddingWriter
from genoembed.store.tables import open_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import ScorePooling, UnsupportedPolicy
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.pipeline.units import RunStats
    from genoembed.scoring.alleles import Allele
    from genoembed.store.tables import TableWriter


logger = logging.getLogger(__name__)


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
    Columns of the table are the fields of :class:`~genoembed.scoring.alleles.VariantScore`; those of
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
        run = replace(run, dtype=kept.dtype(run.dtype))
        scorer = build_allele_scorer(run, layer, pooling, progress)
        kept.begin(
            scorer.identity, policies={"on_error": run.on_error}, stats=scorer.stats, drop_other=overwrite
        )
        started = time.perf_counter()
        for number, part in enumerate(iter_parts(contexts, scorer)):
            values = kept.take(allele_unit(number, part), partial(compare_part, part, scorer))
            for allele, value in zip(part, values, strict=True):
                outputs.add(allele, value, scorer)
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

    def add(self, allele: Allele, value: Sequence[Any] | str, scorer: SequenceScorer) -> None:
        """Write or keep the rows of an allele; text says why it failed."""
        self.num_rows += 1
        compared = failed_allele(allele) if isinstance(value, str) else Compared(*value)
        row = variant_row(allele.context, compared, start_token=str(scorer.start_token))
        if self._writer is None:
            self.rows.append(row)
        else:
            self._writer.write(row[: self._width])
        if self._deltas is not None:
            flags = f"failed:{value}" if isinstance(value, str) else ""
            self._deltas.add(allele, compared.delta, layer=scorer.options.layers[0], flags=flags)

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


_BLOCK_ROWS = 256


class DeltaFile:
    """An embedding file whose vectors are differences, alt - ref."""

    def __init__(self, writer: EmbeddingWriter) -> None:
        self._writer = writer
        self._width = 0
        self._ids = IdRegistry("suffix")
        self._rows: list[ObsRow] = []
        self._deltas: list[NDArray[np.float32]] = []

    def add(self, allele: Allele, delta: str, *, layer: str, flags: str) -> None:
        """Take a row in."""
        context, record = allele.context, allele.alt
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
