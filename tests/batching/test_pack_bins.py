"""Packing into bins, and what both packers promise: every base once, no prediction across a boundary."""

from __future__ import annotations

import logging
from itertools import count, islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.batching import pack as bins
from genoembed.batching.pack import PackCounts, pack_bins, pack_stream
from genoembed.contracts import IGNORE_INDEX
from genoembed.errors import ConfigError, SequenceLengthError, ShapeError

FIELDS = ("input_ids", "labels", "position_ids", "segment_ids", "cu_seqlens")
EOD, PAD = 0, 1
PACKERS = [pack_stream, pack_bins]


def numbered(lengths):
    """Documents in which every base of all has an id of its own."""
    first = 2
    documents = []
    for length in lengths:
        documents.append(np.arange(first, first + length))
        first += length
    return documents


@st.composite
def windows_and_documents(draw):
    """A window, and documents of any lengths: often 1, exact fits, multiples, and one more or less."""
    window = draw(st.integers(2, 24))
    edges = [k * window + d for k in range(1, 4) for d in (-2, -1, 0, 1)]
    length = st.one_of(st.just(1), st.sampled_from([n for n in edges if n > 0]), st.integers(1, 3 * window))
    return window, numbered(draw(st.lists(length, max_size=25)))


def bin_options():
    return st.fixed_dictionaries(
        {
            "batch_size": st.integers(1, 4),
            "buffer_documents": st.integers(1, 12),
            "open_rows": st.integers(0, 4),
            "seed": st.integers(0, 2**32),
        }
    )


def segments_of(batch):
    """Real segments of a batch, as lists, by its boundaries."""
    ids, kinds = batch.input_ids.flatten().tolist(), batch.segment_ids.flatten().tolist()
    bounds = batch.cu_seqlens.tolist()
    return [ids[start:end] for start, end in pairwise(bounds) if kinds[start] >= 0]


def fields_by_hand(rows, window):
    """Every field of a batch, slot by slot, from the segments of each row."""
    fields = {name: [] for name in FIELDS}
    fields["cu_seqlens"].append(0)
    for row in rows:
        for name in FIELDS[:-1]:
            fields[name].append([])
        num_real = sum(map(len, row))
        padding = [[PAD] * (window - num_real)] if num_real < window else []
        for number, segment in enumerate(row + padding):
            is_padding = number == len(row)
            for position, token in enumerate(segment):
                takes_loss = position > 0 and not is_padding
                fields["input_ids"][-1].append(token)
                fields["labels"][-1].append(token if takes_loss else IGNORE_INDEX)
                fields["position_ids"][-1].append(position)
                fields["segment_ids"][-1].append(-1 if is_padding else number)
            fields["cu_seqlens"].append(fields["cu_seqlens"][-1] + len(segment))
    return fields


