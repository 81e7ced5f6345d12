"""How good predictions are, by fold.

Linear models on frozen features: fitted on some rows, scored on others.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genoembed.probing.folds import inner_folds, missing_scikit_learn
from genoembed.probing.preparation import (
    COMPONENTS,
    check_block,
    check_components,
    encode_target,
    lay_out,
    standardize,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import ProbeTask


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


def measure(
    true: NDArray[np.generic], predicted: NDArray[np.generic], *, task: ProbeTask
) -> dict[str, float]:
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


LOGISTIC_C = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse penalties on the sum of the losses, as in scikit-learn; each fit starts from the one before."""
RIDGE_PENALTIES = (10.0, 1.0, 1e-1, 1e-2, 1e-3)
"""Penalties on the mean of the squared errors of standardised features."""
_INNER_FOLDS = 2
"""Inner folds that the final model is chosen on: its fits are dear, and more hardly change the choice."""
_MAX_STEPS = 300
_TOLERANCE = 1e-3


class FoldScore(NamedTuple):
    """What a model reached on one test fold."""

    metrics: dict[str, float]
    chosen: int
    """Which of several sets of blocks was taken."""
    penalty: float
    """``C`` of the logistic regression, or the penalty of the ridge regression."""
    inner: float
    """The first metric of the task on the inner folds, for what was chosen: what a choice may look at."""


def cross_validate(
    features: NDArray[np.floating] | Sequence[NDArray[np.floating]],
    target: NDArray[np.generic],
    folds: NDArray[np.int64],
    *,
    task: ProbeTask = "classification",
    components: int = COMPONENTS,
) -> dict[str, MetricSummary]:
    """Score features: logistic regression for classes, ridge regression for values.

    The penalty is chosen for each test fold by the first metric of the task on other folds.

    Example:
        >>> features = np.eye(2)[[0, 1] * 6]
        >>> folds = np.arange(12) // 4
        >>> cross_validate(features, np.array(["a", "b"] * 6), folds)["accuracy"].mean
        1.0
    """
    check_components(components)
    blocks = [features] if isinstance(features, np.ndarray) else features
    checked = [check_block(block, num_rows=len(target), name="features") for block in blocks]
    codes = encode_target(target, task=task)
    return summarize(
        [
            score_fold([checked], codes, folds, int(fold), task=task, components=components).metrics
            for fold in np.unique(folds)
        ]
    )


def score_fold(
    choices: Sequence[Sequence[NDArray[np.floating]]],
    codes: NDArray[np.generic],
    folds: NDArray[np.int64],
    fold: int,
    *,
    task: ProbeTask,
    components: int = COMPONENTS,
) -> FoldScore:
    """Choose blocks and penalty on inner folds, fit on all rows outside one fold, and score it."""
    penalties = LOGISTIC_C if task == "classification" else RIDGE_PENALTIES
    metric = METRICS[task][0]
    inner = np.zeros((len(choices), len(penalties)))
    for number, blocks in enumerate(choices):
        for other in inner_folds(folds, fold)[:_INNER_FOLDS]:
            train, test = (folds != fold) & (folds != other), folds == other
            fitted, tested = standardize(lay_out(blocks, train, components=components), train, test)
            guesses = predict(fitted, codes[train], tested, task=task, penalties=penalties)
            inner[number] += [measure(codes[test], guess, task=task)[metric] for guess in guesses]
    chosen, best = (int(index) for index in np.unravel_index(np.argmax(inner), inner.shape))
    train, test = folds != fold, folds == fold
    fitted, tested = standardize(lay_out(choices[chosen], train, components=components), train, test)
    # the path up to the chosen penalty, so that the last fit starts where it did when it was chosen
    guesses = predict(fitted, codes[train], tested, task=task, penalties=penalties[: best + 1])
    inner_score = float(inner[chosen, best]) / len(inner_folds(folds, fold)[:_INNER_FOLDS])
    return FoldScore(measure(codes[test], guesses[-1], task=task), chosen, penalties[best], inner_score)


def predict(
    train: NDArray[np.float64],
    target: NDArray[np.generic],
    test: NDArray[np.float64],
    *,
    task: ProbeTask,
    penalties: Sequence[float],
) -> list[NDArray[np.generic]]:
    """Fit with each penalty and predict.

    Args:
        train: Standardised features to fit on, ``(N, D)``.
        target: From ``encode_target``, ``(N,)``.
        test: Standardised features to predict for.
        task: What the target is.
        penalties: ``C`` of the logistic regression, or penalties of the ridge regression.

    Returns:
        Predictions by penalty.

    Raises:
        MissingExtraError: If scikit-learn is needed and not installed.
    """
    if task == "regression":
        wanted = target.astype(np.float64)[:, None]
        return [guess[:, 0] for guess in ridge_predictions(train, wanted, test, penalties)]
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise missing_scikit_learn() from error
    narrow, narrow_test = train.astype(np.float32), test.astype(np.float32)
    classifier = LogisticRegression(max_iter=_MAX_STEPS, tol=_TOLERANCE, warm_start=True)
    guesses = []
    for penalty in penalties:
        with warnings.catch_warnings():
            # a fit that stops early is one with a slightly stronger penalty, and is scored as what it is
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.set_params(C=penalty).fit(narrow, target)
        guesses.append(classifier.predict(narrow_test))
    return guesses


def solve_ridge(gram: NDArray[np.float64], right: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
    """Solve the normal equations of a ridge regression.

    Example:
        >>> solve_ridge(np.eye(2), np.array([[1.0], [2.0]]), 1.0).ravel().tolist()
        [0.5, 1.0]
    """
    damped = gram.copy()
    damped.flat[:: len(gram) + 1] += penalty
    return np.linalg.solve(damped, right).astype(np.float64)


def ridge_weights(
    train: NDArray[np.float64], wanted: NDArray[np.float64], penalty: float
) -> NDArray[np.float64]:
    """Fit a ridge regression by the smaller of the two Gram matrices.

    Example:
        >>> ridge_weights(np.array([[-1.0], [1.0]]), np.array([[-2.0], [2.0]]), 1.0).tolist()
        [[1.0]]
    """
    num_rows = len(train)
    if train.shape[1] > num_rows:
        inner: NDArray[np.float64] = solve_ridge(train @ train.T / num_rows, wanted / num_rows, penalty)
        return train.T @ inner
    return solve_ridge(train.T @ train / num_rows, train.T @ wanted / num_rows, penalty)


def ridge_predictions(
    train: NDArray[np.float64],
    wanted: NDArray[np.float64],
    test: NDArray[np.float64],
    penalties: Sequence[float],
) -> list[NDArray[np.float64]]:
    """Fit ridge regressions by the smaller of the two Gram matrices, and predict.

    Example:
        >>> features = np.array([[-1.0], [1.0]])
        >>> ridge_predictions(features, features * 2 + 1, features, [1.0])[0].ravel().tolist()
        [0.0, 2.0]
    """
    mean, num_rows = wanted.mean(axis=0), len(train)
    if train.shape[1] > num_rows:
        gram, right = train @ train.T / num_rows, (wanted - mean) / num_rows
        between = test @ train.T
        return [between @ solve_ridge(gram, right, penalty) + mean for penalty in penalties]
    gram, right = train.T @ train / num_rows, train.T @ (wanted - mean) / num_rows
    return [test @ solve_ridge(gram, right, penalty) + mean for penalty in penalties]
