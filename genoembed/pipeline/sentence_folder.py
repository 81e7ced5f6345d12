"""The files that make a model folder one of sentence-transformers, whose ``encode`` gives our vectors.

In: a folder with a model and its tokenizer, and how its vectors are made. Out: the same folder with
``modules.json`` and what this names. A token has as much weight as bases, and special tokens have none, since
our means leave them out and those of sentence-transformers do not. Its package is not needed to write this.
Promised: nothing is written where its vectors would be other than ours; why is said.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file

from genoembed.tokenization.hf import build_encoder, count_bases
from genoembed.tokenization.kmer import KmerTokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from genoembed.config.choices import TokenPooling

_MODULES = "sentence_transformers.models."
_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "last": "pooling_mode_lasttoken",
    "weighted_mean": "pooling_mode_weightedmean_tokens",
}
"""As every release reads them."""


class HiddenStates(NamedTuple):
    """Layers among the ``hidden_states`` of a model, and how much each counts."""

    num_states: int
    """Of the model: blocks and the embedding."""
    weights: dict[int, float]
    """By number of the state."""


def write_sentence_modules(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    width: int,
    num_ids: int,
    max_tokens: int | None,
    pooling: TokenPooling = "mean",
    states: HiddenStates | None = None,
    projection: tuple[Tensor, Tensor] | None = None,
    normalize: bool = False,
) -> None:
    """Write the modules of a folder; check with :func:`why_other_vectors` before.

    Args:
        folder: With ``config.json``, weights and tokenizer.
        tokenizer: As it is saved in the folder.
        width: Features of a token.
        num_ids: Size of the model's vocabulary.
        max_tokens: Longest input; longer ones are cut.
        pooling: How tokens become one vector.
        states: Layers that are pooled; None takes the model's last hidden states.
        projection: Weight and bias of a linear layer behind the pooling.
        normalize: Scale vectors to length 1.
    """
    steps: list[tuple[str, dict[str, Any], dict[str, Tensor]]] = []
    if states is not None:
        first = min(states.weights)
        by_state = [states.weights.get(index, 0.0) for index in range(first, states.num_states)]
        settings = {"word_embedding_dimension": width, "layer_start": first}
        settings["num_hidden_layers"] = states.num_states - 1
        steps.append(("WeightedLayerPooling", settings, {"layer_weights": torch.tensor(by_state)}))
    counts = count_bases(tokenizer, num_ids)
    if pooling == "mean" and set(counts) != {1}:
        vocabulary = [str(tokenizer.convert_ids_to_tokens(index)) for index in range(num_ids)]
        weights: dict[str, Any] = dict(zip(vocabulary, map(float, counts), strict=True))
        words = {"vocab": vocabulary, "word_weights": weights, "unknown_word_weight": 1.0}
        by_id = torch.tensor([weights[token] for token in vocabulary])[:, None]
        steps.append(("WordWeights", words, {"emb_layer.weight": by_id}))
    flags = {flag: mode == pooling for mode, flag in _FLAGS.items()}
    steps.append(("Pooling", {"word_embedding_dimension": width, **flags}, {}))
    if projection is not None:
        weight, bias = projection
        dense = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": True}
        identity = {"activation_function": "torch.nn.modules.linear.Identity"}
        tensors = {"linear.weight": weight.contiguous(), "linear.bias": bias.contiguous()}
        steps.append(("Dense", dense | identity, tensors))
    if normalize:
        steps.append(("Normalize", {}, {}))
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{_MODULES}Transformer"}]
    for index, (kind, settings, tensors) in enumerate(steps, start=1):
        path = f"{index}_{kind}"
        (folder / path).mkdir()
        _write(folder / path / "config.json", settings)
        if tensors:
            save_file(tensors, folder / path / "model.safetensors", metadata={"format": "pt"})
        modules.append({"idx": index, "name": str(index), "path": path, "type": f"{_MODULES}{kind}"})
    backbone: dict[str, Any] = {"max_seq_length": max_tokens, "do_lower_case": False}
    if states is not None:
        backbone["config_args"] = {"output_hidden_states": True}
    _write(folder / "sentence_bert_config.json", backbone)
    _write(folder / "modules.json", modules)


def why_other_vectors(
    tokenizer: PreTrainedTokenizerBase, *, pooling: str = "mean", skip_first: int = 0
) -> str | None:
    """Say why no modules of sentence-transformers give our vectors; None where they do."""
    if isinstance(tokenizer, KmerTokenizer):
        return "it reads overlapping k-mers, which sentence-transformers cannot weigh by their bases"
    if skip_first:
        return f"its pooling leaves out the first {skip_first} bases, which sentence-transformers cannot"
    if pooling not in _FLAGS:
        return f"sentence-transformers has no pooling {pooling!r}"
    if pooling not in ("mean", "cls") and build_encoder(tokenizer).num_special_tokens:
        return f"sentence-transformers counts special tokens in its pooling {pooling!r}"
    counts = set(count_bases(tokenizer, len(tokenizer))) - {0}
    if pooling == "weighted_mean" and counts != {1}:
        return "sentence-transformers weighs tokens by their places without their bases"
    return None


def _write(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
