"""Pooling: the oracle's numbers, whatever stands in padding."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import ConfigError, EmptyPoolError, ShapeError
from genoembed.pooling import reduce
from genoembed.pooling.reduce import check_pooling, merge_windows, pool
from tests.oracles import pool_row
from tests.strategies import hidden_and_mask

METHODS = ("mean", "max", "first", "last", "cls", "weighted_mean", "mean_std")
methods = pytest.mark.parametrize("method", METHODS)


def oracle(hidden, mask, method):
    return np.array(
        [pool_row(row.tolist(), kept.tolist(), method) for row, kept in zip(hidden, mask, strict=True)]
    )


@methods
@settings(deadline=None, max_examples=40)
@given(case=hidden_and_mask())
def test_pool_equals_the_oracle(method, case):
    hidden, mask = case
    pooled = pool(torch.from_numpy(hidden), torch.from_numpy(mask), method=method)
    assert pooled.dtype == torch.float64
    np.testing.assert_allclose(pooled.numpy(), oracle(hidden, mask, method), rtol=1e-12, atol=1e-12)
    half = torch.from_numpy(hidden).half()
    pooled = pool(half, torch.from_numpy(mask), method=method)
    assert pooled.dtype == torch.float32
    np.testing.assert_allclose(
        pooled.numpy(), oracle(half.double().numpy(), mask, method), rtol=1e-5, atol=1e-5
    )


@methods
@settings(deadline=None, max_examples=40)
@given(case=hidden_and_mask(), num_padding=st.integers(1, 9), chunk=st.sampled_from([1, 3, 9, 1 << 16]))
def test_pool_is_bitwise_the_same_with_any_padding(method, case, num_padding, chunk):
    hidden, mask = torch.from_numpy(case[0]).float(), torch.from_numpy(case[1])
    rubbish = torch.full((hidden.shape[0], num_padding, hidden.shape[2]), torch.nan)
    padded = torch.cat([hidden, rubbish], dim=1)
    padded_mask = torch.nn.functional.pad(mask, (0, num_padding), value=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reduce._CHUNK_VALUES, "cpu", chunk)
        assert torch.equal(pool(hidden, mask, method=method), pool(padded, padded_mask, method=method))


@methods
@settings(deadline=None, max_examples=40)
@given(case=hidden_and_mask(), chunk=st.sampled_from([3, 9, 1 << 16]))
def test_pool_a_row_does_not_depend_on_its_batch_mates(method, case, chunk):
    hidden, mask = torch.from_numpy(case[0]).float(), torch.from_numpy(case[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reduce._CHUNK_VALUES, "cpu", chunk)
        together = pool(hidden, mask, method=method)
        alone = [pool(hidden[row : row + 1], mask[row : row + 1], method=method) for row in range(len(mask))]
    assert torch.equal(together, torch.cat(alone))


@methods
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 1e30])
def test_pool_nothing_leaks_from_masked_positions(method, rubbish):
    hidden = torch.tensor([[[-1.0], [-2.0], [rubbish], [-4.0], [rubbish]]])
    mask = torch.tensor([[True, True, False, True, False]])
    expected = {
        "mean": -7 / 3,
        "max": -1.0,
        "first": -1.0,
        "last": -4.0,
        "cls": -1.0,
        "weighted_mean": -17 / 6,
        "mean_std": (-7 / 3, (14 / 9) ** 0.5),
    }
    assert pool(hidden, mask, method=method)[0].tolist() == pytest.approx(np.ravel(expected[method]))


@methods
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pool_changes_no_input(method, dtype):
    hidden = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    hidden_before, mask_before = hidden.clone(), mask.clone()
    pooled = pool(hidden, mask, method=method)
    pooled.fill_(7.0)
    assert torch.equal(hidden, hidden_before)
    assert torch.equal(mask, mask_before)


def test_pool_half_precision_mean_of_many_tokens_does_not_overflow():
    hidden = torch.full((1, 4000, 2), 30.0, dtype=torch.float16)
    mask = torch.ones(1, 4000, dtype=torch.bool)
    for method in ("mean", "weighted_mean"):
        assert pool(hidden, mask, method=method).tolist() == [[30.0, 30.0]]
    assert pool(hidden, mask, method="mean_std").tolist() == [[30.0, 30.0, 0.0, 0.0]]


def test_pool_float32_mean_of_very_many_tokens_loses_no_digits():
    values = torch.rand(1, 200_000, 1, generator=torch.Generator().manual_seed(0)) + 100
    mean = pool(values, torch.ones(1, 200_000, dtype=torch.bool), method="mean")
    assert mean.item() == pytest.approx(values.double().mean().item(), rel=1e-7)


def test_pool_float32_deviation_of_what_varies_little_loses_no_digits():
    values = torch.rand(1, 50_000, 1, generator=torch.Generator().manual_seed(0)) * 1e-2 + 100
    _, deviation = pool(values, torch.ones(1, 50_000, dtype=torch.bool), method="mean_std")[0].tolist()
    assert deviation == pytest.approx(values.double().std(correction=0).item(), rel=1e-6)


def test_pool_deviation_of_one_token_is_0_and_so_is_its_gradient():
    hidden = torch.tensor([[[3.0, -1.0], [9.0, 9.0]], [[1.0, 1.0], [1.0, 5.0]]], requires_grad=True)
    pooled = pool(hidden, torch.tensor([[True, False], [True, True]]), method="mean_std")
    assert pooled.tolist() == [[3.0, -1.0, 0.0, 0.0], [1.0, 3.0, 0.0, 2.0]]
    pooled[:, 2:].sum().backward()
    assert hidden.grad.tolist() == [[[0.0, 0.0], [0.0, 0.0]], [[0.0, -0.5], [0.0, 0.5]]]


def test_pool_max_of_negative_features_is_negative_next_to_padding():
    hidden = torch.tensor([[[-3.0], [-2.0], [0.0]]], dtype=torch.float16)
    assert pool(hidden, torch.tensor([[True, True, False]]), method="max").tolist() == [[-2.0]]


@pytest.mark.parametrize("method", ["mean", "max", "weighted_mean", "mean_std"])
def test_pool_nan_in_a_kept_token_stays_visible(method):
    hidden = torch.tensor([[[1.0], [math.nan]]])
    assert pool(hidden, torch.ones(1, 2, dtype=torch.bool), method=method).isnan().all()


def test_pool_weighted_mean_weighs_by_rank_among_the_kept():
    hidden = torch.tensor([[[9.0], [1.0], [9.0], [4.0]]])
    mask = torch.tensor([[False, True, False, True]])
    assert pool(hidden, mask, method="weighted_mean").tolist() == [[3.0]]


def test_pool_first_is_the_first_kept_token_and_cls_the_first_of_all():
    hidden = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    mask = torch.tensor([[False, True, True, False]])
    assert pool(hidden, mask, method="first").tolist() == [[2.0]]
    assert pool(hidden, mask, method="last").tolist() == [[3.0]]
    assert pool(hidden, mask, method="cls").tolist() == [[1.0]]


def test_pool_cls_under_left_padding_is_the_first_real_token():
    hidden = torch.tensor([[[0.0], [0.0], [5.0], [6.0]]])
    mask = torch.tensor([[False, False, False, True]])
    attention = torch.tensor([[0, 0, 1, 1]])
    assert pool(hidden, mask, method="cls", attention_mask_BL=attention).tolist() == [[5.0]]


@pytest.mark.parametrize("method", ["mean", "max", "first", "last", "weighted_mean", "mean_std"])
def test_pool_names_the_rows_without_a_token(method):
    mask = torch.tensor([[True, False], [False, False], [False, False]])
    with pytest.raises(EmptyPoolError, match=r"rows \[1, 2\]: no token is left to pool.*skip_first"):
        pool(torch.ones(3, 2, 4), mask, method=method)


@pytest.mark.parametrize("method", ["mean", "max", "first", "last", "weighted_mean"])
def test_pool_gives_nan_for_empty_rows_on_request(method):
    mask = torch.tensor([[True, False], [False, False]])
    pooled = pool(torch.ones(2, 2, 3), mask, method=method, empty="nan")
    assert pooled[0].tolist() == [1.0, 1.0, 1.0]
    assert pooled[1].isnan().all()


def test_pool_refuses_shapes_and_dtypes_that_do_not_belong_together():
    hidden, mask = torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(
        ShapeError, match=r"mask: torch.bool of shape \(2, 2\), expected torch.bool of \(2, 3\)"
    ):
        pool(hidden, mask[:, :2], method="mean")
    with pytest.raises(ShapeError, match=r"mask: torch.int64 of shape"):
        pool(hidden, mask.long(), method="mean")
    with pytest.raises(
        ShapeError, match=r"hidden states: torch.float32 of shape \(2, 3\), expected floating"
    ):
        pool(hidden[..., 0], mask, method="mean")
    with pytest.raises(ShapeError, match=r"hidden states: torch.int64"):
        pool(hidden.long(), mask, method="mean")
    with pytest.raises(ShapeError, match=r"attention mask: shape \(2, 2\), expected \(2, 3\)"):
        pool(hidden, mask, method="cls", attention_mask_BL=mask[:, :2])


def test_pool_refuses_an_unknown_method():
    with pytest.raises(ConfigError, match="pooling 'median': expected one of mean, max, first"):
        pool(torch.ones(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), method="median")
    with pytest.raises(ConfigError, match="pooling 'none': expected one of mean"):
        merge_windows(torch.ones(1, 1), torch.ones(1), method="none")


@pytest.mark.parametrize("method", ["mean", "max", "first", "last", "cls", "mean_std"])
@settings(deadline=None, max_examples=40)
@given(case=hidden_and_mask(max_rows=1), cuts=st.lists(st.integers(0, 12), max_size=4))
def test_merge_windows_equals_pooling_the_whole(method, case, cuts):
    hidden, mask = torch.from_numpy(case[0]), torch.from_numpy(case[1])
    bounds = sorted({0, hidden.shape[1], *(cut for cut in cuts if cut < hidden.shape[1])})
    vectors, weights = [], []
    for start, end in itertools.pairwise(bounds):
        window = mask[:, start:end]
        vectors.append(pool(hidden[:, start:end], window, method=method, empty="nan"))
        weights.append(window.sum(dim=1))
    assert vectors
    merged = merge_windows(torch.cat(vectors), torch.cat(weights), method=method)
    torch.testing.assert_close(merged, pool(hidden, mask, method=method)[0], rtol=1e-12, atol=1e-12)


def test_merge_windows_weighted_mean_is_the_weighted_mean_of_the_windows():
    vectors = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    merged = merge_windows(vectors, torch.tensor([3, 1]), method="weighted_mean")
    assert merged.tolist() == [1.75, 3.5]


@methods
def test_merge_windows_of_one_is_that_one_and_changes_no_input(method):
    vectors = torch.tensor([[-1.5, 2.0]], dtype=torch.bfloat16)
    merged = merge_windows(vectors, torch.tensor([7]), method=method)
    assert merged.dtype == torch.float32
    assert merged.tolist() == [-1.5, 2.0]
    merged.fill_(9.0)
    assert vectors.tolist() == [[-1.5, 2.0]]


@pytest.mark.parametrize("method", ["mean", "max", "first", "last", "weighted_mean"])
def test_merge_windows_never_looks_at_windows_that_kept_nothing(method):
    vectors = torch.tensor([[math.nan], [2.0], [math.nan]])
    assert merge_windows(vectors, torch.tensor([0, 5, 0]), method=method).tolist() == [2.0]


def test_merge_windows_refuses_windows_without_tokens():
    with pytest.raises(EmptyPoolError, match="2 windows: no token is left to pool"):
        merge_windows(torch.ones(2, 3), torch.zeros(2), method="mean")


@pytest.mark.parametrize(
    ("vectors", "weights"),
    [(torch.ones(2, 3), torch.ones(3)), (torch.ones(3), torch.ones(3)), (torch.ones(1, 2), -torch.ones(1))],
)
def test_merge_windows_refuses_what_does_not_belong_together(vectors, weights):
    with pytest.raises(ShapeError, match=r"windows: vectors of shape .*expected \(K, D\) and \(K,\)"):
        merge_windows(vectors, weights, method="mean")


@pytest.mark.parametrize("method", ["first", "cls"])
def test_check_pooling_refuses_a_constant(method):
    with pytest.raises(ConfigError, match=f"pooling '{method}': the model is causal.*set pooling to 'mean'"):
        check_pooling(method, is_causal=True)
    check_pooling(method, is_causal=False)


def test_check_pooling_takes_the_rest_and_refuses_the_unknown():
    for method in ("mean", "max", "last", "weighted_mean", "none"):
        check_pooling(method, is_causal=True)
    with pytest.raises(ConfigError, match="pooling 'avg': expected one of"):
        check_pooling("avg", is_causal=False)
