"""A pretraining run from its corpus to its report, measured in bits per base.

In: a configuration, files that have been looked at, and a folder that nobody else writes. Out: the report.
The loop is transformers' Trainer, fed with packed rows.

T targets of a batch, V tokens of the vocabulary.
"""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from genoembed.atomic import partial_of, replacing, replacing_folder, reporting_writes
from genoembed.config.pretrain import (
    DOCUMENT_WINDOWS,
    JOIN,
    CorpusConfig,
    StartConfig,
    TeacherConfig,
    TrainConfig,
    VectorLossConfig,
)
from genoembed.contracts import FINAL_FOLDER, IGNORE_INDEX
from genoembed.errors import ConfigError, Problem, Remedy, foreign_code
from genoembed.models.layers import find_blocks
from genoembed.models.locate import model_content
from genoembed.models.precision import multiplies_bfloat16
from genoembed.models.pretrained import without_progress_bars
from genoembed.models.trained_folder import find_facts
from genoembed.pipeline.request import begun_dtype, use_threads
from genoembed.pretraining.contrast import LOGGED, PAIR_FIELDS, VectorLoss
from genoembed.pretraining.corpus import DocumentStream
from genoembed.pretraining.kmer_codes import KmerCodes, canonical_numbers, discriminant_codes
from genoembed.pretraining.start import build_start, forward_options, isolating_inputs
from genoembed.pretraining.stream import PackedStream, RowShape, read_heldout
from genoembed.training.checkpointing import checkpoint_activations
from genoembed.training.distributed import (
    from_all,
    from_first,
    leave_process_group_at_exit,
    num_processes,
    wait_for_all,
)
from genoembed.training.log import MetricsFile, reporters
from genoembed.training.rates import pretraining_rate, rate_share
from genoembed.training.run_folder import (
    CODES_FILE,
    METRICS_FILE,
    MODEL,
    ResumeRules,
    files_digest,
    steps_of,
)
from genoembed.training.start import carry_vectors
from genoembed.training.trainer import ResumableTrainer, resolved_dtype, training_arguments

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

    from genoembed.config.pretrain import DataConfig, RecipeConfig
    from genoembed.models.trained_folder import FinetunedFacts
    from genoembed.pretraining.stream import HeldoutRows
    from genoembed.training.run_folder import RunFolder
    from genoembed.training.start import Start


ADAM_BETA2 = 0.98
"""Shorter memory than AdamW's usual 0.999, as language models are trained."""


_LEAST_SHARE = 0.1
"""Of the peak rate, at the end of a run."""


TEACHER_LOSS = "teacher_loss"
"""Name of the divergence from the teacher in the log, in nats a token."""
_TEACHER_WEIGHT = 0.75
_SAME_TOKENS = b"ACGTNacgtn"


class Teacher:
    """A model whose predictions are targets (Hinton et al. 2015, https://arxiv.org/abs/1503.02531)."""

    def __init__(
        self,
        config: TeacherConfig,
        start: Start,
        *,
        window: int,
        isolating: tuple[str, ...] = (),
        trust_remote_code: bool = False,
    ) -> None:
        self.weight = _TEACHER_WEIGHT if config.teacher_weight is None else config.teacher_weight
        source = StartConfig(model=config.teacher, trust_remote_code=trust_remote_code)
        found = build_start(source, window=window, seed=0)
        rules = (start.rules, found.rules)
        sizes = [model.get_input_embeddings().weight.shape[0] for model in (start.model, found.model)]
        texts = [list(map(int, each.encode_document(_SAME_TOKENS))) for each in rules]
        if texts[0] != texts[1] or sizes[0] != sizes[1]:
            message = (
                f"teacher: {config.teacher} has other tokens than the model that is trained "
                f"({sizes[1]} and {sizes[0]} tokens); name a teacher with the same tokenizer"
            )
            raise ConfigError(message)
        if isolating and isolating_inputs(found.model, found.rules) != isolating:
            message = (
                f"teacher: {config.teacher} keeps documents apart by other inputs than the trained model"
            )
            raise ConfigError(Problem(message, Remedy("isolate", False), ", or name another teacher"))
        self._model = found.model.eval().requires_grad_(False)

    def divergence(self, inputs: Mapping[str, Any], logits_BLV: Tensor) -> Tensor:
        """Return the Kullback-Leibler divergence of the teacher's predictions and these, a token, in nats."""
        is_target_BL = inputs["labels"][:, 1:] != IGNORE_INDEX
        with torch.no_grad():
            self._model.to(logits_BLV.device)
            fields = {name: value for name, value in inputs.items() if name != "labels"}
            wanted_BLV = self._model(**fields).logits
        wanted_TV = wanted_BLV[:, :-1][is_target_BL].float().log_softmax(dim=-1)
        found_TV = logits_BLV[:, :-1][is_target_BL].float().log_softmax(dim=-1)
        return F.kl_div(found_TV, wanted_TV, log_target=True, reduction="batchmean")


