"""Packing: nothing lost, nothing predicted across a boundary."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.batching.pack import pack_stream, packing_efficiency
from genoembed.contracts import IGNORE_INDEX
from genoembed.errors import ConfigError, SequenceLengthError, ShapeError
from tests.oracles import pack_rows
from tests.strategies import dna_lists

FIELDS = ("input_ids", "labels", "position_ids", "segment_ids")


def rows_of(batches, field):
    return [row for batch in batches for row in getattr(batch, field).tolist()]


@settings(deadline=None, max_examples=60)
@given(documents=dna_lists(), window=st.integers(2, 40), batch_size=st.integers(1, 4))
def test_pack_stream_equals_the_token_by_token_oracle(documents, window, batch_size):
    batches = list(pack_stream(documents, window=window, batch_size=batch_size))
    expected = pack_rows(documents, window, eod=0, pad=1)
    assert expected
    for field in FIELDS:
        assert rows_of(batches, field) == [row[field] for row in expected]


@settings(deadline=None, max_examples=60)
@given(documents=dna_lists(), window=st.integers(2, 40), batch_size=st.integers(1, 4))
def test_pack_stream_keeps_every_base_once_in_order(documents, window, batch_size):
    batches = list(pack_stream(documents, window=window, batch_size=batch_size))
    real = np.concatenate([batch.input_ids[batch.segment_ids >= 0].numpy() for batch in batches])
    assert real.astype(np.uint8).tobytes() == b"".join(document + b"\0" for document in documents)
    slots = sum(batch.input_ids.numel() for batch in batches)
    assert slots - real.size < window


@settings(deadline=None, max_examples=60)
@given(documents=dna_lists(), window=st.integers(2, 40), batch_size=st.integers(1, 4))
def test_pack_stream_boundaries_are_where_positions_restart(documents, window, batch_size):
    batches = list(pack_stream(documents, window=window, batch_size=batch_size))
    assert batches
    for batch in batches:
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens[-1] == batch.input_ids.numel()
        restarts = (batch.position_ids.flatten() == 0).nonzero().flatten()
        assert batch.cu_seqlens[:-1].tolist() == restarts.tolist()
        # a target's predecessor is in the same segment: nothing is predicted across a boundary
        is_target = batch.labels[:, 1:] != IGNORE_INDEX
        crosses = batch.segment_ids[:, 1:] != batch.segment_ids[:, :-1]
        assert not (is_target & crosses).any()
        assert (batch.labels[:, 0] == IGNORE_INDEX).all()


def test_pack_stream_predicts_eod_from_the_last_base_and_never_a_first_base():
    batch = next(pack_stream([b"ACG", b"TTT"], window=8))
    assert batch.labels.tolist() == [[-100, 67, 71, 0, -100, 84, 84, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch.cu_seqlens.tolist() == [0, 4, 8]


def test_pack_stream_cut_document_goes_on_as_a_new_segment():
    batch = next(pack_stream([b"ACGTA"], window=3, batch_size=2))
    assert batch.input_ids.tolist() == [[65, 67, 71], [84, 65, 0]]
    assert batch.labels.tolist() == [[-100, 67, 71], [-100, 65, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 3, 6]


def test_pack_stream_padding_is_its_own_last_segment():
    batch = next(pack_stream([b"AC"], window=6))
    assert batch.input_ids.tolist() == [[65, 67, 0, 1, 1, 1]]
    assert batch.labels.tolist() == [[-100, 67, 0, -100, -100, -100]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, -1, -1, -1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 6]
    assert packing_efficiency(batch) == 0.5


def test_pack_stream_ignores_padding_by_position_when_pad_is_eod():
    batch = next(pack_stream([b"AC"], window=5, pad_token_id=0))
    assert batch.input_ids.tolist() == [[65, 67, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, 67, 0, -100, -100]]


def test_pack_stream_exact_fit_has_no_padding():
    batches = list(pack_stream([b"ACG", b"ACG"], window=4, batch_size=3))
    assert len(batches) == 1
    assert packing_efficiency(batches[0]) == 1.0


def test_pack_stream_drop_last_counts_what_it_leaves_out(caplog):
    dropped = []
    with caplog.at_level(logging.INFO, logger="genoembed.batching.pack"):
        documents = [b"ACGT", b"ACGT"]
        batches = list(pack_stream(documents, window=4, batch_size=2, drop_last=True, on_drop=dropped.append))
    assert [batch.input_ids.shape for batch in batches] == [(2, 4)]
    assert dropped == [2]
    assert "left out 2 tokens" in caplog.text


def test_pack_stream_drop_last_keeps_the_full_rows_of_the_last_batch():
    dropped = []
    documents = [b"ACGTACGTAC"]
    (batch,) = pack_stream(documents, window=4, batch_size=8, drop_last=True, on_drop=dropped.append)
    assert batch.input_ids.tolist() == [list(b"ACGT"), list(b"ACGT")]
    assert dropped == [3]


def test_pack_stream_drop_last_of_an_exact_fit_drops_nothing():
    dropped = []
    (batch,) = pack_stream([b"ACG"], window=4, drop_last=True, on_drop=dropped.append)
    assert batch.input_ids.tolist() == [[65, 67, 71, 0]]
    assert dropped == []


@pytest.mark.parametrize(
    "document",
    [b"ACG", bytearray(b"ACG"), memoryview(b"ACG"), np.frombuffer(b"ACG", dtype=np.uint8), [65, 67, 71]],
    ids=lambda document: type(document).__name__,
)
def test_pack_stream_takes_any_form_of_ids(document):
    (batch,) = pack_stream([document], window=4)
    assert batch.input_ids.tolist() == [[65, 67, 71, 0]]


def test_pack_stream_batches_do_not_share_memory():
    first, second = pack_stream([b"ACGTACG"], window=4)
    first.input_ids.fill_(7)
    assert second.input_ids.tolist() == [list(b"ACG\0")]


def test_pack_stream_is_lazy():
    def endless():
        while True:
            yield b"ACGT"

    assert next(pack_stream(endless(), window=16)).input_ids.shape == (1, 16)


def test_pack_stream_of_nothing_is_nothing():
    assert list(pack_stream([], window=4)) == []


def test_pack_stream_refuses_an_empty_document():
    with pytest.raises(SequenceLengthError, match="document 2: no tokens, expected at least one; leave"):
        list(pack_stream([b"A", b""], window=4))


@pytest.mark.parametrize("document", [np.array([0.5]), np.array([[1, 2]])])
def test_pack_stream_refuses_what_is_no_row_of_integers(document):
    with pytest.raises(ShapeError, match=r"document 1: .*expected integers of shape"):
        list(pack_stream([document], window=4))


def test_pack_stream_reports_all_wrong_sizes_at_once():
    with pytest.raises(ConfigError, match=r"window: 1, .*batch_size: 0, "):
        next(pack_stream([b"A"], window=1, batch_size=0))
    with pytest.raises(ConfigError, match=r"less than 2\*\*31"):
        next(pack_stream([b"A"], window=2**30, batch_size=2))
