"""Any Hugging Face tokenizer behind one contract: where each token starts."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import EsmTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from genoembed.contracts import EncodedSequence
from genoembed.errors import ConfigError
from genoembed.tokenization.char import CharTokenizer
from genoembed.tokenization.hf import build_encoder
from tests.strategies import dna

SPECIALS = ["<unk>", "<pad>", "<cls>", "<eos>", "<mask>"]
NAMES = {"unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<cls>", "eos_token": "<eos>"}


def fast_tokenizer(model, *, pre_tokenizer=None, **kwargs):
    """Wrap a tokenizers model the way encoders do: <cls> tokens <eos>."""
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(SPECIALS)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    pair = [(name, tokenizer.token_to_id(name)) for name in ("<cls>", "<eos>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<cls> $A <eos>", special_tokens=pair)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES, **kwargs)


def vocabulary(*tokens):
    return {token: index for index, token in enumerate([*SPECIALS, *tokens])}


def bpe_tokenizer(**kwargs):
    merges = [("A", "C"), ("G", "T"), ("AC", "GT")]
    vocab = vocabulary("A", "C", "G", "T", "AC", "GT", "ACGT")
    return fast_tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"), **kwargs)


def wordpiece_tokenizer():
    vocab = vocabulary("A", "C", "G", "T", "ACG", "##A", "##C", "##G", "##T", "##TA")
    return fast_tokenizer(models.WordPiece(vocab=vocab, unk_token="<unk>", max_input_chars_per_word=10_000))


def metaspace_tokenizer():
    vocab = vocabulary("▁", "A", "C", "G", "T", "N", "▁A")
    model = models.BPE(vocab=vocab, merges=[("▁", "A")], unk_token="<unk>")
    tokenizer = fast_tokenizer(model, pre_tokenizer=pre_tokenizers.Metaspace())
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def esm_tokenizer(tmp_path, tokens, **kwargs):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIALS, *tokens]))
    return EsmTokenizer(str(path), **kwargs)


def six_mers():
    return ["".join(letters) for letters in itertools.product("ACGT", repeat=6)]


class PieceTokenizer(PreTrainedTokenizer):
    """A slow tokenizer as custom code writes them: pieces of one size, no mask of special tokens."""

    def __init__(self, tokens=(), size=1, mark="", **kwargs):
        self.size = size
        self.mark = mark
        self.ids = vocabulary(*tokens)
        self.names = {index: token for token, index in self.ids.items()}
        kwargs = {
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "cls_token": "<cls>",
            "eos_token": "<eos>",
        } | kwargs
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.ids)

    def get_vocab(self):
        return dict(self.ids)

    def _tokenize(self, text, **kwargs):
        pieces = [text[start : start + self.size] for start in range(0, len(text), self.size)]
        return [self.mark + piece if number else piece for number, piece in enumerate(pieces)]

    def _convert_token_to_id(self, token):
        return self.ids.get(token, self.ids["<unk>"])

    def _convert_id_to_token(self, index):
        return self.names[index]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.cls_token_id, *token_ids_0, self.eos_token_id]

    def get_special_tokens_mask(self, *args, **kwargs):
        raise NotImplementedError


@pytest.fixture
def hf_log():
    """What transformers logs: its loggers do not propagate, so caplog does not see them."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    transformers.utils.logging.add_handler(handler)
    yield messages
    transformers.utils.logging.remove_handler(handler)


def test_char_encoder_is_a_view_without_special_tokens():
    encoder = build_encoder(CharTokenizer(add_eos=True))
    sequence = b"ACGTacgt"
    encoded = encoder.encode(sequence)
    assert encoded.base_start is None
    assert np.shares_memory(encoded.input_ids, np.frombuffer(sequence, dtype=np.uint8))
    assert (encoder.aligned, encoder.num_special_tokens, encoder.pad_token_id) == (True, 0, 1)
    assert encoder.max_bases(8192) == 8192


def test_fast_bpe_starts_come_from_the_offsets():
    encoder = build_encoder(bpe_tokenizer())
    encoded = encoder.encode(b"ACGTTACGT")
    assert isinstance(encoded, EncodedSequence)
    assert encoded.base_start.tolist() == [-1, 0, 4, 5, -1]
    assert (encoder.aligned, encoder.num_special_tokens, encoder.pad_token_id) == (False, 2, 1)
    assert encoder.max_bases(10) == 8


def test_fast_wordpiece_starts_come_from_the_offsets():
    encoded = build_encoder(wordpiece_tokenizer()).encode(b"ACGTAC")
    assert encoded.base_start.tolist() == [-1, 0, 3, 5, -1]


def test_fast_unknown_letters_have_a_start_too():
    encoded = build_encoder(bpe_tokenizer()).encode(b"ACNGT")
    assert encoded.base_start.tolist() == [-1, 0, 2, 3, -1]