def rows_of_segments(batch):
    """Segments of each row; a boundary in the middle of none."""
    rows, window = [[] for _ in batch.input_ids], batch.input_ids.shape[1]
    start = 0
    for segment, end in zip(
        batch.input_ids.flatten().tensor_split(batch.cu_seqlens[1:-1].long()),
        batch.cu_seqlens[1:].tolist(),
        strict=True,
    ):
        assert start // window == (end - 1) // window
        if batch.segment_ids.flatten()[start] >= 0:
            rows[start // window].append(segment.tolist())
        start = end
    return rows


@pytest.mark.parametrize("pack", PACKERS)
@settings(deadline=None, max_examples=100)
@given(case=windows_and_documents(), batch_size=st.integers(1, 4))
def test_packers_keep_every_base_exactly_once_and_one_eod_a_document(pack, case, batch_size):
    window, documents = case
    batches = list(pack(documents, window=window, batch_size=batch_size))
    real = [token for batch in batches for token in batch.input_ids[batch.segment_ids >= 0].tolist()]
    assert sorted(token for token in real if token != EOD) == [t for d in documents for t in d.tolist()]
    assert real.count(EOD) == len(documents)
    for batch in batches:
        assert (batch.input_ids[batch.segment_ids < 0] == PAD).all()


@pytest.mark.parametrize("pack", PACKERS)
@settings(deadline=None, max_examples=100)
@given(case=windows_and_documents(), batch_size=st.integers(1, 4))
def test_packers_predict_each_base_from_the_base_before_it_or_not_at_all(pack, case, batch_size):
    window, documents = case
    follows = {b: a for d in documents for a, b in pairwise(d.tolist())}
    last_bases = {int(document[-1]) for document in documents}
    num_targets = 0
    for batch in pack(documents, window=window, batch_size=batch_size):
        assert (batch.labels[:, 0] == IGNORE_INDEX).all()
        for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
            for before, target in zip(ids[:-1], labels[1:], strict=True):
                if target == IGNORE_INDEX:
                    continue
                num_targets += 1
                assert before in last_bases if target == EOD else before == follows[target]
        segments = segments_of(batch)
        assert int((batch.labels != IGNORE_INDEX).sum()) == sum(len(s) - 1 for s in segments)
    if any(len(document) < window for document in documents) and pack is pack_bins:
        assert num_targets


@settings(deadline=None, max_examples=150)
@given(case=windows_and_documents(), options=bin_options())
def test_pack_bins_rows_hold_exactly_the_pieces_of_the_documents(case, options):
    window, documents = case
    tokens = [[*document.tolist(), EOD] for document in documents]
    expected = [ids[at : at + window] for ids in tokens for at in range(0, len(ids), window)]
    counts = PackCounts()
    batches = list(pack_bins(documents, window=window, counts=counts, **options))
    assert sorted(s for batch in batches for s in segments_of(batch)) == sorted(expected)
    assert counts.documents == len(documents)
    assert counts.cut_documents == sum(len(ids) > window for ids in tokens)
    assert counts.tokens == sum(map(len, tokens))
    assert counts.rows == sum(len(batch.input_ids) for batch in batches)
    assert counts.slots == counts.rows * window
    assert [len(batch.input_ids) for batch in batches[:-1]] == [options["batch_size"]] * (len(batches) - 1)


@settings(deadline=None, max_examples=100)
@given(case=windows_and_documents(), options=bin_options())
def test_pack_bins_fields_equal_those_derived_by_hand(case, options):
    window, documents = case
    for batch in pack_bins(documents, window=window, **options):
        expected = fields_by_hand(rows_of_segments(batch), window)
        assert {name: getattr(batch, name).tolist() for name in FIELDS} == expected
        assert batch.cu_seqlens.dtype == torch.int32
        assert all(getattr(batch, name).dtype == torch.int64 for name in FIELDS[:-1])


@settings(deadline=None, max_examples=50)
@given(case=windows_and_documents(), options=bin_options())
def test_pack_bins_gives_the_same_rows_for_the_same_seed(case, options):
    window, documents = case
    once, again = (list(pack_bins(documents, window=window, **options)) for _ in range(2))
    assert len(once) == len(again)
    for first, second in zip(once, again, strict=True):
        assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in FIELDS)


def test_pack_bins_orders_rows_and_documents_by_the_seed():
    documents = numbered([5, 9, 2, 7, 3, 12, 4] * 6)
    orders = {
        tuple(next(pack_bins(documents, window=16, batch_size=99, seed=seed)).input_ids.flatten().tolist())
        for seed in range(5)
    }
    assert len(orders) == 5


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [([6, 5, 2], [[3, 7], [6]]), ([2, 2, 5, 6], [[3, 6], [3, 7]]), ([3, 5, 8, 1], [[2], [4, 6], [9]])],
)
def test_pack_bins_fills_the_fullest_row_that_takes_a_document(lengths, rows):
    (batch,) = pack_bins(numbered(lengths), window=10, batch_size=9)
    assert sorted(sorted(map(len, row)) for row in rows_of_segments(batch)) == rows


