"""Tokenizers of overlapping k-mers (DNABERT) and of non-overlapping k-mers (GENERator)."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from genoembed.tokenization.kmer import KmerTokenizer, kmer_length
from genoembed.tokenization.published import generator_kmers

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def vocabulary(k, special=SPECIAL):
    return [*special, *("".join(word) for word in itertools.product("ATCG", repeat=k))]


@pytest.fixture(scope="module", params=[3, 4])
def kmers(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("kmers") / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in vocabulary(request.param)))
    return KmerTokenizer(str(path))


@given(sequence=st.text("ACGTNacgtR", max_size=30))
def test_a_token_stands_at_every_base(kmers, sequence):
    words = vocabulary(kmers.k)
    expected = [
        words.index(word) if (word := sequence[at : at + kmers.k]) in words else 1
        for at in range(len(sequence) - kmers.k + 1)
    ]
    assert kmers.encode_bases(sequence.encode()).tolist() == expected
    assert kmers(sequence)["input_ids"] == [2, *expected, 3]
    assert kmers(sequence)["attention_mask"] == [1] * (len(expected) + 2)


def test_kmer_text_gives_the_same_tokens(kmers):
    sequence = "ACGTTAGC"
    words = [sequence[at : at + kmers.k] for at in range(len(sequence) - kmers.k + 1)]
    assert kmers(" ".join(words)).input_ids == kmers(sequence).input_ids
    assert kmers(kmers.convert_tokens_to_string(words)).input_ids == kmers(sequence).input_ids


def test_a_saved_kmer_tokenizer_opens_with_auto_tokenizer(kmers, tmp_path):
    kmers.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is KmerTokenizer
    assert again("ACGTTNGCA").input_ids == kmers("ACGTTNGCA").input_ids
    assert again.k == kmers.k
    assert again.pad(again(["ACGTT", "ACGTTACG"]), padding=True)["attention_mask"][0][-1] == 0


def test_words_of_several_lengths_are_no_kmers(tmp_path):
    assert kmer_length(["[UNK]", "ACG", "AC"]) is None
    assert kmer_length(["[UNK]", "A", "C"]) is None
    path = tmp_path / "vocab.txt"
    path.write_text("[UNK]\nACG\nAC\n")
    with pytest.raises(ValueError, match="expected k-mers of one length"):
        KmerTokenizer(str(path))


def generator(tmp_path, k=6, **values):
    words = vocabulary(k, ["<oov>", "<s>", "</s>", "<pad>", "<mask>", "<sp0>"])
    lines = [f"{word} {index}\n" for index, word in enumerate(words)]
    (tmp_path / "vocab.txt").write_text("".join(lines))
    return generator_kmers(tmp_path, values), words


@pytest.mark.parametrize("k", [3, 6])
def test_generator_reads_words_side_by_side_and_one_remainder(tmp_path, k):
    tokenizer, words = generator(tmp_path, k)
    word = "ACGTTA"[:k]
    known = words.index(word)
    assert tokenizer(word).input_ids == [1, known]
    assert tokenizer(word + "AC").input_ids == [1, known, 0]
    assert tokenizer("N" + word[1:] + word).input_ids == [1, 0, known]
    assert tokenizer(word.lower()).input_ids == [1, *[0] * k]
    assert tokenizer(f"AC<sp0>{word}").input_ids == [1, 0, 5, known]
    assert tokenizer("<s>" + word).input_ids == [1, 1, known]


def test_generator_adds_the_special_tokens_that_its_file_names(tmp_path):
    for begin, end in itertools.product([False, True], repeat=2):
        tokenizer, words = generator(tmp_path, add_bos_token=begin, add_eos_token=end)
        known = words.index("ACGTTA")
        assert tokenizer("ACGTTA").input_ids == [1] * begin + [known] + [2] * end


def test_generator_opens_with_auto_tokenizer_once_saved(tmp_path):
    tokenizer, _ = generator(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "ACGTTANACGTACGT"
    found = again(text, return_offsets_mapping=True)
    assert found.input_ids == tokenizer(text).input_ids
    assert found.offset_mapping == [(0, 0), (0, 6), (6, 12), (12, 15)]
