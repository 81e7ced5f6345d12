"""Sparse and MaxSim scores against those of training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genoembed.errors import ConfigError
from genoembed.retrieval.m3 import multi_vector_scores, sparse_scores
from genoembed.retrieval.weights import HybridWeights
from genoembed.searching.hybrid import best_matches, shared_terms


def test_shared_terms_score_as_in_training():
    rng = np.random.default_rng(0)
    ids = [np.sort(rng.choice(30, 12, replace=False)) for _ in range(2)]
    weights = [rng.random(12) for _ in range(2)]
    found = shared_terms(ids[0], weights[0], ids[1], weights[1])
    one, two = ((torch.tensor(i[None]), torch.tensor(w[None])) for i, w in zip(ids, weights, strict=True))
    assert found.score == pytest.approx(float(sparse_scores(*one, *two)), rel=1e-12)
    common = set(ids[0].tolist()) & set(ids[1].tolist())
    assert len(common) > 1
    assert {int(ids[0][place]) for place in found.query} == common
    assert (ids[0][found.query] == ids[1][found.subject]).all()
    assert (np.diff(found.products) <= 0).all()


def test_shared_terms_without_any_score_nothing():
    found = shared_terms(np.array([1]), np.array([1.0]), np.array([2]), np.array([1.0]))
    assert (found.score, len(found.query)) == (0.0, 0)


def test_best_matches_score_as_in_training():
    rng = np.random.default_rng(1)
    query, subject = rng.normal(size=(5, 4)), rng.normal(size=(7, 4))
    found = best_matches(query, subject)
    tensors = [torch.tensor(values[None]) for values in (query, subject)]
    masks = [torch.ones(1, len(values), dtype=torch.bool) for values in (query, subject)]
    wanted = multi_vector_scores(tensors[0], masks[0], tensors[1], masks[1])
    assert found.score == pytest.approx(float(wanted), rel=1e-12)
    for place, (best, similarity) in enumerate(zip(found.subject, found.similarities, strict=True)):
        assert similarity == pytest.approx(max(float(query[place] @ other) for other in subject))
        assert float(query[place] @ subject[best]) == pytest.approx(similarity)


def test_weights_are_those_of_m3_and_refuse_nonsense():
    assert HybridWeights().total(dense=0.5, sparse=2.0, multi_vector=0.25) == pytest.approx(1.35)
    with pytest.raises(ConfigError, match="set hybrid_weights to three finite numbers"):
        HybridWeights(dense=-1.0)
    with pytest.raises(ConfigError, match="not all 0"):
        HybridWeights(dense=0, sparse=0, multi_vector=0)
