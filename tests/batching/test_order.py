"""Batch plans: every piece once, within the budget."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.batching.pad import plan_batches
from genoembed.errors import ConfigError, SequenceLengthError
from tests.strategies import lengths as lengths_strategy


@settings(deadline=None, max_examples=150)
@given(
    lengths=lengths_strategy(),
    max_tokens=st.integers(1, 300),
    max_rows=st.none() | st.integers(1, 6),
    max_padding=st.none() | st.integers(0, 40),
    equal_lengths=st.booleans(),
)
def test_plan_batches_holds_its_promises(lengths, max_tokens, max_rows, max_padding, equal_lengths):
    batches = plan_batches(
        lengths,
        max_tokens=max_tokens,
        max_rows=max_rows,
        max_padding=max_padding,
        equal_lengths=equal_lengths,
    )
    order = [index for batch in batches for index in batch]
    assert order == sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    for batch in batches:
        assert batch
        slots = len(batch) * max(lengths[index] for index in batch)
        assert slots <= max_tokens or len(batch) == 1
        assert max_rows is None or len(batch) <= max_rows
        assert max_padding is None or slots - sum(lengths[index] for index in batch) <= max_padding
        assert not equal_lengths or len({lengths[index] for index in batch}) == 1


@settings(deadline=None, max_examples=60)
@given(
    lengths=lengths_strategy(),
    max_tokens=st.integers(1, 300),
    max_padding=st.none() | st.integers(0, 40),
)
def test_plan_batches_opens_a_batch_only_when_it_must(lengths, max_tokens, max_padding):
    batches = plan_batches(lengths, max_tokens=max_tokens, max_padding=max_padding)
    for batch, following in itertools.pairwise(batches):
        length = lengths[following[0]]
        padding = sum(length - lengths[index] for index in batch)
        is_full = (len(batch) + 1) * length > max_tokens
        assert is_full or (max_padding is not None and padding > max_padding)


def test_plan_batches_exact_padding_fits_and_one_over_does_not():
    assert plan_batches([4, 6, 6], max_tokens=99, max_padding=2) == [(0, 1, 2)]
    assert plan_batches([4, 6, 6], max_tokens=99, max_padding=1) == [(0,), (1, 2)]


def test_plan_batches_exact_budget_fits_and_one_over_does_not():
    assert plan_batches([4, 4], max_tokens=8) == [(0, 1)]
    assert plan_batches([4, 4], max_tokens=7) == [(0,), (1,)]


def test_plan_batches_a_piece_over_the_budget_goes_alone():
    assert plan_batches([50, 2, 2], max_tokens=10) == [(1, 2), (0,)]


def test_plan_batches_of_nothing_is_nothing():
    assert plan_batches([], max_tokens=8) == []


def test_plan_batches_refuses_an_empty_piece():
    with pytest.raises(SequenceLengthError, match="piece 1: no tokens"):
        plan_batches([3, 0], max_tokens=8)


def test_plan_batches_reports_all_wrong_limits_at_once():
    with pytest.raises(ConfigError, match=r"max_tokens: 0, .*max_rows: 0, .*max_padding: -1, "):
        plan_batches([3], max_tokens=0, max_rows=0, max_padding=-1)
