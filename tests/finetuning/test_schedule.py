"""The learning rate of each step: warm-up, ends, and a plateau that watches metrics of any sign."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import genoembed
from genoembed.config.finetune import FinetuneRecipe
from genoembed.errors import ConfigError
from genoembed.finetuning.trainer import FinetuneTrainer, WarmUp
from genoembed.training.rates import rate_share
from tests.finetuning.cases import FAST, build_model, write_classes


def plateau(*, values, greater_is_better, **options):
    """Rates after each of these metrics."""
    recipe = FinetuneRecipe(schedule="plateau", learning_rate=1.0, **options)
    parameters = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": rate} for p, rate in zip(parameters, (1.0, 8.0), strict=True)]
    )
    trainer = SimpleNamespace(
        _recipe=recipe, args=SimpleNamespace(learning_rate=1.0, greater_is_better=greater_is_better)
    )
    scheduler = FinetuneTrainer._plateau(trainer, optimizer)
    rates = []
    for value in values:
        scheduler.step(value)
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


def test_plateau_lowers_the_rate_while_a_metric_below_zero_falls():
    rates = plateau(values=[-0.1, -0.2, -0.3, -0.4, -0.5], greater_is_better=True)
    assert [rate for rate, _ in rates] == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_plateau_lowers_the_rate_while_a_metric_below_zero_stands_still():
    for greater_is_better in (True, False):
        rates = plateau(values=[-0.5] * 5, greater_is_better=greater_is_better)
        assert [rate for rate, _ in rates] == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_plateau_keeps_the_rate_while_a_metric_below_zero_gets_better():
    assert [rate for rate, _ in plateau(values=[-0.5, -0.4, -0.3, -0.2], greater_is_better=True)] == [1.0] * 4
    assert [rate for rate, _ in plateau(values=[-1.0, -2.0, -3.0], greater_is_better=False)] == [1.0] * 3


def test_plateau_has_its_own_factor_patience_and_end():
    options = {"plateau_factor": 0.1, "plateau_patience": 0, "min_learning_rate": 0.05}
    rates = plateau(values=[1.0, 1.0, 1.0, 1.0], greater_is_better=True, **options)
    assert rates == [[1.0, 8.0], [0.1, 0.8], [0.05, 0.4], [0.05, 0.4]]


def test_warm_up_of_a_plateau_starts_at_a_tenth_and_then_leaves_the_rate_alone():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    warm_up, rates = WarmUp(optimizer, 3), []
    for step in range(6):
        warm_up.on_step_begin(None, SimpleNamespace(global_step=step), None, optimizer=optimizer)
        rates.append(round(optimizer.param_groups[0]["lr"], 6))
        if step == 4:
            optimizer.param_groups[0]["lr"] = 0.5
    assert rates == [0.2, 0.8, 1.4, 2.0, 2.0, 0.5]


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_rates_rise_from_a_tenth_and_end_where_they_shall(schedule, last):
    shares = [rate_share(step, schedule=schedule, least=0.1, warmup=4, total=20) for step in range(21)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[:5] == sorted(shares[:5])
    assert shares[4] == 1.0
    assert shares[20] == pytest.approx(last)


def test_warm_up_is_counted_in_steps_or_as_a_share():
    assert FinetuneRecipe(warmup_steps=7).num_warmup_steps(1000) == 7
    assert FinetuneRecipe(warmup_fraction=0.25).num_warmup_steps(10) == 3
    assert FinetuneRecipe(schedule="plateau", warmup_fraction=0.5).num_warmup_steps(10) == 5
    with pytest.raises(ConfigError, match="warmup_fraction and warmup_steps are both set"):
        FinetuneRecipe(warmup_fraction=0.1, warmup_steps=3)


def test_plateau_without_validation_rows_is_refused_in_a_sentence(tmp_path):
    path = write_classes(tmp_path / "rows", 12)
    model = build_model(tmp_path / "model")
    options = {**FAST, "validation_fraction": 0.0, "test_fraction": 0.0, "schedule": "plateau"}
    with pytest.raises(ConfigError, match=r"schedule is 'plateau', .* no validation rows to measure"):
        genoembed.finetune(path, tmp_path / "run", task="classification", model=model, **options)
    assert not (tmp_path / "run").exists()
