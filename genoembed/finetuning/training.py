"""A fine-tuning run from its rows to its report: the model, the settings that depend on it, and training.

In: a configuration, rows that have been checked, and a folder that nobody else writes. Out: the report.
"""

from __future__ import annotations

import logging
import math
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_utils import set_seed

from genoembed.atomic import replacing_folder, reporting_writes
from genoembed.config.tasks import SMALLER_IS_BETTER, TASK_METRICS, applies
from genoembed.contracts import FINAL_FOLDER
from genoembed.errors import ConfigError, Problem, Remedy
from genoembed.finetuning.evaluation import ExampleMeasure
from genoembed.finetuning.sampling import new_sampler
from genoembed.finetuning.saved import save_finetuned
from genoembed.finetuning.tasks import set_up_task
from genoembed.finetuning.trained_start import with_trained_settings
from genoembed.finetuning.trainer import FinetuneLog, FinetuneTrainer, StopEarly
from genoembed.models.locate import model_content
from genoembed.models.trained_folder import find_facts
from genoembed.pipeline.request import begun_dtype, use_threads
from genoembed.retrieval.models import RetrievalModel
from genoembed.retrieval.weights import HybridWeights
from genoembed.training.distributed import (
    from_first,
    leave_process_group_at_exit,
    num_processes,
    wait_for_all,
)
from genoembed.training.log import reporters
from genoembed.training.rates import FEW_ROWS, HEAD_RATE, encoder_rate
from genoembed.training.run_folder import (
    CONFIG_FILE,
    METRICS_FILE,
    MODEL,
    ResumeRules,
    write_json,
)
from genoembed.training.sharding import gather
from genoembed.training.start import carry_vectors
from genoembed.training.trainer import resolved_dtype, training_arguments
from genoembed.training.tuning import describe_weights, with_tuning

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import TrainerCallback, TrainingArguments

    from genoembed.config.finetune import FinetuneConfig, FinetuneRecipe
    from genoembed.finetuning.preparation import TaskRows
    from genoembed.models.trained_folder import FinetunedFacts
    from genoembed.training.run_folder import RunFolder


logger = logging.getLogger(__name__)

_PLACES = ("train", "validation", "test", "labels")
"""Files may move; what they hold is compared."""


def run_finetuning(
    config: FinetuneConfig, rows: TaskRows, folder: RunFolder, *, resume: bool, threads: int | None
) -> dict[str, Any]:
    """Train, or return the report of the run that is there if it is this one and complete."""
    facts = find_facts(config.encoder.model, revision=config.encoder.revision)
    config = with_trained_settings(config, facts)
    config = config.changed(encoder=with_tuning(config.encoder))
    if resume:
        recipe, begun = config.recipe, folder.begun_recipe()
        dtype = begun_dtype(recipe.dtype, begun)
        config = config.changed(recipe=recipe.changed(dtype=dtype))
    compared = _identity(config, rows)
    if resume:
        report = folder.resume(compared, _resume_rules(config.recipe))
        if report is not None:
            return report | _places(folder)
    state = torch.get_rng_state()
    try:
        with use_threads(threads):
            return _Run(config, rows, folder, compared, facts).train(resume=resume)
    finally:
        torch.set_rng_state(state)


def _identity(config: FinetuneConfig, rows: TaskRows) -> dict[str, Any]:
    """What a run that goes on must share with the one that began: options, rows and model, by content."""
    values = config.to_dict()
    for key in _PLACES:
        values["data"].pop(key)
    for key in ("model", "revision", "trust_remote_code"):
        values["encoder"].pop(key)
    if not applies("add_pooler", config.objective.task):
        values["encoder"]["add_pooler"] = False  # as runs of earlier versions have it
    values["recipe"]["dtype"] = resolved_dtype(config.recipe.dtype)
    model = model_content(config.encoder.model, revision=config.encoder.revision)
    return {**values, "rows": rows.sides.digest, MODEL: model, "processes": num_processes()}


def _resume_rules(recipe: FinetuneRecipe) -> ResumeRules:
    return ResumeRules(
        digests={
            "rows": "the rows of train, validation and test are not those of",
        },
        newer={"optim": "adamw", "distributed": "ddp"},
        harmless=("logging_steps", "report_to", "gradient_checkpointing"),
        # a rate that falls towards the last step was another one in all steps before it
        may_grow=("max_steps", "max_epochs") if recipe.has_steady_rate else (),
    )


