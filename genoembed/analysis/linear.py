"""Linear models on frozen features: fitted on some rows, scored on others.

Classes get multinomial logistic regression, values ridge regression. Features are standardised, and penalties
chosen on inner folds (see :mod:`genoembed.analysis.folds`), separately for each test fold.

N rows, D features, P positions, K columns of the target.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genoembed.analysis.folds import inner_folds, missing_scikit_learn
from genoembed.analysis.metrics import METRICS, measure, summarize
from genoembed.analysis.preparation import (
    COMPONENTS,
    check_block,
    check_components,
    encode_target,
    lay_out,
    standardize,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from genoembed.analysis.folds import Task
    from genoembed.analysis.metrics import MetricSummary

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
    task: Task = "classification",
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
    task: Task,
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
    task: Task,
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
