"""The trainer that both kinds of training share: transformers' Trainer, and what makes its runs resumable.

In: a model, batches and a recipe. Out: checkpoints and lines about steps. Promised: a signal ends a run after
the step that is being done, with a checkpoint, in all processes alike; poles of long filters stay in bounds;
speed and padding are those of the steps alone.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import threading
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import rotate_checkpoints

from genoembed.atomic import replacing_folder, reporting_writes
from genoembed.errors import (
    STOP_SIGNALS,
    CheckpointError,
    DivergenceError,
    Interrupted,
    ModelError,
    Problem,
    Remedy,
    foreign_code,
    is_ignored,
    is_out_of_memory,
)
from genoembed.models.precision import automatic_dtype
from genoembed.models.pretrained import without_progress_bars
from genoembed.training.distributed import wait_for_all, whole
from genoembed.training.log import OverfittingHint, StepBook, WandbLog
from genoembed.training.optimizers import (
    POLE_RATE_SCALE,
    LossScaler,
    build_optimizer,
    is_pole,
    parameter_groups,
)
from genoembed.training.run_folder import SAVING_FOLDER, is_complete, newest_checkpoint
from genoembed.training.sharding import shard, spread_states_on_load

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from torch import Tensor

    from genoembed.config.choices import ComputeDtype, Optim
    from genoembed.config.finetune import FinetuneRecipe
    from genoembed.config.pretrain import RecipeConfig
    from genoembed.config.training import OptimizerConfig


logger = logging.getLogger(__name__)

MAX_LOG_POLE = -1e-4
"""Modes of the long filter must decay: at this bound one fades over 10,000 bases."""


def training_arguments(
    recipe: FinetuneRecipe | RecipeConfig, folder: Path, **others: Any
) -> TrainingArguments:
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
        save_total_limit=2,  # the newest, and with validation the best
        seed=recipe.seed,
        report_to=[],
        remove_unused_columns=False,  # transformers would drop what our forwards take as **batch
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # parameters that no gradient reaches do not learn: see tuning
        **others,
    )


def resolved_dtype(dtype: ComputeDtype) -> ComputeDtype:
    """Choose the type of matrix products where the settings leave that to the hardware.

    Example:
        >>> resolved_dtype("float32"), resolved_dtype("auto") in ("float32", "bfloat16")
        ('float32', True)
    """
    if dtype != "auto":
        return dtype
    # where the hardware does not multiply in bfloat16 it is slower than float32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bfloat16" if automatic_dtype(device) == torch.bfloat16 else "float32"


class ClampPoles(TrainerCallback):
    """Keep every mode of the long filters decaying: a positive pole would explode."""

    @torch.no_grad()
    def on_optimizer_step(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Clamp after each optimizer step."""
        for name, parameter in kwargs["model"].named_parameters():
            if is_pole(name):
                parameter.clamp_(max=MAX_LOG_POLE)


