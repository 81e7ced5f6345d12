"""What a run would do, before anything is spent on it: counted exactly, and timed on a few forward passes.

``read -> units -> lay out -> measure``: the input is read once, as the run would read it. Nothing is written.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genoembed.config.embed import EmbedConfig
from genoembed.config.fields import named_options
from genoembed.extraction import check_files, manifest_of
from genoembed.pipeline.embedder import UnitEmbedder, peak_memory_mb, run_facts
from genoembed.pipeline.request import load_configured, read_records, read_request, use_threads
from genoembed.pipeline.units import iter_units
from genoembed.sequences import InputCounts
from genoembed.store import Parts, free_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from os import PathLike

    from genoembed.config.choices import Fusion, Pooling
    from genoembed.contracts import Batch, SequenceRecord
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.pipeline.batches import PieceBatch, Slab
    from genoembed.pipeline.units import WorkUnit


_FILE_OVERHEAD = 1 << 16
_COPIES = 3
"""Units in memory at a time: one that is embedded, one that is saved, and a copy while it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What a run would do, and what it would need."""

    output: Path
    layers: tuple[str, ...]
    """Module paths."""
    counts: InputCounts
    """What was read, and what the input policies did."""
    shard: str | None
    """Which share of the units everything below is about; None is all."""
    units: int
    """Work units, those included that are finished."""
    units_finished: int
    """Units that an earlier run has saved."""
    windows: int
    """On one strand."""
    batches: int
    """Forward passes."""
    tokens: int
    """Tokens to run, both strands, without padding."""
    padding_share: float
    rows: int
    """Of the file."""
    widths: Mapping[str, int]
    """Features of each stored matrix; empty where nothing was measured."""
    vector_bytes: int
    """Of all matrices: exact."""
    output_bytes: int
    """Of the file: what it says about its rows is an estimate."""
    disk_bytes: int
    """What is needed while the units are joined: they and the file are there."""
    free_bytes: int | None
    """What is free where the output will be; None where the system does not say."""
    memory_bytes: int | None
    """Largest memory of the process, estimated; None where the system does not say."""
    device: str
    device_bytes: int | None
    """Largest memory on the device, measured; None for a CPU."""
    measured_batches: int
    tokens_per_s: float | None
    """Of one worker; None where nothing was measured."""
    workers: int
    seconds: float | None
    """What is left to do will take about so long; None where nothing was measured."""


@named_options(EmbedConfig)
def plan(
    inputs: str | PathLike[str] | Iterable[str | PathLike[str]],
    *,
    model: str | PathLike[str] | GenomicModel = "genoembed-mini",
    layers: int | str | Sequence[int | str] | None = None,
    pooling: Pooling | None = None,
    fusion: Fusion | None = None,
    output: str | PathLike[str] | None = None,
    **options: Any,
) -> RunPlan:
    """Return what :func:`genoembed.extract` would do and need: reads the input once, runs a few batches.

    Args:
        inputs: Sequence files; ``-`` is standard input, of which nothing is left afterwards.
        model: As ``extract`` takes it.
        layers: As ``extract`` takes them.
        pooling: As ``extract`` takes it.
        fusion: As ``extract`` takes it.
        output: The file that would be written.
        **options: As ``extract`` takes them.

    Returns:
        Counts, sizes and an estimate of the time on this machine, per worker where there are several.

    Raises:
        ConfigError: If options are wrong, alone or together; all of them in one message.
        GenoembedError: If input or model fail, or the output could not be written.
    """
    request = read_request(
        inputs, model=model, layers=layers, pooling=pooling, fusion=fusion, output=output, **options
    )
    config = request.config
    check_files(config)
    counts = InputCounts()
    records = read_records(config, counts)
    with use_threads(config.model.threads):
        loaded = load_configured(config.model) if isinstance(request.model, str) else request.model
        embedder = UnitEmbedder(loaded, config, facts=request.trained)
        started = time.perf_counter()
        units = iter_units(records, max_bases=embedder.unit_bases, max_records=embedder.unit_records)
        first, step = config.run.share
        work, sample = count_work(
            (unit for unit in units if unit.number % step == first),
            embedder,
            per_window=config.windows.per_window,
            keeps_tokens=config.embedding.pooling == "none",
        )
        reading_s = time.perf_counter() - started
        return _plan(config, embedder, counts, work, measure(sample, embedder), reading_s)


def _plan(
    config: EmbedConfig,
    embedder: UnitEmbedder,
    counts: InputCounts,
    work: Workload,
    measured: Measured | None,
    reading_s: float,
) -> RunPlan:
    widths = {name: len(columns) for name, columns in embedder.feature_names.items()}
    vector_bytes = _vector_bytes(config, work, sum(widths.values()))
    output_bytes = vector_bytes + work.table_bytes + _FILE_OVERHEAD
    finished = _num_finished(config, embedder)
    workers = config.run.workers or 1
    seconds = tokens_per_s = None
    if measured is not None:
        # a run reads and cuts while the model computes: the slower of the two decides
        whole = max(work.slots * measured.seconds_per_slot / workers, reading_s)
        seconds = whole * max(0, work.units - finished) / work.units
        tokens_per_s = work.real_tokens / (work.slots * measured.seconds_per_slot)
    return RunPlan(
        output=Path(config.output.output),
        layers=embedder.layers,
        counts=counts,
        shard=config.run.shard,
        units=work.units,
        units_finished=finished,
        windows=work.windows,
        batches=work.batches,
        tokens=work.real_tokens,
        padding_share=1 - work.real_tokens / work.slots if work.slots else 0.0,
        rows=work.rows,
        widths=widths,
        vector_bytes=vector_bytes,
        output_bytes=output_bytes,
        disk_bytes=2 * output_bytes,
        free_bytes=free_bytes(Path(config.output.output).absolute().parent),
        memory_bytes=_memory_bytes(work, sum(widths.values())),
        device=str(embedder.model.device),
        device_bytes=None if measured is None else measured.device_bytes,
        measured_batches=0 if measured is None else measured.num_batches,
        tokens_per_s=tokens_per_s,
        workers=workers,
        seconds=seconds,
    )


def _vector_bytes(config: EmbedConfig, work: Workload, width: int) -> int:
    """Size of all matrices: one vector per row, or per token with its span, and offsets."""
    itemsize, place = np.dtype(config.output.out_dtype).itemsize, np.dtype(np.int64).itemsize
    if config.embedding.pooling == "none":
        return work.kept_tokens * (width * itemsize + 2 * place) + (work.rows + 1) * place
    return math.prod((work.rows, width, itemsize))


def _memory_bytes(work: Workload, width: int) -> int | None:
    so_far = peak_memory_mb()
    if so_far is None:
        return None
    return (so_far << 20) + _COPIES * work.largest_unit * width * np.dtype(np.float32).itemsize


def _num_finished(config: EmbedConfig, embedder: UnitEmbedder) -> int:
    """Count the units of this very run that are saved already, of all shares."""
    parts = Parts.find(config.output.output)
    if parts is None or parts.manifest.digest != manifest_of(config, run_facts(config, embedder)).digest:
        return 0
    first, step = config.run.share
    return sum(number % step == first for number in parts.saved_numbers())


NUM_MEASURED = 3
_SEED = 0
_BLOCKS = 4
"""Of a sequence that runs in blocks, as many are measured: the others cost the same."""
# HDF5 File Format Specification, III.E: a text in a global heap has a header of 16 bytes, is rounded up to 8,
# and is referred to by its length (4), the heap's address (8) and its number there (4)
_HEAP_ALIGNMENT, _HEAP_OVERHEAD, _REFERENCE = 8, 16, 16
_NUMBERS_BYTES = 5 * 8 + 2 * 4
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
        self._number += 1  # decides between equal chances: passes themselves have no order
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
    """Cut and pad units as a run would, and count."""
    work, sample = Workload(), Sample()
    unit_tokens = 0
    for slab in embedder.runner.lay_out(units):
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
        torch.cuda.reset_peak_memory_stats(device)  # what loading took at its peak is no part of a pass
    embedder.runner.try_batch(sample.largest.work, sample.largest.records)
    costs = []
    for sampled in sample.drawn:
        started = time.perf_counter()
        embedder.runner.try_batch(sampled.work, sampled.records)
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
    # both strands of a window come to one vector
    pieces = (*batched, *slab.repeats)
    kept = sum(int(np.count_nonzero(piece.pool_mask)) for piece in pieces if not piece.is_reverse)
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
    """Estimate how many bytes a row takes in the table: texts are kept in a heap, and referred to."""
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
    most = _BLOCKS * embedder.runner.block_tokens
    if not embedder.model.carries_state or batch.input_ids.shape[1] <= most:
        return batch
    pool_mask = batch.pool_mask[:, :most].clone()
    pool_mask[:, 0] = 1  # a row without any token that counts would give no vector
    return replace(
        batch,
        input_ids=batch.input_ids[:, :most].clone(),
        attention_mask=batch.attention_mask[:, :most].clone(),
        pool_mask=pool_mask,
        parts=(),  # the first of them may be longer
    )
