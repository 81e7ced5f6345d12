"""Options of a fine-tuning run: one configuration for each stage, nested in :class:`FinetuneConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genoembed.config.choices import (
    BaseLabels,
    ClassWeights,
    ContrastChoice,
    Distance,
    Distillation,
    FalseNegativePolicy,
    Fusion,
    HomologPolicy,
    M3Mode,
    ScopeChoice,
    Task,
    TokenPooling,
    Tuning,
)
from genoembed.config.embed import DEFAULT_MODEL, ModelConfig, PolicyConfig
from genoembed.config.fields import Config, option, same_option
from genoembed.config.labeled import (
    SPLIT,
    AugmentConfig,
    CleaningConfig,
    SplitShares,
    TableColumns,
    split_problems,
)
from genoembed.config.tasks import TASK_METRICS, applies, misplaced
from genoembed.config.training import DATA, OPTIMIZATION, RUN, RunFolderConfig, ScheduleConfig
from genoembed.errors import Problem, Remedy

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from os import PathLike

TASK, ENCODER, TUNING, PAIRS, RETRIEVAL = (
    *("Task", "Model and vectors", "Trainable parameters", "Pairs and triplets", "Retrieval heads"),
)


class EncoderConfig(Config):
    """Which model, what is taken from it, and what of it learns."""

    model: str = option(
        DEFAULT_MODEL,
        group=ENCODER,
        basic=True,
        metavar="NAME",
        help="Model: a name from 'genoembed models', a local folder, or a Hugging Face id.",
        reads="if there",
    )
    revision: str | None = same_option(ModelConfig, "revision", group=ENCODER)
    trust_remote_code: bool = same_option(ModelConfig, "trust_remote_code", group=ENCODER)
    layers: tuple[str, ...] = option(
        ("final",),
        group=ENCODER,
        basic=True,
        flag="--layer",
        metavar="SPEC",
        shown_default="final, or as MODEL was trained",
        help="Layer to read, named as in extract; the blocks after it are removed. Repeat the option "
        "for several layers, which are then combined.",
    )
    pooling: TokenPooling = option(
        "mean",
        group=ENCODER,
        basic=True,
        flag="--pool",
        shown_default="mean, or as MODEL was trained",
        help="How to pool the token vectors of a sequence into one vector.",
    )
    skip_first: int = option(
        0,
        ge=0,
        unit="bases",
        group=ENCODER,
        metavar="BASES",
        shown_default="0, or as MODEL was trained",
        help="Number of bases at the start of the model's input that pooling leaves out.",
    )
    fusion: Fusion = option(
        "none",
        group=ENCODER,
        flag="--fuse",
        shown_default="none, or as MODEL was trained",
        help="How to combine several layers. weighted: the weights are learned.",
    )
    add_pooler: bool | None = option(
        None,
        group=ENCODER,
        shown_default="as MODEL was trained",
        help="Add a linear projection after the pooling. It starts as the identity.",
    )
    normalize: bool | None = option(
        None,
        group=ENCODER,
        shown_default="as MODEL was trained; else on, except for euclidean triplets",
        help="Scale vectors to length 1.",
    )
    tuning: Tuning | None = option(
        None,
        group=TUNING,
        basic=True,
        shown_default="full; lora for models of a billion parameters and more",
        help="Which parameters to train: all (full); only the heads (frozen); the last blocks "
        "(last_n); or LoRA adapters.",
    )
    last_n: int = option(
        2,
        ge=1,
        group=TUNING,
        metavar="N",
        help="For --tuning last_n: number of blocks to train, counted back from --layer.",
    )
    lora_rank: int = option(
        8, ge=1, group=TUNING, metavar="N", help="For --tuning lora: rank of the adapter matrices."
    )
    lora_alpha: float = option(
        16.0,
        gt=0,
        group=TUNING,
        metavar="X",
        help="For --tuning lora: scale of the adapters. Their output is multiplied by alpha / rank.",
    )
    lora_dropout: float = option(
        0.0,
        ge=0,
        lt=1,
        group=TUNING,
        metavar="FRACTION",
        help="For --tuning lora: dropout on the input of the adapters.",
    )
    lora_targets: tuple[str, ...] = option(
        (),
        group=TUNING,
        flag="--lora-target",
        metavar="NAME",
        shown_default="all in the blocks",
        help="For --tuning lora: linear layers that get adapters, named by the end of their path. "
        "Repeatable.",
    )

    def _problems(self) -> Iterator[str]:
        if not self.layers:
            yield "layers is empty; name at least one layer, or leave it out for 'final'"
        needed = {"last_n": "last_n", **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout"), "lora")}
        for key, tuning in (needed | {"lora_targets": "lora"}).items():
            if self.tuning != tuning and getattr(self, key) != type(self).own_options()[key].default:
                found = f"{key} is for tuning {tuning!r}, but tuning is "
                found += "not given" if self.tuning is None else repr(self.tuning)
                yield Problem(found, Remedy("tuning", tuning), f", or leave {key} out")


class FinetuneDataConfig(TableColumns, CleaningConfig, SplitShares, PolicyConfig):
    """Which sequences and labels, what is done with rows that are not clean, and how rows are divided."""

    train: tuple[str, ...] = option(
        argument=True,
        metavar="TRAIN",
        help="Training data: tables, sequence files, or JSON lines with query, pos and neg.",
        reads=True,
    )
    labels: str | None = option(
        None,
        group=DATA,
        basic=True,
        metavar="FILE",
        help="Table of labels, one row per record: TSV, CSV, JSON lines or Parquet.",
        reads=True,
    )
    validation: tuple[str, ...] = option(
        (),
        group=SPLIT,
        basic=True,
        metavar="FILE",
        help="Validation data, which chooses the best step and stops training early. Repeatable.",
        reads=True,
    )
    test: tuple[str, ...] = option(
        (),
        group=SPLIT,
        metavar="FILE",
        help="Test data, evaluated once at the end. Repeatable.",
        reads=True,
    )
    several_bases: BaseLabels = option(
        "error",
        group=DATA,
        help="For token labels, where a token has several bases: stop, or take the label of the first base.",
    )
    false_negatives: FalseNegativePolicy = option(
        "error",
        group=DATA,
        help="A negative that is the query itself or one of its positives: stop, drop it, or keep it.",
    )
    homologs: HomologPolicy = option(
        "ignore",
        group=SPLIT,
        help="Homologs on both sides of a split: do not check, report them, drop them from the "
        "training rows, or stop.",
    )
    homolog_identity: float = option(
        0.8,
        gt=0,
        le=1,
        group=SPLIT,
        metavar="FRACTION",
        help="Sequence identity from which on sequences count as homologs, estimated from shared k-mers.",
    )

    def _problems(self) -> Iterator[str]:
        if not self.train:
            yield "train is empty; name at least one file to learn from"
        yield from split_problems(self.validation_fraction, self.test_fraction)
        if self.split == "column" and self.split_column is None:
            words = "the column that says train, validation or test"
            yield Problem(
                "split is 'column', but split_column is not given", Remedy("split_column", words=words)
            )
        named = [*self.train, *self.validation, *self.test]
        for name in sorted({name for name in named if named.count(name) > 1}):
            yield f"{name} is named twice among train, validation and test; name each file once"


class ObjectiveConfig(Config):
    """What is learned."""

    task: Task = option(group=TASK, basic=True, help="Task to train for.")
    class_weights: ClassWeights = option(
        "none",
        group=TASK,
        help="Weights of the classes in the loss. balanced: rare classes get larger weights.",
    )
    dropout: float = option(
        0.1,
        ge=0,
        lt=1,
        group=TASK,
        metavar="FRACTION",
        help="Dropout on the input of the prediction heads.",
    )
    label_smoothing: float = option(
        0.0,
        ge=0,
        lt=1,
        group=TASK,
        metavar="FRACTION",
        help="Label smoothing: the fraction of the target that is spread over all classes.",
    )
    contrast: ContrastChoice = option(
        "auto",
        group=PAIRS,
        help="How pairs are formed: from rows with query, pos and neg (examples); from sequences of "
        "one class (labels); or from two views of each sequence (views). auto: by the input.",
    )
    temperature: float | None = option(
        None,
        gt=0,
        group=PAIRS,
        metavar="X",
        shown_default="0.05; with labels 0.1; retrieval 0.02",
        help="Temperature of the contrastive loss. Similarities are divided by it.",
    )
    scope: ScopeChoice = option(
        "auto",
        group=PAIRS,
        help="Pairs to compare: queries with passages (one_way); also passages with queries "
        "(symmetric); or all with all (full). auto: symmetric for views, else one_way.",
    )
    margin: float | None = option(
        None,
        gt=0,
        group=PAIRS,
        metavar="X",
        shown_default="1 for euclidean, 0.3 for cosine",
        help="For triplets: how much farther away the negative must be than the positive.",
    )
    distance: Distance = option(
        "euclidean", group=PAIRS, help="For triplets: distance between two vectors in the loss."
    )
    train_group_size: int = option(
        8,
        ge=1,
        group=PAIRS,
        metavar="N",
        help="Passages per query: 1 positive and N - 1 negatives, sampled anew in each epoch.",
    )
    in_batch_negatives: bool = option(
        True, group=PAIRS, help="Use the passages of other queries in the batch as negatives."
    )
    across_devices: bool = option(
        False, group=PAIRS, help="Use the passages on other devices as negatives, too."
    )
    view_mutation_rate: float = option(
        0.05,
        ge=0,
        le=1,
        group=PAIRS,
        metavar="FRACTION",
        help="For views: probability that a base of the second view is replaced by another.",
    )
    view_crop_fraction: float = option(
        0.8,
        gt=0,
        le=1,
        group=PAIRS,
        metavar="FRACTION",
        help="For views: the second view keeps at least this fraction of the sequence.",
    )
    view_reverse_complement: float = option(
        0.5,
        ge=0,
        le=1,
        group=PAIRS,
        metavar="FRACTION",
        help="For views: probability that the second view is the reverse complement.",
    )
    mode: M3Mode = option(
        "all",
        group=RETRIEVAL,
        help="What to train: the encoder and all heads (all); only the sparse and multi-vector heads "
        "(fix_encoder); or the dense vector without other heads (dense).",
    )
    self_distillation_start: int | None = option(
        None,
        ge=-1,
        group=RETRIEVAL,
        metavar="N",
        shown_default="never",
        help="Forward passes before self-distillation starts, in which the summed scores of all heads "
        "teach each head. -1: from the start.",
    )
    distillation: Distillation = option(
        "m3", group=RETRIEVAL, help="How to use teacher scores: as in BGE-M3 (m3), or by KL divergence (kl)."
    )
    term_bases: int = option(
        9,
        ge=1,
        unit="bases",
        group=RETRIEVAL,
        metavar="BASES",
        shown_default="9, or as MODEL was trained",
        help="Length of the k-mers that are the terms of the sparse head.",
    )
    vector_width: int | None = option(
        None,
        ge=1,
        group=RETRIEVAL,
        metavar="N",
        shown_default="the hidden size, or as MODEL was trained",
        help="Width of the vectors of the multi-vector head.",
    )
    vector_window: int = option(
        8,
        ge=1,
        unit="tokens",
        group=RETRIEVAL,
        metavar="TOKENS",
        shown_default="8, or as MODEL was trained",
        help="Number of tokens averaged into one vector of the multi-vector head.",
    )

    def _problems(self) -> Iterator[str]:
        if self.contrast == "views" and self.task == "triplet":
            yield Problem(
                "contrast 'views' has no negatives of its own for triplets", Remedy("task", "contrastive")
            )


class FinetuneRecipe(ScheduleConfig):
    """How long and how fast to train."""

    max_epochs: int | None = option(
        None,
        ge=1,
        group=OPTIMIZATION,
        basic=True,
        metavar="N",
        shown_default="20, 10 or 3, depending on the number of rows",
        help="Number of passes over the training data.",
    )
    max_steps: int | None = option(
        None,
        ge=1,
        group=OPTIMIZATION,
        metavar="N",
        help="Number of optimizer steps. Instead of --max-epochs.",
    )
    rows_per_device: int = option(
        16,
        ge=1,
        group=OPTIMIZATION,
        basic=True,
        metavar="N",
        help="Rows per batch on each device. For retrieval, a row is a query.",
    )
    micro_batch: int | None = option(
        None,
        ge=1,
        group=OPTIMIZATION,
        metavar="N",
        help="For pairs: rows encoded at a time. This saves memory; the gradient is still that of the "
        "whole batch.",
    )
    learning_rate: float | None = option(
        None,
        gt=0,
        group=OPTIMIZATION,
        basic=True,
        metavar="RATE",
        shown_default="depends on --tuning and width",
        help="Peak learning rate. The heads have their own.",
    )
    head_learning_rate: float | None = option(
        None,
        gt=0,
        group=OPTIMIZATION,
        metavar="RATE",
        shown_default="1e-3, or the encoder's if higher",
        help="Peak learning rate of the heads.",
    )
    weight_decay: float = option(
        0.01, ge=0, group=OPTIMIZATION, metavar="X", help="Weight decay of matrices. Vectors have none."
    )
    metric: str | None = option(
        None,
        group=OPTIMIZATION,
        metavar="NAME",
        shown_default="the first metric of the task",
        help="Validation metric that chooses the best step and stops training early, such as mcc or auroc.",
    )
    patience: int = option(
        3,
        ge=1,
        group=OPTIMIZATION,
        metavar="N",
        help="Stop after this many evaluations without improvement.",
    )
    min_epochs: int = option(
        1, ge=0, group=OPTIMIZATION, metavar="N", help="Number of epochs before training may stop early."
    )
    eval_steps: int | None = option(
        None,
        ge=1,
        group=RUN,
        metavar="N",
        shown_default="one epoch",
        help="Optimizer steps between two evaluations. Each saves a checkpoint.",
    )
    pad_to_multiple_of: int = option(
        1, ge=1, group=OPTIMIZATION, metavar="N", help="Pad rows to a multiple of this many tokens."
    )
    mixed_lengths: bool = option(
        False, group=OPTIMIZATION, help="Form batches of random rows instead of rows of similar length."
    )
    seed: int = option(
        0,
        ge=0,
        group=OPTIMIZATION,
        metavar="N",
        help="Random seed. It determines splits, order, views, negatives, dropout and new weights.",
    )

    def _problems(self) -> Iterator[str]:
        if self.max_epochs is not None and self.min_epochs > max(self.max_epochs, 1):
            remedy = Remedy("min_epochs", words=f"at most max_epochs, which is {self.max_epochs}")
            yield Problem(f"min_epochs is {self.min_epochs}", remedy)
        yield from super()._problems()
        if self.learning_rate is not None and self.min_learning_rate > self.learning_rate:
            remedy = Remedy("min_learning_rate", words=f"at most learning_rate, {self.learning_rate:g}")
            yield Problem(f"min_learning_rate is {self.min_learning_rate:g}", remedy)


class FinetuneConfig(Config):
    """One fine-tuning run."""

    objective: ObjectiveConfig
    data: FinetuneDataConfig
    encoder: EncoderConfig = EncoderConfig()
    augment: AugmentConfig = AugmentConfig()
    recipe: FinetuneRecipe = FinetuneRecipe()

    def _problems(self) -> Iterator[str]:
        task, tuning = self.objective.task, self.encoder.tuning
        if self.recipe.metric not in (None, *TASK_METRICS[task]):
            remedy = Remedy("metric", words=f"one of {', '.join(TASK_METRICS[task])}")
            yield Problem(f"metric is {self.recipe.metric!r}", remedy)
        yield from self.misplaced()
        data = self.data
        if not (data.validation or data.validation_fraction or data.split == "column"):
            for key in ("metric", "patience", "min_epochs"):
                # the first metric of the task is filled in where none is given
                usual = (FinetuneRecipe.options()[key].default, TASK_METRICS[task][0])
                if getattr(self.recipe, key) not in usual:
                    remedy = Remedy("validation", words="files, or validation_fraction above 0")
                    yield Problem(
                        f"{key} is for validation rows, but there are none", remedy, f", or leave {key} out"
                    )
        if tuning == "frozen" and task in ("lm", "retrieval"):
            remedy = Remedy("mode", "fix_encoder") if task == "retrieval" else Remedy("tuning", "lora")
            yield Problem(f"tuning is 'frozen', but task is {task!r}", remedy)
        if tuning == "frozen" and task in ("contrastive", "triplet") and self.encoder.add_pooler is False:
            yield Problem(
                f"tuning is 'frozen' and task is {task!r}: nothing would learn",
                Remedy("add_pooler", True),
                ", or tuning to 'full', 'last_n' or 'lora'",
            )
        if tuning == "frozen" and self.recipe.gradient_checkpointing:
            remedy = Remedy("gradient_checkpointing", False)
            yield Problem("tuning is 'frozen', so there is no backward pass to save memory in", remedy)
        several = len(self.encoder.layers) > 1
        if task == "retrieval" and several and "max" in (self.encoder.fusion, self.encoder.pooling):
            yield (
                "retrieval fuses layers before it pools them, which 'max' would tell; set fusion and pooling "
                "to others, or take one layer"
            )

    def misplaced(self, contrast: str | None = None) -> Iterator[str]:
        """Say which options are set that the task ignores; ``contrast`` is what ``auto`` came to be."""
        objective = self.objective
        task = objective.task
        way: str | None = None
        if task == "retrieval":
            way = objective.mode
        elif task in ("contrastive", "triplet"):
            way = contrast or (None if objective.contrast == "auto" else objective.contrast)
        sections = [getattr(self, name) for name in type(self).sections()]
        for section in sections:
            for key, described in type(section).own_options().items():
                if getattr(section, key) == described.default or applies(key, task, way):
                    continue
                yield misplaced(key, task, way)


class FinetuneOptions(FinetuneConfig):
    """A fine-tuning run and its folder: what the command line and a file may say."""

    folder: RunFolderConfig


FINETUNE_STAGE = {
    key: name for name, section in FinetuneConfig.sections().items() for key in section.options()
}
"""The stage that each flat key belongs to."""


def finetune_config(
    options: Mapping[str, object], *, file: str | PathLike[str] | None = None
) -> FinetuneConfig:
    """Build a configuration from flat keys and a file that holds what they leave out.

    Example:
        >>> config = finetune_config({"task": "classification", "train": ("promoters.tsv",)})
        >>> config.encoder.layers, config.recipe.patience
        (('final',), 3)
    """
    return FinetuneConfig.build(options, file=file)
