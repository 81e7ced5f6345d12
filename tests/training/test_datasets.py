"""Training data: every base once, labels as packing promises, the same choice from the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import ConfigError, SequenceLengthError
from genoembed.sequences.alphabet import reverse_complement
from genoembed.training.datasets import PackedCorpus, cut_documents, random_strands
from tests.oracles import pack_rows
from tests.strategies import dna_lists


@settings(deadline=None, max_examples=50)
@given(documents=dna_lists(), window=st.integers(2, 40))
def test_packed_corpus_equals_the_token_by_token_oracle(documents, window):
    corpus = PackedCorpus(documents, window=window)
    expected = pack_rows(documents, window, eod=0, pad=1)
    assert len(corpus) == len(expected) > 0
    for index, row in enumerate(expected):
        assert corpus[index]["input_ids"].tolist() == row["input_ids"]
        assert corpus[index]["labels"].tolist() == row["labels"]


@settings(deadline=None, max_examples=50)
@given(documents=dna_lists(), window=st.integers(2, 40))
def test_packed_corpus_holds_every_base_once_in_order(documents, window):
    corpus = PackedCorpus(documents, window=window)
    stream = np.concatenate([corpus[index]["input_ids"].numpy() for index in range(len(corpus))])
    expected = b"".join(document + b"\0" for document in documents)
    assert stream.astype(np.uint8).tobytes() == expected + b"\1" * (len(stream) - len(expected))
    assert 0 <= len(stream) - len(expected) < window


def test_packed_corpus_is_the_same_across_its_packs():
    documents = [b"ACGTTGCA" * 300, b"GG", b"TTTACG" * 41]
    corpus = PackedCorpus(documents, window=16)
    assert len(corpus) > 2 * 64
    expected = pack_rows(documents, 16, eod=0, pad=1)
    assert [corpus[index]["labels"].tolist() for index in range(len(corpus))] == [
        row["labels"] for row in expected
    ]


def test_packed_corpus_takes_two_bytes_and_a_bit_a_token():
    corpus = PackedCorpus([b"ACGT" * 4096], window=1024)
    assert corpus._rows.dtype == np.uint16
    assert corpus._ignored.dtype == np.uint8
    assert corpus._rows.nbytes + corpus._ignored.nbytes == len(corpus) * 1024 * (2 + 1 / 8)


def test_packed_corpus_keeps_ids_above_a_byte():
    corpus = PackedCorpus([np.array([511, 300, 65])], window=4, eod_token_id=510, pad_token_id=509)
    assert corpus[0]["input_ids"].tolist() == [511, 300, 65, 510]


def test_packed_corpus_rows_are_int64_and_independent_of_the_corpus():
    corpus = PackedCorpus([b"ACGTACG"], window=8)
    row = corpus[0]
    assert {name: tensor.dtype for name, tensor in row.items()} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
    }
    row["input_ids"].zero_()
    assert corpus[0]["input_ids"].tolist() == [*b"ACGTACG", 0]


def test_packed_corpus_counts_indices_as_a_list_does():
    corpus = PackedCorpus([b"ACGTACG", b"TTT"], window=4)
    assert corpus[-1]["input_ids"].tolist() == corpus[len(corpus) - 1]["input_ids"].tolist()
    with pytest.raises(IndexError, match="out of bounds"):
        corpus[len(corpus)]
    assert len(list(corpus)) == len(corpus)


def test_packed_corpus_refuses_nothing_to_train_on():
    with pytest.raises(ConfigError, match=r"^documents: none were given"):
        PackedCorpus([], window=4)
    with pytest.raises(SequenceLengthError, match=r"^document 2: no tokens"):
        PackedCorpus([b"A", b""], window=4)
    with pytest.raises(ConfigError, match=r"^window: 1, expected 2 or more"):
        PackedCorpus([b"A"], window=1)


@pytest.mark.parametrize(("documents", "bad_id"), [([[65, 70000]], 70000), ([[-3, 65]], -3), ([[65]], 65536)])
def test_packed_corpus_refuses_ids_that_it_cannot_hold(documents, bad_id):
    options = {"eod_token_id": bad_id} if bad_id == 65536 else {}
    with pytest.raises(ConfigError, match=f"token id {bad_id}, expected 0 to 65535"):
        PackedCorpus(documents, window=4, **options)


def test_random_strands_are_the_same_for_the_same_seed_and_about_half():
    sequences = [b"ACGGT" + bytes([65]) * number for number in range(400)]
    once, again, other = (list(random_strands(sequences, seed=seed)) for seed in (3, 3, 4))
    assert once == again != other
    turned = [after != before for before, after in zip(sequences, once, strict=True)]
    assert 160 < sum(turned) < 240
    for before, after in zip(sequences, once, strict=True):
        assert after in (before, reverse_complement(before))


@settings(deadline=None, max_examples=50)
@given(sequences=dna_lists(), max_length=st.integers(1, 20), seed=st.integers(0, 99))
def test_cut_documents_lose_nothing_and_keep_to_the_length(sequences, max_length, seed):
    pieces = cut_documents(sequences, max_length=max_length, seed=seed)
    assert pieces == cut_documents(sequences, max_length=max_length, seed=seed)
    assert all(0 < len(piece) <= max_length for piece in pieces)
    expected = [s[at : at + max_length] for s in sequences for at in range(0, len(s), max_length)]
    assert sorted(pieces) == sorted(expected)


def test_cut_documents_are_shuffled_by_the_seed():
    sequences = [b"ACGT" * 10, b"GGTT" * 10]
    orders = {tuple(cut_documents(sequences, max_length=3, seed=seed)) for seed in range(5)}
    assert len(orders) > 1


def test_cut_documents_refuse_a_length_below_one():
    with pytest.raises(ConfigError, match=r"^max_length: 0, expected 1 or more"):
        cut_documents([b"ACGT"], max_length=0, seed=0)
