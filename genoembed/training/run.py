"""Pretrain a causal model on packed sequences: corpus files in, a model folder out.

``read -> cut -> shuffle -> encode -> pack -> train``. Promised: a run that was killed goes on from its newest
checkpoint with the rows that come next, and the loss curve is that of a run that was never killed (bitwise on
CPUs in float32); it goes on only with the config that it began with.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import math
import os
import shutil
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from genoembed._version import __version__
from genoembed.errors import ConfigError, ModelError
from genoembed.models.layers import find_blocks
from genoembed.models.load import without_progress_bars
from genoembed.models.precision import automatic_dtype
from genoembed.training.corpus import DocumentStream
from genoembed.training.corpus_config import CorpusConfig
from genoembed.training.isolation import forward_options, isolating_inputs
from genoembed.training.packed_trainer import PackedTrainer, StopOnSignal
from genoembed.training.pretraining import ClampPoles, MetricsFile, PretrainConfig, training_arguments
from genoembed.training.run_config import DOCUMENT_WINDOWS, differences, train_config
from genoembed.training.start import build_start
from genoembed.training.stream import PackedStream, RowShape, read_heldout

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from genoembed.training.run_config import DataConfig, RecipeConfig, TrainConfig
    from genoembed.training.start import Start

__all__ = ["PretrainReport", "pretrain"]

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
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
            :mod:`genoembed.training.run_config`, such as ``model`` or ``like``, ``heldout`` or
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
    keys = options | {"corpus": _as_strings(corpus), "heldout": _as_strings(options.get("heldout"))}
    settings = train_config(keys, file=config)
    folder = Path(output_dir)
    if threads is not None:
        if threads < 1:
            message = f"threads is {threads}; set threads to 1 or more"
            raise ConfigError(message)
        torch.set_num_threads(threads)
    run = _Run(settings, folder)
    run.claim_folder(resume=resume, overwrite=overwrite)
    return run.train()


def _as_strings(paths: str | PathLike[str] | Iterable[str | PathLike[str]] | None) -> tuple[str, ...] | None:
    if paths is None:
        return None
    if isinstance(paths, str | os.PathLike):
        paths = (paths,)
    return tuple(os.fspath(path) for path in paths) or None


class _Run:
    """One run: everything that is checked before the first step, then training.

    Args:
        config: What is asked for.
        folder: Where it goes.
    """

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        data = config.data
        self.config, self.folder = config, folder
        self.start = build_start(config.start, window=data.window, seed=config.recipe.seed)
        self.isolating = isolating_inputs(self.start.model, self.start.rules) if data.isolate else ()
        self.recipe = _resolved_recipe(config.recipe, self.start)
        self.arguments = _arguments(self.recipe, folder)
        if torch.distributed.is_initialized():
            atexit.register(leave_process_group)
        shard = {"shard": self.arguments.process_index, "num_shards": self.arguments.world_size}
        self.corpus = _corpus_config(data, seed=config.recipe.seed)
        self.rows = RowShape(
            packing=data.packing,
            window=data.window,
            seed=config.recipe.seed,
            rows_per_batch=config.recipe.rows_per_device,
        )
        self.stream = PackedStream(
            data.corpus, corpus=replace(self.corpus, **shard), rules=self.start.rules, rows=self.rows
        )
        self.checkpoint: Path | None = None

    def claim_folder(self, *, resume: bool, overwrite: bool) -> None:
        """Compare with the run that is there, find its checkpoint, or clear it away."""
        stored = self.folder / RUN_FILE
        if resume:
            self._compare(stored)
            self.checkpoint = newest_checkpoint(self.folder)
            logger.info(
                "resume: %s", self.checkpoint or f"no checkpoint yet in {self.folder}, from the start"
            )
            return
        found = [path for path in (stored, *self.folder.glob("checkpoint-*")) if path.exists()]
        if found and not overwrite:
            message = (
                f"{self.folder}: there is a run already ({found[0].name}); set resume to go on with it, "
                "overwrite to start again, or another output_dir"
            )
            raise ConfigError(message)
        if self.arguments.process_index == 0:
            for path in (*found, self.folder / METRICS_FILE, self.folder / "final"):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _compare(self, stored: Path) -> None:
        try:
            found = json.loads(stored.read_text(encoding="utf-8"))["compared"]
        except (OSError, ValueError, KeyError) as error:
            message = (
                f"resume: no run in {self.folder} ({stored.name} is missing or damaged); set resume to False"
            )
            raise ConfigError(message) from error
        expected = self._compared()
        problems = differences(found, expected, where=str(self.folder))
        for key in ("corpus", "heldout"):
            if found["data"][key] != expected["data"][key]:
                problems = [problem for problem in problems if not problem.startswith(f"{key}:")]
                problems.append(
                    f"{key}: names, sizes or order of the files are not those of the run in {self.folder}; "
                    "name the same files, or overwrite to start again"
                )
        if problems:
            raise ConfigError(*problems)

    def _compared(self) -> dict[str, Any]:
        """What a run that goes on must share with the one that began; files may move, not change."""
        values: dict[str, Any] = json.loads(json.dumps(self.config.to_dict()))
        values["data"]["corpus"] = self.stream.files_sha256
        files = self.config.data.heldout
        values["data"]["heldout"] = DocumentStream(files).state.files_sha256 if files else None
        recipe = {field.name: getattr(self.recipe, field.name) for field in fields(PretrainConfig)}
        shared = values["recipe"].keys() & recipe.keys()
        values["recipe"] |= {key: recipe[key] for key in shared}
        values["recipe"]["dtype"] = "bfloat16" if self.recipe.bf16 else "float32"
        return {**values, "processes": self.arguments.world_size}

    def train(self) -> PretrainReport:
        """Train to the end, or to a signal."""
        data = self.config.data
        heldout = read_heldout(
            data.heldout or data.corpus,
            corpus=replace(self.corpus, heldout=not data.heldout),
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
        model, stop = self.start.model, StopOnSignal()
        if self.config.recipe.gradient_checkpointing:
            _checkpoint_activations(model)
        if recipe.compile_blocks:
            for block in model.get_submodule(find_blocks(model)).children():
                block.compile(dynamic=False)
        trainer = PackedTrainer(
            model=model,
            args=self.arguments,
            recipe=recipe,
            stream=self.stream,
            heldout=heldout,
            isolating=self.isolating,
            forward_options=forward_options(self.isolating),
            callbacks=self._callbacks(stop),
        )
        trainer.remove_callback(PrinterCallback)
        if torch.distributed.is_initialized():  # the others still look at the folder
            torch.distributed.barrier()
        self._write_run_file()
        if self.checkpoint is not None and done >= recipe.max_steps:
            logger.info("resume: all %d steps are done", done)
            trainer.restore(self.checkpoint)
            return self._finish(trainer)
        with stop.listening(), without_progress_bars():
            trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        if stop.stopped_at is not None:
            message = (
                f"{self.folder / f'checkpoint-{stop.stopped_at}'} is saved; run the same again with resume "
                f"to go on at step {stop.stopped_at + 1} of {recipe.max_steps}"
            )
            raise KeyboardInterrupt(message)
        return self._finish(trainer)

    def _callbacks(self, stop: StopOnSignal) -> list[TrainerCallback]:
        metrics = MetricsFile(self.folder / METRICS_FILE)
        callbacks = [ClampPoles(), metrics, _SaveTokenizer(self.start.tokenizer), stop]
        if find_spec("tensorboard") is not None:
            board = TensorBoardCallback()
            board.logging_dir = str(self.folder / "tensorboard")
            callbacks.append(board)
        return callbacks

    def _write_run_file(self) -> None:
        if self.arguments.process_index:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        run = {
            "genoembed": __version__,
            "compared": self._compared(),
            "corpus": list(self.config.data.corpus),
            "heldout": list(self.config.data.heldout),
            "corpus_config": asdict(self.corpus),
            "model_config": self.start.model.config.to_dict(),
        }
        part = self.folder / f".{RUN_FILE}.part"
        part.write_text(json.dumps(run, indent=1, default=str) + "\n", encoding="utf-8")
        part.replace(self.folder / RUN_FILE)

    def _finish(self, trainer: PackedTrainer) -> PretrainReport:
        last = [line for line in trainer.state.log_history if "eval_bits_per_base" in line]
        steps = int(trainer.state.global_step)
        if not last or last[-1]["step"] != steps:
            last = [trainer.evaluate()]
        final = self.folder / "final"
        with without_progress_bars():
            trainer.save_model(str(final))
        if self.arguments.process_index == 0:
            self.start.tokenizer.save_pretrained(final)
        if torch.distributed.is_initialized():  # torchrun ends the others when one is gone
            torch.distributed.barrier()
        return PretrainReport(
            output=str(final),
            steps=steps,
            bits_per_base=last[-1]["eval_bits_per_base"],
            metrics=str(self.folder / METRICS_FILE),
        )


def leave_process_group() -> None:
    """End the group while the interpreter lives: its threads can make a process abort that ends with them."""
    gc.collect()  # what is wrapped for the group holds it
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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


def _resolved_recipe(recipe: RecipeConfig, start: Start) -> PretrainConfig:
    width = getattr(start.model.config, "hidden_size", None) or _BASE_WIDTH
    rate = _BASE_RATE * math.sqrt(_BASE_WIDTH / max(width, _BASE_WIDTH)) * (1 if start.is_new else 0.1)
    warmup = min(_MAX_WARMUP, recipe.max_steps // 20)
    shared = {f.name: getattr(recipe, f.name) for f in fields(PretrainConfig) if hasattr(recipe, f.name)}
    shared |= {
        "learning_rate": rate if recipe.learning_rate is None else recipe.learning_rate,
        "warmup_steps": warmup if recipe.warmup_steps is None else recipe.warmup_steps,
        "bf16": has_bfloat16() if recipe.dtype == "auto" else recipe.dtype == "bfloat16",
    }
    return PretrainConfig(**shared)


def has_bfloat16() -> bool:
    """Tell whether the hardware multiplies in bfloat16: elsewhere that is slower than float32.

    Returns:
        True if it does.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return automatic_dtype(device) == torch.bfloat16


