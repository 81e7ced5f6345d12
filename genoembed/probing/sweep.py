"""Every layer by itself, and layers fused: the same cross-validated linear probe for each.

Every candidate gets a score in each test fold, by a model whose penalty was chosen and fitted on the other
folds alone. What a candidate is made of may depend on the data too (which layers are the best, how they are
weighted): that is then found anew for each test fold, on the other folds alone. The best of many such scores
is flattered all the same; :func:`choose_inside` says what remains if the choice, too, is made without the
test fold (nested cross-validation).

The command and the benchmarks call these functions; they take any features, given as arrays.

N rows, D features, L layers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from genoembed.config.probe import TOP
from genoembed.errors import ConfigError
from genoembed.probing.cross_validation import (
    METRIC_WORDS,
    METRICS,
    FoldScore,
    MetricSummary,
    check_block,
    score_fold,
    summarize_metrics,
)
from genoembed.probing.scalar_mix import learn_mix, mix_layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import ProbeTask


logger = logging.getLogger(__name__)

CandidateKind: TypeAlias = Literal["layer", "fusion", "baseline", "untrained"]

MEAN = "mean of all layers"
MIX = "weighted mean of all layers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One candidate on all test folds."""

    name: str
    kind: CandidateKind
    metrics: Mapping[str, MetricSummary]
    """Mean, deviation and values by fold, for each metric."""
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
    mix: Mapping[str, float]
    """Weight of each layer in the weighted mean, learned on all rows; they sum to 1. Empty without one."""


def sweep(
    features: Mapping[str, NDArray[np.floating]],
    codes: NDArray[np.generic],
    folds: NDArray[np.int64],
    *,
    task: ProbeTask,
    kind: CandidateKind = "layer",
    top: Sequence[int] = TOP,
    joined: Mapping[str, Sequence[str]] | None = None,
    average: bool = True,
) -> Sweep:
    """Score each layer by itself, then fusions of them.

    Args:
        features: Layers by name. Floating, ``(N, D)``, or ``(N, P, D)`` for vectors at P positions. May read
            from a file where it is indexed: one layer is held at a time, but for those that are concatenated.
        codes: From ``encode_target``, ``(N,)``.
        folds: From ``split_folds``, ``(N,)``.
        task: What the target is.
        kind: What the layers are called in the result.
        top: For each number, that many of the best layers are concatenated, chosen anew for each test fold.
        joined: Further fusions by name: layers to concatenate.
        average: Also score the mean of all layers and the learned weighted mean, if there are two layers or
            more and all have one width.

    Returns:
        Scores by candidate.

    Raises:
        ConfigError: If a fusion names a layer that is not there.
        NonFiniteError: If a feature is NaN or infinite.
        ShapeError: If features and target do not belong together.

    Example:
        >>> codes = np.arange(30) % 2
        >>> told = np.random.default_rng(0).normal(size=(30, 2)) + 8 * codes[:, None]
        >>> found = sweep({"a": told, "b": told * 0 + 1}, codes, np.arange(30) // 10, task="classification")
        >>> [round(layer.metrics["mcc"].mean, 3) for layer in found.layers]
        [1.0, 0.0]
    """
    for name, members in (joined or {}).items():
        if not members or not set(members) <= set(features):
            message = f"fusion {name!r}: {', '.join(members) or 'no layers'}, expected names of given layers"
            raise ConfigError(message)
    layers: list[Scored] = []
    shapes: set[tuple[int, ...]] = set()
    for name in features:
        block = check_block(features[name], num_rows=len(codes), name=name)
        shapes.add(block.shape[1:])
        layers.append(score_block(name, block, codes, folds, task=task, kind=kind, members=(name,)))
        logger.info("%s: %s", name, shown(layers[-1], task))
    fusions, mix = [], {}
    if len(layers) > 1:
        num_folds = int(folds.max()) + 1
        best = [sorted(layers, key=lambda layer: -layer.inner[fold]) for fold in range(num_folds)]
        groups = {
            f"best {number} layers concatenated": [
                tuple(one.name for one in best[fold][:number]) for fold in range(num_folds)
            ]
            for number in sorted(set(top))
            if number <= len(layers)
        }
        groups |= {name: [tuple(members)] * num_folds for name, members in (joined or {}).items()}
        fusions = [
            _concatenate(name, members, features, codes, folds, task) for name, members in groups.items()
        ]
        if average and len(shapes) == 1:
            fusions += _average(features, codes, folds, task)
            mix = learn_mix(features, codes, folds, task=task)
    for fusion in fusions:
        logger.info("%s: %s", fusion.name, shown(fusion, task))
    return Sweep(layers=tuple(layers), fusions=tuple(fusions), mix=mix)


