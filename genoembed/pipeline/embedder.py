"""Embed work units: from the settings of a run to its cutter, batches, reducer, rows and facts.

:class:`UnitEmbedder` holds the model once and is called with unit after unit, here or in a worker. The three
steps of a unit can be had one by one, so that the first and the last may run in threads during the forward
passes: ``runner.lay_out`` (cut, encode, pad), ``runner.run`` (forward, pool) and ``rows`` (merge windows,
strands and layers). :func:`run_units` does so in this process, for :class:`LocalEngine`.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import sys
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from genoembed.contracts import EmbeddingBlock
from genoembed.errors import ConfigError, ModelError
from genoembed.models.trained_folder import finisher
from genoembed.pipeline.assemble import RowBuilder
from genoembed.pipeline.batches import SlabBuilder, default_batch_tokens
from genoembed.pipeline.cutting import Cutter
from genoembed.pipeline.forward import LayerReducer, UnitRunner
from genoembed.pipeline.request import load_configured, use_threads
from genoembed.pipeline.threads import read_ahead, write_behind
from genoembed.pipeline.units import UNIT_RECORDS
from genoembed.pooling.fuse import feature_names
from genoembed.pooling.reduce import check_pooling
from genoembed.store import UnitRows
from genoembed.tokenization.hf import build_encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from genoembed.config.embed import EmbedConfig
    from genoembed.contracts import SequenceRecord
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.trained_folder import FinetunedFacts
    from genoembed.pipeline.forward import UnitResults
    from genoembed.pipeline.threads import Interruption
    from genoembed.pipeline.units import RunStats, WorkUnit

logger = logging.getLogger(__name__)


_WIDE = 16384
_UNIT_VALUES = 1 << 25
UNIT_BYTES = _UNIT_VALUES * 4
"""Of the vectors of a unit, at most, unless a single record has more: 128 MiB. Two units are held, and a copy
of one while it is written."""


class UnitEmbedder:
    """Turns work units into rows of the output file."""

    def __init__(
        self,
        model: GenomicModel,
        config: EmbedConfig,
        *,
        on_batch: Callable[[RunStats], None] | None = None,
        facts: FinetunedFacts | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        self.model = model
        self.config = config
        infos = model.resolve(config.embedding.layers)
        self.layers = tuple(info.path for info in infos)
        if facts is not None:  # it may say "final"
            resolved = model.resolve(facts.layers)
            facts = replace(facts, layers=tuple(info.path for info in resolved))
        self.facts = facts
        self.num_strands = 1 if config.embedding.rc == "none" else 2
        per_state = 2 if config.embedding.pooling == "mean_std" else 1
        self._stated_widths = {info.path: info.width * per_state for info in infos if info.width is not None}
        self.width_bound = sum(info.width or _WIDE for info in infos) * per_state * self.num_strands
        """Features of all layers and strands together; where a layer's are not known before it has run, a
        large guess."""
        self._skips_failed = config.run.on_error == "skip"
        self._cutter = Cutter(
            encoder=build_encoder(model.tokens, add_special_tokens=model.special_tokens),
            max_tokens=model.max_length,
            is_causal=model.is_causal,
            window=config.windows.window,
            stride=config.windows.stride,
            skip_first=config.embedding.skip_first,
            both_strands=config.embedding.rc != "none",
            mirror=config.windows.per_window,
            carries_state=config.windows.carry_state,
        )
        self._check()
        encoder = self._cutter.encoder
        counts_otherwise = encoder.num_special_tokens or not self._cutter.has_token_per_base
        if facts is not None and facts.counts_tokens and counts_otherwise:
            message = "model %s: its own %s counts every token once, special ones too; here, bases count"
            logger.warning(message, model.name, facts.pooling)
        slabs = SlabBuilder(
            cutter=self._cutter,
            batch_tokens=config.model.batch_tokens or default_batch_tokens(model.device),
            max_tokens=model.max_length,
            equal_lengths=model.padding == "equal",
            rounds_lengths=model.carries_state,
            skips_failed=self._skips_failed,
        )
        self.batch_tokens = slabs.batch_tokens
        """Slots of a forward pass, padding included."""
        self._reducer = LayerReducer(
            model,
            self.layers,
            config.embedding.pooling,
            fusion=config.embedding.fusion,
            windows=self._cutter.attention_windows,
        )
        self.runner = UnitRunner(
            self._reducer,
            slabs,
            on_batch=on_batch,
            interruption=interruption,
            keeps_tokens=config.embedding.pooling == "none",
        )
        self.stats = self.runner.stats
        self._rows = RowBuilder(
            layers=self.layers,
            embedding=config.embedding,
            per_window=config.windows.per_window,
            finish=finisher(facts, config.embedding, self.layers),
        )

    def __call__(self, unit: WorkUnit) -> UnitRows:
        """Embed the records of a unit."""
        return self.rows(self.runner(unit))

    def num_tokens(self, record: SequenceRecord) -> int:
        """Count the tokens of a record as a whole, special ones included; overlap of windows is left out."""
        encoder = self._cutter.encoder
        if encoder.aligned:
            return len(record.sequence) + encoder.num_special_tokens
        return len(encoder.encode(record.sequence).input_ids)

    @property
    def unit_bases(self) -> int:
        """Bases of a work unit: as configured, but so few that its vectors stay within bounds."""
        per_vector = self.bases_per_vector
        asked = self.config.run.unit_bases
        return asked if per_vector is None else min(asked, self._unit_vectors * per_vector)

    @property
    def unit_records(self) -> int:
        """Records of a work unit at most."""
        return min(UNIT_RECORDS, self._unit_vectors)

    @property
    def _unit_vectors(self) -> int:
        return max(1, _UNIT_VALUES // self.width_bound)

    @property
    def bases_per_vector(self) -> int | None:
        """Least bases of a sequence that give a vector of their own; None where a sequence is never cut."""
        if self.config.embedding.pooling == "none":
            return 1
        window = self.config.windows.window or self._cutter.context_bases
        return None if window is None else self.config.windows.stride or max(1, window - window // 4)

    def rows(self, embedded: UnitResults) -> UnitRows:
        """Build the rows of a unit; a thread may do it."""
        unit, failed = embedded.unit, dict(embedded.failed)
        if self._skips_failed:
            failed = self._rows.nothing_left(unit.records, embedded.cuts, embedded.taken) | failed
        names = self.feature_names
        if failed and not names:
            first, reason = next(iter(failed.items()))
            message = (
                f"record {unit.records[first].id!r}: {reason}, and no other record has a vector yet that "
                "would tell how wide vectors are; look at the input and the model's settings"
            )
            raise ModelError(message)
        block = self._rows.build(
            unit.records,
            embedded.cuts,
            embedded.taken,
            embedded.vectors,
            failed,
            widths={name: len(columns) for name, columns in names.items()},
            unread=embedded.unread,
        )
        record = unit.record(
            num_rows=len(block.rows),
            stats=embedded.stats,
            failed={unit.records[index].id: reason for index, reason in sorted(failed.items())},
        )
        primary = next(iter(names.values())) if isinstance(block, EmbeddingBlock) else None
        return UnitRows(record=record, block=block, feature_names=primary)

    @property
    def feature_names(self) -> dict[str, tuple[str, ...]]:
        """Names of the columns of each matrix; empty where no width is known before the first batch."""
        method, strands = self.config.embedding.fusion, self.config.embedding.rc
        are_stated = len(self._stated_widths) == len(self.layers)
        widths = self._reducer.widths or (self._stated_widths if are_stated else {})
        pooling = self.config.embedding.pooling
        return feature_names(widths, method=method, strands=strands, pooling=pooling) if widths else {}

    def _check(self) -> None:
        """Raise if options do not fit this model, before anything is read."""
        embedding = self.config.embedding
        problems: list[str] = []
        try:
            check_pooling(embedding.pooling, is_causal=self.model.is_causal)
        except ConfigError as error:
            problems.extend(error.problems)
        num_weights, num_layers = len(embedding.fusion_weights), len(self.layers)
        if embedding.fusion == "weighted" and num_weights != num_layers:
            problems.append(
                f"fusion_weights has {num_weights} numbers for {num_layers} layers; give one per layer"
            )
        if embedding.pooling == "none" and embedding.rc != "none" and not self._cutter.has_token_per_base:
            problems.append(
                "pooling='none' with rc needs one token per base, but this tokenizer joins bases; "
                "set rc='none'"
            )
        if self.config.windows.carry_state:
            problems.extend(self._cutter.state_problems(self.model))
        if problems:
            raise ConfigError(*problems)


try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


_PLACES = (
    "inputs",
    "regions",
    "output",
    "overwrite",
    "resume",
    "certificate",
    "shard",
    "engine",
    "workers",
    "ray_address",
)
"""Settings that say where things are and who does the work: they change no vector."""
_POLICIES = ("invalid", "duplicates", "empty", "gaps", "bad_regions", "on_error")
"""What is done about bad records. Units say what was made of theirs, so these are compared there."""
_MACHINE = ("revision", "trust_remote_code", "device", "threads", "batch_tokens", "model")
"""Settings that a run may go on with on another machine; what they lead to is compared instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What a run must know of its model before it begins: plain values, so that a worker can send them."""

    identity: Mapping[str, Any]
    """Everything but the input that decides what the vectors are. Two runs of which it is equal may share
    their work units."""
    policies: Mapping[str, Any]
    """What is done about bad records; work units that come out the same whatever it is stay."""
    told: Mapping[str, Any]
    """What the file is to say about the model and the machine that it runs on."""
    layers: tuple[str, ...]
    """Module paths."""
    unit_bases: int
    """Bases of a work unit."""
    unit_records: int
    """Records of a work unit at most."""


def run_facts(config: EmbedConfig, embedder: UnitEmbedder) -> RunFacts:
    """Collect what a run must know of its model."""
    trained = {} if embedder.facts is None else {"finetuned": dict(embedder.facts.values)}
    provenance = dict(embedder.model.provenance)  # once: it sums up all weights
    return RunFacts(
        identity=_plain(_identity(config, embedder, provenance)),
        policies={name: value for name, value in _flat(config).items() if name in _POLICIES},
        told={
            "model": provenance,
            "tokenizer": embedder.model.tokenizer_name,
            "layers": list(embedder.layers),
            "versions": {
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "transformers": version("transformers"),
                "numpy": np.__version__,
            },
            "threads": torch.get_num_threads(),
            "batch_tokens": embedder.batch_tokens,
            **trained,
        },
        layers=embedder.layers,
        unit_bases=embedder.unit_bases,
        unit_records=embedder.unit_records,
    )


def _identity(config: EmbedConfig, embedder: UnitEmbedder, model: Mapping[str, Any]) -> dict[str, Any]:
    left_out = (*_PLACES, *_MACHINE, *_POLICIES)
    kept = {key: value for key, value in _flat(config).items() if key not in left_out}
    return {
        **kept,
        "model": model["class"],
        **model["content"],
        "dtype": model["dtype"],
        "fp8": embedder.model.fp8_numbers,
        "max_length": model["max_length"],
        "tokenizer": embedder.model.tokenizer_name,
        "layers": list(embedder.layers),
        "unit_bases": embedder.unit_bases,
        "unit_records": embedder.unit_records,
        "trained": None if embedder.facts is None else dict(embedder.facts.values),
    }


def _flat(config: EmbedConfig) -> dict[str, Any]:
    stages = [values for values in config.to_dict().values() if isinstance(values, dict)]
    return {key: value for values in stages for key, value in values.items()}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Convert values to what will be read back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def describe_run(config: EmbedConfig, facts: RunFacts) -> dict[str, Any]:
    """Collect what is needed to repeat a run, as far as it is known when the run begins."""
    settings = config.to_dict()
    settings["run"] = {"unit_bases": config.run.unit_bases, "on_error": config.run.on_error}
    return {
        "command": shlex.join(sys.argv),
        "created": _now().isoformat(timespec="seconds"),
        "config": settings,
        **facts.told,
    }


def _now() -> datetime:
    """The time that files are marked with; reproducible-builds.org says what the variable means."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(fixed), UTC) if fixed.isdecimal() else datetime.now(UTC)


