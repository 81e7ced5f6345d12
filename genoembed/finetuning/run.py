"""Fine-tune a model: labeled sequences or pairs in, a folder that embeds and predicts out.

``read -> clean -> split -> load the model -> train -> choose the best step -> test -> save``.
Promised: the same config, data and seed give the same model on CPUs; a run that was killed goes on from its
newest checkpoint with the losses of a run that was never killed; ``finetune.json`` runs the same again.
"""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_utils import set_seed

from genoembed.config.fields import named_options
from genoembed.config.finetune import PREDICTION_TASKS, FinetuneConfig, finetune_config
from genoembed.config.paths import path_strings
from genoembed.errors import ConfigError
from genoembed.finetuning.evaluation import SMALLER_IS_BETTER, TASK_METRICS, check_metrics_installed
from genoembed.finetuning.sampling import new_sampler
from genoembed.finetuning.saved import save_finetuned
from genoembed.finetuning.tasks import set_up_task
from genoembed.finetuning.trainer import FinetuneLog, FinetuneTrainer, StopEarly
from genoembed.models.trained_folder import FINAL_FOLDER
from genoembed.pipeline.request import use_threads
from genoembed.training.distributed import leave_process_group_at_exit, wait_for_all
from genoembed.training.run_folder import (
    METRICS_FILE,
    claim_run,
    refuse_other_run,
    write_json,
    write_run,
)
from genoembed.training.trainer import resolved_dtype, training_arguments

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from os import PathLike

    from transformers import TrainerCallback, TrainingArguments

    from genoembed.config.choices import Task
    from genoembed.config.finetune import FinetuneRecipe


__all__ = ["FinetuneReport", "finetune"]

logger = logging.getLogger(__name__)

CONFIG_FILE = "finetune.json"
REPORT_FILE = "report.json"
_FILE_KEYS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneReport:
    """What a run did."""

    output: str
    """Folder of the model: for ``extract``, ``predict`` and ``AutoModel``."""
    steps: int
    """Optimizer steps, those before a resumption counted."""
    best_step: int
    """The step whose weights were saved."""
    metric: str
    """What chose it."""
    validation: dict[str, float]
    """Metrics on the validation rows at that step; empty without any."""
    test: dict[str, float]
    """Metrics on the test rows; empty without any."""
    metrics: str
    """JSON-lines file with the whole curve."""
    config: str
    """JSON file that runs the same training again."""


@named_options(FinetuneConfig)
def finetune(
    train: str | PathLike[str] | Iterable[str | PathLike[str]] | None,
    output_dir: str | PathLike[str],
    *,
    task: Task | None = None,
    labels: str | PathLike[str] | None = None,
    config: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    **options: Any,
) -> FinetuneReport:
    """Fine-tune a model.

    Writes checkpoints, ``metrics.jsonl``, ``finetune.json``, ``run.json`` and, at the end, the folder
    ``final``. SIGINT and SIGTERM end the run after the step being done, with a checkpoint.

    Args:
        train: Files to learn from; None takes those of ``config``.
        output_dir: Folder for everything that is written.
        task: ``classification``, ``multilabel``, ``regression``, ``token``, ``lm``, ``contrastive``,
            ``triplet`` or ``retrieval``; None takes that of ``config``.
        labels: Table from id to label, where ``train`` are sequence files.
        config: TOML or JSON file with values for what ``options`` leave out.
        resume: Go on from the newest checkpoint in ``output_dir``.
        overwrite: Start again where there is a run in ``output_dir``.
        threads: CPU threads; None leaves torch's choice.
        **options: Any field of the stages of :mod:`genoembed.config.finetune`, such as ``model``,
            ``layers``, ``tuning``, ``split``, ``max_epochs``, ``learning_rate``. None stands for the file's
            value, or the default.

    Returns:
        Where the model is, and how good it is.

    Raises:
        ConfigError: If options are wrong or do not go with the data, ``output_dir`` holds a run and neither
            ``resume`` nor ``overwrite`` is set, or the run to resume has another config.
        MissingExtraError: If a package of the extra ``finetune`` is needed and missing.
        GenoembedError: If data or model fail.
        KeyboardInterrupt: After a checkpoint was saved because of a signal; its text says where.
    """
    files = {name: path_strings(options.get(name)) or None for name in _FILE_KEYS[1:]}
    table = None if labels is None else os.fspath(labels)
    keys = options | files | {"train": path_strings(train) or None, "task": task, "labels": table}
    if isinstance(keys.get("model"), os.PathLike):
        keys["model"] = os.fspath(keys["model"])
    settings = finetune_config(keys, file=config)
    folder = Path(output_dir)
    if resume and (folder / REPORT_FILE).is_file():
        logger.info("resume: the run in %s is complete", folder)
        return FinetuneReport(**json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))
    if settings.objective.task in PREDICTION_TASKS:
        check_metrics_installed()
    if not (resume or overwrite):
        refuse_other_run(folder)
    state = torch.get_rng_state()
    try:
        with use_threads(threads):
            return _Run(settings, folder).train(resume=resume)
    finally:
        torch.set_rng_state(state)


