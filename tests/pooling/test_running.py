"""Blocks of rows pooled one after another give what the rows give at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.pooling.reduce import RunningPool, pool

METHODS = ("mean", "weighted_mean", "mean_std", "max", "first", "last", "cls")


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    method=st.sampled_from(METHODS),
    keep=st.sampled_from([0.2, 0.7, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_blocks_pool_like_the_whole(sizes, method, keep, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    length = sum(sizes)
    hidden = torch.randn(3, length, 5, generator=generator)
    mask = torch.rand(3, length, generator=generator) < keep
    mask[:, torch.randint(0, length, (), generator=generator)] = True
    hidden[~mask] = torch.nan if method != "cls" else 7.0
    running = RunningPool(method)
    for block, block_mask in zip(hidden.split(sizes, dim=1), mask.split(sizes, dim=1), strict=True):
        running.add(block, block_mask)
    assert torch.allclose(running.pooled(), pool(hidden, mask, method=method), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_without_tokens_is_nan_and_kept_nan_stays(method) -> None:
    running = RunningPool(method)
    kept = torch.tensor([[True, True], [False, False]])
    for value in (torch.nan, 1.0):
        running.add(torch.full((2, 2, 3), value), kept)
    pooled = running.pooled()
    if method != "cls":
        assert pooled[1].isnan().all()
    assert pooled[0].isnan().all() == (method != "last")


@pytest.mark.parametrize("method", ["mean", "max"])
def test_dtype_is_that_of_pool(method) -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        running = RunningPool(method)
        running.add(torch.ones(1, 2, 3, dtype=dtype), torch.ones(1, 2, dtype=torch.bool))
        assert running.pooled().dtype == expected
