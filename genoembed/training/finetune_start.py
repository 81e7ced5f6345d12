"""What a fine-tuning run is made of: the model of its task, rows, batches and measures, by config.

In: a :class:`~genoembed.training.finetune_config.FinetuneConfig`. Out: a :class:`TaskSetup`. Everything
that can be refused is refused here, before the first step.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from genoembed.contracts import EncodedSequence
from genoembed.errors import ConfigError, SequenceLengthError
from genoembed.models.adapters import context_length
from genoembed.models.load import load_model, without_progress_bars
from genoembed.tokenization.hf import build_encoder
from genoembed.training.augment import AugmentConfig, Augmented
from genoembed.training.batches import (
    GroupCollator,
    GroupDataset,
    LabelEncoder,
    RowDataset,
    ViewCollator,
    ViewDataset,
    check_lengths,
)
from genoembed.training.collate import PaddedCollator
from genoembed.training.contrastive import ContrastiveConfig
from genoembed.training.encode import EncodedExample
from genoembed.training.encoder import Encoder
from genoembed.training.evaluation import (
    CausalMeasure,
    ExampleMeasure,
    LabelMeasure,
    PredictionMeasure,
    ViewMeasure,
    check_measurable,
)
from genoembed.training.finetune_data import find_contrast, label_kind, read_example_sides, read_sides
from genoembed.training.heads import RegressionHead
from genoembed.training.kmer_terms import KmerTerms
from genoembed.training.labels import LabelSpace
from genoembed.training.m3 import M3Loss, M3LossConfig
from genoembed.training.negatives import GroupSampler
from genoembed.training.retrieval_heads import M3Heads, M3HeadsConfig
from genoembed.training.run_config import StartConfig
from genoembed.training.saved_model import new_head
from genoembed.training.start import build_start
from genoembed.training.task_models import (
    CausalModel,
    ContrastModel,
    PredictionModel,
    RetrievalModel,
    VectorHead,
)
from genoembed.training.tuning import set_up_tuning
from genoembed.training.windowed import WindowedRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from genoembed.models.genomic_model import GenomicModel
    from genoembed.tokenization.hf import SequenceEncoder
    from genoembed.training.batches import EpochDataset
    from genoembed.training.contrastive import ContrastScope
    from genoembed.training.evaluation import Measure
    from genoembed.training.finetune_config import Contrast, FinetuneConfig, ScopeChoice
    from genoembed.training.finetune_data import Sides
    from genoembed.training.labelled import LabelledSequence
    from genoembed.training.start import Start

logger = logging.getLogger(__name__)

TaskModel: TypeAlias = "PredictionModel | CausalModel | ContrastModel | RetrievalModel"

_COSINE_MARGIN, _EUCLIDEAN_MARGIN = 0.3, 1.0


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


def set_up_task(config: FinetuneConfig) -> TaskSetup:
    """Read rows, load and build the model, and put together what a trainer needs.

    Args:
        config: What is asked for.

    Returns:
        All of it.

    Raises:
        ConfigError: If options do not go together, or with the data.
        GenoembedError: If data or model fail.
    """
    task = config.objective.task
    if task == "lm":
        return _causal(config)
    if task in ("contrastive", "triplet", "retrieval"):
        contrast = find_contrast(config)
        if contrast == "examples":
            return _examples(config)
        if config.objective.task == "triplet" and contrast == "views":
            message = "task 'triplet' needs labels or examples; give labels, or set task to 'contrastive'"
            raise ConfigError(message)
        return _contrast(config, contrast)
    return _prediction(config)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Base:
    """A loaded model, cut and set up to learn."""

    genomic: GenomicModel
    encoder: Encoder
    tokens: SequenceEncoder
    runner: WindowedRunner

    def collator(self, target: Any, config: FinetuneConfig) -> PaddedCollator:
        """Pad as the model can take it."""
        multiple = 1 if self.encoder.padding == "equal" else config.recipe.pad_to_multiple_of
        return PaddedCollator(
            pad_token_id=self.tokens.pad_token_id, target=target, pad_to_multiple_of=multiple
        )


def _load(config: FinetuneConfig) -> _Base:
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
    return _Base(genomic=genomic, encoder=encoder, tokens=tokens, runner=runner)


def _label_encoder(base: _Base, config: FinetuneConfig, space: LabelSpace | None) -> LabelEncoder:
    return LabelEncoder(
        encoder=base.tokens,
        max_tokens=base.genomic.max_length,
        space=space,
        skip_first=config.encoder.skip_first,
        several_bases=config.data.several_bases,
    )


def _prediction(config: FinetuneConfig) -> TaskSetup:
    objective, kind = config.objective, label_kind(config.objective.task, None)
    sides = read_sides(config, kind=kind)
    labels = [row.label for row in (*sides.train, *sides.validation, *sides.test)]
    space = LabelSpace.of(labels, kind=kind, columns=config.data.label_columns)
    base = _load(config)
    _check(sides.train, base, config)
    weights = None
    if objective.class_weights == "balanced":
        counts = space.counts(row.label for row in sides.train)
        if not counts.all():
            missing = [name for name, count in zip(space.names, counts, strict=True) if not count]
            message = f"class_weights: no row to train on of {', '.join(missing)}; leave class_weights out"
            raise ConfigError(message)
        weights = torch.from_numpy(counts.sum() / (len(counts) * counts)).float()
    head = new_head(
        space,
        base.encoder.width,
        add_pooler=config.encoder.add_pooler,
        dropout=objective.dropout,
        label_smoothing=objective.label_smoothing,
        class_weights=weights,
        seed=config.recipe.seed,
    )
    if isinstance(head, RegressionHead):
        targets = np.stack([space.encode(row.label) for row in sides.train])
        head.fit_targets(torch.from_numpy(targets))
    encode = _label_encoder(base, config, space)
    measures = {
        side: PredictionMeasure(rows=rows, space=space, runner=base.runner)
        for side, rows in (("eval", sides.validation), ("test", sides.test))
        if rows
    }
    return TaskSetup(
        model=PredictionModel(base.encoder, head, per_token=kind == "token"),
        space=space,
        dataset=RowDataset(sides.train, encode, augment=config.augment, seed=config.recipe.seed),
        collate=base.collator("token" if kind == "token" else "sequence", config),
        lengths=[len(row.sequence) for row in sides.train],
        classes=None,
        measures=dict(measures),
        **_facts(base, sides),
    )


def _facts(base: _Base, sides: Sides[Any]) -> dict[str, Any]:
    return {
        "tokenizer": base.genomic.tokenizer,
        "source": base.genomic.location,
        "width": base.encoder.width,
        "digest": sides.digest,
    }


def _check(rows: Sequence[LabelledSequence], base: _Base, config: FinetuneConfig) -> None:
    check_lengths(
        [row.sequence for row in rows],
        base.tokens,
        max_tokens=base.genomic.max_length,
        max_crop_bp=config.augment.max_crop_bp,
    )


def _contrast(config: FinetuneConfig, contrast: Contrast) -> TaskSetup:
    """Pairs from labels, or from two views of each sequence."""
    objective, recipe = config.objective, config.recipe
    kind = label_kind(objective.task, contrast)
    if contrast == "views" and config.data.split == "stratified":
        config = replace(config, data=replace(config.data, split="random"))
    sides = read_sides(config, kind=kind)
    check_measurable(sides.validation, contrast)
    check_measurable(sides.test, contrast)
    base = _load(config)
    _check(sides.train, base, config)
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
    held_out = [(side, held) for side, held in (("eval", sides.validation), ("test", sides.test)) if held]
    if contrast == "labels":
        labels = [row.label for row in (*sides.train, *sides.validation, *sides.test)]
        encode = _label_encoder(base, config, LabelSpace.of(labels, kind="class"))
        dataset, collate = RowDataset(sides.train, encode, augment=config.augment, seed=recipe.seed), rows
        measures |= {side: LabelMeasure(rows=held, runner=base.runner) for side, held in held_out}
    else:
        encode = _label_encoder(base, config, None)
        dataset = ViewDataset(sides.train, encode, augment=config.augment, other=other, seed=recipe.seed)
        collate = ViewCollator(rows=rows)
        measures |= {
            side: ViewMeasure(rows=held, runner=base.runner, other=other, seed=recipe.seed)
            for side, held in held_out
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
        **_facts(base, sides),
    )


def _contrast_model(base: _Base, config: FinetuneConfig, contrast: Contrast) -> ContrastModel:
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


def _examples(config: FinetuneConfig) -> TaskSetup:
    """Pairs, triplets or retrieval from queries with positives and negatives."""
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
    base = _load(config)
    terms = KmerTerms(k=objective.term_bases) if is_retrieval and objective.mode != "dense" else None
    check_lengths(
        [sequence for row in sides.train for sequence in (row.query, *row.pos, *row.neg)],
        base.tokens,
        max_tokens=base.genomic.max_length,
        max_crop_bp=config.augment.max_crop_bp,
    )
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
    heads_need = {"encoder": _label_encoder(base, config, None), "collate": collate} if is_retrieval else {}
    measures: dict[str, Measure[Any]] = {
        side: ExampleMeasure(rows, base.runner, **heads_need)  # type: ignore[arg-type]
        for side, rows in (("eval", sides.validation), ("test", sides.test))
        if rows
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
        **_facts(base, sides),
    )


def _retrieval_model(base: _Base, config: FinetuneConfig) -> RetrievalModel:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _DocumentEncoder:
    """Encodes a sequence and the token that ends it."""

    start: Start
    max_tokens: int | None
    per_base: bool = False

    def __call__(self, view: Augmented, row: LabelledSequence) -> EncodedExample:
        rules = self.start.rules
        ids = np.array([*rules.encode(view.sequence), rules.eod_token_id], dtype=np.int64)
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            problem = (
                f"{len(ids)} tokens with the end token, but the model's context is {self.max_tokens}; set "
                "max_crop_bp to crop, or cut the sequences"
            )
            raise SequenceLengthError(problem, record_id=row.id)
        return EncodedExample(
            encoded=EncodedSequence(input_ids=ids), pool_mask=np.ones(len(ids), dtype=np.bool_)
        )


def _causal(config: FinetuneConfig) -> TaskSetup:
    recipe, wanted = config.recipe, config.encoder
    if config.data.split == "stratified":
        config = replace(config, data=replace(config.data, split="random"))
    sides = read_sides(config, kind="none")
    with without_progress_bars():
        start = build_start(
            StartConfig(
                model=wanted.model, revision=wanted.revision, trust_remote_code=wanted.trust_remote_code
            ),
            window=2,
            seed=recipe.seed,
        )
    max_tokens = context_length(start.model)
    crop = config.augment.max_crop_bp
    encode = _DocumentEncoder(start=start, max_tokens=max_tokens)
    if max_tokens is not None and crop is None:
        longest = max(sides.train, key=lambda row: len(row.sequence))
        encode(Augmented(longest.sequence), longest)
    ids = torch.tensor([[*start.rules.encode(b"ACGT" * 6), start.rules.eod_token_id]])
    tuned = set_up_tuning(
        start.model,
        lambda: start.model(input_ids=ids).logits.float().square().mean(),
        config=wanted,
        seed=recipe.seed,
    )
    measures: dict[str, Measure[Any]] = {
        side: CausalMeasure(
            rows=rows,
            start=start,
            max_tokens=min(filter(None, (max_tokens, crop)), default=None),
            rows_at_once=recipe.rows_per_device,
        )
        for side, rows in (("eval", sides.validation), ("test", sides.test))
        if rows
    }
    return TaskSetup(
        model=CausalModel(start.model, tuned),
        tokenizer=start.tokenizer,
        space=None,
        source=None,
        width=int(getattr(start.model.config, "hidden_size", 0)) or 1,
        dataset=RowDataset(sides.train, encode, augment=config.augment, seed=recipe.seed),
        collate=PaddedCollator(
            pad_token_id=start.rules.pad_token_id,
            target="causal",
            pad_to_multiple_of=recipe.pad_to_multiple_of,
        ),
        lengths=[len(row.sequence) for row in sides.train],
        classes=None,
        measures=measures,
        digest=sides.digest,
    )
