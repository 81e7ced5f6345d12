"""The nested linear probe: which layer and pooling carry a label, scored without a selection leak.

For each test fold, every candidate is screened on the other folds alone (ridge, see
:mod:`genoembed.probing.screen`), the best few are laid side by side as further candidates, and the winners
are compared by the final model (logistic regression; ridge for values), again on the other folds alone. Only
then is the one that was chosen fitted on all the other folds and scored on the test fold.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from genoembed.config.probe import TOP
from genoembed.errors import ConfigError
from genoembed.probing.folds import split_folds
from genoembed.probing.linear import METRICS, MetricSummary, score_fold, summarize
from genoembed.probing.preparation import COMPONENTS, check_block, check_components, encode_target
from genoembed.probing.screen import ScreenScores, screen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import ProbeTask


logger = logging.getLogger(__name__)

"""How many of the best candidates are laid side by side."""
FINALISTS = 3
"""How many candidates the final model compares."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateScore:
    """One candidate in the screen, whether it was chosen or not."""

    name: str
    members: tuple[str, ...]
    """The features it is made of."""
    score: MetricSummary
    """The first metric of the task on the test folds, by the quick model of the screen. To look at and to
    recommend from; the best of many such scores is flattered, ``ProbeResult.metrics`` is not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What was chosen for one test fold, without looking at it."""

    fold: int
    members: tuple[str, ...]
    """Features that were laid side by side; one, where a single one was best."""
    penalty: float
    """``C`` of the logistic regression, or the penalty of the ridge regression."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """What the features are worth for a label."""

    task: ProbeTask
    metrics: Mapping[str, MetricSummary]
    """Honest scores on the test folds: everything was chosen inside the training folds."""
    choices: tuple[Choice, ...]
    """One a test fold."""
    candidates: tuple[CandidateScore, ...]
    """Every candidate, in the order given, fusions last."""
    num_rows: int
    num_folds: int
    is_grouped: bool
    """Whether rows of one group were kept in one fold."""
    seed: int

    @property
    def recommended(self) -> CandidateScore:
        """The candidate to use on all rows: the best mean in the screen, the first of equals."""
        return max(self.candidates, key=lambda candidate: candidate.score.mean)


def probe(
    features: Mapping[str, NDArray[np.floating]],
    target: Sequence[object] | NDArray[np.generic],
    *,
    task: ProbeTask = "classification",
    groups: Sequence[object] | NDArray[np.generic] | None = None,
    fusions: Mapping[str, Sequence[str]] | None = None,
    top: Sequence[int] = TOP,
    finalists: int = FINALISTS,
    components: int = COMPONENTS,
    num_folds: int = 5,
    seed: int = 0,
) -> ProbeResult:
    """Score features of which the best are chosen inside the training folds.

    Args:
        features: Candidates by name. Each is floating, ``(N, D)``, or ``(N, P, D)`` for vectors at positions
            (see ``cross_validate``). May read from a file where it is indexed: one is held at a time, but
            for those that are laid side by side.
        target: Classes or values, ``(N,)``.
        task: What the target is.
        groups: Group of each row; rows of a group share a fold.
        fusions: Further candidates: names of features to lay side by side.
        top: For each number, the so many best single features of a training fold are laid side by side, as a
            further candidate there.
        finalists: Candidates that the final model compares, at least 1.
        components: Principal components that are kept of the vector at each position.
        num_folds: Test folds, at least 3.
        seed: Of the folds; the same seed gives the same result.

    Returns:
        Scores, choices and a table of all candidates.

    Raises:
        ConfigError: If options are wrong, a fusion names no feature, or the rows cannot fill the folds.
        NonFiniteError: If a feature is NaN or infinite.
        ShapeError: If features and target do not belong together.
        MissingExtraError: If scikit-learn is not installed.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> labels = np.arange(60) % 2
        >>> told = rng.normal(size=(60, 3)) + 4 * labels[:, None]
        >>> result = probe({"noise": rng.normal(size=(60, 3)), "told": told}, labels)
        >>> result.recommended.name, result.metrics["accuracy"].mean
        ('told', 1.0)
    """
    values = np.asarray(target)
    named = {name: (name,) for name in features} | {
        name: tuple(members) for name, members in (fusions or {}).items()
    }
    _check_options(features, fusions or {}, finalists=finalists, top=top, components=components)
    folds = split_folds(values, task=task, groups=groups, num_folds=num_folds, seed=seed)
    codes = encode_target(values, task=task)

    def load(members: Sequence[str]) -> list[NDArray[np.floating]]:
        return [check_block(features[name], num_rows=len(codes), name=name) for name in members]

    scores: dict[tuple[str, ...], ScreenScores] = {}
    for number, members in enumerate(named.values(), start=1):
        scores[members] = screen(load(members), codes, folds, task=task, components=components)
        logger.debug("screened %d of %d: %s", number, len(named), " + ".join(members))
    results, choices = [], []
    for fold in range(num_folds):
        mixed = _top_members(scores, fold, top)
        for members in mixed:
            if members not in scores:
                scores[members] = screen(load(members), codes, folds, task=task, components=components)
        allowed = dict.fromkeys([*named.values(), *mixed])
        ranked = sorted(allowed, key=lambda members: -scores[members].chosen_by(fold))[:finalists]
        found = score_fold(
            [load(members) for members in ranked], codes, folds, fold, task=task, components=components
        )
        results.append(found.metrics)
        choices.append(Choice(fold=fold, members=ranked[found.chosen], penalty=found.penalty))
        logger.debug("fold %d: %s", fold, " + ".join(choices[-1].members))
    metric = METRICS[task][0]
    return ProbeResult(
        task=task,
        metrics=summarize(results),
        choices=tuple(choices),
        candidates=tuple(
            CandidateScore(
                name=name,
                members=members,
                score=summarize([{metric: float(value)} for value in scores[members].outer])[metric],
            )
            for name, members in named.items()
        ),
        num_rows=len(values),
        num_folds=num_folds,
        is_grouped=groups is not None,
        seed=seed,
    )


def _check_options(
    features: Mapping[str, NDArray[np.floating]],
    fusions: Mapping[str, Sequence[str]],
    *,
    finalists: int,
    top: Sequence[int],
    components: int,
) -> None:
    check_components(components)
    problems = []
    if not features:
        problems.append("features: none, expected at least one; give one matrix a layer")
    if finalists < 1:
        problems.append(f"finalists: {finalists}, expected 1 or more; set finalists to {FINALISTS}")
    if any(number < 2 for number in top):
        problems.append(f"top: {list(top)}, expected numbers of 2 or more; set top to {list(TOP)}")
    for name, members in fusions.items():
        missing = [member for member in members if member not in features]
        if missing or not members:
            what = f"{missing[0]!r} is not among the features" if missing else "no features"
            problems.append(f"fusion {name!r}: {what}; name features that are given")
        elif name in features:
            problems.append(f"fusion {name!r}: a feature has this name; use another name")
    if problems:
        raise ConfigError(*problems)


def _top_members(
    scores: Mapping[tuple[str, ...], ScreenScores], fold: int, top: Sequence[int]
) -> list[tuple[str, ...]]:
    """Put the best single features of a test fold's training rows together."""
    singles = [members for members in scores if len(members) == 1]
    ranked = sorted(singles, key=lambda members: -scores[members].chosen_by(fold))
    return [
        tuple(name for (name,) in ranked[:number]) for number in sorted(set(top)) if number <= len(ranked)
    ]
