"""Default rates: what the sources say at their widths, what was measured at a small one, a line between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genoembed.config.finetune import finetune_config
from genoembed.finetuning.training import default_rate, resolve_recipe


@pytest.mark.parametrize(
    ("width", "uses_adapters", "rate"),
    [(128, False, 1e-3), (768, False, 2e-5), (4096, False, 2e-5 * 768 / 4096),
     (128, True, 3e-3), (768, True, 2e-4 * 2 / 3), (4096, True, 2e-4 * 2 / 3), (16, False, 1e-3)],
)  # fmt: skip
def test_rates_are_those_of_the_sources_and_of_the_measurement(width, uses_adapters, rate):
    assert default_rate(width, uses_adapters=uses_adapters, num_rows=700) == pytest.approx(rate)
    larger = default_rate(width, uses_adapters=uses_adapters, num_rows=2_000)
    assert larger == pytest.approx(rate * 1.5)


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.booleans())
def test_wider_models_never_learn_faster(first, second, uses_adapters):
    narrow, wide = sorted((first, second))
    rates = [default_rate(width, uses_adapters=uses_adapters, num_rows=9) for width in (narrow, wide)]
    assert rates[0] >= rates[1] > 0


@pytest.mark.parametrize(("tuning", "rate"), [("full", 1e-3), ("last_n", 1e-3), ("lora", 3e-3)])
def test_recipe_takes_the_default_of_its_tuning_unless_told(tuning, rate):
    options = {"task": "classification", "train": ("a.tsv",), "tuning": tuning}
    recipe = resolve_recipe(finetune_config(options), num_rows=700, width=128).recipe
    assert recipe.learning_rate == pytest.approx(rate)
    assert recipe.head_learning_rate == pytest.approx(max(rate, 1e-3))
    told = resolve_recipe(finetune_config(options | {"learning_rate": 5e-5}), num_rows=700, width=128).recipe
    assert (told.learning_rate, told.head_learning_rate) == (5e-5, 1e-3)
