"""Linear models on frozen features: folds, fits on some rows, and scores on the others.

Folds are numbers: ``folds[row]`` is the fold in which the row is tested. Where something has to be chosen for
one fold (a layer, a penalty), the *other* folds take turns as its inner folds; so inner folds keep to the
same groups as outer ones, and no choice ever sees the rows that it is scored on.

Features are *blocks* that are concatenated: a matrix ``(N, D)``, or vectors at positions ``(N, P, D)``, which
are first reduced to their principal components (the same axes for all positions). Everything that is learned
(axes, means, deviations, weights) is learned from the training rows.

N rows, D features, P positions.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genoembed.config.probe import MIN_FOLDS
from genoembed.errors import ConfigError, MissingExtraError, NonFiniteError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import ProbeTask


METRICS: Mapping[str, tuple[str, ...]] = {
    "classification": ("mcc", "accuracy", "macro_f1"),
    "regression": ("r2", "pearson", "spearman"),
}
"""Metrics of each task; the first one decides where something has to be chosen."""
METRIC_WORDS: Mapping[str, str] = {
    "mcc": "MCC",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "r2": "R2",
    "pearson": "Pearson",
    "spearman": "Spearman",
}
"""Metrics as people write them."""
LOGISTIC_C = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse penalties on the sum of the losses, as in scikit-learn; each fit starts from the one before."""
RIDGE_PENALTIES = (10.0, 1.0, 1e-1, 1e-2, 1e-3)
"""Penalties on the mean of the squared errors of standardized features."""
COMPONENTS = 32
"""Principal components that are kept of the vector at each position."""

_NUM_QUANTILES = 10
_NUM_INNER_FOLDS = 2
"""Inner folds that a penalty is chosen on: fits are expensive, and more folds hardly change the choice."""
_MAX_STEPS = 300
_TOLERANCE = 1e-3


# ---------------------------------------------------------------------------------------------------- folds


