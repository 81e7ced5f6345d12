"""Orders of rows: each row once, the same each time, several of a class together."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.finetuning.sampling import ClassSampler, new_sampler


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 5), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_every_row_is_in_every_epoch_once_and_orders_repeat(labels, seed, epoch):
    for build in (
        lambda: ClassSampler(labels, seed=seed),
        lambda: new_sampler(labels, labels=None, batch_size=4, seed=seed, mixed_lengths=True),
        lambda: new_sampler(labels, labels=None, batch_size=4, seed=seed, mixed_lengths=False),
    ):
        one, other = build(), build()
        one.set_epoch(epoch)
        other.set_epoch(epoch)
        assert sorted(one) == list(range(len(labels)))
        assert list(one) == list(other)
        assert len(one) == len(labels)


def test_rows_of_a_class_come_four_at_a_time_and_epochs_differ():
    labels = [index % 10 for index in range(80)]
    sampler = ClassSampler(labels, seed=0)
    order = [labels[index] for index in sampler]
    assert 60 <= sum(a == b for a, b in pairwise(order)) <= 61
    pieces = order[::4]
    assert all(len(set(pieces[start : start + 10])) == 10 for start in (0, 10))
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