class StopOnSignal(TrainerCallback):
    """Make SIGINT, SIGTERM and SIGHUP end training after the current step, with a checkpoint.

    A second signal has its usual effect, and so has one that is ignored, as SIGHUP is under nohup.
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
        before = {number: handler for number, handler in before.items() if not is_ignored(number)}

        def ask(received: int, _frame: FrameType | None) -> None:
            self._requested = received
            logger.info("interrupted: saving a checkpoint after this step; interrupt again to stop at once")
            for other, handler in before.items():
                signal.signal(other, handler)

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            # also after a run that was refused: a caller's own handlers must not be lost
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
        """End the run as the signal would have ended it, and say how to go on."""
        if self.stopped_at is None:
            return
        message = (
            f"{folder / f'checkpoint-{self.stopped_at}'} is saved; run the same again with resume "
            f"to go on at step {self.stopped_at + 1} of {total}"
        )
        raise Interrupted(signal.SIGINT if self._requested is None else self._requested, message)


class ResumableTrainer(Trainer):
    """A Trainer with an optimizer over our groups, which measures in its own way and ends on a signal."""

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        *,
        callbacks: list[TrainerCallback],
        recipe: OptimizerConfig | None = None,
        pole_rate_scale: float = POLE_RATE_SCALE,
        **arguments: Any,
    ) -> None:
        self._is_spread = recipe is not None and recipe.distributed == "fsdp"
        if self._is_spread:
            # before the Trainer, which would move the whole model to the device
            shard(arguments["model"], arguments["args"].device)
        self._pole_rate_scale = pole_rate_scale
        self._optim: Optim = "adamw" if recipe is None else recipe.optim
        self.book = StepBook()
        """What was trained on since the last line of the log."""
        self._stop = StopOnSignal()
        self._saving: Path | None = None
        super().__init__(
            # Trainer asks for one before it measures; ours measure what they were given themselves
            eval_dataset=[],
            callbacks=[ClampPoles(), OverfittingHint(), *callbacks, self._stop, _Stopwatch(self)],
            **arguments,
        )
        self.remove_callback(PrinterCallback)
        self._scaler: LossScaler | None = None
        if recipe is not None and recipe.dtype == "float16":
            # accelerate does float16 on GPUs alone; given a scaler, it uses that on any device
            self._scaler = self.accelerator.scaler = LossScaler(self.args.device.type)
        if self._is_spread:
            # only autocast around it: gradients are averaged already, and DDP takes no model in parts
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        forms = (getattr(module, "fp8_form", None) for module in self.model.modules())
        if running := next((form for form in forms if form in ("native", "emulated")), None):
            logger.warning(
                "input projections run in FP8 (%s), in training as well: the loss is that of the rounded "
                "products, the gradients are those of products without rounding",
                running,
            )

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(str(self.args.output_dir))

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Keep reports elsewhere open for what is measured after training, and close them, also on errors."""
        try:
            yield
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, WandbLog):
                    callback.close()

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end; a signal ends the run as an interruption does, and says how to go on."""
        if checkpoint is not None and self._is_over(checkpoint):
            self._restore(checkpoint)
            return
        with self._stop.listening(), without_progress_bars():
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self._stop.raise_if_stopped(self.folder, total=self.state.max_steps)

    def _is_over(self, checkpoint: Path) -> bool:
        """Whether a run had ended at its checkpoint: transformers takes at least one step when it resumes."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        total = self.args.max_steps
        if total <= 0:
            # not that of the checkpoint: more epochs may be asked for now
            total = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        ended = (getattr(callback, "has_ended", None) for callback in self.callback_handler.callbacks)
        return state.global_step >= total or any(says is not None and says(state) for says in ended)

    def _restore(self, checkpoint: Path) -> None:
        """Take the weights and the history of a run whose steps are all done."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        # as the first process had saved them: each would write lines of what is measured next
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.state.is_local_process_zero = self.is_local_process_zero()
        logger.info("resume: all %d steps are done", self.state.global_step)
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        source = self._checkpoint_of(best) if best else checkpoint
        self._load_from_checkpoint(str(source))
        # what is measured next is measured in the types of training, as if the run had not been stopped
        self.accelerator.prepare_model(self.model, evaluation_mode=True)

    def _checkpoint_of(self, step: int) -> Path:
        """Find a checkpoint by its step: the folder may have another name than when it was noted."""
        found = self.folder / f"checkpoint-{step}"
        if not is_complete(found):
            message = "the checkpoint of the best step is missing or damaged"
            raise CheckpointError(
                Problem(message, Remedy("overwrite", True), " to start again"), path=str(found)
            )
        return found

    def _load_best_model(self) -> None:
        self.state.best_model_checkpoint = str(self._checkpoint_of(int(self.state.best_global_step or 0)))
        super()._load_best_model()

    def _init_training_state(self, *arguments: Any, **named: Any) -> tuple[int, int]:
        found: tuple[int, int] = super()._init_training_state(*arguments, **named)
        if self.state.best_global_step:
            # transformers forgets the best checkpoint of a run whose folder was moved
            self.state.best_model_checkpoint = str(self._checkpoint_of(self.state.best_global_step))
        return found

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint beside the others, and give it its name when it is complete and on the disk."""
        self.check_weights()
        name = f"checkpoint-{self.state.global_step}"
        self._saving = self.folder / SAVING_FOLDER
        written = self._saving / name
        with reporting_writes(self.folder):
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving = None
            # transformers noted the name under SAVING_FOLDER, which is gone when the run is resumed
            if self.state.best_global_step:
                best = self.folder / f"checkpoint-{self.state.best_global_step}"
                self.state.best_model_checkpoint = str(best)
            # every process writes its generators' states into the folder that the first one renames
            wait_for_all()
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
                with replacing_folder(self.folder / name, overwrite=True) as staged:
                    for path in written.iterdir():
                        path.rename(staged / path.name)
                shutil.rmtree(written.parent)
                # only now may an older one go: a kill before this line leaves two, never none
                rotate_checkpoints(
                    output_dir=str(self.folder),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                )
            wait_for_all()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, whole; a collective call if it is spread over processes."""
        if not self._is_spread:
            super().save_model(output_dir, _internal_call)
            return
        state = whole(self.model.state_dict(), is_kept=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_spread:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None, "training has begun"
        # whole, as one process writes it: any number of processes can read it
        state = whole(self.optimizer.state_dict(), is_kept=self.args.should_save)
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """Do forward and backward of a batch."""
        with self.stepping():
            return self.checked_loss(super().training_step(*arguments, **named))

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Blame other people's code for what it raises in a step, and say what helps if memory is short."""
        try:
            with foreign_code("the model's forward pass"):
                yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            rows = self.args.per_device_train_batch_size
            found = f"step {self.state.global_step + 1}: there is no memory for {rows} rows of a batch"
            more = ", and accumulation_steps higher: the steps are then the same"
            raise ModelError(
                Problem(found, Remedy("rows_per_device", words=f"below {rows}"), more)
            ) from error

    def compute_loss_context_manager(self) -> ExitStack:
        """Compute in float16 where that is asked for; accelerate does so for bfloat16."""
        stack: ExitStack = super().compute_loss_context_manager()
        if self._scaler is not None:
            stack.enter_context(torch.autocast(self.args.device.type, dtype=torch.float16))
        return stack

    def checked_loss(self, loss: Tensor) -> Tensor:
        """End the run if a loss is not a number: the weights are still those of the step before."""
        if not bool(torch.isfinite(loss)):
            self._diverge(f"the loss is not finite ({float(loss)})", self.state.global_step + 1)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # between backward and the optimizer: scaled by a norm of NaN, every weight would become NaN
        if self._scaler is not None:
            wrapped: Any = self.optimizer  # by accelerate
            self._scaler.unscale_(wrapped.optimizer)
        norm = super()._clip_grad_norm(model)
        if self._scaler is not None and self._scaler.count(norm):
            # the scaler leaves the step out and halves the scale; at 1 nothing is scaled any more
            if self._scaler.get_scale() > 1:
                return norm
        norm = None if norm is None else float(whole(norm))
        if norm is not None and not math.isfinite(norm):
            self._diverge(f"the gradient is not finite ({norm})", self.state.global_step + 1)
        return norm

    def check_weights(self) -> None:
        """End the run before weights that are not numbers are measured or saved."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(whole(torch.isfinite(parameter).all())):
                self._diverge(f"the weights of {name} are not finite", self.state.global_step)

    def _diverge(self, found: str, step: int) -> NoReturn:
        kept = newest_checkpoint(self.folder)
        where = f"{kept} is the last good one" if kept else "no checkpoint was saved before"
        more, remedy = "", Remedy("learning_rate", words=f"below {self.args.learning_rate:g}")
        if self._scaler is not None:
            more, remedy = "; float16 ends at 65504", Remedy("dtype", "float32")
        found = f"{found}{more}, so training cannot go on ({where})"
        problem = Problem(found, remedy, " and start again")
        raise DivergenceError(problem, step=step)

    def rate_of(self, name: str) -> float:
        """Return the peak rate of a parameter, poles like the rest."""
        return float(self.args.learning_rate)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer, once."""
        if self.optimizer is None:
            args = self.args
            groups = parameter_groups(
                model or self.model,
                rate_of=lambda name: self.rate_of(name) * (self._pole_rate_scale if is_pole(name) else 1),
                weight_decay=args.weight_decay,
            )
            betas = (args.adam_beta1, args.adam_beta2)
            self.optimizer = build_optimizer(self._optim, groups, betas=betas, eps=args.adam_epsilon)
            if self._is_spread:
                spread_states_on_load(self.optimizer)
        return self.optimizer

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """Switch a model to evaluation mode, and back."""
        self.check_weights()
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), foreign_code("the model's forward pass"):
                yield
        finally:
            model.train(was_training)

    def report_measured(self, metrics: dict[str, float], *, is_validation: bool = True) -> dict[str, float]:
        """Log what was measured, and notify the callbacks that decide by it."""
        losses = [value for name, value in metrics.items() if name.endswith("_loss")]
        if is_validation and not all(map(math.isfinite, losses)):
            self._diverge(f"the held-out loss is not finite ({losses[0]})", self.state.global_step)
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
            if self._scaler is not None:
                scaled = {"loss_scale": self._scaler.get_scale(), "skipped_steps": self._scaler.num_skipped}
                logs |= scaled
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
