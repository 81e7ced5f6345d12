"""A pretraining run from its corpus to its report: the model, the settings that depend on it, and training.

In: a configuration, files that have been looked at, and a folder that nobody else writes. Out: the report.
"""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from transformers.integrations import TensorBoardCallback

from genoembed.atomic import partial_of, replacing_folder, reporting_writes
from genoembed.config.pretrain import DOCUMENT_WINDOWS, CorpusConfig, TrainConfig
from genoembed.contracts import FINAL_FOLDER
from genoembed.errors import ModelError
from genoembed.models.layers import find_blocks
from genoembed.models.load import without_progress_bars
from genoembed.models.locate import model_content
from genoembed.pipeline.request import use_threads
from genoembed.pretraining.start import build_start, isolating_inputs
from genoembed.pretraining.stream import PackedStream, RowShape, read_heldout
from genoembed.pretraining.trainer import ADAM_BETA2, PackedTrainer
from genoembed.training.distributed import (
    from_first,
    leave_process_group_at_exit,
    num_processes,
    wait_for_all,
)
from genoembed.training.log import MetricsFile
from genoembed.training.run_folder import (
    METRICS_FILE,
    MODEL,
    ResumeRules,
    files_digest,
    steps_of,
)
from genoembed.training.trainer import resolved_dtype, training_arguments

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

    from genoembed.config.pretrain import DataConfig, RecipeConfig
    from genoembed.training.run_folder import RunFolder
    from genoembed.training.start import Start


logger = logging.getLogger(__name__)

_BASE_RATE, _BASE_WIDTH = 2e-3, 128
_MAX_WARMUP = 200
_RULES = ResumeRules(
    digests={
        "corpus": "contents or order of the files are not those of",
        "heldout": "contents or order of the files are not those of",
    },
    # how often something is saved or measured, and how a step is computed; not what it learns
    harmless=("logging_steps", "save_steps", "eval_steps", "compile_blocks", "gradient_checkpointing"),
)


