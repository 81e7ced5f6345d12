"""Fine-tuning runs that compare: pairs from labels, from two views of a sequence, or from examples.

In: a :class:`~genoembed.training.finetune_config.FinetuneConfig`. Out: a
:class:`~genoembed.training.task_setup.TaskSetup`. Everything that can be refused is refused here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from genoembed.errors import ConfigError
from genoembed.training.augment import AugmentConfig
from genoembed.training.batches import GroupCollator, ViewCollator
from genoembed.training.contrastive import ContrastiveConfig
from genoembed.training.epoch_rows import GroupDataset, RowDataset, ViewDataset
from genoembed.training.evaluation import ExampleMeasure, LabelMeasure, ViewMeasure, check_measurable
from genoembed.training.finetune_data import label_kind, read_example_sides, read_sides, without_strata
from genoembed.training.kmer_terms import KmerTerms
from genoembed.training.labels import LabelSpace
from genoembed.training.m3 import M3Loss, M3LossConfig
from genoembed.training.negatives import GroupSampler
from genoembed.training.retrieval_heads import M3Heads, M3HeadsConfig
from genoembed.training.task_models import ContrastModel, RetrievalModel, VectorHead
from genoembed.training.task_setup import TaskSetup, load_base

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from genoembed.training.contrastive import ContrastScope
    from genoembed.training.epoch_rows import EpochDataset
    from genoembed.training.evaluation import Measure
    from genoembed.training.finetune_config import FinetuneConfig
    from genoembed.training.finetune_stages import Contrast, ScopeChoice
    from genoembed.training.task_setup import LoadedBase

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
