"""Embed work units: lay them out, run their batches, build rows from what those gave.

Holds the model once and is called with unit after unit, here or in a worker. The three steps of a unit can be
had one by one, so that the first and the last may run in threads beside the forward passes: ``lay_out`` (cut,
encode, pad), ``run`` (forward, pool) and ``rows`` (merge windows, strands and layers).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from genoembed.contracts import EmbeddingBlock
from genoembed.errors import ConfigError, ModelError
from genoembed.pipeline.assemble import PieceVectors, RowBuilder, Taken
from genoembed.pipeline.batches import SlabBuilder
from genoembed.pipeline.cutting import Cutter
from genoembed.pipeline.forward import BatchRunner
from genoembed.pipeline.request import finisher
from genoembed.pipeline.threads import Interruption
from genoembed.pipeline.units import UNIT_RECORDS, RunStats, UnitTally
from genoembed.pooling.fuse import feature_names
from genoembed.pooling.reduce import check_pooling
from genoembed.store import UnitRecord, UnitRows
from genoembed.tokenization.hf import build_encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence

    from genoembed.config.embed import EmbedConfig
    from genoembed.contracts import SequenceRecord, Window
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.trained_folder import FinetunedFacts
    from genoembed.pipeline.assemble import TakenPieces
    from genoembed.pipeline.batches import PieceBatch, Slab
    from genoembed.pipeline.cutting import Piece
    from genoembed.pipeline.forward import RunPieces
    from genoembed.pipeline.units import WorkUnit
    from genoembed.tokenization.hf import SequenceEncoder


BATCH_TOKENS = {"cpu": 2048}
"""Slots of a forward pass where the user names none, by kind of device. On a CPU few are faster, as what one
layer hands to the next stays in the cache; docs/CONCEPTS.md has the figures."""
_BATCH_TOKENS_ELSEWHERE = 16384
LEAST_BLOCK_TOKENS = 512
"""A long sequence runs in blocks of a batch's size, but not of fewer positions: each is a pass of its own."""
_WIDE = 16384
_PROBE = b"ACGT" * 6
_UNIT_VALUES = 1 << 25
UNIT_BYTES = _UNIT_VALUES * 4
"""Of the vectors of a unit, at most, unless a single record has more: 128 MiB. Two units are held, and a copy
of one while it is written."""
_COSTS = ("windows", "repeats", "batches", "real_tokens", "slots", "forward_s", "pooling_s", "halvings")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedUnit:
    """A unit of which all pieces have run."""

    unit: WorkUnit
    cuts: Sequence[Sequence[Window]]
    """Windows of each record, on the forward strand."""
    taken: TakenPieces
    vectors: PieceVectors
    failed: Mapping[int, str]
    """Records that have no vector, by index: why."""
    stats: Mapping[str, float]
    """What its forward passes cost."""


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
        self.batch_tokens = config.model.batch_tokens or BATCH_TOKENS.get(
            model.device.type, _BATCH_TOKENS_ELSEWHERE
        )
        """Slots of a forward pass, padding included."""
        self.stats = RunStats()
        self._skips_failed = config.run.on_error == "skip"
        self.block_tokens = max(self.batch_tokens, LEAST_BLOCK_TOKENS)
        """Positions of a block, where a long sequence runs in blocks."""
        self._runner = BatchRunner(
            model,
            self.layers,
            config.embedding,
            self.stats,
            block_tokens=self.block_tokens,
            skips_failed=self._skips_failed,
        )
        self._on_batch = on_batch
        self._interruption = interruption or Interruption()
        encoder = build_encoder(model.tokenizer)
        self._check(encoder)
        self._cutter = Cutter(
            encoder=encoder,
            max_tokens=model.max_length,
            is_causal=model.is_causal,
            window=config.windows.window,
            stride=config.windows.stride,
            skip_first=config.embedding.skip_first,
            both_strands=config.embedding.rc != "none",
            mirror=config.windows.per_window,
        )
        self._slabs = SlabBuilder(
            cutter=self._cutter,
            batch_tokens=self.batch_tokens,
            equal_lengths=model.padding == "equal",
            rounds_lengths=model.carries_state,
            skips_failed=self._skips_failed,
        )
        self._rows = RowBuilder(
            layers=self.layers,
            embedding=config.embedding,
            per_window=config.windows.per_window,
            finish=finisher(facts, config.embedding, self.layers),
        )

    def __call__(self, unit: WorkUnit) -> UnitRows:
        """Embed the records of a unit."""
        (embedded,) = self.run(self.lay_out([unit]))
        return self.rows(embedded)

    @property
    def layer_widths(self) -> Mapping[str, int]:
        """Features of each layer on one strand; empty before the first batch."""
        return self._runner.layer_widths

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

    def lay_out(self, units: Iterable[WorkUnit]) -> Iterator[Slab]:
        """Cut, encode and pad units; no torch arithmetic, so that a thread may do it."""
        yield from self._slabs.slabs(units)

    def run(self, slabs: Iterable[Slab]) -> Generator[EmbeddedUnit, None, None]:
        """Run the model."""
        progress: _UnitProgress | None = None
        for slab in slabs:
            if progress is None:
                progress = _UnitProgress(slab, self.stats, num_strands=self.num_strands)
            progress.open(slab)
            for work in slab.batches:
                with self._interruption.held():
                    for done in self._runner.run(work, slab.unit.records):
                        progress.take(done)
                self._report()
            if slab.is_last:
                self.stats.units += 1
                embedded = EmbeddedUnit(
                    unit=slab.unit,
                    cuts=slab.cuts,
                    taken=progress.taken,
                    vectors=progress.vectors,
                    failed=progress.failed,
                    stats=progress.cost(),
                )
                progress = None
                self._report()
                del slab
                yield embedded
                del embedded

    def try_batch(self, work: PieceBatch, records: Sequence[SequenceRecord]) -> None:
        """Run one batch and keep nothing, to see what it costs."""
        for _ in self._runner.run(work, records):
            pass

    def rows(self, embedded: EmbeddedUnit) -> UnitRows:
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
        record = UnitRecord(
            number=unit.number,
            content=unit.content,
            first=unit.records[0].id,
            last=unit.records[-1].id,
            num_records=len(unit.records),
            num_bases=unit.num_bases,
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
        widths = self.layer_widths or (self._stated_widths if are_stated else {})
        return feature_names(widths, method=method, strands=strands) if widths else {}

    def _report(self) -> None:
        if self._on_batch is not None:
            self._on_batch(self.stats)

    def _check(self, encoder: SequenceEncoder) -> None:
        """Refuse what does not go with this model, before anything is read."""
        embedding = self.config.embedding
        problems: list[str] = []
        try:
            check_pooling(embedding.pooling, is_causal=self.model.is_causal)
        except ConfigError as error:
            problems.extend(error.problems)
        num_weights, num_layers = len(embedding.fusion_weights), len(self.layers)
        if embedding.fusion == "weighted" and num_weights != num_layers:
            problems.append(
                f"fusion_weights has {num_weights} numbers for {num_layers} layers; give one a layer"
            )
        if embedding.pooling == "none" and embedding.rc != "none" and not _has_token_per_base(encoder):
            problems.append(
                "pooling='none' with rc needs a token a base, and this tokenizer joins bases; set rc='none'"
            )
        if problems:
            raise ConfigError(*problems)


class _UnitProgress:
    """What the pieces of a unit gave so far; those that repeat another get what that one gave."""

    def __init__(self, slab: Slab, stats: RunStats, *, num_strands: int) -> None:
        self.taken: dict[tuple[int, bool], dict[int, Taken]] = defaultdict(dict)
        self.vectors = PieceVectors(sum(map(len, slab.cuts)) * num_strands)
        self._stats = stats
        self._tally = UnitTally(slab, stats, num_strands=num_strands)
        self._numbers: dict[bytes, int] = {}
        self._followers: dict[bytes, list[Piece]] = defaultdict(list)
        self._spoiled: dict[bytes, str] = {}
        self._before = asdict(stats)
        self.failed: dict[int, str] = {}

    def open(self, slab: Slab) -> None:
        """Take a slab in: what need not run is done, or waits for the piece that it repeats."""
        self._tally.open(slab)
        self.failed.update(slab.failed)
        for piece in slab.empty:
            self._tally.settle(piece)
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
        for piece, number in zip(done.pieces, self.vectors.add(done.vectors), strict=True):
            self._numbers[piece.content] = number
            for same in (piece, *self._followers.pop(piece.content, ())):
                self._keep(same)

    def cost(self) -> dict[str, float]:
        """Say what the unit's forward passes cost, when it is done."""
        now = asdict(self._stats)
        return {name: now[name] - self._before[name] for name in _COSTS}

    def _fail(self, piece: Piece, reason: str) -> None:
        self.failed[piece.record_index] = reason
        self._tally.settle(piece)

    def _keep(self, piece: Piece) -> None:
        taken = Taken(number=self._numbers[piece.content], weight=piece.num_bases)
        self.taken[piece.record_index, piece.is_reverse][piece.window_index] = taken
        self._tally.settle(piece)


def _has_token_per_base(encoder: SequenceEncoder) -> bool:
    if encoder.aligned:
        return True
    starts = encoder.encode(_PROBE).base_start
    return starts is not None and starts[starts >= 0].tolist() == list(range(len(_PROBE)))
