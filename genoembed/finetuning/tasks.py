"""What a fine-tuning run is made of before its first step: model, rows, batches and measures of its task.

In: a :class:`~genoembed.config.finetune.FinetuneConfig` and its rows. Out: a :class:`TaskSetup`. Promised:
whatever a model refuses of its rows is refused here, before the first step.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from genoembed.config.labeled import AugmentConfig
from genoembed.config.retrieval import ContrastiveConfig, M3HeadsConfig, M3LossConfig
from genoembed.config.tasks import LABEL_KINDS, PREDICTION_TASKS
from genoembed.finetuning.collate import GroupCollator, PaddedCollator, ViewCollator
from genoembed.finetuning.evaluation import (
    CausalMeasure,
    ExampleMeasure,
    LabelMeasure,
    PredictionMeasure,
    ViewMeasure,
)
from genoembed.finetuning.models import CausalModel, PredictionModel, fit_inputs, new_head
from genoembed.finetuning.rows import (
    DocumentEncoder,
    GroupDataset,
    LabelEncoder,
    RowDataset,
    ViewDataset,
    check_sequences,
)
from genoembed.finetuning.sampling import GroupSampler
from genoembed.finetuning.trained_start import TrainedStart, find_start
from genoembed.models.behavior import context_length
from genoembed.models.load import load_model
from genoembed.retrieval.heads import DenseHead, M3Heads
from genoembed.retrieval.m3 import M3Loss
from genoembed.retrieval.models import ContrastModel, RetrievalModel
from genoembed.retrieval.terms import KmerTerms
from genoembed.tokenization.hf import build_encoder
from genoembed.training.augment import Augmented
from genoembed.training.checkpointing import checkpoint_activations
from genoembed.training.distributed import load_device, num_processes
from genoembed.training.encoder import Encoder
from genoembed.training.heads import RegressionHead
from genoembed.training.inference import SequenceRunner
from genoembed.training.start import load_causal
from genoembed.training.trainer import resolved_dtype
from genoembed.training.tuning import frozen_dtype, set_up_tuning

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from genoembed.config.choices import ComputeDtype, Contrast
    from genoembed.config.finetune import FinetuneConfig
    from genoembed.finetuning.collate import LabelTarget
    from genoembed.finetuning.evaluation import Measure
    from genoembed.finetuning.labels import LabelSpace
    from genoembed.finetuning.preparation import TaskRows
    from genoembed.finetuning.rows import EpochDataset
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.trained_folder import FinetunedFacts
    from genoembed.tokenization.hf import SequenceEncoder


logger = logging.getLogger(__name__)

TaskModel: TypeAlias = PredictionModel | CausalModel | ContrastModel | RetrievalModel

_COSINE_MARGIN, _EUCLIDEAN_MARGIN = 0.3, 1.0
_LABEL_TEMPERATURE, _PAIR_TEMPERATURE = 0.1, 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSetup:
    """A run that is ready to begin."""

    model: TaskModel
    tokenizer: PreTrainedTokenizerBase
    width: int
    """Hidden size."""
    dataset: EpochDataset
    collate: Callable[[Any], dict[str, Tensor]]
    lengths: Sequence[int]
    """Bases of each row."""
    measures: dict[str, Measure[Any]]
    """``eval`` and ``test``, as far as rows are held out."""
    source: Path | None = None
    """Folder of the model that was started from, whose code a saved model needs."""
    space: LabelSpace | None = None
    """What labels mean, for tasks that predict."""
    classes: Sequence[object] | None = None
    """Classes that batches should hold several rows of."""
    contrast: Contrast | None = None
    group_sampler: GroupSampler | None = None
    trained: frozenset[str] = frozenset()
    """Names of the heads' weights that the model came with: they learn as slowly as it does."""


