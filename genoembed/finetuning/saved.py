"""A fine-tuned model as a folder: encoder, heads, tokenizer, and what makes its vectors what they are.

In: a trained model, or a folder. Out: a folder that ``AutoModel`` opens, or a model that predicts. Promised:
what comes back predicts what was saved.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from genoembed._version import __version__
from genoembed.errors import ConfigError
from genoembed.finetuning.labels import LabelSpace
from genoembed.finetuning.models import CausalModel, PredictionModel, new_head
from genoembed.models.load import load_model, without_progress_bars
from genoembed.models.trained_folder import FACTS_FILE, FACTS_FORMAT, HEADS_FILE, read_finetuned
from genoembed.retrieval.models import ContrastModel, RetrievalModel
from genoembed.training.encoder import load_encoder, load_heads

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from genoembed.config.finetune import FinetuneConfig
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.trained_folder import FinetunedFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedPredictor:
    """A fine-tuned model that predicts."""

    facts: FinetunedFacts
    genomic: GenomicModel
    model: PredictionModel
    space: LabelSpace


def save_finetuned(
    model: PredictionModel | CausalModel | ContrastModel | RetrievalModel,
    folder: Path,
    *,
    config: FinetuneConfig,
    tokenizer: PreTrainedTokenizerBase,
    space: LabelSpace | None,
    source: Path | None = None,
) -> None:
    """Write a model that has been fine-tuned. Adapters become part of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, CausalModel):
        model.tuned.merge()
        backbone: Any = model.model
    else:
        model.encoder.tuned.merge()
        backbone = model.encoder.backbone
        heads = {
            name: value.detach().cpu().contiguous()
            for name, value in model.state_dict().items()
            if not name.startswith("encoder.backbone.")
        }
        if heads:
            save_file(heads, folder / HEADS_FILE, metadata={"format": "pt"})
    with without_progress_bars():
        backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if source is not None and getattr(backbone.config, "auto_map", None):
        for path in source.glob("*.py"):
            shutil.copy(path, folder / path.name)
    facts = _facts(model, config, space)
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _facts(
    model: PredictionModel | CausalModel | ContrastModel | RetrievalModel,
    config: FinetuneConfig,
    space: LabelSpace | None,
) -> dict[str, object]:
    objective = config.objective
    encoder = None if isinstance(model, CausalModel) else model.encoder
    normalize, pooler = False, None
    if isinstance(model, ContrastModel):
        normalize = model.head.normalize
        pooler = "head.pooler" if model.head.pooler is not None else None
    elif isinstance(model, RetrievalModel):
        normalize = model.heads.dense.normalize
        pooler = "heads.dense.pooler" if model.heads.dense.pooler is not None else None
    return {
        "format": FACTS_FORMAT,
        "genoembed": __version__,
        "task": objective.task,
        "base_model": config.encoder.model,
        "layers": [] if encoder is None else list(encoder.layers),
        "pooling": config.encoder.pooling,
        "skip_first": config.encoder.skip_first,
        "fusion": config.encoder.fusion,
        "fusion_weights": [] if encoder is None else list(encoder.fusion_weights),
        "normalize": normalize,
        "pooler": pooler,
        "keep_case": config.data.keep_case,
        "labels": None if space is None else {"kind": space.kind, "names": list(space.names)},
        "head": {"add_pooler": config.encoder.add_pooler} if isinstance(model, PredictionModel) else None,
        "retrieval": {
            "mode": objective.mode,
            "term_bases": objective.term_bases,
            "vector_width": objective.vector_width,
            "vector_window": objective.vector_window,
            "hybrid_weights": list(astuple(model.hybrid_weights)),
        }
        if isinstance(model, RetrievalModel)
        else None,
    }


def load_predictor(
    folder: str | PathLike[str],
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> SavedPredictor:
    """Load a fine-tuned model that predicts labels or numbers."""
    facts = read_finetuned(folder)
    if facts is None:
        message = f"{folder}: no {FACTS_FILE}; name the folder of a fine-tuning run"
        raise ConfigError(message)
    labels = facts.values.get("labels")
    if labels is None:
        other = "score" if facts.task == "lm" else "extract"
        message = (
            f"{folder}: it was fine-tuned for {facts.task}, which predicts no label; use it with {other}"
        )
        raise ConfigError(message)
    genomic = load_model(str(folder), device=device, dtype="float32", trust_remote_code=trust_remote_code)
    space = LabelSpace(kind=labels["kind"], names=tuple(labels["names"]))
    encoder = load_encoder(facts, genomic)
    head = new_head(space, encoder.width, add_pooler=bool(facts.values["head"]["add_pooler"]))
    model = PredictionModel(encoder, head, per_token=space.kind == "token")
    load_heads(model, facts)
    model.to(genomic.device).eval()
    return SavedPredictor(facts=facts, genomic=genomic, model=model, space=space)