def test_pack_bins_rows_do_not_come_sorted_by_length():
    documents = numbered(np.random.default_rng(0).integers(34, 64, 400))
    rows = [row for batch in pack_bins(documents, window=65) for row in rows_of_segments(batch)]
    lengths = [len(row[0]) for row in rows]
    assert len(lengths) == 400
    assert abs(np.corrcoef(lengths, np.arange(400))[0, 1]) < 0.2


def test_pack_bins_does_not_always_put_the_longest_document_first():
    documents = numbered([40, 10] * 50)
    rows = [row for batch in pack_bins(documents, window=52) for row in rows_of_segments(batch)]
    assert all(sorted(map(len, row)) == [11, 41] for row in rows)
    assert 10 < sum(len(row[0]) == 41 for row in rows) < 40


def test_pack_bins_carries_open_rows_from_buffer_to_buffer():
    documents = numbered([9, 9, 4, 4])
    sizes = [
        len(list(pack_bins(documents, window=15, buffer_documents=2, open_rows=rows))) for rows in (0, 1, 2)
    ]
    assert sizes == [3, 3, 2]


def test_pack_bins_cut_pieces_start_without_context_and_eod_follows_the_last():
    (batch,) = pack_bins([b"ACGTACG"], window=3, batch_size=9)
    segments = {bytes(s): True for s in segments_of(batch)}
    assert set(segments) == {b"ACG", b"TAC", b"G\0"}
    labels = sorted(batch.labels.tolist())
    assert labels == [[-100, 0, -100], [-100, *b"AC"], [-100, *b"CG"]]


def test_pack_bins_ignores_padding_by_position_when_pad_is_eod():
    (batch,) = pack_bins([b"AC"], window=5, pad_token_id=0)
    assert batch.input_ids.tolist() == [[65, 67, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, 67, 0, -100, -100]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]


def test_pack_bins_keeps_ids_above_a_byte_beside_bytes():
    (batch,) = pack_bins([b"ACG", np.array([511, 300], dtype=np.int16)], window=7, eod_token_id=70000)
    assert sorted(segments_of(batch)) == [[65, 67, 71, 70000], [511, 300, 70000]]


def test_pack_bins_long_error_names_the_document_and_the_remedy():
    fits = [b"ACG", b"ACGT"]
    assert len(list(pack_bins(fits, window=5, long="error"))) == 2
    with pytest.raises(SequenceLengthError, match=r"document 3: 5 tokens and EOD, but window is 5; .*to 6"):
        list(pack_bins([*fits, b"ACGTA"], window=5, long="error"))


def test_pack_bins_is_98_percent_efficient_on_genes_and_phage_genomes():
    rng = np.random.default_rng(7)
    genes = np.clip(rng.lognormal(6.3, 0.65, 3000), 200, 12000).astype(int)
    genomes = np.clip(rng.lognormal(9.4, 1.0, 90), 700, 180000).astype(int)
    lengths = rng.permutation(np.concatenate([genes, genomes])).tolist()
    for buffer_documents in (512, 4096):
        counts = PackCounts()
        documents = (bytes(length) for length in lengths)
        for _ in pack_bins(documents, window=2048, buffer_documents=buffer_documents, counts=counts):
            pass
        assert counts.tokens == sum(lengths) + len(lengths)
        assert 0.98 <= counts.efficiency < 1


def endless(lengths, seen):
    rng = np.random.default_rng(3)
    for _ in count():
        length = int(rng.choice(lengths))
        seen.append(length + 1)
        yield bytes([65]) * length