def set_up_task(config: FinetuneConfig, rows: TaskRows, facts: FinetunedFacts | None = None) -> TaskSetup:
    """Load and build the model, and put together what a trainer needs.

    ``facts`` is what the model was trained as; the settings are those of :func:`with_trained_settings`.
    """
    task = config.objective.task
    if task == "lm":
        return _language_model(config, rows)
    if rows.contrast == "examples":
        return _examples(config, rows, facts)
    base = _load_base(config, facts)
    return _prediction(base, rows) if task in PREDICTION_TASKS else _contrast(base, rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Base:
    """A loaded model, cut and set up to learn, with how its rows are encoded and padded."""

    genomic: GenomicModel
    encoder: Encoder
    tokens: SequenceEncoder
    runner: SequenceRunner
    config: FinetuneConfig
    start: TrainedStart

    def collator(self, target: LabelTarget) -> PaddedCollator:
        """Pad as the model can take it."""
        # models whose real positions padding changes get equal lengths, which a multiple would undo
        multiple = 1 if self.encoder.padding == "equal" else self.config.recipe.pad_to_multiple_of
        return PaddedCollator(
            pad_token_id=self.tokens.pad_token_id, target=target, pad_to_multiple_of=multiple
        )

    def label_encoder(self, space: LabelSpace | None = None) -> LabelEncoder:
        """Encode rows, with labels where ``space`` says what they mean."""
        return LabelEncoder(
            encoder=self.tokens,
            max_tokens=self.genomic.max_length,
            space=space,
            skip_first=self.config.encoder.skip_first,
            several_bases=self.config.data.several_bases,
        )

    def check(self, sequences: Sequence[bytes]) -> None:
        """Raise if a sequence does not fit the context."""
        crop = self.config.augment.max_crop_bp
        check_sequences(sequences, self.tokens, max_tokens=self.genomic.max_length, max_crop_bp=crop)

    def facts(self) -> dict[str, Any]:
        """Return the fields of :class:`TaskSetup` that depend on the model alone."""
        return {
            "tokenizer": self.genomic.tokenizer,
            "source": self.genomic.location,
            "width": self.encoder.width,
        }


def _load_base(config: FinetuneConfig, facts: FinetunedFacts | None) -> _Base:
    """Load the model that a run starts from."""
    start = config.encoder
    # what learns is float32 whatever the run's dtype: autocast computes in it, the optimizer must not
    genomic = load_model(
        start.model,
        device=load_device(config.recipe.distributed),
        dtype=_weights_dtype(config),
        trust_remote_code=start.trust_remote_code,
        revision=start.revision,
    )
    trained = find_start(facts, genomic, config)
    encoder = Encoder(genomic, start, seed=config.recipe.seed, fusion_weights=trained.fusion_weights)
    if config.recipe.gradient_checkpointing:
        checkpoint_activations(encoder.backbone, captured=encoder.layers)
    logger.info("%s: cut at %s, pooling %s", genomic.name, ", ".join(encoder.layers), encoder.pooling)
    tokens = build_encoder(genomic.tokenizer, add_special_tokens=genomic.special_tokens)
    runner = SequenceRunner(
        encoder,
        tokens,
        max_tokens=genomic.max_length,
        skip_first=start.skip_first,
        max_rows=config.recipe.rows_per_device,
        keeps_nan=True,  # a loss that diverges is the trainer's to report
    )
    return _Base(genomic=genomic, encoder=encoder, tokens=tokens, runner=runner, config=config, start=trained)


def _weights_dtype(config: FinetuneConfig) -> ComputeDtype:
    return frozen_dtype(config.encoder.tuning, resolved_dtype(config.recipe.dtype))


def _prediction(base: _Base, rows: TaskRows) -> TaskSetup:
    config = base.config
    objective, kind = config.objective, LABEL_KINDS[config.objective.task]
    sides, space = rows.sides, rows.space
    assert space is not None, "rows that are predicted have labels"
    base.check([row.sequence for row in sides.train])
    weights = None
    if objective.class_weights == "balanced":
        # inverse to the share of the class, with a mean of 1 over rows: "balanced" as in scikit-learn
        counts = space.counts(row.label for row in sides.train)
        weights = torch.from_numpy(counts.sum() / (len(counts) * counts)).float()
    head = new_head(
        space,
        base.encoder.width if kind == "token" else base.encoder.pooled_width,
        add_pooler=bool(config.encoder.add_pooler),  # one of its own, on standard units
        dropout=objective.dropout,
        label_smoothing=objective.label_smoothing,
        class_weights=weights,
        seed=config.recipe.seed,
    )
    if isinstance(head, RegressionHead):
        # of training rows alone: a scale fitted on held-out rows would leak what they hold
        targets = np.stack([space.encode(row.label) for row in sides.train])
        head.fit_targets(torch.from_numpy(targets))
    measures: dict[str, Measure[Any]] = {
        side: PredictionMeasure(rows=held, space=space, runner=base.runner) for side, held in sides.held_out()
    }
    model = PredictionModel(base.encoder, head, per_token=kind == "token")
    fit_inputs(model, base.runner, [row.sequence for row in sides.train])
    return TaskSetup(
        model=model,
        space=space,
        dataset=RowDataset(
            rows=sides.train,
            encode=base.label_encoder(space),
            augment=config.augment,
            seed=config.recipe.seed,
            per_base=kind == "token",
        ),
        collate=base.collator("token" if kind == "token" else "sequence"),
        lengths=[len(row.sequence) for row in sides.train],
        measures=measures,
        **base.facts(),
    )


def _contrast(base: _Base, found: TaskRows) -> TaskSetup:
    """Learn from labels, or from two views of each sequence."""
    config = base.config
    objective, recipe = config.objective, config.recipe
    sides, contrast = found.sides, found.contrast
    assert contrast is not None, "the rows say what is compared"
    base.check([row.sequence for row in sides.train])
    other = AugmentConfig(
        mutation_rate=objective.view_mutation_rate,
        crop_fraction=objective.view_crop_fraction,
        reverse_complement=objective.view_reverse_complement,
        max_crop_bp=config.augment.max_crop_bp,
    )
    rows = base.collator("sequence" if contrast == "labels" else "none")
    own: dict[str, Any] = {"rows": sides.train, "augment": config.augment, "seed": recipe.seed}
    dataset: EpochDataset
    collate: Callable[[Any], dict[str, Tensor]]
    measures: dict[str, Measure[Any]] = {}
    if contrast == "labels":
        dataset, collate = RowDataset(**own, encode=base.label_encoder(found.space)), rows
        measures |= {
            side: LabelMeasure(rows=held, runner=base.runner, batch_rows=_rows_compared(config))
            for side, held in sides.held_out()
        }
    else:
        dataset = ViewDataset(**own, encode=base.label_encoder(), other=other)
        collate = ViewCollator(rows=rows)
        measures |= {
            side: ViewMeasure(
                rows=held,
                runner=base.runner,
                other=other,
                seed=recipe.seed,
                batch_rows=_rows_compared(config),
            )
            for side, held in sides.held_out()
        }
    model = _contrast_model(base, contrast)
    return TaskSetup(
        model=model,
        trained=base.start.load_heads(model),
        dataset=dataset,
        collate=collate,
        lengths=[len(row.sequence) for row in sides.train],
        classes=[row.label for row in sides.train] if contrast == "labels" else None,
        measures=measures,
        contrast=contrast,
        **base.facts(),
    )


def _rows_compared(config: FinetuneConfig) -> int:
    """Count the rows that a step compares, on all devices where they share theirs."""
    return config.recipe.rows_per_device * (num_processes() if config.objective.across_devices else 1)


def _contrast_model(base: _Base, contrast: Contrast) -> ContrastModel:
    objective = base.config.objective
    is_triplet = objective.task == "triplet"
    margin = objective.margin
    if is_triplet and margin is None:
        margin = _COSINE_MARGIN if objective.distance == "cosine" else _EUCLIDEAN_MARGIN
    scope = objective.scope
    if scope == "auto":
        # two views are alike in kind, so either may be the query; queries and passages are not
        scope = "symmetric" if contrast == "views" else "one_way"
    # normalized vectors cannot be farther apart than 2: a Euclidean margin needs room
    normalize = base.start.normalizes(usual=not (is_triplet and objective.distance == "euclidean"))
    head = DenseHead(base.encoder.pooled_width, add_pooler=base.start.add_pooler, normalize=normalize)
    return ContrastModel(
        base.encoder,
        head,
        contrast=contrast,
        config=ContrastiveConfig(
            temperature=objective.temperature
            or (_LABEL_TEMPERATURE if contrast == "labels" else _PAIR_TEMPERATURE),
            scope=scope,
            in_batch_negatives=objective.in_batch_negatives,
            across_devices=objective.across_devices,
        ),
        margin=margin if is_triplet else None,
        distance=objective.distance,
    )


def _examples(config: FinetuneConfig, found: TaskRows, facts: FinetunedFacts | None) -> TaskSetup:
    """Learn pairs, triplets or retrieval from queries with positives and negatives."""
    objective, recipe, sides = config.objective, config.recipe, found.sides
    is_triplet, is_retrieval = objective.task == "triplet", objective.task == "retrieval"
    sampler = GroupSampler(
        [len(row.pos) for row in sides.train],
        [len(row.neg) for row in sides.train],
        train_group_size=2 if is_triplet else objective.train_group_size,
        seed=recipe.seed,
        in_batch_negatives=objective.in_batch_negatives,
    )
    base = _load_base(config, facts)  # after what may refuse the rows
    terms = KmerTerms(k=objective.term_bases) if is_retrieval and objective.mode != "dense" else None
    base.check([s for row in sides.train for s in (row.query, *row.pos, *row.neg)])
    encoder, collate = base.label_encoder(), GroupCollator(rows=base.collator("none"), terms=terms)
    measured: dict[str, Any] = {"batch_rows": _rows_compared(config), "group_size": sampler.group_size}
    measured |= {"encoder": encoder, "collate": collate} if is_retrieval else {}
    measures: dict[str, Measure[Any]] = {
        side: ExampleMeasure(rows, base.runner, **measured) for side, rows in sides.held_out()
    }
    model = _retrieval_model(base) if is_retrieval else _contrast_model(base, "examples")
    return TaskSetup(
        model=model,
        trained=base.start.load_heads(model),
        dataset=GroupDataset(
            rows=sides.train, sampler=sampler, encoder=encoder, augment=config.augment, seed=recipe.seed
        ),
        collate=collate,
        lengths=[len(row.query) + max(map(len, row.pos)) for row in sides.train],
        measures=measures,
        contrast="examples",
        group_sampler=None if is_triplet else sampler,
        **base.facts(),
    )


def _retrieval_model(base: _Base) -> RetrievalModel:
    objective, encoder = base.config.objective, base.config.encoder
    heads = M3Heads(
        base.encoder.width,
        M3HeadsConfig(
            pooling=encoder.pooling,
            add_pooler=base.start.add_pooler,
            normalize_dense=base.start.normalizes(usual=True),
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
            in_batch_negatives=objective.in_batch_negatives,
            across_devices=objective.across_devices,
        )
    )
    return RetrievalModel(base.encoder, heads, loss)


def _language_model(config: FinetuneConfig, found: TaskRows) -> TaskSetup:
    recipe, model, sides = config.recipe, config.encoder, found.sides
    start = load_causal(
        model.model,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        dtype=_weights_dtype(config),
    )
    max_tokens = context_length(start.model, start.tokenizer)
    crop = config.augment.max_crop_bp
    encode = DocumentEncoder(rules=start.rules, max_tokens=max_tokens)
    if max_tokens is not None and crop is None:
        # raises before the first step what the data loader would raise in the middle of an epoch
        longest = max(sides.train, key=lambda row: len(row.sequence))
        encode(Augmented(longest.sequence), longest)
    # a short input shows which layers run (for adapters and the last blocks) and which get a gradient
    ids = torch.from_numpy(start.rules.encode_document(b"ACGT" * 6))[None]
    tuned = set_up_tuning(
        start.model,
        lambda: start.model(input_ids=ids).logits.float().square().mean(),
        config=model,
        seed=recipe.seed,
    )
    if recipe.gradient_checkpointing:
        checkpoint_activations(start.model)
    measures: dict[str, Measure[Any]] = {
        side: CausalMeasure(
            rows=rows,
            rules=start.rules,
            max_tokens=min(filter(None, (max_tokens, crop)), default=None),
            rows_at_once=recipe.rows_per_device,
        )
        for side, rows in sides.held_out()
    }
    return TaskSetup(
        model=CausalModel(start.model, tuned),
        tokenizer=start.tokenizer,
        width=int(getattr(start.model.config, "hidden_size", 0)) or 1,
        dataset=RowDataset(rows=sides.train, encode=encode, augment=config.augment, seed=recipe.seed),
        collate=PaddedCollator(
            pad_token_id=start.rules.pad_token_id,
            target="causal",
            pad_to_multiple_of=recipe.pad_to_multiple_of,
        ),
        lengths=[len(row.sequence) for row in sides.train],
        measures=measures,
    )
