"""Every layer by itself, and layers fused: the same cross-validated linear probe for each.

Every candidate gets a score in each test fold, by a model whose penalty was chosen and fitted on the other
folds alone. What a candidate is made of may depend on the data too (which layers are the best, how they are
weighted): that is then found anew for each test fold, on the other folds alone. The best of many such scores
is flattered all the same; :func:`choose_inside` says what remains if the choice, too, is made without the
test fold.

N rows, D features, L layers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from genoembed.config.probe import TOP
from genoembed.errors import ConfigError
from genoembed.probing.linear import METRICS, FoldScore, MetricSummary, score_fold, summarize
from genoembed.probing.preparation import COMPONENTS, check_block
from genoembed.probing.scalar_mix import learn_mix, mix_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import ProbeTask


logger = logging.getLogger(__name__)

Kind: TypeAlias = Literal["layer", "fusion", "baseline", "untrained"]

"""How many of the best layers are laid side by side."""
MEAN = "mean of all layers"
MIX = "weighted mean of all layers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One candidate on all test folds."""

    name: str
    kind: Kind
    metrics: Mapping[str, MetricSummary]
    """Mean, deviation and values by fold, a metric each."""
    inner: tuple[float, ...]
    """For each test fold, the first metric on the inner folds: what a choice may look at."""
    members: tuple[tuple[str, ...], ...] = ()
    """For each test fold, the layers that it is made of; empty for baselines."""
    num_features: int = 0
    """Features of the (last) fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InsideChoice:
    """The score of choosing a candidate inside the training folds, and using it on the test fold."""

    metrics: Mapping[str, MetricSummary]
    chosen: tuple[str, ...]
    """Which one, by test fold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """All layers, and their fusions."""

    layers: tuple[Scored, ...]
    """In the order given."""
    fusions: tuple[Scored, ...]
    """None where there is one layer only, or where widths differ those that need one width are missing."""
    mix: Mapping[str, float]
    """Weight of each layer in the weighted mean, learnt on all rows; they sum to 1. Empty without one."""


def sweep_layers(
    features: Mapping[str, NDArray[np.floating]],
    codes: NDArray[np.generic],
    folds: NDArray[np.int64],
    *,
    task: ProbeTask,
    fusions: bool = True,
    kind: Kind = "layer",
    top: Sequence[int] = TOP,
) -> Sweep:
    """Score each layer by itself, then fusions of them.

    Example:
        >>> codes = np.arange(30) % 2
        >>> told = np.random.default_rng(0).normal(size=(30, 2)) + 8 * codes[:, None]
        >>> found = sweep_layers({"a": told, "b": told * 0 + 1}, codes, np.arange(30) // 10,
        ...                      task="classification")
        >>> [round(layer.metrics["mcc"].mean, 3) for layer in found.layers]
        [1.0, 0.0]
    """
    layers: list[Scored] = []
    widths: set[int] = set()
    for name in features:
        block = check_block(features[name], num_rows=len(codes), name=name)
        widths.add(block.shape[1])
        layers.append(score_block(name, block, codes, folds, task=task, kind=kind, members=(name,)))
        logger.info("%s: %s", name, shown(layers[-1], task))
    if not fusions or len(layers) < 2:
        return Sweep(layers=tuple(layers), fusions=(), mix={})
    fused = [
        _score_top(number, layers, features, codes, folds, task)
        for number in sorted(set(top))
        if number <= len(layers)
    ]
    mix: dict[str, float] = {}
    if len(widths) == 1:
        equal = dict.fromkeys(features, 1 / len(layers))
        fused.append(
            score_block(
                MEAN,
                mix_layers(features, equal),
                codes,
                folds,
                task=task,
                kind="fusion",
                members=tuple(features),
            )
        )
        fused.append(_score_mix(features, codes, folds, task))
        mix = learn_mix(features, codes, folds, task=task)
    for candidate in fused:
        logger.info("%s: %s", candidate.name, shown(candidate, task))
    return Sweep(layers=tuple(layers), fusions=tuple(fused), mix=mix)