def _arguments(recipe: PretrainConfig, folder: Path) -> TrainingArguments:
    # the stream leaves out used rows itself
    return training_arguments(recipe, folder, ignore_data_skip=True, ddp_find_unused_parameters=False)


def _corpus_config(data: DataConfig, *, seed: int) -> CorpusConfig:
    return CorpusConfig(
        seed=seed,
        both_strands=not data.one_strand,
        n_run_bp=data.n_run_bp,
        max_document_bp=data.max_document_bp or DOCUMENT_WINDOWS * data.window,
        shuffle_documents=data.shuffle_documents,
        heldout_fraction=data.heldout_fraction or 0.0,
        invalid=data.invalid,
        gaps=data.gaps,
        empty=data.empty,
    )


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint that was written to its end.

    Args:
        folder: Of the run.

    Returns:
        The checkpoint; one that a killed run has left in pieces is passed over.
    """
    complete = [path for path in folder.glob("checkpoint-*") if steps_of(path)]
    return max(complete, key=steps_of, default=None)


def steps_of(checkpoint: Path | None) -> int:
    """Count the steps that a checkpoint is after.

    Args:
        checkpoint: Of a trainer.

    Returns:
        The steps; 0 where its state, which is written last, is missing or cut.
    """
    if checkpoint is None:
        return 0
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"])
    except (OSError, ValueError, KeyError):
        return 0


class _SaveTokenizer(TrainerCallback):
    """Make each checkpoint a folder that can be loaded by itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def on_save(self, args: Any, state: Any, control: object, **kwargs: object) -> None:
        if state.is_world_process_zero:
            self._tokenizer.save_pretrained(Path(args.output_dir) / f"checkpoint-{state.global_step}")
