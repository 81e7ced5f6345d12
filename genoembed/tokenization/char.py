"""The byte tokenizer of Evo 2: one byte, one token; a real Hugging Face tokenizer.

Ids 0 to 255 are bytes. Two control bytes that no sequence holds double as special tokens: NUL (id 0) ends a
document (EOD = EOS) and SOH (id 1) pads. Their token strings are those very characters, so letters such as
``<eos>`` in a text stay letters, ``text + tokenizer.eos_token`` appends id 0, and decoding gives back exactly
what was encoded. Ids 256 to 511 are unused slots of the model's vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizer

from genoembed.contracts import ByteTokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

VOCAB_SIZE = len(ByteTokens())
EOD_TOKEN_ID, PAD_TOKEN_ID = ByteTokens.eos_token_id, ByteTokens.pad_token_id
_NUM_BYTES = 256


class CharTokenizer(PreTrainedTokenizer):
    """One byte, one token, for DNA and any other text (as UTF-8); case is kept, unless told otherwise.

    Nothing is added to a sequence unless ``add_eos`` is set, nothing is ever split off, and
    ``model_max_length`` is unlimited. ``tokenizer.pad_token = tokenizer.eos_token`` is allowed and makes
    ``pad_token_id`` 0.

    Args:
        add_eos: Whether calls end each sequence with EOS (id 0). ``encode_bytes`` never does.
        upper_case: Whether calls read lower case as upper case. ``encode_bytes`` never does.
        eos_token: Text of the end token; leave as it is.
        pad_token: Text of the padding token; leave as it is, or set to ``eos_token``.
        **kwargs: What every Hugging Face tokenizer takes (``padding_side``, ``model_max_length`` ...).

    Example:
        >>> tokenizer = CharTokenizer()
        >>> tokenizer("ACGT").input_ids
        [65, 67, 71, 84]
        >>> tokenizer(["ACGT", "AC"], padding=True).input_ids
        [[65, 67, 71, 84], [65, 67, 1, 1]]
        >>> tokenizer.decode([65, 67, 71, 84])
        'ACGT'
    """

    def __init__(
        self,
        *,
        add_eos: bool = False,
        upper_case: bool = False,
        eos_token: str = chr(EOD_TOKEN_ID),
        pad_token: str = chr(PAD_TOKEN_ID),
        **kwargs: Any,
    ) -> None:
        kwargs["special_tokens_pattern"] = "eos" if add_eos else "none"
        if upper_case:  # said in saved files only where it is set
            kwargs["upper_case"] = True
        super().__init__(add_eos=add_eos, eos_token=eos_token, pad_token=pad_token, **kwargs)
        self.add_eos, self.upper_case = add_eos, upper_case

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary: 512, tokens added by the user not counted."""
        return VOCAB_SIZE

    @property
    def eod_token(self) -> str:
        """Text of the token that ends a document, the same as EOS."""
        return chr(EOD_TOKEN_ID)

    @property
    def eod_token_id(self) -> int:
        """Id of the token that ends a document: 0, the same as EOS."""
        return EOD_TOKEN_ID

    def get_vocab(self) -> dict[str, int]:
        """List every token with its id, tokens added by the user included."""
        return {chr(index): index for index in range(VOCAB_SIZE)} | self.added_tokens_encoder

    def encode_bytes(self, sequence: bytes) -> NDArray[np.uint8]:
        """View the bytes of a sequence as token ids, without copying.

        Args:
            sequence: Letters, one byte per base.

        Returns:
            Token ids. uint8, shape ``(len(sequence),)``; read-only, shares memory with ``sequence``.

        Example:
            >>> CharTokenizer().encode_bytes(b"ACGT").tolist()
            [65, 67, 71, 84]
        """
        return np.frombuffer(sequence, dtype=np.uint8)

    def decode_bytes(self, token_ids: ArrayLike) -> bytes:
        """Turn token ids back into bytes: the inverse of ``encode_bytes``.

        Args:
            token_ids: Token ids of one sequence. Integers; those that are neither a byte nor a token added by
                the user (unused slots, ignored labels) are left out.

        Returns:
            One byte a token; NUL and SOH where EOS and padding stood.

        Example:
            >>> CharTokenizer().decode_bytes([65, 67, -100, 300])
            b'AC'
        """
        ids = np.asarray(token_ids, dtype=np.int64).reshape(-1)
        # mostly all are bytes: one copy instead of a lookup per token
        if not ids.size or (ids.min() >= 0 and ids.max() < _NUM_BYTES):
            return ids.astype(np.uint8).tobytes()
        return b"".join(self._token_bytes(index) for index in ids.tolist())

    def _token_bytes(self, index: int) -> bytes:
        if 0 <= index < _NUM_BYTES:
            return bytes((index,))
        added = self._added_tokens_decoder.get(index)
        return b"" if added is None else added.content.encode()

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Split a text into tokens: the bytes of its UTF-8 form, each as one character.

        Args:
            text: The text.
            **kwargs: As in the base class; ``split_special_tokens`` matters only after tokens were added.

        Returns:
            One-character strings (code points below 256), and tokens added by the user.
        """
        if all(index < VOCAB_SIZE for index in self._added_tokens_decoder):
            return self._tokenize(text)
        return super().tokenize(text, **kwargs)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list((text.upper() if self.upper_case else text).encode().decode("latin-1"))

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Look up the ids of tokens.

        Args:
            tokens: One token, or several.

        Returns:
            One id, or a list of ids. None for what is no token, as Hugging Face tokenizers without an unknown
            token do.
        """
        if isinstance(tokens, str):
            return super().convert_tokens_to_ids(tokens)
        joined = "".join(tokens)
        # A megabase takes milliseconds this way, and a second through the token-by-token lookup.
        if joined.isascii() and set(map(len, tokens)) == {1}:
            return list(joined.encode("ascii"))
        return super().convert_tokens_to_ids(tokens)

    def _convert_token_to_id(self, token: str) -> int | None:
        return ord(token) if len(token) == 1 and ord(token) < VOCAB_SIZE else None

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index) if 0 <= index < VOCAB_SIZE else ""

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join tokens to the text they came from.

        Args:
            tokens: Tokens as ``tokenize`` gives them.

        Returns:
            The text; bytes that are not UTF-8 become U+FFFD.
        """
        return self._decode(
            [index for index in self.convert_tokens_to_ids(list(tokens)) if index is not None]
        )

    def _decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = np.asarray(token_ids, dtype=np.int64).reshape(-1)
        if skip_special_tokens:
            ids = ids[~np.isin(ids, self.all_special_ids)]
        return self.decode_bytes(ids).decode(errors="replace")
