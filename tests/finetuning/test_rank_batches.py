"""Rows dealt to processes: every row once, the batches of one process laid end to end."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import SequentialSampler

from genoembed.errors import ConfigError
from genoembed.finetuning.sampling import RankBatches


def batches_of(count, *, rows, world_size, least=1):
    order = SequentialSampler(range(count))
    return [
        RankBatches(order, rows=rows, least=least, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(1, 2))
def test_rank_batches_joined_are_those_of_one_process(count, rows, world_size, least):
    if count < world_size:
        with pytest.raises(ConfigError, match=f"{count} rows for {world_size} processes"):
            batches_of(count, rows=rows, world_size=world_size)
        return
    ranks = batches_of(count, rows=rows, world_size=world_size, least=least)
    dealt = [list(rank) for rank in ranks]
    assert {len(found) for found in dealt} == {len(ranks[0])}
    together = [list(chain.from_iterable(parts)) for parts in zip(*dealt, strict=True)]
    (alone,) = batches_of(count, rows=rows * world_size, world_size=1)
    assert together == list(alone)[: len(together)]
    left_out = count - sum(map(len, together))
    assert left_out < min(least, rows) * world_size
    for parts in zip(*dealt, strict=True):
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert 1 <= min(sizes) <= max(sizes) <= rows


def test_rank_batches_leave_out_a_row_alone_unless_there_is_no_other():
    (one,) = batches_of(5, rows=2, world_size=1, least=2)
    assert list(one) == [[0, 1], [2, 3]]
    (single,) = batches_of(1, rows=2, world_size=1, least=2)
    assert list(single) == [[0]]
    (asked_for,) = batches_of(3, rows=1, world_size=1, least=2)
    assert list(asked_for) == [[0], [1], [2]]
