"""Fine-tune a model: labeled sequences or pairs in, a folder that embeds and predicts out.

``claim the folder -> read, clean and split rows -> load the model -> train -> choose the best step -> test ->
save``. Promised: whatever can be refused without a model is refused before torch is imported; the same
config, data and seed give the same model on CPUs; a run that was killed goes on from its newest checkpoint
with the losses of a run that was never killed; ``finetune.json`` runs the same again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from genoembed.config.fields import named_options
from genoembed.config.finetune import FinetuneConfig, finetune_config
from genoembed.config.paths import path_strings
from genoembed.config.tasks import PREDICTION_TASKS, applies
from genoembed.errors import check_installed
from genoembed.finetuning.preparation import read_task_rows
from genoembed.models.names import BUNDLED_NAME, EVO2_NAMES
from genoembed.training.packages import check_packages
from genoembed.training.run_folder import check_processes, claimed_run

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

    from genoembed.config.choices import Task

__all__ = ["FinetuneReport", "finetune"]

_HELD_OUT_KEYS = ("validation", "test")


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
    hybrid_weights: list[float] | None = None
    """Of the dense, sparse and multi-vector scores of a retrieval model; the ``mrr`` and ``recall`` of both
    sides are those of their sum."""


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
        config: TOML, YAML or JSON file with values for what ``options`` leave out.
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
    files = {name: path_strings(options.get(name)) or None for name in _HELD_OUT_KEYS}
    table = None if labels is None else os.fspath(labels)
    keys = options | files | {"train": path_strings(train) or None, "task": task, "labels": table}
    if isinstance(keys.get("model"), os.PathLike):
        keys["model"] = os.fspath(keys["model"])
    settings = finetune_config(keys, file=config)
    is_open = settings.encoder.add_pooler is None and applies("add_pooler", settings.objective.task)
    if is_open and settings.encoder.model in (BUNDLED_NAME, *EVO2_NAMES):
        # these bring no projection, any other may; said now, what else is wrong without is refused early
        encoder = settings.encoder.model_copy(update={"add_pooler": False})
        settings = settings.changed(encoder=encoder)
    if settings.objective.task in PREDICTION_TASKS:
        check_installed("sklearn", package="scikit-learn", extra="finetune", purpose="measuring predictions")
    if settings.encoder.tuning == "lora":
        check_installed("peft", extra="lora", purpose="tuning 'lora'")
    check_packages(settings.recipe)
    check_processes(settings.recipe.distributed)
    with claimed_run(output_dir, resume=resume, overwrite=overwrite) as folder:
        rows = read_task_rows(settings)
        # not at the top: importing torch takes seconds, and all that came before may have been refused
        from genoembed.finetuning.training import run_finetuning

        return FinetuneReport(**run_finetuning(settings, rows, folder, resume=resume, threads=threads))
