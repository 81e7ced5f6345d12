"""What a run would do, before anything is spent on it: counted exactly, and timed on a few forward passes.

``read -> units -> lay out -> measure``: the input is read once, as the run would read it. Nothing is written.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genoembed.engines.embedder import UnitEmbedder
from genoembed.engines.loading import load_configured, use_threads
from genoembed.engines.measuring import Measured, Workload, count_work, measure
from genoembed.engines.provenance import peak_memory_mb, run_facts
from genoembed.engines.request import read_records, read_request
from genoembed.engines.units import iter_units
from genoembed.extraction import check_files, manifest_of
from genoembed.sequences import InputCounts
from genoembed.store import Parts, free_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from os import PathLike

    from genoembed.config import EmbedConfig, Fusion, Pooling
    from genoembed.engines.units import WorkUnit
    from genoembed.models.genomic_model import GenomicModel

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
    """Say what :func:`genoembed.extract` would do and need: reads the input once, runs a few batches.

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
    with use_threads(config.model.threads):
        loaded = load_configured(config.model) if isinstance(request.model, str) else request.model
        embedder = UnitEmbedder(loaded, config, facts=request.trained)
        started = time.perf_counter()
        units = iter_units(
            read_records(config, counts), max_bases=embedder.unit_bases, max_records=embedder.unit_records
        )
        work, sample = count_work(
            _of_share(units, config),
            embedder,
            per_window=config.windows.per_window,
            keeps_tokens=config.embedding.pooling == "none",
        )
        reading_s = time.perf_counter() - started
        return _plan(config, embedder, counts, work, measure(sample, embedder), reading_s)


def _of_share(units: Iterable[WorkUnit], config: EmbedConfig) -> Iterator[WorkUnit]:
    first, step = config.run.share
    return (unit for unit in units if unit.number % step == first)


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
    """Size of all matrices: a vector a row, or a token and the places where records begin."""
    itemsize = np.dtype(config.output.out_dtype).itemsize
    if config.embedding.pooling == "none":
        return work.kept_tokens * width * itemsize + (work.rows + 1) * np.dtype(np.int64).itemsize
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
