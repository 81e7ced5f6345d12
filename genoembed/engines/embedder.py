"""Embed one work unit: cut, batch, run, pool; rows are built from that.

Holds the model once and is called with unit after unit, here or in a worker. Inside a unit, pieces are
batched by length; a slab of pieces is in memory at a time, so that a record longer than a unit does not
grow it.

B rows, L padded length, D hidden size, T tokens.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from genoembed.batching.order import plan_batches
from genoembed.batching.pad import pad_batch
from genoembed.engines.pieces import Cutter
from genoembed.engines.rows import RowBuilder, Taken
from genoembed.errors import ConfigError, ModelError, NonFiniteError
from genoembed.pooling.fuse import feature_names
from genoembed.pooling.reduce import check_pooling, pool
from genoembed.tokenization.hf import build_encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from genoembed.config import EmbedConfig
    from genoembed.contracts import Batch, EmbeddingBlock, SequenceRecord, TokenBlock
    from genoembed.engines.pieces import Piece
    from genoembed.engines.units import WorkUnit
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.tokenization.hf import SequenceEncoder

_SLAB_BATCHES = 32
_WIDE = 16384
_PROBE = b"ACGT" * 6


@dataclass(kw_only=True, slots=True)
class RunStats:
    """What the forward passes cost; grows batch by batch."""

    records: int = 0
    """Records that are done."""
    bases: int = 0
    """Bases of records that are done."""
    bases_under_way: int = 0
    """Bases of other records that are done; overlap of windows and the other strand count once."""
    windows: int = 0
    """Windows cut from them, on one strand."""
    batches: int = 0
    """Forward passes."""
    real_tokens: int = 0
    """Tokens that are no padding."""
    slots: int = 0
    """Tokens, padding included."""
    forward_s: float = 0.0
    """Seconds in forward passes and pooling."""

    @property
    def padding_share(self) -> float:
        """Share of the slots that hold padding."""
        return 1 - self.real_tokens / self.slots if self.slots else 0.0


class UnitEmbedder:
    """Turns work units into rows of the output file.

    Args:
        model: The loaded model.
        config: What to do.
        on_batch: Called with the running totals after each forward pass.

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
    ) -> None:
        self.model = model
        self.config = config
        infos = model.resolve(config.embedding.layers)
        self.layers = tuple(info.path for info in infos)
        self.width_bound = sum(info.width or _WIDE for info in infos)
        """Features of all layers together; where a width is not known before it has run, a large guess."""
        self.stats = RunStats()
        self.layer_widths: dict[str, int] = {}
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
        self._rows = RowBuilder(
            layers=self.layers, embedding=config.embedding, per_window=config.windows.per_window
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
        cuts = [self._cutter.windows(record) for record in unit.records]
        # what a record still waits for: being cut to its end, and each of its pieces
        waiting, under_way = [1] * len(unit.records), [0] * len(unit.records)
        num_strands = 1 if self.config.embedding.rc == "none" else 2

        def settle(index: int, num_bases: int = 0) -> None:
            waiting[index] -= 1
            under_way[index] += num_bases
            self.stats.bases_under_way += num_bases
            if not waiting[index]:
                self.stats.bases_under_way -= under_way[index]
                self.stats.records += 1
                self.stats.bases += len(unit.records[index].sequence)
                self.stats.windows += len(cuts[index])

        def cut() -> Iterator[Piece]:
            for index, (record, windows) in enumerate(zip(unit.records, cuts, strict=True)):
                for piece in self._cutter.pieces(record, index, windows):
                    waiting[index] += 1
                    yield piece
                settle(index)

        taken: dict[tuple[int, bool], dict[int, Taken]] = defaultdict(dict)
        for slab in self._slabs(cut()):
            for piece, vectors in self._run_slab(slab, unit.records):
                if vectors is not None:
                    taken[piece.record_index, piece.is_reverse][piece.window_index] = Taken(
                        vectors=vectors, weight=piece.num_bases
                    )
                settle(piece.record_index, piece.num_bases // num_strands)
        block = self._rows.build(unit.records, cuts, taken)
        if self._on_batch is not None:
            self._on_batch(self.stats)
        return block

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

    def _slabs(self, pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
        slab: list[Piece] = []
        tokens = 0
        for piece in pieces:
            slab.append(piece)
            tokens += len(piece.encoded.input_ids)
            if tokens >= _SLAB_BATCHES * self.config.model.batch_tokens:
                yield slab
                slab, tokens = [], 0
        if slab:
            yield slab

    def _run_slab(
        self, slab: list[Piece], records: Sequence[SequenceRecord]
    ) -> Iterator[tuple[Piece, dict[str, Tensor] | None]]:
        """Give each piece with its vectors; None where no token of it counts, which need not run."""
        kept = []
        for piece in slab:
            if piece.pool_mask.any():
                kept.append(piece)
            else:
                yield piece, None
        plan = plan_batches(
            [len(piece.encoded.input_ids) for piece in kept],
            max_tokens=self.config.model.batch_tokens,
            equal_lengths=self.model.padding == "equal",
        )
        for rows in plan:
            batch = pad_batch(
                [kept[row].encoded for row in rows],
                pool_masks=[kept[row].pool_mask for row in rows],
                rows=rows,
                pad_token_id=self._cutter.encoder.pad_token_id,
            )
            vectors = self._forward(batch)
            for position, row in enumerate(rows):
                mine = {layer: rows_of[position] for layer, rows_of in vectors.items()}
                self._check_finite(mine, records[kept[row].record_index])
                yield kept[row], mine
            if self._on_batch is not None:
                self._on_batch(self.stats)

    def _forward(self, batch: Batch) -> dict[str, Sequence[Tensor]]:
        """Vectors of each row by layer: ``(D,)`` pooled, ``(T, D)`` a token."""
        started = time.perf_counter()
        method = self.config.embedding.pooling
        mask_BL = batch.pool_mask.to(self.model.device)
        real_BL = batch.attention_mask.to(self.model.device)
        counts = batch.pool_mask.sum(dim=1).tolist()

        def reduce(_: str, hidden_BLD: Tensor) -> Tensor:
            mask = mask_BL.to(hidden_BLD.device)
            if method == "none":
                return hidden_BLD[mask].float().cpu()
            return pool(
                hidden_BLD, mask, method=method, attention_mask_BL=real_BL.to(hidden_BLD.device)
            ).cpu()

        try:
            captured = self.model.forward(batch, self.layers, reduce)
        except torch.OutOfMemoryError as error:
            num_rows, length = batch.input_ids.shape
            message = (
                f"device {str(self.model.device)!r} has no memory left for {num_rows} x {length} tokens; set "
                "batch_tokens lower, or window where a single sequence is too long"
            )
            raise ModelError(message) from error
        if not self.layer_widths:
            self.layer_widths = {layer: vectors.shape[-1] for layer, vectors in captured.items()}
            feature_names(self.layer_widths, method=self.config.embedding.fusion)  # refuses unequal widths
        self.stats.forward_s += time.perf_counter() - started
        self.stats.batches += 1
        self.stats.slots += batch.num_tokens
        self.stats.real_tokens += int(batch.attention_mask.sum())
        if method == "none":
            return {layer: torch.split(hidden_TD, counts) for layer, hidden_TD in captured.items()}
        return {layer: pooled_BD.unbind() for layer, pooled_BD in captured.items()}

    def _check_finite(self, vectors: Mapping[str, Tensor], record: SequenceRecord) -> None:
        for layer, vector in vectors.items():
            if not bool(torch.isfinite(vector).all()):
                problem = (
                    f"layer {layer!r} gives values that are not finite; set dtype='float32', "
                    "or leave the record out"
                )
                raise NonFiniteError(problem, record_id=record.id)


def _has_token_per_base(encoder: SequenceEncoder) -> bool:
    if encoder.aligned:
        return True
    starts = encoder.encode(_PROBE).base_start
    return starts is not None and starts[starts >= 0].tolist() == list(range(len(_PROBE)))