@pytest.mark.parametrize("lengths", [[1, 5, 30], [33, 40], [500, 7], [1]])
def test_pack_bins_holds_a_bounded_number_of_tokens_of_an_endless_stream(lengths):
    window, buffer_documents, open_rows = 64, 20, 4
    seen, given_out, most = [], 0, 0
    batches = pack_bins(
        endless(lengths, seen),
        window=window,
        batch_size=2,
        buffer_documents=buffer_documents,
        open_rows=open_rows,
    )
    for batch in islice(batches, 400):
        most = max(most, sum(seen) - given_out)
        given_out += int((batch.segment_ids >= 0).sum())
    # a buffer, the piece after it, the open rows, a batch, and what a long document has left
    assert 0 < most <= (buffer_documents + 1 + open_rows + 2) * window + max(lengths)
    assert len(seen) > 3


def test_pack_bins_bounds_the_tokens_of_a_buffer(monkeypatch):
    monkeypatch.setattr(bins, "_BUFFER_TOKENS", 1000)
    seen = []
    next(pack_bins(endless([99], seen), window=100, buffer_documents=10**9))
    # with the document that did not fit any more
    assert sum(seen) == 1100


def test_pack_bins_does_not_hold_on_to_arrays_that_the_caller_reuses():
    def reusing():
        ids = np.zeros(3, dtype=np.int64)
        for number in range(2, 6):
            ids[:] = number
            yield ids

    (batch,) = pack_bins(reusing(), window=8, batch_size=2)
    assert sorted(segments_of(batch)) == [[n, n, n, EOD] for n in range(2, 6)]


def test_pack_bins_batches_do_not_share_memory():
    first, second = pack_bins([b"ACG", b"ACG"], window=4)
    first.input_ids.fill_(7)
    assert second.input_ids.tolist() == [list(b"ACG\0")]


def test_pack_bins_of_nothing_is_nothing():
    assert list(pack_bins([], window=4)) == []


def test_pack_bins_refuses_bad_documents():
    with pytest.raises(SequenceLengthError, match="document 2: no tokens, expected at least one; leave"):
        list(pack_bins([b"A", b""], window=4))
    with pytest.raises(ShapeError, match=r"document 1: float64 of shape .*expected integers"):
        list(pack_bins([np.array([0.5])], window=4))


def test_pack_bins_reports_all_wrong_options_at_once():
    with pytest.raises(
        ConfigError,
        match=r"window: 1, .*batch_size: 0, .*long is 'drop'; set .*buffer_documents: 0, .*open_r",
    ):
        next(pack_bins([], window=1, batch_size=0, long="drop", buffer_documents=0, open_rows=-1))


def test_pack_bins_logs_its_counts(caplog):
    with caplog.at_level(logging.INFO, logger="genoembed.batching.pack"):
        list(pack_bins([b"ACGTA", b"A"], window=4))
    assert "2 documents (1 cut) in 2 rows, 8 of 8 slots filled (100.0 %)" in caplog.text


@settings(deadline=None, max_examples=60)
@given(case=windows_and_documents(), batch_size=st.integers(1, 4), drop_last=st.booleans())
def test_pack_stream_counts_agree_with_its_rows(case, batch_size, drop_last):
    window, documents = case
    counts = PackCounts()
    options = {"window": window, "batch_size": batch_size, "drop_last": drop_last}
    batches = list(pack_stream(documents, counts=counts, **options))
    size = sum(len(document) + 1 for document in documents)
    assert counts.tokens + counts.dropped_tokens == size
    assert counts.tokens == sum(int((batch.segment_ids >= 0).sum()) for batch in batches)
    assert counts.slots == sum(batch.input_ids.numel() for batch in batches)
    assert counts.dropped_tokens == (size % window if drop_last else 0)
    if not drop_last:
        pieces = sum(len(segments_of(batch)) for batch in batches)
        assert pieces >= len(documents) + counts.cut_documents
        assert (pieces > len(documents)) == (counts.cut_documents > 0)


def test_counts_start_with_full_efficiency():
    assert PackCounts().efficiency == 1.0
    assert PackCounts(slots=8, tokens=6).efficiency == 0.75
