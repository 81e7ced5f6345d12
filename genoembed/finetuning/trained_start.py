"""Start from a model that was trained for vectors: its settings are the defaults, its heads go on learning.

In: a configuration as requested, and what the model's folder says of itself. Out: the configuration with the
folder's settings where nothing else was requested, and heads with the folder's weights. Promised: the vectors
before the first step are those that ``extract`` gives with that folder; whatever else was requested warns, in
the words of ``extract``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from genoembed.config.tasks import PREDICTION_TASKS, applies
from genoembed.errors import CheckpointError
from genoembed.models.trained_folder import HEADS_FILE, carried_options, is_as_trained, read_heads
from genoembed.retrieval.models import RetrievalModel, saved_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from genoembed.config.finetune import FinetuneConfig
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.trained_folder import FinetunedFacts
    from genoembed.retrieval.models import ContrastModel

logger = logging.getLogger(__name__)

_VECTORS = ("layers", "pooling", "skip_first", "fusion")
_HEAD_SHAPE = {"sparse": ("term_bases",), "multi_vector": ("vector_width", "vector_window")}
"""Options that decide whether weights of a head mean the same."""


def with_trained_settings(config: FinetuneConfig, facts: FinetunedFacts | None) -> FinetuneConfig:
    """Fill in what the model was trained with where nothing else was requested."""
    encoder, objective = config.encoder, config.objective
    if facts is None or objective.task == "lm":  # a language model has no vectors
        return _without_pooler(config)
    given = {key: getattr(encoder, key) for key in _VECTORS if key in encoder.model_fields_set}
    carried = carried_options(facts, given)
    carried = {
        key: value for key, value in carried.items() if key in _VECTORS and applies(key, objective.task)
    }
    values: dict[str, Any] = {"encoder": encoder.changed(**carried)}
    shape = _shape(facts) if applies("term_bases", objective.task, objective.mode) else {}
    own = {key: value for key, value in shape.items() if key not in objective.model_fields_set}
    if own:
        values["objective"] = objective.changed(**own)
    config = config.changed(**values)
    if facts.add_pooler and objective.task not in PREDICTION_TASKS:
        return config  # whether its projection is taken hangs on the layers, once their names are resolved
    return _without_pooler(config)


def _without_pooler(config: FinetuneConfig) -> FinetuneConfig:
    """Decide that nothing is projected where nothing was requested."""
    encoder = config.encoder
    if encoder.add_pooler is not None or not applies("add_pooler", config.objective.task):
        return config
    return config.changed(encoder=encoder.model_copy(update={"add_pooler": False}))


def _shape(facts: FinetunedFacts) -> dict[str, Any]:
    """Return the options of the sparse and multi-vector heads; empty for a folder without."""
    found: Mapping[str, Any] = facts.values.get("retrieval") or {}
    if found.get("mode", "dense") == "dense":
        return {}
    return {key: found[key] for keys in _HEAD_SHAPE.values() for key in keys}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedStart:
    """A model that a run starts from, as far as its vectors are made as they were trained."""

    facts: FinetunedFacts | None
    """None for a model that was trained for no vector, or of which others were requested."""
    config: FinetuneConfig

    @property
    def fusion_weights(self) -> tuple[float, ...] | None:
        """Weights of the layers to begin with."""
        return None if self.facts is None else self.facts.fusion_weights or None

    @property
    def add_pooler(self) -> bool:
        """Whether vectors are projected."""
        requested = self.config.encoder.add_pooler
        return self.facts is not None and self.facts.add_pooler if requested is None else requested

    def normalizes(self, *, usual: bool) -> bool:
        """Whether vectors get length 1; ``usual`` is what the task does with a model that is not tuned."""
        requested = self.config.encoder.normalize
        if requested is not None:
            return requested
        return usual if self.facts is None or not self.facts.is_tuned else self.facts.normalize

    def load_heads(self, model: ContrastModel | RetrievalModel) -> frozenset[str]:
        """Take over the weights of heads, as far as the folder has them; return their names."""
        facts, found = self.facts, dict[str, Any]()
        if facts is None:
            return frozenset()
        dense, name = (
            (model.heads.dense, "heads.dense.pooler")
            if isinstance(model, RetrievalModel)
            else (model.head, "head.pooler")
        )
        if facts.pooler is not None and dense.pooler is not None:
            weights = read_heads(facts.folder, facts.pooler)
            found |= {f"{name}.{key}": value for key, value in weights.items()}
        shape = _shape(facts)
        if isinstance(model, RetrievalModel) and model.heads.mode != "dense" and shape:
            found |= self._retrieval_heads(facts, shape)
            model.hybrid_weights = saved_weights(facts)
        _load(model, found, facts)
        return frozenset(found)

    def _retrieval_heads(self, facts: FinetunedFacts, shape: Mapping[str, Any]) -> dict[str, Tensor]:
        objective = self.config.objective
        same = [
            head
            for head, keys in _HEAD_SHAPE.items()
            if all(getattr(objective, key) == shape[key] for key in keys)
        ]
        saved = read_heads(facts.folder)
        return {
            key: value
            for key, value in saved.items()
            if key.startswith(tuple(f"heads.{head}." for head in same))
        }


def find_start(facts: FinetunedFacts | None, genomic: GenomicModel, config: FinetuneConfig) -> TrainedStart:
    """Compare what is requested with what a model was trained with; warn of what differs."""
    if facts is None or facts.unsupported is not None:
        return TrainedStart(facts=None, config=config)
    encoder, makes_vectors = config.encoder, config.objective.task in ("contrastive", "triplet", "retrieval")
    facts = replace(facts, layers=_paths(genomic, facts.layers))
    kept = [key for key in _VECTORS if applies(key, config.objective.task)]
    asked = {key: getattr(encoder, key) for key in kept} | {"layers": _paths(genomic, encoder.layers)}
    heads = makes_vectors and (facts.add_pooler or _shape(facts))
    if not is_as_trained(facts, asked, lost="its projection and heads start anew" if heads else ""):
        return TrainedStart(facts=None, config=config)
    if makes_vectors and facts.is_tuned:
        _check_heads(facts, config)
    logger.info("%s: layers, pooling and fusion as it was trained for %s", genomic.name, facts.task)
    return TrainedStart(facts=facts, config=config)


def _check_heads(facts: FinetunedFacts, config: FinetuneConfig) -> None:
    """Warn of heads that make other vectors than were trained; a new projection changes none at first."""
    encoder, objective = config.encoder, config.objective
    asked: dict[str, object] = {}
    if encoder.add_pooler is False and facts.add_pooler:
        asked["add_pooler"] = False
    if encoder.normalize is not None:
        asked["normalize"] = encoder.normalize
    is_as_trained(facts, asked)
    shape = _shape(facts)
    if objective.task == "retrieval" and objective.mode != "dense" and shape:
        others = {key: getattr(objective, key) for key in shape}
        is_as_trained(facts, others, expected=shape, lost="that head starts anew")


def _paths(genomic: GenomicModel, layers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(info.path for info in genomic.resolve(layers))


def _load(model: ContrastModel | RetrievalModel, found: dict[str, Tensor], facts: FinetunedFacts) -> None:
    try:
        wrong = model.load_state_dict(found, strict=False).unexpected_keys
        problem = f"weights {', '.join(wrong[:3])} have no place" if wrong else None
    except RuntimeError as error:
        problem = f"weights have another shape ({str(error).splitlines()[-1].strip()})"
    if problem is not None:
        message = f"{problem}; fine-tune again"
        raise CheckpointError(message, path=str(facts.folder / HEADS_FILE))
