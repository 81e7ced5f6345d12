"""The few-shot protocol, against scikit-learn called by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from genoembed.errors import ConfigError
from genoembed.probing.scoring import SEEDS, score_shots

RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 3, size=120)
FEATURES = RNG.normal(size=(120, 4)) * np.array([1, 5, 0.1, 2]) + 0.8 * CODES[:, None]
IS_TEST = np.arange(120) >= 80
BY_HAND = {
    "mcc": matthews_corrcoef,
    "accuracy": accuracy_score,
    "macro_f1": lambda true, guess: f1_score(true, guess, average="macro"),
}


def by_hand(rows):
    fitted = LogisticRegression(max_iter=1000).fit(FEATURES[rows], CODES[rows])
    guess = fitted.predict(FEATURES[IS_TEST])
    return {name: metric(CODES[IS_TEST], guess) for name, metric in BY_HAND.items()}


@pytest.mark.parametrize(("regime", "shot"), [("10-shot", 10), ("1-shot", 1)])
def test_shots_are_drawn_by_class_and_seed(regime, shot):
    found = score_shots(FEATURES, CODES, IS_TEST)[regime]
    expected = []
    for seed in SEEDS:
        random = np.random.RandomState(seed)
        rows = []
        for code in range(3):
            places = np.where(CODES[:80] == code)[0]
            rows.extend(random.choice(places, size=min(shot, len(places)), replace=False))
        expected.append(by_hand(np.array(rows)))
    for name in BY_HAND:
        values = [score[name] for score in expected]
        assert found[name].values == pytest.approx(values)
        assert (found[name].mean, found[name].sd) == pytest.approx((np.mean(values), np.std(values)))
        assert found[name].sd > 0


def test_full_is_one_fit_on_all_training_rows():
    found = score_shots(FEATURES, CODES, IS_TEST)["full"]
    expected = by_hand(np.arange(80))
    assert {name: found[name].mean for name in BY_HAND} == pytest.approx(expected)
    assert {summary.sd for summary in found.values()} == {0}
    assert {len(summary.values) for summary in found.values()} == {5}


def test_class_with_fewer_rows_gives_what_it_has():
    codes = np.where(np.arange(120) < 3, 2, np.arange(120) % 2)
    assert score_shots(FEATURES, codes, IS_TEST, seeds=(1,))["10-shot"]["accuracy"].mean > 0


@pytest.mark.parametrize("is_test", [np.zeros(120, np.bool_), CODES != 1])
def test_split_that_cannot_be_learned_from_is_refused(is_test):
    with pytest.raises(ConfigError, match=r"split: .* expected test rows and two classes"):
        score_shots(FEATURES, CODES, is_test)
