"""Embed work units: from the settings of a run to its cutter, batches, reducer and rows.

Holds the model once and is called with unit after unit, here or in a worker. The three steps of a unit can be
had one by one, so that the first and the last may run in threads during the forward passes:
``runner.lay_out`` (cut, encode, pad), ``runner.run`` (forward, pool) and ``rows`` (merge windows, strands and
layers).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from genoembed.contracts import EmbeddingBlock
from genoembed.errors import ConfigError, ModelError
from genoembed.models.trained_folder import finisher
from genoembed.pipeline.assemble import RowBuilder
from genoembed.pipeline.batches import SlabBuilder, default_batch_tokens
from genoembed.pipeline.cutting import Cutter
from genoembed.pipeline.forward import LayerReducer, UnitRunner
from genoembed.pipeline.units import UNIT_RECORDS
from genoembed.pooling.fuse import feature_names
from genoembed.pooling.reduce import check_pooling
from genoembed.store import UnitRows
from genoembed.tokenization.hf import build_encoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from genoembed.config.embed import EmbedConfig
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.trained_folder import FinetunedFacts
    from genoembed.pipeline.forward import UnitResults
    from genoembed.pipeline.threads import Interruption
    from genoembed.pipeline.units import RunStats, WorkUnit


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
        self.facts = facts
        self.num_strands = 1 if config.embedding.rc == "none" else 2
        self._stated_widths = {info.path: info.width for info in infos if info.width is not None}
        self.width_bound = sum(info.width or _WIDE for info in infos) * self.num_strands
        """Features of all layers and strands together; where a layer's are not known before it has run, a
        large guess."""
        self._skips_failed = config.run.on_error == "skip"
        self._cutter = Cutter(
            encoder=build_encoder(model.tokenizer),
            max_tokens=model.max_length,
            is_causal=model.is_causal,
            window=config.windows.window,
            stride=config.windows.stride,
            skip_first=config.embedding.skip_first,
            both_strands=config.embedding.rc != "none",
            mirror=config.windows.per_window,
        )
        self._check()
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
            model, self.layers, config.embedding.pooling, fusion=config.embedding.fusion
        )
        self.runner = UnitRunner(self._reducer, slabs, on_batch=on_batch, interruption=interruption)
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
        return feature_names(widths, method=method, strands=strands) if widths else {}

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
        if problems:
            raise ConfigError(*problems)
