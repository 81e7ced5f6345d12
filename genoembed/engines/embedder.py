"""Embed work units: lay them out, run their batches, build rows from what those gave.

Holds the model once and is called with unit after unit, here or in a worker. The three steps of a unit can be
had one by one, so that the first and the last may run in threads beside the forward passes: ``lay_out`` (cut,
encode, pad), ``run`` (forward, pool) and ``rows`` (merge windows, strands and layers).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from genoembed.engines.carried import finisher
from genoembed.engines.forward import BatchRunner
from genoembed.engines.pieces import Cutter
from genoembed.engines.rows import RowBuilder, Taken
from genoembed.engines.slabs import SlabBuilder
from genoembed.engines.stats import RunStats, UnitTally
from genoembed.engines.vectors import PieceVectors
from genoembed.errors import ConfigError
from genoembed.pooling.reduce import check_pooling
from genoembed.tokenization.hf import build_encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from genoembed.config import EmbedConfig
    from genoembed.contracts import EmbeddingBlock, TokenBlock, Window
    from genoembed.engines.pieces import Piece
    from genoembed.engines.rows import TakenPieces
    from genoembed.engines.slabs import Slab
    from genoembed.engines.units import WorkUnit
    from genoembed.models.finetuned import FinetunedFacts
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.tokenization.hf import SequenceEncoder

BATCH_TOKENS = {"cpu": 2048}
"""Slots of a forward pass where the user names none, by kind of device. On a CPU few are faster, as what one
layer hands to the next stays in the cache; docs/CONCEPTS.md has the figures."""
_BATCH_TOKENS_ELSEWHERE = 16384
LEAST_BLOCK_TOKENS = 512
"""A long sequence runs in blocks of a batch's size, but not of fewer positions: each is a pass of its own."""
_WIDE = 16384
_PROBE = b"ACGT" * 6


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedUnit:
    """A unit of which all pieces have run."""

    unit: WorkUnit
    cuts: Sequence[Sequence[Window]]
    """Windows of each record, on the forward strand."""
    taken: TakenPieces
    vectors: PieceVectors


