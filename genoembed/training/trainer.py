"""The trainer that both kinds of training share: transformers' Trainer, and what makes its runs resumable.

In: a model, batches and a recipe. Out: checkpoints and lines about steps. Promised: a signal ends a run after
the step that is being done, with a checkpoint, in all processes alike; poles of long filters stay in bounds;
speed and padding are those of the steps alone.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from genoembed.errors import STOP_SIGNALS, Interrupted
from genoembed.models.load import without_progress_bars
from genoembed.models.precision import automatic_dtype
from genoembed.training.log import StepBook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from genoembed.config.choices import TrainDtype


logger = logging.getLogger(__name__)

POLE_RATE_SCALE = 0.1
"""Poles of long filters move this much slower than everything else."""
MAX_LOG_POLE = -1e-4
"""Modes of the long filter must decay: at this bound one fades over 10,000 bases."""


class SharedRecipe(Protocol):
    """Training settings that every run has, under the names of our configurations."""

    @property
    def rows_per_device(self) -> int: ...
    @property
    def accumulation_steps(self) -> int: ...
    @property
    def learning_rate(self) -> float | None: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def logging_steps(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def dtype(self) -> TrainDtype: ...


def training_arguments(recipe: SharedRecipe, folder: Path, **others: Any) -> TrainingArguments:
    """Translate resolved training settings into those of transformers."""
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.rows_per_device,
        per_device_eval_batch_size=recipe.rows_per_device,
        gradient_accumulation_steps=recipe.accumulation_steps,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=recipe.logging_steps,
        save_total_limit=2,
        seed=recipe.seed,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **others,
    )


def has_bfloat16() -> bool:
    """Return whether the hardware multiplies in bfloat16: elsewhere that is slower than float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return automatic_dtype(device) == torch.bfloat16


def resolved_dtype(dtype: TrainDtype) -> TrainDtype:
    """Choose the type of matrix products where the settings leave that to the hardware.

    Example:
        >>> resolved_dtype("float32"), resolved_dtype("auto") in ("float32", "bfloat16")
        ('float32', True)
    """
    if dtype != "auto":
        return dtype
    return "bfloat16" if has_bfloat16() else "float32"


def is_pole(name: str) -> bool:
    """Return whether a parameter holds poles of a long filter."""
    return name.endswith("log_poles")


def decaying_parameters(model: nn.Module) -> set[str]:
    """Return the names of the parameters that weight decay applies to: matrices.

    Example:
        >>> model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2))
        >>> decaying_parameters(model)
        {'1.weight'}
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2
        and id(parameter) not in embeddings
        and ".filter." not in name
        and not is_pole(name)
    }


def parameter_groups(
    model: nn.Module, *, rate_of: Callable[[str], float], weight_decay: float
) -> list[dict[str, Any]]:
    """Split the parameters that learn by rate and weight decay, for AdamW.

    Example:
        >>> groups = parameter_groups(nn.Linear(2, 2), rate_of=lambda name: 0.5, weight_decay=0.1)
        >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
        [(1, 0.5, 0.1), (1, 0.5, 0.0)]
    """
    decaying = decaying_parameters(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if name in decaying else 0.0
            groups.setdefault((rate_of(name), decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


class ClampPoles(TrainerCallback):
    """Keep every mode of the long filters decaying: a positive pole would explode."""

    @torch.no_grad()
    def on_optimizer_step(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Clamp after each optimizer step."""
        for name, parameter in kwargs["model"].named_parameters():
            if is_pole(name):
                parameter.clamp_(max=MAX_LOG_POLE)


class StopOnSignal(TrainerCallback):
    """Make SIGINT and SIGTERM end training after the current step, with a checkpoint.

    A second signal has its usual effect.
    """

    def __init__(self) -> None:
        self.stopped_at: int | None = None
        """Step after which training stopped because of a signal."""
        self._requested: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

        def ask(received: int, _frame: FrameType | None) -> None:
            self._requested = received
            logger.info("interrupted: saving a checkpoint after this step; interrupt again to stop at once")
            for number, handler in before.items():
                signal.signal(number, handler)

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: object) -> None:
        """Stop all processes if one received a signal."""
        asked = self._requested is not None
        if args.world_size > 1:
            # a signal may reach one process only, and a checkpoint is written by all together
            flag = torch.tensor(int(asked), device=args.device)
            torch.distributed.all_reduce(flag)
            asked = bool(flag)
        # after the last step there is nothing to go on with: the run ends as it would have
        if asked and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_save = True
            control.should_training_stop = True

    def raise_if_stopped(self, folder: Path, *, total: int) -> None:
        """End the run as an interruption does, and say how to go on."""
        if self.stopped_at is None:
            return
        message = (
            f"{folder / f'checkpoint-{self.stopped_at}'} is saved; run the same again with resume "
            f"to go on at step {self.stopped_at + 1} of {total}"
        )
        raise Interrupted(signal.SIGINT if self._requested is None else self._requested, message)


class ResumableTrainer(Trainer):
    """A Trainer with AdamW over our groups, which measures in its own way and ends on a signal."""

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self, *, callbacks: list[TrainerCallback], pole_rate_scale: float = POLE_RATE_SCALE, **arguments: Any
    ) -> None:
        self._pole_rate_scale = pole_rate_scale
        self.book = StepBook()
        """What was trained on since the last line of the log."""
        self._stop = StopOnSignal()
        super().__init__(
            # Trainer asks for one before it measures; ours measure what they were given themselves
            eval_dataset=[],
            callbacks=[ClampPoles(), *callbacks, self._stop, _Stopwatch(self)],
            **arguments,
        )
        self.remove_callback(PrinterCallback)

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end; a signal ends the run as an interruption does, and says how to go on."""
        with self._stop.listening(), without_progress_bars():
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self._stop.raise_if_stopped(Path(str(self.args.output_dir)), total=self.state.max_steps)

    def rate_of(self, name: str) -> float:
        """Return the peak rate of a parameter, poles like the rest."""
        return float(self.args.learning_rate)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build AdamW, once."""
        if self.optimizer is None:
            args = self.args
            groups = parameter_groups(
                model or self.model,
                rate_of=lambda name: self.rate_of(name) * (self._pole_rate_scale if is_pole(name) else 1),
                weight_decay=args.weight_decay,
            )
            self.optimizer = torch.optim.AdamW(
                groups,
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
            )
        return self.optimizer

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """Switch a model to evaluation mode, and back."""
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            model.train(was_training)

    def report_measured(self, metrics: dict[str, float], *, is_validation: bool = True) -> dict[str, float]:
        """Log what was measured, and notify the callbacks that decide by it."""
        self.log(dict(metrics))
        if is_validation:
            trainer: Any = self
            self.control = self.callback_handler.on_evaluate(self.args, self.state, trainer.control, metrics)
        return metrics

    def step_metrics(self) -> dict[str, float]:
        """Summarize the steps since the last line; a collective call."""
        return self.book.metrics()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the steps were to a line about training."""
        if "loss" in logs:
            logs |= self.step_metrics()
            self.book = StepBook()
        super().log(logs, start_time)


class _Stopwatch(TrainerCallback):
    """Time steps (reading, forward, backward and update); measurements and checkpoints do not count."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer
        self._since = 0.0

    def _restart(self, *_: object, **__: object) -> None:
        self._since = time.perf_counter()

    on_train_begin = _restart
    on_evaluate = _restart
    on_save = _restart

    def on_step_end(self, *_: object, **__: object) -> None:
        now = time.perf_counter()
        self._trainer.book.seconds += now - self._since
        self._since = now
