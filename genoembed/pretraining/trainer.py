"""What a pretraining run is made of: its recipe, AdamW's parameter groups, and poles that stay in bounds.

The loop: transformers' Trainer, fed with packed rows and measured in bits per base.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from genoembed.contracts import IGNORE_INDEX
from genoembed.training.optimizer import AdamWTrainer, decaying_parameters, is_pole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from genoembed.pretraining.stream import HeldoutRows, PackedStream


ADAM_BETAS = (0.9, 0.98)


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """How long and how fast to train."""

    max_steps: int
    """Optimizer steps."""
    rows_per_device: int = 4
    """Rows of one forward pass."""
    accumulation_steps: int = 2
    """Forward passes a step."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW."""
    pole_rate_scale: float = 0.1
    """Poles of the long filters move this much slower than everything else."""
    warmup_steps: int = 100
    """Steps of linear warm-up; a cosine to a tenth of the peak follows."""
    weight_decay: float = 0.1
    """On matrices; vectors, filters and the embedding have none."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    bf16: bool = True
    """Autocast matrix products to bfloat16."""
    compile_blocks: bool = False
    """Compile each block with torch.compile, a minute of start-up: worth a try on GPUs; no gain on CPUs."""
    save_steps: int = 200
    """Steps between checkpoints."""
    eval_steps: int = 200
    """Steps between measurements on the held-out rows."""
    logging_steps: int = 10
    """Steps between lines of ``metrics.jsonl``; a line's loss is the mean over them."""
    seed: int = 0
    """Initial weights, order of documents, strands."""


def training_arguments(config: PretrainConfig, output_dir: Path, **others: Any) -> TrainingArguments:
    """Say the recipe in the words of transformers."""
    recipe: dict[str, Any] = dict(
        output_dir=str(output_dir),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.rows_per_device,
        per_device_eval_batch_size=config.rows_per_device,
        gradient_accumulation_steps=config.accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=config.logging_steps,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=config.seed,
        report_to=[],
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    return TrainingArguments(**(recipe | others))


def parameter_groups(model: nn.Module, config: PretrainConfig) -> list[dict[str, Any]]:
    """Divide the parameters by what AdamW should do with them."""
    decaying = decaying_parameters(model)
    matrices, poles, rest = [], [], []
    for name, parameter in model.named_parameters():
        if is_pole(name):
            poles.append(parameter)
        elif name in decaying:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
        {"params": poles, "weight_decay": 0.0, "lr": config.learning_rate * config.pole_rate_scale},
    ]
    return [group for group in groups if group["params"]]


@dataclass(kw_only=True, slots=True)
class Pace:
    """What was trained on since the last line, in this process."""

    tokens: int = 0
    """Real tokens; padding does not count."""
    slots: int = 0
    seconds: float = 0.0
    """Reading, forward, backward and update; measurements and checkpoints do not count."""


class PackedTrainer(AdamWTrainer):
    """A Trainer over :class:`~genoembed.pretraining.stream.PackedStream`."""

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