def split_folds(
    target: NDArray[np.generic],
    *,
    task: ProbeTask = "classification",
    groups: Sequence[object] | NDArray[np.generic] | None = None,
    num_folds: int = 5,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Assign rows to folds of similar composition.

    Classes (for regression: tenths of the ranks) are spread evenly over the folds. Rows of one group
    always share a fold.

    Example:
        >>> folds = split_folds(np.array(["a", "b"] * 6), groups=[0, 0, 1, 1, 2, 2] * 2, num_folds=3)
        >>> folds[:6].tolist() == folds[6:].tolist(), sorted(set(folds.tolist()))
        (True, [0, 1, 2])
    """
    target = np.asarray(target)
    if target.ndim != 1 or (groups is not None and len(groups) != len(target)):
        found = f"target of shape {target.shape}" + ("" if groups is None else f" and {len(groups)} groups")
        message = f"{found}, expected one of each per row"
        raise ShapeError(message)
    try:
        from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
    except ImportError as error:
        raise MissingExtraError(package="scikit-learn", extra="analysis", purpose="a probe") from error
    numbers = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    check_counts(target, task, None if numbers is None else len(np.unique(numbers)), num_folds)
    strata = target if task == "classification" else _quantile_bins(target, num_folds)
    splitter = StratifiedKFold if numbers is None else StratifiedGroupKFold
    folds = np.full(len(target), -1, dtype=np.int64)
    parts = splitter(num_folds, shuffle=True, random_state=seed).split(strata, strata, numbers)
    for fold, (_, test) in enumerate(parts):
        folds[test] = fold
    _check_folds(folds, target, task, num_folds)
    return folds


def inner_folds(folds: NDArray[np.int64], fold: int) -> list[int]:
    """List the folds that may be chosen on while one is held out.

    Example:
        >>> inner_folds(np.array([0, 1, 2, 3]), 1)
        [2, 3, 0]
    """
    numbers = [int(number) for number in np.unique(folds)]
    at = numbers.index(fold)
    # each fold begins with the next one, so that all folds are chosen on equally often
    return numbers[at + 1 :] + numbers[:at]


def check_counts(
    target: NDArray[np.generic],
    task: ProbeTask,
    num_groups: int | None,
    num_folds: int,
    *,
    name: str = "target",
) -> None:
    """Raise if there are too few classes, or rows of one, for the folds."""
    if num_folds < MIN_FOLDS:
        message = f"num_folds: {num_folds}, expected {MIN_FOLDS} or more; set num_folds to {MIN_FOLDS}"
        raise ConfigError(message)
    if task == "classification":
        classes, counts = np.unique(target, return_counts=True)
        if len(classes) < 2:
            found = f"one class ({classes[0]})" if len(classes) else "no label"
            message = f"{name}: {found}, expected two classes or more; check the labels"
            raise ConfigError(message)
        if counts.min() < num_folds:
            rarest, number = classes[counts.argmin()], int(counts.min())
            message = (
                f"{name}: class {rarest} has {number} row{'s' * (number != 1)}, expected at least num_folds "
                f"({num_folds}); set num_folds lower, or leave the class out"
            )
            raise ConfigError(message)
    elif len(target) < 2 * num_folds:
        message = f"{name}: {len(target)} values, expected at least twice num_folds ({num_folds}); add rows"
        raise ConfigError(message)
    if num_groups is not None and num_groups < num_folds:
        message = (
            f"groups: {num_groups} groups, expected at least num_folds ({num_folds}); set num_folds lower"
        )
        raise ConfigError(message)


def _check_folds(
    folds: NDArray[np.int64], target: NDArray[np.generic], task: ProbeTask, num_folds: int
) -> None:
    """Reject folds that grouping left without rows, or without a class to learn."""
    for fold in range(num_folds):
        # what is left to learn from when this fold is tested and the next one is chosen on
        fitted = (folds != fold) & (folds != (fold + 1) % num_folds)
        is_poor = task == "classification" and len(np.unique(target[fitted])) < len(np.unique(target))
        # R2 compares with the mean of the fold, which needs two rows
        fewest, filled_with = (1, "rows of every class") if task == "classification" else (2, "2 rows each")
        if is_poor or (folds == fold).sum() < fewest:
            message = (
                f"groups: too few or too large to fill {num_folds} folds with {filled_with}; "
                "set num_folds lower, or use finer groups"
            )
            raise ConfigError(message)


def _quantile_bins(values: NDArray[np.generic], num_folds: int) -> NDArray[np.int64]:
    """Split the ranks into ten bins, or fewer, so that each bin has a row for every fold."""
    from scipy.stats import rankdata

    num_bins = min(_NUM_QUANTILES, len(values) // num_folds)
    ranks: NDArray[np.int64] = rankdata(values, method="ordinal").astype(np.int64) - 1
    return (ranks * num_bins) // len(values)


# ------------------------------------------------------------------------------------------------- features


def check_block(block: NDArray[np.floating], *, num_rows: int, name: str) -> NDArray[np.floating]:
    """Reject features that no model can be fitted on."""
    block = np.asarray(block)
    if block.ndim not in (2, 3) or len(block) != num_rows or 0 in block.shape:
        message = f"{name}: shape {block.shape}, expected ({num_rows}, D) or ({num_rows}, P, D)"
        raise ShapeError(message)
    if not (is_finite := np.isfinite(block).reshape(num_rows, -1).all(axis=1)).all():
        problem = f"{name}: NaN or infinite, expected finite features; embed in float32, or leave it out"
        raise NonFiniteError(problem, record_id=str(int(np.argmin(is_finite))))
    return block


def encode_target(target: NDArray[np.generic], *, task: ProbeTask) -> NDArray[np.generic]:
    """Number the classes, or take the values as float64.

    Example:
        >>> encode_target(np.array(["b", "a", "b"]), task="classification").tolist()
        [1, 0, 1]
    """
    if task == "classification":
        codes: NDArray[np.int64] = np.unique(target, return_inverse=True)[1].reshape(-1).astype(np.int64)
        return codes
    try:
        values = np.asarray(target).astype(np.float64)
    except ValueError as error:
        message = f"target: {error}, expected one number per row; set task to 'classification' for classes"
        raise ConfigError(message) from error
    if not (is_finite := np.isfinite(values)).all():
        message = f"target: row {int(np.argmin(is_finite))} is not finite; leave the row out"
        raise ConfigError(message)
    return values


def prepare(
    blocks: Sequence[NDArray[np.floating]], train: NDArray[np.bool_], test: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Concatenate blocks and standardize them by the training rows; return training and test rows.

    Example:
        >>> is_first = np.array([True, True, False])
        >>> prepare([np.array([[0.0], [2.0], [5.0]])], is_first, ~is_first)[1].tolist()
        [[4.0]]
    """
    from sklearn.preprocessing import StandardScaler

    parts = [
        block.astype(np.float64) if block.ndim == 2 else _principal_components(block, train)
        for block in blocks
    ]
    features = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    scaler = StandardScaler()
    return scaler.fit_transform(features[train]), scaler.transform(features[test])


def _principal_components(vectors: NDArray[np.floating], train: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Project the vector at each position onto the directions of most variance over all positions."""
    from sklearn.decomposition import PCA

    flat = vectors[train].reshape(-1, vectors.shape[-1])
    # by the covariance matrix: positions are many, and a decomposition of all of them would hold a copy
    pca = PCA(min(COMPONENTS, *flat.shape), svd_solver="covariance_eigh").fit(flat.astype(np.float32))
    projected = pca.transform(vectors.reshape(-1, vectors.shape[-1]).astype(np.float32))
    return np.asarray(projected.reshape(len(vectors), -1), dtype=np.float64)


# --------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSummary:
    """One metric over the test folds (over the seeds, in a few-shot protocol)."""

    mean: float
    sd: float
    """Standard deviation: with n - 1 in the denominator over folds, with n over seeds."""
    values: tuple[float, ...]
    """The metric in each fold, or with each seed."""


def measure_predictions(
    true: NDArray[np.generic], predicted: NDArray[np.generic], *, task: ProbeTask
) -> dict[str, float]:
    """Compare predictions with the truth, by all metrics of the task.

    Correlations are 0 where one side is constant, as the Matthews correlation is by convention, and so is
    any metric that is undefined, as R2 of one row. Macro-F1 is the mean over the classes that occur on either
    side.

    Example:
        >>> true, predicted = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0])
        >>> measure_predictions(true, predicted, task="classification")["accuracy"]
        0.75
    """
    return {name: _measure_one(name, true, predicted) for name in METRICS[task]}


def _measure_one(metric: str, true: NDArray[np.generic], predicted: NDArray[np.generic]) -> float:
    from scipy import stats
    from sklearn import metrics

    is_constant = bool((true == true[0]).all() or (predicted == predicted[0]).all())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that only one side has, and of nearly constant values
        if metric == "mcc":
            found = metrics.matthews_corrcoef(true, predicted)
        elif metric == "accuracy":
            found = metrics.accuracy_score(true, predicted)
        elif metric == "macro_f1":
            found = metrics.f1_score(true, predicted, average="macro", zero_division=0)
        elif metric == "r2":
            found = metrics.r2_score(true, predicted)
        elif is_constant:
            found = 0.0
        else:
            correlate = stats.pearsonr if metric == "pearson" else stats.spearmanr
            found = correlate(true, predicted).statistic
    # a report is JSON, which has no NaN, and no candidate compares with it
    return float(found) if np.isfinite(found) else 0.0


def summarize_metrics(scores: Sequence[Mapping[str, float]], *, ddof: int = 1) -> dict[str, MetricSummary]:
    """Collect the metrics of the folds.

    Example:
        >>> summarize_metrics([{"mcc": 0.5}, {"mcc": 0.7}])["mcc"].mean
        0.6
    """
    columns = {name: [float(score[name]) for score in scores] for name in scores[0]}
    return {
        name: MetricSummary(
            mean=float(np.mean(values)), sd=float(np.std(values, ddof=ddof)), values=tuple(values)
        )
        for name, values in columns.items()
    }


# ----------------------------------------------------------------------------------------------------- fits


class FoldScore(NamedTuple):
    """What a model reached on one test fold."""

    metrics: dict[str, float]
    inner: float
    """The first metric of the task on the inner folds: what a choice may look at."""
    penalty: float
    """``C`` of the logistic regression, or the penalty of the ridge regression."""
    num_features: int


def score_fold(
    blocks: Sequence[NDArray[np.floating]],
    codes: NDArray[np.generic],
    folds: NDArray[np.int64],
    fold: int,
    *,
    task: ProbeTask,
) -> FoldScore:
    """Choose a penalty on inner folds, fit on all rows outside one fold, and score that fold."""
    penalties = LOGISTIC_C if task == "classification" else RIDGE_PENALTIES
    metric = METRICS[task][0]
    inner = np.zeros(len(penalties))
    chosen_on = inner_folds(folds, fold)[:_NUM_INNER_FOLDS]
    for other in chosen_on:
        train, test = (folds != fold) & (folds != other), folds == other
        fitted, tested = prepare(blocks, train, test)
        guesses = predict_by_penalty(fitted, codes[train], tested, task=task, penalties=penalties)
        inner += [_measure_one(metric, codes[test], guess) for guess in guesses]
    best = int(np.argmax(inner))
    train, test = folds != fold, folds == fold
    fitted, tested = prepare(blocks, train, test)
    # the path up to the chosen penalty, so that the last fit starts where it did when it was chosen
    guesses = predict_by_penalty(fitted, codes[train], tested, task=task, penalties=penalties[: best + 1])
    return FoldScore(
        metrics=measure_predictions(codes[test], guesses[-1], task=task),
        inner=float(inner[best]) / len(chosen_on),
        penalty=penalties[best],
        num_features=fitted.shape[1],
    )


def predict_by_penalty(
    train: NDArray[np.float64],
    target: NDArray[np.generic],
    test: NDArray[np.float64],
    *,
    task: ProbeTask,
    penalties: Sequence[float],
) -> list[NDArray[np.generic]]:
    """Fit to standardized features with each penalty, and return predictions by penalty."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    if task == "regression":
        # scikit-learn's penalty is on the sum of the squared errors, ours on their mean
        return [Ridge(alpha=penalty * len(train)).fit(train, target).predict(test) for penalty in penalties]
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
