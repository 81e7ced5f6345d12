"""The measure of agreement: what is not finite never agrees by accident, whatever the type of numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from genoembed.pipeline.agreement import INCOMPARABLE, SAME, Difference, difference, tolerance_of, worst

TYPES = ("float16", "float32", "float64")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("spoiler", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_value_that_is_not_finite_on_one_side_never_agrees(dtype, spoiler, shape):
    good = np.ones(shape, dtype)
    bad = good.copy()
    bad.flat[-1] = spoiler
    for pair in ((good, bad), (bad, good), (good, np.full(shape, spoiler, dtype))):
        assert difference(*pair)[1:] == INCOMPARABLE[1:]
        assert math.isnan(difference(*pair).cosine)
        assert not difference(*pair).is_within(1e9)


@pytest.mark.parametrize("dtype", TYPES)
def test_vectors_that_both_are_all_nan_are_the_same_outcome(dtype):
    failed = np.full(4, np.nan, dtype)
    assert difference(failed, failed) == SAME
    partly = np.array([1, np.nan, 1, 1], dtype)
    assert not difference(partly, partly).is_within(1e9)
    infinite = np.full(4, np.inf, dtype)
    assert not difference(infinite, infinite).is_within(1e9)


@pytest.mark.parametrize("dtype", TYPES)
def test_relative_difference_is_of_the_largest_value_and_does_not_overflow(dtype):
    first = np.array([3.0, 4.0], dtype)
    found = difference(first, np.array([3.0, 4.5], dtype))
    assert found[1:] == (0.5, 0.5 / 4.5)
    assert difference(first, first) == SAME
    large = np.full(2, 6e4, dtype)
    assert difference(large, -large) == (pytest.approx(-1.0), 1.2e5, 2.0)


def test_unequal_shapes_and_zeros():
    assert difference(np.ones(2), np.ones(3))[1:] == INCOMPARABLE[1:]
    assert difference(np.zeros(2), np.zeros(2)) == SAME
    assert difference(np.zeros(2), np.array([0.0, 1e-9])) == (0.0, 1e-9, 1.0)
    assert difference(np.zeros((0, 4)), np.zeros((0, 4))) == SAME


def test_tokens_are_measured_each_against_its_own_size():
    first, second = np.array([[1000.0, 0.0], [1.0, 0.0]]), np.array([[1000.0, 0.0], [1.5, 0.0]])
    assert difference(first, second).relative == pytest.approx(0.5 / 1.5)


def test_worst_is_not_hidden_by_the_order():
    small = Difference(0.9, 0.5, 0.1)
    for found in ([INCOMPARABLE, small], [small, INCOMPARABLE]):
        assert math.isnan(worst(found).cosine)
        assert not worst(found).is_within(1e9)
    assert worst([SAME, small, Difference(0.95, 0.7, 0.01)]) == (0.9, 0.7, 0.1)
    assert worst([]) == SAME


def test_coarsest_type_decides_the_tolerance():
    assert tolerance_of(["float32"]) == tolerance_of(["float64"], ["float64"]) == 1e-5
    assert tolerance_of(["float64"], ["float16"]) == 1e-3
    assert tolerance_of(["float32", "bfloat16"]) == tolerance_of(["float16"]) == 1e-2
    assert tolerance_of(["something"]) == tolerance_of(["float32"], ["something"]) == 1e-2
