"""From sequence files to an embedding file: the order of the stages, and no maths.

``read -> units -> embed -> write``; the file gets its name when it is complete.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genoembed._version import __version__
from genoembed.config import embed_config
from genoembed.contracts import EmbeddingBlock
from genoembed.engines.carried import CARRIED, carried_options, find_facts
from genoembed.engines.embedder import EmbeddedUnit, UnitEmbedder
from genoembed.engines.local import run_units
from genoembed.engines.overlap import write_behind
from genoembed.engines.provenance import describe_run
from genoembed.engines.units import UNIT_BASES, UNIT_RECORDS, iter_units
from genoembed.errors import ConfigError, EmptyRecordError
from genoembed.models.load import load_model
from genoembed.pooling.fuse import feature_names
from genoembed.sequences import InputCounts, read_sequences
from genoembed.store import EmbeddingWriter, check_output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from genoembed.config import EmbedConfig, Fusion, Pooling
    from genoembed.contracts import SequenceRecord, TokenBlock
    from genoembed.engines.stats import RunStats
    from genoembed.engines.units import WorkUnit
    from genoembed.models.finetuned import FinetunedFacts
    from genoembed.models.genomic_model import GenomicModel

logger = logging.getLogger(__name__)

_LOADING_OPTIONS = ("revision", "trust_remote_code", "dtype", "device")
_UNIT_VALUES = 1 << 25
"""Values of the vectors of a unit: 128 MiB. Two units are held, and a copy of one while it is written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractionReport:
    """What a run did."""

    output: Path
    """The file that was written."""
    num_rows: int
    """Rows of the file."""
    width: int
    """Features of the primary matrix (of a token, in per-token files)."""
    layers: tuple[str, ...]
    """Module paths of the layers that were taken."""
    counts: InputCounts
    """What was read, and what the input policies did."""
    stats: RunStats
    """What the forward passes cost."""
    seconds: float
    """Wall time of the run, without loading the model."""


def extract(
    inputs: str | PathLike[str] | Iterable[str | PathLike[str]],
    *,
    model: str | PathLike[str] | GenomicModel = "genoembed-mini",
    layers: int | str | Sequence[int | str] | None = None,
    pooling: Pooling | None = None,
    fusion: Fusion | None = None,
    output: str | PathLike[str] | None = None,
    progress: Callable[[RunStats], None] | None = None,
    **options: Any,
) -> ExtractionReport:
    """Embed the sequences of files and write one HDF5 file.

    Args:
        inputs: Sequence files; ``-`` is standard input.
        model: Bundled or registry name, local folder, Hugging Face id, or a model that is loaded already.
        layers: Block numbers, module paths, globs, ``final`` or ``all``; one or several. None takes what a
            fine-tuned model was trained with, and ``final`` of any other.
        pooling: ``mean``, ``max``, ``first``, ``last``, ``cls``, ``weighted_mean``, or ``none`` for a vector
            a token. None: as trained, else ``mean``.
        fusion: ``none``, ``concat``, ``mean``, ``max`` or ``weighted``, over layers. None: as trained, else
            ``none``.
        output: The file to write; None is the first input's stem and ``.h5``.
        progress: Called with the running totals after each forward pass.
        **options: Any other field of :class:`~genoembed.config.EmbedConfig`: ``regions``, ``flank``,
            ``invalid``, ``duplicates``, ``empty``, ``gaps``, ``keep_case``, ``revision``,
            ``trust_remote_code``, ``dtype``, ``device``, ``threads``, ``batch_tokens``, ``skip_first``,
            ``fusion_weights``, ``rc``, ``window``, ``stride``, ``per_window``, ``out_dtype``, ``overwrite``.
            None stands for the default. A model that is loaded already takes no ``revision``,
            ``trust_remote_code``, ``dtype`` or ``device``.

    Returns:
        What was done.

    Raises:
        ConfigError: If options are wrong, alone or together; all of them in one message.
        GenoembedError: If input, model or output fail; the output is then as it was before.
    """
    if isinstance(model, PathLike):
        model = fspath(model)
    facts = find_facts(model)
    given = options | {
        "layers": None if layers is None else _as_strings(layers),
        "pooling": pooling,
        "fusion": fusion,
    }
    given = {name: _frozen(name, value) for name, value in given.items() if value is not None}
    config = embed_config(
        {
            "inputs": _as_strings(inputs),
            "model": model if isinstance(model, str) else model.name,
            "output": None if output is None else fspath(output),
            **given,
            **carried_options(facts, {name: given[name] for name in CARRIED if name in given}),
        }
    )
    _check_files(config)
    if not isinstance(model, str):
        _check_loading(options)
    counts = InputCounts()
    records = read_sequences(
        config.input.inputs,
        invalid=config.input.invalid,
        duplicates=config.input.duplicates,
        empty=config.input.empty,
        gaps=config.input.gaps,
        keep_case=config.input.keep_case,
        regions=config.input.regions or None,
        flank=config.input.flank,
        counts=counts,
    )
    with _threads(config.model.threads):
        loaded = _load(config) if isinstance(model, str) else model
        embedder = UnitEmbedder(loaded, config, on_batch=progress, facts=facts)
        logger.info("%s: layers %s", loaded.name, ", ".join(embedder.layers))
        started = time.perf_counter()
        with closing(run_units(_units(records, embedder, config), embedder)) as done:
            num_rows, width = _write(done, config, embedder, counts, facts)
    seconds = time.perf_counter() - started
    logger.debug("%s: complete, rows: %d, seconds: %.1f", config.output.output, num_rows, seconds)
    return ExtractionReport(
        output=Path(config.output.output),
        num_rows=num_rows,
        width=width,
        layers=embedder.layers,
        counts=counts,
        stats=embedder.stats,
        seconds=seconds,
    )


