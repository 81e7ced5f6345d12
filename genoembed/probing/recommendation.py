"""The one answer of a probe: the simplest candidate that cross-validation supports, and how to extract it.

In: scores by test fold. Out: a candidate by the rule of one standard error (Breiman et al. 1984,
"Classification and Regression Trees", 3.4.3; Hastie, Tibshirani and Friedman 2009, "The Elements of
Statistical Learning", 7.10): of all candidates whose mean score is within one standard error of the best
mean, the simplest. A single layer is simpler than layers that are fused, and an earlier layer simpler than a
later one, since a pass stops after it. The score to expect is another figure: that of choosing without the
test fold.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from genoembed.config.embed import EmbedConfig
from genoembed.config.probe import FIXED
from genoembed.plotting.layers import layer_number
from genoembed.probing.cross_validation import METRICS
from genoembed.probing.sweep import MEAN, MIX, shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from genoembed.config.choices import Fusion, ProbeTask
    from genoembed.probing.sweep import InsideChoice, Scored

NEAR_BEST = 0.95
"""Layers with this share of the best score are listed as near it."""
_RUNNING = (
    *("device", "threads", "batch_tokens", "unit_bases", "on_error", "layers", "pooling"),
    *FIXED,
)
"""Options that change no vector, or are written in their own way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerChoice:
    """The candidate to use."""

    name: str
    """Of the candidate: a module path, or a fusion."""
    layers: tuple[str, ...]
    """Module paths that it is made of."""
    fusion: Fusion
    """How they are fused."""
    best_layer: str
    """The single layer with the highest mean."""
    near_best: tuple[str, ...]
    """Layers that reach 95 % of its score, in the order of the model; none where that is 0 or less."""
    sentence: str
    """Such as ``use layer 21 (blocks.21.mlp.l3), mean pooling: MCC 0.71 +- 0.02; ...``."""


def name_layer(path: str) -> str:
    """Return a layer's name as a user would write it.

    Example:
        >>> name_layer("blocks.21.mlp.l3"), name_layer("encoder.layer.5"), name_layer("blocks.21")
        ('layer 21 (blocks.21.mlp.l3)', 'layer 5 (encoder.layer.5)', 'layer blocks.21')
    """
    number = layer_number(path)
    return f"layer {path}" if number is None else f"layer {number} ({path})"


def choose_layer(
    layers: Sequence[Scored],
    inside: InsideChoice,
    *,
    fusions: Sequence[Scored] = (),
    pooling: str | None,
    task: ProbeTask,
) -> LayerChoice:
    """Choose the simplest candidate within one standard error of the best.

    Args:
        layers: Single layers, in the order of the model.
        inside: What the choice reaches where it is made without the test fold.
        fusions: Fusions of them.
        pooling: How tokens were pooled, for the sentence.
        task: What the target is.

    Returns:
        The choice.
    """
    metric = METRICS[task][0]
    scores = {one.name: one.metrics[metric] for one in (*layers, *fusions)}
    best = max((*layers, *fusions), key=lambda one: scores[one.name].mean)
    error = scores[best.name].sd / np.sqrt(len(scores[best.name].values))
    # layers come first and in order, then fusions of few layers: the first within reach is the simplest
    ordered = [*layers, *sorted(fusions, key=lambda one: len(_members(one, layers)))]
    chosen = next(one for one in ordered if scores[one.name].mean >= scores[best.name].mean - error)
    means = [scores[layer.name].mean for layer in layers]
    top = max(means)
    parts = [
        f"use {_described(chosen)}{'' if pooling is None else f', {pooling} pooling'}: {shown(chosen, task)}"
    ]
    if chosen is not best:
        word = "earliest layer" if chosen.kind == "layer" else "simplest candidate"
        what = name_layer(best.name) if best.kind == "layer" else best.name
        parts.append(
            f"the {word} within one standard error ({error:.3f}) of the best, {what}, {shown(best, task)}"
        )
    if scores[best.name].mean <= 0:
        parts.append("no candidate is better than chance")
    if len(layers) > 1:
        parts.append(f"expect {shown(inside, task)}, as where the choice is made without the test fold")
    return LayerChoice(
        name=chosen.name,
        layers=_members(chosen, layers),
        fusion=_fusion(chosen),
        best_layer=layers[means.index(top)].name,
        near_best=tuple(
            layer.name
            for layer, mean in zip(layers, means, strict=True)
            if top > 0 and mean >= NEAR_BEST * top
        ),
        sentence="; ".join(parts),
    )


