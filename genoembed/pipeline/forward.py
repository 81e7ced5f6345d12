"""Run pieces through a model: what they give is reduced at once, and batches shrink where memory is short.

In: work units. Out: for each unit, what its pieces gave. What is kept of a forward pass is the business of a
*reducer*: :class:`LayerReducer` keeps pooled vectors or token states, :class:`NextTokenReducer`
log-probabilities, as does that of ``masking`` for masked models; training has one for its own modules.
Promised: equal pieces run once; of pooled layers no activation is kept, so memory does not grow with their
number; after an out-of-memory error the result is the same.

B rows, L padded length, D hidden size, T tokens.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from genoembed.contracts import Batch
from genoembed.errors import ModelError, NonFiniteError, foreign_code, is_out_of_memory
from genoembed.pipeline.assemble import PieceVectors, Taken
from genoembed.pipeline.batches import PieceBatch
from genoembed.pipeline.threads import Interruption
from genoembed.pipeline.units import RunStats
from genoembed.pooling.fuse import feature_names
from genoembed.pooling.reduce import BatchPooling

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from genoembed.config.choices import Fusion, Pooling
    from genoembed.contracts import SequenceRecord, Window
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.language_model import LanguageModel
    from genoembed.models.striped_hyena2.state import AttentionWindows
    from genoembed.pipeline.assemble import TakenPieces, UnreadBases
    from genoembed.pipeline.batches import Slab, SlabBuilder
    from genoembed.pipeline.cutting import Piece
    from genoembed.pipeline.units import WorkUnit


logger = logging.getLogger(__name__)

LEAST_BLOCK_TOKENS = 512
"""A long sequence runs in blocks of a batch's size, but not of fewer positions: each is a pass of its own."""
_LEAST_BLOCK = 64
"""Positions of a block, when memory is short."""
_COSTS = (
    *("windows", "repeats", "unread"),
    *("batches", "real_tokens", "slots", "forward_s", "pooling_s", "halvings"),
)
LOG_PROBS = "log_probs"
"""Under which name reducers give log-probabilities."""

RowValues: TypeAlias = "Mapping[str, Tensor | Sequence[Tensor]]"
"""What the rows of a batch give, by name (most often of a layer), on the CPU: one vector per row, ``(B, D)``,
or for each row a tensor of its own, ``(T, D)`` or ``(T,)``."""


class Reducer(Protocol):
    """A model, and what is kept of its forward passes."""

    pooling_s: float
    """Seconds spent on reducing so far."""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""

    @property
    def carries_state(self) -> bool:
        """Whether a long row may run in blocks."""

    @property
    def repeats_rows(self) -> bool:
        """Whether rows run many times, changed; ``block_tokens`` is then what a pass holds of such copies,
        and the reducer counts the passes."""

    def __call__(self, batch: Batch, *, block_tokens: int) -> RowValues:
        """Run a batch; rows longer than ``block_tokens`` in blocks, if the model can."""


class LayerReducer:
    """Keeps activations of layers: pooled, or with pooling ``none`` those of each token that counts."""

    def __init__(
        self,
        model: GenomicModel,
        layers: Sequence[str],
        pooling: Pooling,
        *,
        fusion: Fusion = "none",
        windows: AttentionWindows | None = None,
    ) -> None:
        self.pooling_s = 0.0
        self.widths: dict[str, int] = {}
        """Features of each layer; empty before the first batch."""
        self.device = model.device
        self.carries_state, self.repeats_rows = model.carries_state, False
        self._model = model
        self._layers = layers
        self._pooling = pooling
        self._fusion = fusion
        self._windows = windows

    def __call__(self, batch: Batch, *, block_tokens: int) -> RowValues:
        """Run a batch as far as the deepest layer."""
        pooling = BatchPooling(self._pooling, batch)
        length, windows = batch.input_ids.shape[1], self._windows
        if windows is not None and length <= windows.window:
            windows = None  # one window is the row as it is
        if windows is not None or (self.carries_state and length > block_tokens):
            self._model.forward_in_blocks(
                batch, self._layers, pooling.take_block, block_tokens=block_tokens, windows=windows
            )
            captured = pooling.joined()
        else:
            captured = self._model.forward(batch, self._layers, pooling)
        taken = {layer: vectors.cpu() for layer, vectors in captured.items()}
        self.pooling_s += pooling.seconds
        if not self.widths:
            self.widths = {layer: vectors.shape[-1] for layer, vectors in taken.items()}
            feature_names(self.widths, method=self._fusion)  # refuses unequal widths before more is run
        return {layer: pooling.split(vectors) for layer, vectors in taken.items()}


