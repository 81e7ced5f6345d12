"""What a fine-tuning run is ready with before its first step, and the loaded model that it is made around.

In: a :class:`~genoembed.training.finetune_config.FinetuneConfig`. Out: a model that is cut, with the
collator, encoder of rows and runner that fit it; :class:`TaskSetup` is what tasks make of these.

Fine-tuning runs that compare: pairs from labels, from two views of a sequence, or from examples.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from genoembed.config.labelled import AugmentConfig
from genoembed.config.retrieval import ContrastiveConfig, M3HeadsConfig, M3LossConfig
from genoembed.errors import ConfigError
from genoembed.finetuning.collate import GroupCollator, PaddedCollator, ViewCollator
from genoembed.finetuning.evaluation import ExampleMeasure, LabelMeasure, ViewMeasure, check_measurable
from genoembed.finetuning.labels import LabelSpace
from genoembed.finetuning.preparation import label_kind, read_example_sides, read_sides, without_strata
from genoembed.finetuning.rows import GroupDataset, LabelEncoder, RowDataset, ViewDataset, check_lengths
from genoembed.finetuning.sampling import GroupSampler
from genoembed.finetuning.windowed import WindowedRunner
from genoembed.models.load import load_model
from genoembed.retrieval.heads import M3Heads
from genoembed.retrieval.m3 import M3Loss
from genoembed.retrieval.models import ContrastModel, RetrievalModel, VectorHead
from genoembed.retrieval.terms import KmerTerms
from genoembed.tokenization.hf import build_encoder
from genoembed.training.encoder import Encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from genoembed.config.choices import Contrast, ContrastScope, ScopeChoice
    from genoembed.config.finetune import FinetuneConfig
    from genoembed.finetuning.collate import LabelTarget
    from genoembed.finetuning.evaluation import Measure
    from genoembed.finetuning.preparation import Sides
    from genoembed.finetuning.rows import EpochDataset
    from genoembed.finetuning.tasks import CausalModel, PredictionModel
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.tokenization.hf import SequenceEncoder


logger = logging.getLogger(__name__)

TaskModel: TypeAlias = "PredictionModel | CausalModel | ContrastModel | RetrievalModel"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSetup:
    """A run that is ready to begin."""

    model: TaskModel
    tokenizer: PreTrainedTokenizerBase
    space: LabelSpace | None
    """What labels mean, for tasks that predict."""
    source: Path | None
    """Folder of the model that was started from."""
    width: int
    """Hidden size."""
    dataset: EpochDataset
    collate: Callable[[Any], dict[str, Tensor]]
    lengths: Sequence[int]
    """Bases of each row."""
    classes: Sequence[object] | None
    """Classes that batches should hold several rows of."""
    measures: dict[str, Measure[Any]]
    """``eval`` and ``test``, as far as rows are held out."""
    digest: str
    """Of all rows."""
    contrast: Contrast | None = None
    group_sampler: GroupSampler | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedBase:
    """A loaded model, cut and set up to learn, with how its rows are encoded and padded."""

    genomic: GenomicModel
    encoder: Encoder
    tokens: SequenceEncoder
    runner: WindowedRunner

    def collator(self, target: LabelTarget, config: FinetuneConfig) -> PaddedCollator:
        """Pad as the model can take it."""
        multiple = 1 if self.encoder.padding == "equal" else config.recipe.pad_to_multiple_of
        return PaddedCollator(
            pad_token_id=self.tokens.pad_token_id, target=target, pad_to_multiple_of=multiple
        )

    def label_encoder(self, config: FinetuneConfig, space: LabelSpace | None) -> LabelEncoder:
        """Encode rows for the model."""
        return LabelEncoder(
            encoder=self.tokens,
            max_tokens=self.genomic.max_length,
            space=space,
            skip_first=config.encoder.skip_first,
            several_bases=config.data.several_bases,
        )

    def check(self, sequences: Sequence[bytes], config: FinetuneConfig) -> None:
        """Refuse sequences that do not fit the context."""
        check_lengths(
            sequences,
            self.tokens,
            max_tokens=self.genomic.max_length,
            max_crop_bp=config.augment.max_crop_bp,
        )

    def facts(self, sides: Sides[Any]) -> dict[str, Any]:
        """Give the fields of :class:`TaskSetup` that go by model and data alone."""
        return {
            "tokenizer": self.genomic.tokenizer,
            "source": self.genomic.location,
            "width": self.encoder.width,
            "digest": sides.digest,
        }


def load_base(config: FinetuneConfig) -> LoadedBase:
    """Load the model that a run starts from."""
    wanted = config.encoder
    genomic = load_model(
        wanted.model, dtype="float32", trust_remote_code=wanted.trust_remote_code, revision=wanted.revision
    )
    encoder = Encoder(genomic, wanted, seed=config.recipe.seed)
    logger.info("%s: cut at %s, pooling %s", genomic.name, ", ".join(encoder.layers), encoder.pooling)
    tokens = build_encoder(genomic.tokenizer)
    runner = WindowedRunner.of(
        encoder,
        tokens,
        max_tokens=genomic.max_length,
        skip_first=wanted.skip_first,
        rows=config.recipe.rows_per_device,
        pad_to_multiple_of=config.recipe.pad_to_multiple_of,
    )
    return LoadedBase(genomic=genomic, encoder=encoder, tokens=tokens, runner=runner)


_COSINE_MARGIN, _EUCLIDEAN_MARGIN = 0.3, 1.0


def set_up_contrast(config: FinetuneConfig, contrast: Contrast) -> TaskSetup:
    """Learn from labels, or from two views of each sequence."""
    objective, recipe = config.objective, config.recipe
    kind = label_kind(objective.task, contrast)
    sides = read_sides(without_strata(config) if contrast == "views" else config, kind=kind)
    check_measurable(sides.validation, contrast)
    check_measurable(sides.test, contrast)
    base = load_base(config)
    base.check([row.sequence for row in sides.train], config)
    other = AugmentConfig(
        mutation_rate=objective.view_mutation_rate,
        crop_fraction=objective.view_crop_fraction,
        reverse_complement=objective.view_reverse_complement,
        max_crop_bp=config.augment.max_crop_bp,
    )
    rows = base.collator("sequence" if contrast == "labels" else "none", config)
    dataset: EpochDataset
    collate: Callable[[Any], dict[str, Tensor]]
    measures: dict[str, Measure[Any]] = {}
    if contrast == "labels":
        labels = [row.label for row in (*sides.train, *sides.validation, *sides.test)]
        encode = base.label_encoder(config, LabelSpace.of(labels, kind="class"))
        dataset, collate = RowDataset(sides.train, encode, augment=config.augment, seed=recipe.seed), rows
        measures |= {side: LabelMeasure(rows=held, runner=base.runner) for side, held in sides.held_out()}
    else:
        encode = base.label_encoder(config, None)
        dataset = ViewDataset(sides.train, encode, augment=config.augment, other=other, seed=recipe.seed)
        collate = ViewCollator(rows=rows)
        measures |= {
            side: ViewMeasure(rows=held, runner=base.runner, other=other, seed=recipe.seed)
            for side, held in sides.held_out()
        }
    return TaskSetup(
        model=_contrast_model(base, config, contrast),
        space=None,
        dataset=dataset,
        collate=collate,
        lengths=[len(row.sequence) for row in sides.train],
        classes=[row.label for row in sides.train] if contrast == "labels" else None,
        measures=measures,
        contrast=contrast,
        **base.facts(sides),
    )


def _contrast_model(base: LoadedBase, config: FinetuneConfig, contrast: Contrast) -> ContrastModel:
    objective = config.objective
    is_triplet = objective.task == "triplet"
    margin = objective.margin
    if is_triplet and margin is None:
        margin = _COSINE_MARGIN if objective.distance == "cosine" else _EUCLIDEAN_MARGIN
    # normalised vectors cannot be farther apart than 2: a Euclidean margin needs room
    normalise = not (is_triplet and objective.distance == "euclidean")
    head = VectorHead(base.encoder.width, add_pooler=config.encoder.add_pooler, normalise=normalise)
    return ContrastModel(
        base.encoder,
        head,
        contrast=contrast,
        config=ContrastiveConfig(
            temperature=objective.temperature or (0.1 if contrast == "labels" else 0.05),
            scope=_scope(objective.scope, contrast),
            in_batch_negatives=not objective.own_negatives_only,
            across_devices=objective.across_devices,
        ),
        margin=margin if is_triplet else None,
        distance=objective.distance,
    )


def _scope(asked: ScopeChoice, contrast: Contrast) -> ContrastScope:
    if asked != "auto":
        return asked
    return "symmetric" if contrast == "views" else "one_way"


def set_up_examples(config: FinetuneConfig) -> TaskSetup:
    """Learn pairs, triplets or retrieval from queries with positives and negatives."""
    objective, recipe = config.objective, config.recipe
    is_triplet, is_retrieval = objective.task == "triplet", objective.task == "retrieval"
    sides = read_example_sides(config)
    if is_triplet and any(not row.neg for row in sides.train):
        row = next(row for row in sides.train if not row.neg)
        message = f"{row.source}:{row.line}: no neg, but task 'triplet' needs one a row; give each row one"
        raise ConfigError(message)
    sampler = GroupSampler(
        [len(row.pos) for row in sides.train],
        [len(row.neg) for row in sides.train],
        train_group_size=2 if is_triplet else objective.train_group_size,
        seed=recipe.seed,
        in_batch_negatives=not objective.own_negatives_only,
    )
    base = load_base(config)
    terms = KmerTerms(k=objective.term_bases) if is_retrieval and objective.mode != "dense" else None
    base.check([s for row in sides.train for s in (row.query, *row.pos, *row.neg)], config)
    dataset = GroupDataset(
        sides.train,
        sampler,
        encoder=base.tokens,
        max_tokens=base.genomic.max_length,
        skip_first=config.encoder.skip_first,
        augment=config.augment,
        seed=recipe.seed,
    )
    collate = GroupCollator(rows=base.collator("none", config), terms=terms)
    heads_need = {"encoder": base.label_encoder(config, None), "collate": collate} if is_retrieval else {}
    measures: dict[str, Measure[Any]] = {
        side: ExampleMeasure(rows, base.runner, **heads_need)  # type: ignore[arg-type]
        for side, rows in sides.held_out()
    }
    return TaskSetup(
        model=_retrieval_model(base, config) if is_retrieval else _contrast_model(base, config, "examples"),
        space=None,
        dataset=dataset,
        collate=collate,
        lengths=[len(row.query) + max(map(len, row.pos)) for row in sides.train],
        classes=None,
        measures=measures,
        contrast="examples",
        group_sampler=None if is_triplet else sampler,
        **base.facts(sides),
    )


def _retrieval_model(base: LoadedBase, config: FinetuneConfig) -> RetrievalModel:
    objective, encoder = config.objective, config.encoder
    heads = M3Heads(
        base.encoder.width,
        M3HeadsConfig(
            pooling=encoder.pooling,
            add_pooler=encoder.add_pooler,
            vector_width=objective.vector_width,
            vector_window=objective.vector_window,
        ),
        mode=objective.mode,
    )
    loss = M3Loss(
        M3LossConfig(
            temperature=objective.temperature or M3LossConfig().temperature,
            self_distillation_start=objective.self_distillation_start,
            distillation=objective.distillation,
            in_batch_negatives=not objective.own_negatives_only,
            across_devices=objective.across_devices,
        )
    )
    return RetrievalModel(base.encoder, heads, loss)
