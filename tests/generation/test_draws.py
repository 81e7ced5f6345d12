"""One token: temperature, top-k and top-p against loops and against transformers; which draws are sure."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from genoembed.generation.sampler import SamplingOptions, draw, uniforms
from tests.oracles import drawable_probabilities, inverse_cumulative

GRID = [
    SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    for temperature, top_k, top_p in itertools.product(
        (0, 0.3, 1, 2.5), (None, 1, 3, 40), (1, 0.9, 0.45, 1e-9)
    )
]
LOGITS = {
    "bases": [-1.2, -1.6, -1.1, -1.9, -7.0],
    "even": [0.31, 0.3, 0.29, 0.28],
    "words": list(np.random.default_rng(4).normal(size=64) * 2),
    "without some": [-math.inf, 0.2, -math.inf, 0.1, -0.3],
}


@pytest.mark.parametrize("options", GRID, ids=str)
@pytest.mark.parametrize("name", LOGITS)
def test_draws_follow_the_oracle(name, options):
    logits = LOGITS[name]
    probabilities = drawable_probabilities(logits, options.temperature, options.top_k, options.top_p)
    grid = (np.arange(501) + 0.5) / 501
    found = [draw(np.array(logits), uniform, options).place for uniform in grid]
    assert found == [inverse_cumulative(probabilities, uniform) for uniform in grid]
    assert set(found) <= set(probabilities)


@pytest.mark.parametrize("options", [one for one in GRID if one.temperature], ids=str)
def test_oracle_keeps_what_transformers_keeps(options):
    for logits in LOGITS.values():
        scores = torch.tensor([logits], dtype=torch.float64)
        scores = TemperatureLogitsWarper(float(options.temperature))(None, scores)
        if options.top_k is not None:
            scores = TopKLogitsWarper(options.top_k)(None, scores)
        if options.top_p < 1:
            scores = TopPLogitsWarper(options.top_p)(None, scores)
        expected = scores.softmax(-1)[0]
        found = drawable_probabilities(logits, options.temperature, options.top_k, options.top_p)
        assert {token for token, one in found.items() if one} == set(expected.nonzero()[:, 0].tolist())
        for token, probability in found.items():
            assert probability == pytest.approx(float(expected[token]), abs=1e-12)


def test_first_and_last_numbers_give_the_first_and_last_token():
    logits = np.log([0.5, 0.25, 0.25])
    ends = (0.0, 0.5, np.nextafter(0.5, 0), np.nextafter(1.0, 0))
    assert [draw(logits, uniform, SamplingOptions()).place for uniform in ends] == [0, 1, 0, 2]


def test_equal_logits_count_in_the_order_of_the_tokens():
    logits = np.zeros(4)
    assert draw(logits, 0.99, SamplingOptions(temperature=0)).place == 0
    assert {draw(logits, uniform, SamplingOptions(top_k=2)).place for uniform in (0.1, 0.6, 0.9)} == {0, 1}


def test_one_token_is_always_sure():
    for options in (SamplingOptions(), SamplingOptions(temperature=0), SamplingOptions(top_k=1, top_p=0.1)):
        assert draw(np.array([-3.0]), 0.7, options, tolerance=1e-4) == (0, True)


@settings(max_examples=300)
@given(
    logits=st.lists(st.floats(-6, 6), min_size=1, max_size=6),
    noise=st.lists(st.floats(-1, 1), min_size=6, max_size=6),
    uniform=st.floats(0, 1, exclude_max=True),
    options=st.sampled_from(GRID),
)
def test_sure_draw_stays_the_same_under_rounding(logits, noise, uniform, options):
    exact = np.array(logits)
    # a quarter of the tolerance: what is summed and divided may add up
    rounded = exact + np.array(noise[: len(exact)]) * 2.5e-5
    found = draw(rounded, uniform, options, tolerance=1e-4)
    if found.is_sure:
        assert draw(exact, uniform, options).place == found.place


def test_most_draws_are_sure_and_those_at_a_limit_are_not():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    sure = [draw(logits, number / 1000 + 5e-4, SamplingOptions(), tolerance=1e-4) for number in range(1000)]
    assert all(found.is_sure for found in sure)
    for options, uniform in (
        (SamplingOptions(), 0.7 + 5e-5),
        (SamplingOptions(top_p=0.7 + 5e-5), 0.1),
        (SamplingOptions(temperature=0.1), 0.905),
    ):
        slack = 1e-4 if options.temperature == 1 else 0.1
        assert not draw(logits, uniform, options, tolerance=slack).is_sure
    almost_equal = np.array([1.0, 0.5, 0.5 - 5e-5, 0.0])
    assert not draw(almost_equal, 0.1, SamplingOptions(top_k=2), tolerance=1e-4).is_sure
    assert not draw(almost_equal[1:], 0.1, SamplingOptions(temperature=0), tolerance=1e-4).is_sure


def test_random_numbers_are_those_of_every_version():
    assert list(itertools.islice(uniforms(0, b"ACGT", 1), 3)) == KNOWN
    assert all(0 <= one < 1 for one in itertools.islice(uniforms(9, b"ACGT", 1), 100))


KNOWN = [0.6318030739393907, 0.07959571600408422, 0.2803652653480039]


def test_random_numbers_differ_by_seed_prompt_and_sample_alone():
    keys = [
        (0, b"ACGT", 1),
        (1, b"ACGT", 1),
        (0, b"ACGA", 1),
        (0, b"ACGT", 2),
        (0, b"ACGT", 12),
        (0, b"2 ACGT", 1),
    ]
    firsts = [next(uniforms(*key)) for key in keys]
    assert len(set(firsts)) == len(keys)
    assert [next(uniforms(*key)) for key in keys] == firsts


def test_frequencies_are_the_probabilities():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    numbers = list(itertools.islice(uniforms(3, b"ACGT", 1), 20000))
    counts = np.bincount([draw(logits, number, SamplingOptions()).place for number in numbers], minlength=4)
    expected = np.exp(logits) * len(numbers)
    assert (
        float(((counts - expected) ** 2 / expected).sum()) < 16
    )  # of a chi-square with 3 degrees, p = 0.001