def _places(folder: RunFolder) -> dict[str, str]:
    return {
        "output": str(folder.final),
        "metrics": str(folder.target / METRICS_FILE),
        "config": str(folder.target / CONFIG_FILE),
    }


class _Run:
    """One run: everything that a model refuses before the first step, then training."""

    def __init__(
        self,
        config: FinetuneConfig,
        rows: TaskRows,
        folder: RunFolder,
        compared: Mapping[str, Any],
        facts: FinetunedFacts | None,
    ) -> None:
        set_seed(config.recipe.seed)
        self.requested, self.folder, self.compared = config, folder, compared
        self.setup = set_up_task(config, rows, facts)
        self.facts, self.is_tuned = facts, facts is not None and facts.is_tuned
        logger.info("tuning %s: %s", config.encoder.tuning, describe_weights(self.setup.model))
        self.config = resolve_recipe(
            config, num_rows=len(self.setup.dataset), width=self.setup.width, is_tuned=self.is_tuned
        )
        recipe = self.config.recipe
        self.arguments = finetune_arguments(recipe, folder.path, has_validation="eval" in self.setup.measures)
        leave_process_group_at_exit()
        world_size = self.arguments.world_size
        self.compares_across = config.objective.across_devices and world_size > 1
        if self.setup.group_sampler is not None:
            ranks = world_size if self.compares_across else 1
            self.setup.group_sampler.check_batch(min(recipe.rows_per_device * ranks, len(self.setup.dataset)))

    def train(self, *, resume: bool) -> dict[str, Any]:
        """Train to the end, or to a signal."""
        trainer = self._trainer()
        wait_for_all()  # the others still look at the folder
        checkpoint = None
        if self.arguments.process_index == 0:
            checkpoint = self.folder.begin(self.compared, resume=resume, config=self.config.to_dict())
            with reporting_writes(self.folder.target):
                write_json(self.folder.path / CONFIG_FILE, self.requested.to_flat())
        checkpoint = from_first(checkpoint)
        recipe, num_rows = self.config.recipe, len(self.setup.dataset)
        chosen = encoder_rate(
            self.setup.width,
            tuning=self.config.encoder.tuning,
            num_rows=num_rows,
            is_tuned=self.is_tuned,
        )
        logger.info(
            "training for at most %d steps, learning rate %.2g (%s)%s",
            total_steps(recipe, num_rows=num_rows, world_size=self.arguments.world_size),
            recipe.learning_rate,
            chosen.why if self.requested.recipe.learning_rate is None else "as set",
            "" if recipe.head_learning_rate is None else f", new heads {recipe.head_learning_rate:.2g}",
        )
        with trainer.reporting():
            trainer.train_from(checkpoint)
            trainer.check_weights()
            chosen_weights = self._choose_hybrid_weights(trainer)
            test = trainer.evaluate(side="test") if "test" in self.setup.measures else {}
        return self._finish(trainer, chosen_weights, test)

    def _trainer(self) -> FinetuneTrainer:
        recipe, setup = self.config.recipe, self.setup
        shown = (str(recipe.metric), *TASK_METRICS[self.config.objective.task][:2], "loss")
        folder = self.folder.path
        callbacks: list[TrainerCallback] = [
            FinetuneLog(folder / METRICS_FILE, shown=shown),
            *reporters(recipe.report_to, folder, self.config.to_flat(), name=self.folder.name),
        ]
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
                rows_compared=None if self.compares_across else recipe.rows_per_device,
                seed=recipe.seed,
                mixed_lengths=recipe.mixed_lengths,
            ),
            # a query that is alone in its batch, and sees no other device, has nothing to be compared with
            least_rows=1 if setup.contrast is None or self.compares_across else 2,
            recipe=recipe,
            # heads that came with the model have no need of the rate of new ones
            trained=frozenset() if self.requested.recipe.head_learning_rate else setup.trained,
            measures=setup.measures,
            callbacks=callbacks,
        )

    def _finish(
        self, trainer: FinetuneTrainer, chosen: dict[str, float], test: dict[str, float]
    ) -> dict[str, Any]:
        state, metric = trainer.state, str(self.config.recipe.metric)
        best = int(state.best_global_step or state.global_step)
        lines = (line for line in reversed(state.log_history) if line.get("step") == best)
        validation: dict[str, float] = next((line for line in lines if f"eval_{metric}" in line), {})
        report = {
            **_places(self.folder),
            "steps": int(state.global_step),
            "best_step": best,
            "metric": metric,
            "validation": _bare(validation, "eval_") | chosen,
            "test": _bare(test, "test_"),
        }
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        if _has_all_heads(model):
            report["hybrid_weights"] = [*astuple(model.hybrid_weights)]
        gather(model, is_kept=self.arguments.process_index == 0)
        if self.arguments.process_index == 0:
            final = self.folder.path / FINAL_FOLDER
            with reporting_writes(self.folder.target), replacing_folder(final, overwrite=True) as staged:
                save_finetuned(
                    model.cpu(),
                    staged,
                    config=self.config,
                    tokenizer=self.setup.tokenizer,
                    space=self.setup.space,
                    source=self.setup.source,
                )
                if self.config.objective.task == "lm" and self.facts is not None and self.facts.is_tuned:
                    carry_vectors(self.facts, staged)
            self.folder.finish(report)
        wait_for_all()
        return report

    def _choose_hybrid_weights(self, trainer: FinetuneTrainer) -> dict[str, float]:
        """Choose how scores of heads are added, by validation rows; return how well that ranks them."""
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        if not _has_all_heads(model):
            return {}
        measure = self.setup.measures.get("eval")
        if not isinstance(measure, ExampleMeasure):
            logger.info(
                "hybrid weights stay %s (dense : sparse : multi-vector): there are no validation rows to "
                "choose them by",
                model.hybrid_weights,
            )
            return {}
        with trainer.evaluating(model), trainer.compute_loss_context_manager():
            # every process has all rows; that all add alike must not hang on a last bit
            chosen, metrics = from_first(measure.choose_weights(model))
        model.hybrid_weights = chosen.weights
        logger.info(
            "hybrid weights %s (dense : sparse : multi-vector), chosen by %d validation queries: MRR %.3f, "
            "with %s %.3f, and alone %s",
            chosen.weights,
            metrics["ranked_queries"],
            chosen.metric,
            HybridWeights(),
            chosen.usual,
            ", ".join(f"{head.replace('_', '-')} {value:.3f}" for head, value in chosen.alone.items()),
        )
        return metrics


