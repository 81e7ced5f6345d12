"""One labeled sequence as tokens: tokenizers with one token a base, with k-mers, with special tokens."""

from __future__ import annotations

import numpy as np
import pytest

from genoembed.contracts import EncodedSequence
from genoembed.errors import SequenceLengthError, ShapeError
from genoembed.finetuning.collate import encode_example, encode_token_example
from genoembed.tokenization.char import CharTokenizer
from genoembed.tokenization.hf import build_encoder


class KmerEncoder:
    """[CLS], a token for every k bases, [SEP]."""

    pad_token_id = 0
    num_special_tokens = 2
    aligned = False

    def __init__(self, k):
        self.k = k

    def encode(self, sequence):
        starts = np.arange(0, len(sequence), self.k)
        ends = np.minimum(starts + self.k, len(sequence))
        ids, starts, ends = (
            np.concatenate([[a], part, [b]])
            for a, part, b in ((2, 10 + starts, 3), (-1, starts, -1), (-1, ends, -1))
        )
        return EncodedSequence(input_ids=ids, base_start=starts, base_end=ends)

    def max_bases(self, max_tokens):
        return max_tokens - 2


CHAR = build_encoder(CharTokenizer())


def test_encode_special_tokens_never_count_in_pooling():
    row = encode_example(b"ACGTA", KmerEncoder(2))
    assert row.pool_mask.tolist() == [0, 2, 2, 1, 0]
    assert encode_example(b"ACGTA", KmerEncoder(2), skip_first=3).pool_mask.tolist() == [0, 0, 1, 1, 0]


def test_encode_first_base_counts_with_a_tokenizer_without_special_tokens():
    row = encode_example(b"ACG", CHAR)
    assert row.pool_mask.all()
    assert len(row) == 3


def test_encode_token_labels_of_one_token_a_base():
    row = encode_token_example(b"ACG", CHAR, base_labels=np.array([1, -100, 0]))
    assert row.label.tolist() == [1, -100, 0]
    special = encode_token_example(b"ACG", KmerEncoder(1), base_labels=np.array([1, 2, 0]))
    assert special.label.tolist() == [-100, 1, 2, 0, -100]


def test_encode_token_labels_of_several_bases_need_a_policy():
    labels = np.array([1, 2, 3, 4, 5])
    with pytest.raises(ShapeError, match=r"record 'r': 3 tokens for 5 labeled bases.*several_bases='first'"):
        encode_token_example(b"ACGTA", KmerEncoder(2), base_labels=labels, record_id="r")
    row = encode_token_example(b"ACGTA", KmerEncoder(2), base_labels=labels, several_bases="first")
    assert row.label.tolist() == [-100, 1, 3, 5, -100]


def test_encode_token_labels_must_be_one_a_base():
    with pytest.raises(ShapeError, match=r"labels of shape \(2,\), expected \(3,\)"):
        encode_token_example(b"ACG", CHAR, base_labels=np.array([1, 2]))


def test_encode_cuts_nothing():
    with pytest.raises(
        SequenceLengthError, match=r"record 'r': 6 tokens \(4 bases\), but .* is 5; set max_crop_bp"
    ):
        encode_example(b"ACGT", KmerEncoder(1), max_tokens=5, record_id="r")
    assert len(encode_example(b"ACG", KmerEncoder(1), max_tokens=5)) == 5
    with pytest.raises(SequenceLengthError, match="record 'r': no bases"):
        encode_example(b"", CHAR, record_id="r")
