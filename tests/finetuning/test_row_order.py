"""Orders of rows: each row once, the same each time, several of a class together."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.finetuning.sampling import ClassSampler, RankBatches, new_sampler


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 5), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_every_row_is_in_every_epoch_once_and_orders_repeat(labels, seed, epoch):
    for build in (
        lambda: ClassSampler(labels, batch_size=4, seed=seed),
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
    sampler = ClassSampler(labels, batch_size=16, seed=0)
    order = [labels[index] for index in sampler]
    assert 60 <= sum(a == b for a, b in pairwise(order)) <= 61
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first


def batches_of(labels, *, rows, epoch, seed=0):
    sampler = ClassSampler(labels, batch_size=rows, seed=seed)
    sampler.set_epoch(epoch)
    return [[labels[row] for row in batch] for batch in RankBatches(sampler, rows=rows)]


@given(st.integers(20, 300), st.floats(0.02, 0.98), st.integers(2, 5), st.integers(2, 33), st.integers(0, 20))
@settings(deadline=None, max_examples=60)
def test_no_batch_has_one_class_unless_there_are_too_few_others(num_rows, share, num_classes, rows, seed):
    rare = [f"rare {index % (num_classes - 1)}" for index in range(max(1, int(num_rows * share)))]
    labels = rare + ["common"] * (num_rows - len(rare))
    batches = batches_of(labels, rows=rows, epoch=seed % 3, seed=seed)
    alone = [batch for batch in batches if len(batch) > 1 and len(set(batch)) == 1]
    largest = Counter(labels).most_common(1)[0][1]
    enough = num_rows - largest >= len(batches)
    assert not (alone and enough)


def test_each_class_is_spread_evenly_over_the_epoch():
    labels = ["common"] * 900 + ["rare"] * 100
    for epoch in range(3):
        shares = [batch.count("rare") / len(batch) for batch in batches_of(labels, rows=50, epoch=epoch)]
        assert 0.06 <= min(shares) <= max(shares) <= 0.16


def test_short_last_batch_has_several_classes_too():
    labels = ["common"] * 60 + ["rare"] * 6
    for seed in range(20):
        assert len(set(batches_of(labels, rows=16, epoch=0, seed=seed)[-1])) == 2