class NextTokenReducer:
    """Keeps natural logarithms of next-token probabilities, and pooled layers if there are any.

    Log-probabilities are of the tokens that count and that another precedes: a row's first token has none.
    """

    def __init__(
        self,
        model: LanguageModel,
        layers: Sequence[str],
        pooling: Pooling,
        *,
        windows: AttentionWindows | None = None,
    ) -> None:
        self.pooling_s = 0.0
        self.device = model.model.device
        self.carries_state, self.repeats_rows = model.model.carries_state, False
        self._model = model
        self._layers = layers
        self._pooling = pooling
        self._windows = windows

    def __call__(self, batch: Batch, *, block_tokens: int) -> RowValues:
        """Run a batch to the model's head."""
        pooling = BatchPooling(self._pooling, batch)
        log_probs_BL = self._model.log_probs(
            batch,
            layers=self._layers,
            take=pooling.take_block,
            block_tokens=block_tokens,
            windows=self._windows,
        )
        predicted_BL = batch.counted
        predicted_BL[:, 0] = False
        rows = tuple(row[mask] for row, mask in zip(log_probs_BL, predicted_BL, strict=True))
        pooled = {layer: vectors.cpu() for layer, vectors in pooling.joined().items()}
        self.pooling_s += pooling.seconds
        return {LOG_PROBS: rows, **pooled}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPieces:
    """What some pieces of a batch gave."""

    pieces: tuple[Piece, ...]
    values: RowValues
    failed: tuple[tuple[Piece, str], ...] = ()
    """Pieces without values, and why."""


