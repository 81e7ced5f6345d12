"""The sweep over layers: the same probe for each, and nothing chosen with the rows it is scored on."""

from __future__ import annotations

import numpy as np
import pytest

from genoembed.errors import ConfigError, NonFiniteError
from genoembed.probing.cross_validation import split_folds
from genoembed.probing.sweep import MEAN, MIX, choose_inside, score_block, shown, sweep

CODES = np.arange(60) // 2 % 2
FOLDS = split_folds(CODES, num_folds=3)


def layers(seed=0, *, shift=3.0):
    rng = np.random.default_rng(seed)
    noise = {f"l{number}": rng.normal(size=(60, 4)) for number in range(3)}
    return noise | {"told": rng.normal(size=(60, 4)) + shift * CODES[:, None]}


def test_each_layer_scores_as_it_does_alone():
    features = layers()
    found = sweep(features, CODES, FOLDS, task="classification", top=(), average=False)
    assert [layer.name for layer in found.layers] == list(features)
    for layer in found.layers:
        alone = score_block("x", features[layer.name], CODES, FOLDS, task="classification", kind="layer")
        assert layer.metrics == alone.metrics
        assert len(layer.inner) == 3
    assert (found.fusions, found.mix) == ((), {})


def test_fusions_are_those_of_the_best_and_of_all():
    found = sweep(layers(), CODES, FOLDS, task="classification", top=(2, 3))
    names = ["best 2 layers concatenated", "best 3 layers concatenated", MEAN, MIX]
    assert [fusion.name for fusion in found.fusions] == names
    assert [fusion.num_features for fusion in found.fusions] == [8, 12, 4, 4]
    assert all("told" in members for fusion in found.fusions for members in fusion.members)
    assert max(found.mix, key=found.mix.get) == "told"
    assert sum(found.mix.values()) == pytest.approx(1)


def test_nothing_is_chosen_with_the_rows_that_it_is_scored_on():
    """Spoilt rows of a test fold change neither what is chosen for it nor by how much."""
    features, is_first = layers(), FOLDS == 0
    spoilt = {name: np.where(is_first[:, None], 1e3 - block, block) for name, block in features.items()}
    codes = np.where(is_first, 1 - CODES, CODES)
    before = sweep(features, CODES, FOLDS, task="classification")
    after = sweep(spoilt, codes, FOLDS, task="classification")
    for one, other in zip(
        (*before.layers, *before.fusions[:2]), (*after.layers, *after.fusions[:2]), strict=True
    ):
        assert one.members[0] == other.members[0]
        assert one.inner[0] == other.inner[0]
    assert [layer.inner[1] for layer in before.layers] != [layer.inner[1] for layer in after.layers]


def test_layers_of_unequal_width_are_concatenated_but_not_averaged():
    features = layers() | {"wide": np.random.default_rng(1).normal(size=(60, 7))}
    found = sweep(features, CODES, FOLDS, task="classification", top=(2,))
    assert [fusion.name for fusion in found.fusions] == ["best 2 layers concatenated"]
    assert found.mix == {}


def test_regression_is_scored_by_correlations():
    values = np.random.default_rng(0).normal(size=60)
    folds = split_folds(values, task="regression", num_folds=3)
    features = {
        "a": values[:, None] + np.random.default_rng(1).normal(size=(60, 2)) * 0.1,
        "b": np.eye(60)[:, :2],
    }
    found = sweep(features, values, folds, task="regression")
    assert list(found.layers[0].metrics) == ["r2", "pearson", "spearman"]
    assert found.layers[0].metrics["pearson"].mean > 0.95 > found.layers[1].metrics["pearson"].mean
    assert shown(found.layers[0], "regression").startswith("R2 0.9")


def test_choice_inside_takes_for_each_fold_what_is_best_on_the_others():
    found = sweep(layers(), CODES, FOLDS, task="classification", top=(), average=False)
    inside = choose_inside(found.layers, task="classification")
    by_name = {layer.name: layer for layer in found.layers}
    for fold, name in enumerate(inside.chosen):
        assert by_name[name].inner[fold] == max(layer.inner[fold] for layer in found.layers)
        assert inside.metrics["mcc"].values[fold] == by_name[name].metrics["mcc"].values[fold]


def test_choice_inside_is_not_flattered_by_many_layers_of_noise():
    rng = np.random.default_rng(0)
    noise = {f"l{number}": rng.normal(size=(60, 2)) for number in range(12)}
    found = sweep(noise, CODES, FOLDS, task="classification", top=(), average=False)
    best = max(layer.metrics["mcc"].mean for layer in found.layers)
    assert choose_inside(found.layers, task="classification").metrics["mcc"].mean < best - 0.05


def test_no_candidates_are_an_error():
    with pytest.raises(ConfigError, match="candidates: none"):
        choose_inside([], task="classification")


def test_layer_that_is_not_finite_is_refused():
    features = layers()
    features["l1"][7, 0] = np.nan
    with pytest.raises(NonFiniteError, match="l1: NaN"):
        sweep(features, CODES, FOLDS, task="classification")


def test_fusions_by_name_and_vectors_at_positions_are_candidates_too():
    value = np.random.default_rng(0).normal(size=(60, 2))
    folds = split_folds(value.sum(axis=1), task="regression", num_folds=3)
    features = {
        "x": value[:, :1],
        "y": value[:, 1:],
        "places": np.zeros((60, 2, 3)) + value[:, :, None] * [1, 0, 0],
    }
    joined = {"both": ("x", "y")}
    found = sweep(features, value.sum(axis=1), folds, task="regression", top=(), joined=joined, average=False)
    assert [one.name for one in found.fusions] == ["both"]
    assert found.fusions[0].members == (("x", "y"),) * 3
    inside = choose_inside((*found.layers[:2], *found.fusions), task="regression")
    assert set(inside.chosen) == {"both"}
    assert inside.metrics["r2"].mean > 0.99
    assert found.layers[2].metrics["r2"].mean > 0.99
    with pytest.raises(ConfigError, match="fusion 'both': x, z, expected names of given layers"):
        sweep(features, value.sum(axis=1), folds, task="regression", joined={"both": ("x", "z")})


def test_inputs_are_not_changed():
    features = layers() | {"at": np.random.default_rng(1).normal(size=(60, 2, 4)).astype(np.float16)}
    kept = {name: block.copy() for name, block in features.items()}
    sweep(features, CODES, FOLDS, task="classification")
    assert all((features[name] == kept[name]).all() for name in kept)
