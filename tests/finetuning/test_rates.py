"""Default rates: what the sources say at their widths, what was measured at a small one, a line between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genoembed.config.finetune import finetune_config
from genoembed.finetuning.training import resolve_recipe
from genoembed.training.rates import encoder_rate, pretraining_rate


@pytest.mark.parametrize(
    ("width", "uses_adapters", "rate"),
    [(128, False, 1e-3), (768, False, 2e-5), (4096, False, 2e-5 * 768 / 4096),
     (128, True, 3e-3), (768, True, 2e-4 * 2 / 3), (4096, True, 2e-4 * 2 / 3), (16, False, 1e-3)],
)  # fmt: skip
def test_rates_are_those_of_the_sources_and_of_the_measurement(width, uses_adapters, rate):
    tuning = "lora" if uses_adapters else "full"
    assert encoder_rate(width, tuning=tuning, num_rows=700).value == pytest.approx(rate)
    assert encoder_rate(width, tuning=tuning, num_rows=2_000).value == pytest.approx(rate * 1.5)


@pytest.mark.parametrize(("num_rows", "guidance"), [(9_999, 1e-5), (1e5, 5e-6), (1e6, 2.5e-6)])
def test_rates_fall_with_the_rows_as_bge_m3_says(num_rows, guidance):
    """The level at the width of BGE-M3, 1024, is that of a model that makes no embeddings yet."""
    level = 3e-5 * 768 / 1024 / 1e-5
    found = encoder_rate(1024, tuning="full", num_rows=int(num_rows))
    assert found.value == pytest.approx(level * guidance)
    assert ("rows" in found.why) == (num_rows > 1e4)
    assert encoder_rate(1024, tuning="lora", num_rows=int(num_rows)).value == pytest.approx(2e-4)


def test_pretraining_of_new_weights_is_ten_times_as_fast_as_going_on():
    new, going_on = (pretraining_rate(512, is_new=is_new).value for is_new in (True, False))
    assert (new, going_on) == (pytest.approx(1e-3), pytest.approx(1e-4))
    assert pretraining_rate(None, is_new=True).value == 2e-3


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from(["full", "lora"]))
def test_wider_models_never_learn_faster(first, second, tuning):
    narrow, wide = sorted((first, second))
    rates = [encoder_rate(width, tuning=tuning, num_rows=9).value for width in (narrow, wide)]
    assert rates[0] >= rates[1] > 0


@pytest.mark.parametrize(("tuning", "rate"), [("full", 1e-3), ("last_n", 1e-3), ("lora", 3e-3)])
def test_recipe_takes_the_default_of_its_tuning_unless_told(tuning, rate):
    options = {"task": "classification", "train": ("a.tsv",), "tuning": tuning}
    recipe = resolve_recipe(finetune_config(options), num_rows=700, width=128).recipe
    assert recipe.learning_rate == pytest.approx(rate)
    assert recipe.head_learning_rate == pytest.approx(max(rate, 1e-3))
    told = resolve_recipe(finetune_config(options | {"learning_rate": 5e-5}), num_rows=700, width=128).recipe
    assert (told.learning_rate, told.head_learning_rate) == (5e-5, 1e-3)
