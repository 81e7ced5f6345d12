"""A fine-tuned model as a folder: encoder, heads, tokenizer, and what makes its vectors what they are.

In: a trained model, or a folder. Out: a folder that ``AutoModel`` opens, or a model that predicts. Promised:
what comes back predicts what was saved.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from genoembed._version import __version__
from genoembed.errors import ConfigError
from genoembed.finetuning.labels import LabelSpace
from genoembed.finetuning.models import CausalModel, PredictionModel, new_head
from genoembed.finetuning.opening import (
    Finish,
    edit_config,
    finish,
    num_embeddings,
    opening,
    shortened,
    write_sentence_files,
)
from genoembed.models.load import load_model
from genoembed.models.locate import locate_model
from genoembed.models.pretrained import without_progress_bars
from genoembed.models.trained_folder import (
    FACTS_FILE,
    FACTS_FORMAT,
    HEAD_PREFIX,
    HEADS_FILE,
    read_finetuned,
)
from genoembed.retrieval.models import ContrastModel, RetrievalModel
from genoembed.tokenization.hf import count_bases
from genoembed.tokenization.published import opened
from genoembed.training.auto_models import BASES
from genoembed.training.encoder import load_encoder, load_heads

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from os import PathLike
    from pathlib import Path

    from torch import Tensor
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
    facts = _facts(model, config, space)
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if isinstance(model, CausalModel):
        model.tuned.merge()
        _save_backbone(model.model, folder, source=source)
        tokenizer.save_pretrained(folder)
        edit_config(folder, {})
        return
    encoder = model.encoder
    encoder.tuned.merge()
    # a plain call of the saved tokenizer gives the ids of training: transformers knows no reader of ours
    plain = opened(tokenizer, add_special_tokens=encoder.special_tokens, keep_case=config.data.keep_case)
    plain.save_pretrained(folder)
    heads = {
        name: value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith("encoder.backbone.")
    }
    beside = {}
    if isinstance(model, PredictionModel):
        beside = {name: heads.pop(name) for name in list(heads) if name.startswith(HEAD_PREFIX)}
        counts = count_bases(plain, num_embeddings(encoder.backbone))
        beside[f"{BASES}.counts"] = torch.tensor(counts, dtype=torch.int32)
    # blocks behind the deepest layer make no vector; a model that predicts keeps them, for extract
    cut = None if isinstance(model, PredictionModel) else shortened(encoder)
    left_out = () if cut is None else cut.left_out
    _save_backbone(encoder.backbone, folder, source=source, beside=beside, left_out=left_out)
    write_sentence_files(model, folder, heads, tokenizer=plain, config=config, cut=cut)
    if heads:
        save_file(heads, folder / HEADS_FILE, metadata={"format": "pt"})
    edit_config(folder, opening(model, plain, config=config, space=space), cut=cut)


def _save_backbone(
    backbone: Any,
    folder: Path,
    *,
    source: Path | None,
    beside: Mapping[str, Tensor] | None = None,
    left_out: Collection[str] = (),
) -> None:
    """Write the model, with other weights in its file, and without those of some of its blocks."""
    weights = {name: value for name, value in backbone.state_dict().items() if name not in left_out}
    with without_progress_bars():
        backbone.save_pretrained(folder, state_dict={**weights, **(beside or {})})
    if source is not None and getattr(backbone.config, "auto_map", None):
        for path in source.glob("*.py"):
            shutil.copy(path, folder / path.name)


def _facts(
    model: PredictionModel | CausalModel | ContrastModel | RetrievalModel,
    config: FinetuneConfig,
    space: LabelSpace | None,
) -> dict[str, object]:
    objective = config.objective
    encoder = None if isinstance(model, CausalModel) else model.encoder
    end = Finish() if isinstance(model, CausalModel) else finish(model)
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
        "normalize": end.normalize,
        "pooler": end.pooler,
        "keep_case": config.data.keep_case,
        "labels": None if space is None else {"kind": space.kind, "names": list(space.names)},
        "head": {"add_pooler": bool(config.encoder.add_pooler)}
        if isinstance(model, PredictionModel)
        else None,
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
        locate_model(str(folder))  # raises for a folder of none, and for a run that is not complete
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
    per_token = space.kind == "token"
    width = encoder.width if per_token else encoder.pooled_width
    head = new_head(space, width, add_pooler=bool(facts.values["head"]["add_pooler"]))
    model = PredictionModel(encoder, head, per_token=per_token)
    load_heads(model, facts)
    model.to(genomic.device).eval()
    return SavedPredictor(facts=facts, genomic=genomic, model=model, space=space)