def _check_files(config: EmbedConfig) -> None:
    """Refuse an output that is there already, or that is one of the files to be read."""
    target = check_output(config.output.output, overwrite=config.output.overwrite)
    for name in (*config.input.inputs, *config.input.regions):
        if target.exists() and Path(name).exists() and target.samefile(name):
            message = f"output is {config.output.output!r}, which is to be read; set output to another name"
            raise ConfigError(message)


def _check_loading(options: Mapping[str, object]) -> None:
    given = [name for name in _LOADING_OPTIONS if options.get(name) is not None]
    if given:
        message = f"{', '.join(given)}: the model is loaded already; leave it out, or give the model by name"
        raise ConfigError(message)


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    """Set torch's number of threads, and set it back."""
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        if wanted is not None:
            torch.set_num_threads(before)


def _units(
    records: Iterable[SequenceRecord], embedder: UnitEmbedder, config: EmbedConfig
) -> Iterator[WorkUnit]:
    """Group records so that the vectors of a unit, which are held until it is written, stay within bounds."""
    max_vectors = max(1, _UNIT_VALUES // embedder.width_bound)
    per_vector = embedder.bases_per_vector
    max_bases = UNIT_BASES if per_vector is None else min(UNIT_BASES, max_vectors * per_vector)
    return iter_units(records, max_bases=max_bases, max_records=min(UNIT_RECORDS, max_vectors))


def _load(config: EmbedConfig) -> GenomicModel:
    return load_model(
        config.model.model,
        device=config.model.device,
        dtype=config.model.dtype,
        trust_remote_code=config.model.trust_remote_code,
        revision=config.model.revision,
    )


def _write(
    done: Iterator[EmbeddedUnit],
    config: EmbedConfig,
    embedder: UnitEmbedder,
    counts: InputCounts,
    facts: FinetunedFacts | None,
) -> tuple[int, int]:
    """Build rows and write them, in a thread, while the next unit runs; gives rows and width."""
    first = next(done, None)
    if first is None:
        problem = (
            f"no record is left to embed ({counts.skipped_invalid} skipped as invalid, "
            f"{counts.skipped_empty} as empty); check the input, or set invalid='mask'"
        )
        raise EmptyRecordError(problem, path=", ".join(config.input.inputs))
    first_block = embedder.rows(first)  # says which record it is, if nothing of it is left to pool
    is_pooled = isinstance(first_block, EmbeddingBlock)
    names = _feature_names(config, embedder.layer_widths)
    with EmbeddingWriter(
        config.output.output,
        kind="pooled" if is_pooled else "tokens",
        dtype=config.output.out_dtype,
        feature_names=names if is_pooled else None,
        overwrite=config.output.overwrite,
    ) as writer:

        def write(done: EmbeddedUnit | EmbeddingBlock | TokenBlock) -> None:
            writer.append(embedder.rows(done) if isinstance(done, EmbeddedUnit) else done)

        with write_behind(write, depth=1) as put:
            put(first_block)
            del first, first_block  # a unit may be large, and the run long
            for unit in done:
                put(unit)
                del unit
        counts.windows = embedder.stats.windows
        trained = {} if facts is None else {"finetuned": dict(facts.values)}
        writer.finish({"genoembed_version": __version__, **describe_run(config, embedder, counts), **trained})
        return writer.num_rows, len(names)


def _feature_names(config: EmbedConfig, layer_widths: Mapping[str, int]) -> tuple[str, ...]:
    """Names of the columns of the primary matrix."""
    names = feature_names(layer_widths, method=config.embedding.fusion, strands=config.embedding.rc)
    return next(iter(names.values()))


def _as_strings(value: object) -> tuple[str, ...]:
    """Give one item, or several, as texts."""
    if isinstance(value, str | int | np.integer | PathLike):
        return (_as_string(value),)
    return tuple(_as_string(item) for item in value)  # type: ignore[attr-defined]


def _as_string(value: object) -> str:
    return fspath(value) if isinstance(value, PathLike) else str(value)


def _frozen(name: str, value: object) -> object:
    """Give an option the form that a configuration keeps: tuples, and plain values instead of NumPy's."""
    if name == "regions":
        return _as_strings(value)
    if isinstance(value, list | np.ndarray):
        return tuple(_frozen("", item) for item in value)
    return value.item() if isinstance(value, np.generic) else value
