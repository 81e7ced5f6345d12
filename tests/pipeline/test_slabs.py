"""Slabs: every piece once, equal pieces run once, batches within the budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.contracts import SequenceRecord
from genoembed.pipeline import batches as slabs_module
from genoembed.pipeline.batches import SlabBuilder
from genoembed.pipeline.cutting import Cutter
from genoembed.pipeline.units import WorkUnit
from genoembed.tokenization.char import CharTokenizer
from genoembed.tokenization.hf import build_encoder
from tests.by_hand import random_dna

ENCODER = build_encoder(CharTokenizer())


def builder(*, batch_tokens=40, equal_lengths=False, **options):
    cutter = Cutter(encoder=ENCODER, max_tokens=None, is_causal=True, **options)
    return SlabBuilder(cutter=cutter, batch_tokens=batch_tokens, equal_lengths=equal_lengths)


def unit_of(sequences, number=0, **options):
    records = tuple(
        SequenceRecord(id=f"u{number}r{index}", sequence=sequence.encode(), **options)
        for index, sequence in enumerate(sequences)
    )
    return WorkUnit(number=number, records=records)


def place(piece):
    return piece.record_index, piece.is_reverse, piece.window_index


def run_pieces(slab):
    return [piece for work in slab.batches for piece in work.pieces]


# few letters and lengths, so that many pieces are equal
SEQUENCES = st.lists(
    st.text("AC", min_size=1, max_size=3) | st.text("ACGT", min_size=1, max_size=30), max_size=9
)


@settings(max_examples=80)
@given(
    units=st.lists(SEQUENCES.filter(bool), min_size=1, max_size=3),
    slab_batches=st.integers(1, 3),
    batch_tokens=st.integers(1, 40),
    equal_lengths=st.booleans(),
    window=st.none() | st.integers(2, 12),
    skip_first=st.sampled_from([0, 2]),
    both_strands=st.booleans(),
)
def test_every_piece_is_in_one_slab_and_runs_once_for_all_that_are_equal(
    units, slab_batches, batch_tokens, equal_lengths, window, skip_first, both_strands
):
    made = builder(
        batch_tokens=batch_tokens,
        equal_lengths=equal_lengths,
        window=window,
        skip_first=skip_first,
        both_strands=both_strands,
    )
    units = [unit_of(sequences, number) for number, sequences in enumerate(units)]
    before, slabs_module.SLAB_BATCHES = slabs_module.SLAB_BATCHES, slab_batches
    try:
        slabs = list(made.slabs(units))
    finally:
        slabs_module.SLAB_BATCHES = before
    for unit in units:
        mine = [slab for slab in slabs if slab.unit is unit]
        assert [slab.is_last for slab in mine] == [False] * (len(mine) - 1) + [True]
        assert sorted(index for slab in mine for index in slab.cut_records) == list(range(len(unit.records)))
        expected = [
            piece
            for index, record in enumerate(unit.records)
            for piece in made.cutter.pieces(record, index, made.cutter.windows(record))
        ]
        ran = [piece for slab in mine for piece in run_pieces(slab)]
        rest = [piece for slab in mine for piece in (*slab.repeats, *slab.empty)]
        assert sorted(map(place, ran + rest)) == sorted(map(place, expected))
        contents = [piece.content for piece in ran]
        assert len(set(contents)) == len(contents)
        counted = {piece.content for piece in expected if piece.pool_mask.any()}
        assert set(contents) == counted
        assert {piece.content for slab in mine for piece in slab.repeats} <= counted
        assert not any(piece.pool_mask.any() for slab in mine for piece in slab.empty)
        seen_records: set[int] = set()
        for slab in mine:
            assert not seen_records & {piece.record_index for piece in (*run_pieces(slab), *slab.repeats)}
            seen_records |= set(slab.cut_records)


@settings(max_examples=40)
@given(sequences=SEQUENCES.filter(bool), batch_tokens=st.integers(1, 40))
def test_batches_hold_their_pieces_within_the_budget(sequences, batch_tokens):
    for slab in builder(batch_tokens=batch_tokens).slabs([unit_of(sequences)]):
        for work in slab.batches:
            assert work.batch.num_tokens <= batch_tokens or len(work.pieces) == 1
            for row, piece in enumerate(work.pieces):
                length = len(piece.encoded.input_ids)
                assert work.batch.input_ids[row, :length].tolist() == piece.encoded.input_ids.tolist()
                assert int(work.batch.attention_mask[row].sum()) == length
                np.testing.assert_array_equal(work.batch.pool_mask[row, :length].numpy(), piece.pool_mask)


def test_same_bases_with_another_core_are_not_the_same():
    """Pooling looks at other tokens, so the vectors differ."""
    sequence = random_dna(20, 1).encode()
    records = (
        SequenceRecord(id="whole", sequence=sequence),
        SequenceRecord(id="core", sequence=sequence, core_start=5, core_end=15),
        SequenceRecord(id="again", sequence=sequence, core_start=5, core_end=15),
    )
    (slab,) = builder(batch_tokens=400).slabs([WorkUnit(number=0, records=records)])
    assert [piece.record_index for piece in run_pieces(slab)] == [0, 1]
    assert [piece.record_index for piece in slab.repeats] == [2]


def test_slab_ends_before_it_holds_much_more_than_its_batches():
    sequences = [random_dna(10, index) for index in range(2 * slabs_module.SLAB_BATCHES * 4 + 1)]
    slabs = list(builder(batch_tokens=40).slabs([unit_of(sequences)]))
    tokens = [sum(work.batch.num_tokens for work in slab.batches) for slab in slabs]
    assert tokens == [40 * slabs_module.SLAB_BATCHES] * 2 + [10]


def test_repeats_fill_slabs_too():
    """A chromosome of nothing but N is not held as a million equal windows."""
    slabs = list(builder(batch_tokens=10, window=10, stride=10).slabs([unit_of(["N" * 10_000])]))
    held = [len(run_pieces(slab)) + len(slab.repeats) for slab in slabs]
    assert sum(held) == 1000
    assert max(held) == slabs_module.SLAB_BATCHES


@pytest.mark.parametrize(
    ("length", "context", "rounds", "padded"),
    [
        (10, None, True, 16),
        (256, None, True, 256),
        (257, None, True, 320),
        (1000, None, True, 1024),
        (1000, 1010, True, 1010),  # not beyond the context
        (1000, None, False, 1000),
    ],
)
def test_lengths_are_rounded_so_that_few_shapes_run(length, context, rounds, padded):
    cutter = Cutter(encoder=ENCODER, max_tokens=context, is_causal=True)
    made = SlabBuilder(
        cutter=cutter, batch_tokens=4096, max_tokens=context, equal_lengths=False, rounds_lengths=rounds
    )
    (slab,) = made.slabs([unit_of([random_dna(length, 0)])])
    batch = slab.batches[0].batch
    assert batch.input_ids.shape == (1, padded)
    assert int(batch.attention_mask.sum()) == length


def test_models_that_see_padding_get_no_rounded_lengths():
    cutter = Cutter(encoder=ENCODER, max_tokens=None, is_causal=True)
    made = SlabBuilder(cutter=cutter, batch_tokens=4096, equal_lengths=True, rounds_lengths=True)
    (slab,) = made.slabs([unit_of([random_dna(1000, 0)])])
    assert slab.batches[0].batch.input_ids.shape == (1, 1000)