def score_block(
    name: str,
    block: NDArray[np.floating],
    codes: NDArray[np.generic],
    folds: NDArray[np.int64],
    *,
    task: ProbeTask,
    kind: CandidateKind,
    members: tuple[str, ...] = (),
) -> Scored:
    """Score one matrix on all folds."""
    found = [score_fold([block], codes, folds, fold, task=task) for fold in range(int(folds.max()) + 1)]
    return _scored(name, kind, found, [members] * len(found) if members else [])


def choose_inside(candidates: Sequence[Scored], *, task: ProbeTask) -> InsideChoice:
    """Choose a candidate for each test fold by its inner folds, and take its score on the test fold."""
    if not candidates:
        message = "candidates: none, expected at least one; name a layer"
        raise ConfigError(message)
    best = np.argmax([candidate.inner for candidate in candidates], axis=0)
    return InsideChoice(
        metrics=summarize_metrics(
            [
                {name: candidates[index].metrics[name].values[fold] for name in METRICS[task]}
                for fold, index in enumerate(best)
            ]
        ),
        chosen=tuple(candidates[index].name for index in best),
    )


def shown(scored: Scored | InsideChoice, task: ProbeTask) -> str:
    """Write the first metric as text."""
    summary = scored.metrics[METRICS[task][0]]
    return f"{METRIC_WORDS[METRICS[task][0]]} {summary.mean:.3f} +- {summary.sd:.3f}"


def _scored(
    name: str, kind: CandidateKind, found: Sequence[FoldScore], members: Sequence[tuple[str, ...]]
) -> Scored:
    return Scored(
        name=name,
        kind=kind,
        metrics=summarize_metrics([score.metrics for score in found]),
        inner=tuple(score.inner for score in found),
        members=tuple(members),
        num_features=found[-1].num_features,
    )


def _concatenate(
    name: str,
    members: Sequence[tuple[str, ...]],
    features: Mapping[str, NDArray[np.floating]],
    codes: NDArray[np.generic],
    folds: NDArray[np.int64],
    task: ProbeTask,
) -> Scored:
    """Score layers that are concatenated; which ones may differ from test fold to test fold."""
    found = [
        score_fold([np.asarray(features[layer]) for layer in layers], codes, folds, fold, task=task)
        for fold, layers in enumerate(members)
    ]
    return _scored(name, "fusion", found, members)


def _average(
    features: Mapping[str, NDArray[np.floating]],
    codes: NDArray[np.generic],
    folds: NDArray[np.int64],
    task: ProbeTask,
) -> list[Scored]:
    """Score the mean of all layers, and the mean whose weights are learned outside each test fold."""
    names = tuple(features)
    equal = mix_layers(features, dict.fromkeys(names, 1 / len(names)))
    plain = score_block(MEAN, equal, codes, folds, task=task, kind="fusion", members=names)
    found = []
    for fold in range(int(folds.max()) + 1):
        weights = learn_mix(features, codes, folds, task=task, without=fold)
        found.append(score_fold([mix_layers(features, weights)], codes, folds, fold, task=task))
    return [plain, _scored(MIX, "fusion", found, [names] * len(found))]
