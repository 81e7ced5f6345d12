"""Distillation row by row against sums written out, and with candidates that are left out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from genoembed.errors import ShapeError
from genoembed.retrieval.distillation import (
    group_divergence_rows,
    group_scores,
    kl_distillation_rows,
    m3_distillation_rows,
    soft_entropy_rows,
    teacher_probabilities,
)

SCORES = torch.tensor([[0.3, -1.2, 0.8, 0.1], [1.0, 0.2, -0.4, 2.0]], dtype=torch.float64)
TARGETS = torch.tensor([0, 2])
TEACHER = torch.tensor([[2.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
ROWS = {"m3": m3_distillation_rows, "kl": kl_distillation_rows, "divergence": group_divergence_rows}


GOLDEN = Path(__file__).parents[1] / "golden" / "losses" / "values.json"


def test_kl_distillation_is_that_of_the_reference():
    values = json.loads(GOLDEN.read_text())["simlm"]
    query, passage, teacher = (
        torch.tensor(values[name], dtype=torch.float64) for name in ("q", "p", "teacher")
    )
    scores, targets = query @ passage.T / values["kl_distillation_temperature"], torch.tensor([0, 2, 4])
    wanted = teacher_probabilities(teacher, scores, targets)
    found = float(kl_distillation_rows(scores, wanted, targets).mean())
    assert found == pytest.approx(values["kl_distillation"], abs=1e-9, rel=0)


def log_softmax(values, index):
    return values[index] - math.log(math.fsum(map(math.exp, values)))


def test_m3_distillation_equals_the_sum_written_out():
    teacher = torch.softmax(TEACHER, dim=1)
    found = m3_distillation_rows(SCORES, teacher, TARGETS)
    for row, first in enumerate(TARGETS.tolist()):
        scores = SCORES[row].tolist()
        rest = [score for column, score in enumerate(scores) if column != first]
        expected = -float(teacher[row, 0]) * log_softmax(scores, first)
        # without the group's first passage, the second stands where the first did
        expected -= float(teacher[row, 1]) * log_softmax(rest, first)
        assert float(found[row]) == pytest.approx(expected)


def test_kl_distillation_equals_the_sum_written_out():
    teacher = torch.softmax(TEACHER, dim=1)
    found = kl_distillation_rows(SCORES, teacher, TARGETS)
    for row, first in enumerate(TARGETS.tolist()):
        scores = SCORES[row].tolist()
        group = scores[first : first + 2]
        soft = -sum(float(teacher[row, g]) * log_softmax(group, g) for g in range(2))
        assert float(found[row]) == pytest.approx(soft - log_softmax(scores, first))


def test_group_divergence_is_zero_for_the_teacher_itself():
    teacher = torch.softmax(group_scores(SCORES, TARGETS, group_size=2), dim=1)
    assert group_divergence_rows(SCORES, teacher, TARGETS).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert bool((group_divergence_rows(SCORES, torch.softmax(TEACHER, dim=1), TARGETS) > 0.01).all())


def test_soft_entropy_takes_no_gradient_to_the_teacher():
    teacher = torch.softmax(SCORES, dim=1).requires_grad_()
    scores = SCORES.clone().requires_grad_()
    soft_entropy_rows(scores, teacher).sum().backward()
    assert teacher.grad is None
    torch.testing.assert_close(scores.grad, torch.zeros_like(scores), atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("others", [True, False], ids=["in batch", "own group alone"])
def test_a_candidate_left_out_adds_neither_value_nor_gradient(name, others):
    def run(scores, teacher):
        leaf = scores.clone().requires_grad_()
        masked = leaf if others else leaf[:, :3].masked_fill(torch.zeros(1, 3, dtype=torch.bool), 0)
        masked = masked.masked_fill(~torch.isfinite(scores[:, : masked.shape[1]]), -torch.inf)
        wanted = teacher_probabilities(teacher, masked, torch.tensor([0]))
        with torch.autograd.detect_anomaly():  # a NaN on the way is an error, even if it comes to nothing
            loss = ROWS[name](masked, wanted, torch.tensor([0])).sum()
            loss.backward()
        return loss.item(), leaf.grad

    scores = torch.tensor([[0.3, -1.2, -torch.inf, 0.1]], dtype=torch.float64)
    with_filler, grad = run(scores, torch.tensor([[2.0, 1.0, 99.0]]))
    columns = [0, 1, 3] if others else [0, 1]
    leaf = scores[:, columns].clone().requires_grad_()
    wanted = torch.softmax(torch.tensor([[2.0, 1.0]], dtype=torch.float64), dim=1)
    without = ROWS[name](leaf, wanted, torch.tensor([0])).sum()
    without.backward()
    assert with_filler == pytest.approx(without.item())
    torch.testing.assert_close(grad[:, columns], leaf.grad)
    assert bool(grad.isfinite().all())
    assert float(grad[0, 2]) == 0


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 5), (2, 0)])
def test_teacher_probabilities_refuse_shapes(shape):
    with pytest.raises(ShapeError, match=r"teacher_scores: shape .*, expected \(2, G\)"):
        teacher_probabilities(torch.zeros(shape), SCORES, TARGETS)
