"""Triplet losses against loops; anchors without a partner; equal vectors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import ConfigError, ShapeError
from genoembed.retrieval.contrastive import batch_hard_triplet, triplet_margin

DISTANCES = ("euclidean", "cosine")


def vectors(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64)


def distance_between(first, second, kind):
    if kind == "euclidean":
        return math.dist(first, second)
    dot = math.fsum(a * b for a, b in zip(first, second, strict=True))
    return 1 - dot / (math.hypot(*first) * math.hypot(*second))


@pytest.mark.parametrize("distance", DISTANCES)
def test_triplet_margin_equals_the_loop(distance):
    anchor, positive, negative = (vectors(5, seed) for seed in range(3))
    near = [distance_between(a, p, distance) for a, p in zip(anchor.tolist(), positive.tolist(), strict=True)]
    far = [distance_between(a, n, distance) for a, n in zip(anchor.tolist(), negative.tolist(), strict=True)]
    losses = [max(0.0, x - y + 0.3) for x, y in zip(near, far, strict=True)]
    assert 0 < sum(loss > 0 for loss in losses) < 5
    output = triplet_margin(anchor, positive, negative, margin=0.3, distance=distance)
    assert output.loss.item() == pytest.approx(sum(losses) / 5)
    assert output.parts["active"] == pytest.approx(sum(loss > 0 for loss in losses) / 5)
    assert output.statistics.positive_score == pytest.approx(-sum(near) / 5)
    assert output.statistics.negative_score == pytest.approx(-sum(far) / 5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-1, 2), min_size=1, max_size=7), st.sampled_from(DISTANCES))
def test_batch_hard_triplet_equals_the_loop(labels, distance):
    z = vectors(len(labels))
    losses = []
    for i, label in enumerate(labels):
        between = [distance_between(z[i].tolist(), z[j].tolist(), distance) for j in range(len(labels))]
        fellows = [between[j] for j in range(len(labels)) if j != i and labels[j] == label != -1]
        strangers = [between[j] for j in range(len(labels)) if j != i and (labels[j] != label or label == -1)]
        if fellows and strangers:
            losses.append(max(0.0, max(fellows) - min(strangers) + 0.4))
    leaf = z.clone().requires_grad_()
    output = batch_hard_triplet(leaf, torch.tensor(labels), margin=0.4, distance=distance)
    assert output.loss.item() == pytest.approx(sum(losses) / max(len(losses), 1), abs=1e-7)
    assert output.statistics.queries == len(losses)
    assert output.statistics.left_out == len(labels) - len(losses)
    assert output.statistics.negatives_per_query == (1 if losses else 0)
    output.loss.backward()
    assert bool(leaf.grad.isfinite().all())


def test_triplet_margin_of_equal_vectors_has_a_finite_gradient():
    leaf = torch.ones(2, 3, requires_grad=True)
    output = triplet_margin(leaf, leaf * 1, leaf * 1, margin=0.5)
    output.loss.backward()
    assert output.loss.item() == 0.5
    assert bool((leaf.grad == 0).all())


@pytest.mark.parametrize("margin", [0, -1.0, math.nan, math.inf])
def test_triplet_margin_refuses_a_margin(margin):
    with pytest.raises(ConfigError, match="set margin above 0"):
        triplet_margin(vectors(2), vectors(2), vectors(2), margin=margin)


def test_triplets_refuse_a_distance_and_shapes():
    with pytest.raises(ConfigError, match="set distance to one of euclidean, cosine"):
        batch_hard_triplet(vectors(2), torch.zeros(2), distance="manhattan")
    with pytest.raises(ShapeError, match=r"expected the same \(B, D\) three times"):
        triplet_margin(vectors(2), vectors(2), vectors(3))
    with pytest.raises(ShapeError, match=r"labels: shape \(3,\)"):
        batch_hard_triplet(vectors(2), torch.zeros(3))
