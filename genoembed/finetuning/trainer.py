"""The loop of fine-tuning: transformers' Trainer with our models, batches and measures, and what watches it.

In: models, rows and settings. Out: weights, and lines for the log. What a training step says about itself is
read for signs that nothing is learned: a loss of 0, a loss that stays where guessing would be, and vectors
that have become one vector look like progress in a log; none of them is.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from genoembed.errors import CheckpointError, TrainingWarning, foreign_code
from genoembed.finetuning.collate import split_batch
from genoembed.finetuning.sampling import RankBatches
from genoembed.retrieval.grad_cache import cached_backward
from genoembed.training.distributed import from_first
from genoembed.training.log import LossOutput, MetricsFile, gradient_norms
from genoembed.training.rates import rate_share, warmup_share
from genoembed.training.trainer import ResumableTrainer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Sampler
    from transformers import TrainingArguments

    from genoembed.config.finetune import FinetuneRecipe
    from genoembed.finetuning.evaluation import Measure
    from genoembed.finetuning.rows import EpochDataset
    from genoembed.training.log import StepStatistics


logger = logging.getLogger(__name__)

Trouble: TypeAlias = Literal["zero", "no_negatives", "chance", "collapsed"]


@dataclass(slots=True)
class LossWatch:
    """Watch the steps of a run.

    Example:
        >>> from genoembed.retrieval.contrastive import info_nce
        >>> import torch
        >>> watch, same = LossWatch(patience=1), torch.ones(4, 2)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     watch.observe(info_nce(same, same))
        >>> sorted(watch.seen)
        ['chance', 'collapsed']
    """

    patience: int = 20
    """Steps in a row that must look the same before a warning; a missing negative warns at once."""
    near_chance: float = 1e-3
    """Share of the chance loss within which a loss is stuck at it."""
    least_spread: float = 1e-4
    """Spread (see ``StepStatistics``) below which vectors have become one."""
    seen: set[Trouble] = field(default_factory=set)
    """What was warned about."""
    _streaks: dict[Trouble, int] = field(default_factory=dict)

    def observe(self, output: LossOutput) -> None:
        """Look at one training step."""
        loss, statistics = float(output.loss.detach()), output.statistics
        cross_entropy = output.parts.get("cross_entropy", output.parts.get("dense", loss))
        is_guessing = (
            math.isfinite(statistics.chance_loss)
            and statistics.negatives_per_query > 0
            and abs(cross_entropy - statistics.chance_loss) <= self.near_chance * statistics.chance_loss
        )
        found: dict[Trouble, bool] = {
            "no_negatives": statistics.negatives_per_query == 0,
            "zero": loss == 0 and statistics.negatives_per_query > 0,
            "chance": is_guessing,
            "collapsed": statistics.spread < self.least_spread,
        }
        for trouble, is_there in found.items():
            self._streaks[trouble] = self._streaks.get(trouble, 0) + 1 if is_there else 0
            if self._streaks[trouble] >= (1 if trouble == "no_negatives" else self.patience):
                self._warn(trouble, loss, statistics)

    def _warn(self, trouble: Trouble, loss: float, statistics: StepStatistics) -> None:
        if trouble in self.seen:
            return
        self.seen.add(trouble)
        message = _MESSAGES[trouble].format(
            loss=loss,
            patience=self.patience,
            chance=statistics.chance_loss,
            candidates=1 + statistics.negatives_per_query,
            negatives=statistics.negatives_per_query,
            spread=statistics.spread,
            margin=statistics.positive_score - statistics.negative_score,
        )
        warnings.warn(message, TrainingWarning, stacklevel=3)


_MESSAGES: dict[Trouble, str] = {
    "no_negatives": (
        "the loss is {loss:g} and no query has a negative (after false negatives were left out): this step "
        "teaches nothing; raise the batch size or train_group_size, and look at how labels and identities "
        "group the sequences"
    ),
    "zero": (
        "the loss has been exactly 0 for {patience} steps with {negatives:.1f} negatives per query: every "
        "positive wins by far (mean lead {margin:.3g}), so nothing more is learned; use harder negatives, a "
        "larger batch or a higher temperature, and check that positives are no copies of their queries"
    ),
    "chance": (
        "the loss has been {chance:.4g} for {patience} steps, the value of guessing among {candidates:.1f} "
        "candidates: the model distinguishes positives and negatives no better than chance; check that it "
        "learns at all (learning rate, frozen parameters), and that the pooling is not a constant, as the "
        "first token of a causal model is"
    ),
    "collapsed": (
        "the vectors of a batch have become almost one vector (spread {spread:.2g}) for {patience} steps: "
        "the encoder has collapsed; lower the learning rate, use more negatives, or another layer or pooling"
    ),
}


class SetEpoch(TrainerCallback):
    """Set the epoch of rows and of their order, whatever the data loader is wrapped in."""

    def __init__(self, dataset: EpochDataset, sampler: Sampler[int]) -> None:
        self._listeners: list[Any] = [dataset, sampler]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: object) -> None:
        """Pass the epoch on."""
        for listener in self._listeners:
            listener.set_epoch(int(state.epoch or 0))


class WarmUp(TrainerCallback):
    """Raise the rate in the first steps of a schedule that only knows how to lower it."""

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        self._steps, self._peaks = steps, [group["lr"] for group in optimizer.param_groups]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the rates of the step."""
        if self._steps and state.global_step <= self._steps:
            share = warmup_share(state.global_step, self._steps)
            for group, peak in zip(kwargs["optimizer"].param_groups, self._peaks, strict=True):
                group["lr"] = peak * share


