"""Any Hugging Face tokenizer behind one contract: bytes in, token ids and the bases of each token out.

The bases of a token, a half-open span, come, in this order, from

1. the tokenizer: byte view (``CharTokenizer``), one word at every base (``KmerTokenizer``), or offset mapping
   (fast tokenizers; letters that get no token belong to none; what a tokenizer writes for a run of letters,
   such as one token for many N, stands for the whole run);
2. its tokens aligned with the sequence, whatever their marks (``##``, ``@@`` ...) and case; tokens without
   letters of their own, such as ``<unk>``, take one base, or one k-mer, or all up to the next known token:
   the first of these that makes the tokens cover the sequence exactly;
3. the share of the tokens before it, as if all tokens were equally long (logged once, as it is inexact).

A vocabulary of RNA, with U and without T, is given U for T.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeGuard

import numpy as np

from genoembed.contracts import ByteTokens, EncodedSequence
from genoembed.errors import ConfigError, foreign_code

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from genoembed.tokenization.char import CharTokenizer
    from genoembed.tokenization.kmer import KmerTokenizer

logger = logging.getLogger(__name__)

# All bases, so that tokenizers of single bases, k-mers or long words show what they add around a sequence.
_PROBE = "ACGT" * 6
_UNKNOWN_RUN = -1
_TO_RNA = bytes.maketrans(b"Tt", b"Uu")
# a multiple of all k up to 6, 8 and 10; without a pattern, so that learned words in it differ in length
_FRAME_PROBE = "".join("ACGT"[(number * 40503 >> 7 ^ number * number) & 3] for number in range(240))
_LETTERS_SHOWN = 5
_WHOLE = {"truncation": False, "padding": False, "verbose": False}
_ALL_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_NO_LETTER = -1


class SequenceEncoder(Protocol):
    """Turns sequences into token ids, without ever cutting or dropping any."""

    @property
    def pad_token_id(self) -> int:
        """Id to fill padded slots with."""

    @property
    def num_special_tokens(self) -> int:
        """Tokens added around each sequence."""

    @property
    def aligned(self) -> bool:
        """Whether token ``i`` is base ``i`` in every sequence."""

    @property
    def frame_bp(self) -> int:
        """Length of non-overlapping k-mers, in bases: a window holds whole ones; else 1."""

    def encode(self, sequence: bytes) -> EncodedSequence:
        """Encode one sequence."""

    def max_bases(self, max_tokens: int) -> int:
        """Return the longest sequence that is sure to fit, whatever its bases."""

    def why_unread(self, sequence: bytes) -> str:
        """Say why the vocabulary lacks words for a sequence."""


def _is_bytes(tokenizer: object) -> TypeGuard[CharTokenizer | ByteTokens]:
    """Tell our tokenizers by what they do: importing their classes would import transformers."""
    return isinstance(tokenizer, ByteTokens) or hasattr(tokenizer, "encode_bytes")


def _is_kmers(tokenizer: object) -> TypeGuard[KmerTokenizer]:
    return hasattr(tokenizer, "encode_bases")


def words_per_base(tokenizer: object) -> int:
    """Count the words that overlap at a base: k of overlapping k-mers, 1 of all others."""
    return tokenizer.k if _is_kmers(tokenizer) else 1


def build_encoder(
    tokenizer: PreTrainedTokenizerBase | ByteTokens, *, add_special_tokens: bool = True
) -> SequenceEncoder:
    """Wrap a tokenizer for embedding.

    Example:
        >>> encoder = build_encoder(ByteTokens())
        >>> encoder.encode(b"ACGT").input_ids.tolist(), encoder.aligned, encoder.max_bases(8)
        ([65, 67, 71, 84], True, 8)
    """
    if _is_bytes(tokenizer):
        return _ByteEncoder(tokenizer)
    with foreign_code("the model's tokenizer"):
        if _is_kmers(tokenizer):
            return _KmerEncoder(tokenizer, add_special_tokens)
        assert not isinstance(tokenizer, ByteTokens)
        kind = _FastEncoder if tokenizer.is_fast else _SlowEncoder
        encoder = kind(tokenizer, add_special_tokens)
        return _LetterEncoder.of(encoder) or encoder


def unread_problem(encoder: SequenceEncoder, sequence: bytes, *, num_unread: int, num_bases: int) -> str:
    """Phrase why a sequence is refused of which hardly anything can be read."""
    return (
        f"{num_unread} of {num_bases} bases cannot be read by the model's tokenizer: "
        f"{encoder.why_unread(sequence)}; take a model for such sequences, or leave the record out"
    )


class _ByteEncoder:
    """Bytes are ids: nothing is copied, nothing is added."""

    aligned = True
    num_special_tokens = 0
    frame_bp = 1

    def __init__(self, tokenizer: CharTokenizer | ByteTokens) -> None:
        self.pad_token_id = _pad_token_id(tokenizer)

    def encode(self, sequence: bytes) -> EncodedSequence:
        return EncodedSequence(input_ids=np.frombuffer(sequence, dtype=np.uint8))

    def max_bases(self, max_tokens: int) -> int:
        return _max_bases(max_tokens, 0)

    def why_unread(self, sequence: bytes) -> str:
        return "every byte is a token"


class _Spans(NamedTuple):
    """Bases of tokens that all stand for some."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


