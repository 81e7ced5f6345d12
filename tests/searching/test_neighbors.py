"""Exact search against a plain float64 comparison of everything with everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import ShapeError
from genoembed.pipeline.embedding_file import VectorSource
from genoembed.searching.neighbors import NO_ROW, Owners, exact_neighbors

METRICS = ("cosine", "dot", "euclidean")


def scores_by_hand(query, row, metric):
    if metric == "dot":
        return sum(float(a) * float(b) for a, b in zip(query, row, strict=True))
    if metric == "euclidean":
        return float(np.sqrt(sum((float(a) - float(b)) ** 2 for a, b in zip(query, row, strict=True))))
    lengths = [float(np.sqrt(sum(float(a) ** 2 for a in vector))) for vector in (query, row)]
    return scores_by_hand(query, row, "dot") / (lengths[0] * lengths[1])


def brute_force(queries, rows, *, k, metric):
    """Rows and scores, ties in the order of the rows."""
    sign = 1 if metric == "euclidean" else -1
    found = []
    for query in queries:
        scored = [(round(sign * scores_by_hand(query, row, metric), 12), n) for n, row in enumerate(rows)]
        found.append([(n, sign * score) for score, n in sorted(scored)[:k]])
    return np.array([[n for n, _ in hits] for hits in found]), np.array(
        [[s for _, s in hits] for hits in found]
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_exact_neighbors_are_those_of_a_plain_comparison(metric, shift):
    rng = np.random.default_rng(3)
    rows = (rng.normal(size=(90, 7)) + shift).astype(np.float32)
    queries = (rng.normal(size=(11, 7)) + shift).astype(np.float32)
    found = exact_neighbors(queries, VectorSource(rows), k=5, metric=metric, rows_per_block=16)
    wanted, scores = brute_force(queries, rows, k=5, metric=metric)
    np.testing.assert_array_equal(found.rows, wanted)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_exact_neighbors_of_equal_score_come_in_the_order_of_the_rows(metric):
    few = np.array([[1, 2, 0], [3, -1, 2], [0, 1, 1]], np.float32)
    rows = few[np.random.default_rng(0).integers(0, 3, 60)]
    found = exact_neighbors(few, VectorSource(rows), k=30, metric=metric, rows_per_block=7)
    for row, (query, hits, scores) in enumerate(zip(few, found.rows, found.scores, strict=True)):
        same = np.flatnonzero((rows == query).all(axis=1))
        assert len(same) > 5, row
        if metric != "dot":
            np.testing.assert_array_equal(hits[: len(same)], same)
        for score in np.unique(scores):
            assert (np.diff(hits[scores == score]) > 0).all()


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    k=st.integers(1, 12),
    metric=st.sampled_from(METRICS),
)
def test_exact_neighbors_do_not_depend_on_the_size_of_blocks(seed, sizes, k, metric):
    rng = np.random.default_rng(seed)
    rows = np.round(rng.normal(size=(60, 5)) * 2 + 0.7, 1).astype(np.float32)
    rows[rng.integers(0, 60, 20)] = rows[rng.integers(0, 60, 20)]
    queries = rows[:9]
    first, second = (
        exact_neighbors(queries, VectorSource(rows), k=k, metric=metric, rows_per_block=size)
        for size in sizes
    )
    np.testing.assert_array_equal(first.rows, second.rows)
    np.testing.assert_array_equal(first.scores, second.scores)


def test_exact_neighbors_tell_rows_apart_that_float32_products_do_not():
    direction = np.array([1.0, 1.0, 1.0, 1.0])
    steps = np.arange(40) * 2.0**-21
    rows = (direction + steps[:, None] * np.array([1.0, -1.0, 0.0, 0.0])).astype(np.float32)
    found = exact_neighbors(rows[:1], VectorSource(rows), k=40, metric="cosine")
    np.testing.assert_array_equal(found.rows[0], np.arange(40))


def test_exact_neighbors_of_a_small_file_are_all_its_rows():
    found = exact_neighbors(np.eye(2), VectorSource(np.eye(2)), k=10)
    assert found.rows.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("metric", METRICS)
def test_rows_that_cannot_be_compared_are_nobodys_neighbors(metric):
    rows = np.array([[1.0, 0.0], [np.nan, 1.0], [0.0, np.inf], [0.5, 0.5]])
    queries = np.array([[1.0, 0.1], [np.nan, 0.0]])
    found = exact_neighbors(queries, VectorSource(rows), k=4, metric=metric)
    assert sorted(found.rows[0].tolist()) == [NO_ROW, NO_ROW, 0, 3]
    assert np.isnan(found.scores[0, 2:]).all()
    assert (found.rows[1] == NO_ROW).all()


def test_a_row_of_zeros_has_no_cosine_but_a_distance():
    rows = VectorSource(np.array([[0.0, 0.0], [1.0, 1.0]]))
    assert exact_neighbors(np.ones((1, 2)), rows, k=2).rows.tolist() == [[1, NO_ROW]]
    assert exact_neighbors(np.ones((1, 2)), rows, k=2, metric="euclidean").rows.tolist() == [[1, 0]]


def test_owners_keep_their_own_rows_out():
    rows = np.random.default_rng(1).normal(size=(30, 4))
    numbers = np.arange(30) // 3
    owners = Owners(queries=numbers[:12], rows=numbers)
    found = exact_neighbors(rows[:12], VectorSource(rows), k=27, owners=owners, rows_per_block=8)
    for query, hits in enumerate(found.rows):
        assert sorted(hits.tolist()) == [row for row in range(30) if numbers[row] != numbers[query]]


def test_exact_neighbors_refuse_another_width():
    with pytest.raises(ShapeError, match=r"queries: shape \(1, 3\), expected \(Q, 2\)"):
        exact_neighbors(np.ones((1, 3)), VectorSource(np.ones((4, 2))), k=1)


def test_inputs_stay_as_they_were():
    rows, queries = np.arange(12.0).reshape(4, 3) + 1, np.ones((2, 3))
    before = rows.copy(), queries.copy()
    exact_neighbors(queries, VectorSource(rows), k=2, metric="euclidean")
    np.testing.assert_array_equal(rows, before[0])
    np.testing.assert_array_equal(queries, before[1])
