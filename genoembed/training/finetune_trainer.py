"""The loop of fine-tuning: transformers' Trainer with our models, batches, measures and statistics.

Promised: what a step does depends on config, data and step alone, so a run that goes on gives the losses of a
run that was never stopped; a line of the log says what its steps really compared and what padding cost.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers.utils import SAFE_WEIGHTS_NAME

from genoembed.errors import CheckpointError
from genoembed.training.adamw import AdamWTrainer, decaying_parameters, is_pole
from genoembed.training.batches import split_batch
from genoembed.training.finetune_callbacks import SetEpoch
from genoembed.training.grad_cache import cached_backward
from genoembed.training.loss_watch import LossWatch
from genoembed.training.processes import from_first
from genoembed.training.rank_batches import RankBatches
from genoembed.training.step_book import StepBook
from genoembed.training.step_statistics import LossOutput, gradient_norms

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn
    from torch.utils.data import Sampler
    from transformers import TrainerCallback, TrainingArguments

    from genoembed.training.epoch_rows import EpochDataset
    from genoembed.training.evaluation import Measure

ADAM_BETAS = (0.9, 0.999)
POLE_RATE_SCALE = 0.1
"""Poles of long filters move this much slower, as in pretraining."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """How fast the parts of a model learn."""

    encoder: float
    head: float
    weight_decay: float


class FinetuneTrainer(AdamWTrainer):
    """A Trainer for the models of :mod:`genoembed.training.task_models`."""

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        dataset: EpochDataset,
        collate: Callable[[Any], dict[str, Tensor]],
        sampler: Sampler[int],
        least_rows: int,
        rates: Rates,
        measures: Mapping[str, Measure[Any]],
        micro_batch: int | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        self._measures, self._micro_batch = measures, micro_batch
        self._book, self._watch = StepBook(), LossWatch()
        self._batches = RankBatches(
            sampler,
            rows=args.per_device_train_batch_size,
            least=least_rows,
            rank=args.process_index,
            world_size=args.world_size,
        )
        super().__init__(
            groups=lambda model: parameter_groups(model, rates),
            rate=rates.encoder,
            betas=ADAM_BETAS,
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=dataset,
            eval_dataset=[],
            callbacks=[*callbacks, SetEpoch(dataset, sampler)],
        )
        # each batch gives a mean of its own
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Read the rows of this process: accelerate would fill up a short batch with rows that come again."""
        return DataLoader(self.train_dataset, batch_sampler=self._batches, collate_fn=self.data_collator)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Run the model, and note what it compared."""
        output = model(**inputs)
        self._note(output.get("contrast"))
        return (output["loss"], output) if return_outputs else output["loss"]

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Do forward and backward of a batch."""
        started = time.perf_counter()
        if self._micro_batch is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self._cached_step(model, inputs, self._micro_batch)
        if self.accelerator.sync_gradients and self._logs_after_this_step():
            norms = gradient_norms(self.accelerator.unwrap_model(model).parts)
            self._book.add({f"grad_norm_{name}": norm for name, norm in norms.items()})
        for name, mask in inputs.items():
            if name.endswith("attention_mask"):
                self._book.padding.add(mask)
        self._book.seconds += time.perf_counter() - started
        return loss

    def _cached_step(self, model: nn.Module, inputs: dict[str, Any], rows: int) -> Tensor:
        model.train()
        batch = self._prepare_inputs(inputs)
        inner: Any = self.accelerator.unwrap_model(model)

        def encode(piece: dict[str, Tensor]) -> dict[str, Tensor]:
            with self.compute_loss_context_manager():
                return model(**piece, want="hidden")

        def backward(loss: Tensor) -> None:
            self.accelerator.backward(loss / self.current_gradient_accumulation_steps)

        output = cached_backward(
            split_batch(batch, rows=rows),
            encode=encode,
            loss=lambda chunks: inner.contrast_loss(chunks, batch),
            backward=backward,
            without_sync=lambda: self.accelerator.no_sync(model),
        )
        self._note(output)
        return output.loss / self.current_gradient_accumulation_steps

    def _note(self, contrast: LossOutput | None) -> None:
        if contrast is None or not self.model.training:
            return
        self._watch.observe(contrast)
        parts = {f"loss_{name}": value for name, value in contrast.parts.items()}
        self._book.add(contrast.statistics.as_metrics() | parts)

    def _logs_after_this_step(self) -> bool:
        step = self.state.global_step + 1
        return step % self.args.logging_steps == 0 or step == self.state.max_steps

    @torch.no_grad()
    def evaluate(self, *_: Any, side: str = "eval", **__: Any) -> dict[str, float]:
        """Measure on rows that are held out, and log it."""
        model = self.model
        was_training = model.training
        model.eval()
        with self.compute_loss_context_manager():
            found = self._measures[side](model)
        model.train(was_training)
        # every process measures all rows; that all stop alike must not hang on a last bit
        found = from_first(found)
        metrics = {f"{side}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        if side == "eval":
            trainer: Any = self
            self.control = self.callback_handler.on_evaluate(self.args, self.state, trainer.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Let the loss decide between equal metrics, such as the 0 of a head that knows one class yet."""
        best, name = self.state.best_metric, str(self.args.metric_for_best_model)
        if best is not None and metrics.get(name) == best and "eval_loss" in metrics:
            lines = [line for line in self.state.log_history if "eval_loss" in line]
            before = [line["eval_loss"] for line in lines if line["step"] == self.state.best_global_step]
            if before and metrics["eval_loss"] < before[-1]:
                self.state.best_metric = None
        return super()._determine_best_metric(metrics=metrics, trial=trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add statistics to a line about training."""
        if "loss" in logs:
            logs |= self._book.metrics()
            self._book = StepBook()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save what learns, and buffers; what does not learn is in the model that was started from."""
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        values = self.model.state_dict() if state_dict is None else state_dict
        kept = {name: values[name].contiguous() for name in self._learned() if name in values}
        save_file(kept, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        torch.save(self.args, os.fspath(folder / "training_args.bin"))

    def _learned(self) -> list[str]:
        """Name parameters that learn, each once, and buffers outside the backbone."""
        learned = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        buffers = [
            name
            for name, _ in self.model.named_buffers()
            if not name.startswith(("encoder.backbone.", "model."))
        ]
        return [*learned, *buffers]

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = set(load_result.missing_keys) & set(self._learned())
        if missing or load_result.unexpected_keys:
            names = ", ".join(sorted([*missing, *load_result.unexpected_keys])[:3])
            message = (
                f"{len(missing)} weights are missing and {len(load_result.unexpected_keys)} have no place "
                f"({names}); set overwrite to start again"
            )
            raise CheckpointError(message, path=str(self.args.output_dir))


def parameter_groups(model: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """Split the parameters that learn by rate and weight decay."""
    decaying = decaying_parameters(model)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_backbone = name.startswith(("encoder.backbone.", "model."))
        rate = rates.encoder if in_backbone else rates.head
        if is_pole(name):
            rate *= POLE_RATE_SCALE
        decay = rates.weight_decay if name in decaying else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