def run_pretraining(
    config: TrainConfig, folder: RunFolder, *, resume: bool, threads: int | None
) -> dict[str, Any]:
    """Train, or return the report of the run that is there if it is this one and complete."""
    with use_threads(threads):
        compared = _identity(config)
        if resume:
            report = folder.resume(compared, _RULES)
            if report is not None:
                return report | _places(folder)
        return _Run(config, folder, compared).train(resume=resume)


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What a run that goes on must share with the one that began: options, corpus and model, by content."""
    values = config.to_dict()
    start, data = values["start"], values["data"]
    for key in ("revision", "trust_remote_code"):
        start.pop(key)
    if config.start.model is not None:
        start.pop("model")
        start[MODEL] = model_content(config.start.model, revision=config.start.revision)
    data["corpus"] = files_digest(config.data.corpus)
    data["heldout"] = files_digest(config.data.heldout) if config.data.heldout else None
    values["recipe"]["dtype"] = resolved_dtype(config.recipe.dtype)
    return {**values, "processes": num_processes()}


def _places(folder: RunFolder) -> dict[str, str]:
    return {"output": str(folder.final), "metrics": str(folder.target / METRICS_FILE)}


class _Run:
    """One run: everything that a model refuses before the first step, then training."""

    def __init__(self, config: TrainConfig, folder: RunFolder, compared: Mapping[str, Any]) -> None:
        data = config.data
        self.config, self.folder, self.compared = config, folder, compared
        self.start = build_start(config.start, window=data.window, seed=config.recipe.seed)
        self.isolating = isolating_inputs(self.start.model, self.start.rules) if data.isolate else ()
        self.recipe = _resolved_recipe(config.recipe, self.start)
        self.arguments = _arguments(self.recipe, folder.path)
        leave_process_group_at_exit()
        shard = {"shard": self.arguments.process_index, "num_shards": self.arguments.world_size}
        self.corpus = _corpus_config(data, seed=config.recipe.seed)
        self.rows = RowShape(
            packing=data.packing,
            window=data.window,
            seed=config.recipe.seed,
            rows_per_batch=config.recipe.rows_per_device,
        )
        self.stream = PackedStream(
            data.corpus, corpus=self.corpus.changed(**shard), rules=self.start.rules, rows=self.rows
        )

    def train(self, *, resume: bool) -> dict[str, Any]:
        """Train to the end, or to a signal."""
        data = self.config.data
        heldout = read_heldout(
            data.heldout or data.corpus,
            corpus=self.corpus.changed(heldout=not data.heldout),
            rules=self.start.rules,
            rows=self.rows,
            num_rows=data.heldout_rows,
        )
        logger.info("held out: %d rows of %d documents", len(heldout), heldout.documents)
        recipe, model = self.recipe, self.start.model
        if recipe.gradient_checkpointing:
            _checkpoint_activations(model)
        if recipe.compile_blocks:
            for block in model.get_submodule(find_blocks(model)).children():
                block.compile(dynamic=False)
        trainer = PackedTrainer(
            model=model,
            args=self.arguments,
            stream=self.stream,
            heldout=heldout,
            isolating=self.isolating,
            tokenizer=self.start.tokenizer,
            pole_rate_scale=recipe.pole_rate_scale,
            callbacks=self._callbacks(),
        )
        wait_for_all()  # the others still look at the folder
        checkpoint = from_first(self._begin(resume=resume) if self.arguments.process_index == 0 else None)
        done = steps_of(checkpoint)
        self.stream.skip_rows = done * recipe.accumulation_steps * recipe.rows_per_device
        if self.stream.skip_rows:
            logger.info("resume: reading again the %d rows of %d steps", self.stream.skip_rows, done)
        trainer.train_from(checkpoint)
        return self._finish(trainer)

    def _begin(self, *, resume: bool) -> Path | None:
        return self.folder.begin(
            self.compared,
            resume=resume,
            corpus=list(self.config.data.corpus),
            heldout=list(self.config.data.heldout),
            recipe=self.recipe.to_dict(),
            corpus_config=self.corpus.to_dict(),
            model_config=self.start.model.config.to_dict(),
        )

    def _callbacks(self) -> list[TrainerCallback]:
        callbacks: list[TrainerCallback] = [MetricsFile(self.folder.path / METRICS_FILE)]
        if find_spec("tensorboard") is not None:
            board = TensorBoardCallback()
            board.logging_dir = str(self.folder.path / "tensorboard")
            callbacks.append(board)
        return callbacks

    def _finish(self, trainer: PackedTrainer) -> dict[str, Any]:
        trainer.check_weights()
        last = [line for line in trainer.state.log_history if "eval_bits_per_base" in line]
        steps = int(trainer.state.global_step)
        if not last or last[-1]["step"] != steps:
            last = [trainer.evaluate()]
        report = {
            **_places(self.folder),
            "steps": steps,
            "bits_per_base": last[-1]["eval_bits_per_base"],
        }
        final = self.folder.path / FINAL_FOLDER
        is_first = self.arguments.process_index == 0
        with reporting_writes(self.folder.target), without_progress_bars():
            # all processes gather the weights, the first one writes them
            with (
                replacing_folder(final, overwrite=True)
                if is_first
                else nullcontext(partial_of(final)) as staged
            ):
                trainer.save_model(str(staged))
        if is_first:
            self.folder.finish(report)
        wait_for_all()
        return report


def _checkpoint_activations(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        message = (
            f"gradient_checkpointing: {type(model).__name__} does not offer it; set "
            "gradient_checkpointing to False, and fewer rows_per_device with more accumulation_steps"
        )
        raise ModelError(message)
    # the newer name of the same method
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _resolved_recipe(recipe: RecipeConfig, start: Start) -> RecipeConfig:
    """Fill in what goes by model and hardware."""
    width = getattr(start.model.config, "hidden_size", None) or _BASE_WIDTH
    rate = _BASE_RATE * math.sqrt(_BASE_WIDTH / max(width, _BASE_WIDTH)) * (1 if start.is_new else 0.1)
    warmup = min(_MAX_WARMUP, recipe.max_steps // 20)
    return recipe.changed(
        learning_rate=rate if recipe.learning_rate is None else recipe.learning_rate,
        warmup_steps=warmup if recipe.warmup_steps is None else recipe.warmup_steps,
        dtype=resolved_dtype(recipe.dtype),
    )


def _arguments(recipe: RecipeConfig, folder: Path) -> TrainingArguments:
    return training_arguments(
        recipe,
        folder,
        max_steps=recipe.max_steps,
        adam_beta2=ADAM_BETA2,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=recipe.warmup_steps,
        eval_strategy="steps",
        eval_steps=recipe.eval_steps,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        prediction_loss_only=True,
        ignore_data_skip=True,  # the stream leaves out used rows itself
    )


def _corpus_config(data: DataConfig, *, seed: int) -> CorpusConfig:
    return CorpusConfig(
        seed=seed,
        both_strands=data.both_strands,
        n_run_bp=data.n_run_bp,
        max_document_bp=data.max_document_bp or DOCUMENT_WINDOWS * data.window,
        shuffle_documents=data.shuffle_documents,
        heldout_fraction=data.heldout_fraction or 0.0,
        invalid=data.invalid,
        gaps=data.gaps,
        empty=data.empty,
    )