class _WordEncoder:
    """A tokenizer with a vocabulary of letters or words."""

    aligned = False

    num_special_tokens: int

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._adds_special_tokens = add_special_tokens
        self.pad_token_id = _pad_token_id(tokenizer)
        self.unknown_id = -1 if tokenizer.unk_token_id is None else int(tokenizer.unk_token_id)
        """Of what the vocabulary lacks; -1, which no token has, where there is none."""
        special = frozenset(tokenizer.all_special_tokens)
        tokens = [token for token in tokenizer.get_vocab() if token not in special and token[:1] not in "[<"]
        self.word_lengths = frozenset(len(_letters(token)) for token in tokens if token.isalpha())
        self._alphabet = frozenset("".join(tokens))
        self._reads_rna = "U" in self._alphabet and "T" not in self._alphabet

    @cached_property
    def frame_bp(self) -> int:
        encoded = self.encode(_FRAME_PROBE.encode())
        assert encoded.base_start is not None, "only bytes are their own tokens"
        starts = encoded.base_start[encoded.base_start >= 0]
        if len(starts) < 2 or starts[0] != 0:
            return 1
        frame = int(starts[1])
        whole = np.arange(len(_FRAME_PROBE) // frame) * frame if frame else starts[:1]
        is_frame = frame > 1 and np.array_equal(starts[: len(whole)], whole)
        return frame if is_frame else 1

    def encode(self, sequence: bytes) -> EncodedSequence:
        raise NotImplementedError

    def max_bases(self, max_tokens: int) -> int:
        raise NotImplementedError

    def ids(self, text: str) -> list[int]:
        """Encode a text, special tokens included."""
        return list(
            self._tokenizer(text, add_special_tokens=self._adds_special_tokens, **_WHOLE)["input_ids"]
        )

    def why_unread(self, sequence: bytes) -> str:
        text = sequence.decode("ascii")
        lacking = sorted(set(self.spelled(sequence).decode("ascii")) - self._alphabet)
        if lacking and {letter.upper() for letter in lacking} <= self._alphabet:
            return "they are in lower case, which its vocabulary lacks"
        if lacking:
            shown = ", ".join(lacking[:_LETTERS_SHOWN])
            return f"its vocabulary has no {shown}: it may be one of another kind of sequence"
        if len(self.word_lengths) == 1 and (k := max(self.word_lengths)) > 1:
            joint = f"the sequence has {len(text)}" if len(text) < k else "other letters break them"
            return f"its vocabulary holds words of {k} letters only, and {joint}"
        return "its vocabulary has few of their words: it may expect blanks between overlapping words"

    def spelled(self, sequence: bytes) -> bytes:
        """Write a sequence in the letters of the vocabulary: RNA in those of RNA."""
        return sequence.translate(_TO_RNA) if self._reads_rna else sequence


class _LetterEncoder:
    """A tokenizer of single letters as a table of their ids: a megabase takes milliseconds, not seconds."""

    aligned = False
    frame_bp = 1

    def __init__(self, whole: _WordEncoder, table: NDArray[np.int64], place: int) -> None:
        self._whole = whole
        self.pad_token_id = whole.pad_token_id
        self.num_special_tokens = whole.num_special_tokens
        around = np.array(whole.ids("A"))
        self._before, self._after = around[:place], around[place + 1 :]
        self._table = table
        self._unread = table == whole.unknown_id

    @classmethod
    def of(cls, whole: _WordEncoder) -> _LetterEncoder | None:
        """Make the table, if each letter has its token whatever stands beside it; else None."""
        if whole.word_lengths != {1}:
            return None
        around, first = whole.ids("A"), whole.encode(b"A").base_start
        if first is None or (first >= 0).sum() != 1:
            return None
        place = int(np.argmax(first >= 0))
        table = np.full(256, _NO_LETTER)
        for letter in _ALL_LETTERS:
            ids = whole.ids(letter)
            if len(ids) != len(around):
                return None
            table[ord(letter)] = ids[place]
        encoder = cls(whole, table, place)
        mixed = "".join((_ALL_LETTERS, _ALL_LETTERS[::-3], "N" * 40, _ALL_LETTERS[1::2], "acgt" * 3))
        is_same = encoder.encode(mixed.encode()).input_ids.tolist() == whole.ids(mixed)
        return encoder if is_same else None

    def encode(self, sequence: bytes) -> EncodedSequence:
        letters = np.frombuffer(self._whole.spelled(sequence), dtype=np.uint8)
        ids = self._table[letters]
        if (ids == _NO_LETTER).any():
            return self._whole.encode(sequence)
        starts = np.arange(len(ids), dtype=np.int64)
        none_before, none_after = (np.full(len(special), -1) for special in (self._before, self._after))
        return EncodedSequence(
            input_ids=np.concatenate([self._before, ids, self._after]),
            base_start=np.concatenate([none_before, starts, none_after]),
            base_end=np.concatenate([none_before, starts + 1, none_after]),
            is_unread=np.concatenate([none_before > 0, self._unread[letters], none_after > 0]),
        )

    def max_bases(self, max_tokens: int) -> int:
        return self._whole.max_bases(max_tokens)

    def why_unread(self, sequence: bytes) -> str:
        return self._whole.why_unread(sequence)


class _KmerEncoder(_WordEncoder):
    """A word at every base."""

    frame_bp = 1

    def __init__(self, tokenizer: KmerTokenizer, add_special_tokens: bool) -> None:
        super().__init__(tokenizer, add_special_tokens)
        self._kmers = tokenizer
        around = tokenizer.build_inputs_with_special_tokens([_UNKNOWN_RUN]) if add_special_tokens else [-1]
        place = around.index(_UNKNOWN_RUN)
        self._before, self._after = (np.array(ids, np.int64) for ids in (around[:place], around[place + 1 :]))
        self.num_special_tokens = len(around) - 1

    def encode(self, sequence: bytes) -> EncodedSequence:
        ids = self._kmers.encode_bases(self.spelled(sequence))
        starts = np.arange(len(ids), dtype=np.int64)
        none_before, none_after = (np.full(len(special), -1) for special in (self._before, self._after))
        return EncodedSequence(
            input_ids=np.concatenate([self._before, ids, self._after]),
            base_start=np.concatenate([none_before, starts, none_after]),
            base_end=np.concatenate([none_before, starts + self._kmers.k, none_after]),
            is_unread=np.concatenate([none_before > 0, ids == self._kmers.unk_token_id, none_after > 0]),
        )

    def max_bases(self, max_tokens: int) -> int:
        return _max_bases(max_tokens, self.num_special_tokens) + self._kmers.k - 1


class _FastEncoder(_WordEncoder):
    """A tokenizer of the ``tokenizers`` library, which knows where its tokens are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool) -> None:
        super().__init__(tokenizer, add_special_tokens)
        self._has_logged_gaps = False
        encoding = self._call(_PROBE)
        self.num_special_tokens = sum(encoding["special_tokens_mask"])
        # a base is a token at most, so what a sequence of one base has besides is added to every sequence
        self._num_extra_tokens = max(len(self._call(base)["input_ids"]) for base in "ACGTN") - 1

    def encode(self, sequence: bytes) -> EncodedSequence:
        text = self.spelled(sequence).decode("ascii")
        encoding = self._call(text)
        ids = np.asarray(encoding["input_ids"], dtype=np.int64)
        starts, ends = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        has_bases = (ends > starts) & ~np.asarray(encoding["special_tokens_mask"], dtype=np.bool_)
        # A mark of a word's start may claim the base of the token after it; the base is that token's.
        has_bases[:-1] &= ~(has_bases[1:] & (starts[1:] == starts[:-1]))
        spans = _Spans(starts[has_bases], ends[has_bases])
        if len(sequence) > int((spans.ends - spans.starts).sum()):
            spans = self._with_gaps(ids[has_bases], text, spans)
        base_start, base_end = np.full((2, len(ids)), -1, dtype=np.int64)
        base_start[has_bases], base_end[has_bases] = spans
        return EncodedSequence(
            input_ids=ids,
            base_start=base_start,
            base_end=base_end,
            is_unread=has_bases & (ids == self.unknown_id),
        )

    def max_bases(self, max_tokens: int) -> int:
        return _max_bases(max_tokens, self._num_extra_tokens)

    def _call(self, text: str) -> BatchEncoding:
        return self._tokenizer(
            text,
            add_special_tokens=self._adds_special_tokens,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            **_WHOLE,
        )

    def _with_gaps(self, ids: NDArray[np.int64], text: str, spans: _Spans) -> _Spans:
        """Find the tokens of a sequence of which some letters have none."""
        pieces = [_letters(token) for token in self._tokenizer.convert_ids_to_tokens(ids.tolist())]
        letters = _letters(text)
        is_spelled = np.array(
            [letters[start:end] == piece for piece, start, end in zip(pieces, *spans, strict=True)], np.bool_
        )
        unknown = ids == self.unknown_id
        # what the tokenizer writes for a run of letters: it has the place of the run's last, or first
        is_sign = ~is_spelled & ~unknown & np.array([not piece.isalpha() for piece in pieces], np.bool_)
        if not (is_spelled | unknown | is_sign).all():
            # the library counts offsets as if letters without a token were not there at all
            spans = _found(pieces, letters, spans)
        elif is_sign.any():
            before, after = np.append(0, spans.ends[:-1]), np.append(spans.starts[1:], len(text))
            is_last_sign = is_sign & ~np.append(is_sign[1:], False)
            spans = _Spans(np.where(is_sign, before, spans.starts), np.where(is_last_sign, after, spans.ends))
        if num_gaps := len(text) - int((spans.ends - spans.starts).sum()):
            self._log_gaps(num_gaps, len(text))
        return spans

    def _log_gaps(self, num_gaps: int, num_bases: int) -> None:
        """Log once that some letters have no token: the model's choice, but not a silent one."""
        if self._has_logged_gaps:
            return
        self._has_logged_gaps = True
        logger.warning(
            "the model's tokenizer has no token for %d of %d bases (letters outside its vocabulary); later "
            "sequences are not reported",
            num_gaps,
            num_bases,
        )


class _SlowEncoder(_WordEncoder):
    """A tokenizer in Python, which gives ids only: where tokens are is worked out from their text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool) -> None:
        super().__init__(tokenizer, add_special_tokens)
        self._has_logged_shares = False
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._num_before, self._num_after = self._probe_special_tokens()
        self.num_special_tokens = self._num_before + self._num_after
        self._num_extra_tokens = max(len(self.ids(base)) for base in "ACGTN") - 1

    def encode(self, sequence: bytes) -> EncodedSequence:
        text = self.spelled(sequence).decode("ascii")
        ids = self.ids(text)
        inner = slice(self._num_before, len(ids) - self._num_after)
        base_start, base_end = np.full((2, len(ids)), -1, dtype=np.int64)
        base_start[inner], base_end[inner] = self._locate(ids[inner], text)
        is_unread = np.isin(ids, list(self._special_ids)) & (base_end > base_start)
        return EncodedSequence(
            input_ids=np.asarray(ids, dtype=np.int64),
            base_start=base_start,
            base_end=base_end,
            is_unread=is_unread,
        )

    def max_bases(self, max_tokens: int) -> int:
        return _max_bases(max_tokens, self._num_extra_tokens)

    def _probe_special_tokens(self) -> tuple[int, int]:
        """Count the special tokens before and after a sequence (custom code often has no mask of them)."""
        # the unknown token is among the special ones, but stands for letters
        is_special = [
            index in self._special_ids and index != self._tokenizer.unk_token_id for index in self.ids(_PROBE)
        ]
        if all(is_special):
            return 0, 0
        return is_special.index(False), is_special[::-1].index(False)

    def _locate(self, ids: Sequence[int], text: str) -> _Spans:
        tokens = self._tokenizer.convert_ids_to_tokens(list(ids))
        pieces = [
            None if index in self._special_ids else _letters(token)
            for index, token in zip(ids, tokens, strict=True)
        ]
        spans = _lay_along(pieces, _letters(text))
        if spans is not None:
            return spans
        if not self._has_logged_shares:
            self._has_logged_shares = True
            logger.warning(
                "the tokens of the model's tokenizer do not spell the sequence; where they start is taken "
                "from their order, as if all were equally long"
            )
        bounds = np.arange(len(ids) + 1, dtype=np.int64) * len(text) // max(1, len(ids))
        return _Spans(bounds[:-1], bounds[1:])


def word_length(token: str) -> int:
    """Count the bases of a token by its text.

    Example:
        >>> word_length("##ACG"), word_length("A")
        (3, 1)
    """
    return len(_letters(token))


def count_bases(tokenizer: PreTrainedTokenizerBase, num_ids: int) -> list[int]:
    """Count the bases that each token stands for, by its text: 0 for special tokens, 1 for unknown letters.

    Example:
        >>> import genoembed
        >>> count_bases(genoembed.CharTokenizer(), 512)[:3]
        [0, 0, 1]
    """
    known = min(num_ids, len(tokenizer))
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(list(range(known)))]
    special = set(tokenizer.all_special_tokens)
    unknown = words_per_base(tokenizer)
    counts = [0 if token in special else max(1, word_length(token)) for token in tokens]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id < known:
        counts[tokenizer.unk_token_id] = unknown
    return [*counts, *[1] * (num_ids - known)]


def _letters(token: str) -> str:
    """Strip the marks of word pieces and ignore case and the difference of T and U."""
    return _without_marks(token).upper().replace("U", "T")


def _without_marks(token: str) -> str:
    return token.removeprefix("##").removesuffix("@@").removesuffix("</w>").strip("▁Ġ ")


_DNA_LETTERS = ("ACGT", "ACGU", "acgt", "acgu")


def letter_tokens(tokenizer: PreTrainedTokenizerBase | ByteTokens) -> dict[int, str]:
    """Find the tokens that are made of the four bases alone, as DNA in upper case, by id.

    Of a vocabulary with several alphabets the first of these counts: DNA, RNA, both in lower case.

    Example:
        >>> letter_tokens(ByteTokens())
        {65: 'A', 67: 'C', 71: 'G', 84: 'T'}
    """
    special = set(tokenizer.all_special_ids)
    ids = [index for index in range(len(tokenizer)) if index not in special]
    tokens = [_without_marks(token or "") for token in tokenizer.convert_ids_to_tokens(ids)]
    for letters in _DNA_LETTERS:
        found = {
            index: token
            for index, token in zip(ids, tokens, strict=True)
            if token and not token.strip(letters)
        }
        # with one letter lacking, it is another alphabet: A, C and G are in both DNA and RNA
        if set(letters) <= set("".join(found.values())):
            return {index: token.upper().replace("U", "T") for index, token in found.items()}
    return {}


def _found(pieces: Sequence[str], text: str, fallback: _Spans) -> _Spans:
    """Find tokens one after the other; what is between them are letters that no token has."""
    starts = []
    position = 0
    for piece in pieces:
        start = text.find(piece, position)
        if start < 0:
            return fallback
        starts.append(start)
        position = start + len(piece)
    firsts = np.array(starts, dtype=np.int64)
    return _Spans(firsts, firsts + np.array([len(piece) for piece in pieces], dtype=np.int64))


def _lay_along(pieces: Sequence[str | None], text: str) -> _Spans | None:
    """Find where each piece is, if the pieces cover the text exactly; None stands for unknown letters."""
    known = Counter(len(piece) for piece in pieces if piece)
    # of a k-mer tokenizer all known tokens but the last have k letters
    kmer = known.most_common(1)[0][0] if known else len(text) // max(1, len(pieces))
    for unknown_width in (1, kmer, _UNKNOWN_RUN):
        spans = _lay(pieces, text, unknown_width)
        if spans is not None:
            starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
            return _Spans(starts, ends)
    return None


def _lay(pieces: Sequence[str | None], text: str, unknown_width: int) -> list[tuple[int, int]] | None:
    spans: list[tuple[int, int]] = []
    position = 0
    index = 0
    while index < len(pieces):
        piece = pieces[index]
        if piece is None:
            run = _run_of_unknowns(pieces, index)
            following = pieces[index + run] if index + run < len(pieces) else None
            widths = _unknown_widths(run, unknown_width, following, text, position)
            if min(widths) < 1:
                return None
            for width in widths:
                spans.append((position, position + width))
                position += width
            index += run
            continue
        if not text.startswith(piece, position):
            return None
        spans.append((position, position + len(piece)) if piece else (-1, -1))
        position += len(piece)
        index += 1
    return spans if position == len(text) else None


def _run_of_unknowns(pieces: Sequence[str | None], index: int) -> int:
    end = index
    while end < len(pieces) and pieces[end] is None:
        end += 1
    return end - index


def _unknown_widths(run: int, width: int, following: str | None, text: str, position: int) -> list[int]:
    """Share letters out to a run of unknown tokens; a width below 1 says that there are too few of them."""
    if width != _UNKNOWN_RUN:
        # The last piece of a sequence may be short.
        return [width] * (run - 1) + [min(width, len(text) - position - width * (run - 1))]
    found = len(text) if following is None else text.find(following, position + run)
    total = max(found - position, 0)
    return [total * (number + 1) // run - total * number // run for number in range(run)]


def _pad_token_id(tokenizer: PreTrainedTokenizerBase | ByteTokens) -> int:
    """Take the padding id, or any id at all where there is none: padded slots are masked by position."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def _max_bases(max_tokens: int, num_extra_tokens: int) -> int:
    if max_tokens <= num_extra_tokens:
        message = (
            f"max_tokens: {max_tokens}, expected more than the {num_extra_tokens} special tokens of a "
            f"sequence; set it to {num_extra_tokens + 1} or more"
        )
        raise ConfigError(message)
    return max_tokens - num_extra_tokens