def score_block(
    name: str,
    block: NDArray[np.floating],
    codes: NDArray[np.generic],
    folds: NDArray[np.int64],
    *,
    task: ProbeTask,
    kind: Kind,
    members: tuple[str, ...] = (),
) -> Scored:
    """Score one matrix on all folds."""
    return _score(name, kind, lambda _: ([block], members), codes, folds, task)


def choose_inside(candidates: Sequence[Scored], *, task: ProbeTask) -> InsideChoice:
    """Choose a candidate for each test fold by its inner folds, and take its score on the test fold."""
    if not candidates:
        message = "candidates: none, expected at least one; name a layer"
        raise ConfigError(message)
    best = np.argmax([candidate.inner for candidate in candidates], axis=0)
    return InsideChoice(
        metrics=summarize(
            [
                {name: candidates[index].metrics[name].folds[fold] for name in METRICS[task]}
                for fold, index in enumerate(best)
            ]
        ),
        chosen=tuple(candidates[index].name for index in best),
    )


def shown(scored: Scored | InsideChoice, task: ProbeTask) -> str:
    """Say the first metric in words."""
    summary = scored.metrics[METRICS[task][0]]
    return f"{METRIC_WORDS[METRICS[task][0]]} {summary.mean:.3f} +- {summary.sd:.3f}"


METRIC_WORDS: Mapping[str, str] = {
    "mcc": "MCC",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "r2": "R2",
    "pearson": "Pearson",
    "spearman": "Spearman",
}
"""Metrics as people write them."""


def _score(
    name: str,
    kind: Kind,
    blocks_of: Callable[[int], tuple[list[NDArray[np.floating]], tuple[str, ...]]],
    codes: NDArray[np.generic],
    folds: NDArray[np.int64],
    task: ProbeTask,
) -> Scored:
    """Score what may be made of other features for each test fold."""
    found: list[FoldScore] = []
    members: list[tuple[str, ...]] = []
    num_features = 0
    for fold in range(int(folds.max()) + 1):
        blocks, names = blocks_of(fold)
        found.append(score_fold([blocks], codes, folds, fold, task=task, components=COMPONENTS))
        members.append(names)
        num_features = sum(block.shape[1] for block in blocks)
    return Scored(
        name=name,
        kind=kind,
        metrics=summarize([score.metrics for score in found]),
        inner=tuple(score.inner for score in found),
        members=tuple(members) if members[0] else (),
        num_features=num_features,
    )


def _score_top(
    number: int,
    layers: Sequence[Scored],
    features: Mapping[str, NDArray[np.floating]],
    codes: NDArray[np.generic],
    folds: NDArray[np.int64],
    task: ProbeTask,
) -> Scored:
    """Lay the best layers of each test fold's training rows side by side."""

    def blocks_of(fold: int) -> tuple[list[NDArray[np.floating]], tuple[str, ...]]:
        ranked = sorted(layers, key=lambda layer: -layer.inner[fold])[:number]
        names = tuple(layer.name for layer in ranked)
        return [np.asarray(features[name]) for name in names], names

    return _score(f"best {number} layers side by side", "fusion", blocks_of, codes, folds, task)


def _score_mix(
    features: Mapping[str, NDArray[np.floating]],
    codes: NDArray[np.generic],
    folds: NDArray[np.int64],
    task: ProbeTask,
) -> Scored:
    """Learn the weights of each test fold on the others."""

    def blocks_of(fold: int) -> tuple[list[NDArray[np.floating]], tuple[str, ...]]:
        weights = learn_mix(features, codes, folds, task=task, without=fold)
        return [mix_layers(features, weights)], tuple(features)

    return _score(MIX, "fusion", blocks_of, codes, folds, task)
