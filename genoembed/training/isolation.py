"""Which inputs keep packed neighbours apart in a model, and the proof on the model itself.

StripedHyena 2 takes ``segment_ids``. Attention models of transformers build a block-diagonal mask from
``position_ids`` that start again, if nothing is cached. Whatever a model claims, two short segments are run
through it first; a model in which they see each other is refused.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from genoembed.errors import ModelError
from genoembed.models.architecture import NONSENSE

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from genoembed.training.stream import TokenRules

_SEGMENTS = (b"ACGTTGCAAGTCCGTA" * 2, b"GATTACAGGCATTCAG" * 2)
_OTHER = b"TTGACCATGCCGTAAC" * 2


def isolating_inputs(model: PreTrainedModel, rules: TokenRules) -> tuple[str, ...]:
    """Name the fields of a packed row that keep its segments apart, after trying them."""
    parameters = inspect.signature(model.forward).parameters
    for field in ("segment_ids", "position_ids"):
        if field in parameters and _keeps_apart(model, rules, field):
            return (field,)
    message = (
        f"isolate: {type(model).__name__} lets packed neighbours see each other, whether it gets "
        "segment_ids, position_ids or neither; set isolate to False"
    )
    raise ModelError(message)


def forward_options(field_names: tuple[str, ...]) -> dict[str, Any]:
    """Give what else a forward pass needs: with a cache, transformers takes positions for a continuation."""
    return {"use_cache": False} if "position_ids" in field_names else {}


@torch.no_grad()
def _keeps_apart(model: PreTrainedModel, rules: TokenRules, field: str) -> bool:
    was_training = model.training
    model.eval()
    try:
        second = _logits(model, rules, field, _SEGMENTS)
        disturbed = _logits(model, rules, field, (_OTHER, _SEGMENTS[1]))
        alone = _logits(model, rules, field, _SEGMENTS[1:])
    except NONSENSE:
        return False
    finally:
        model.train(was_training)
    scale = float(alone.abs().max().clamp(min=1e-3))
    return bool((second - disturbed).abs().max() <= 1e-5 * scale) and bool(
        (second - alone).abs().max() <= 1e-4 * scale
    )


def _logits(model: PreTrainedModel, rules: TokenRules, field: str, segments: tuple[bytes, ...]) -> Tensor:
    """Logits of the last segment, shape ``(T, V)``."""
    encoded = [torch.as_tensor([int(i) for i in rules.encode(segment)]) for segment in segments]
    values = {
        "segment_ids": [torch.full_like(ids, number) for number, ids in enumerate(encoded)],
        "position_ids": [torch.arange(len(ids)) for ids in encoded],
    }[field]
    device = model.get_input_embeddings().weight.device
    inputs = {"input_ids": torch.cat(encoded)[None].to(device), field: torch.cat(values)[None].to(device)}
    return model(**inputs, **forward_options((field,))).logits[0, -len(encoded[-1]) :].float()