class PackedTrainer(ResumableTrainer):
    """A Trainer over :class:`~genoembed.pretraining.stream.PackedStream`."""

    lr_scheduler: LRScheduler | None

    def __init__(
        self,
        *,
        stream: PackedStream,
        heldout: HeldoutRows,
        isolating: tuple[str, ...],
        tokenizer: PreTrainedTokenizerBase,
        facts: FinetunedFacts | None = None,
        vectors: VectorLoss | None = None,
        teacher: Teacher | None = None,
        **arguments: Any,
    ) -> None:
        self._vectors, self._teacher = vectors, teacher
        self._stream, self._heldout, self._tokenizer = stream, heldout, tokenizer
        self._facts = facts
        self._fields = ("input_ids", *isolating)
        self._forward_options = forward_options(isolating)
        super().__init__(data_collator=self._collate, train_dataset=stream, **arguments)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the tokenizer with the model: each checkpoint is a folder that can be loaded by itself."""
        super()._save(output_dir, state_dict)
        self._tokenizer.save_pretrained(output_dir or str(self.folder))
        if self._facts is not None:
            carry_vectors(self._facts, Path(output_dir or self.folder))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """Build the schedule of the learning rate, once: warm-up, and a cosine to a tenth."""
        if self.lr_scheduler is None:
            chosen = optimizer or self.optimizer
            assert chosen is not None, "the optimizer is built first"
            warmup = int(self.args.warmup_steps)
            share = partial(
                rate_share, schedule="cosine", least=_LEAST_SHARE, warmup=warmup, total=num_training_steps
            )
            self.lr_scheduler = LambdaLR(chosen, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Read the stream as it is: accelerate would read it in one process and hand rows around."""
        return DataLoader(
            self._stream, batch_size=self.args.per_device_train_batch_size, collate_fn=self._collate
        )

    def _collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        segment_ids_BL = torch.stack([row["segment_ids"] for row in rows])
        self.book.padding.add(segment_ids_BL >= 0)
        batch = {name: torch.stack([row[name] for row in rows]) for name in (*self._fields, "labels")}
        if self._vectors is None or self._vectors.views is None:
            return batch
        return self._vectors.views.add(batch, segment_ids_BL)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Add the options of the forward pass, and to the gradient that of the other losses."""
        forwarded = {name: value for name, value in inputs.items() if name not in PAIR_FIELDS}
        kwargs.pop("return_outputs", None)
        with foreign_code("the model's forward pass"):
            options = {**forwarded, **self._forward_options}
            loss, outputs = super().compute_loss(model, options, *args, return_outputs=True, **kwargs)
        added = torch.zeros_like(loss)
        # the next-token loss is a share of all tokens of the step already; others are still to be divided
        is_divided = kwargs.get("num_items_in_batch") is not None
        share = 1 / self.args.gradient_accumulation_steps if is_divided else 1.0
        if self._teacher is not None:
            with foreign_code("the teacher's forward pass"):
                divergence = self._teacher.divergence(options, outputs.logits)
            self.book.add({TEACHER_LOSS: float(divergence.detach())})
            added = added + self._teacher.weight * (divergence * share - loss)
        if self._vectors is not None:
            vector_loss, numbers = self._vectors(inputs)
            self.book.add(numbers)
            added = added + vector_loss * share
        # what is logged stays the loss of the next token, in bits comparable with every other run
        return loss + (added - added.detach())

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure on what is held out, and log it."""
        model = self.model_wrapped
        # nats and number of all targets, and of those that are bases
        totals = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        with self.evaluating(model):
            for batch in self._heldout_batches():
                labels = batch.pop("labels")[:, 1:].to(self.args.device)
                inputs = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
                with self.compute_loss_context_manager():
                    logits = model(**inputs, **self._forward_options).logits[:, :-1]
                totals += self._nats(logits.flatten(0, 1), labels.flatten())
        nats, targets, base_nats, bases = self.accelerator.reduce(totals, "sum").tolist()
        bits_per_token = base_nats / max(bases, 1) / math.log(2)
        return self.report_measured(
            {
                "eval_loss": nats / max(targets, 1),
                "eval_bits_per_base": bits_per_token * self._heldout.tokens_per_base,
            }
        )

    def _nats(self, logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        nats_T = F.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORE_INDEX, reduction="none")
        is_target_T = labels_T != IGNORE_INDEX
        # predicting where documents end is no task of a base model: EOD counts in the loss, not in bits per
        # base
        is_base_T = is_target_T & (labels_T != self._heldout.eod_token_id)
        nats_T = nats_T.double()
        return torch.stack(
            [nats_T[is_target_T].sum(), is_target_T.sum(), nats_T[is_base_T].sum(), is_base_T.sum()]
        )

    def _heldout_batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield this process's batches: as many as each other has, filled up with rows that take no loss."""
        rows, world = self.args.per_device_eval_batch_size, self.args.world_size
        index = torch.arange(-(-len(self._heldout) // (rows * world)) * rows * world)
        for start in range(self.args.process_index * rows, len(index), rows * world):
            chosen = index[start : start + rows]
            batch = {
                name: self._heldout.tensors[name][chosen % len(self._heldout)]
                for name in (*self._fields, "labels")
            }
            batch["labels"][chosen >= len(self._heldout)] = IGNORE_INDEX
            yield batch

    def step_metrics(self) -> dict[str, float]:
        """Return how full the slots were, since the last line and since the run began."""
        found, stream = super().step_metrics(), self._stream
        counts = stream.packed.tokens, stream.packed.slots, stream.padded.tokens, stream.padded.slots
        tokens, slots, padded_tokens, padded_slots = map(sum, zip(*from_all(counts), strict=True))
        efficiency = tokens / slots
        return {
            "tokens_per_second": found["tokens_per_second"],
            "packing_percent": 100 * efficiency,
            "padding_percent": found["padding_percent"],
            "padded_cost": padded_slots / padded_tokens * efficiency if padded_tokens else 1.0,
            "corpus_epoch": stream.epoch,
            **{name: value for name, value in found.items() if name.startswith((*LOGGED, TEACHER_LOSS))},
        }


logger = logging.getLogger(__name__)

_MAX_WARMUP = 200
_RULES = ResumeRules(
    digests={
        "corpus": "contents or order of the files are not those of",
        "heldout": "contents or order of the files are not those of",
        "teacher": "the model is not that of",
    },
    newer={
        "optim": "adamw",
        "distributed": "ddp",
        **VectorLossConfig().to_flat(),
        **TeacherConfig().to_flat(),
    },
    # how often something is saved or measured, and how a step is computed; not what it learns
    harmless=(
        "logging_steps",
        "save_steps",
        "eval_steps",
        "report_to",
        "compile_blocks",
        "gradient_checkpointing",
    ),
)


def run_pretraining(
    config: TrainConfig, folder: RunFolder, *, resume: bool, threads: int | None
) -> dict[str, Any]:
    """Train, or return the report of the run that is there if it is this one and complete."""
    with use_threads(threads):
        if resume:
            recipe, begun = config.recipe, folder.begun_recipe()
            dtype = begun_dtype(recipe.dtype, begun)
            config = config.changed(recipe=recipe.changed(dtype=dtype))
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
    if config.teacher.teacher is not None:
        content = model_content(config.teacher.teacher, revision=None)
        values["teacher"]["teacher"] = " ".join(
            f"{name} {digest}" for name, digest in sorted(content.items())
        )
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
        name = config.start.model
        facts = None if name is None else find_facts(name, revision=config.start.revision)
        self.facts = facts if facts is not None and facts.is_tuned else None
        """How vectors were made of the model, if these were trained."""
        self.isolating = isolating_inputs(self.start.model, self.start.rules) if data.isolate else ()
        self.recipe = _resolved_recipe(config.recipe, self.start, is_tuned=self.facts is not None)
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
            checkpoint_activations(model)
        if recipe.compile_blocks:
            multiplies_bfloat16()  # decided now: compiled blocks could not measure
            for block in model.get_submodule(find_blocks(model)).children():
                block.compile(dynamic=False)
        wait_for_all()  # the others still look at the folder
        checkpoint = from_first(self._begin(resume=resume) if self.arguments.process_index == 0 else None)
        vectors = self._vector_loss() if self.config.vectors.is_wanted else None
        trainer = PackedTrainer(
            model=model,
            vectors=vectors,
            teacher=self._teacher(),
            args=self.arguments,
            stream=self.stream,
            heldout=heldout,
            isolating=self.isolating,
            tokenizer=self.start.tokenizer,
            recipe=recipe,
            facts=self.facts,
            pole_rate_scale=recipe.pole_rate_scale,
            callbacks=self._callbacks(),
        )
        done = steps_of(checkpoint)
        self.stream.skip_rows = done * recipe.accumulation_steps * recipe.rows_per_device
        if self.stream.skip_rows:
            logger.info("resume: reading again the %d rows of %d steps", self.stream.skip_rows, done)
        with trainer.reporting():
            trainer.train_from(checkpoint)
            bits_per_base = self._measured(trainer)
        return self._finish(trainer, bits_per_base)

    def _teacher(self) -> Teacher | None:
        config = self.config
        if config.teacher.teacher is None:
            return None
        return Teacher(
            config.teacher,
            self.start,
            window=config.data.window,
            isolating=self.isolating,
            trust_remote_code=config.start.trust_remote_code,
        )

    def _vector_loss(self) -> VectorLoss:
        config, start = self.config.vectors, self.start
        codes = None
        if config.kmer_codes:
            path = self.folder.path / CODES_FILE
            width = self._width_of_codes()
            if self.arguments.process_index == 0 and not path.is_file():
                # of the corpus alone: a run with another seed that goes on from this one keeps the codes
                stream = DocumentStream(self.config.data.corpus, config=self.corpus.changed(seed=0))
                table = discriminant_codes(stream, k=config.kmer_size, width=width)
                with reporting_writes(self.folder.target), replacing(path) as staged:
                    save_file({"codes": torch.from_numpy(table)}, staged)
            wait_for_all()
            codes = KmerCodes(load_file(path)["codes"], start.rules, k=config.kmer_size)
        return VectorLoss(start, config, codes=codes, seed=self.corpus.seed)

    def _width_of_codes(self) -> int:
        """As many numbers as the most layers that are joined have; the last of them must get some."""
        config = self.config.vectors
        spec = max(config.contrast_layers, key=lambda spec: spec.count(JOIN))
        hidden = int(self.start.model.get_input_embeddings().weight.shape[1])
        width, known = hidden * (spec.count(JOIN) + 1), int(canonical_numbers(config.kmer_size).max()) + 1
        if width - hidden >= known:
            message = (
                f"contrast_layers: {spec!r} asks for {width} numbers, but there are only {known} k-mers of "
                f"{config.kmer_size} bases (either strand); join fewer layers, or set kmer_size higher"
            )
            raise ConfigError(message)
        return width

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
        others = reporters(
            self.recipe.report_to, self.folder.path, self.config.to_flat(), name=self.folder.name
        )
        return [MetricsFile(self.folder.path / METRICS_FILE), *others]

    @staticmethod
    def _measured(trainer: PackedTrainer) -> float:
        trainer.check_weights()
        last = [line for line in trainer.state.log_history if "eval_bits_per_base" in line]
        if not last or last[-1]["step"] != trainer.state.global_step:
            last = [trainer.evaluate()]
        return float(last[-1]["eval_bits_per_base"])

    def _finish(self, trainer: PackedTrainer, bits_per_base: float) -> dict[str, Any]:
        report = {
            **_places(self.folder),
            "steps": int(trainer.state.global_step),
            "bits_per_base": bits_per_base,
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


def _resolved_recipe(recipe: RecipeConfig, start: Start, *, is_tuned: bool = False) -> RecipeConfig:
    """Fill in what goes by model and hardware."""
    width = getattr(start.model.config, "hidden_size", None)
    chosen = pretraining_rate(width, is_new=start.is_new, is_tuned=is_tuned)
    rate, why = (
        (chosen.value, chosen.why) if recipe.learning_rate is None else (recipe.learning_rate, "as set")
    )
    logger.info("training for %d steps, learning rate %.2g (%s)", recipe.max_steps, rate, why)
    warmup = min(_MAX_WARMUP, recipe.max_steps // 20)
    return recipe.changed(
        learning_rate=rate,
        warmup_steps=warmup if recipe.warmup_steps is None else recipe.warmup_steps,
        dtype=resolved_dtype(recipe.dtype),
    )


def _arguments(recipe: RecipeConfig, folder: Path) -> TrainingArguments:
    return training_arguments(
        recipe,
        folder,
        max_steps=recipe.max_steps,
        adam_beta2=ADAM_BETA2,
        lr_scheduler_type="constant",  # the trainer makes its own
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
