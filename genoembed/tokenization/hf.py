"""Any Hugging Face tokenizer behind one contract: bytes in, token ids and the base each token starts at out.

Where a token starts comes, in this order, from

1. the tokenizer: byte view (``CharTokenizer``) or offset mapping (fast tokenizers; letters that get no token
   belong to none, and are logged once);
2. its tokens aligned with the sequence, whatever their marks (``##``, ``@@`` ...) and case; tokens without
   letters of their own, such as ``<unk>``, take one base, or one k-mer, or all up to the next known token:
   the first of these that makes the tokens cover the sequence exactly;
3. the share of the tokens before it, as if all tokens were equally long (logged once, as it is inexact).
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Protocol

import numpy as np

from genoembed.contracts import EncodedSequence
from genoembed.errors import ConfigError, foreign_code
from genoembed.tokenization.char import CharTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import BatchEncoding, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# All bases, so that tokenizers of single bases, k-mers or long words show what they add around a sequence.
_PROBE = "ACGT" * 6
_UNKNOWN_RUN = -1


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

    def encode(self, sequence: bytes) -> EncodedSequence:
        """Encode one sequence."""

    def max_bases(self, max_tokens: int) -> int:
        """Return the longest sequence that is sure to fit, whatever its bases."""


def build_encoder(tokenizer: PreTrainedTokenizerBase) -> SequenceEncoder:
    """Wrap a tokenizer for embedding.

    Example:
        >>> encoder = build_encoder(CharTokenizer())
        >>> encoder.encode(b"ACGT").input_ids.tolist(), encoder.aligned, encoder.max_bases(8)
        ([65, 67, 71, 84], True, 8)
    """
    if isinstance(tokenizer, CharTokenizer):
        return _ByteEncoder(tokenizer)
    with foreign_code("the model's tokenizer"):
        return _FastEncoder(tokenizer) if tokenizer.is_fast else _SlowEncoder(tokenizer)


class _ByteEncoder:
    """Bytes are ids: nothing is copied, nothing is added."""

    aligned = True
    num_special_tokens = 0

    def __init__(self, tokenizer: CharTokenizer) -> None:
        self._tokenizer = tokenizer
        self.pad_token_id = _pad_token_id(tokenizer)

    def encode(self, sequence: bytes) -> EncodedSequence:
        return EncodedSequence(input_ids=self._tokenizer.encode_bytes(sequence))

    def max_bases(self, max_tokens: int) -> int:
        return _max_bases(max_tokens, 0)


class _FastEncoder:
    """A tokenizer of the ``tokenizers`` library, which knows where its tokens are."""

    aligned = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._has_logged_gaps = False
        self.pad_token_id = _pad_token_id(tokenizer)
        encoding = self._call(_PROBE)
        self.num_special_tokens = sum(encoding["special_tokens_mask"])
        # a base is a token at most, so what a sequence of one base has besides is added to every sequence
        self._num_extra_tokens = max(len(self._call(base)["input_ids"]) for base in "ACGTN") - 1

    def encode(self, sequence: bytes) -> EncodedSequence:
        encoding = self._call(sequence.decode("ascii"))
        ids = np.asarray(encoding["input_ids"], dtype=np.int64)
        starts, ends = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        has_bases = (ends > starts) & ~np.asarray(encoding["special_tokens_mask"], dtype=np.bool_)
        # A mark of a word's start may claim the base of the token after it; the base is that token's.
        has_bases[:-1] &= ~(has_bases[1:] & (starts[1:] == starts[:-1]))
        base_start = np.where(has_bases, starts, -1)
        num_gaps = len(sequence) - int((ends - starts)[has_bases].sum())
        if num_gaps > 0:
            self._log_gaps(num_gaps, len(sequence))
            # The library counts offsets as if letters without a token were not there at all.
            base_start[has_bases] = self._find(ids[has_bases], sequence, starts[has_bases])
        return EncodedSequence(input_ids=ids, base_start=base_start)

    def max_bases(self, max_tokens: int) -> int:
        return _max_bases(max_tokens, self._num_extra_tokens)

    def _call(self, text: str) -> BatchEncoding:
        return self._tokenizer(
            text,
            truncation=False,
            padding=False,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )

    def _find(
        self, ids: NDArray[np.int64], sequence: bytes, fallback: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Find tokens one after the other; what is between them are letters that no token has."""
        text = _letters(sequence.decode("ascii"))
        starts = []
        position = 0
        for token in self._tokenizer.convert_ids_to_tokens(ids.tolist()):
            piece = _letters(token)
            start = text.find(piece, position)
            if start < 0:
                return fallback
            starts.append(start)
            position = start + len(piece)
        return np.array(starts, dtype=np.int64)

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


