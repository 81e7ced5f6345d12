"""One forward pass: run a batch as far as the deepest layer, pool each layer the moment it is there.

In: a padded batch and the pieces in its rows. Out: finite vectors of each piece. Promised: of pooled layers
no activation is kept, so memory does not grow with the number of layers.

B rows, L padded length, D hidden size, T tokens.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from genoembed.errors import ModelError, NonFiniteError
from genoembed.pooling.fuse import feature_names
from genoembed.pooling.reduce import pool
from genoembed.pooling.running import RunningPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from genoembed.config import EmbeddingConfig, Pooling
    from genoembed.contracts import Batch, SequenceRecord
    from genoembed.engines.slabs import PieceBatch
    from genoembed.engines.stats import RunStats
    from genoembed.models.genomic_model import GenomicModel


class BatchRunner:
    """Runs batches of one model.

    Args:
        model: The loaded model.
        layers: Module paths.
        embedding: How they are pooled and fused.
        stats: The totals to add to.
        block_tokens: Longer rows run block by block, if the model carries its state from one to the next.
    """

    def __init__(
        self,
        model: GenomicModel,
        layers: Sequence[str],
        embedding: EmbeddingConfig,
        stats: RunStats,
        *,
        block_tokens: int,
    ) -> None:
        self.layer_widths: dict[str, int] = {}
        """Features of each layer; empty before the first batch."""
        self._model = model
        self._layers = layers
        self._embedding = embedding
        self._stats = stats
        self._block_tokens = block_tokens

    def run(
        self, work: PieceBatch, records: Sequence[SequenceRecord]
    ) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """Run one batch.

        Args:
            work: The batch; each row has a token that counts.
            records: Of the unit, for errors.

        Returns:
            Vectors by layer, float32 on the CPU: one matrix ``(B, D)`` where they are pooled, else ``(T, D)``
            for each piece.

        Raises:
            ModelError: If the device's memory does not hold the pass.
            NonFiniteError: If the model gives NaN or infinity.
            ShapeError: If layers of unequal widths are to be fused element by element.
        """
        pooling = _BatchPooling(self._embedding.pooling, work.batch)
        taken = self._forward(work.batch, pooling)
        if not self.layer_widths:
            self.layer_widths = {layer: vectors.shape[-1] for layer, vectors in taken.items()}
            feature_names(self.layer_widths, method=self._embedding.fusion)  # refuses unequal widths
        rows = {layer: pooling.split(vectors) for layer, vectors in taken.items()}
        for layer, vectors in taken.items():
            if not bool(torch.isfinite(vectors).all()):
                raise _not_finite(layer, rows[layer], [records[piece.record_index] for piece in work.pieces])
        return rows

    def _forward(self, batch: Batch, pooling: _BatchPooling) -> dict[str, Tensor]:
        started = time.perf_counter()
        try:
            if self._model.carries_state and batch.input_ids.shape[1] > self._block_tokens:
                take = pooling.take_block
                self._model.forward_in_blocks(batch, self._layers, take, block_tokens=self._block_tokens)
                captured = pooling.joined()
            else:
                captured = self._model.forward(batch, self._layers, pooling)
        except torch.OutOfMemoryError as error:
            num_rows, length = batch.input_ids.shape
            message = (
                f"device {str(self._model.device)!r} has no memory left for {num_rows} x {length} tokens; "
                "set batch_tokens lower, or window where a single sequence is too long"
            )
            raise ModelError(message) from error
        taken = {layer: vectors.cpu() for layer, vectors in captured.items()}
        self._stats.forward_s += time.perf_counter() - started - pooling.seconds
        self._stats.pooling_s += pooling.seconds
        self._stats.batches += 1
        self._stats.slots += batch.num_tokens
        self._stats.real_tokens += int(batch.attention_mask.sum())
        return taken


class _BatchPooling:
    """Reduces the activations of one batch as its layers run.

    Args:
        method: A pooling, or ``none``.
        batch: Of which every row has a token that counts.
    """

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


def _not_finite(
    layer: str, rows: Tensor | Sequence[Tensor], records: Sequence[SequenceRecord]
) -> NonFiniteError:
    spoiled = next(
        record for record, mine in zip(records, rows, strict=True) if not bool(torch.isfinite(mine).all())
    )
    problem = (
        f"layer {layer!r} gives values that are not finite; set dtype='float32', or leave the record out"
    )
    return NonFiniteError(problem, record_id=spoiled.id)
