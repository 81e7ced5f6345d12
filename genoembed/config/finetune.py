"""The stages of a fine-tuning run: encoder, data, objective and recipe, each frozen and checked by itself.

What a fine-tuning run is asked to do: frozen, checked, the same keys for Python, file and command line.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from genoembed.config.choices import (
    BaseLabels,
    ClassWeights,
    ContrastChoice,
    Distance,
    Distillation,
    DuplicatePolicy,
    EmptyPolicy,
    FalseNegativePolicy,
    FindingPolicy,
    Fusion,
    GapPolicy,
    HomologPolicy,
    InvalidPolicy,
    LabelKind,
    M3Mode,
    Schedule,
    ScopeChoice,
    SplitMethod,
    Task,
    TokenPooling,
    TrainDtype,
    Tuning,
)
from genoembed.config.embed import DEFAULT_MODEL, field_problems
from genoembed.config.fields import FlatKeys, raise_all
from genoembed.config.labelled import AugmentConfig, TableColumns

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from os import PathLike


PREDICTION_TASKS = ("classification", "multilabel", "regression", "token")
"""Tasks whose model predicts something of a sequence or of its bases."""
LABEL_KINDS: dict[str, LabelKind] = {
    "classification": "class",
    "multilabel": "multilabel",
    "regression": "regression",
    "token": "token",
    "lm": "none",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """Which model, what is taken from it, and what of it learns."""

    model: str = DEFAULT_MODEL
    """Bundled or registry name, local folder, or Hugging Face id."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face repository."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings."""
    layers: tuple[str, ...] = ("final",)
    """Where the model is cut; several are fused. Blocks after the deepest never run."""
    pooling: TokenPooling = "mean"
    """How tokens become one vector."""
    skip_first: int = 0
    """Bases at the start that pooling leaves out."""
    fusion: Fusion = "none"
    """How several layers become one vector; the weights of ``weighted`` are learned."""
    add_pooler: bool = False
    """Put a linear projection, which starts as the identity, after the pooling."""
    tuning: Tuning = "full"
    """``full``; ``frozen``: heads alone learn; ``last_n`` blocks; ``lora``."""
    last_n: int = 2
    """Blocks that learn with ``last_n``, counted back from the cut."""
    lora_rank: int = 8
    """Rank of the adapters."""
    lora_alpha: float = 16.0
    """Their scale, over the rank."""
    lora_dropout: float = 0.0
    """Share of their input that is dropped."""
    lora_targets: tuple[str, ...] = ()
    """Ends of the paths of linear layers that get adapters; none named: all in the blocks."""

    def __post_init__(self) -> None:
        problems = list(
            field_problems(
                self, at_least={"skip_first": (0, "bases"), "last_n": (1, ""), "lora_rank": (1, "")}
            )
        )
        if not problems:
            problems += self._rule_problems()
        raise_all(problems)

    def _rule_problems(self) -> Iterator[str]:
        if not self.layers:
            yield "layers is empty; name at least one layer, or leave it out for 'final'"
        if not 0 <= self.lora_dropout < 1:
            yield f"lora_dropout is {self.lora_dropout}; set lora_dropout from 0 to below 1"
        if not 0 < self.lora_alpha < math.inf:
            yield f"lora_alpha is {self.lora_alpha}; set lora_alpha above 0"
        if self.lora_targets and self.tuning != "lora":
            yield f"lora_targets are given, but tuning is {self.tuning!r}; set tuning to 'lora'"


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneDataConfig(TableColumns):
    """Which sequences and labels, what is done with rows that are not clean, and how rows are parted."""

    train: tuple[str, ...]
    """Files to learn from; without ``validation`` and ``test``, those are parted off."""
    labels: str | None = None
    """Table from id to label, for sequence files."""
    validation: tuple[str, ...] = ()
    """Files that stop training and choose the best step."""
    test: tuple[str, ...] = ()
    """Files that judge, once, at the end."""
    several_bases: BaseLabels = "error"
    """For ``token``: labels where a token has several bases."""
    invalid: InvalidPolicy = "error"
    """Letters outside IUPAC DNA."""
    duplicates: DuplicatePolicy = "error"
    """Ids that appear twice."""
    empty: EmptyPolicy = "error"
    """Records without bases."""
    gaps: GapPolicy = "error"
    """Gap letters."""
    keep_case: bool = False
    """Leave soft-masked bases in lower case."""
    repeats: FindingPolicy = "keep"
    """Equal sequences with one label."""
    conflicts: FindingPolicy = "keep"
    """Equal sequences with different labels."""
    one_strand: bool = False
    """A sequence and its reverse complement are two, not one."""
    false_negatives: FalseNegativePolicy = "error"
    """A negative of a retrieval example that is its own query or positive."""
    split: SplitMethod = "stratified"
    """How rows are parted where there are no files of their own."""
    validation_fraction: float = 0.1
    """Share of the rows that stops training and chooses the best step."""
    test_fraction: float = 0.1
    """Share of the rows that judges."""
    homologs: HomologPolicy = "ignore"
    """Look for kin across the split, and report (``keep``), ``drop`` them from training, or ``error``."""
    kin_identity: float = 0.8
    """Identity from which sequences are kin."""

    def __post_init__(self) -> None:
        problems = list(field_problems(self))
        if not self.train:
            problems.append("train is empty; name at least one file to learn from")
        if not problems:
            problems += self._rule_problems()
        raise_all(problems)

    def _rule_problems(self) -> Iterator[str]:
        for name in ("validation_fraction", "test_fraction"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                yield f"{name} is {value}; set {name} from 0 to below 1, such as 0.1"
        if self.validation_fraction + self.test_fraction >= 1:
            yield "validation_fraction and test_fraction leave nothing to train on; lower them"
        if not 0 < self.kin_identity <= 1:
            yield f"kin_identity is {self.kin_identity}; set kin_identity above 0, at most 1"
        if self.split == "column" and self.split_column is None:
            yield "split is 'column', but split_column names none; set split_column"
        named = [*self.train, *self.validation, *self.test]
        for name in sorted({name for name in named if named.count(name) > 1}):
            yield f"{name} is named twice among train, validation and test; name each file once"


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What is learned."""

    task: Task
    """What a sequence is trained for."""
    class_weights: ClassWeights = "none"
    """``balanced`` weighs classes by their rarity."""
    dropout: float = 0.1
    """Share of a prediction head's input that is dropped."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    contrast: ContrastChoice = "auto"
    """Where pairs come from: ``examples`` (query, pos, neg), ``labels`` of one class, or two ``views`` of
    each sequence. ``auto`` tells by the input."""
    temperature: float | None = None
    """Scores are divided by it; None takes the loss's own: 0.05, 0.1 with labels, 0.02 for retrieval."""
    scope: ScopeChoice = "auto"
    """What queries are compared with; ``auto``: ``one_way``, and ``symmetric`` for views."""
    margin: float | None = None
    """Of triplets; None: 1 for Euclidean distances, 0.3 for cosine ones."""
    distance: Distance = "euclidean"
    """Of triplets."""
    train_group_size: int = 8
    """Passages of a query: 1 positive and negatives, drawn afresh each epoch."""
    own_negatives_only: bool = False
    """Leave the passages of other queries of the batch out."""
    across_devices: bool = False
    """Use the passages of other devices as negatives."""
    view_mutation_rate: float = 0.05
    """Of the second view: probability that a base is replaced."""
    view_crop_fraction: float = 0.8
    """Of the second view: shortest crop, as a share."""
    view_reverse_complement: float = 0.5
    """Of the second view: probability of the other strand."""
    mode: M3Mode = "all"
    """Retrieval: all heads, ``fix_encoder`` (sparse and multi-vector alone), or ``dense``."""
    self_distillation_start: int | None = None
    """Retrieval: forward passes before the ensemble teaches the heads; -1 at once; None never."""
    distillation: Distillation = "m3"
    """Retrieval: what teacher scores do."""
    term_bases: int = 9
    """Retrieval: bases of a k-mer that is a term of the sparse head."""
    vector_width: int | None = None
    """Retrieval: width of multi-vector vectors; None is the hidden size."""
    vector_window: int = 8
    """Retrieval: tokens averaged to one of them."""

    def __post_init__(self) -> None:
        least = {"train_group_size": (1, ""), "vector_width": (1, ""), "vector_window": (1, "tokens")}
        least |= {"term_bases": (1, "bases"), "self_distillation_start": (-1, "")}
        problems = list(field_problems(self, at_least=least))
        if not problems:
            problems += self._rule_problems()
        raise_all(problems)

    def _rule_problems(self) -> Iterator[str]:
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}; set {name} from 0 to below 1"
        for name in ("temperature", "margin"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                yield f"{name} is {value}; set {name} above 0"
        if self.contrast != "auto" and self.task not in ("contrastive", "triplet"):
            yield f"contrast is for contrastive and triplet, but task is {self.task!r}; leave it out"
        if self.contrast == "views" and self.task == "triplet":
            yield "contrast 'views' has no negatives of its own for triplets; set task to 'contrastive'"
        if self.class_weights == "balanced" and self.task not in ("classification", "token"):
            yield f"class_weights are for classes, but task is {self.task!r}; leave class_weights out"
        AugmentConfig(
            mutation_rate=self.view_mutation_rate,
            crop_fraction=self.view_crop_fraction,
            reverse_complement=self.view_reverse_complement,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneRecipe:
    """How long and how fast to train."""

    max_epochs: int | None = None
    """Passes over the data; None goes by its size: 20, 10 or 3."""
    max_steps: int | None = None
    """Optimizer steps, whatever ``max_epochs`` says."""
    rows_per_device: int = 16
    """Rows (queries) of one batch on each device."""
    accumulation_steps: int = 1
    """Batches a step."""
    micro_batch: int | None = None
    """Contrastive tasks: rows encoded at a time; the gradient is that of the whole batch (GradCache)."""
    learning_rate: float | None = None
    """Peak rate of the encoder; None goes by tuning and width."""
    head_learning_rate: float | None = None
    """Peak rate of heads; None is 1e-3, or the encoder's if that is higher."""
    schedule: Schedule = "cosine"
    """After the warm-up; ``plateau`` halves the rate where the metric stalls."""
    warmup_fraction: float = 0.1
    """Share of the steps with a rising rate; ``plateau`` has none."""
    weight_decay: float = 0.01
    """On matrices."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    metric: str | None = None
    """What stops training and chooses the best step; None is the task's first."""
    patience: int = 3
    """Evaluations without a better metric after which training stops."""
    min_epochs: int = 1
    """Not before so many epochs."""
    eval_steps: int | None = None
    """Steps between evaluations and checkpoints; None is an epoch."""
    logging_steps: int = 10
    """Steps between lines of ``metrics.jsonl``."""
    pad_to_multiple_of: int = 1
    """Padded lengths are multiples of this."""
    mixed_lengths: bool = False
    """Batches of random rows instead of rows of like length."""
    dtype: TrainDtype = "auto"
    """Type of matrix products; weights are float32."""
    seed: int = 0
    """Splits, order, views, negatives, dropout, new weights."""

    def __post_init__(self) -> None:
        counts = ("max_epochs", "max_steps", "rows_per_device", "accumulation_steps", "micro_batch")
        others = ("patience", "eval_steps", "logging_steps", "pad_to_multiple_of")
        least = {name: (1, "") for name in (*counts, *others)} | {"seed": (0, ""), "min_epochs": (0, "")}
        problems = list(field_problems(self, at_least=least))
        if not problems:
            problems += [
                f"{name} is {value}; set {name} above 0"
                for name in ("learning_rate", "head_learning_rate", "max_grad_norm")
                if (value := getattr(self, name)) is not None and not 0 < value < math.inf
            ]
            if not self.weight_decay >= 0:
                problems.append(f"weight_decay is {self.weight_decay}; set weight_decay to 0 or more")
            if not 0 <= self.warmup_fraction < 1:
                problems.append(f"warmup_fraction is {self.warmup_fraction}; set it from 0 to below 1")
        raise_all(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """One fine-tuning run."""

    objective: ObjectiveConfig
    data: FinetuneDataConfig
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    recipe: FinetuneRecipe = field(default_factory=FinetuneRecipe)

    def __post_init__(self) -> None:
        problems = []
        task, tuning = self.objective.task, self.encoder.tuning
        if self.recipe.micro_batch is not None and task not in ("contrastive", "triplet", "retrieval"):
            problems.append(f"micro_batch is for contrastive tasks, but task is {task!r}; leave it out")
        if tuning == "frozen" and task in ("lm", "retrieval"):
            remedy = "mode to 'fix_encoder'" if task == "retrieval" else "tuning to 'lora'"
            problems.append(f"tuning is 'frozen', but task is {task!r}; set {remedy}")
        if tuning == "frozen" and task in ("contrastive", "triplet") and not self.encoder.add_pooler:
            problems.append(
                f"tuning is 'frozen' and task is {task!r}: nothing would learn; set add_pooler to True, or "
                "tuning to 'full', 'last_n' or 'lora'"
            )
        several = len(self.encoder.layers) > 1
        if task == "retrieval" and several and "max" in (self.encoder.fusion, self.encoder.pooling):
            problems.append(
                "retrieval fuses layers before it pools them, which 'max' would tell; set fusion and pooling "
                "to others, or take one layer"
            )
        raise_all(problems)

    def to_dict(self) -> dict[str, dict[str, object]]:
        """Give the configuration as nested dicts that JSON can hold."""
        return asdict(self)

    def to_flat(self) -> dict[str, object]:
        """Give the configuration as a file holds it: flat keys, without those that are None."""
        flat = {key: value for stage in self.to_dict().values() for key, value in stage.items()}
        return {key: value for key, value in flat.items() if value is not None}


def _plain(key: str, value: object) -> object:
    """Let layers be a number, a name or several."""
    if key != "layers" or not isinstance(value, int | str | list | tuple):
        return value
    return tuple(map(str, value if isinstance(value, list | tuple) else (value,)))


_KEYS = FlatKeys(
    "fine-tuning",
    plain=_plain,
    objective=ObjectiveConfig,
    data=FinetuneDataConfig,
    encoder=EncoderConfig,
    augment=AugmentConfig,
    recipe=FinetuneRecipe,
)
FINETUNE_STAGE = _KEYS.stage_of
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
    values, problems = _KEYS.read(options, file=file)
    if "task" not in values:
        problems.append("task is missing; set task to what is to be learned, such as 'classification'")
    needed: dict[str, dict[str, object]] = {"objective": {"task": "classification"}, "data": {"train": ()}}
    return FinetuneConfig(**_KEYS.build(values, problems, needed=needed))
