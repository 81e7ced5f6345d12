"""The unified loss against numbers of the reference implementation, and what it promises beside them.

The reference fills padding of passages with zero vectors that MaxSim looks at. We never do; to compare, the
tests hand those zero vectors over as vectors that count.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from genoembed.config.retrieval import M3HeadsConfig, M3LossConfig
from genoembed.errors import ConfigError, ShapeError
from genoembed.retrieval.candidates import PairIds
from genoembed.retrieval.heads import M3Heads
from genoembed.retrieval.m3 import M3Loss, M3Vectors, hybrid_scores
from genoembed.retrieval.terms import NO_TERM, TokenTerms

GOLDEN = Path(__file__).parents[1] / "golden" / "losses"
VALUES = json.loads((GOLDEN / "values.json").read_text())["m3"]
SPECIAL_IDS = (0, 1, 3)
WIDTH = 8


@pytest.fixture(scope="module")
def arrays():
    with np.load(GOLDEN / "m3.npz") as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


@pytest.fixture
def vectors(arrays):
    """Representations of queries and passages, through the heads of the package."""
    config = M3HeadsConfig(pooling="cls", normalize_sparse=False, vector_window=1, skip_first=1)
    heads = M3Heads(WIDTH, config).double()
    state = {
        "sparse.linear.weight": arrays["sparse_linear__weight"],
        "sparse.linear.bias": arrays["sparse_linear__bias"],
        "multi_vector.linear.weight": arrays["colbert_linear__weight"],
        "multi_vector.linear.bias": arrays["colbert_linear__bias"],
    }
    heads.load_state_dict(state)
    embedding = arrays["model__emb__weight"].clone().requires_grad_()
    found = []
    for side in ("q", "p"):
        ids, mask = arrays[f"{side}_ids"], arrays[f"{side}_mask"].bool()
        hidden = embedding[ids]
        hidden = hidden + 0.3 * torch.tanh(hidden.cumsum(dim=1))
        is_special = torch.isin(ids, torch.tensor(SPECIAL_IDS))
        terms = TokenTerms(
            ids=ids.masked_fill(is_special, NO_TERM), positions=torch.arange(ids.shape[1]).expand_as(ids)
        )
        found.append(heads(hidden, mask, terms=terms, attention_mask_BL=mask))
    query, passage = found
    assert not bool(passage.token_mask[:, 1:].all())
    counted = torch.ones_like(passage.token_mask)
    counted[:, 0] = False
    return query, replace(passage, token_mask=counted), passage


@pytest.mark.parametrize(
    ("name", "start", "distillation"),
    [
        ("plain", None, None),
        ("self_distillation", -1, None),
        ("m3_distillation", None, "m3"),
        ("m3_and_self_distillation", -1, "m3"),
        ("kl_distillation", None, "kl"),
    ],
)
def test_m3_loss_is_that_of_the_reference(arrays, vectors, name, start, distillation):
    query, passage, _ = vectors
    config = M3LossConfig(self_distillation_start=start, distillation=distillation or "m3")
    teacher = arrays["teacher"] if distillation else None
    output = M3Loss(config)(query, passage, teacher_scores_BG=teacher)
    expected = dict(VALUES[name])
    assert output.loss.item() == pytest.approx(expected.pop("loss"), abs=1e-9, rel=0)
    taught = expected.pop("self_distillation", None)
    if taught is not None:
        expected |= dict(zip(("self_dense", "self_sparse", "self_multi_vector"), taught, strict=True))
    for part, value in expected.items():
        assert output.parts[part] == pytest.approx(value, abs=1e-9, rel=0), part
    output.loss.backward()


def test_m3_dense_loss_of_a_constant_is_ln_n(vectors):
    query, passage, _ = vectors
    assert M3Loss()(query, passage).parts["dense"] == pytest.approx(math.log(12), abs=1e-9)


def test_m3_scores_mask_padding_with_minus_infinity(vectors):
    query, with_zeros, passage = vectors
    loose, strict = (M3Loss()(query, p).parts["multi_vector"] for p in (with_zeros, passage))
    # the same loss written down once more, with -inf at padding
    assert strict == pytest.approx(7.456730068905768, abs=1e-9)
    assert abs(loose - strict) > 1e-9


def test_m3_start_step_counts_forward_passes(vectors):
    query, passage, _ = vectors
    loss = M3Loss(M3LossConfig(self_distillation_start=0))
    found = [loss(query, passage).loss.item() for _ in range(3)]
    assert found == pytest.approx(VALUES["start_step_0"], abs=1e-9, rel=0)


def test_m3_start_step_survives_resuming(vectors):
    query, passage, _ = vectors
    config = M3LossConfig(self_distillation_start=1)
    whole, before, after = (M3Loss(config) for _ in range(3))
    uninterrupted = [whole(query, passage).loss.item() for _ in range(4)]
    resumed = [before(query, passage).loss.item() for _ in range(2)]
    after.load_state_dict(before.state_dict())
    resumed += [after(query, passage).loss.item() for _ in range(2)]
    assert resumed == uninterrupted
    assert uninterrupted[1] != uninterrupted[2]


def test_m3_evaluation_neither_counts_nor_distils(vectors):
    query, passage, _ = vectors
    loss = M3Loss(M3LossConfig(self_distillation_start=-1)).eval()
    assert loss(query, passage).loss.item() == pytest.approx(VALUES["plain"]["loss"], abs=1e-9)
    assert int(loss.forwards) == 0


def test_m3_ensemble_teacher_takes_no_gradient():
    scores = torch.eye(2, dtype=torch.float64)
    vectors = [
        M3Vectors(
            dense=scores.clone().requires_grad_(),
            term_ids=torch.zeros(2, 1, dtype=torch.int64),
            term_weights=torch.ones(2, 1, dtype=torch.float64),
            tokens=torch.ones(2, 1, 2, dtype=torch.float64),
            token_mask=torch.ones(2, 1, dtype=torch.bool),
        )
        for _ in range(2)
    ]
    loss = M3Loss(M3LossConfig(self_distillation_start=-1, temperature=1.0))
    loss(*vectors).loss.backward()
    grad = vectors[0].dense.grad
    # by hand: dense scores are the identity, the others constant, so the ensemble is the identity plus a
    # constant and equals its pupil; the distillation's gradient vanishes and half the plain one is left
    pupil = torch.softmax(scores, dim=1)
    expected = 0.5 * 2 * ((pupil - scores) / 2) @ scores / 4
    torch.testing.assert_close(grad, expected)


def test_m3_dense_mode_is_the_plain_contrastive_loss():
    query = M3Vectors(dense=torch.eye(3))
    output = M3Loss(M3LossConfig(temperature=1.0))(query, query)
    assert set(output.parts) == {"dense"}
    assert output.loss.item() == pytest.approx(math.log(math.e + 2) - 1, rel=1e-6)


def test_m3_leaves_false_negatives_out_for_every_head(vectors):
    query, passage, _ = vectors
    ids = torch.arange(12)
    ids[4] = 0
    output = M3Loss()(query, passage, ids=PairIds(passage_ids=ids))
    plain = M3Loss()(query, passage)
    # passages 0 and 4 are one, so queries 0 and 1 lose a candidate each
    assert output.statistics.masked_false_negatives == 2
    assert output.statistics.negatives_per_query == pytest.approx((10 + 10 + 11) / 3)
    assert plain.statistics.negatives_per_query == 11
    assert all(output.parts[head] <= plain.parts[head] for head in plain.parts)
    assert output.parts["dense"] == pytest.approx((2 * math.log(11) + math.log(12)) / 3)


@pytest.mark.parametrize("distillation", ["m3", "kl"])
def test_m3_distillation_leaves_fillers_out(arrays, vectors, distillation):
    query, passage, _ = vectors
    mask = torch.ones(12, dtype=torch.bool)
    mask[3::4] = False
    short = {n: v.reshape(3, 4, *v.shape[1:])[:, :3].flatten(0, 1) for n, v in passage.tensors().items()}
    loss = M3Loss(M3LossConfig(distillation=distillation))
    teacher = arrays["teacher"]
    masked = loss(query, passage, ids=PairIds(passage_mask=mask), teacher_scores_BG=teacher)
    without = loss(query, M3Vectors(**short), teacher_scores_BG=teacher[:, :3])
    assert masked.loss.item() == pytest.approx(without.loss.item(), rel=1e-12)
    masked.loss.backward()


def test_m3_own_group_alone_makes_each_query_a_batch(vectors):
    query, passage, _ = vectors
    alone = M3Loss(M3LossConfig(in_batch_negatives=False))(query, passage)
    assert alone.statistics.negatives_per_query == 3
    assert alone.parts["dense"] == pytest.approx(math.log(4))


def test_m3_hybrid_score_weighs_what_is_there(vectors):
    query, _, passage = vectors
    dense_only = M3Vectors(dense=query.dense)
    assert torch.equal(hybrid_scores(dense_only, passage), query.dense @ passage.dense.T)
    sparse = hybrid_scores(query, passage, weights=(0.0, 1.0, 0.0))
    by_hand = torch.zeros_like(sparse)
    for row, column in np.ndindex(*sparse.shape):
        weights = dict(
            zip(passage.term_ids[column].tolist(), passage.term_weights[column].tolist(), strict=True)
        )
        own = zip(query.term_ids[row].tolist(), query.term_weights[row].tolist(), strict=True)
        by_hand[row, column] = sum(w * weights.get(term, 0.0) for term, w in own if term != NO_TERM)
    assert int((by_hand > 0).sum()) > 5
    torch.testing.assert_close(sparse, by_hand)
    with pytest.raises(ShapeError, match="no representation in common"):
        hybrid_scores(dense_only, M3Vectors(tokens=passage.tokens, token_mask=passage.token_mask))


def test_m3_refuses_half_of_the_heads(vectors):
    query, passage, _ = vectors
    half = replace(query, tokens=None, token_mask=None)
    with pytest.raises(ShapeError, match="expected dense alone, or dense, sparse and multi_vector"):
        M3Loss()(half, passage)


def test_m3_refuses_passages_that_are_no_groups(vectors):
    query, passage, _ = vectors
    short = M3Vectors(**{name: value[:11] for name, value in passage.tensors().items()})
    with pytest.raises(ShapeError, match="11 for 3 queries, expected the same number for each"):
        M3Loss()(query, short)


def test_m3_refuses_a_teacher_of_another_shape(vectors):
    query, passage, _ = vectors
    with pytest.raises(ShapeError, match=r"teacher_scores: shape \(2, 4\), expected \(3, G\)"):
        M3Loss()(query, passage, teacher_scores_BG=torch.zeros(2, 4))


def test_m3_config_reports_all_problems_at_once():
    with pytest.raises(ConfigError, match=r"temperature is 0; .*distillation is .x."):
        M3LossConfig(temperature=0, distillation="x")
    with pytest.raises(ConfigError, match="across_devices is about in-batch"):
        M3LossConfig(in_batch_negatives=False, across_devices=True)
