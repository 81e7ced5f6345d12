"""Folds keep groups together, spread classes evenly, and are the same each time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import ConfigError, ShapeError
from genoembed.probing.folds import inner_folds, split_folds


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    num_folds=st.integers(3, 5),
    groups=st.lists(st.integers(0, 40), min_size=150, max_size=150),
)
def test_split_folds_keeps_groups_together_and_every_row_once(seed, num_folds, groups):
    groups = np.array([*range(50), *groups])
    target = np.arange(len(groups)) % 2
    folds = split_folds(target, groups=groups, num_folds=num_folds, seed=seed)
    assert sorted(set(folds.tolist())) == list(range(num_folds))
    for group in np.unique(groups):
        assert len(set(folds[groups == group].tolist())) == 1


def test_split_folds_spreads_classes_evenly():
    target = np.array(["a"] * 50 + ["b"] * 10)
    folds = split_folds(target, num_folds=5)
    for fold in range(5):
        assert (folds[:50] == fold).sum() == 10
        assert (folds[50:] == fold).sum() == 2


def test_split_folds_spreads_values_evenly():
    target = np.random.default_rng(0).normal(size=200)
    folds = split_folds(target, task="regression", num_folds=4)
    is_low = target < np.quantile(target, 0.1)
    assert np.bincount(folds[is_low], minlength=4).tolist() == [5, 5, 5, 5]


def test_split_folds_takes_few_values_for_a_tenth():
    folds = split_folds(np.arange(20.0), task="regression", groups=list(range(20)), num_folds=5)
    assert np.bincount(folds).tolist() == [4] * 5


def test_split_folds_depends_on_the_seed_alone():
    target = np.arange(90) % 3
    first, again, other = (split_folds(target, seed=seed) for seed in (7, 7, 8))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ([0, 1] * 9, {"num_folds": 2}, "num_folds: 2, expected 3 or more"),
        ([0] * 9, {}, "1 class.*expected two or more"),
        ([0] * 20 + [1] * 4, {}, "class 1 has 4 rows, expected at least num_folds"),
        ([0, 1] * 9, {"groups": [0, 1, 2] * 6}, "3 groups, expected at least num_folds"),
        ([0.5] * 9, {"task": "regression"}, "9 values, expected at least twice"),
        ([0, 1] * 20, {"groups": [0, *[1, 2, 3, 4, 5] * 3, *[6] * 24]}, None),
        ([0] * 20 + [1] * 20, {"groups": [*range(20), *[20] * 20]}, "too few or too large"),
    ],
)
def test_split_folds_says_what_does_not_fit(target, options, message):
    if message is None:
        assert len(split_folds(np.array(target), **options)) == len(target)
        return
    with pytest.raises(ConfigError, match=message):
        split_folds(np.array(target), **options)


def test_split_folds_refuses_groups_of_another_length():
    with pytest.raises(ShapeError, match="9 groups"):
        split_folds(np.array([0, 1] * 5), groups=list(range(9)))


def test_inner_folds_leave_the_outer_one_out_and_share_the_work():
    folds = np.arange(20) % 5
    firsts = [inner_folds(folds, fold)[:2] for fold in range(5)]
    assert all(fold not in chosen for fold, chosen in enumerate(firsts))
    assert np.bincount(np.ravel(firsts)).tolist() == [2] * 5