class BatchRunner:
    """Runs batches with one reducer."""

    def __init__(
        self,
        reducer: Reducer,
        stats: RunStats,
        *,
        block_tokens: int,
        skips_failed: bool = False,
        keeps_nan: bool = False,
    ) -> None:
        self.max_slots = sys.maxsize
        """Slots of a pass that memory holds, as far as is known: halved when it did not."""
        self._reducer = reducer
        self._stats = stats
        self._block_tokens = block_tokens
        self._skips_failed = skips_failed
        self._keeps_nan = keeps_nan

    def run(self, work: PieceBatch, records: Sequence[SequenceRecord]) -> Iterator[RunPieces]:
        """Run one batch, in parts where memory does not hold it as a whole.

        Memory that is short once is short again: batches that follow are divided from the start.
        """
        # a stack whose top is the leftmost part: parts come out in the order of the rows
        waiting = [range(len(work.pieces))]
        length = work.batch.input_ids.shape[1]
        while waiting:
            rows = waiting.pop()
            if len(rows) > 1 and len(rows) * length > self.max_slots:
                half = len(rows) // 2
                waiting += [rows[half:], rows[:half]]
                continue
            part = _rows_of(work, rows)
            try:
                values = self._forward(part.batch)
            except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is the former
                if not is_out_of_memory(error):
                    raise
                # out of the "except", whose traceback keeps the tensors of the failed pass alive
                lacking = error.with_traceback(None)
            else:
                yield self._checked(part, values, records)
                continue
            if self._back_off(part):
                waiting.append(rows)
            elif self._skips_failed:
                yield RunPieces(pieces=(), values={}, failed=((part.pieces[0], "no memory"),))
            else:
                raise self._no_memory(part) from lacking

    def _back_off(self, part: PieceBatch) -> bool:
        """Halve what a pass may hold; False where it holds a single piece that cannot be divided."""
        _free_cache(self._reducer.device)
        num_rows, length = part.batch.input_ids.shape
        copies = self._block_tokens if self._reducer.repeats_rows else 0
        if copies >= 2 * length:  # a row has about as many copies as tokens
            self._block_tokens = min(copies, num_rows * length * length) // 2
        elif num_rows > 1:
            self.max_slots = num_rows * length // 2
        elif self._reducer.carries_state and min(self._block_tokens, length) > _LEAST_BLOCK:
            self._block_tokens = max(_LEAST_BLOCK, min(self._block_tokens, length) // 2)
        else:
            return False
        self._stats.halvings += 1
        now = self.max_slots if num_rows > 1 and copies < 2 * length else self._block_tokens
        logger.warning(
            "no memory for a pass of %d x %d tokens on %s: at most %d at a time from here on",
            num_rows,
            length,
            self._reducer.device,
            now,
        )
        return True

    def _no_memory(self, part: PieceBatch) -> ModelError:
        num_rows, length = part.batch.input_ids.shape
        message = (
            f"device {str(self._reducer.device)!r} has no memory left for {num_rows} x {length} tokens; "
            "set window to cut long sequences, dtype to bfloat16, or device to one with more memory"
        )
        return ModelError(message)

    def _checked(self, part: PieceBatch, values: RowValues, records: Sequence[SequenceRecord]) -> RunPieces:
        """Set apart the pieces with values that are not finite."""
        bad = {} if self._keeps_nan else _not_finite(values)
        if not bad:
            return RunPieces(pieces=part.pieces, values=values)
        if part.batch.parts:  # numbers of windows, all of one piece
            bad = {0: next(iter(bad.values()))}
        if not self._skips_failed:
            first = min(bad)
            raise _spoiled(bad[first], records[part.pieces[first].record_index])
        good = [number for number in range(len(part.pieces)) if number not in bad]
        return RunPieces(
            pieces=tuple(part.pieces[number] for number in good),
            values={name: _chosen(mine, good) for name, mine in values.items()} if good else {},
            failed=tuple((part.pieces[number], "not finite") for number in sorted(bad)),
        )

    def _forward(self, batch: Batch) -> RowValues:
        started, pooled_before = time.perf_counter(), self._reducer.pooling_s
        with foreign_code("the model's forward pass"):
            values = self._reducer(batch, block_tokens=self._block_tokens)
        pooling_s = self._reducer.pooling_s - pooled_before
        self._stats.forward_s += time.perf_counter() - started - pooling_s
        self._stats.pooling_s += pooling_s
        if self._reducer.repeats_rows:
            return values  # which counts its passes by itself
        self._stats.batches += 1
        self._stats.slots += batch.num_tokens
        self._stats.real_tokens += int(batch.attention_mask.sum())
        return values


def _rows_of(work: PieceBatch, rows: range) -> PieceBatch:
    """Take some rows of a batch, padded as the whole."""
    if len(rows) == len(work.pieces):
        return work
    span = slice(rows.start, rows.stop)
    batch = Batch(
        input_ids=work.batch.input_ids[span],
        attention_mask=work.batch.attention_mask[span],
        pool_mask=work.batch.pool_mask[span],
        rows=work.batch.rows[span],
    )
    return PieceBatch(pieces=work.pieces[span], batch=batch)


def _chosen(vectors: Tensor | Sequence[Tensor], rows: Sequence[int]) -> Tensor | tuple[Tensor, ...]:
    if isinstance(vectors, torch.Tensor):
        return vectors[list(rows)]
    return tuple(vectors[row] for row in rows)


def _free_cache(device: torch.device) -> None:
    """Return memory that torch keeps for later: it may be in pieces of the wrong size."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _not_finite(values: RowValues) -> dict[int, str]:
    """Find rows with a value that is not finite, and the name it has."""
    bad: dict[int, str] = {}
    for name, rows in values.items():
        # one look at all of a matrix; its rows are looked at only if there is something to find
        if isinstance(rows, torch.Tensor) and bool(torch.isfinite(rows).all()):
            continue
        for number, row in enumerate(rows):
            if not bool(torch.isfinite(row).all()):
                bad.setdefault(number, name)
    return bad


def _spoiled(name: str, record: SequenceRecord) -> NonFiniteError:
    what = "the model's head" if name == LOG_PROBS else f"layer {name!r}"
    problem = (
        f"{what} gives values that are not finite; set dtype='float32', leave the record out, or "
        "set on_error to skip"
    )
    return NonFiniteError(problem, record_id=record.id)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitResults:
    """A unit of which all pieces have run."""

    unit: WorkUnit
    cuts: Sequence[Sequence[Window]]
    """Windows of each record, on the forward strand."""
    taken: TakenPieces
    vectors: PieceVectors
    failed: Mapping[int, str]
    """Records that have no vector, by index: why."""
    unread: UnreadBases
    """Bases that the tokenizer has no words for."""
    stats: Mapping[str, float]
    """What its forward passes cost."""


class UnitRunner:
    """Runs the pieces of work units: the one way from records to what a model gives."""

    def __init__(
        self,
        reducer: Reducer,
        slabs: SlabBuilder,
        *,
        on_batch: Callable[[RunStats], None] | None = None,
        interruption: Interruption | None = None,
        keeps_tokens: bool = False,
        keeps_nan: bool = False,
        stats: RunStats | None = None,
    ) -> None:
        self.stats = stats or RunStats()
        self.block_tokens = max(slabs.batch_tokens, 1 if reducer.repeats_rows else LEAST_BLOCK_TOKENS)
        """Positions of a block, where a long sequence runs in blocks."""
        self._runner = BatchRunner(
            reducer,
            self.stats,
            block_tokens=self.block_tokens,
            skips_failed=slabs.skips_failed,
            keeps_nan=keeps_nan,
        )
        self._slabs = slabs
        self._keeps_tokens = keeps_tokens
        self._on_batch = on_batch
        self._interruption = interruption or Interruption()
        self._has_logged_unread = False

    def __call__(self, unit: WorkUnit) -> UnitResults:
        """Run one unit."""
        (results,) = self.run(self.lay_out([unit]))
        return results

    def lay_out(self, units: Iterable[WorkUnit]) -> Iterator[Slab]:
        """Cut, encode and pad units; no torch arithmetic, so that a thread may do it."""
        yield from self._slabs.slabs(units)

    def run(self, slabs: Iterable[Slab]) -> Generator[UnitResults, None, None]:
        """Run the model."""
        progress: _UnitProgress | None = None
        for slab in slabs:
            if progress is None:
                num_strands = 2 if self._slabs.cutter.both_strands else 1
                progress = _UnitProgress(
                    slab, self.stats, num_strands=num_strands, keeps_tokens=self._keeps_tokens
                )
            progress.open(slab)
            for work in slab.batches:
                with self._interruption.held():
                    for done in self._runner.run(work, slab.unit.records):
                        progress.take(done)
                self._report()
            if slab.is_last:
                self.stats.units += 1
                results = progress.results(slab)
                self._log_unread(results)
                progress = None
                self._report()
                del slab
                yield results
                del results

    def try_batch(self, work: PieceBatch, records: Sequence[SequenceRecord]) -> None:
        """Run one batch and keep nothing, to see what it costs."""
        for _ in self._runner.run(work, records):
            pass

    def _log_unread(self, results: UnitResults) -> None:
        if self._has_logged_unread or not results.unread:
            return
        self._has_logged_unread = True
        index, windows = next(iter(results.unread.items()))
        logger.warning(
            "record %r: the tokenizer has no words for %d of its bases; later records are only counted",
            results.unit.records[index].id,
            sum(windows.values()),
        )

    def _report(self) -> None:
        if self._on_batch is not None:
            self._on_batch(self.stats)


class _UnitProgress:
    """What the pieces of a unit gave so far; those that repeat another get what that one gave.

    A record counts as done in the running totals when its last piece is.
    """

    def __init__(self, slab: Slab, stats: RunStats, *, num_strands: int, keeps_tokens: bool) -> None:
        self._taken: dict[tuple[int, bool], dict[int, Taken]] = defaultdict(dict)
        self._vectors = PieceVectors(sum(map(len, slab.cuts)) * num_strands)
        self._failed: dict[int, str] = {}
        self._unread: dict[int, dict[int, int]] = defaultdict(dict)
        self._records, self._cuts = slab.unit.records, slab.cuts
        self._stats = stats
        self._before = asdict(stats)
        self._num_strands = num_strands
        self._keeps_tokens = keeps_tokens
        self._numbers: dict[bytes, int] = {}
        self._followers: dict[bytes, list[Piece]] = defaultdict(list)
        self._spoiled: dict[bytes, str] = {}
        # what a record still waits for: being cut to its end, and each of its pieces
        self._waiting = [1] * len(self._records)
        self._under_way = [0] * len(self._records)

    def open(self, slab: Slab) -> None:
        """Take a slab in: what need not run is done, or waits for the piece that it repeats."""
        self._failed.update(slab.failed)
        batched = (piece for work in slab.batches for piece in work.pieces)
        for piece in (*batched, *slab.repeats, *slab.empty):
            self._waiting[piece.record_index] += 1
            if piece.num_unread and not piece.is_reverse:
                self._unread[piece.record_index][piece.window_index] = piece.num_unread
                self._stats.unread += piece.num_unread
        for index in slab.cut_records:
            self._settle(index, 0)
        for piece in slab.empty:
            self._done(piece)
        self._stats.repeats += len(slab.repeats)
        for piece in slab.repeats:
            if piece.content in self._numbers:
                self._keep(piece)
            elif piece.content in self._spoiled:
                self._fail(piece, self._spoiled[piece.content])
            else:
                self._followers[piece.content].append(piece)

    def take(self, done: RunPieces) -> None:
        """Keep what some pieces of a batch gave."""
        for piece, reason in done.failed:
            self._spoiled[piece.content] = reason
            for same in (piece, *self._followers.pop(piece.content, ())):
                self._fail(same, reason)
        if not done.pieces:
            return
        numbers = self._vectors.add(done.values)
        # a piece with parts runs alone, and gives a vector for each of them
        firsts = numbers[:1] if done.pieces[0].parts else numbers
        for piece, number in zip(done.pieces, firsts, strict=True):
            self._numbers[piece.content] = number
            for same in (piece, *self._followers.pop(piece.content, ())):
                self._keep(same)

    def results(self, slab: Slab) -> UnitResults:
        """Collect what the unit gave, when its last slab has run."""
        now = asdict(self._stats)
        return UnitResults(
            unit=slab.unit,
            cuts=slab.cuts,
            taken=self._taken,
            vectors=self._vectors,
            failed=self._failed,
            unread=self._unread,
            stats={name: now[name] - self._before[name] for name in _COSTS},
        )

    def _fail(self, piece: Piece, reason: str) -> None:
        self._failed[piece.record_index] = reason
        self._done(piece)

    def _keep(self, piece: Piece) -> None:
        taken, number = self._taken[piece.record_index, piece.is_reverse], self._numbers[piece.content]
        for place, (window_index, tokens) in enumerate(piece.parts):
            weight = float(piece.pool_mask[tokens].sum())
            taken[window_index] = Taken(number=number + place, weight=weight, tokens=None)
        if not piece.parts:
            taken[piece.window_index] = Taken(
                number=number,
                weight=piece.weight,
                tokens=piece.counted_tokens() if self._keeps_tokens else None,
            )
        self._done(piece)

    def _done(self, piece: Piece) -> None:
        self._settle(piece.record_index, piece.num_bases // self._num_strands)

    def _settle(self, index: int, num_bases: int) -> None:
        stats = self._stats
        self._waiting[index] -= 1
        self._under_way[index] += num_bases
        stats.bases_under_way += num_bases
        if not self._waiting[index]:
            stats.bases_under_way -= self._under_way[index]
            stats.records += 1
            stats.bases += len(self._records[index].sequence)
            stats.windows += len(self._cuts[index])
