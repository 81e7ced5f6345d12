"""Folds keep groups together, metrics are exact, and models are blind to the rows they are scored on."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from genoembed.errors import ConfigError, MissingExtraError, NonFiniteError, ShapeError
from genoembed.probing.cross_validation import (
    COMPONENTS,
    LOGISTIC_C,
    check_block,
    encode_target,
    inner_folds,
    measure_predictions,
    predict_by_penalty,
    prepare,
    score_fold,
    split_folds,
    summarize_metrics,
)

FOLDS = np.arange(120) % 5


def toy(seed=0, width=6, shift=1.0):
    rng = np.random.default_rng(seed)
    labels = np.arange(120) // 2 % 3
    return rng.normal(size=(120, width)) + shift * np.eye(3, width)[labels], labels


def cross_validate(blocks, target, folds=FOLDS, *, task="classification"):
    """Metrics over all folds."""
    blocks = [blocks] if isinstance(blocks, np.ndarray) else blocks
    codes = encode_target(target, task=task)
    return summarize_metrics(
        [score_fold(blocks, codes, folds, int(n), task=task).metrics for n in np.unique(folds)]
    )


@pytest.mark.parametrize("width", [4, 60])
def test_predict_values_has_its_penalty_on_the_mean_error(width):
    rng = np.random.default_rng(0)
    train, test, wanted = rng.normal(size=(40, width)), rng.normal(size=(7, width)), rng.normal(size=40)
    train -= train.mean(axis=0)
    found = predict_by_penalty(train, wanted, test, task="regression", penalties=[0.5, 0.01])
    for penalty, guess in zip([0.5, 0.01], found, strict=True):
        damped = train.T @ train / 40 + penalty * np.eye(width)
        weights = np.linalg.solve(damped, train.T @ (wanted - wanted.mean()) / 40)
        np.testing.assert_allclose(guess, test @ weights + wanted.mean())


def test_predict_classes_agrees_with_scikit_learn():
    features, labels = toy()
    scaled = StandardScaler().fit_transform(features)
    guesses = predict_by_penalty(
        scaled[:80], labels[:80], scaled[80:], task="classification", penalties=LOGISTIC_C
    )
    exact = LogisticRegression(C=LOGISTIC_C[-1], tol=1e-8, max_iter=5000).fit(scaled[:80], labels[:80])
    assert len(guesses) == len(LOGISTIC_C)
    assert (guesses[-1] == exact.predict(scaled[80:])).mean() > 0.97


def test_score_fold_does_not_see_labels_or_features_of_its_fold():
    features, labels = toy()
    is_test = FOLDS == 2
    spoiled = labels.copy()
    spoiled[is_test] = (labels[is_test] + 1) % 3
    loud = [features, np.where(is_test[:, None], 100.0 * labels[:, None] + 100, 0.0)]
    plain = score_fold([features], labels, FOLDS, 2, task="classification")
    other = score_fold([features], spoiled, FOLDS, 2, task="classification")
    assert plain.penalty == other.penalty
    assert plain.metrics["accuracy"] > 0.5 > other.metrics["accuracy"]
    # what only test rows have is constant in training, and so left out
    assert score_fold(loud, labels, FOLDS, 2, task="classification")[:3] == plain[:3]


def test_values_are_predicted():
    features, _ = toy()
    scores = cross_validate(features, features @ np.arange(6.0), task="regression")
    assert scores["r2"].mean > 0.99
    assert len(scores["spearman"].values) == 5


def test_vectors_at_positions_keep_their_order():
    labels = np.arange(120) // 2 % 2
    rng = np.random.default_rng(0)
    # the same two vectors at two positions: only their order tells the classes apart
    vectors = rng.normal(size=(120, 2, 8)) * 0.1
    vectors[np.arange(120), labels, 3] += 5
    assert cross_validate(vectors, labels)["accuracy"].mean == 1
    assert cross_validate(vectors.mean(axis=1), labels)["accuracy"].mean < 0.7


def test_blocks_are_concatenated():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 120, 1))
    target = first[:, 0] + second[:, 0]
    assert cross_validate([first, second], target, task="regression")["r2"].mean > 0.99
    assert cross_validate(first, target, task="regression")["r2"].mean < 0.8


def test_prepare_learns_axes_from_training_rows_alone():
    rng = np.random.default_rng(0)
    block = rng.normal(size=(20, 3, 40)) * ([5] + [1] * 39)
    is_train = np.arange(20) < 10
    moved = block.copy()
    moved[~is_train, :, 2] *= 100
    before, after = (prepare([one], is_train, ~is_train)[0] for one in (block, moved))
    assert before.shape == (10, 3 * min(COMPONENTS, 30))
    np.testing.assert_array_equal(before, after)


def test_constant_features_are_zero_in_training():
    features = np.array([[1.0, 1e6], [2.0, 1e6], [9.0, 1e6]])
    is_train = np.array([True, True, False])
    train, test = prepare([features], is_train, ~is_train)
    assert train.tolist() == [[-1, 0], [1, 0]]
    assert test.tolist() == [[15, 0]]


def test_features_and_target_that_do_not_fit_are_rejected():
    features, _ = toy()
    with pytest.raises(ShapeError, match=r"features: shape \(119, 6\), expected \(120, D\)"):
        check_block(features[1:], num_rows=120, name="features")
    features[3, 1] = np.inf
    with pytest.raises(NonFiniteError, match="record '3': features: NaN or infinite"):
        check_block(features, num_rows=120, name="features")
    with pytest.raises(ConfigError, match="expected one number per row"):
        encode_target(np.array(["1.0", "high"]), task="regression")
    with pytest.raises(ConfigError, match="row 1 is not finite"):
        encode_target(np.array([1.0, np.nan]), task="regression")


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[analysis\]"):
        split_folds(np.arange(20) % 2)


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
        ([0] * 9, {}, r"one class \(\w+\), expected two classes or more"),
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


def test_metrics_are_those_of_the_textbook():
    """Confusion [[3, 1], [2, 4]] and values with a tie, by hand."""
    true, guess = np.array([0] * 4 + [1] * 6), np.array([0, 0, 0, 1, 0, 0, 1, 1, 1, 1])
    found = measure_predictions(true, guess, task="classification")
    assert found["accuracy"] == 0.7
    assert found["mcc"] == pytest.approx((3 * 4 - 1 * 2) / np.sqrt(5 * 4 * 6 * 5))
    assert found["macro_f1"] == pytest.approx((6 / 9 + 8 / 11) / 2)
    found = measure_predictions(
        np.array([1.0, 2.0, 2.0, 5.0]), np.array([1.0, 3.0, 2.0, 4.0]), task="regression"
    )
    assert found["r2"] == pytest.approx(1 - 2 / 9)
    assert found["pearson"] == pytest.approx(6 / np.sqrt(9 * 5))
    assert found["spearman"] == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_measure_of_a_constant_guess_is_zero():
    assert measure_predictions(np.arange(4.0), np.ones(4), task="regression")["spearman"] == 0
    assert measure_predictions(np.ones(4), np.arange(4.0), task="regression") == {
        "r2": 0,
        "pearson": 0,
        "spearman": 0,
    }
    assert measure_predictions(np.array([0, 1]), np.array([1, 1]), task="classification")["mcc"] == 0


def test_summarize_gives_mean_and_sample_deviation():
    summary = summarize_metrics([{"mcc": 0.2}, {"mcc": 0.4}, {"mcc": 0.9}])["mcc"]
    assert summary.mean == pytest.approx(0.5)
    assert summary.sd == pytest.approx(np.std([0.2, 0.4, 0.9], ddof=1))
    assert summary.values == (0.2, 0.4, 0.9)


def test_folds_of_one_row_are_refused_where_r2_is_measured_and_none_is_nan():
    with pytest.raises(ConfigError, match="fill 5 folds with 2 rows each; set num_folds lower"):
        split_folds(np.arange(13.0), task="regression", groups=[0, *np.arange(12) // 3 + 1])
    one = measure_predictions(np.array([1.0]), np.array([2.0]), task="regression")
    assert one == dict.fromkeys(one, 0.0)
