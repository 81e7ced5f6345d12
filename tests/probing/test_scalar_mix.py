"""Weights of a scalar mix: what they single out, and what they do not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import ConfigError
from genoembed.pooling.fuse import fuse
from genoembed.probing.scalar_mix import learn_mix, mix_layers
from genoembed.probing.sweep import score_block

CODES = np.arange(90) // 3 % 3
FOLDS = np.arange(90) % 3


def layers(seed=0):
    """Noise; a layer that tells the first class from the others; one that tells the second from the third."""
    rng = np.random.default_rng(seed)
    return {
        "noise": rng.normal(size=(90, 5)),
        "first": rng.normal(size=(90, 5)) + 3 * (CODES == 0)[:, None] * np.array([1, 0, 0, 0, 0]),
        "second": rng.normal(size=(90, 5)) + 3 * (CODES == 1)[:, None] * np.array([0, 1, 0, 0, 0]),
    }


def mcc(block):
    return score_block("x", block, CODES, FOLDS, task="classification", kind="fusion").metrics["mcc"].mean


def test_weights_sum_to_one_and_leave_noise_out():
    weights = learn_mix(layers(), CODES, FOLDS, task="classification")
    assert sum(weights.values()) == pytest.approx(1)
    assert min(weights.values()) >= 0
    assert weights["noise"] < 0.1
    assert min(weights["first"], weights["second"]) > 0.2


def test_mix_of_two_halves_is_better_than_either_half_and_than_the_plain_mean():
    features = layers()
    weights = learn_mix(features, CODES, FOLDS, task="classification")
    scores = {name: mcc(block) for name, block in features.items()}
    equal = dict.fromkeys(features, 1 / 3)
    mixed = mcc(mix_layers(features, weights))
    assert mixed > max(scores.values())
    assert mixed > mcc(mix_layers(features, equal))


@settings(max_examples=8)
@given(size=st.floats(1e-3, 1e3), offset=st.floats(-50, 50))
def test_size_and_offset_of_a_layer_do_not_change_what_is_mixed(size, offset):
    features = layers()
    weights = learn_mix(features, CODES, FOLDS, task="classification")
    moved = features | {"first": features["first"] * size + offset}
    found = learn_mix(moved, CODES, FOLDS, task="classification")
    # per unit of the old layer, relative to the layer that was left alone
    ratio = found["first"] * size / found["second"]
    assert ratio == pytest.approx(weights["first"] / weights["second"], rel=1e-2)


def test_rows_of_the_fold_that_is_left_out_are_not_looked_at():
    features = layers()
    before = learn_mix(features, CODES, FOLDS, task="classification", without=1)
    spoiled = {name: np.where((FOLDS == 1)[:, None], 1e6, block) for name, block in features.items()}
    codes = np.where(FOLDS == 1, 0, CODES)
    assert learn_mix(spoiled, codes, FOLDS, task="classification", without=1) == before
    assert learn_mix(features, CODES, FOLDS, task="classification") != before


def test_values_are_mixed_for_a_regression():
    rng = np.random.default_rng(0)
    values = rng.normal(size=90)
    features = {"noise": rng.normal(size=(90, 3)), "told": rng.normal(size=(90, 3)) + values[:, None]}
    weights = learn_mix(features, values, FOLDS, task="regression")
    assert weights["told"] > 0.8


def test_layer_that_never_varies_gets_no_weight():
    features = layers() | {"flat": np.full((90, 5), 3.0)}
    assert learn_mix(features, CODES, FOLDS, task="classification")["flat"] == 0
    flat = {"a": np.ones((90, 5)), "b": np.ones((90, 5))}
    assert learn_mix(flat, CODES, FOLDS, task="classification") == {"a": 0.5, "b": 0.5}


def test_nothing_to_mix_is_an_error():
    with pytest.raises(ConfigError, match="none to mix"):
        learn_mix({}, CODES, FOLDS, task="classification")


def test_mix_is_what_extract_makes_of_the_weights():
    features = layers()
    weights = {"noise": 0.2, "first": 0.5, "second": 0.3}
    fused = fuse(
        {name: torch.from_numpy(block).float() for name, block in features.items()},
        method="weighted",
        weights=list(weights.values()),
    )["weighted"]
    np.testing.assert_allclose(mix_layers(features, weights), fused.numpy(), rtol=1e-5, atol=1e-6)
