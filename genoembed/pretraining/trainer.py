"""The loop of pretraining: transformers' Trainer, fed with packed rows and measured in bits per base.

T targets of a batch, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from genoembed.contracts import IGNORE_INDEX
from genoembed.errors import foreign_code
from genoembed.pretraining.start import forward_options
from genoembed.training.distributed import from_all
from genoembed.training.trainer import ResumableTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from genoembed.pretraining.stream import HeldoutRows, PackedStream


ADAM_BETA2 = 0.98
"""Shorter memory than AdamW's usual 0.999, as language models are trained."""


class PackedTrainer(ResumableTrainer):
    """A Trainer over :class:`~genoembed.pretraining.stream.PackedStream`."""

    def __init__(
        self,
        *,
        stream: PackedStream,
        heldout: HeldoutRows,
        isolating: tuple[str, ...],
        tokenizer: PreTrainedTokenizerBase,
        **arguments: Any,
    ) -> None:
        self._stream, self._heldout, self._tokenizer = stream, heldout, tokenizer
        self._fields = ("input_ids", *isolating)
        self._forward_options = forward_options(isolating)
        super().__init__(data_collator=self._collate, train_dataset=stream, **arguments)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the tokenizer with the model: each checkpoint is a folder that can be loaded by itself."""
        super()._save(output_dir, state_dict)
        self._tokenizer.save_pretrained(output_dir or str(self.folder))

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Read the stream as it is: accelerate would read it in one process and hand rows around."""
        return DataLoader(
            self._stream, batch_size=self.args.per_device_train_batch_size, collate_fn=self._collate
        )

    def _collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.book.padding.add(torch.stack([row["segment_ids"] >= 0 for row in rows]))
        return {name: torch.stack([row[name] for row in rows]) for name in (*self._fields, "labels")}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Add the options of the forward pass."""
        with foreign_code("the model's forward pass"):
            return super().compute_loss(model, {**inputs, **self._forward_options}, *args, **kwargs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure on what is held out, and log it."""
        model = self.model_wrapped
        # nats and number of all targets, and of those that are bases
        totals = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        with self.evaluating(model):
            for batch in self._heldout_batches():
                labels = batch.pop("labels")[:, 1:].to(self.args.device)
                inputs = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
                with self.compute_loss_context_manager():
                    logits = model(**inputs, **self._forward_options).logits[:, :-1]
                totals += self._nats(logits.flatten(0, 1), labels.flatten())
        nats, targets, base_nats, bases = self.accelerator.reduce(totals, "sum").tolist()
        bits_per_token = base_nats / max(bases, 1) / math.log(2)
        return self.report_measured(
            {
                "eval_loss": nats / max(targets, 1),
                "eval_bits_per_base": bits_per_token * self._heldout.tokens_per_base,
            }
        )

    def _nats(self, logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        nats_T = F.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORE_INDEX, reduction="none")
        is_target_T = labels_T != IGNORE_INDEX
        # predicting where documents end is no task of a base model: EOD counts in the loss, not in bits per
        # base
        is_base_T = is_target_T & (labels_T != self._heldout.eod_token_id)
        nats_T = nats_T.double()
        return torch.stack(
            [nats_T[is_target_T].sum(), is_target_T.sum(), nats_T[is_base_T].sum(), is_base_T.sum()]
        )

    def _heldout_batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield this process's batches: as many as each other has, filled up with rows that take no loss."""
        rows, world = self.args.per_device_eval_batch_size, self.args.world_size
        index = torch.arange(-(-len(self._heldout) // (rows * world)) * rows * world)
        for start in range(self.args.process_index * rows, len(index), rows * world):
            chosen = index[start : start + rows]
            batch = {
                name: self._heldout.tensors[name][chosen % len(self._heldout)]
                for name in (*self._fields, "labels")
            }
            batch["labels"][chosen >= len(self._heldout)] = IGNORE_INDEX
            yield batch

    def step_metrics(self) -> dict[str, float]:
        """Return how full the slots were, since the last line and since the run began."""
        found, stream = super().step_metrics(), self._stream
        counts = stream.packed.tokens, stream.packed.slots, stream.padded.tokens, stream.padded.slots
        tokens, slots, padded_tokens, padded_slots = map(sum, zip(*from_all(counts), strict=True))
        efficiency = tokens / slots
        return {
            "tokens_per_second": found["tokens_per_second"],
            "packing_percent": 100 * efficiency,
            "padding_percent": found["padding_percent"],
            "padded_cost": padded_slots / padded_tokens * efficiency if padded_tokens else 1.0,
            "corpus_epoch": stream.epoch,
        }
