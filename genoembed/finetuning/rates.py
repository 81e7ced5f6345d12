"""What settings leave open, by model and data: epochs by the number of rows, rates by tuning and width.

Sources of the defaults: epochs, Mosbach et al. 2021 (small sets need 20) and Devlin et al. 2019 (3 for
large ones); rate of all weights, 3e-5 at width 768 (Zhou et al. 2024, DNABERT-2), above it in inverse
proportion to the width (Yang et al. 2022); adapters, 2e-4 (Hu et al. 2022); both a third less below 2,000
rows (Mosbach et al. 2021: small steps). At width 128 these are too low: 1e-3 and 3e-3 on 700 rows did better
(``benchmarks/results/finetuning.md``); between the widths, rates lie on a line in logarithms. New heads,
1e-3 (Kingma and Ba 2015, Adam's own).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from genoembed.errors import ConfigError
from genoembed.finetuning.metrics import SMALLER_IS_BETTER, TASK_METRICS
from genoembed.training.trainer import resolved_dtype, training_arguments

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import TrainingArguments

    from genoembed.config.finetune import FinetuneConfig, FinetuneRecipe


_SMALL, _LARGE = 2_000, 20_000
_NARROW, _WIDE = 128, 768
_FULL_RATES, _LORA_RATES = (1.5e-3, 3e-5), (4.5e-3, 2e-4)
"""At the width ``_NARROW`` and at ``_WIDE``, for sets that are not small."""
_HEAD_RATE = 1e-3
_SMALL_SCALE = 2 / 3
_SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "plateau": "reduce_lr_on_plateau",
}


def resolve_recipe(config: FinetuneConfig, *, num_rows: int, width: int) -> FinetuneConfig:
    """Fill in the settings that depend on model and data.

    Example:
        >>> from genoembed.config.finetune import finetune_config
        >>> config = finetune_config({"task": "regression", "train": ("a.tsv",)})
        >>> recipe = resolve_recipe(config, num_rows=500, width=768).recipe
        >>> recipe.max_epochs, f"{recipe.learning_rate:.0e}", recipe.metric
        (20, '2e-05', 'spearman')
    """
    recipe, task = config.recipe, config.objective.task
    metric = recipe.metric or TASK_METRICS[task][0]
    if metric not in TASK_METRICS[task]:
        message = f"metric is {metric!r}; set metric to one of {', '.join(TASK_METRICS[task])}"
        raise ConfigError(message)
    epochs = 20 if num_rows < _SMALL else 10 if num_rows < _LARGE else 3
    rate = recipe.learning_rate or default_rate(
        width, uses_adapters=config.encoder.tuning == "lora", num_rows=num_rows
    )
    resolved = replace(
        recipe,
        max_epochs=recipe.max_epochs or epochs,
        learning_rate=rate,
        head_learning_rate=recipe.head_learning_rate or max(_HEAD_RATE, rate),
        metric=metric,
        dtype=resolved_dtype(recipe.dtype),
    )
    return replace(config, recipe=resolved)


def default_rate(width: int, *, uses_adapters: bool, num_rows: int) -> float:
    """Compute the peak rate of an encoder for which none is set.

    Example:
        >>> [round(default_rate(w, uses_adapters=False, num_rows=500), 6) for w in (128, 768, 4096)]
        [0.001, 2e-05, 4e-06]
    """
    narrow, wide = _LORA_RATES if uses_adapters else _FULL_RATES
    share = math.log(max(width, _NARROW) / _NARROW) / math.log(_WIDE / _NARROW)
    rate = narrow * (wide / narrow) ** min(share, 1.0)
    if width > _WIDE and not uses_adapters:
        rate *= _WIDE / width
    return rate * (_SMALL_SCALE if num_rows < _SMALL else 1.0)


def finetune_arguments(
    recipe: FinetuneRecipe, folder: Path, *, num_rows: int, has_validation: bool
) -> TrainingArguments:
    """Translate resolved settings into arguments of transformers."""
    metric = str(recipe.metric)
    is_greater_better = metric not in SMALLER_IS_BETTER
    every = "epoch" if recipe.eval_steps is None else "steps"
    others: dict[str, Any] = dict(
        num_train_epochs=recipe.max_epochs,
        max_steps=recipe.max_steps or -1,
        lr_scheduler_type=_SCHEDULES[recipe.schedule],
        logging_nan_inf_filter=False,
        eval_strategy=every if has_validation else "no",
        save_strategy=every,
        load_best_model_at_end=has_validation,
        metric_for_best_model=f"eval_{metric}" if has_validation else None,
        greater_is_better=is_greater_better if has_validation else None,
        data_seed=recipe.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if recipe.eval_steps is not None:
        others |= {"eval_steps": recipe.eval_steps, "save_steps": recipe.eval_steps}
    if recipe.schedule == "plateau":
        mode = "max" if is_greater_better else "min"
        others["lr_scheduler_kwargs"] = {"mode": mode, "factor": 0.5, "patience": 1}
    found = training_arguments(recipe, folder, **others)
    if recipe.schedule != "plateau":  # it knows only now how many processes there are
        steps = total_steps(recipe, num_rows=num_rows, world_size=found.world_size)
        found.warmup_steps = math.ceil(recipe.warmup_fraction * steps)
    return found


def total_steps(recipe: FinetuneRecipe, *, num_rows: int, world_size: int = 1) -> int:
    """Count the optimizer steps of resolved settings."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    batches = math.ceil(num_rows / (recipe.rows_per_device * world_size))
    return math.ceil(batches / recipe.accumulation_steps) * (recipe.max_epochs or 1)
