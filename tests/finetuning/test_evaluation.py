"""Held-out loss of causal models: every token once, whatever is padded beside it."""

from __future__ import annotations

import math

import pytest
import torch

from genoembed.config.pretrain import StartConfig
from genoembed.finetuning.evaluation import CausalMeasure
from genoembed.finetuning.labeled import LabeledSequence
from genoembed.finetuning.models import CausalModel
from genoembed.pretraining.start import build_start
from genoembed.training.tuning import Tuned
from tests.finetuning.cases import build_model, sequences

SEQUENCES = [*sequences(5, shortest=3, longest=30), "A"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    name = build_model(tmp_path_factory.mktemp("causal") / "model")
    return build_start(StartConfig(model=name), window=2, seed=0)


def measured(start, *, rows_at_once, max_tokens=None):
    rows = [
        LabeledSequence(id=f"s{i}", sequence=s.encode(), label=None, source="-", line=i)
        for i, s in enumerate(SEQUENCES)
    ]
    measure = CausalMeasure(rows=rows, rules=start.rules, max_tokens=max_tokens, rows_at_once=rows_at_once)
    model = CausalModel(start.model, Tuned(start.model))
    return measure(model.eval())


def loss_alone(start, pieces):
    """Score every piece by itself, without padding."""
    nats, tokens = 0.0, 0
    for ids in pieces:
        row = torch.tensor([ids])
        with torch.no_grad():
            log_p = start.model.eval()(input_ids=row).logits.double().log_softmax(-1)
        nats -= sum(float(log_p[0, at, ids[at + 1]]) for at in range(len(ids) - 1))
        tokens += len(ids) - 1
    return nats / tokens


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_causal_measure_takes_nothing_of_padding(start, rows_at_once):
    expected = loss_alone(start, [[*s.encode(), 0] for s in SEQUENCES])
    found = measured(start, rows_at_once=rows_at_once)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["bits_per_token"] == pytest.approx(expected / math.log(2), rel=1e-5)


def test_causal_measure_cuts_what_is_longer_than_the_context(start):
    whole = [[*s.encode(), 0] for s in SEQUENCES]
    pieces = [ids[at : at + 10] for ids in whole for at in range(0, len(ids), 10)]
    expected = loss_alone(start, pieces)
    assert measured(start, rows_at_once=4, max_tokens=10)["loss"] == pytest.approx(expected, rel=1e-5)
