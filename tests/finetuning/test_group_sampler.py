"""Drawing groups: afresh each epoch, reproducible, and plain words about what data cannot give."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import ConfigError, TrainingWarning
from genoembed.finetuning.sampling import FILLER, GroupSampler


def make(positives, negatives, size, match=None, **options):
    """Make a sampler; ``match`` is the warning that is expected, and no other."""
    if match is None:
        return GroupSampler(positives, negatives, train_group_size=size, seed=3, **options)
    with pytest.warns(TrainingWarning, match=match):
        return GroupSampler(positives, negatives, train_group_size=size, seed=3, **options)


def test_group_sampler_draws_afresh_each_epoch_and_in_time_all():
    sampler = make([2], [30], 4, match=r"1 of 1 rows have more negatives than the 3 .*\(up to 27 more\)")
    draws = [sampler.draw(0, epoch=epoch) for epoch in range(60)]
    assert all(len(set(draw.negatives)) == 3 for draw in draws)
    assert {index for draw in draws for index in draw.negatives} == set(range(30))
    assert {draw.positive for draw in draws} == {0, 1}
    assert len(set(draws)) > 55


def test_group_sampler_depends_on_seed_epoch_and_row_alone():
    first, second = make([1, 1], [9, 9], 10), make([1, 1], [9, 9], 10)
    second.draw(0, epoch=7)
    assert first.draw(1, epoch=2) == second.draw(1, epoch=2)
    assert first.draw(1, epoch=2) != first.draw(0, epoch=2)
    other_seed = GroupSampler([1, 1], [9, 9], train_group_size=10, seed=4)
    assert other_seed.draw(1, epoch=2) != first.draw(1, epoch=2)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(2, 7))
@pytest.mark.filterwarnings("ignore::genoembed.errors.TrainingWarning")
def test_group_sampler_draws_what_the_row_has(negatives, size):
    sampler = GroupSampler([1] * len(negatives), negatives, train_group_size=size, seed=0)
    draws = [sampler.draw(row, epoch=0) for row in range(len(negatives))]
    assert sampler.group_size == min(size, 1 + max(negatives))
    used = [[index for index in draw.negatives if index != FILLER] for draw in draws]
    assert all(len(draw.negatives) == sampler.group_size - 1 for draw in draws)
    assert all(set(found) <= set(range(count)) for found, count in zip(used, negatives, strict=True))
    assert all(len(set(found)) == min(size - 1, n) for found, n in zip(used, negatives, strict=True))


def test_group_sampler_says_by_how_much_a_group_is_too_large():
    sampler = make([1, 1], [3, 3], 8, match="takes 7 negatives per row, 4 more than the row with the most")
    assert sampler.group_size == 4


def test_group_sampler_says_how_many_rows_are_short():
    make([1] * 3, [3, 1, 2], 4, match="but 2 of 3 rows have fewer, 3 negatives short altogether")


def test_group_sampler_says_that_more_negatives_change_nothing():
    make([1], [100], 3, match="more negatives in the data do not make a step harder; raise train_group_size")


def test_group_sampler_without_negatives_uses_those_of_the_batch():
    with pytest.warns(TrainingWarning) as caught:
        sampler = GroupSampler([1, 1], [0, 0], train_group_size=4, seed=0)
    assert "2 of 2 rows have no negatives; in-batch negatives" in str(caught[0].message)
    assert "takes 3 negatives per row, 3 more than the row with the most has" in str(caught[1].message)
    assert len(caught) == 2
    assert sampler.draw(0, epoch=0).negatives == ()
    sampler.check_batch(2)


def test_group_sampler_warns_where_it_was_made():
    with pytest.warns(TrainingWarning) as caught:
        GroupSampler([1], [5], train_group_size=2, seed=0)
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("ignore:train_group_size is 2, which takes")
@pytest.mark.parametrize("size", [1, 2])
def test_group_of_one_in_a_batch_of_one_is_an_error(size):
    with pytest.warns(TrainingWarning, match="in-batch negatives"):
        sampler = GroupSampler([1, 1], [0, 0], train_group_size=size, seed=0)
    with pytest.raises(ConfigError, match="a batch has one query on its own: loss and gradient would be 0"):
        sampler.check_batch(1)


def test_group_of_one_with_negatives_in_the_data_is_an_error_too():
    sampler = make([1], [4], 1, match="more negatives than the 0")
    with pytest.raises(ConfigError, match="train_group_size is 1, a query has no negatives"):
        sampler.check_batch(1)
    sampler.check_batch(2)


def test_rows_without_negatives_need_in_batch_negatives():
    with pytest.raises(ConfigError, match=r"row 2 has 0 negatives and in_batch_negatives is False"):
        make([1, 1], [2, 0], 3, in_batch_negatives=False)


def test_batch_of_one_with_negatives_of_its_own_is_fine():
    make([1], [2], 3).check_batch(1)
