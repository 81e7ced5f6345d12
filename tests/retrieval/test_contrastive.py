"""InfoNCE and its kin against slow loops and reference numbers; false negatives; statistics."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.config.retrieval import ContrastiveConfig
from genoembed.errors import ConfigError, ShapeError
from genoembed.retrieval.candidates import PairIds, sequence_identity
from genoembed.retrieval.contrastive import info_nce, supervised_contrastive, two_view_loss
from genoembed.sequences.records import reverse_complement
from genoembed.training.log import gradient_norms, relative_spread

GOLDEN = Path(__file__).parents[1] / "golden" / "losses" / "values.json"
SIMLM = json.loads(GOLDEN.read_text())["simlm"]
ONE = ContrastiveConfig(temperature=0.5)


@pytest.fixture
def simlm():
    return [torch.tensor(SIMLM[name], dtype=torch.float64) for name in ("q", "p", "teacher")]


def vectors(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def slow_loss(query, passage, group_size, temperature, excluded=frozenset()):
    """Loop over queries; ``excluded`` holds pairs of query and passage."""
    total = 0.0
    for i, q in enumerate(query.tolist()):
        scores = {
            j: math.fsum(a * b for a, b in zip(q, p, strict=True)) / temperature
            for j, p in enumerate(passage.tolist())
            if (i, j) not in excluded
        }
        total += math.log(math.fsum(map(math.exp, scores.values()))) - scores[i * group_size]
    return total / len(query)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.floats(0.3, 3.0))
def test_info_nce_equals_the_loop(queries, group_size, width, temperature):
    query, passage = vectors(queries, width), vectors(queries * group_size, width, seed=1)
    output = info_nce(query, passage, config=ContrastiveConfig(temperature=temperature))
    expected = slow_loss(query, passage, group_size, temperature)
    assert output.loss.item() == pytest.approx(expected, abs=1e-10)
    assert output.statistics.negatives_per_query == queries * group_size - 1


def test_info_nce_full_is_that_of_simlm(simlm):
    query, passage, _ = simlm
    config = ContrastiveConfig(temperature=SIMLM["temperature"], scope="full")
    output = info_nce(query, passage, config=config)
    assert output.loss.item() == pytest.approx(SIMLM["full_contrastive"], abs=1e-9, rel=0)
    assert output.statistics.negatives_per_query == 5 + 2 + 2 + 2


def test_info_nce_group_divergence_is_that_of_simlm(simlm):
    query, passage, teacher = simlm
    config = ContrastiveConfig(temperature=SIMLM["temperature"], scope="full")
    parts = info_nce(query, passage, config=config, teacher_scores_BG=teacher).parts
    assert parts["distillation"] == pytest.approx(SIMLM["group_divergence"], abs=1e-9, rel=0)
    assert parts["cross_entropy"] == pytest.approx(SIMLM["full_contrastive"], abs=1e-9, rel=0)


def test_info_nce_masked_hard_negatives_are_those_of_simlm(simlm):
    query, passage, teacher = simlm
    config = ContrastiveConfig(temperature=SIMLM["temperature"], scope="full", mask_hard_negatives=True)
    output = info_nce(query, passage, config=config, teacher_scores_BG=teacher)
    assert output.parts["cross_entropy"] == pytest.approx(SIMLM["hard_negatives_masked"], abs=1e-9, rel=0)
    # the teacher still sees them
    assert output.parts["distillation"] == pytest.approx(SIMLM["group_divergence"], abs=1e-9, rel=0)


def test_info_nce_symmetric_is_the_mean_of_both_ways():
    query, passage = vectors(3, 4), vectors(6, 4, seed=1)
    config = ContrastiveConfig(temperature=0.5, scope="symmetric")
    expected = (slow_loss(query, passage, 2, 0.5) + slow_loss(passage[::2], query, 1, 0.5)) / 2
    assert info_nce(query, passage, config=config).loss.item() == pytest.approx(expected, abs=1e-10)


def test_info_nce_without_in_batch_negatives_keeps_to_the_group():
    query, passage = vectors(3, 4), vectors(6, 4, seed=1)
    config = ContrastiveConfig(temperature=0.5, in_batch_negatives=False)
    excluded = {(i, j) for i in range(3) for j in range(6) if j // 2 != i}
    output = info_nce(query, passage, config=config)
    assert output.loss.item() == pytest.approx(slow_loss(query, passage, 2, 0.5, excluded), abs=1e-10)
    assert output.statistics.negatives_per_query == 1


@pytest.mark.parametrize(
    ("ids", "excluded"),
    [
        # label of a passage is that of the query, be it another's positive or a negative
        ({"query_labels": [7, 8, 9], "passage_labels": [7, 8, 8, 7, 9, 5]}, {(0, 3), (1, 1)}),
        # equal labels of queries exclude each other's positives, not their negatives
        ({"query_labels": [7, 7, 9]}, {(0, 2), (1, 0)}),
        # -1 is nobody's label
        ({"query_labels": [-1, -1, -1], "passage_labels": [-1] * 6}, set()),
        # a passage that is the query's positive once more
        ({"passage_ids": [1, 2, 3, 1, 4, 1]}, {(0, 3), (0, 5)}),
        # a passage that is the query itself
        ({"query_ids": [4, 5, 6], "passage_ids": [1, 2, 4, 3, 7, 5]}, {(0, 2), (1, 5), (1, 0)}),
        # the same query twice
        ({"query_ids": [4, 4, 6]}, {(0, 2), (1, 0)}),
    ],
)
def test_info_nce_leaves_false_negatives_out(ids, excluded):
    query, passage = vectors(3, 4), vectors(6, 4, seed=1)
    given_ids = PairIds(**{name: torch.tensor(value) for name, value in ids.items()})
    output = info_nce(query, passage, config=ONE, ids=given_ids)
    assert output.loss.item() == pytest.approx(slow_loss(query, passage, 2, 0.5, excluded), abs=1e-10)
    assert output.statistics.masked_false_negatives == len(excluded)
    assert output.statistics.negatives_per_query == pytest.approx((15 - len(excluded)) / 3)


@pytest.mark.parametrize("scope", ["symmetric", "full"])
def test_info_nce_leaves_kin_out_of_every_block(scope):
    query, passage = vectors(3, 4), vectors(3, 4, seed=1)
    labels = torch.tensor([1, 1, 2])
    config = ContrastiveConfig(scope=scope, temperature=0.5)
    output = info_nce(query, passage, config=config, ids=PairIds(query_labels=labels))
    expected = sum(slow_row(scope, query, passage, labels.tolist(), row) for row in range(3)) / 3
    assert output.loss.item() == pytest.approx(expected, abs=1e-10)
    assert output.statistics.masked_false_negatives == 2


def slow_row(scope, query, passage, labels, row):
    """Loss of one pair, block by block, against pairs of other labels."""
    other = [i for i in range(len(labels)) if labels[i] != labels[row]]
    positive = query[row] @ passage[row]
    forward = [query[row] @ passage[i] for i in other]
    backward = [passage[row] @ query[i] for i in other]
    if scope == "full":
        among = [query[row] @ query[i] for i in other] + [passage[row] @ passage[i] for i in other]
        blocks = [forward + backward + among]
    else:
        blocks = [forward, backward]
    losses = [torch.logsumexp(torch.stack([positive, *block]) / 0.5, 0) - positive / 0.5 for block in blocks]
    return float(sum(losses) / len(losses))


def test_info_nce_fillers_count_for_nothing():
    query, passage = vectors(2, 4), vectors(6, 4, seed=1)
    mask = torch.tensor([True, True, False, True, False, False])
    whole = info_nce(query, passage, config=ONE, ids=PairIds(passage_mask=mask))
    excluded = {(i, j) for i in range(2) for j in (2, 4, 5)}
    assert whole.loss.item() == pytest.approx(slow_loss(query, passage, 3, 0.5, excluded), abs=1e-10)
    assert whole.statistics.negatives_per_query == 2
    assert whole.statistics.masked_false_negatives == 0
    with pytest.raises(ShapeError, match="False for a positive"):
        info_nce(query, passage, ids=PairIds(passage_mask=~mask))


def test_info_nce_statistics_are_scores_before_the_temperature():
    query, passage = vectors(2, 4), vectors(4, 4, seed=1)
    for temperature in (0.5, 2.0):
        found = info_nce(query, passage, config=ContrastiveConfig(temperature=temperature)).statistics
        scores = query @ passage.T
        positives = float(scores[0, 0] + scores[1, 2])
        assert found.positive_score == pytest.approx(positives / 2)
        assert found.negative_score == pytest.approx((float(scores.sum()) - positives) / 6)
        assert found.chance_loss == pytest.approx(math.log(4))


def test_info_nce_does_its_sums_in_float32():
    query = vectors(4, 8).to(torch.bfloat16)
    assert info_nce(query, query).loss.dtype == torch.float32


def test_two_view_loss_knows_copies():
    first, second = vectors(3, 4), vectors(3, 4, seed=1)
    output = two_view_loss(first, second, config=ONE, ids_B=torch.tensor([5, 5, 6]))
    expected = slow_loss(first, second, 1, 0.5, {(0, 1), (1, 0)})
    assert output.loss.item() == pytest.approx(expected, abs=1e-10)
    with pytest.raises(ShapeError, match=r"views: shapes \(3, 4\) and \(2, 4\)"):
        two_view_loss(first, second[:2])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-1, 2), min_size=2, max_size=7))
def test_supervised_contrastive_equals_the_loop(labels):
    z = vectors(len(labels), 3)
    losses, negatives = [], []
    for i, label in enumerate(labels):
        others = [j for j in range(len(labels)) if j != i]
        fellows = [j for j in others if labels[j] == label != -1]
        if fellows:
            scores = {j: float(z[i] @ z[j]) / 0.5 for j in others}
            log_sum = math.log(math.fsum(map(math.exp, scores.values())))
            losses.append(sum(log_sum - scores[j] for j in fellows) / len(fellows))
            negatives.append(len(others) - len(fellows))
    leaf = z.clone().requires_grad_()
    output = supervised_contrastive(leaf, torch.tensor(labels), temperature=0.5)
    expected = sum(losses) / len(losses) if losses else 0.0
    assert output.loss.item() == pytest.approx(expected, abs=1e-10)
    assert output.statistics.queries == len(losses)
    assert output.statistics.left_out == len(labels) - len(losses)
    assert output.statistics.negatives_per_query == pytest.approx(sum(negatives) / max(len(losses), 1))
    output.loss.backward()
    assert bool(leaf.grad.isfinite().all())


def test_supervised_contrastive_of_one_vector_is_zero():
    leaf = vectors(1, 3).requires_grad_()
    output = supervised_contrastive(leaf, torch.tensor([0]))
    output.loss.backward()
    assert output.loss.item() == 0
    assert bool((leaf.grad == 0).all())


def test_sequence_identity_is_one_for_both_strands():
    sequence = b"ACGGTTACCNA"
    assert sequence_identity(sequence) == sequence_identity(reverse_complement(sequence))
    assert sequence_identity(sequence) != sequence_identity(sequence[:-1])
    assert 0 <= sequence_identity(sequence) < 2**63


def test_relative_spread_does_not_depend_on_length_of_vectors():
    z = vectors(6, 4)
    assert relative_spread(z) == pytest.approx(relative_spread(z * 7))
    assert relative_spread(z[:1].expand(5, 4)) == pytest.approx(0, abs=1e-12)
    assert relative_spread(torch.zeros(3, 2)) == 0


def test_gradient_norms_are_given_by_part():
    first, second = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1)
    first(torch.tensor([[3.0, 4.0]])).sum().backward()
    assert gradient_norms({"first": first, "second": second}) == {"first": 5.0, "second": 0.0}


@pytest.mark.parametrize(
    ("query", "passage", "ids", "message"),
    [
        ((2, 3), (5, 3), {}, "5 for 2 queries"),
        ((2, 3), (4, 2), {}, r"queries of shape \(2, 3\), passages \(4, 2\)"),
        ((2, 3), (4, 3), {"query_ids": torch.zeros(3)}, r"query_ids: shape \(3,\), expected \(2,\)"),
    ],
)
def test_info_nce_refuses_shapes(query, passage, ids, message):
    with pytest.raises(ShapeError, match=message):
        info_nce(torch.zeros(*query), torch.zeros(*passage), ids=PairIds(**ids))


def test_supervised_contrastive_refuses_shapes():
    with pytest.raises(ShapeError, match=r"labels: shape \(3,\) for vectors of shape \(2, 2\)"):
        supervised_contrastive(torch.zeros(2, 2), torch.zeros(3))


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan, "x"])
def test_contrastive_config_refuses_a_temperature(temperature):
    with pytest.raises(ConfigError, match="temperature is"):
        ContrastiveConfig(temperature=temperature)


def test_contrastive_config_refuses_in_batch_options_without_in_batch():
    with pytest.raises(ConfigError, match="in_batch_negatives is False, but scope"):
        ContrastiveConfig(in_batch_negatives=False, scope="full")
