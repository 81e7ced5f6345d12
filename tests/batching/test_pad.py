"""Padding and pool masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.batching.pad import count_unread, pad_batch, pool_mask
from genoembed.contracts import EncodedSequence
from genoembed.errors import ConfigError, ShapeError
from tests.oracles import pad_rows
from tests.strategies import dna_lists


def pieces_of(sequences):
    return [EncodedSequence(input_ids=np.frombuffer(sequence, dtype=np.uint8)) for sequence in sequences]


def all_kept(pieces):
    return [np.ones(len(piece.input_ids), dtype=np.bool_) for piece in pieces]


@settings(deadline=None, max_examples=60)
@given(sequences=dna_lists(), multiple=st.integers(1, 9), pad=st.sampled_from([0, 1, 65]))
def test_pad_batch_equals_the_oracle(sequences, multiple, pad):
    pieces = pieces_of(sequences)
    rows = range(10, 10 + len(pieces))
    batch = pad_batch(
        pieces, pool_masks=all_kept(pieces), rows=rows, pad_token_id=pad, pad_to_multiple_of=multiple
    )
    real = [[1] * len(sequence) for sequence in sequences]
    assert batch.input_ids.tolist() == pad_rows([list(sequence) for sequence in sequences], pad, multiple)
    assert batch.attention_mask.tolist() == pad_rows(real, 0, multiple)
    assert batch.pool_mask.tolist() == pad_rows([[True] * len(row) for row in real], False, multiple)
    assert batch.rows == tuple(rows)
    dtypes = (batch.input_ids.dtype, batch.attention_mask.dtype, batch.pool_mask.dtype)
    assert dtypes == (torch.int64, torch.int64, torch.bool)


@pytest.mark.parametrize(("length", "padded"), [(1, 4), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_pad_batch_a_length_that_is_a_multiple_stays(length, padded):
    pieces = pieces_of([b"A" * length])
    batch = pad_batch(pieces, pool_masks=all_kept(pieces), rows=[0], pad_token_id=1, pad_to_multiple_of=4)
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.pool_mask.shape == (1, padded)
    assert batch.num_tokens == padded


def test_pad_batch_tells_padding_by_position_not_by_id():
    pieces = pieces_of([b"A\x00", b"AAA"])
    batch = pad_batch(pieces, pool_masks=all_kept(pieces), rows=[0, 1], pad_token_id=0)
    assert batch.input_ids.tolist() == [[65, 0, 0], [65, 65, 65]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_pad_batch_has_its_own_memory():
    sequence = bytearray(b"ACGT")
    piece = EncodedSequence(input_ids=np.frombuffer(sequence, dtype=np.uint8))
    mask = np.ones(4, dtype=np.bool_)
    batch = pad_batch([piece], pool_masks=[mask], rows=[0], pad_token_id=1)
    batch.input_ids.fill_(9)
    batch.pool_mask.fill_(False)
    assert sequence == b"ACGT"
    assert mask.all()


def test_pad_batch_refuses_masks_that_do_not_fit():
    pieces = pieces_of([b"ACGT"])
    with pytest.raises(ShapeError, match=r"row 0: pool mask of shape \(3,\), expected \(4,\)"):
        pad_batch(pieces, pool_masks=[np.ones(3, dtype=np.bool_)], rows=[0], pad_token_id=1)


def test_pad_batch_refuses_different_counts_and_nothing():
    pieces = pieces_of([b"ACGT"])
    with pytest.raises(ShapeError, match="1 pieces, 1 pool masks and 2 rows"):
        pad_batch(pieces, pool_masks=all_kept(pieces), rows=[0, 1], pad_token_id=1)
    with pytest.raises(ShapeError, match="0 pieces"):
        pad_batch([], pool_masks=[], rows=[], pad_token_id=1)


def test_pad_batch_refuses_a_multiple_below_one():
    with pytest.raises(ConfigError, match="pad_to_multiple_of: 0"):
        pad_batch([], pool_masks=[], rows=[], pad_token_id=1, pad_to_multiple_of=0)


@settings(deadline=None, max_examples=100)
@given(
    length=st.integers(1, 30),
    core=st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted),
    skip_first=st.integers(0, 10),
)
def test_pool_mask_without_base_starts_is_the_mask_with_them(length, core, skip_first):
    ids = np.full(length, 65, dtype=np.uint8)
    start, end = core
    plain = pool_mask(EncodedSequence(input_ids=ids), core_start=start, core_end=end, skip_first=skip_first)
    spelled = EncodedSequence(input_ids=ids, base_start=np.arange(length), base_end=np.arange(length) + 1)
    assert plain.dtype == np.bool_
    assert plain.tolist() == [start <= base < end and base >= skip_first for base in range(length)]
    from_starts = pool_mask(spelled, core_start=start, core_end=end, skip_first=skip_first)
    assert from_starts.tolist() == plain.tolist()


def words(*spans, unread=()):
    starts, ends = np.array(spans).T
    is_unread = np.array([span in unread for span in spans])
    return EncodedSequence(
        input_ids=np.arange(len(spans)), base_start=starts, base_end=ends, is_unread=is_unread
    )


SPECIAL = (-1, -1)


def test_pool_mask_never_counts_special_tokens():
    encoded = words(SPECIAL, (0, 6), (6, 12), (12, 18), SPECIAL)
    assert pool_mask(encoded, core_start=0, core_end=18).tolist() == [0, 6, 6, 6, 0]
    assert pool_mask(encoded, core_start=6, core_end=12).tolist() == [0, 0, 6, 0, 0]
    assert pool_mask(encoded, core_start=0, core_end=18, skip_first=8).tolist() == [0, 0, 4, 6, 0]


def test_pool_mask_of_a_region_within_a_word():
    encoded = words((0, 6), (6, 12))
    assert pool_mask(encoded, core_start=2, core_end=4).tolist() == [2, 0]
    found = pool_mask(encoded, core_start=2, core_end=3)
    assert (found.dtype, found.tolist()) == (np.bool_, [True, False])


@st.composite
def encodings(draw):
    """Non-overlapping or overlapping words, with gaps of letters without a word, special tokens around."""
    spans, position = [], draw(st.integers(0, 2))
    overlaps = draw(st.booleans())
    for width in draw(st.lists(st.integers(1, 6), max_size=12)):
        spans.append((position, position + width))
        position += 1 if overlaps else width + draw(st.sampled_from([0, 0, 0, 2]))
    unread = {span for span in spans if draw(st.sampled_from([False, False, True]))}
    length = max([end for _, end in spans], default=0) + draw(st.integers(0, 3))
    return words(SPECIAL, *sorted(spans), SPECIAL, unread=unread), length


@settings(deadline=None, max_examples=300)
@given(case=encodings(), core=st.tuples(st.integers(0, 30), st.integers(0, 30)), skip_first=st.integers(0, 5))
def test_pool_mask_counts_every_base_once(case, core, skip_first):
    encoded, length = case
    start, end = sorted(min(place, length) for place in core)
    expected = np.zeros(len(encoded.input_ids))
    num_unread = 0
    tokens_at = [
        [
            t
            for t, (a, b) in enumerate(zip(encoded.base_start, encoded.base_end, strict=True))
            if a <= base < b
        ]
        for base in range(length)
    ]
    for base in range(start, end):
        num_unread += all(encoded.is_unread[token] for token in tokens_at[base])
        for token in tokens_at[base] if base >= skip_first else ():
            expected[token] += 1 / len(tokens_at[base])
    found = pool_mask(encoded, core_start=start, core_end=end, skip_first=skip_first)
    np.testing.assert_allclose(found.astype(float), expected, atol=1e-6)
    assert ((found != 0) == (expected > 0)).all()
    assert count_unread(encoded, core_start=start, core_end=end) == num_unread


def test_pool_mask_cores_that_share_no_base_share_a_word_between_them():
    encoded = words((0, 6), (6, 12), (12, 18), (18, 24))
    left = pool_mask(encoded, core_start=0, core_end=9)
    right = pool_mask(encoded, core_start=9, core_end=24)
    assert (left + right).tolist() == [6, 6, 6, 6]


def test_pool_mask_may_be_empty():
    encoded = EncodedSequence(input_ids=np.zeros(4, dtype=np.uint8))
    assert not pool_mask(encoded, core_start=0, core_end=4, skip_first=4).any()


def test_pool_mask_refuses_what_is_no_range():
    encoded = EncodedSequence(input_ids=np.zeros(4, dtype=np.uint8))
    with pytest.raises(ShapeError, match="core 3-2"):
        pool_mask(encoded, core_start=3, core_end=2)
    with pytest.raises(ConfigError, match="skip_first: -1"):
        pool_mask(encoded, core_start=0, core_end=2, skip_first=-1)
