"""The tokenizer of models that read overlapping k-mers, such as DNABERT: a token at every base.

In: a vocabulary of special tokens in brackets and of k-mers of one length. Out: for a sequence of n bases,
its n - k + 1 k-mers, none where it is shorter. The published files are meant for text in which blanks stand
between k-mers that somebody else has made; plain sequences would be one unknown word.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from transformers import PreTrainedTokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_VOCABULARY = "vocab.txt"


def kmer_length(tokens: Sequence[str]) -> int | None:
    """Find the k of a vocabulary; None where its words are not all letters of one length above 1.

    Example:
        >>> kmer_length(["[PAD]", "[UNK]", "AAA", "AAT"]), kmer_length(["[UNK]", "AAA", "A"])
        (3, None)
    """
    lengths = {len(token) for token in tokens if not _is_special(token)}
    are_words = all(token.isalpha() for token in tokens if not _is_special(token))
    return lengths.pop() if are_words and len(lengths) == 1 and min(lengths) > 1 else None


def _is_special(token: str) -> bool:
    return token[:1] + token[-1:] in ("[]", "<>")


class KmerTokenizer(PreTrainedTokenizer):
    """Overlapping k-mers, one at every base; letters keep their case, unless told otherwise.

    Blanks end a word, as in the k-mer text that DNABERT was published with: each word gives its own k-mers,
    so that ``ACGTAC CGTACG`` and ``ACGTACG`` give the same tokens.

    Args:
        vocab_file: Text file, one token per line in the order of their ids: k-mers of one length, and special
            tokens in brackets.
        unk_token: Stands for k-mers that are not in the vocabulary.
        sep_token: Ends a sequence.
        pad_token: Pads.
        cls_token: Begins a sequence.
        mask_token: Stands for a hidden k-mer.
        upper_case: Whether calls read lower case as upper case. ``encode_bases`` never does.
        **kwargs: What every Hugging Face tokenizer takes (``padding_side``, ``model_max_length`` ...).
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": _VOCABULARY}
    model_input_names: ClassVar[list[str]] = ["input_ids", "token_type_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        *,
        unk_token: str = "[UNK]",
        sep_token: str = "[SEP]",
        pad_token: str = "[PAD]",
        cls_token: str = "[CLS]",
        mask_token: str = "[MASK]",
        upper_case: bool = False,
        **kwargs: Any,
    ) -> None:
        tokens = read_vocabulary(Path(vocab_file))
        k = kmer_length(tokens)
        if k is None:
            message = f"{vocab_file}: words of several lengths, expected k-mers of one length"
            raise ValueError(message)
        self.k = k
        self._tokens = tokens
        self._ids = {token: index for index, token in enumerate(tokens)}
        words = np.array([token.encode() for token in tokens if not _is_special(token)])
        self._order = np.argsort(words)
        self._sorted_words = words[self._order]
        self._word_ids = np.array([self._ids[word.decode()] for word in words], dtype=np.int64)[self._order]
        kwargs["special_tokens_pattern"] = "cls_sep"
        if upper_case:
            kwargs["upper_case"] = True
        self.upper_case = upper_case
        super().__init__(
            unk_token=unk_token,
            sep_token=sep_token,
            pad_token=pad_token,
            cls_token=cls_token,
            mask_token=mask_token,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, tokens added by the user not counted."""
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        """List every token with its id, tokens added by the user included."""
        return self._ids | self.added_tokens_encoder

    def encode_bases(self, sequence: bytes) -> NDArray[np.int64]:
        """Encode a sequence of letters without blanks; no special tokens are added.

        Args:
            sequence: Letters, one byte per base.

        Returns:
            Token ids, one for each k-mer. int64, shape ``(max(0, len(sequence) - k + 1),)``.
        """
        letters = np.frombuffer(sequence, dtype=np.uint8)
        if len(letters) < self.k:
            return np.zeros(0, dtype=np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(letters, self.k)
        # as fixed-length byte strings, which one search finds in the sorted vocabulary
        words = np.ascontiguousarray(windows).view(f"S{self.k}").ravel()
        places = np.minimum(np.searchsorted(self._sorted_words, words), len(self._sorted_words) - 1)
        is_known = self._sorted_words[places] == words
        return np.where(is_known, self._word_ids[places], self.unk_token_id)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        text = text.upper() if self.upper_case else text
        return [
            word[start : start + self.k] for word in text.split() for start in range(len(word) - self.k + 1)
        ]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ids[str(self.unk_token)])

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index] if 0 <= index < len(self._tokens) else str(self.unk_token)

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join tokens with blanks.

        Args:
            tokens: Tokens as ``tokenize`` gives them.

        Returns:
            Text that gives the same tokens.
        """
        return " ".join(tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the vocabulary.

        Args:
            save_directory: Folder to write to.
            filename_prefix: Put before the file's name.

        Returns:
            The path of the file.
        """
        name = _VOCABULARY if filename_prefix is None else f"{filename_prefix}-{_VOCABULARY}"
        path = Path(save_directory) / name
        path.write_text("".join(f"{token}\n" for token in self._tokens), encoding="utf-8")
        return (str(path),)


def read_vocabulary(path: Path) -> list[str]:
    """Read a file of tokens, one per line; what stands after a blank on a line is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.split()[0] for line in lines if line.strip()]


def overlapping_kmers(folder: Path, values: Mapping[str, Any]) -> KmerTokenizer:
    """Build the tokenizer of DNABERT; what its file says about case is wrong, and not taken."""
    longest = values.get("model_max_length", values.get("max_len"))
    extra = {} if longest is None else {"model_max_length": longest}
    return KmerTokenizer(str(folder / _VOCABULARY), **extra)
