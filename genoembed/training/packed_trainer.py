"""The loop: transformers' Trainer, fed with packed rows and measured in bits per base.

Promised: each process reads its own shard and nothing is handed around; a measurement weighs every base that
is held out the same, on any number of processes.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from genoembed.batching.packed_rows import IGNORE_INDEX
from genoembed.training.adamw import AdamWTrainer
from genoembed.training.pretraining import ADAM_BETAS, parameter_groups

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel, TrainingArguments

    from genoembed.training.pretraining import PretrainConfig
    from genoembed.training.stream import HeldoutRows, PackedStream


@dataclass(kw_only=True, slots=True)
class Pace:
    """What was trained on since the last line, in this process."""

    tokens: int = 0
    """Real tokens; padding does not count."""
    slots: int = 0
    seconds: float = 0.0
    """Reading, forward, backward and update; measurements and checkpoints do not count."""


class PackedTrainer(AdamWTrainer):
    """A Trainer over :class:`~genoembed.training.stream.PackedStream`."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        recipe: PretrainConfig,
        stream: PackedStream,
        heldout: HeldoutRows,
        isolating: tuple[str, ...],
        forward_options: Mapping[str, Any],
        callbacks: list[TrainerCallback],
    ) -> None:
        self._stream, self._heldout = stream, heldout
        self._fields = ("input_ids", *isolating)
        self._forward_options = dict(forward_options)
        self._pace = Pace()
        super().__init__(
            groups=lambda model: parameter_groups(model, recipe),
            rate=recipe.learning_rate,
            betas=ADAM_BETAS,
            model=model,
            args=args,
            data_collator=self._collate,
            train_dataset=stream,
            eval_dataset=[],
            callbacks=[*callbacks, _Stopwatch(self._pace)],
        )

    def restore(self, checkpoint: Path) -> None:
        """Take weights and history of a finished run: training on would add a step."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Read the stream as it is: accelerate would read it in one process and hand rows around."""
        return DataLoader(
            self._stream, batch_size=self.args.per_device_train_batch_size, collate_fn=self._collate
        )

    def _collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self._pace.tokens += sum(int((row["segment_ids"] >= 0).sum()) for row in rows)
        self._pace.slots += sum(row["segment_ids"].numel() for row in rows)
        return {name: torch.stack([row[name] for row in rows]) for name in (*self._fields, "labels")}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Add the options of the forward pass."""
        return super().compute_loss(model, {**inputs, **self._forward_options}, *args, **kwargs)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure on what is held out, and log it."""
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        # nats and number of all targets, and of those that are bases
        totals = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        for batch in self._heldout_batches():
            labels = batch.pop("labels")[:, 1:].to(self.args.device)
            inputs = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
            with self.compute_loss_context_manager():
                logits = model(**inputs, **self._forward_options).logits[:, :-1]
            nats = F.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
            ).double()
            is_target = labels.flatten() != IGNORE_INDEX
            is_base = is_target & (labels.flatten() != self._heldout.eod_token_id)
            totals += torch.stack(
                [nats[is_target].sum(), is_target.sum(), nats[is_base].sum(), is_base.sum()]
            )
        model.train(was_training)
        nats, targets, base_nats, bases = self.accelerator.reduce(totals, "sum").tolist()
        bits_per_token = base_nats / max(bases, 1) / math.log(2)
        metrics = {
            "eval_loss": nats / max(targets, 1),
            "eval_bits_per_base": bits_per_token * self._heldout.tokens_per_base,
        }
        self.log(dict(metrics))
        trainer: Any = self
        self.control = self.callback_handler.on_evaluate(self.args, self.state, trainer.control, metrics)
        return metrics

    def _heldout_batches(self) -> Iterator[dict[str, Tensor]]:
        """Give this process its batches: as many as each other has, filled up with rows that take no loss."""
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speed and packing to a line about training."""
        if "loss" in logs:
            logs |= self._packing_metrics()
        super().log(logs, start_time)

    def _packing_metrics(self) -> dict[str, float]:
        pace, stream = self._pace, self._stream
        local = [pace.tokens, pace.slots, stream.packed.tokens, stream.packed.slots]
        totals = torch.tensor([*local, stream.padded.tokens, stream.padded.slots], dtype=torch.float64)
        if self.args.world_size > 1:
            # float64 would not do on every device; these numbers need no exactness there
            totals = self.accelerator.reduce(totals.float().to(self.args.device), "sum").cpu()
        tokens, slots, all_tokens, all_slots, padded_tokens, padded_slots = totals.tolist()
        efficiency = all_tokens / all_slots
        metrics = {
            "tokens_per_second": tokens / pace.seconds if pace.seconds else 0.0,
            "packing_percent": 100 * efficiency,
            "padding_percent": 100 * (1 - tokens / slots) if slots else 0.0,
            "padded_cost": padded_slots / padded_tokens * efficiency if padded_tokens else 1.0,
            "corpus_epoch": stream.epoch,
        }
        pace.tokens, pace.slots, pace.seconds = 0, 0, 0.0
        return metrics


class _Stopwatch(TrainerCallback):
    """Time steps, and nothing else."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._since = 0.0

    def _restart(self, *_: object, **__: object) -> None:
        self._since = time.perf_counter()

    on_train_begin = _restart
    on_evaluate = _restart
    on_save = _restart

    def on_step_end(self, *_: object, **__: object) -> None:
        now = time.perf_counter()
        self._pace.seconds += now - self._since
        self._since = now
