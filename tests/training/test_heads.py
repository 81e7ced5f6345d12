"""Prediction heads and their losses: against sums written out, and what their state keeps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from genoembed.errors import ConfigError, InputError, ModelError, ShapeError
from genoembed.training.heads import (
    ClassificationHead,
    MultilabelHead,
    PredictionHead,
    RegressionHead,
    classification_loss,
    multilabel_loss,
    regression_loss,
    token_classification_loss,
)


def logits(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_classification_loss_equals_the_sum_written_out():
    found, labels, weights = logits(3, 4), [2, 0, 2], [1.0, 2.0, 0.5, 3.0]
    total = sum(-weights[y] * float(F.log_softmax(found[i], 0)[y]) for i, y in enumerate(labels))
    loss = classification_loss(found, torch.tensor(labels), class_weights_C=torch.tensor(weights))
    assert loss.item() == pytest.approx(total / sum(weights[y] for y in labels))


def test_classification_loss_smooths_labels():
    found, labels = logits(3, 4), torch.tensor([2, 0, 2])
    log_p = F.log_softmax(found, dim=1)
    target = torch.full((3, 4), 0.2 / 4, dtype=torch.float64)
    target[torch.arange(3), labels] += 0.8
    loss = classification_loss(found, labels, label_smoothing=0.2)
    assert loss.item() == pytest.approx(float(-(target * log_p).sum(1).mean()))


def test_multilabel_loss_equals_the_sum_written_out():
    found, targets = logits(2, 3), torch.tensor([[1, 0, 1], [0, 0, 1]])
    p = torch.sigmoid(found)
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    loss = multilabel_loss(found, targets)
    assert loss.item() == pytest.approx(float(expected))


def test_token_loss_ignores_by_label_alone():
    found = logits(2, 4, 3)
    labels = torch.tensor([[0, 1, -100, -100], [2, 2, 1, -100]])
    each = [-float(F.log_softmax(found[b, t], 0)[labels[b, t]]) for b, t in (labels != -100).nonzero()]
    assert len(each) == 5
    assert token_classification_loss(found, labels).item() == pytest.approx(sum(each) / 5)
    moved = found.clone()
    moved[labels == -100] = math.nan
    assert token_classification_loss(moved, labels).item() == pytest.approx(sum(each) / 5)


def test_token_loss_takes_another_ignore_index():
    found, labels = logits(1, 3, 2), torch.tensor([[0, 1, 7]])
    expected = classification_loss(found[0, :2], labels[0, :2])
    assert torch.equal(token_classification_loss(found, labels, ignore_index=7), expected)


def test_classification_head_keeps_its_weights_in_its_state():
    head = ClassificationHead(4, 3, class_weights=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)
    other = ClassificationHead(4, 3, class_weights=torch.ones(3), label_smoothing=0.1)
    other.load_state_dict(head.state_dict())
    vectors, labels = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3
    assert torch.equal(head.loss(head(vectors), labels), other.loss(other(vectors), labels))
    expected = classification_loss(
        head(vectors), labels, class_weights_C=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1
    )
    assert torch.equal(head.loss(head(vectors), labels), expected)
    assert head.predict(vectors).sum(1).tolist() == pytest.approx([1] * 5)


def test_classification_head_takes_tokens():
    head = ClassificationHead(4, 3, ignore_index=-7)
    labels = torch.tensor([[1, -7], [0, 2]])
    found = head(logits(2, 2, 4))
    expected = token_classification_loss(found, labels, ignore_index=-7)
    assert torch.equal(head.loss(found, labels), expected)


def test_multilabel_head_gives_probabilities_of_each():
    head = MultilabelHead(4, 2)
    vectors = logits(3, 4)
    torch.testing.assert_close(head.predict(vectors), torch.sigmoid(head(vectors)))
    assert torch.equal(
        head.loss(head(vectors), torch.ones(3, 2)), multilabel_loss(head(vectors), torch.ones(3, 2))
    )


def test_regression_head_learns_in_units_of_the_deviation():
    targets = torch.tensor([[1000.0], [1400.0], [1200.0]])
    head = RegressionHead(4)
    head.fit_targets(targets)
    assert head.loss(torch.zeros(3, 1), targets).item() == pytest.approx(1.0)
    assert torch.equal(head.loss(torch.zeros(3, 1), targets[:, 0]), head.loss(torch.zeros(3, 1), targets))
    other = RegressionHead(4)
    other.load_state_dict(head.state_dict())
    assert other.predict(torch.zeros(1, 4)).item() == pytest.approx(1200)


def test_regression_head_refuses_targets_that_say_nothing():
    head = RegressionHead(4)
    with pytest.raises(ConfigError, match="call fit_targets first"):
        head.predict(torch.zeros(1, 4))
    with pytest.raises(ConfigError, match="never changes cannot be learned"):
        head.fit_targets(torch.ones(3, 1))
    with pytest.raises(ConfigError, match=r"expected \(N, 1\) with two"):
        head.fit_targets(torch.ones(1, 1))


def test_head_pooler_is_off_by_default_and_starts_as_the_identity():
    vectors = logits(2, 4).float()
    plain, pooled = PredictionHead(4, 2), PredictionHead(4, 2, add_pooler=True)
    inputs = {"input_mean", "input_deviation"}
    assert set(plain.state_dict()) == {"output.weight", "output.bias", *inputs}
    assert set(pooled.state_dict()) == {*plain.state_dict(), "pooler.weight", "pooler.bias"}
    pooled.output.load_state_dict(plain.output.state_dict())
    torch.testing.assert_close(plain(vectors), pooled(vectors))


def test_head_takes_inputs_in_their_own_deviation():
    vectors = logits(50, 4).float() * torch.tensor([300.0, 0.01, 1.0, 2.0]) + torch.tensor([2e3, -5.0, 0, 1])
    head, again = PredictionHead(4, 2), PredictionHead(4, 2)
    before = head(vectors)
    head.fit_inputs(vectors)
    standard = (vectors - vectors.mean(0)) / vectors.std(0, unbiased=False)
    torch.testing.assert_close(head(vectors), head.output(standard), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(before, head(vectors))
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(vectors), head(vectors))
    assert head.double()(vectors[None].double()).shape == (1, 50, 2)


def test_head_does_not_blow_up_features_that_hardly_change():
    vectors = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    vectors[:, 2] = 7.0
    head = PredictionHead(3, 1)
    head.fit_inputs(vectors)
    assert head.input_deviation[2] == pytest.approx(0.01 * float(head.input_deviation.median()))
    head.fit_inputs(torch.ones(1, 3))
    assert head.input_deviation.tolist() == [1.0, 1.0, 1.0]


def test_head_refuses_inputs_that_say_nothing():
    head = PredictionHead(3, 1)
    with pytest.raises(ShapeError, match=r"inputs: shape \(2, 4\), expected \(N, 3\)"):
        head.fit_inputs(torch.ones(2, 4))
    with pytest.raises(ShapeError, match=r"expected \(N, 3\) with a row or more"):
        head.fit_inputs(torch.ones(0, 3))
    with pytest.raises(ModelError, match="NaN or infinity; choose another layer"):
        head.fit_inputs(torch.tensor([[1.0, torch.nan, 2.0]]))


def test_head_drops_in_training_alone():
    head = PredictionHead(64, 1, dropout=0.5)
    vectors = logits(1, 64)
    assert not torch.equal(head(vectors), head(vectors))
    assert torch.equal(head.eval()(vectors), head(vectors))


def test_heads_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second = ClassificationHead(8, 3), ClassificationHead(8, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.output.weight, second.output.weight)
    seeded = ClassificationHead(8, 3, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(first.output.weight, seeded.output.weight)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: classification_loss(logits(2, 3), torch.tensor([0, 3])), InputError, "3 is not a class"),
        (lambda: classification_loss(logits(2, 3), torch.tensor([0, -1])), InputError, "-1 is not a class"),
        (lambda: classification_loss(logits(2, 3), torch.tensor([0])), ShapeError, r"labels: shape \(1,\)"),
        (lambda: multilabel_loss(logits(1, 2), torch.tensor([[0, 2]])), InputError, "outside 0 to 1"),
        (lambda: multilabel_loss(logits(1, 2), torch.tensor([0, 1])), ShapeError, r"expected \(B, C\) both"),
        (
            lambda: regression_loss(logits(1, 1), torch.tensor([[math.nan]])),
            InputError,
            "not a finite number",
        ),
        (lambda: regression_loss(logits(2, 1), torch.zeros(2)), ShapeError, r"expected \(B, K\) both"),
        (
            lambda: token_classification_loss(logits(1, 2, 3), torch.full((1, 2), -100)),
            InputError,
            "all are -100",
        ),
        (lambda: token_classification_loss(logits(1, 2, 3), torch.zeros(2)), ShapeError, "labels: shape"),
        (lambda: PredictionHead(4, 1, dropout=1.0), ConfigError, "set dropout to 0 or more"),
        (lambda: PredictionHead(4, 0), ConfigError, "outputs is 0"),
        (lambda: ClassificationHead(4, 1), ConfigError, "num_classes is 1"),
        (lambda: ClassificationHead(4, 2, label_smoothing=1), ConfigError, "label_smoothing is 1"),
        (
            lambda: ClassificationHead(4, 2, class_weights=torch.tensor([1.0, 0.0])),
            ConfigError,
            "expected 2 numbers above 0",
        ),
    ],
)
def test_losses_and_heads_refuse_what_does_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call()
