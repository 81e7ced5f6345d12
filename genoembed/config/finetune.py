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
from genoembed.config.embed import DEFAULT_MODEL, PolicyConfig
from genoembed.config.fields import Config, option
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
    *("Task", "Model and vectors", "What learns", "Pairs and triplets", "Retrieval heads"),
)


class EncoderConfig(Config):
    """Which model, what is taken from it, and what of it learns."""

    model: str = option(
        DEFAULT_MODEL,
        group=ENCODER,
        basic=True,
        metavar="NAME",
        help="A name from 'genoembed models', a local folder, or a Hugging Face id.",
        reads="if there",
    )
    revision: str | None = option(
        None, group=ENCODER, metavar="REV", help="Branch, tag or commit of a Hugging Face repository."
    )
    trust_remote_code: bool = option(
        False, group=ENCODER, help="Run the Python code that the model's repository contains. Read it first."
    )
    layers: tuple[str, ...] = option(
        ("final",),
        group=ENCODER,
        basic=True,
        flag="--layer",
        metavar="SPEC",
        shown_default="final, or as MODEL was trained",
        help="Cut the model at this layer; blocks after it never run. Repeat it for several, which are "
        "fused. "
        "Specified as for extract.",
    )
    pooling: TokenPooling = option(
        "mean",
        group=ENCODER,
        basic=True,
        flag="--pool",
        shown_default="mean, or as MODEL was trained",
        help="How the tokens of a sequence become one vector.",
    )
    skip_first: int = option(
        0,
        ge=0,
        unit="bases",
        group=ENCODER,
        metavar="BASES",
        shown_default="0, or as MODEL was trained",
        help="Leave the first bases that the model reads out of pooling.",
    )
    fusion: Fusion = option(
        "none",
        group=ENCODER,
        flag="--fuse",
        shown_default="none, or as MODEL was trained",
        help="How several layers become one vector; the weights of weighted are learned.",
    )
    add_pooler: bool | None = option(
        None,
        group=ENCODER,
        shown_default="as MODEL was trained",
        help="Put a linear projection, which starts as the identity, after the pooling.",
    )
    normalize: bool | None = option(
        None,
        group=ENCODER,
        shown_default="as MODEL was trained; else unless triplets are euclidean",
        help="Scale vectors to length 1.",
    )
    tuning: Tuning | None = option(
        None,
        group=TUNING,
        basic=True,
        shown_default="full; lora for models of a billion parameters and more",
        help="What learns: all weights; the heads alone; the last blocks before the cut; or LoRA adapters.",
    )
    last_n: int = option(
        2,
        ge=1,
        group=TUNING,
        metavar="N",
        help="For --tuning last_n: blocks that learn, counted back from the cut.",
    )
    lora_rank: int = option(
        8, ge=1, group=TUNING, metavar="N", help="For --tuning lora: rank of the adapter matrices."
    )
    lora_alpha: float = option(
        16.0,
        gt=0,
        group=TUNING,
        metavar="X",
        help="For --tuning lora: the adapters' output is multiplied by this number divided by the rank.",
    )
    lora_dropout: float = option(
        0.0,
        ge=0,
        lt=1,
        group=TUNING,
        metavar="SHARE",
        help="For --tuning lora: share of the adapters' input that is dropped.",
    )
    lora_targets: tuple[str, ...] = option(
        (),
        group=TUNING,
        flag="--lora-target",
        metavar="NAME",
        shown_default="all in the blocks",
        help="For --tuning lora: linear layers that get adapters, by the end of their path. Repeatable.",
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
        help="Files to learn from: tables, sequence files, or JSON lines with query, pos and neg.",
        reads=True,
    )
    labels: str | None = option(
        None,
        group=DATA,
        basic=True,
        metavar="FILE",
        help="Table from id to label, for sequence files.",
        reads=True,
    )
    validation: tuple[str, ...] = option(
        (),
        group=SPLIT,
        basic=True,
        metavar="FILE",
        help="Files that stop training and choose the best step. Repeatable.",
        reads=True,
    )
    test: tuple[str, ...] = option(
        (),
        group=SPLIT,
        metavar="FILE",
        help="Files that are evaluated once, at the end. Repeatable.",
        reads=True,
    )
    several_bases: BaseLabels = option(
        "error",
        group=DATA,
        help="For token, where a token has several bases: stop, or take the label of the first.",
    )
    false_negatives: FalseNegativePolicy = option(
        "error",
        group=DATA,
        help="A negative of a retrieval example that is its own query or positive: stop, drop it, or "
        "keep it.",
    )
    homologs: HomologPolicy = option(
        "ignore",
        group=SPLIT,
        help="Homologs on both sides of a split: do not look, report them, drop them from training, or stop.",
    )
    homolog_identity: float = option(
        0.8,
        gt=0,
        le=1,
        group=SPLIT,
        metavar="SHARE",
        help="Sequences count as homologs from this sequence identity on, estimated from shared k-mers.",
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

    task: Task = option(group=TASK, basic=True, help="What to learn.")
    class_weights: ClassWeights = option(
        "none", group=TASK, help="balanced weighs classes by how rare they are."
    )
    dropout: float = option(
        0.1,
        ge=0,
        lt=1,
        group=TASK,
        metavar="SHARE",
        help="Share of a prediction head's input that is dropped in training.",
    )
    label_smoothing: float = option(
        0.0,
        ge=0,
        lt=1,
        group=TASK,
        metavar="SHARE",
        help="Share of the target that is spread over all classes.",
    )
    contrast: ContrastChoice = option(
        "auto",
        group=PAIRS,
        help="Where pairs come from: rows with query, pos and neg; sequences of one class; or two views of "
        "each sequence. auto decides by the input.",
    )
    temperature: float | None = option(
        None,
        gt=0,
        group=PAIRS,
        metavar="X",
        shown_default="0.05; with labels 0.1; retrieval 0.02",
        help="Similarity scores are divided by it: lower is stricter.",
    )
    scope: ScopeChoice = option(
        "auto",
        group=PAIRS,
        help="What is compared: queries with passages; also passages with queries; or all with all. auto is "
        "one_way, and symmetric for views.",
    )
    margin: float | None = option(
        None,
        gt=0,
        group=PAIRS,
        metavar="X",
        shown_default="1 for euclidean, 0.3 for cosine",
        help="For triplets: how much farther the negative must be than the positive.",
    )
    distance: Distance = option(
        "euclidean", group=PAIRS, help="For triplets: the distance between two vectors that the loss uses."
    )
    train_group_size: int = option(
        8,
        ge=1,
        group=PAIRS,
        metavar="N",
        help="Passages per query: 1 positive and N - 1 negatives, drawn afresh in each epoch.",
    )
    in_batch_negatives: bool = option(
        True, group=PAIRS, help="Use the passages of other queries in the batch as negatives."
    )
    across_devices: bool = option(
        False, group=PAIRS, help="Use the passages of other devices as negatives as well."
    )
    view_mutation_rate: float = option(
        0.05,
        ge=0,
        le=1,
        group=PAIRS,
        metavar="SHARE",
        help="For views: probability that a base of the second view is replaced.",
    )
    view_crop_fraction: float = option(
        0.8,
        gt=0,
        le=1,
        group=PAIRS,
        metavar="SHARE",
        help="For views: the second view is a crop of at least this share.",
    )
    view_reverse_complement: float = option(
        0.5,
        ge=0,
        le=1,
        group=PAIRS,
        metavar="SHARE",
        help="For views: probability that the second view is the other strand.",
    )
    mode: M3Mode = option(
        "all",
        group=RETRIEVAL,
        help="all trains encoder and all heads; fix_encoder the sparse and multi-vector heads alone; "
        "dense the "
        "dense vector alone.",
    )
    self_distillation_start: int | None = option(
        None,
        ge=-1,
        group=RETRIEVAL,
        metavar="N",
        shown_default="never",
        help="Forward passes before the sum of all heads' scores teaches each head; -1 is from the start.",
    )
    distillation: Distillation = option(
        "m3", group=RETRIEVAL, help="How teacher scores of the rows are used: as in BGE-M3, or KL divergence."
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
        help="Tokens that are averaged to one vector of the multi-vector head.",
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
        shown_default="20, 10 or 3, by the number of rows",
        help="Passes over the data.",
    )
    max_steps: int | None = option(
        None, ge=1, group=OPTIMIZATION, metavar="N", help="Optimizer steps; counts instead of epochs."
    )
    rows_per_device: int = option(
        16,
        ge=1,
        group=OPTIMIZATION,
        basic=True,
        metavar="N",
        help="Rows (queries) of a batch on each device.",
    )
    micro_batch: int | None = option(
        None,
        ge=1,
        group=OPTIMIZATION,
        metavar="N",
        help="For pairs: rows encoded at a time, to save memory; the gradient is that of the whole batch.",
    )
    learning_rate: float | None = option(
        None,
        gt=0,
        group=OPTIMIZATION,
        basic=True,
        metavar="RATE",
        shown_default="by tuning and width",
        help="Peak learning rate of the encoder.",
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
        0.01, ge=0, group=OPTIMIZATION, metavar="X", help="Weight decay of matrices; vectors have none."
    )
    metric: str | None = option(
        None,
        group=OPTIMIZATION,
        metavar="NAME",
        shown_default="the task's first",
        help="Validation metric that chooses the best step and stops training, such as mcc or auroc.",
    )
    patience: int = option(
        3,
        ge=1,
        group=OPTIMIZATION,
        metavar="N",
        help="Stop after this many evaluations without a better metric.",
    )
    min_epochs: int = option(
        1, ge=0, group=OPTIMIZATION, metavar="N", help="Do not stop for lack of progress before this epoch."
    )
    eval_steps: int | None = option(
        None,
        ge=1,
        group=RUN,
        metavar="N",
        shown_default="one epoch",
        help="Optimizer steps between evaluations and checkpoints.",
    )
    pad_to_multiple_of: int = option(
        1, ge=1, group=OPTIMIZATION, metavar="N", help="Pad rows to a multiple of this many tokens."
    )
    mixed_lengths: bool = option(
        False, group=OPTIMIZATION, help="Make batches of random rows instead of rows of similar length."
    )
    seed: int = option(
        0,
        ge=0,
        group=OPTIMIZATION,
        metavar="N",
        help="Random seed of splits, order, views, negatives, dropout and new weights.",
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
            for key in ("patience", "min_epochs"):
                if getattr(self.recipe, key) != FinetuneRecipe.options()[key].default:
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