class StopEarly(TrainerCallback):
    """End training when the metric has not become better for some evaluations.

    Of equal metrics, the one with the smaller loss is better, which transformers' callback does not know:
    a head that predicts one class at first would be stopped. It looks at the whole log each time and keeps
    nothing, so a run that goes on stops where it would have.
    """

    def __init__(self, metric: str, *, is_greater_better: bool, patience: int, min_epochs: int) -> None:
        self._metric, self._sign = metric, 1 if is_greater_better else -1
        self._patience, self._min_epochs = patience, min_epochs

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: object) -> None:
        """Decide."""
        since_best = self._since_best(state)
        if since_best >= self._patience:
            logger.info(
                "%s has not become better for %d evaluations: training ends", self._metric, since_best
            )
            control.should_training_stop = True

    def has_ended(self, state: Any) -> bool:
        """Whether a run had stopped at this state, for one that goes on from it."""
        return self._since_best(state) >= self._patience

    def _since_best(self, state: Any) -> int:
        values = [
            (self._sign * line[self._metric], -line.get("eval_loss", 0.0))
            for line in state.log_history
            if self._metric in line
        ]
        if not values or (state.epoch or 0) < self._min_epochs:
            return 0
        return len(values) - 1 - values.index(max(values))


class FinetuneLog(MetricsFile):
    """Append what the trainer logs to ``metrics.jsonl``, and say it in a line."""

    loss_in_bits = False

    def __init__(self, path: Path, *, shown: Sequence[str]) -> None:
        super().__init__(path)
        self._shown = tuple(shown)

    def describe(self, line: Mapping[str, float]) -> str:
        """Describe the loss, what it compared, and the task's metrics."""
        said = [f"{name} {line[name]:.4g}" for name in line if self._is_said(name)]
        return f"step {line['step']}: {', '.join(said)}" if said else ""

    def _is_said(self, name: str) -> bool:
        bare = name.removeprefix("eval_").removeprefix("test_")
        return name in _SAID or (name != bare and bare in self._shown)


_SAID = (
    "loss",
    "learning_rate",
    "padding_percent",
    "tokens_per_second",
    "negatives_per_query",
    "positive_score",
    "negative_score",
    "skipped_steps",
)


