"""Logistic regression on all training rows, on ten a class and on one a class, scored on held-out rows.

The protocol of the benchmark GENEB (arXiv 2606.04525): features as they are, not standardised; scikit-learn's
logistic regression with its default penalty (C = 1); rows drawn by class, for five seeds. Mean and deviation
(of the population, n in the denominator) are over the seeds.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from genoembed.errors import ConfigError
from genoembed.probing.folds import missing_scikit_learn
from genoembed.probing.linear import measure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


SEEDS = (13, 17, 42, 123, 997)
SHOTS: Mapping[str, int | None] = {"full": None, "10-shot": 10, "1-shot": 1}
"""Training rows of each class by name of the regime; None takes all."""
_MAX_STEPS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotSummary:
    """One metric over the seeds."""

    mean: float
    sd: float
    """Standard deviation over seeds, with n in the denominator."""
    seeds: tuple[float, ...]
    """The metric by seed."""


def score_shots(
    features: NDArray[np.floating],
    codes: NDArray[np.int64],
    is_test: NDArray[np.bool_],
    *,
    seeds: Sequence[int] = SEEDS,
    shots: Mapping[str, int | None] = SHOTS,
) -> dict[str, dict[str, ShotSummary]]:
    """Fit on few and on all training rows, and score the test rows.

    Where all rows are used, seeds change nothing: there is one fit, and the deviation is 0.

    Example:
        >>> codes = np.arange(40) % 2
        >>> scores = score_shots(np.eye(2)[codes] * 9, codes, np.arange(40) >= 20)
        >>> list(scores), scores["1-shot"]["mcc"].mean
        (['full', '10-shot', '1-shot'], 1.0)
    """
    rows = np.flatnonzero(~is_test)
    if not is_test.any() or len(np.unique(codes[rows])) < 2:
        message = (
            f"split: {int(is_test.sum())} test rows and {len(np.unique(codes[rows]))} classes to train on, "
            "expected test rows and two classes or more; check the split"
        )
        raise ConfigError(message)
    results = {}
    for regime, shot in shots.items():
        # without drawing, every seed gives the same fit
        drawn = [rows] if shot is None else [_draw(codes, rows, shot, seed) for seed in seeds]
        scores = [_score(features, codes, chosen, is_test) for chosen in drawn]
        scores *= len(seeds) if shot is None else 1
        results[regime] = {name: _summarize([score[name] for score in scores]) for name in scores[0]}
    return results


def _draw(codes: NDArray[np.int64], rows: NDArray[np.int64], shot: int, seed: int) -> NDArray[np.int64]:
    """Draw so many rows of each class, fewer where it has fewer, class by class."""
    # the legacy generator, because the benchmark's rows are those that it draws
    random = np.random.RandomState(seed)
    parts = []
    for code in np.unique(codes[rows]):
        members = np.flatnonzero(codes[rows] == code)
        parts.append(rows[random.choice(members, size=min(shot, len(members)), replace=False)])
    return np.concatenate(parts)


def _score(
    features: NDArray[np.floating],
    codes: NDArray[np.int64],
    train: NDArray[np.int64],
    is_test: NDArray[np.bool_],
) -> dict[str, float]:
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise missing_scikit_learn() from error
    classifier = LogisticRegression(max_iter=_MAX_STEPS)
    with warnings.catch_warnings():
        # features as they are can be badly scaled; what 1,000 steps reach is what the protocol scores
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(features[train], codes[train])
    return measure(codes[is_test], classifier.predict(features[is_test]), task="classification")


def _summarize(values: Sequence[float]) -> ShotSummary:
    return ShotSummary(mean=float(np.mean(values)), sd=float(np.std(values)), seeds=tuple(values))