def test_fast_mark_of_a_word_start_claims_no_base():
    encoder = build_encoder(metaspace_tokenizer())
    assert encoder.encode(b"CGA").base_start.tolist() == [-1, -1, 0, 1, 2, -1]
    assert encoder.encode(b"ACG").base_start.tolist() == [-1, 0, 1, 2, -1]
    assert encoder.max_bases(9) == 6
    assert len(encoder.encode(b"N" * 6).input_ids) == 9


def test_fast_tokenizer_that_drops_letters_is_reported_once(caplog):
    tokenizer = fast_tokenizer(models.BPE(vocab=vocabulary("A", "C", "G", "T"), merges=[]))
    encoder = build_encoder(tokenizer)
    with caplog.at_level(logging.WARNING, logger="genoembed.tokenization.hf"):
        encoded = encoder.encode(b"ACNNGT")
        encoder.encode(b"NA")
    assert encoded.base_start.tolist() == [-1, 0, 1, 4, 5, -1]
    assert [record.getMessage()[:64] for record in caplog.records] == [
        "the model's tokenizer has no token for 2 of 6 bases (letters out"
    ]


def test_esm_with_letters_as_tokens(tmp_path):
    encoder = build_encoder(esm_tokenizer(tmp_path, "ACGTN"))
    encoded = encoder.encode(b"ACGTN")
    assert encoded.input_ids.tolist() == [2, 5, 6, 7, 8, 9, 3]
    assert encoded.base_start.tolist() == [-1, 0, 1, 2, 3, 4, -1]
    assert encoder.num_special_tokens == 2


def test_esm_one_unknown_token_for_several_letters(tmp_path):
    encoder = build_encoder(esm_tokenizer(tmp_path, "ACGT"))
    encoded = encoder.encode(b"ACNNNGTRY")
    assert encoded.input_ids.tolist() == [2, 5, 6, 0, 7, 8, 0, 3]
    assert encoded.base_start.tolist() == [-1, 0, 1, 2, 5, 6, 7, -1]


def test_nucleotide_transformer_six_mers_with_single_letters_between(tmp_path):
    tokenizer = esm_tokenizer(tmp_path, [*six_mers(), *"ACGTN"], eos_token=None)
    encoder = build_encoder(tokenizer)
    encoded = encoder.encode(b"ACGTACGGNACGTACGTA")
    assert encoded.base_start.tolist() == [-1, 0, 6, 7, 8, 9, 15, 16, 17]
    assert (encoder.num_special_tokens, encoder.max_bases(1000)) == (1, 999)


@settings(deadline=None, max_examples=30)
@given(sequence=dna(min_size=1, max_size=80))
def test_nucleotide_transformer_tokens_spell_the_sequence(tmp_path_factory, sequence):
    tokenizer = esm_tokenizer(tmp_path_factory.mktemp("nt"), [*six_mers(), *"ACGTN"], eos_token=None)
    encoded = build_encoder(tokenizer).encode(sequence)
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())[1:]
    starts = encoded.base_start[1:].tolist()
    for token, start in zip(tokens, starts, strict=True):
        assert sequence[start : start + len(token)].decode() == token
    assert "".join(tokens).encode() == sequence


def test_slow_character_tokenizer_with_an_unknown_token_a_letter():
    encoder = build_encoder(PieceTokenizer("ACGT"))
    encoded = encoder.encode(b"ACNNGTR")
    assert encoded.base_start.tolist() == [-1, 0, 1, 2, 3, 4, 5, 6, -1]
    assert encoder.num_special_tokens == 2


@pytest.mark.parametrize(
    ("sequence", "starts"),
    [
        (b"ACGTAC" + b"GGGGGG", [0, 6]),
        (b"NAAAAA" + b"AAAAAA", [0, 6]),
        (b"AAAAAA" + b"NAAAAA" + b"AAAAAA" + b"AAAAAA", [0, 6, 12, 18]),
        (b"ACGTAC" + b"GT", [0, 6]),
        (b"NAAAAA" + b"AAAAAA" + b"AA", [0, 6, 12]),
        (b"NAAAAA" + b"AAAAAN" + b"AAAAAA" + b"AAANAA" + b"A", [0, 6, 12, 18, 24]),
        (b"NNNNNN", [0]),
    ],
)
def test_slow_k_mers_of_one_size_with_unknown_ones(sequence, starts):
    encoder = build_encoder(PieceTokenizer(six_mers(), size=6))
    assert encoder.encode(sequence).base_start.tolist() == [-1, *starts, -1]


def test_slow_marked_lower_case_and_rna_pieces():
    marked = PieceTokenizer(["AC", "##GT", "##GU"], size=2, mark="##")
    assert build_encoder(marked).encode(b"ACGT").base_start.tolist() == [-1, 0, 2, -1]

    class Rna(PieceTokenizer):
        def _tokenize(self, text, **kwargs):
            return list(text.replace("T", "U").lower())

    assert build_encoder(Rna("acgu")).encode(b"ACGT").base_start.tolist() == [-1, 0, 1, 2, 3, -1]