def _has_all_heads(model: object) -> bool:
    return isinstance(model, RetrievalModel) and model.heads.mode != "dense"


def _bare(metrics: Mapping[str, float], side: str) -> dict[str, float]:
    return {name.removeprefix(side): value for name, value in metrics.items() if name.startswith(side)}


# Epochs: Mosbach et al. 2021 (small sets need 20) and Devlin et al. 2019 (3 for large ones)
_LARGE = 20_000


def resolve_recipe(
    config: FinetuneConfig, *, num_rows: int, width: int, is_tuned: bool = False
) -> FinetuneConfig:
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
    epochs = 20 if num_rows < FEW_ROWS else 10 if num_rows < _LARGE else 3
    chosen = encoder_rate(width, tuning=config.encoder.tuning, num_rows=num_rows, is_tuned=is_tuned)
    rate = recipe.learning_rate or chosen.value
    resolved = recipe.changed(
        max_epochs=recipe.max_epochs or epochs,
        learning_rate=rate,
        head_learning_rate=(recipe.head_learning_rate or max(HEAD_RATE, rate))
        if applies("head_learning_rate", task)
        else None,
        metric=metric,
        dtype=resolved_dtype(recipe.dtype),
    )
    return config.changed(recipe=resolved)


def finetune_arguments(recipe: FinetuneRecipe, folder: Path, *, has_validation: bool) -> TrainingArguments:
    """Translate resolved settings into arguments of transformers."""
    metric = str(recipe.metric)
    if recipe.schedule == "plateau" and not has_validation:
        found = "schedule is 'plateau', which watches a metric, but there are no validation rows to measure"
        raise ConfigError(Problem(found, Remedy("schedule", "cosine"), ", or give validation rows"))
    is_greater_better = metric not in SMALLER_IS_BETTER
    every = "epoch" if recipe.eval_steps is None else "steps"
    others: dict[str, Any] = dict(
        num_train_epochs=recipe.max_epochs,
        max_steps=recipe.max_steps or -1,
        # the trainer makes its own; transformers asks this one when to look at the metric
        lr_scheduler_type="reduce_lr_on_plateau" if recipe.schedule == "plateau" else "constant",
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
    return training_arguments(recipe, folder, **others)


def total_steps(recipe: FinetuneRecipe, *, num_rows: int, world_size: int = 1) -> int:
    """Count the optimizer steps of resolved settings."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    batches = math.ceil(num_rows / (recipe.rows_per_device * world_size))
    return math.ceil(batches / recipe.accumulation_steps) * (recipe.max_epochs or 1)