class _Run:
    """One run: everything that is checked before the first step, then training."""

    def __init__(self, config: FinetuneConfig, folder: Path) -> None:
        set_seed(config.recipe.seed)
        self.requested, self.folder = config, folder
        self.setup = set_up_task(config)
        parameters = list(self.setup.model.parameters())
        logger.info(
            "tuning %s: %d of %d parameters learn",
            config.encoder.tuning,
            sum(p.numel() for p in parameters if p.requires_grad),
            sum(p.numel() for p in parameters),
        )
        num_rows = len(self.setup.dataset)
        self.config = resolve_recipe(config, num_rows=num_rows, width=self.setup.width)
        recipe = self.config.recipe
        self.arguments = finetune_arguments(
            recipe, folder, num_rows=num_rows, has_validation="eval" in self.setup.measures
        )
        leave_process_group_at_exit()
        world_size = self.arguments.world_size
        self.compares_across = config.objective.across_devices and world_size > 1
        if self.setup.group_sampler is not None:
            ranks = world_size if self.compares_across else 1
            self.setup.group_sampler.check_batch(
                min(recipe.rows_per_device * ranks, num_rows),
                in_batch_negatives=config.objective.in_batch_negatives,
            )
        # what a run that goes on must share with the one that began: files may move, rows may not change
        shared: dict[str, Any] = json.loads(json.dumps(self.config.to_dict()))
        for name in (*_FILE_KEYS, "labels"):
            shared["data"].pop(name)
        self.compared = {**shared, "rows": self.setup.digest, "processes": world_size}

    def train(self, *, resume: bool) -> FinetuneReport:
        """Train to the end, or to a signal."""
        is_first = self.arguments.process_index == 0
        other_rows = (
            f"train: the rows are not those of the run in {self.folder}; give the same files, or "
            "overwrite to start again"
        )
        checkpoint = claim_run(
            self.folder,
            self.compared,
            resume=resume,
            digests={"rows": other_rows},
            is_first=is_first,
            others=(CONFIG_FILE, REPORT_FILE),
        )
        trainer = self._trainer()
        if is_first:
            write_run(self.folder, self.compared)
            write_json(self.folder / CONFIG_FILE, self.requested.to_flat())
        recipe = self.config.recipe
        logger.info(
            "training for %d steps at most, rate %.2g, of heads %.2g",
            total_steps(recipe, num_rows=len(self.setup.dataset), world_size=self.arguments.world_size),
            recipe.learning_rate,
            recipe.head_learning_rate,
        )
        trainer.train_from(checkpoint)
        return self._finish(trainer)

    def _trainer(self) -> FinetuneTrainer:
        recipe, setup = self.config.recipe, self.setup
        shown = (str(recipe.metric), *TASK_METRICS[self.config.objective.task][:2], "loss")
        callbacks: list[TrainerCallback] = [FinetuneLog(self.folder / METRICS_FILE, shown=shown)]
        if "eval" in setup.measures:
            callbacks.append(
                StopEarly(
                    f"eval_{recipe.metric}",
                    is_greater_better=recipe.metric not in SMALLER_IS_BETTER,
                    patience=recipe.patience,
                    min_epochs=recipe.min_epochs,
                )
            )
        return FinetuneTrainer(
            model=setup.model,
            args=self.arguments,
            dataset=setup.dataset,
            data_collator=setup.collate,
            sampler=new_sampler(
                setup.lengths,
                labels=setup.classes,
                batch_size=recipe.rows_per_device * self.arguments.world_size,
                seed=recipe.seed,
                mixed_lengths=recipe.mixed_lengths,
            ),
            # a query that is alone in its batch, and sees no other device, has nothing to be compared with
            least_rows=1 if setup.contrast is None or self.compares_across else 2,
            recipe=recipe,
            measures=setup.measures,
            callbacks=callbacks,
        )

    def _finish(self, trainer: FinetuneTrainer) -> FinetuneReport:
        state, metric = trainer.state, str(self.config.recipe.metric)
        test = trainer.evaluate(side="test") if "test" in self.setup.measures else {}
        best = int(state.best_global_step or state.global_step)
        lines = (line for line in reversed(state.log_history) if line.get("step") == best)
        validation: dict[str, float] = next((line for line in lines if f"eval_{metric}" in line), {})
        final = self.folder / FINAL_FOLDER
        report = FinetuneReport(
            output=str(final),
            steps=int(state.global_step),
            best_step=best,
            metric=metric,
            validation=_bare(validation, "eval_"),
            test=_bare(test, "test_"),
            metrics=str(self.folder / METRICS_FILE),
            config=str(self.folder / CONFIG_FILE),
        )
        if self.arguments.process_index == 0:
            model: Any = trainer.accelerator.unwrap_model(trainer.model)
            save_finetuned(
                model.cpu(),
                final,
                config=self.config,
                tokenizer=self.setup.tokenizer,
                space=self.setup.space,
                source=self.setup.source,
            )
            write_json(self.folder / REPORT_FILE, asdict(report))
        wait_for_all()
        return report


def _bare(metrics: Mapping[str, float], side: str) -> dict[str, float]:
    return {name.removeprefix(side): value for name, value in metrics.items() if name.startswith(side)}


# Sources of the defaults: epochs, Mosbach et al. 2021 (small sets need 20) and Devlin et al. 2019 (3 for
# large ones); rate of all weights, 3e-5 at width 768 (Zhou et al. 2024, DNABERT-2), above it in inverse
# proportion to the width (Yang et al. 2022); adapters, 2e-4 (Hu et al. 2022); both a third less below 2,000
# rows (Mosbach et al. 2021: small steps). At width 128 these are too low: 1e-3 and 3e-3 on 700 rows did
# better (benchmarks/results/finetuning.md); between the widths, rates lie on a line in logarithms. New heads,
# 1e-3 (Kingma and Ba 2015, Adam's own).
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
    resolved = recipe.changed(
        max_epochs=recipe.max_epochs or epochs,
        learning_rate=rate,
        head_learning_rate=recipe.head_learning_rate or max(_HEAD_RATE, rate),
        metric=metric,
        dtype=resolved_dtype(recipe.dtype),
    )
    return config.changed(recipe=resolved)


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
