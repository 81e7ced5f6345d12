"""Metrics against plain definitions, and rankings that ties do not flatter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from genoembed.errors import ConfigError
from genoembed.finetuning.evaluation import class_metrics, multilabel_metrics, number_metrics, ranking_metrics


@given(st.integers(2, 4), st.integers(4, 30), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_class_metrics_are_those_of_counting(classes, rows, seed):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, rows)
    shares = rng.dirichlet(np.ones(classes), rows)
    found = class_metrics(true, shares)
    guess = shares.argmax(axis=1)
    assert found["accuracy"] == pytest.approx(np.mean(guess == true))
    seen = sorted({*true.tolist(), *guess.tolist()})
    f1 = []
    for c in seen:
        hits = np.sum((guess == c) & (true == c))
        f1.append(2 * hits / (np.sum(guess == c) + np.sum(true == c)))
    assert found["macro_f1"] == pytest.approx(np.mean(f1))
    if classes == 2 and 0 < true.sum() < rows:
        pairs = [(a, b) for a in shares[true == 1, 1] for b in shares[true == 0, 1]]
        assert found["auroc"] == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))


def test_areas_are_not_known_where_one_class_occurs():
    found = class_metrics(np.zeros(3, dtype=int), np.full((3, 2), 0.5))
    assert math.isnan(found["auroc"])
    assert math.isnan(found["auprc"])


def test_multilabel_metrics_leave_labels_out_that_never_change():
    true = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1]], dtype=float)
    shares = np.array([[0.9, 0.1, 0.9], [0.2, 0.1, 0.9], [0.8, 0.1, 0.4]])
    found = multilabel_metrics(true, shares)
    assert found["auroc"] == 1.0
    assert found["accuracy"] == pytest.approx(2 / 3)


def test_number_metrics_are_those_of_scipy_and_means_over_targets():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(20, 2))
    guess = np.round(true + rng.normal(size=(20, 2)), 1)
    found = number_metrics(true, guess)
    for name, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        expected = np.mean([function(true[:, k], guess[:, k])[0] for k in range(2)])
        assert found[name] == pytest.approx(expected)
    assert number_metrics(true, np.zeros_like(true))["spearman"] == 0


def test_ranking_counts_ties_against_the_right_passage():
    same = torch.zeros(4, 4)
    found = ranking_metrics(same, torch.eye(4, dtype=torch.bool))
    assert (found["mrr"], found["recall_at_1"], found["recall_at_10"]) == (0.25, 0.0, 1.0)
    assert ranking_metrics(torch.full((1, 2), torch.nan), torch.tensor([[True, False]]))["mrr"] == 0.5


def test_ranking_leaves_out_what_is_not_allowed_and_queries_without_a_right_passage():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.1, 0.2, 0.3]])
    relevant = torch.tensor([[False, True, True], [False, False, False]])
    allowed = torch.tensor([[False, True, True], [True, True, True]])
    found = ranking_metrics(scores, relevant, allowed_QP=allowed)
    assert found == {"mrr": 1.0, "recall_at_1": 1.0, "recall_at_10": 1.0, "ranked_queries": 1.0}
    with pytest.raises(ConfigError, match="no query has a relevant passage"):
        ranking_metrics(scores, torch.zeros_like(relevant))
