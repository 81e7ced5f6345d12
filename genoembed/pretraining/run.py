"""Pretrain a causal model on packed sequences: corpus files in, a model folder out.

``read -> cut -> shuffle -> encode -> pack -> train``. Promised: a run that was killed goes on from its newest
checkpoint with the rows that come next, and the loss curve is that of a run that was never killed (bitwise on
CPUs in float32); it goes on only with the config that it began with.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from genoembed.config.fields import named_options
from genoembed.config.paths import path_strings
from genoembed.config.pretrain import DOCUMENT_WINDOWS, CorpusConfig, TrainConfig, train_config
from genoembed.errors import ModelError
from genoembed.models.layers import find_blocks
from genoembed.models.load import without_progress_bars
from genoembed.models.trained_folder import FINAL_FOLDER
from genoembed.pipeline.request import use_threads
from genoembed.pretraining.corpus import DocumentStream
from genoembed.pretraining.start import build_start, isolating_inputs
from genoembed.pretraining.stream import PackedStream, RowShape, read_heldout
from genoembed.pretraining.trainer import ADAM_BETA2, PackedTrainer
from genoembed.training.distributed import leave_process_group_at_exit, wait_for_all
from genoembed.training.log import MetricsFile
from genoembed.training.run_folder import (
    METRICS_FILE,
    claim_run,
    refuse_other_run,
    steps_of,
    write_run,
)
from genoembed.training.trainer import resolved_dtype, training_arguments

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from genoembed.config.pretrain import DataConfig, RecipeConfig
    from genoembed.training.start import Start


__all__ = ["PretrainReport", "pretrain"]

logger = logging.getLogger(__name__)

_BASE_RATE, _BASE_WIDTH = 2e-3, 128
_MAX_WARMUP = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainReport:
    """What a run did."""

    output: str
    """Folder of the trained model and its tokenizer."""
    steps: int
    """Optimizer steps, those before a resumption counted."""
    bits_per_base: float
    """On what is held out, at the end."""
    metrics: str
    """JSON-lines file with the whole curve."""


@named_options(TrainConfig)
def pretrain(
    corpus: str | PathLike[str] | Iterable[str | PathLike[str]] | None,
    output_dir: str | PathLike[str],
    *,
    config: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    **options: Any,
) -> PretrainReport:
    """Train a causal model on packed sequences.

    Writes checkpoints, ``metrics.jsonl``, ``run.json`` and, at the end, the folder ``final``. SIGINT and
    SIGTERM end the run after the step being done, with a checkpoint. Under ``torchrun`` each process trains
    on its own part of the documents.

    Args:
        corpus: Sequence files to train on; None takes those of ``config``.
        output_dir: Folder for everything that is written.
        config: TOML or JSON file with values for what ``options`` leave out.
        resume: Go on from the newest checkpoint in ``output_dir``.
        overwrite: Start again where there is a run in ``output_dir``.
        threads: CPU threads; None leaves torch's choice.
        **options: Any field of ``StartConfig``, ``DataConfig`` and ``RecipeConfig`` of
            :mod:`genoembed.config.pretrain`, such as ``model`` or ``like``, ``heldout`` or
            ``heldout_fraction``, ``packing``, ``window``, ``isolate``, ``max_steps``. None stands for the
            file's value, or the default.

    Returns:
        Where the model is, and what it reached.

    Raises:
        ConfigError: If options are wrong, ``output_dir`` holds a run and neither ``resume`` nor ``overwrite``
            is set, or the run to resume has another config.
        GenoembedError: If corpus or model fail.
        KeyboardInterrupt: After a checkpoint was saved because of a signal; its text says where.
    """
    keys = options | {
        "corpus": (path_strings(corpus) or None),
        "heldout": (path_strings(options.get("heldout")) or None),
    }
    settings = train_config(keys, file=config)
    folder = Path(output_dir)
    with use_threads(threads):
        if not (resume or overwrite):
            refuse_other_run(folder)
        run = _Run(settings, folder)
        run.claim_folder(resume=resume)
        return run.train()


class _Run:
    """One run: everything that is checked before the first step, then training."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        data = config.data
        self.config, self.folder = config, folder
        self.start = build_start(config.start, window=data.window, seed=config.recipe.seed)
        self.isolating = isolating_inputs(self.start.model, self.start.rules) if data.isolate else ()
        self.recipe = _resolved_recipe(config.recipe, self.start)
        self.arguments = _arguments(self.recipe, folder)
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
        self.checkpoint: Path | None = None

    def claim_folder(self, *, resume: bool) -> None:
        """Compare with the run that is there, find its checkpoint, or clear it away."""
        told = f"names, sizes or order of the files are not those of the run in {self.folder}"
        self.checkpoint = claim_run(
            self.folder,
            self._compared(),
            resume=resume,
            digests={
                key: f"{key}: {told}; name the same files, or overwrite to start again"
                for key in ("corpus", "heldout")
            },
            is_first=self.arguments.process_index == 0,
        )

    def _compared(self) -> dict[str, Any]:
        """What a run that goes on must share with the one that began; files may move, not change."""
        values: dict[str, Any] = json.loads(json.dumps(self.config.to_dict()))
        values["data"]["corpus"] = self.stream.files_sha256
        files = self.config.data.heldout
        values["data"]["heldout"] = DocumentStream(files).state.files_sha256 if files else None
        values["recipe"] |= self.recipe.to_dict()
        return {**values, "processes": self.arguments.world_size}

    def train(self) -> PretrainReport:
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
        done = steps_of(self.checkpoint)
        recipe = self.recipe
        self.stream.skip_rows = done * recipe.accumulation_steps * recipe.rows_per_device
        if self.stream.skip_rows:
            logger.info("resume: reading again the %d rows of %d steps", self.stream.skip_rows, done)
        model = self.start.model
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
            pole_rate_scale=recipe.pole_rate_scale,
            callbacks=self._callbacks(),
        )
        wait_for_all()  # the others still look at the folder
        self._write_run_file()
        if self.checkpoint is not None and done >= recipe.max_steps:
            logger.info("resume: all %d steps are done", done)
            trainer.restore(self.checkpoint)
        else:
            trainer.train_from(self.checkpoint)
        return self._finish(trainer)

    def _callbacks(self) -> list[TrainerCallback]:
        callbacks = [MetricsFile(self.folder / METRICS_FILE), _SaveTokenizer(self.start.tokenizer)]
        if find_spec("tensorboard") is not None:
            board = TensorBoardCallback()
            board.logging_dir = str(self.folder / "tensorboard")
            callbacks.append(board)
        return callbacks

    def _write_run_file(self) -> None:
        if self.arguments.process_index == 0:
            write_run(
                self.folder,
                self._compared(),
                corpus=list(self.config.data.corpus),
                heldout=list(self.config.data.heldout),
                corpus_config=self.corpus.to_dict(),
                model_config=self.start.model.config.to_dict(),
            )

    def _finish(self, trainer: PackedTrainer) -> PretrainReport:
        last = [line for line in trainer.state.log_history if "eval_bits_per_base" in line]
        steps = int(trainer.state.global_step)
        if not last or last[-1]["step"] != steps:
            last = [trainer.evaluate()]
        final = self.folder / FINAL_FOLDER
        with without_progress_bars():
            trainer.save_model(str(final))
        if self.arguments.process_index == 0:
            self.start.tokenizer.save_pretrained(final)
        wait_for_all()
        return PretrainReport(
            output=str(final),
            steps=steps,
            bits_per_base=last[-1]["eval_bits_per_base"],
            metrics=str(self.folder / METRICS_FILE),
        )


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


class _SaveTokenizer(TrainerCallback):
    """Make each checkpoint a folder that can be loaded by itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def on_save(self, args: Any, state: Any, control: object, **kwargs: object) -> None:
        if state.is_world_process_zero:
            self._tokenizer.save_pretrained(Path(args.output_dir) / f"checkpoint-{state.global_step}")