class FinetuneTrainer(ResumableTrainer):
    """A Trainer for models of :mod:`genoembed.finetuning.models` and :mod:`genoembed.retrieval.models`."""

    lr_scheduler: LRScheduler | None

    def __init__(
        self,
        *,
        args: TrainingArguments,
        dataset: EpochDataset,
        sampler: Sampler[int],
        least_rows: int,
        recipe: FinetuneRecipe,
        measures: Mapping[str, Measure[Any]],
        trained: frozenset[str] = frozenset(),
        callbacks: list[TrainerCallback],
        **arguments: Any,
    ) -> None:
        self._measures, self._micro_batch = measures, recipe.micro_batch
        self._head_rate = recipe.head_learning_rate or float(args.learning_rate)
        self._recipe = recipe
        self._trained = trained
        self._watch = LossWatch()
        self._batches = RankBatches(
            sampler,
            rows=args.per_device_train_batch_size,
            least=least_rows,
            rank=args.process_index,
            world_size=args.world_size,
        )
        super().__init__(
            args=args,
            train_dataset=dataset,
            recipe=recipe,
            callbacks=[*callbacks, SetEpoch(dataset, sampler)],
            **arguments,
        )
        # each batch gives a mean of its own
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False

    def rate_of(self, name: str) -> float:
        """Return the peak rate of a parameter: new heads learn faster than what was pretrained."""
        is_old = _is_pretrained(name) or name in self._trained
        return float(self.args.learning_rate) if is_old else self._head_rate

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Build the schedule of the learning rate, once."""
        if self.lr_scheduler is None:
            chosen = optimizer or self.optimizer
            assert chosen is not None, "the optimizer is built first"
            warmup = self._recipe.num_warmup_steps(num_training_steps)
            if self._recipe.schedule == "plateau":
                self.add_callback(WarmUp(chosen, warmup))
                self.lr_scheduler = self._plateau(chosen)
            else:
                share = partial(
                    rate_share,
                    schedule=self._recipe.schedule,
                    least=self._recipe.min_learning_rate / float(self.args.learning_rate),
                    warmup=warmup,
                    total=num_training_steps,
                )
                self.lr_scheduler = LambdaLR(chosen, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _plateau(self, optimizer: Optimizer) -> LRScheduler:
        least = self._recipe.min_learning_rate / float(self.args.learning_rate)
        return ReduceLROnPlateau(
            optimizer,
            mode="max" if self.args.greater_is_better else "min",
            factor=self._recipe.plateau_factor,
            patience=self._recipe.plateau_patience,
            # torch's default is relative: of a negative metric, it takes what is worse for an improvement
            threshold_mode="abs",
            min_lr=[least * group["lr"] for group in optimizer.param_groups],
        )

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
        with foreign_code("the model's forward pass"):
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
        if self._micro_batch is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            with self.stepping():
                loss = self.checked_loss(self._cached_step(model, inputs, self._micro_batch))
        if self.accelerator.sync_gradients and self._logs_after_this_step():
            norms = gradient_norms(self.accelerator.unwrap_model(model).parts)
            self.book.add({f"grad_norm_{name}": norm for name, norm in norms.items()})
        for name, mask in inputs.items():
            if name.endswith("attention_mask"):
                self.book.padding.add(mask)
        return loss

    def _cached_step(self, model: nn.Module, inputs: dict[str, Any], rows: int) -> Tensor:
        model.train()
        batch = self._prepare_inputs(inputs)
        inner: Any = self.accelerator.unwrap_model(model)

        def encode(piece: dict[str, Tensor]) -> dict[str, Tensor]:
            with self.compute_loss_context_manager():
                outputs = model(**piece, want="hidden")
            # as accelerate does with bfloat16: the loss adds up many scores
            return {
                name: value.float() if value.is_floating_point() else value for name, value in outputs.items()
            }

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
        self.book.add(contrast.statistics.as_metrics() | parts)

    def _logs_after_this_step(self) -> bool:
        step = self.state.global_step + 1
        return step % self.args.logging_steps == 0 or step == self.state.max_steps

    def evaluate(self, *_: Any, side: str = "eval", **__: Any) -> dict[str, float]:
        """Measure on rows that are held out, and log it."""
        with self.evaluating(self.model), self.compute_loss_context_manager():
            found = self._measures[side](self.model)
        # every process measures all rows; that all stop alike must not hang on a last bit
        metrics = {f"{side}_{name}": value for name, value in from_first(found).items()}
        return self.report_measured(metrics, is_validation=side == "eval")

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Break ties between equal metrics by the loss, such as the 0 of a head that knows one class yet."""
        best, name = self.state.best_metric, str(self.args.metric_for_best_model)
        if best is not None and metrics.get(name) == best and "eval_loss" in metrics:
            lines = [line for line in self.state.log_history if "eval_loss" in line]
            before = [line["eval_loss"] for line in lines if line["step"] == self.state.best_global_step]
            if before and metrics["eval_loss"] < before[-1]:
                self.state.best_metric = None
        return super()._determine_best_metric(metrics=metrics, trial=trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save what learns, and buffers; what does not learn is in the model that was started from."""
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        values = self.model.state_dict() if state_dict is None else state_dict
        kept = {name: values[name].contiguous() for name in self._learned() if name in values}
        save_file(kept, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        torch.save(self.args, os.fspath(folder / "training_args.bin"))

    def _learned(self) -> list[str]:
        """Return the names of trainable parameters, each once, and of buffers outside the backbone."""
        learned = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        buffers = [name for name, _ in self.model.named_buffers() if not _is_pretrained(name)]
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


def _is_pretrained(name: str) -> bool:
    return name.startswith(("encoder.backbone.", "model."))
