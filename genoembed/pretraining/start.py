"""Where training starts: a new model of a given shape, or a causal model with the tokenizer it came with.

In: a :class:`~genoembed.training.run_config.StartConfig`. Out: the model in float32, and how DNA becomes its
token ids. Promised: no weight of a model that training goes on from is left random, and what is not causal
is refused.

Which inputs keep packed neighbours apart in a model, and the proof on the model itself.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from genoembed.errors import CheckpointError, ConfigError, ModelError
from genoembed.models.architecture import NONSENSE, first_line, needs_trust, read_config, unbuildable
from genoembed.models.locate import locate_model, reachable_source
from genoembed.models.registry import find_model
from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
from genoembed.models.striped_hyena2.modeling import StripedHyena2ForCausalLM
from genoembed.pretraining.stream import TokenRules
from genoembed.tokenization.char import CharTokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from genoembed.config.pretrain import StartConfig
    from genoembed.models.locate import ModelSource


logger = logging.getLogger(__name__)

_HEAD_SIZES = (128, 64, 32, 16, 8)
_MIN_HEADS = 2
_NAMES_SHOWN = 3


class Start(NamedTuple):
    """What training starts from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rules: TokenRules
    is_new: bool


def build_start(config: StartConfig, *, window: int, seed: int) -> Start:
    """Build or load the model."""
    if config.model is not None:
        model, tokenizer = _load(config.model, config)
        _fit_context(model, window=window, name=config.model)
        check_causal(model, name=config.model)
        return Start(model.train(), tokenizer, token_rules(tokenizer, name=config.model), is_new=False)
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
        problems.append(f"shape: {key!r} is no field of StripedHyena2Config; {remedy}")
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
    full = find_model(str(config.like)).build_config()
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
    """Let a filter serve as many channels as in the full model."""
    return max(1, math.gcd(width, max(1, width * groups // full_width)))


def _load(name: str, config: StartConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = reachable_source(locate_model(name), revision=config.revision)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.revision is not None:
        options["revision"] = config.revision
    model_config = read_config(source, options)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=model_config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **options,
        )
    except (OSError, *NONSENSE) as error:
        if "trust_remote_code" in str(error):
            raise needs_trust(source) from error
        if isinstance(error, OSError):
            message = f"no weights were found ({first_line(error)}); the folder needs safetensors files"
            raise CheckpointError(message, path=source.location) from error
        raise unbuildable(source, error) from error
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        message = (
            f"{len(wrong)} weights of a causal model are missing or of another shape "
            f"({', '.join(wrong[:_NAMES_SHOWN])}); go on from a causal model with its head"
        )
        raise CheckpointError(message, path=source.location)
    return model, _tokenizer(source, model_config.model_type, options)


def _tokenizer(source: ModelSource, model_type: str, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    if model_type == "striped_hyena2":
        return CharTokenizer()
    try:
        return AutoTokenizer.from_pretrained(source.location, **options)
    except (OSError, *NONSENSE) as error:
        message = (
            f"model {source.name!r}: no tokenizer could be loaded ({first_line(error)}); "
            "save the model's tokenizer into its folder"
        )
        raise ModelError(message) from error


def _fit_context(model: PreTrainedModel, *, window: int, name: str) -> None:
    """Let a StripedHyena 2 model's context grow with the rows it is trained on; refuse what others lack."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None or window <= context:
        return
    if not isinstance(model, StripedHyena2ForCausalLM):
        message = f"window: {window}, but the context of {name} is {context}; set window to {context} or less"
        raise ConfigError(message)
    logger.info("%s: context grows from %d to %d tokens", name, context, window)
    model.config.max_position_embeddings = window


def token_rules(tokenizer: PreTrainedTokenizerBase, *, name: str) -> TokenRules:
    """Say how a tokenizer turns a document into ids, without special tokens."""
    if isinstance(tokenizer, CharTokenizer):
        return TokenRules(tokenizer.encode_bytes, tokenizer.eod_token_id, int(tokenizer.pad_token_id))
    end = next((i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None), None)
    if end is None:
        message = f"model {name!r}: its tokenizer has no eos_token; set one that ends a document, and save it"
        raise ModelError(message)

    def encode(document: bytes) -> list[int]:
        text = document.decode("ascii")
        return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]

    return TokenRules(
        encode, int(end), int(end if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    )


@torch.no_grad()
def check_causal(model: PreTrainedModel, *, name: str) -> None:
    """Refuse a model in which a token sees the tokens after it."""
    was_training = model.training
    model.eval()
    ids = torch.arange(8)[None] % model.config.vocab_size
    other = ids.clone()
    other[0, -1] = 0
    device = model.get_input_embeddings().weight.device
    before, after = (model(input_ids=row.to(device)).logits[0, :-1] for row in (ids, other))
    model.train(was_training)
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-5):
        message = f"model {name!r}: tokens see what follows them, expected a causal model; go on from another"
        raise ModelError(message)


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
