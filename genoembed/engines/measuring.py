"""Count what a run will have to do, and measure a few of its forward passes.

In: work units. Out: how many windows, tokens, rows and passes they make, exactly, and what a pass costs, from
a sample in which each token had the same chance. Nothing is written.
"""

from __future__ import annotations

import heapq
import random
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from genoembed.contracts import Batch, SequenceRecord
    from genoembed.engines.embedder import UnitEmbedder
    from genoembed.engines.slabs import PieceBatch, Slab
    from genoembed.engines.units import WorkUnit

NUM_MEASURED = 3
_SEED = 0
_BLOCKS = 4
"""Of a sequence that runs in blocks, as many are measured: the others cost the same."""
_HEAP_ALIGNMENT, _HEAP_OVERHEAD, _REFERENCE = 8, 16, 16
_NUMBERS_BYTES = 4 * 8 + 2 * 4
"""Four integers and two codes of a row."""
_DIGEST_LENGTH = 64


@dataclass(kw_only=True, slots=True)
class Workload:
    """What units come to."""

    units: int = 0
    windows: int = 0
    """On one strand."""
    rows: int = 0
    """Of the file."""
    kept_tokens: int = 0
    """Tokens that pooling counts, on one strand: the vectors of a file without pooling."""
    batches: int = 0
    """Forward passes."""
    real_tokens: int = 0
    """Tokens to run, without padding."""
    slots: int = 0
    """Tokens to run, padding included."""
    repeats: int = 0
    """Windows that need not run, since the model will have seen the same before."""
    table_bytes: int = 0
    """What the file says about its rows, about."""
    largest_unit: int = 0
    """Vectors (rows, or tokens without pooling) of the largest unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """A forward pass that may be measured."""

    work: PieceBatch
    records: tuple[SequenceRecord, ...]


@dataclass(kw_only=True)
class Sample:
    """Passes drawn so that each token has the same chance, and the largest one."""

    largest: Sampled | None = None
    _drawn: list[tuple[float, int, Sampled]] = field(default_factory=list)
    _random: random.Random = field(default_factory=lambda: random.Random(_SEED))
    _number: int = 0

    def offer(self, sampled: Sampled) -> None:
        """Draw a pass, or let it go."""
        slots = sampled.work.batch.num_tokens
        if self.largest is None or slots > self.largest.work.batch.num_tokens:
            self.largest = sampled
        # Efraimidis and Spirakis: the largest of u ** (1 / weight) are a sample without replacement
        self._number += 1
        heapq.heappush(self._drawn, (self._random.random() ** (1 / slots), self._number, sampled))
        if len(self._drawn) > NUM_MEASURED:
            heapq.heappop(self._drawn)

    @property
    def drawn(self) -> list[Sampled]:
        """The passes that were drawn."""
        return [sampled for _, _, sampled in self._drawn]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What passes cost."""

    num_batches: int
    seconds_per_slot: float
    device_bytes: int | None
    """Largest memory on the device; None for a CPU."""


def count_work(
    units: Iterable[WorkUnit], embedder: UnitEmbedder, *, per_window: bool, keeps_tokens: bool
) -> tuple[Workload, Sample]:
    """Lay units out as a run would, and count."""
    work, sample = Workload(), Sample()
    unit_tokens = 0
    for slab in embedder.lay_out(units):
        unit_tokens += _count_pieces(slab, work)
        for batch in slab.batches:
            shortened = replace(batch, batch=_shortened(batch.batch, embedder))
            sample.offer(Sampled(work=shortened, records=slab.unit.records))
        if slab.is_last:
            num_rows = _count_rows(slab, work, per_window=per_window)
            work.largest_unit = max(work.largest_unit, unit_tokens if keeps_tokens else num_rows)
            unit_tokens = 0
    return work, sample


def measure(sample: Sample, embedder: UnitEmbedder) -> Measured | None:
    """Run the largest pass, which warms up and needs the most memory, then time those that were drawn."""
    if sample.largest is None:
        return None
    device = embedder.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    embedder.try_batch(sample.largest.work, sample.largest.records)
    costs = []
    for sampled in sample.drawn:
        started = time.perf_counter()
        embedder.try_batch(sampled.work, sampled.records)
        costs.append((time.perf_counter() - started) / sampled.work.batch.num_tokens)
    return Measured(
        num_batches=len(costs),
        seconds_per_slot=sum(costs) / len(costs),
        device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _count_pieces(slab: Slab, work: Workload) -> int:
    """Count the passes of a slab and their tokens; give the tokens that pooling counts, of one strand."""
    for batch in slab.batches:
        work.batches += 1
        work.slots += batch.batch.num_tokens
        work.real_tokens += int(batch.batch.attention_mask.sum())
    work.repeats += len(slab.repeats)
    batched = (piece for batch in slab.batches for piece in batch.pieces)
    kept = sum(int(piece.pool_mask.sum()) for piece in (*batched, *slab.repeats) if not piece.is_reverse)
    work.kept_tokens += kept
    return kept


def _count_rows(slab: Slab, work: Workload, *, per_window: bool) -> int:
    """Count a unit, its windows and rows; give the number of the rows."""
    work.units += 1
    num_rows = 0
    for record, windows in zip(slab.unit.records, slab.cuts, strict=True):
        rows_of_record = len(windows) if per_window else 1
        work.windows += len(windows)
        num_rows += rows_of_record
        work.table_bytes += rows_of_record * _row_bytes(record)
    work.rows += num_rows
    return num_rows


def _row_bytes(record: SequenceRecord) -> int:
    """Say about how many bytes a row takes in the table: texts lie in a heap, and are referred to."""
    lengths = (
        len(record.id),
        len(record.description),
        _DIGEST_LENGTH,
        sum(map(len, record.flags)),
    )
    heap = sum(
        _HEAP_OVERHEAD + -(-length // _HEAP_ALIGNMENT) * _HEAP_ALIGNMENT for length in lengths if length
    )
    return heap + len(lengths) * _REFERENCE + _NUMBERS_BYTES


def _shortened(batch: Batch, embedder: UnitEmbedder) -> Batch:
    """Cut a sequence that will run in blocks, so that a few of them are measured."""
    most = _BLOCKS * embedder.block_tokens
    if not embedder.model.carries_state or batch.input_ids.shape[1] <= most:
        return batch
    pool_mask = batch.pool_mask[:, :most].clone()
    pool_mask[:, 0] = True  # a row without any token that counts would give no vector
    return replace(
        batch,
        input_ids=batch.input_ids[:, :most].clone(),
        attention_mask=batch.attention_mask[:, :most].clone(),
        pool_mask=pool_mask,
    )
