"""The nested probe: what it chooses, that choosing does not leak, and the screen it relies on."""

from __future__ import annotations

import numpy as np
import pytest

from genoembed.errors import ConfigError, NonFiniteError, ShapeError
from genoembed.probing.folds import split_folds
from genoembed.probing.linear import measure, ridge_predictions
from genoembed.probing.nested import probe
from genoembed.probing.preparation import standardize
from genoembed.probing.screen import PENALTIES, screen


def noise(seed, width=4, rows=150):
    return np.random.default_rng(seed).normal(size=(rows, width))


LABELS = np.arange(150) // 2 % 3
TOLD = noise(99) + 2 * np.eye(3, 4)[LABELS]


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("shape", ["narrow", "wide"])
def test_screen_equals_separate_ridge_fits(task, shape):
    blocks = {
        "narrow": [TOLD * [1, 30, 1, 1] + 1000, noise(5)],
        "wide": [noise(1, width=90), TOLD],
    }[shape]
    codes = LABELS if task == "classification" else TOLD[:, 0] + noise(3)[:, 0]
    folds = np.arange(150) % 4
    found = screen(blocks, codes, folds, task=task, components=4)
    assert np.isnan(np.diag(found.inner)).all()
    assert found.chosen_by(1) == pytest.approx(np.mean(found.inner[1, [0, 2, 3]]))
    by_hand = _inner_by_hand(np.concatenate(blocks, axis=1), codes, folds, task)
    np.testing.assert_allclose(found.inner, by_hand, atol=1e-6)


def _inner_by_hand(features, codes, folds, task):
    wanted = np.eye(3)[codes] if task == "classification" else codes[:, None]
    scores = np.full((4, 4, len(PENALTIES)), np.nan)
    for outer in range(4):
        for fold in set(range(4)) - {outer}:
            train, test = (folds != outer) & (folds != fold), folds == fold
            guesses = ridge_predictions(
                *_pair(standardize(features, train, test), wanted[train]), penalties=PENALTIES
            )
            for number, guess in enumerate(guesses):
                told = guess.argmax(axis=1) if task == "classification" else guess[:, 0]
                scores[outer, fold, number] = next(iter(measure(codes[test], told, task=task).values()))
    best = np.nanmean(scores, axis=1).argmax(axis=1)
    return scores[np.arange(4), :, best]


def _pair(standardized, wanted):
    train, test = standardized
    return train, wanted, test


def test_screen_on_positions_finds_what_only_order_tells():
    vectors = np.zeros((150, 3, 4))
    vectors[np.arange(150), LABELS, 0] = 1
    found = screen([vectors + noise(0, 12).reshape(150, 3, 4) * 0.1], LABELS, np.arange(150) % 4,
                   task="classification", components=1)  # fmt: skip
    assert found.outer.min() > 0.95


def test_probe_chooses_what_tells_and_reports_it():
    result = probe({"a": noise(1), "told": TOLD, "b": noise(2)}, LABELS, top=())
    assert {choice.members for choice in result.choices} == {("told",)}
    assert result.recommended.name == "told"
    assert [candidate.name for candidate in result.candidates] == ["a", "told", "b"]
    assert (result.num_rows, result.num_folds, result.is_grouped) == (150, 5, False)
    assert result.metrics["mcc"].mean > 0.5
    assert [choice.fold for choice in result.choices] == [0, 1, 2, 3, 4]


def test_probe_scores_chance_where_the_best_of_much_noise_is_chosen():
    labels = np.arange(150) // 2 % 2
    features = {f"layer {number}": noise(number, width=2) for number in range(80)}
    result = probe(features, labels, top=())
    flattered = max(candidate.score.mean for candidate in result.candidates)
    assert flattered > 0.15
    assert abs(result.metrics["mcc"].mean) < flattered - 0.05


def test_probe_choice_for_a_fold_does_not_depend_on_its_labels_or_features():
    groups = np.arange(150) // 2
    features = {name: TOLD + 2 * noise(seed) for seed, name in enumerate("abcd")}
    plain = probe(features, LABELS, groups=groups, seed=3)
    is_test = split_folds(LABELS, groups=groups, seed=3) == 1
    # what tells everything, but in the test rows alone
    for name in features:
        cheat = features[name].copy()
        cheat[is_test] += 50 * np.eye(3, 4)[LABELS[is_test]]
        cheated = probe(features | {name: cheat}, LABELS, groups=groups, seed=3)
        assert cheated.choices[1] == plain.choices[1]
        # the models of the other folds do see these rows
        assert cheated.choices != plain.choices


def test_probe_lays_the_best_side_by_side():
    value = noise(0, width=3)
    features = {name: value[:, [column]] for column, name in enumerate("xyz")} | {"n": noise(7, width=1)}
    result = probe(features, value.sum(axis=1), task="regression", top=(2, 3))
    assert {frozenset(choice.members) for choice in result.choices} == {frozenset("xyz")}
    assert result.metrics["r2"].mean > 0.99
    assert len(result.candidates) == 4


def test_probe_takes_fusions_by_name():
    value = noise(0, width=2)
    features = {"x": value[:, :1], "y": value[:, 1:]}
    result = probe(features, value.sum(axis=1), task="regression", top=(), fusions={"both": ("x", "y")})
    assert result.recommended.name == "both"
    assert result.recommended.members == ("x", "y")
    assert {choice.members for choice in result.choices} == {("x", "y")}


def test_probe_is_the_same_twice_and_takes_text_labels():
    names = np.array(["n", "t", "s"])[LABELS]
    features = {"told": TOLD, "a": noise(1)}
    first, again = probe(features, names, seed=5), probe(features, names.tolist(), seed=5)
    assert first == again
    assert first != probe(features, names, seed=6)


def test_probe_does_not_change_its_inputs():
    features = {"told": TOLD.copy(), "at": noise(1, 8).reshape(150, 2, 4).astype(np.float16)}
    kept = {name: value.copy() for name, value in features.items()}
    probe(features, LABELS, fusions={"both": ("told", "at")})
    assert all((features[name] == kept[name]).all() for name in kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": {}}, "features: none, expected at least one"),
        ({"finalists": 0}, "finalists: 0, expected 1 or more"),
        ({"top": (1,)}, r"top: \[1\], expected numbers of 2 or more"),
        ({"components": 0}, "components: 0"),
        ({"fusions": {"f": ("told", "tlod")}}, "fusion 'f': 'tlod' is not among the features"),
        ({"fusions": {"f": ()}}, "fusion 'f': no features"),
        ({"fusions": {"told": ("told",)}}, "fusion 'told': a feature has this name"),
    ],
)
def test_probe_says_what_is_wrong_with_its_options(options, message):
    with pytest.raises(ConfigError, match=message):
        probe(**({"features": {"told": TOLD}, "target": LABELS} | options))


def test_probe_names_the_feature_that_does_not_fit():
    with pytest.raises(ShapeError, match="layer 3: shape"):
        probe({"told": TOLD, "layer 3": TOLD[:-1]}, LABELS)
    with pytest.raises(NonFiniteError, match="layer 4: NaN or infinite"):
        probe({"told": TOLD, "layer 4": np.where(TOLD > 2, np.nan, TOLD)}, LABELS)
