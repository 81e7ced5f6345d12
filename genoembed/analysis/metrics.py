"""How good predictions are, by fold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.analysis.folds import Task

METRICS: Mapping[str, tuple[str, ...]] = {
    "classification": ("mcc", "accuracy", "macro_f1"),
    "regression": ("r2", "pearson", "spearman"),
}
"""Metrics of each task; the first one decides where something has to be chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSummary:
    """One metric over the test folds."""

    mean: float
    sd: float
    """Standard deviation over folds, with n - 1 in the denominator."""
    folds: tuple[float, ...]
    """The metric in each fold."""


def measure(true: NDArray[np.generic], predicted: NDArray[np.generic], *, task: Task) -> dict[str, float]:
    """Compare predictions with the truth.

    Correlations are 0 where one side is constant, as the Matthews correlation is by convention. Macro-F1 is
    the mean over the classes that occur on either side.

    Example:
        >>> measure(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]), task="classification")["accuracy"]
        0.75
    """
    if task == "classification":
        return _measure_classes(_confusion(true, predicted))
    truth, guess = true.astype(np.float64), predicted.astype(np.float64)
    spread = float(((truth - truth.mean()) ** 2).sum())
    return {
        "r2": 1 - float(((truth - guess) ** 2).sum()) / spread if spread else 0.0,
        "pearson": _correlation(truth, guess),
        "spearman": _correlation(_ranks(truth), _ranks(guess)),
    }


def summarize(by_fold: Sequence[Mapping[str, float]]) -> dict[str, MetricSummary]:
    """Collect the metrics of the folds.

    Example:
        >>> summarize([{"mcc": 0.5}, {"mcc": 0.7}])["mcc"].mean
        0.6
    """
    summaries = {}
    for name in by_fold[0]:
        values = [float(fold[name]) for fold in by_fold]
        summaries[name] = MetricSummary(
            mean=float(np.mean(values)), sd=float(np.std(values, ddof=1)), folds=tuple(values)
        )
    return summaries


def _confusion(true: NDArray[np.generic], predicted: NDArray[np.generic]) -> NDArray[np.float64]:
    classes, codes = np.unique(np.concatenate([true, predicted]), return_inverse=True)
    table = np.zeros((len(classes), len(classes)))
    np.add.at(table, (codes[: len(true)], codes[len(true) :]), 1)
    return table


def _measure_classes(table: NDArray[np.float64]) -> dict[str, float]:
    total, hits = table.sum(), np.diag(table)
    in_truth, in_guess = table.sum(axis=1), table.sum(axis=0)
    covariance = hits.sum() * total - in_truth @ in_guess
    scale = np.sqrt((total**2 - in_truth @ in_truth) * (total**2 - in_guess @ in_guess))
    return {
        "mcc": float(covariance / scale) if scale else 0.0,
        "accuracy": float(hits.sum() / total),
        "macro_f1": float(np.mean(2 * hits / (in_truth + in_guess))),
    }


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    first, second = first - first.mean(), second - second.mean()
    scale = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / scale) if scale > 0 else 0.0


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank from 0, ties sharing their mean rank."""
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[codes]
