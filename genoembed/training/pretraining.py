"""What a pretraining run is made of: its recipe, AdamW's parameter groups, and poles that stay in bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainingArguments

from genoembed.training.adamw import decaying_parameters, is_pole

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

ADAM_BETAS = (0.9, 0.98)
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


class ClampPoles(TrainerCallback):
    """Keep every mode of the long filters decaying: a positive pole would explode."""

    @torch.no_grad()
    def on_optimizer_step(self, args: object, state: object, control: object, **kwargs: Any) -> None:
        """Clamp after each optimizer step."""
        for name, parameter in kwargs["model"].named_parameters():
            if is_pole(name):
                parameter.clamp_(max=MAX_LOG_POLE)
