"""Log-likelihoods of sequences: files in, a table out.

``read -> windows -> model -> table``, a few records at a time. Promised: the same policies for letters, ids
and gaps as in ``extract``; a sequence longer than the context is scored whole, in blocks or windows.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from genoembed.config.embed import WindowConfig
from genoembed.config.fields import named_options
from genoembed.config.paths import check_paths, path_strings
from genoembed.config.score import ScoreConfig
from genoembed.errors import ConfigError, EmptyRecordError
from genoembed.pipeline.request import use_threads
from genoembed.pipeline.table_parts import keeping_units
from genoembed.pipeline.units import iter_units
from genoembed.scoring.scorer import ScorerOptions, SequenceScorer, run_options
from genoembed.sequences import InputCounts, begin_reading, read_sequences
from genoembed.store.tables import open_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from genoembed.contracts import SequenceRecord
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.pipeline.units import RunStats, WorkUnit
    from genoembed.scoring.scorer import RunOptions, StrandScore
    from genoembed.store.tables import TableWriter


logger = logging.getLogger(__name__)

PART_BASES, PART_RECORDS = 1 << 20, 1 << 10
"""Bases, and records, that are in memory together; a longer record is alone."""
_POLICIES = ("invalid", "duplicates", "empty", "gaps", "keep_case")
PER_BASE_COLUMNS = ("id", "start", "end", "bases", "log_likelihood")


class SequenceScore(NamedTuple):
    """One row of the table."""

    id: str
    length: int
    """Bases of the sequence."""
    scored: float
    """Bases that have a prediction; the mean of both strands with ``rc='mean'``."""
    log_likelihood: float
    """Sum of natural logarithms; the mean of both strands with ``rc='mean'``; NaN if nothing is scored."""
    mean_log_likelihood: float
    """A scored base."""
    perplexity: float
    """``exp(-mean_log_likelihood)``: 4 for a model that knows nothing about four bases."""
    bits_per_base: float
    """``-mean_log_likelihood / ln 2``: 2 for such a model."""
    start_token: str
    """Id of the token before the first base, or ``none``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreReport:
    """What a run did."""

    output: str | None
    """The table; ``-`` is standard output; None where rows were requested."""
    per_base: str | None
    """The table of bases."""
    rows: tuple[SequenceScore, ...]
    """The table's rows, where no output was named; else empty."""
    num_rows: int
    unscored: int
    """Records of which no base has a prediction."""
    start_token: str
    """Id of the token before each sequence's first base, or ``none``."""
    failed: Mapping[str, str]
    """Records without a score, by id: why."""
    counts: InputCounts
    """What was read, and what the input policies did."""
    stats: RunStats
    """What the forward passes cost."""
    seconds: float
    """Wall time, without loading the model."""


@named_options(ScoreConfig)
def score(
    inputs: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    model: str | PathLike[str] | GenomicModel = "genoembed-mini",
    output: str | PathLike[str] | None = None,
    per_base: str | PathLike[str] | None = None,
    overwrite: bool = False,
    window: int | None = None,
    stride: int | None = None,
    carry_state: bool | None = None,
    progress: Callable[[RunStats], None] | None = None,
    **options: Any,
) -> ScoreReport:
    """Score the sequences of files: how likely does a causal or masked model find each of them?

    The log-likelihood of a sequence is the sum over its bases of ``ln p(base | all bases before it)``, the
    log-softmax taken in float32; of a masked model, over its tokens of ``ln p(token | all other tokens)``,
    each token hidden once. Letters other than A, C, G and T are context only. Columns of the table are the
    fields of :class:`SequenceScore`.

    Args:
        inputs: Sequence files in any format of ``extract``; ``-`` is standard input.
        model: Name or folder of a causal or masked model, or one that is loaded already.
        output: The table; ``-`` is standard output. None writes none and gives the rows in the report.
        per_base: A second table, one row per base (per token for causal models whose tokens have several):
            ``id``, ``start``, ``end`` (0-based, half-open), ``bases``, ``log_likelihood``.
        overwrite: Replace existing files, once the new ones are complete.
        window: Bases that the model sees at once; None is what its context holds.
        stride: Bases from window to window; None is three quarters of a window.
        carry_state: Run each base once: the state of a causal model goes on from window to window, and no
            base lacks a base before it.
        progress: Called with the running totals after each forward pass.
        **options: ``rc`` (``none``, or ``mean`` of both strands), ``start_token`` (``auto``, or ``none`` to
            start with the first base, which then has no prediction), ``on_error`` (``stop`` at a record that
            fails, or ``skip``: its row has no numbers), ``revision``, ``trust_remote_code``, ``dtype``
            (float32), ``fp8``, ``device``, ``threads``, ``batch_tokens``; and ``invalid``, ``duplicates``,
            ``empty``, ``gaps``, ``keep_case`` as for ``extract``. None stands for the default. A model that
            is loaded already takes no ``revision``, ``trust_remote_code``, ``dtype``, ``fp8`` or ``device``.

    Returns:
        What was done.

    Raises:
        ConfigError: If options are wrong, alone or together; all of them in one message.
        ModelError: If the model has no head to predict tokens with, or sees both sides and has no mask token.
        GenoembedError: If input, model or output fail; outputs are then as they were before, and what was
            scored is kept for the next run of the same call.
    """
    policies = {name: options.pop(name) for name in _POLICIES if name in options}
    run = run_options(model, options, call=ScoreConfig)
    run.check(window=window, stride=stride)
    table, bases_table = (None if path is None else fspath(path) for path in (output, per_base))
    check_paths(
        path_strings(inputs),
        [(table, "table"), (bases_table, "table")],
        may_read=[model] if isinstance(model, str | PathLike) else [],
        overwrite=overwrite,
    )
    counts = InputCounts()
    policies = {name: value for name, value in policies.items() if value is not None}
    records = begin_reading(read_sequences(inputs, counts=counts, **policies))
    with ExitStack() as stack:
        stack.enter_context(use_threads(run.threads))
        kept = stack.enter_context(keeping_units(table))
        # before the model is loaded: a second process with the same output is refused at once
        outputs = _Outputs(stack, table, bases_table, overwrite=overwrite)
        run = replace(run, dtype=kept.dtype(run.dtype))
        windows = WindowConfig(window=window, stride=stride, carry_state=bool(carry_state))
        scorer = _build_scorer(run, windows, progress)
        _check_per_base(scorer, bases_table)
        kept.begin(
            lambda: {**scorer.identity(), "per_base": bases_table is not None},
            policies={**policies, "on_error": run.on_error},
            stats=scorer.stats,
            drop_other=overwrite,
        )
        started = time.perf_counter()
        start_token = str(scorer.start_token)
        part_bases = min(PART_BASES, scorer.max_part_bases)
        for unit in iter_units(records, max_bases=part_bases, max_records=PART_RECORDS):
            make = partial(_score_unit, unit, scorer, with_bases=bases_table is not None)
            for record, value in zip(unit.records, kept.take(unit, make), strict=True):
                outputs.add(record, None if isinstance(value, str) else _Scored(*value), start_token)
        if not outputs.num_rows:
            problem = f"no record is left to score ({counts}); check the input"
            raise EmptyRecordError(problem, path=str(inputs))
    if outputs.unscored:
        logger.warning("%d records have no base with a prediction (NA in the table)", outputs.unscored)
    return ScoreReport(
        output=table,
        per_base=bases_table,
        rows=tuple(outputs.rows),
        num_rows=outputs.num_rows,
        unscored=outputs.unscored,
        failed=kept.failed,
        start_token=start_token,
        counts=counts,
        stats=scorer.stats,
        seconds=time.perf_counter() - started,
    )


