"""CharTokenizer: Evo 2's ids, and a Hugging Face tokenizer in every way."""

from __future__ import annotations

import copy
import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, DataCollatorWithPadding, PretrainedConfig

from genoembed.tokenization.char import CharTokenizer


class CharTokenizerTestConfig(PretrainedConfig):
    """A model of these tests alone, so that AutoTokenizer has something to register with."""

    model_type = "genoembed-char-tokenizer-test"


@pytest.fixture
def tokenizer():
    return CharTokenizer()


def test_known_answers(tokenizer):
    assert tokenizer("ACGT").input_ids == [65, 67, 71, 84]
    assert tokenizer("acgtN").input_ids == [97, 99, 103, 116, 78]
    assert (tokenizer.eod_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert tokenizer.vocab_size == len(tokenizer) == 512
    assert tokenizer.bos_token_id is None
    assert tokenizer.num_special_tokens_to_add() == 0
    assert tokenizer.model_max_length > 10**12
    assert len(set(tokenizer.get_vocab().values())) == 512


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_decode_undoes_encode_for_any_text(text):
    tokenizer = CharTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == text


@settings(deadline=None, max_examples=200)
@given(sequence=st.binary())
def test_decode_bytes_undoes_encode_bytes_for_any_bytes(sequence):
    tokenizer = CharTokenizer()
    ids = tokenizer.encode_bytes(sequence)
    assert ids.tolist() == list(sequence)
    assert tokenizer.decode_bytes(ids) == sequence


@pytest.mark.parametrize("text", ["<eos>", "<pad>", "</s>", "A<eos>C", "<|endoftext|>", "[PAD]", "<unk>"])
def test_text_that_looks_like_a_special_token_stays_text(tokenizer, text):
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer(text, split_special_tokens=True).input_ids == list(text.encode())


def test_the_special_tokens_themselves_are_their_ids(tokenizer):
    text = "AC" + tokenizer.eos_token + tokenizer.pad_token
    assert tokenizer(text).input_ids == [65, 67, 0, 1]
    assert tokenizer.convert_tokens_to_ids([tokenizer.eos_token, tokenizer.pad_token]) == [0, 1]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_on_either_side(side):
    tokenizer = CharTokenizer(padding_side=side)
    batch = tokenizer(["ACGT", "AC"], padding=True, return_tensors="pt")
    ids = {"right": [65, 67, 1, 1], "left": [1, 1, 65, 67]}[side]
    mask = {"right": [1, 1, 0, 0], "left": [0, 0, 1, 1]}[side]
    assert batch["input_ids"].tolist() == [[65, 67, 71, 84], ids]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], mask]
    assert batch["input_ids"].dtype == torch.int64


def test_padding_side_as_an_argument_of_the_call(tokenizer):
    batch = tokenizer(["ACGT", "AC"], padding=True, padding_side="left", return_tensors="np")
    assert batch["input_ids"].tolist() == [[65, 67, 71, 84], [1, 1, 65, 67]]
    assert isinstance(batch["input_ids"], np.ndarray)


@pytest.mark.parametrize(("length", "padded"), [(3, 4), (4, 4), (5, 8)])
def test_pad_to_a_multiple(tokenizer, length, padded):
    batch = tokenizer(["A" * length], padding=True, pad_to_multiple_of=4)
    assert len(batch["input_ids"][0]) == len(batch["attention_mask"][0]) == padded


def test_pad_and_the_data_collator_agree(tokenizer):
    rows = [tokenizer("ACGT"), tokenizer("A")]
    padded = tokenizer.pad(rows, return_tensors="pt")
    collated = DataCollatorWithPadding(tokenizer)(rows)
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(padded[key], collated[key])
    assert padded["input_ids"].tolist() == [[65, 67, 71, 84], [65, 1, 1, 1]]


def test_truncation_only_on_request(tokenizer):
    assert len(tokenizer("A" * 100_000).input_ids) == 100_000
    assert tokenizer("ACGT", truncation=True, max_length=2).input_ids == [65, 67]
    tokenizer.truncation_side = "left"
    assert tokenizer("ACGT", truncation=True, max_length=2).input_ids == [71, 84]


def test_pad_token_may_be_the_eos_token(tokenizer, tmp_path):
    tokenizer.pad_token = tokenizer.eos_token
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 0)
    batch = tokenizer(["ACG", "A"], padding=True)
    assert batch.input_ids == [[65, 67, 71], [65, 0, 0]]
    assert batch.attention_mask == [[1, 1, 1], [1, 0, 0]]
    tokenizer.save_pretrained(tmp_path)
    assert CharTokenizer.from_pretrained(tmp_path).pad_token_id == 0


