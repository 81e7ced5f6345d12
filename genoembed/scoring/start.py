"""Which token a sequence starts with, so that its first base has a prediction, too.

In: a tokenizer. Out: the token's id, and encoded sequences that begin with it, or with none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from genoembed.contracts import EncodedSequence
from genoembed.tokenization.hf import build_encoder

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

StartChoice: TypeAlias = Literal["auto", "none"]

_PROBE = b"ACGT" * 6


class StartToken(NamedTuple):
    """What stands before a sequence."""

    id: int | None
    """None where nothing does."""
    is_added: bool
    """Whether it has to be put there: some tokenizers do it by themselves."""

    def __str__(self) -> str:
        return "none" if self.id is None else str(self.id)


def find_start_token(tokenizer: PreTrainedTokenizerBase, choice: StartChoice) -> StartToken:
    """Find the token that stands before a sequence in training.

    That is what the tokenizer puts there by itself; else its BOS; else its EOS, which ends the document
    before (EOD, id 0, of Evo 2 and the bundled model).

    Example:
        >>> from genoembed.tokenization.char import CharTokenizer
        >>> find_start_token(CharTokenizer(), "auto")
        StartToken(id=0, is_added=True)
    """
    if choice == "none":
        return StartToken(None, is_added=False)
    encoded = build_encoder(tokenizer).encode(_PROBE)
    if encoded.base_start is not None and encoded.base_start[0] < 0:
        return StartToken(int(encoded.input_ids[0]), is_added=False)
    found = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    token = next((int(index) for index in found if index is not None), None)
    return StartToken(token, is_added=token is not None)


class StartedSequence(NamedTuple):
    """Tokens as the model sees them, and which bases each of them has."""

    encoded: EncodedSequence
    first_base: NDArray[np.int64]
    """-1 for special tokens. Shape ``(L,)``."""
    num_bases: NDArray[np.int64]
    """0 for special tokens. Shape ``(L,)``."""


def start_sequence(
    encoded: EncodedSequence, length: int, start: StartToken, *, is_start: bool
) -> StartedSequence:
    """Put the start token before a sequence, or take off what the tokenizer has put there.

    Example:
        >>> encoded = EncodedSequence(input_ids=np.array([65, 67], dtype=np.uint8))
        >>> started = start_sequence(encoded, 2, StartToken(0, is_added=True), is_start=True)
        >>> started.encoded.input_ids.tolist(), started.first_base.tolist(), started.num_bases.tolist()
        ([0, 65, 67], [-1, 0, 1], [0, 1, 1])
    """
    ids = encoded.input_ids.astype(np.int64)
    first = np.arange(len(ids), dtype=np.int64) if encoded.base_start is None else encoded.base_start
    if start.id is None or not is_start:
        leading = int(np.argmax(first >= 0)) if (first >= 0).any() else 0
        ids, first = ids[leading:], first[leading:]
    elif start.is_added:
        ids, first = np.append(np.int64(start.id), ids), np.append(np.int64(-1), first)
    has_bases = first >= 0
    widths = np.zeros(len(ids), dtype=np.int64)
    widths[has_bases] = np.diff(np.append(first[has_bases], length))
    return StartedSequence(EncodedSequence(input_ids=ids, base_start=first), first, widths)