class _Outputs:
    """The table, or rows in memory; and the table of bases, if one is requested."""

    def __init__(self, stack: ExitStack, table: str | None, per_base: str | None, *, overwrite: bool) -> None:
        self.rows: list[SequenceScore] = []
        self.num_rows = self.unscored = 0
        self._table: TableWriter | None = None
        self._bases: TableWriter | None = None
        if table is not None:
            self._table = stack.enter_context(open_table(table, SequenceScore._fields, overwrite=overwrite))
        if per_base is not None:
            self._bases = stack.enter_context(open_table(per_base, PER_BASE_COLUMNS, overwrite=overwrite))

    def add(self, record: SequenceRecord, scored: _Scored | None, start_token: str) -> None:
        """Write or keep the rows of a record; None is one that failed."""
        row = _row(record, scored or _FAILED, start_token)
        self.num_rows += 1
        self.unscored += scored is not None and math.isnan(row.log_likelihood)
        if self._table is None:
            self.rows.append(row)
        else:
            self._table.write(row)
        if self._bases is not None and scored is not None:
            for line in _base_rows(record, scored.bases):
                self._bases.write(line)


def _build_scorer(
    run: RunOptions, windows: WindowConfig, progress: Callable[[RunStats], None] | None
) -> SequenceScorer:
    options = ScorerOptions(
        rc=run.rc,
        start_token=run.start_token,
        window=windows.window,
        stride=windows.stride,
        carry_state=windows.carry_state,
        batch_tokens=run.batch_tokens,
        on_error=run.on_error,
    )
    return SequenceScorer(run.load(), options, on_batch=progress)


def _check_per_base(scorer: SequenceScorer, per_base: str | None) -> None:
    if per_base is not None and scorer.options.rc == "mean" and not scorer.has_token_per_base:
        message = (
            "per_base with rc='mean' needs one token per base, and this tokenizer joins bases; set rc='none'"
        )
        raise ConfigError(message)


class _Scored(NamedTuple):
    """What is kept of a record until the tables are complete: what JSON holds."""

    scored: float
    log_likelihood: float
    bases: tuple[list[int], list[int], list[float]] = ([], [], [])
    """First base, width and log-likelihood of each token; empty where they are not requested."""


_FAILED = _Scored(math.nan, math.nan)


def _score_unit(unit: WorkUnit, scorer: SequenceScorer, *, with_bases: bool) -> list[_Scored | str]:
    return [
        strands if isinstance(strands, str) else _scored(strands, with_bases=with_bases)
        for strands in scorer.score(unit.records)
    ]


def _scored(strands: Sequence[StrandScore], *, with_bases: bool) -> _Scored:
    """Take the mean of both strands, of a token that of those which have it."""
    scored = sum(strand.scored_bases for strand in strands) / len(strands)
    total = sum(strand.log_likelihood for strand in strands) / len(strands)
    if not with_bases:
        return _Scored(scored, total)
    forward = strands[0]
    stacked = np.stack([forward.log_probs, *(strand.log_probs[::-1] for strand in strands[1:])])
    known = ~np.isnan(stacked)
    sums, numbers = np.where(known, stacked, 0.0).sum(axis=0), known.sum(axis=0)
    values = np.where(numbers > 0, sums / np.maximum(numbers, 1), np.nan)
    return _Scored(scored, total, (forward.starts.tolist(), forward.widths.tolist(), values.tolist()))


def _row(record: SequenceRecord, found: _Scored, start_token: str) -> SequenceScore:
    mean = found.log_likelihood / found.scored if found.scored else math.nan
    return SequenceScore(
        id=record.id,
        length=len(record.sequence),
        scored=found.scored,
        log_likelihood=found.log_likelihood,
        mean_log_likelihood=mean,
        perplexity=math.exp(-mean),
        bits_per_base=-mean / math.log(2),
        start_token=start_token,
    )


def _base_rows(
    record: SequenceRecord, bases: tuple[list[int], list[int], list[float]]
) -> Iterator[tuple[str, int, int, str, float]]:
    """Yield the bases and the log-likelihood of each token."""
    text = record.sequence.decode("ascii")
    for start, width, value in zip(*bases, strict=True):
        yield record.id, start, start + width, text[start : start + width], value
