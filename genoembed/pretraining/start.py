"""Where training starts: a new model of a given shape, or a causal model with the tokenizer it came with.

In: a :class:`~genoembed.training.run_config.StartConfig`. Out: the model in float32, and how DNA becomes its
token ids. Promised: no weight of a model that training goes on from is left random, and what is not causal
is refused.

Which inputs keep packed neighbors apart in a model, and the proof on the model itself.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import math
from typing import TYPE_CHECKING, Any

import torch

from genoembed.errors import ConfigError, ModelError
from genoembed.models.architecture import NONSENSE
from genoembed.models.registry import find_model
from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
from genoembed.models.striped_hyena2.modeling import StripedHyena2ForCausalLM
from genoembed.tokenization.char import CharTokenizer
from genoembed.training.start import Start, load_causal, token_rules

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from genoembed.config.pretrain import StartConfig
    from genoembed.training.start import TokenRules


logger = logging.getLogger(__name__)

_HEAD_SIZES = (128, 64, 32, 16, 8)
_MIN_HEADS = 2
_NAMES_SHOWN = 3


def build_start(config: StartConfig, *, window: int, seed: int) -> Start:
    """Build or load the model."""
    if config.model is not None:
        start = load_causal(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        _fit_context(start.model, window=window, name=config.model)
        return start
    shape = _shape(config.shape, window) if config.shape is not None else _shrunk(config, window)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = StripedHyena2ForCausalLM(shape)
    tokenizer = CharTokenizer()
    return Start(model.train(), tokenizer, token_rules(tokenizer, name="shape"), is_new=True)


def _shape(values: Mapping[str, object], window: int) -> StripedHyena2Config:
    known = [
        name
        for name, p in inspect.signature(StripedHyena2Config).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    ]
    problems = []
    for key in (key for key in values if key not in known):
        near = difflib.get_close_matches(key, known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "leave it out"
        problems.append(f"shape: {key!r} is not a field of StripedHyena2Config; {remedy}")
    if problems:
        raise ConfigError(*problems)
    try:
        fields: dict[str, Any] = {"max_position_embeddings": window, **values}
        return StripedHyena2Config(**fields)
    except TypeError as error:
        message = f"shape: {error}; give each field a value of its kind"
        raise ConfigError(message) from error


def _shrunk(config: StartConfig, window: int) -> StripedHyena2Config:
    """Keep pattern and proportions of a registry model; positions are not interpolated."""
    full = find_model(str(config.like)).shape
    width, layers = config.hidden_size or full.hidden_size, config.layers or full.num_hidden_layers
    if layers > full.num_hidden_layers:
        message = (
            f"layers: {layers}, but {config.like} has {full.num_hidden_layers} blocks; give as many at most"
        )
        raise ConfigError(message)
    heads = full.num_attention_heads
    if width != full.hidden_size:
        sizes = [size for size in _HEAD_SIZES if width % size == 0 and width // size >= _MIN_HEADS]
        if not sizes:
            message = f"hidden_size: {width} does not divide into heads; set hidden_size to a multiple of 16"
            raise ConfigError(message)
        heads = width // sizes[0]
    kinds = ("attn_layer_idxs", "hcl_layer_idxs", "hcm_layer_idxs", "hcs_layer_idxs")
    patterns: dict[str, Any] = {
        kind: [index for index in getattr(full, kind) if index < layers] for kind in kinds
    }
    return StripedHyena2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=max(8, round(width * full.intermediate_size / full.hidden_size / 8) * 8),
        hcs_filter_groups=_groups(full.hcs_filter_groups, full.hidden_size, width),
        hcm_filter_groups=_groups(full.hcm_filter_groups, full.hidden_size, width),
        rotary_emb_base=full.rotary_emb_base,
        max_position_embeddings=window,
        **patterns,
    )


def _groups(groups: int, full_width: int, width: int) -> int:
    """Return the number of filter groups with which a filter serves as many channels as in the full model."""
    return max(1, math.gcd(width, max(1, width * groups // full_width)))


def _fit_context(model: PreTrainedModel, *, window: int, name: str) -> None:
    """Extend a StripedHyena 2 model's context to the window; raise if another model's is too short."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None or window <= context:
        return
    if not isinstance(model, StripedHyena2ForCausalLM):
        message = f"window: {window}, but the context of {name} is {context}; set window to {context} or less"
        raise ConfigError(message)
    logger.info("%s: context grows from %d to %d tokens", name, context, window)
    model.config.max_position_embeddings = window


_SEGMENTS = (b"ACGTTGCAAGTCCGTA" * 2, b"GATTACAGGCATTCAG" * 2)
_OTHER = b"TTGACCATGCCGTAAC" * 2


def isolating_inputs(model: PreTrainedModel, rules: TokenRules) -> tuple[str, ...]:
    """Return the fields of a packed row that keep its segments apart, after trying them."""
    parameters = inspect.signature(model.forward).parameters
    for field in ("segment_ids", "position_ids"):
        if field in parameters and _keeps_apart(model, rules, field):
            return (field,)
    message = (
        f"isolate: {type(model).__name__} lets packed neighbors see each other, whether it gets "
        "segment_ids, position_ids or neither; set isolate to False"
    )
    raise ModelError(message)


def forward_options(field_names: tuple[str, ...]) -> dict[str, Any]:
    """Return further arguments of a forward pass: with a cache, transformers takes positions to continue."""
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
