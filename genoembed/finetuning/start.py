"""What a fine-tuning run is made of: the model of its task, rows, batches and measures, by config.

In: a :class:`~genoembed.training.finetune_config.FinetuneConfig`. Out: a
:class:`~genoembed.training.task_setup.TaskSetup`. Everything that can be refused is refused here, before the
first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genoembed.contracts import EncodedSequence
from genoembed.errors import ConfigError, SequenceLengthError
from genoembed.finetuning.augment import Augmented
from genoembed.finetuning.collate import EncodedExample, PaddedCollator
from genoembed.finetuning.evaluation import CausalMeasure, PredictionMeasure
from genoembed.finetuning.labels import LabelSpace
from genoembed.finetuning.preparation import find_contrast, label_kind, read_sides, without_strata
from genoembed.finetuning.rows import RowDataset
from genoembed.finetuning.saved import new_head
from genoembed.finetuning.setup import TaskSetup, load_base, set_up_contrast, set_up_examples
from genoembed.finetuning.tasks import CausalModel, PredictionModel, fit_inputs
from genoembed.models.behavior import context_length
from genoembed.models.load import without_progress_bars
from genoembed.training.heads import RegressionHead
from genoembed.training.start import load_causal
from genoembed.training.tuning import set_up_tuning

if TYPE_CHECKING:
    from genoembed.config.finetune import FinetuneConfig
    from genoembed.finetuning.evaluation import Measure
    from genoembed.finetuning.labelled import LabelledSequence
    from genoembed.training.start import Start


def set_up_task(config: FinetuneConfig) -> TaskSetup:
    """Read rows, load and build the model, and put together what a trainer needs."""
    task = config.objective.task
    if task == "lm":
        return _causal(config)
    if task in ("contrastive", "triplet", "retrieval"):
        contrast = find_contrast(config)
        if contrast == "examples":
            return set_up_examples(config)
        if config.objective.task == "triplet" and contrast == "views":
            message = "task 'triplet' needs labels or examples; give labels, or set task to 'contrastive'"
            raise ConfigError(message)
        return set_up_contrast(config, contrast)
    return _prediction(config)


def _prediction(config: FinetuneConfig) -> TaskSetup:
    objective, kind = config.objective, label_kind(config.objective.task, None)
    sides = read_sides(config, kind=kind)
    labels = [row.label for row in (*sides.train, *sides.validation, *sides.test)]
    space = LabelSpace.of(labels, kind=kind, columns=config.data.label_columns)
    base = load_base(config)
    base.check([row.sequence for row in sides.train], config)
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
    encode = base.label_encoder(config, space)
    measures = {
        side: PredictionMeasure(rows=rows, space=space, runner=base.runner) for side, rows in sides.held_out()
    }
    model = PredictionModel(base.encoder, head, per_token=kind == "token")
    fit_inputs(model, base.runner, [row.sequence for row in sides.train])
    return TaskSetup(
        model=model,
        space=space,
        dataset=RowDataset(sides.train, encode, augment=config.augment, seed=config.recipe.seed),
        collate=base.collator("token" if kind == "token" else "sequence", config),
        lengths=[len(row.sequence) for row in sides.train],
        classes=None,
        measures=dict(measures),
        **base.facts(sides),
    )


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
    sides = read_sides(without_strata(config), kind="none")
    with without_progress_bars():
        start = load_causal(
            wanted.model, revision=wanted.revision, trust_remote_code=wanted.trust_remote_code
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
        for side, rows in sides.held_out()
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
