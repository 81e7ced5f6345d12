"""Pieces: each base of the core counts once a strand, whatever windows, strands and regions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.contracts import EncodedSequence, SequenceRecord
from genoembed.errors import ConfigError
from genoembed.pipeline.cutting import Cutter
from genoembed.tokenization.char import CharTokenizer
from genoembed.tokenization.hf import build_encoder
from tests.by_hand import random_dna, revcomp

ENCODER = build_encoder(CharTokenizer())


class KmerEncoder:
    """Tokens of three bases, a special token on either side; N and a short remainder: one token per base."""

    pad_token_id = 0
    num_special_tokens = 2
    aligned = False
    frame_bp = 3

    def encode(self, sequence: bytes) -> EncodedSequence:
        starts, position = [], 0
        while position < len(sequence):
            starts.append(position)
            kmer = sequence[position : position + 3]
            position += 3 if len(kmer) == 3 and b"N" not in kmer else 1
        ends = [*starts, len(sequence)][1:]
        return EncodedSequence(
            input_ids=np.arange(len(starts) + 2),
            base_start=np.array([-1, *starts, -1], dtype=np.int64),
            base_end=np.array([-1, *ends, -1], dtype=np.int64),
        )

    def max_bases(self, max_tokens: int) -> int:
        return max_tokens - 2


def seen_and_counted(cutter, record):
    """For each strand, the bases that count in each piece, in reading order of the strand."""
    counted = {False: [], True: []}
    for piece in cutter.pieces(record, 0, cutter.windows(record)):
        encoded = piece.encoded
        starts = encoded.base_start if encoded.base_start is not None else np.arange(len(encoded.input_ids))
        counted[piece.is_reverse].append((piece, starts[piece.pool_mask].tolist()))
    return counted


@st.composite
def cutting(draw):
    length = draw(st.integers(1, 90))
    core_start = draw(st.integers(0, length - 1))
    core_end = draw(st.integers(core_start + 1, length))
    window = draw(st.none() | st.integers(1, 40))
    stride = None if window is None else draw(st.none() | st.integers(1, window))
    record = SequenceRecord(
        id="x",
        sequence=random_dna(length, draw(st.integers(0, 1000))).encode(),
        core_start=core_start,
        core_end=core_end,
    )
    options = {
        "max_tokens": draw(st.none() | st.integers(40, 64)),
        "is_causal": draw(st.booleans()),
        "window": window,
        "stride": stride,
        "both_strands": draw(st.booleans()),
        "mirror": draw(st.booleans()),
    }
    return record, options


@settings(max_examples=150)
@given(case=cutting())
def test_each_base_of_the_core_counts_once_a_strand(case):
    record, options = case
    cutter = Cutter(encoder=ENCODER, **options)
    windows = cutter.windows(record)
    sequences = {False: record.sequence, True: revcomp(record.sequence.decode()).encode()}
    core = record.sequence[record.core_start : record.core_end]
    counted = seen_and_counted(cutter, record)
    assert [piece.window_index for piece, _ in counted[False]] == list(range(len(windows)))
    for is_reverse, pieces in counted.items():
        if is_reverse and not options["both_strands"]:
            assert pieces == []
            continue
        letters = [
            bytes(piece.encoded.input_ids[piece.pool_mask].astype(np.uint8).tolist()) for piece, _ in pieces
        ]
        if is_reverse and options["mirror"]:
            letters = letters[::-1]
        expected = core if not is_reverse else revcomp(core.decode()).encode()
        assert b"".join(letters) == expected
        for piece, bases in pieces:
            assert piece.num_bases == len(bases) > 0
            assert bytes(piece.encoded.input_ids.tolist()) in sequences[is_reverse]
            if options["max_tokens"] is not None and options["window"] is None:
                assert len(piece.encoded.input_ids) <= options["max_tokens"]


@settings(max_examples=60)
@given(case=cutting())
def test_mirrored_pieces_are_about_the_bases_of_their_window(case):
    record, options = case
    cutter = Cutter(encoder=ENCODER, **{**options, "both_strands": True, "mirror": True})
    counted = seen_and_counted(cutter, record)
    assert len(counted[False]) == len(counted[True]) > 0
    for (piece, _), (other, _) in zip(counted[False], counted[True], strict=True):
        letters = bytes(piece.encoded.input_ids[piece.pool_mask].tolist()).decode()
        others = bytes(other.encoded.input_ids[other.pool_mask].tolist()).decode()
        assert revcomp(letters) == others
        assert piece.num_bases == other.num_bases


@settings(max_examples=60)
@given(case=cutting())
def test_pieces_of_the_reverse_complement_are_the_same_with_strands_swapped(case):
    record, options = case
    length = len(record.sequence)
    turned = SequenceRecord(
        id="x",
        sequence=revcomp(record.sequence.decode()).encode(),
        core_start=length - record.core_end,
        core_end=length - record.core_start,
    )
    cutter = Cutter(encoder=ENCODER, **{**options, "both_strands": True, "mirror": False})

    def content(pieces):
        return [(piece.encoded.input_ids.tolist(), piece.pool_mask.tolist()) for piece, _ in pieces]

    given, other = seen_and_counted(cutter, record), seen_and_counted(cutter, turned)
    assert content(given[False]) == content(other[True])
    assert content(given[True]) == content(other[False])


@settings(max_examples=60)
@given(
    length=st.integers(1, 120),
    window=st.integers(3, 40),
    causal=st.booleans(),
    skip_first=st.integers(0, 12),
)
def test_kmers_count_for_their_bases_in_the_core(length, window, causal, skip_first):
    record = SequenceRecord(id="x", sequence=random_dna(length, 5).encode())
    cutter = Cutter(
        encoder=KmerEncoder(), max_tokens=64, is_causal=causal, window=window, skip_first=skip_first
    )
    windows = cutter.windows(record)
    assert all(cut.start % 3 == 0 and cut.core_start % 3 == 0 for cut in windows)
    assert all(cut.end - cut.start <= window for cut in windows)
    pieces = list(cutter.pieces(record, 0, windows))
    for piece, cut in zip(pieces, windows, strict=True):
        first = max(cut.core_start - cut.start, skip_first)
        core = set(range(first, cut.core_end - cut.start))
        spans = list(zip(piece.encoded.base_start, piece.encoded.base_end, strict=True))
        assert piece.pool_mask.tolist() == [len(core & set(range(*span))) for span in spans]
        assert not piece.pool_mask[0]
        assert not piece.pool_mask[-1]
        assert piece.num_bases == piece.weight == len(core)
        tokens = piece.counted_tokens()
        covered = [base for span in tokens.spans.tolist() for base in range(*span)]
        assert covered == [cut.start + base for base in sorted(core)]


def widths(cutter, sequence):
    record = SequenceRecord(id="x", sequence=sequence)
    return {cut.end - cut.start for cut in cutter.windows(record)}


def test_kmer_windows_fill_the_context():
    """Ten tokens beside the two special ones are thirty bases."""
    cutter = Cutter(encoder=KmerEncoder(), max_tokens=12, is_causal=False)
    assert widths(cutter, b"ACG" * 10) == {30}
    assert widths(cutter, b"ACG" * 11) == {30}
    assert widths(cutter, b"ACG" * 500) == {30}


def test_kmer_windows_shrink_for_a_record_with_short_tokens_somewhere():
    cutter = Cutter(encoder=KmerEncoder(), max_tokens=12, is_causal=False)
    # with two bases before an N, a window of 24 has 7 + 3 tokens; runs of N are a token a base
    assert max(widths(cutter, b"ACG" * 50 + b"N" + b"ACG" * 50)) == 24
    assert max(widths(cutter, b"ACG" * 50 + b"N" * 40 + b"ACG" * 50)) == 9


@settings(max_examples=80)
@given(
    sequence=st.lists(st.sampled_from([b"ACG" * 7, b"A", b"N", b"NNNN", b"GGTT"]), min_size=1, max_size=30),
    causal=st.booleans(),
    mirror=st.booleans(),
)
def test_kmer_pieces_fit_the_context_on_both_strands(sequence, causal, mirror):
    record = SequenceRecord(id="x", sequence=b"".join(sequence))
    cutter = Cutter(encoder=KmerEncoder(), max_tokens=12, is_causal=causal, both_strands=True, mirror=mirror)
    pieces = list(cutter.pieces(record, 0, cutter.windows(record)))
    assert max(len(piece.encoded.input_ids) for piece in pieces) <= 12
    for is_reverse in (False, True):
        counted = [piece.num_bases for piece in pieces if piece.is_reverse is is_reverse]
        assert sum(counted) == len(record.sequence)


def test_very_long_record_is_not_tried_whole():
    class Refusing(KmerEncoder):
        def encode(self, sequence: bytes) -> EncodedSequence:
            assert len(sequence) <= 12 * 16
            return super().encode(sequence)

    cutter = Cutter(encoder=Refusing(), max_tokens=12, is_causal=False)
    assert len(cutter.windows(SequenceRecord(id="x", sequence=b"A" * 193))) > 6


def test_cutter_reports_all_that_is_wrong():
    with pytest.raises(ConfigError, match=r"window is 9, .*holds 8 bases; set window to 8 or less"):
        Cutter(encoder=ENCODER, max_tokens=8, is_causal=True, window=9)
    with pytest.raises(ConfigError, match=r"stride is 9, .*holds 8 bases.*set stride to 8 or less"):
        Cutter(encoder=ENCODER, max_tokens=8, is_causal=True, stride=9)
    with pytest.raises(ConfigError, match=r"stride is 9, but the model states no context to cut to"):
        Cutter(encoder=ENCODER, max_tokens=None, is_causal=True, stride=9)