def test_slow_tokens_that_do_not_spell_the_sequence_get_their_share(caplog):
    class Codes(PieceTokenizer):
        def _tokenize(self, text, **kwargs):
            return ["q7" for _ in range(0, len(text), 2)]

    encoder = build_encoder(Codes(["q7"]))
    with caplog.at_level(logging.WARNING, logger="genoembed.tokenization.hf"):
        assert encoder.encode(b"ACGTAC").base_start.tolist() == [-1, 0, 2, 4, -1]
        encoder.encode(b"AC")
    assert len(caplog.records) == 1
    assert "as if all were equally long" in caplog.text


def test_slow_tokenizer_without_special_tokens_has_none():
    class Bare(PieceTokenizer):
        def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
            return token_ids_0

    encoder = build_encoder(Bare("ACGT"))
    assert encoder.num_special_tokens == 0
    assert encoder.encode(b"ACGT").base_start.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("make", [bpe_tokenizer, lambda **kwargs: PieceTokenizer("ACGT", **kwargs)])
def test_nothing_is_truncated_and_nothing_is_warned_of(make, hf_log):
    encoder = build_encoder(make(model_max_length=8))
    encoded = encoder.encode(b"ACTG" * 100)
    assert encoded.base_start.max() >= 398
    assert hf_log == []


def test_truncation_and_padding_stored_with_a_tokenizer_have_no_effect():
    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    encoded = build_encoder(tokenizer).encode(b"A" * 20)
    assert encoded.base_start.tolist() == [-1, *range(20), -1]


@pytest.mark.parametrize(
    ("names", "expected"),
    [({}, 1), ({"pad_token": None}, 3), ({"pad_token": None, "eos_token": None, "cls_token": None}, 0)],
)
def test_pad_token_id_falls_back_to_another_id(names, expected):
    class Bare(PieceTokenizer):
        def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
            return token_ids_0

    assert build_encoder(Bare("ACGT", **names)).pad_token_id == expected


def test_max_bases_refuses_room_for_special_tokens_only():
    with pytest.raises(ConfigError, match="max_tokens: 2, expected more than the 2 special tokens"):
        build_encoder(bpe_tokenizer()).max_bases(2)


@settings(deadline=None, max_examples=60)
@given(sequence=dna(min_size=1, max_size=60))
def test_max_bases_is_kept_and_every_base_has_a_token(sequence):
    for tokenizer in (bpe_tokenizer(), wordpiece_tokenizer(), PieceTokenizer("ACGT")):
        encoder = build_encoder(tokenizer)
        encoded = encoder.encode(sequence)
        assert encoder.max_bases(len(encoded.input_ids)) <= len(sequence)
        starts = encoded.base_start[encoded.base_start >= 0]
        assert starts[0] == 0
        assert (np.diff(starts) > 0).all()


@pytest.mark.parametrize("letters", ["ACGTN", "ACGUN", "ARNDCQEGHILKMFPSTWYV", "Aa*-"])
@given(sequence=dna(letters="ACGTNRacgu*-", max_size=30))
def test_single_letters_by_table_are_those_of_the_tokenizer(letters, sequence):
    tokenizer = fast_tokenizer(
        models.WordLevel(vocab=vocabulary(*letters), unk_token="<unk>"),
        pre_tokenizer=pre_tokenizers.Split("", "isolated"),
    )
    encoder = build_encoder(tokenizer)
    is_rna = "U" in letters and "T" not in letters
    text = sequence.decode().translate(str.maketrans("Tt", "Uu")) if is_rna else sequence.decode()
    expected = tokenizer(text).input_ids
    encoded = encoder.encode(sequence)
    assert encoded.input_ids.tolist() == expected
    assert encoded.base_start.tolist() == [-1, *range(len(sequence)), -1]
    assert encoded.base_end.tolist() == [-1, *range(1, len(sequence) + 1), -1]
    assert encoded.is_unread.tolist() == [index == tokenizer.unk_token_id for index in expected]
    bare = build_encoder(tokenizer, add_special_tokens=False).encode(sequence)
    assert bare.input_ids.tolist() == expected[1:-1]


def test_sign_for_a_run_of_letters_has_the_run():
    vocab = vocabulary("A", "C", "G", "T", "N", "-")
    tokenizer = fast_tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("N{3,}"), "-")
    encoded = build_encoder(tokenizer).encode(b"NNNNACNNNNNGNNTNNN")
    spans = list(zip(encoded.base_start.tolist(), encoded.base_end.tolist(), strict=True))[1:-1]
    assert spans == [(0, 4), (4, 5), (5, 6), (6, 11), (11, 12), (12, 13), (13, 14), (14, 15), (15, 18)]
    assert not encoded.is_unread.any()
