"""Metrics agree with scikit-learn and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from genoembed.probing.linear import measure, summarize


@settings(deadline=None, max_examples=50)
@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_class_metrics_agree_with_scikit_learn(pairs):
    true, guess = np.array(pairs).T
    assume(len({*true, *guess}) > 1)  # scikit-learn warns about a single label
    measured = measure(true, guess, task="classification")
    assert measured["accuracy"] == pytest.approx(metrics.accuracy_score(true, guess))
    assert measured["macro_f1"] == pytest.approx(metrics.f1_score(true, guess, average="macro"))
    assert measured["mcc"] == pytest.approx(metrics.matthews_corrcoef(true, guess), abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 1000), num_values=st.integers(2, 30))
def test_value_metrics_agree_with_scipy(seed, num_values):
    rng = np.random.default_rng(seed)
    # rounded, so that there are ties
    true, guess = np.round(rng.normal(size=(2, num_values + 4)), 1)
    measured = measure(true, guess, task="regression")
    assert measured["r2"] == pytest.approx(metrics.r2_score(true, guess))
    assert measured["pearson"] == pytest.approx(stats.pearsonr(true, guess)[0])
    assert measured["spearman"] == pytest.approx(stats.spearmanr(true, guess)[0])


def test_measure_of_a_constant_guess_is_zero():
    assert measure(np.arange(4.0), np.ones(4), task="regression")["spearman"] == 0
    assert measure(np.ones(4), np.arange(4.0), task="regression") == {"r2": 0, "pearson": 0, "spearman": 0}
    assert measure(np.array([0, 1]), np.array([1, 1]), task="classification")["mcc"] == 0


def test_summarize_gives_mean_and_sample_deviation():
    summary = summarize([{"mcc": 0.2}, {"mcc": 0.4}, {"mcc": 0.9}])["mcc"]
    assert summary.mean == pytest.approx(0.5)
    assert summary.sd == pytest.approx(np.std([0.2, 0.4, 0.9], ddof=1))
    assert summary.folds == (0.2, 0.4, 0.9)
