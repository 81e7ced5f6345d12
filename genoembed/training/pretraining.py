"""What a pretraining run is made of: its recipe, AdamW's parameter groups, and what watches each step."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)

ADAM_BETAS = (0.9, 0.98)
ADAM_EPSILON = 1e-8
MAX_LOG_POLE = -1e-4
"""Modes of the long filter must decay: at this bound one fades over 10,000 bases."""


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
    """Say the recipe in the words of transformers.

    Args:
        config: The recipe.
        output_dir: Folder for checkpoints.
        **others: Further arguments, or others in place of these.

    Returns:
        The arguments of a trainer that reports through callbacks only.
    """
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
    """Divide the parameters by what AdamW should do with them.

    Args:
        model: Its parameters.
        config: Rates and weight decay.

    Returns:
        Matrices with decay, everything else without, and poles with a rate of their own.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    matrices, poles, rest = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("log_poles"):
            poles.append(parameter)
        elif parameter.dim() == 2 and id(parameter) not in embeddings and ".filter." not in name:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
        {"params": poles, "weight_decay": 0.0, "lr": config.learning_rate * config.pole_rate_scale},
    ]
    return [group for group in groups if group["params"]]


class ClampPoles(TrainerCallback):
    """Keep every mode of the long filters decaying: a positive pole would explode."""

    @torch.no_grad()
    def on_optimizer_step(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Clamp after each optimizer step.

        Args:
            args: Unused.
            state: Unused.
            control: Unused.
            **kwargs: Holds ``model``.
        """
        for name, parameter in kwargs["model"].named_parameters():
            if name.endswith("log_poles"):
                parameter.clamp_(max=MAX_LOG_POLE)


class MetricsFile(TrainerCallback):
    """Append what the trainer logs to a JSON-lines file, losses in bits as well as in nats.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: object, state: Any, control: object, **kwargs: object) -> None:
        """Drop the lines of steps that will be trained again, or of an earlier run from scratch.

        Args:
            args: Unused.
            state: Gives the step that training goes on from.
            control: Unused.
            **kwargs: Unused.
        """
        if not state.is_world_process_zero or not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= state.global_step] if state.global_step else []
        if len(kept) < len(lines):
            logger.info(
                "%s: left out %d lines of steps that are trained again", self.path, len(lines) - len(kept)
            )
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(
        self,
        args: object,
        state: Any,
        control: object,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Write one line.

        Args:
            args: Unused.
            state: Gives the step.
            control: Unused.
            logs: What was logged.
            **kwargs: Unused.
        """
        if not state.is_world_process_zero:
            return
        line: dict[str, float] = {"step": state.global_step, **(logs or {})}
        for name in ("loss", "eval_loss"):
            if name in line:
                line[f"{name}_bits"] = line[name] / math.log(2)
        logger.info("%s", describe_line(line))
        self.write(line)

    def write(self, line: Mapping[str, float]) -> None:
        """Append a line.

        Args:
            line: Its values by name.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def describe_line(line: Mapping[str, float]) -> str:
    """Say a line of ``metrics.jsonl`` in words that fit a terminal.

    Args:
        line: Its values by name.

    Returns:
        Such as ``step 20: loss 1.923 bits, rate 0.002``; values without words of their own are left out.

    Example:
        >>> describe_line({"step": 20, "loss_bits": 1.923, "learning_rate": 2e-3, "packing_percent": 100})
        'step 20: loss 1.923 bits, rate 0.002, packing 100.0 %'
    """
    said = [text % line[name] for name, text in _WORDS.items() if name in line]
    return f"step {line['step']}: {', '.join(said)}"


_WORDS = {
    "loss_bits": "loss %.3f bits",
    "eval_loss_bits": "held-out loss %.3f bits",
    "eval_bits_per_base": "held-out %.4f bits per base",
    "tokens_per_second": "%.0f tokens/s",
    "learning_rate": "rate %.3g",
    "grad_norm": "gradient %.3g",
    "packing_percent": "packing %.1f %%",
    "padding_percent": "padding %.1f %%",
    "padded_cost": "padded batches would cost %.2fx",
    "train_runtime": "%.0f s in all",
}


def _step_of(line: str) -> float:
    """Read the step of a line; one that a killed run has cut short counts as later than every step."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf
