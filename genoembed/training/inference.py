"""Run a model around an encoder over sequences of any length: for validation, prediction and search.

In: sequences, or records. Out: a fused vector for each, or what the model says of each token. Sequences go
through the cutter, the batches, the runner and the merging of ``extract``. Promised: the vectors are those of
``extract``; they depend neither on batch-mates nor on their order; nothing is truncated.

N sequences, D width, T tokens, C outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from genoembed.contracts import SequenceRecord
from genoembed.models.precision import full_float32
from genoembed.pipeline.assemble import empty_pool_error, merge_pieces, strand_pieces
from genoembed.pipeline.batches import SlabBuilder, default_batch_tokens
from genoembed.pipeline.cutting import Cutter
from genoembed.pipeline.forward import UnitRunner
from genoembed.pipeline.units import WorkUnit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from genoembed.contracts import Batch
    from genoembed.pipeline.assemble import Taken
    from genoembed.pipeline.forward import RowValues, UnitResults
    from genoembed.pipeline.units import RunStats
    from genoembed.tokenization.hf import SequenceEncoder
    from genoembed.training.encoder import Encoder


class TokenValues(NamedTuple):
    """What a model says of the tokens of one sequence."""

    spans: NDArray[np.int64]
    """Bases of each token that count, half-open. Shape ``(T, 2)``."""
    values: Mapping[str, Tensor]
    """By name; float32, ``(T, C)``, on the CPU."""


class SequenceRunner:
    """Knows how sequences are cut and batched for an encoder, and runs models around it."""

    def __init__(
        self,
        encoder: Encoder,
        tokens: SequenceEncoder,
        *,
        max_tokens: int | None,
        skip_first: int = 0,
        max_rows: int | None = None,
        keeps_nan: bool = False,
        skips_failed: bool = False,
    ) -> None:
        self.encoder = encoder
        self.failed: dict[int, str] = {}
        """Sequences of the last call that have no values, by index: why; only with ``skips_failed``."""
        self.max_rows = 1 if encoder.padding == "equal" else max_rows
        """Windows of a forward pass at most, where a caller makes batches of its own."""
        self._slab_options: dict[str, Any] = {
            "cutter": Cutter(
                encoder=tokens, max_tokens=max_tokens, is_causal=encoder.is_causal, skip_first=skip_first
            ),
            "max_rows": max_rows,
            "max_tokens": max_tokens,
            "equal_lengths": encoder.padding == "equal",
            "rounds_lengths": bool(getattr(encoder.backbone, "carries_state", False)),
            "skips_failed": skips_failed,
        }
        self._skip_first = skip_first
        self._keeps_nan = keeps_nan
        self._skips_failed = skips_failed
        self._reducer = _ModuleReducer(encoder)
        self._runner: UnitRunner | None = None

    @property
    def stats(self) -> RunStats:
        """Totals of all calls."""
        return self._unit_runner().stats

    @torch.no_grad()
    def vectors(self, model: nn.Module, sequences: Sequence[bytes | SequenceRecord]) -> Tensor:
        """Compute one fused vector for each sequence that has not failed, before any head.

        They are on the model's device.
        """

        def pooled_layers(**batch: Tensor) -> dict[str, Tensor]:
            layers: dict[str, Tensor] = model(**batch, want="layers")
            return layers

        results = self._run(pooled_layers, sequences, per_token=False)
        rows = self._rows(results, skip_first=self._skip_first)
        if not rows:
            return torch.empty(0, 0)
        encoder = self.encoder
        return encoder.fuse(
            {
                path: merge_pieces(rows, path, results.vectors, method=encoder.pooling).to(
                    self._reducer.device
                )
                for path in encoder.layers
            }
        )

    @torch.no_grad()
    def tokens(self, model: nn.Module, sequences: Sequence[bytes | SequenceRecord]) -> list[TokenValues]:
        """Predict for every token: ``logits`` and ``predictions``."""

        def predictions(**batch: Tensor) -> dict[str, Tensor]:
            output: dict[str, Tensor] = model(**batch, want="predict")
            return output

        return self._token_values(predictions, sequences)

    @torch.no_grad()
    def states(self, sequences: Sequence[bytes | SequenceRecord]) -> list[TokenValues]:
        """Compute the fused hidden states of every token that counts, before any head: ``states``."""

        def states(input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> dict[str, Tensor]:
            return {"states": self.encoder.hidden(input_ids, attention_mask)}

        return self._token_values(states, sequences)

    def _token_values(
        self, forward: Callable[..., dict[str, Tensor]], sequences: Sequence[bytes | SequenceRecord]
    ) -> list[TokenValues]:
        results = self._run(forward, sequences, per_token=True)
        return [_joined(results, pieces) for pieces in self._rows(results, skip_first=0)]

    def _rows(self, results: UnitResults, *, skip_first: int) -> list[list[Taken]]:
        """Collect the pieces of each sequence, and note those that have none or failed."""
        self.failed = dict(results.failed)
        rows = []
        for index, record in enumerate(results.unit.records):
            pieces = strand_pieces(results.taken, (index, False))
            if not pieces and not self._skips_failed:
                raise empty_pool_error(record, start=record.start, end=record.end, skip_first=skip_first)
            if not pieces:
                self.failed.setdefault(index, "nothing to pool")
            if index not in self.failed:
                rows.append(pieces)
        return rows

    def _run(
        self,
        forward: Callable[..., dict[str, Tensor]],
        sequences: Sequence[bytes | SequenceRecord],
        *,
        per_token: bool,
    ) -> UnitResults:
        runner = self._unit_runner()
        self._reducer.forward, self._reducer.per_token = forward, per_token
        records = tuple(
            item if isinstance(item, SequenceRecord) else SequenceRecord(id=str(index), sequence=item)
            for index, item in enumerate(sequences)
        )
        return runner(WorkUnit(number=0, records=records))

    def _unit_runner(self) -> UnitRunner:
        if self._runner is None:
            # not sooner: a trainer moves the model to its device after this object is made
            slabs = SlabBuilder(batch_tokens=default_batch_tokens(self._reducer.device), **self._slab_options)
            self._runner = UnitRunner(self._reducer, slabs, keeps_tokens=True, keeps_nan=self._keeps_nan)
        return self._runner


class _ModuleReducer:
    """Runs a module that reduces by itself, through its ``forward``, so that wrappers of it see the call."""

    carries_state = repeats_rows = False
    """Training knows no blocks."""

    def __init__(self, encoder: Encoder) -> None:
        self.pooling_s = 0.0
        self.forward: Callable[..., dict[str, Tensor]]
        self.per_token: bool
        self._encoder = encoder

    @property
    def device(self) -> torch.device:
        return next(self._encoder.backbone.parameters()).device

    def __call__(self, batch: Batch, *, block_tokens: int) -> RowValues:
        """Run a batch."""
        del block_tokens
        device = self.device
        with full_float32():
            output = self.forward(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                pool_mask=batch.pool_mask.to(device),
            )
        if not self.per_token:
            return {name: values_BD.cpu() for name, values_BD in output.items()}
        return {
            name: tuple(
                row_LC[kept_L] for row_LC, kept_L in zip(values.float().cpu(), batch.counted, strict=True)
            )
            for name, values in output.items()
        }


def _joined(results: UnitResults, pieces: Sequence[Taken]) -> TokenValues:
    """Join the windows of a sequence; each base counts in one of them."""
    numbers = [piece.number for piece in pieces]
    spans = [piece.tokens.spans for piece in pieces if piece.tokens is not None]
    values = {name: results.vectors.tokens(name, numbers) for name in results.vectors.names}
    return TokenValues(np.concatenate(spans), values)