def peak_memory_mb() -> int | None:
    """Return the largest resident memory of this process so far."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)


class UnitEngine(Protocol):
    """Embeds work units, here or elsewhere; the model is loaded when there is an engine."""

    @property
    def facts(self) -> RunFacts:
        """What the run is, as far as the model decides it."""

    @property
    def stats(self) -> RunStats:
        """The running totals; those of units that were kept are the caller's to count."""

    def run(self, units: Iterable[WorkUnit], save: Callable[[UnitRows], None]) -> None:
        """Embed units and save them."""


_SLABS_AHEAD = 1


class LocalEngine:
    """Embeds work units in this process."""

    def __init__(self, embedder: UnitEmbedder) -> None:
        self.facts = run_facts(embedder.config, embedder)
        self.stats = embedder.stats
        self._embedder = embedder

    def run(self, units: Iterable[WorkUnit], save: Callable[[UnitRows], None]) -> None:
        """Embed units and save them, in order."""
        run_units(units, self._embedder, save)


@contextmanager
def local_engine(
    config: EmbedConfig,
    model: str | GenomicModel,
    *,
    trained: FinetunedFacts | None,
    on_batch: Callable[[RunStats], None] | None = None,
    interruption: Interruption | None = None,
) -> Iterator[LocalEngine]:
    """Load the model, unless it is loaded already, and get ready."""
    with use_threads(config.model.threads):
        loaded = load_configured(config.model) if isinstance(model, str) else model
        yield LocalEngine(
            UnitEmbedder(loaded, config, on_batch=on_batch, facts=trained, interruption=interruption)
        )


def run_units(units: Iterable[WorkUnit], embedder: UnitEmbedder, save: Callable[[UnitRows], None]) -> None:
    """Embed each unit and save it; the next batches are read, cut and tokenized in a thread meanwhile."""

    def build_and_save(embedded: UnitResults) -> None:
        save(embedder.rows(embedded))

    with (
        read_ahead(embedder.runner.lay_out(units), depth=_SLABS_AHEAD) as slabs,
        closing(embedder.runner.run(slabs)) as done,
        write_behind(build_and_save, depth=1) as put,
    ):
        for embedded in done:
            put(embedded)
            del embedded  # a unit may be large, and the next one long in coming
