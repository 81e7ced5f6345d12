"""Which rows are held out together.

Folds are numbers: ``folds[row]`` is the fold in which the row is tested. Where something has to be chosen for
one fold (a layer, a regularisation), the *other* folds take turns as its inner folds; so inner folds keep to
the same groups as outer ones, and no choice ever sees the rows that it is scored on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from genoembed.config.probe import MIN_FOLDS
from genoembed.errors import ConfigError, MissingExtraError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import ProbeTask


_QUANTILES = 10
"""One to test on, one to choose on, one to fit on."""


def split_folds(
    target: NDArray[np.generic],
    *,
    task: ProbeTask = "classification",
    groups: Sequence[object] | NDArray[np.generic] | None = None,
    num_folds: int = 5,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Deal the rows into folds of like composition.

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
    _check_counts(target, task, groups, num_folds)
    try:
        from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
    except ImportError as error:
        raise missing_scikit_learn() from error
    strata = target if task == "classification" else _quantile_bins(target, num_folds)
    splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
    folds = np.full(len(target), -1, dtype=np.int64)
    parts = splitter(num_folds, shuffle=True, random_state=seed).split(
        np.zeros(len(target)), strata, None if groups is None else _numbered(groups)
    )
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
    return numbers[at + 1 :] + numbers[:at]


def missing_scikit_learn() -> MissingExtraError:
    """Say that scikit-learn is missing."""
    return MissingExtraError(package="scikit-learn", extra="analysis", purpose="a probe")


def _check_counts(
    target: NDArray[np.generic],
    task: ProbeTask,
    groups: Sequence[object] | NDArray[np.generic] | None,
    num_folds: int,
) -> None:
    if num_folds < MIN_FOLDS:
        message = f"num_folds: {num_folds}, expected {MIN_FOLDS} or more; set num_folds to {MIN_FOLDS}"
        raise ConfigError(message)
    if task == "classification":
        classes, counts = np.unique(target, return_counts=True)
        if len(classes) < 2:
            message = f"target: {len(classes)} class(es), expected two or more; check the labels"
            raise ConfigError(message)
        if counts.min() < num_folds:
            rarest = classes[counts.argmin()]
            message = (
                f"target: class {rarest} has {counts.min()} rows, expected at least num_folds ({num_folds}); "
                "set num_folds lower, or leave the class out"
            )
            raise ConfigError(message)
    elif len(target) < 2 * num_folds:
        message = f"target: {len(target)} values, expected at least twice num_folds ({num_folds}); add rows"
        raise ConfigError(message)
    if groups is not None and (found := len(np.unique(_numbered(groups)))) < num_folds:
        message = f"groups: {found} groups, expected at least num_folds ({num_folds}); set num_folds lower"
        raise ConfigError(message)


def _check_folds(
    folds: NDArray[np.int64], target: NDArray[np.generic], task: ProbeTask, num_folds: int
) -> None:
    """Refuse folds that grouping left without rows, or without a class to learn."""
    for fold in range(num_folds):
        # what is left to learn from when this fold is tested and the next one is chosen on
        fitted = (folds != fold) & (folds != (fold + 1) % num_folds)
        is_poor = task == "classification" and len(np.unique(target[fitted])) < len(np.unique(target))
        if is_poor or not (folds == fold).any():
            message = (
                f"groups: too few or too large to fill {num_folds} folds with rows of every class; "
                "set num_folds lower, or use finer groups"
            )
            raise ConfigError(message)


def _numbered(groups: Sequence[object] | NDArray[np.generic]) -> NDArray[np.int64]:
    return np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1).astype(np.int64)


def _quantile_bins(values: NDArray[np.generic], num_folds: int) -> NDArray[np.int64]:
    """Cut the ranks into ten parts, or fewer, so that each part has a row for every fold."""
    num_bins = min(_QUANTILES, len(values) // num_folds)
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return (ranks * num_bins) // len(values)