def _described(one: Scored) -> str:
    return name_layer(one.name) if one.kind == "layer" else f"the {one.name}"


def _members(one: Scored, layers: Sequence[Scored]) -> tuple[str, ...]:
    """Return the layers of a candidate; the best over all folds where each fold has others."""
    if one.kind == "layer":
        return (one.name,)
    if len(set(one.members)) == 1:
        return one.members[0]
    ranked = sorted(layers, key=lambda layer: -float(np.mean(layer.inner)))
    kept = {layer.name for layer in ranked[: len(one.members[0])]}
    return tuple(layer.name for layer in layers if layer.name in kept)


def _fusion(one: Scored) -> Fusion:
    if one.kind == "layer":
        return "none"
    return "mean" if one.name == MEAN else "weighted" if one.name == MIX else "concat"


def extraction_line(
    provenance: Mapping[str, Any], choice: LayerChoice, *, weights: Mapping[str, float], are_all: bool
) -> str:
    """Write the command line that makes the vectors of a choice; empty where a file does not say how.

    Args:
        provenance: Of the file whose layers were probed.
        choice: What to extract.
        weights: Of the layers in the learned mean.
        are_all: Whether the layers that were probed are what ``all`` means to the model.

    Returns:
        One line for a shell.

    Example:
        >>> made = {"config": {"input": {"inputs": ["my genes.fa"], "flank": 0}, "windows": {"window": 512},
        ...                    "model": {"model": "genoembed-mini"}, "embedding": {"pooling": "max"}}}
        >>> choice = LayerChoice(name="a.2", layers=("a.2",), fusion="none", best_layer="a.2", near_best=(),
        ...                      sentence="")
        >>> extraction_line(made, choice, weights={}, are_all=True)
        "genoembed extract 'my genes.fa' --window 512 --layer a.2 --pool max"
    """
    config = provenance.get("config") or {}
    sections = [config.get(name) or {} for name in ("input", "model", "windows", "embedding")]
    if not all(sections) or not sections[0].get("inputs"):
        return ""
    values = {key: value for section in sections for key, value in section.items()}
    words = ["genoembed", "extract", *map(_as_input, values["inputs"])]
    code = (provenance.get("model") or {}).get("code") or {}
    if code.get("module"):  # a kind of model that transformers knows once its package is imported
        words += ["--import", str(code["module"]).partition(".")[0]]
    for key, described in EmbedConfig.options().items():
        value = values.get(key)
        if key in _RUNNING or value is None or _plain(value) == _plain(described.default):
            continue
        if described.kind is bool:
            words.append(described.name)
        else:
            every = value if isinstance(value, list | tuple) else [value]
            words += [word for one in every for word in (described.name, str(one))]
    layers, fusion, numbers = choice.layers, str(choice.fusion), list(weights.values())
    if are_all and fusion in ("mean", "weighted"):
        layers = ("all",)
    if values.get("fusion", "none") != "none":  # the file has one matrix, which is fused already
        layers, fusion = tuple(map(str, values["layers"])), str(values["fusion"])
        numbers = list(values.get("fusion_weights") or ())
    words += [word for name in layers for word in ("--layer", name)]
    words += ["--pool", str(values["pooling"])]
    if fusion != "none":
        words += ["--fuse", fusion]
    if fusion == "weighted":
        words += ["--fusion-weights", ",".join(f"{weight:.6g}" for weight in numbers)]
    return shlex.join(words)


def transform_note(choice: LayerChoice, transforms: Mapping[str, str]) -> str | None:
    """Say which transforms the vectors of a choice were scored with: extraction applies none.

    Example:
        >>> choice = LayerChoice(name="a.2", layers=("a.2",), fusion="none", best_layer="a.2", near_best=(),
        ...                      sentence="")
        >>> transform_note(choice, {"a.2": "centered.h5"})
        'scored after the transform centered.h5, which extract does not apply: give it to search or plot'
    """
    used = [shlex.quote(path) for layer, path in transforms.items() if layer in choice.layers]
    if not used:
        return None
    pronoun = "it" if len(used) == 1 else "them"
    return (
        f"scored after the transform{'s' * (len(used) > 1)} {', '.join(used)}, which extract does not apply: "
        f"give {pronoun} to search or plot"
    )


def _as_input(name: object) -> str:
    """Write a file's name so that it is no option."""
    text = str(name)
    return f"./{text}" if text.startswith("-") and text != "-" else text


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
