"""One forward pass: run a batch as far as the deepest layer, pool each layer the moment it is there.

In: a padded batch and the pieces in its rows. Out: finite vectors of each piece. Promised: of pooled layers
no activation is kept, so memory does not grow with the number of layers.

B rows, L padded length, D hidden size, T tokens.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from genoembed.contracts import Batch
from genoembed.errors import ModelError, NonFiniteError
from genoembed.pipeline.batches import PieceBatch
from genoembed.pooling.fuse import feature_names
from genoembed.pooling.reduce import RunningPool, pool

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from genoembed.config.choices import Pooling
    from genoembed.config.embed import EmbeddingConfig
    from genoembed.contracts import SequenceRecord
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.pipeline.cutting import Piece
    from genoembed.pipeline.units import RunStats


logger = logging.getLogger(__name__)

_LEAST_BLOCK = 64
"""Positions of a block, when memory is short."""
_CPU_ALLOCATOR = "DefaultCPUAllocator: "


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPieces:
    """What some pieces of a batch gave."""

    pieces: tuple[Piece, ...]
    vectors: Mapping[str, Tensor | Sequence[Tensor]]
    """By layer, float32 on the CPU: ``(P, D)`` where they are pooled, else ``(T, D)`` for each piece."""
    failed: tuple[tuple[Piece, str], ...] = ()
    """Pieces without vectors, and why."""


class BatchRunner:
    """Runs batches of one model."""

    def __init__(
        self,
        model: GenomicModel,
        layers: Sequence[str],
        embedding: EmbeddingConfig,
        stats: RunStats,
        *,
        block_tokens: int,
        skips_failed: bool = False,
    ) -> None:
        self.max_slots = sys.maxsize
        """Slots of a pass that memory holds, as far as is known: halved when it did not."""
        self.layer_widths: dict[str, int] = {}
        """Features of each layer; empty before the first batch."""
        self._model = model
        self._layers = layers
        self._embedding = embedding
        self._stats = stats
        self._block_tokens = block_tokens
        self._skips_failed = skips_failed

    def run(self, work: PieceBatch, records: Sequence[SequenceRecord]) -> Iterator[RunPieces]:
        """Run one batch, in parts where memory does not hold it as a whole.

        Memory that is short once is short again: batches that follow are divided from the start.
        """
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
                taken, pooling = self._forward(part.batch)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                problem = None if self._back_off(part) else self._no_memory(part)
                if problem is None:
                    waiting.append(rows)
                    continue
                if not self._skips_failed:
                    raise problem from error
                yield RunPieces(pieces=(), vectors={}, failed=((part.pieces[0], "no memory"),))
                continue
            yield self._checked(part, taken, pooling, records)

    def _back_off(self, part: PieceBatch) -> bool:
        """Halve what a pass may hold; False where it holds a single piece that cannot be divided."""
        _free_cache(self._model.device)
        num_rows, length = part.batch.input_ids.shape
        if num_rows > 1:
            self.max_slots = num_rows * length // 2
        elif self._model.carries_state and min(self._block_tokens, length) > _LEAST_BLOCK:
            self._block_tokens = max(_LEAST_BLOCK, min(self._block_tokens, length) // 2)
        else:
            return False
        self._stats.halvings += 1
        now = self.max_slots if num_rows > 1 else self._block_tokens
        logger.warning(
            "no memory for a pass of %d x %d tokens on %s: at most %d at a time from here on",
            num_rows,
            length,
            self._model.device,
            now,
        )
        return True

    def _no_memory(self, part: PieceBatch) -> ModelError:
        num_rows, length = part.batch.input_ids.shape
        message = (
            f"device {str(self._model.device)!r} has no memory left for {num_rows} x {length} tokens; "
            "set window to cut long sequences, dtype to bfloat16, or device to one with more memory"
        )
        return ModelError(message)

    def _checked(
        self,
        part: PieceBatch,
        taken: Mapping[str, Tensor],
        pooling: _BatchPooling,
        records: Sequence[SequenceRecord],
    ) -> RunPieces:
        """Give each piece its own, and set apart those with values that are not finite."""
        if not self.layer_widths:
            self.layer_widths = {layer: vectors.shape[-1] for layer, vectors in taken.items()}
            feature_names(self.layer_widths, method=self._embedding.fusion)  # refuses unequal widths
        rows = {layer: pooling.split(vectors) for layer, vectors in taken.items()}
        spoiled = [layer for layer, vectors in taken.items() if not bool(torch.isfinite(vectors).all())]
        if not spoiled:
            return RunPieces(pieces=part.pieces, vectors=rows)
        bad = {
            number
            for layer in spoiled
            for number, mine in enumerate(rows[layer])
            if not bool(torch.isfinite(mine).all())
        }
        if not self._skips_failed:
            record = records[part.pieces[min(bad)].record_index]
            raise _not_finite(spoiled[0], record)
        good = [number for number in range(len(part.pieces)) if number not in bad]
        return RunPieces(
            pieces=tuple(part.pieces[number] for number in good),
            vectors={layer: _chosen(mine, good) for layer, mine in rows.items()} if good else {},
            failed=tuple((part.pieces[number], "not finite") for number in sorted(bad)),
        )

    def _forward(self, batch: Batch) -> tuple[dict[str, Tensor], _BatchPooling]:
        pooling = _BatchPooling(self._embedding.pooling, batch)
        started = time.perf_counter()
        if self._model.carries_state and batch.input_ids.shape[1] > self._block_tokens:
            take = pooling.take_block
            self._model.forward_in_blocks(batch, self._layers, take, block_tokens=self._block_tokens)
            captured = pooling.joined()
        else:
            captured = self._model.forward(batch, self._layers, pooling)
        taken = {layer: vectors.cpu() for layer, vectors in captured.items()}
        self._stats.forward_s += time.perf_counter() - started - pooling.seconds
        self._stats.pooling_s += pooling.seconds
        self._stats.batches += 1
        self._stats.slots += batch.num_tokens
        self._stats.real_tokens += int(batch.attention_mask.sum())
        return taken, pooling


class _BatchPooling:
    """Reduces the activations of one batch as its layers run."""

    def __init__(self, method: Pooling, batch: Batch) -> None:
        self.seconds = 0.0
        self._method = method
        self._batch = batch
        self._counts = batch.pool_mask.sum(dim=1).tolist()
        self._masks: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._running: dict[str, RunningPool] = {}
        self._tokens: dict[str, list[tuple[Tensor, ...]]] = {}

    def __call__(self, _: str, hidden_BLD: Tensor) -> Tensor:
        started = time.perf_counter()
        mask_BL, real_BL = self._masks_on(hidden_BLD.device)
        if self._method == "none":
            # to the CPU at once: unlike pooled vectors these would fill the device
            taken = hidden_BLD[mask_BL].float().cpu()
        else:
            # every row has a token; to make sure would stop a GPU at each layer
            taken = pool(hidden_BLD, mask_BL, method=self._method, attention_mask_BL=real_BL, empty="nan")
        self.seconds += time.perf_counter() - started
        return taken

    def take_block(self, layer: str, hidden_BCD: Tensor, span: slice) -> None:
        """Take the activations of some positions in."""
        started = time.perf_counter()
        mask_BC = self._masks_on(hidden_BCD.device)[0][:, span]
        if self._method == "none":
            tokens = tuple(row[mask].float().cpu() for row, mask in zip(hidden_BCD, mask_BC, strict=True))
            self._tokens.setdefault(layer, []).append(tokens)
        else:
            if layer not in self._running:
                self._running[layer] = RunningPool(self._method)
            self._running[layer].add(hidden_BCD, mask_BC)
        self.seconds += time.perf_counter() - started

    def joined(self) -> dict[str, Tensor]:
        """Give what the blocks gave together, as if all positions had come at once."""
        if self._method == "none":
            return {
                layer: torch.cat([block[row] for row in range(len(self._counts)) for block in blocks])
                for layer, blocks in self._tokens.items()
            }
        return {layer: running.pooled() for layer, running in self._running.items()}

    def split(self, vectors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Give each row its own vectors: that is what rows of a matrix are, unless tokens are kept."""
        return torch.split(vectors, self._counts) if self._method == "none" else vectors

    def _masks_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._masks:
            self._masks[device] = self._batch.pool_mask.to(device), self._batch.attention_mask.to(device)
        return self._masks[device]


def _rows_of(work: PieceBatch, rows: range) -> PieceBatch:
    """Give some rows of a batch as a batch, as long as the whole."""
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


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Tell a lack of memory from other failures; the allocator of CPUs has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or _CPU_ALLOCATOR in str(error)


def _free_cache(device: torch.device) -> None:
    """Give memory back that torch keeps for later: it may be in pieces of the wrong size."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _not_finite(layer: str, record: SequenceRecord) -> NonFiniteError:
    problem = (
        f"layer {layer!r} gives values that are not finite; set dtype='float32', leave the record out, or "
        "set on_error to skip"
    )
    return NonFiniteError(problem, record_id=record.id)