class _SlowEncoder:
    """A tokenizer in Python, which gives ids only: where tokens are is worked out from their text."""

    aligned = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._has_logged_shares = False
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self.pad_token_id = _pad_token_id(tokenizer)
        self._num_before, self._num_after = self._probe_special_tokens()
        self.num_special_tokens = self._num_before + self._num_after
        self._num_extra_tokens = max(len(self._ids(base)) for base in "ACGTN") - 1

    def encode(self, sequence: bytes) -> EncodedSequence:
        text = sequence.decode("ascii")
        ids = self._ids(text)
        inner = slice(self._num_before, len(ids) - self._num_after)
        base_start = np.full(len(ids), -1, dtype=np.int64)
        base_start[inner] = self._locate(ids[inner], text)
        return EncodedSequence(input_ids=np.asarray(ids, dtype=np.int64), base_start=base_start)

    def max_bases(self, max_tokens: int) -> int:
        return _max_bases(max_tokens, self._num_extra_tokens)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"]
        return ids

    def _probe_special_tokens(self) -> tuple[int, int]:
        """Count the special tokens before and after a sequence (custom code often has no mask of them)."""
        # the unknown token is among the special ones, but stands for letters
        is_special = [
            index in self._special_ids and index != self._tokenizer.unk_token_id
            for index in self._ids(_PROBE)
        ]
        if all(is_special):
            return 0, 0
        return is_special.index(False), is_special[::-1].index(False)

    def _locate(self, ids: Sequence[int], text: str) -> NDArray[np.int64]:
        tokens = self._tokenizer.convert_ids_to_tokens(list(ids))
        pieces = [
            None if index in self._special_ids else _letters(token)
            for index, token in zip(ids, tokens, strict=True)
        ]
        starts = _lay_along(pieces, _letters(text))
        if starts is not None:
            return starts
        if not self._has_logged_shares:
            self._has_logged_shares = True
            logger.warning(
                "the tokens of the model's tokenizer do not spell the sequence; where they start is taken "
                "from their order, as if all were equally long"
            )
        return np.arange(len(ids), dtype=np.int64) * len(text) // max(1, len(ids))


def _letters(token: str) -> str:
    """Strip the marks of word pieces and ignore case and the difference of T and U."""
    return _without_marks(token).upper().replace("U", "T")


def _without_marks(token: str) -> str:
    return token.removeprefix("##").removesuffix("@@").removesuffix("</w>").strip("▁Ġ ")


_DNA_LETTERS = ("ACGT", "ACGU", "acgt", "acgu")


def letter_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Find the tokens that are made of the four bases alone, as DNA in upper case, by id.

    Of a vocabulary with several alphabets the first of these counts: DNA, RNA, both in lower case.

    Example:
        >>> letter_tokens(CharTokenizer())
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


def _lay_along(pieces: Sequence[str | None], text: str) -> NDArray[np.int64] | None:
    """Find where each piece starts, if the pieces cover the text exactly; None stands for unknown letters."""
    known = Counter(len(piece) for piece in pieces if piece)
    # of a k-mer tokenizer all known tokens but the last have k letters
    kmer = known.most_common(1)[0][0] if known else len(text) // max(1, len(pieces))
    for unknown_width in (1, kmer, _UNKNOWN_RUN):
        starts = _lay(pieces, text, unknown_width)
        if starts is not None:
            return np.array(starts, dtype=np.int64)
    return None


def _lay(pieces: Sequence[str | None], text: str, unknown_width: int) -> list[int] | None:
    starts: list[int] = []
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
                starts.append(position)
                position += width
            index += run
            continue
        if not text.startswith(piece, position):
            return None
        starts.append(position if piece else -1)
        position += len(piece)
        index += 1
    return starts if position == len(text) else None


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


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
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
