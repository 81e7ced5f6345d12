"""A quick look at many candidates: ridge classifiers and regressions from sums of products.

Sums over the folds are taken once; every fit on any set of folds then costs one small linear system, whatever
the number of rows. The penalty is the best of a few, for each candidate.

N rows, D features, K columns of the target, F folds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from operator import add
from typing import TYPE_CHECKING

import numpy as np

from genoembed.probing.linear import METRICS, measure, ridge_predictions, solve_ridge
from genoembed.probing.preparation import deviations, lay_out, standardize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import ProbeTask


PENALTIES = (1.0, 1e-1, 1e-2)
"""Penalties on the mean of the squared errors of standardised features; few, as fits are many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreenScores:
    """The first metric of the task, fitted without the rows that it is taken on."""

    inner: NDArray[np.float64]
    """``inner[outer, fold]``: on ``fold``, by a model that saw neither ``outer`` nor ``fold``; NaN on the
    diagonal. ``(F, F)``."""
    outer: NDArray[np.float64]
    """On each fold, by a model that saw all others, with the penalty that did best on its inner folds.
    ``(F,)``."""

    def chosen_by(self, fold: int) -> float:
        """Give the score that a choice for one test fold may look at."""
        return float(np.nanmean(self.inner[fold]))


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums of products over some rows; those of two sets of rows add up."""

    num_rows: int
    features: NDArray[np.float64]
    target: NDArray[np.float64]
    gram: NDArray[np.float64]
    cross: NDArray[np.float64]

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.num_rows + other.num_rows,
            self.features + other.features,
            self.target + other.target,
            self.gram + other.gram,
            self.cross + other.cross,
        )


def screen(
    blocks: Sequence[NDArray[np.floating]],
    codes: NDArray[np.generic],
    folds: NDArray[np.int64],
    *,
    task: ProbeTask,
    components: int,
) -> ScreenScores:
    """Score blocks on every pair of an outer and an inner fold."""
    num_folds = int(folds.max()) + 1
    wanted = _columns(codes, task)
    fits = _Fits(blocks, wanted, folds, components)
    inner = np.full((num_folds, num_folds, len(PENALTIES)), np.nan)
    for first, second in combinations(range(num_folds), 2):
        # a model that saw neither serves both ways round
        guesses = fits.predict(without=(first, second))
        for fold, outer in ((first, second), (second, first)):
            inner[outer, fold] = _scores(codes[folds == fold], guesses[fold], task)
    best = np.nanmean(inner, axis=1).argmax(axis=1)
    on_outer = np.array(
        [
            _scores(codes[folds == fold], fits.predict(without=(fold,))[fold], task)[best[fold]]
            for fold in range(num_folds)
        ]
    )
    return ScreenScores(inner=inner[np.arange(num_folds), :, best], outer=on_outer)


class _Fits:
    """Fits on sets of folds; sums are shared where the features do not depend on the training rows."""

    def __init__(
        self,
        blocks: Sequence[NDArray[np.floating]],
        wanted: NDArray[np.float64],
        folds: NDArray[np.int64],
        components: int,
    ) -> None:
        self.blocks = blocks
        self.wanted = wanted
        self.folds = folds
        self.components = components
        self.sums: list[_Sums] = []
        is_wide = sum(block.shape[1] for block in blocks) > len(folds) // 2
        if is_wide or any(block.ndim == 3 for block in blocks):
            return
        features = lay_out(blocks, np.ones(len(folds), dtype=np.bool_), components=components)
        # moved and scaled so that the sums keep their digits; the fit itself does not depend on it
        mean = features.mean(axis=0)
        self.features = (features - mean) / deviations(mean, (features**2).mean(axis=0))
        for fold in np.unique(folds):
            part, target = self.features[folds == fold], wanted[folds == fold]
            self.sums.append(
                _Sums(len(part), part.sum(axis=0), target.sum(axis=0), part.T @ part, part.T @ target)
            )

    def predict(self, *, without: tuple[int, ...]) -> dict[int, list[NDArray[np.float64]]]:
        """Fit on the rows outside some folds; predictions for those folds, by fold and penalty."""
        if self.sums:
            kept = [total for fold, total in enumerate(self.sums) if fold not in without]
            models = _solve(reduce(add, kept))
            return {
                fold: [self.features[self.folds == fold] @ weights + shift for weights, shift in models]
                for fold in without
            }
        is_test = np.isin(self.folds, without)
        features = lay_out(self.blocks, ~is_test, components=self.components)
        train, test = standardize(features, ~is_test, is_test)
        guesses = ridge_predictions(train, self.wanted[~is_test], test, PENALTIES)
        tested = self.folds[is_test]
        return {fold: [guess[tested == fold] for guess in guesses] for fold in without}


def _solve(sums: _Sums) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Give weights and shift for the features as they are, a pair a penalty."""
    mean, target = sums.features / sums.num_rows, sums.target / sums.num_rows
    scale = deviations(mean, np.diag(sums.gram) / sums.num_rows)
    gram = (sums.gram / sums.num_rows - np.outer(mean, mean)) / np.outer(scale, scale)
    cross = (sums.cross / sums.num_rows - np.outer(mean, target)) / scale[:, None]
    models = []
    for penalty in PENALTIES:
        weights = solve_ridge(gram, cross, penalty) / scale[:, None]
        models.append((weights, target - mean @ weights))
    return models


def _columns(codes: NDArray[np.generic], task: ProbeTask) -> NDArray[np.float64]:
    """Give the target as columns: one a class, or the values."""
    if task == "regression":
        return codes.astype(np.float64)[:, None]
    return np.eye(int(codes.astype(np.int64).max()) + 1)[codes.astype(np.int64)]


def _scores(
    codes: NDArray[np.generic], guesses: Sequence[NDArray[np.float64]], task: ProbeTask
) -> list[float]:
    metric = METRICS[task][0]
    return [
        measure(
            codes, guess[:, 0] if task == "regression" else guess.argmax(axis=1).astype(np.int64), task=task
        )[metric]
        for guess in guesses
    ]