def test_add_eos_ends_each_sequence(tmp_path):
    tokenizer = CharTokenizer(add_eos=True)
    assert tokenizer(["AC", "A"], padding=True).input_ids == [[65, 67, 0], [65, 0, 1]]
    assert tokenizer("AC", add_special_tokens=False).input_ids == [65, 67]
    assert tokenizer("AC", return_special_tokens_mask=True)["special_tokens_mask"] == [0, 0, 1]
    assert tokenizer.encode_bytes(b"AC").tolist() == [65, 67]
    tokenizer.save_pretrained(tmp_path)
    assert CharTokenizer.from_pretrained(tmp_path)("AC").input_ids == [65, 67, 0]


def test_save_and_load_through_the_auto_class(tokenizer, tmp_path):
    AutoTokenizer.register(CharTokenizerTestConfig, CharTokenizer, exist_ok=True)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is CharTokenizer
    assert loaded("ACGT").input_ids == [65, 67, 71, 84]
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (0, 1, 512)


def test_keyword_settings_survive_saving(tmp_path):
    CharTokenizer(padding_side="left", model_max_length=8192).save_pretrained(tmp_path)
    loaded = CharTokenizer.from_pretrained(tmp_path)
    assert (loaded.padding_side, loaded.model_max_length) == ("left", 8192)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_and_pickles(duplicate):
    copied = duplicate(CharTokenizer(add_eos=True))
    assert copied("ACGT").input_ids == [65, 67, 71, 84, 0]
    assert (copied.pad_token_id, copied.padding_side) == (1, "right")


def test_decode_leaves_out_what_is_no_byte(tokenizer):
    assert tokenizer.decode([65, -100, 300, 511, 67]) == "AC"
    assert tokenizer.decode([65, 255, 67]) == "A�C"
    assert tokenizer.decode(65) == "A"
    assert tokenizer.decode(torch.tensor([65, 67])) == "AC"
    assert tokenizer.decode([]) == ""


def test_decode_skips_special_tokens_on_request(tokenizer):
    rows = torch.tensor([[65, 67, 0], [71, 0, 1]])
    assert tokenizer.batch_decode(rows) == ["AC\0", "G\0\1"]
    assert tokenizer.batch_decode(rows, skip_special_tokens=True) == ["AC", "G"]


def test_tokens_and_ids_convert_both_ways(tokenizer):
    assert tokenizer.convert_ids_to_tokens([65, 200, 300]) == ["A", chr(200), chr(300)]
    assert tokenizer.convert_tokens_to_ids(["A", chr(200), chr(300)]) == [65, 200, 300]
    assert tokenizer.convert_tokens_to_ids("A") == 65
    assert tokenizer.convert_tokens_to_ids("AC") is None
    assert tokenizer.convert_tokens_to_ids(["", "AC"]) == [None, None]


def test_tokens_that_a_user_adds_come_after_the_vocabulary(tokenizer):
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    assert tokenizer.mask_token_id == 512
    assert (tokenizer.vocab_size, len(tokenizer)) == (512, 513)
    assert tokenizer("A<mask>C\0").input_ids == [65, 512, 67, 0]
    assert tokenizer.decode([65, 512, 67]) == "A<mask>C"
    assert tokenizer("<mask>", split_special_tokens=True).input_ids == list(b"<mask>")


def test_encode_bytes_is_a_view(tokenizer):
    sequence = bytes(1000)
    ids = tokenizer.encode_bytes(sequence)
    assert ids.dtype == np.uint8
    assert np.shares_memory(ids, np.frombuffer(sequence, dtype=np.uint8))
    assert not ids.flags.writeable


def test_encode_bytes_of_100_megabases_is_instant(tokenizer):
    sequence = b"ACGT" * 25_000_000
    start = time.perf_counter()
    ids = tokenizer.encode_bytes(sequence)
    assert time.perf_counter() - start < 0.1
    assert len(ids) == 100_000_000


def test_a_megabase_text_is_quick(tokenizer):
    text = "ACGT" * 250_000
    start = time.perf_counter()
    ids = tokenizer(text).input_ids
    assert time.perf_counter() - start < 2.0
    assert len(ids) == 1_000_000
