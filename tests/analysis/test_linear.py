"""Linear models: against scikit-learn, and blind to the rows they are scored on."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from genoembed.errors import ConfigError, MissingExtraError, NonFiniteError, ShapeError
from genoembed.probing.linear import (
    LOGISTIC_C,
    cross_validate,
    predict,
    ridge_predictions,
    score_fold,
)
from genoembed.probing.preparation import encode_target, lay_out, standardize

FOLDS = np.arange(120) % 5


def toy(seed=0, width=6, shift=1.0):
    rng = np.random.default_rng(seed)
    labels = np.arange(120) // 2 % 3
    return rng.normal(size=(120, width)) + shift * np.eye(3, width)[labels], labels


@pytest.mark.parametrize("width", [4, 60])
def test_ridge_predictions_agree_with_scikit_learn(width):
    rng = np.random.default_rng(0)
    train, test, wanted = rng.normal(size=(40, width)), rng.normal(size=(7, width)), rng.normal(size=(40, 2))
    train -= train.mean(axis=0)
    found = ridge_predictions(train, wanted, test, [0.5, 0.01])
    for penalty, guess in zip([0.5, 0.01], found, strict=True):
        np.testing.assert_allclose(guess, Ridge(alpha=penalty * 40).fit(train, wanted).predict(test))


def test_predict_classes_agrees_with_scikit_learn():
    features, labels = toy()
    scaled = StandardScaler().fit_transform(features)
    guesses = predict(scaled[:80], labels[:80], scaled[80:], task="classification", penalties=LOGISTIC_C)
    exact = LogisticRegression(C=LOGISTIC_C[-1], tol=1e-8, max_iter=5000).fit(scaled[:80], labels[:80])
    assert len(guesses) == len(LOGISTIC_C)
    assert (guesses[-1] == exact.predict(scaled[80:])).mean() > 0.97


def test_score_fold_does_not_see_labels_or_features_of_its_fold():
    features, labels = toy()
    is_test = FOLDS == 2
    spoiled = labels.copy()
    spoiled[is_test] = (labels[is_test] + 1) % 3
    loud = [features, np.where(is_test[:, None], 100.0 * labels[:, None] + 100, 0.0)]
    plain = score_fold([[features]], labels, FOLDS, 2, task="classification")
    other = score_fold([[features]], spoiled, FOLDS, 2, task="classification")
    assert plain.penalty == other.penalty
    assert plain.metrics["accuracy"] > 0.5 > other.metrics["accuracy"]
    # what only test rows have is constant in training, and so left out
    assert score_fold([loud], labels, FOLDS, 2, task="classification") == plain


def test_score_fold_takes_the_better_blocks():
    features, labels = toy()
    noise = np.random.default_rng(1).normal(size=(120, 6))
    found = score_fold([[noise], [features]], labels, FOLDS, 0, task="classification")
    assert found.chosen == 1
    assert found.metrics == score_fold([[features]], labels, FOLDS, 0, task="classification").metrics


def test_cross_validate_finds_values():
    features, _ = toy()
    scores = cross_validate(features, features @ np.arange(6.0), FOLDS, task="regression")
    assert scores["r2"].mean > 0.99
    assert len(scores["spearman"].folds) == 5


def test_cross_validate_reads_vectors_at_positions():
    labels = np.arange(120) // 2 % 2
    rng = np.random.default_rng(0)
    # the same two vectors at two positions: only their order tells the classes apart
    vectors = rng.normal(size=(120, 2, 8)) * 0.1
    vectors[np.arange(120), labels, 3] += 5
    assert cross_validate(vectors, labels, FOLDS, components=1)["accuracy"].mean == 1
    assert cross_validate(vectors.mean(axis=1), labels, FOLDS)["accuracy"].mean < 0.7


def test_cross_validate_lays_blocks_side_by_side():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 120, 1))
    target = first[:, 0] + second[:, 0]
    assert cross_validate([first, second], target, FOLDS, task="regression")["r2"].mean > 0.99
    assert cross_validate(first, target, FOLDS, task="regression")["r2"].mean < 0.8


def test_lay_out_learns_axes_from_training_rows_alone():
    rng = np.random.default_rng(0)
    block = rng.normal(size=(20, 3, 4)) * [5, 1, 1, 1]
    is_train = np.arange(20) < 10
    moved = block.copy()
    moved[~is_train] *= [1, 1, 100, 1]
    before, after = (lay_out([one], is_train, components=2)[is_train] for one in (block, moved))
    assert before.shape == (10, 6)
    np.testing.assert_array_equal(before, after)


def test_standardize_leaves_constant_features_at_zero():
    features = np.array([[1.0, 1e6], [2.0, 1e6], [9.0, 7.0]])
    is_train = np.array([True, True, False])
    train, test = standardize(features, is_train, ~is_train)
    assert train.tolist() == [[-1, 0], [1, 0]]
    assert test.tolist() == [[15, 0]]


def test_features_and_target_that_do_not_fit_are_refused():
    features, labels = toy()
    with pytest.raises(ShapeError, match=r"features: shape \(119, 6\), expected \(120, D\)"):
        cross_validate(features[1:], labels, FOLDS)
    with pytest.raises(ConfigError, match="components: 0, expected 1 or more"):
        cross_validate(features, labels, FOLDS, components=0)
    features[3, 1] = np.inf
    with pytest.raises(NonFiniteError, match="record '3': features: NaN or infinite"):
        cross_validate(features, labels, FOLDS)
    with pytest.raises(ConfigError, match="expected a number a row"):
        encode_target(np.array(["1.0", "high"]), task="regression")
    with pytest.raises(ConfigError, match="row 1 is not finite"):
        encode_target(np.array([1.0, np.nan]), task="regression")


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    features, labels = toy()
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'genoembed\[analysis\]'"):
        cross_validate(features, labels, FOLDS)