class UnitEmbedder:
    """Turns work units into rows of the output file.

    Args:
        model: The loaded model.
        config: What to do.
        on_batch: Called with the running totals after each forward pass.
        facts: What a fine-tuned model says about its vectors.

    Raises:
        ConfigError: If pooling, fusion, windows or strands do not go with the model.
        LayerError: If a layer is not there.
    """

    def __init__(
        self,
        model: GenomicModel,
        config: EmbedConfig,
        *,
        on_batch: Callable[[RunStats], None] | None = None,
        facts: FinetunedFacts | None = None,
    ) -> None:
        self.model = model
        self.config = config
        infos = model.resolve(config.embedding.layers)
        self.layers = tuple(info.path for info in infos)
        self.num_strands = 1 if config.embedding.rc == "none" else 2
        self.width_bound = sum(info.width or _WIDE for info in infos) * self.num_strands
        """Features of all layers and strands together; where a layer's are not known before it has run, a
        large guess."""
        self.batch_tokens = config.model.batch_tokens or BATCH_TOKENS.get(
            model.device.type, _BATCH_TOKENS_ELSEWHERE
        )
        """Slots of a forward pass, padding included."""
        self.stats = RunStats()
        self._runner = BatchRunner(
            model,
            self.layers,
            config.embedding,
            self.stats,
            block_tokens=max(self.batch_tokens, LEAST_BLOCK_TOKENS),
        )
        self._on_batch = on_batch
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
        )
        self._rows = RowBuilder(
            layers=self.layers,
            embedding=config.embedding,
            per_window=config.windows.per_window,
            finish=finisher(facts, config.embedding, self.layers),
        )

    def __call__(self, unit: WorkUnit) -> EmbeddingBlock | TokenBlock:
        """Embed the records of a unit.

        Args:
            unit: Records.

        Returns:
            Rows in the unit's order: a row a record, or a row a window.

        Raises:
            EmptyPoolError: If nothing of a record is left to pool.
            ModelError: If the device's memory does not hold a forward pass.
            NonFiniteError: If the model gives NaN or infinity.
            ShapeError: If layers of unequal widths are to be fused element by element.
            SequenceLengthError: If a window has more tokens than the context.
        """
        (embedded,) = self.run(self.lay_out([unit]))
        return self.rows(embedded)

    @property
    def layer_widths(self) -> Mapping[str, int]:
        """Features of each layer on one strand; empty before the first batch."""
        return self._runner.layer_widths

    @property
    def bases_per_vector(self) -> int | None:
        """Least bases of a sequence that give a vector of their own; None where a sequence is never cut."""
        if self.config.embedding.pooling == "none":
            return 1
        window = self.config.windows.window or self._cutter.context_bases
        return None if window is None else self.config.windows.stride or max(1, window - window // 4)

    def lay_out(self, units: Iterable[WorkUnit]) -> Iterator[Slab]:
        """Cut, encode and pad units; no torch arithmetic, so that a thread may do it.

        Args:
            units: In input order.

        Yields:
            Slabs, those of one unit in a row.

        Raises:
            SequenceLengthError: If a window has more tokens than the context.
        """
        yield from self._slabs.slabs(units)

    def run(self, slabs: Iterable[Slab]) -> Iterator[EmbeddedUnit]:
        """Run the model.

        Args:
            slabs: What :meth:`lay_out` gives.

        Yields:
            Units, as the last slab of each is done.

        Raises:
            ModelError: If the device's memory does not hold a forward pass.
            NonFiniteError: If the model gives NaN or infinity.
            ShapeError: If layers of unequal widths are to be fused element by element.
        """
        progress: _UnitProgress | None = None
        for slab in slabs:
            if progress is None:
                progress = _UnitProgress(slab, self.stats, num_strands=self.num_strands)
            progress.open(slab)
            for work in slab.batches:
                progress.take(work.pieces, self._runner.run(work, slab.unit.records))
                self._report()
            if slab.is_last:
                embedded = EmbeddedUnit(
                    unit=slab.unit, cuts=slab.cuts, taken=progress.taken, vectors=progress.vectors
                )
                progress = None
                self._report()
                del slab
                yield embedded
                del embedded

    def rows(self, embedded: EmbeddedUnit) -> EmbeddingBlock | TokenBlock:
        """Build the rows of a unit; a thread may do it.

        Args:
            embedded: What :meth:`run` gives.

        Returns:
            Rows in the unit's order: a row a record, or a row a window.

        Raises:
            EmptyPoolError: If nothing of a record is left to pool.
        """
        return self._rows.build(embedded.unit.records, embedded.cuts, embedded.taken, embedded.vectors)

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

    def open(self, slab: Slab) -> None:
        """Take a slab in: what need not run is done, or waits for the piece that it repeats."""
        self._tally.open(slab)
        for piece in slab.empty:
            self._tally.settle(piece)
        self._stats.repeats += len(slab.repeats)
        for piece in slab.repeats:
            if piece.content in self._numbers:
                self._keep(piece)
            else:
                self._followers[piece.content].append(piece)

    def take(self, pieces: Sequence[Piece], vectors: Mapping[str, Tensor | Sequence[Tensor]]) -> None:
        """Keep what the pieces of a batch gave."""
        for piece, number in zip(pieces, self.vectors.add(vectors), strict=True):
            self._numbers[piece.content] = number
            for same in (piece, *self._followers.pop(piece.content, ())):
                self._keep(same)

    def _keep(self, piece: Piece) -> None:
        taken = Taken(number=self._numbers[piece.content], weight=piece.num_bases)
        self.taken[piece.record_index, piece.is_reverse][piece.window_index] = taken
        self._tally.settle(piece)


def _has_token_per_base(encoder: SequenceEncoder) -> bool:
    if encoder.aligned:
        return True
    starts = encoder.encode(_PROBE).base_start
    return starts is not None and starts[starts >= 0].tolist() == list(range(len(_PROBE)))
