"""Tokenizers of published models whose repositories bring code for them, built from the same vocabularies.

In: a model folder and what its ``tokenizer_config.json`` says. Out: a fast tokenizer, which knows the bases
of each token and, once saved, opens with plain `AutoTokenizer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_HYENA_SPECIAL = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")


def hyena_characters(folder: Path, values: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Build the character tokenizer of HyenaDNA and Caduceus: upper case, ``[SEP]`` at the end."""
    return characters(
        [*_HYENA_SPECIAL, *"ACGTN"],
        unk_token="[UNK]",
        after=("[SEP]",),
        special={
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "bos_token": "[BOS]",
            "mask_token": "[MASK]",
            "pad_token": "[PAD]",
            "eos_token": "[SEP]",
        },
        model_max_length=values.get("model_max_length"),
    )


def characters(
    vocabulary: Sequence[str],
    *,
    unk_token: str,
    special: Mapping[str, str],
    after: Sequence[str] = (),
    model_max_length: int | None = None,
) -> PreTrainedTokenizerFast:
    """Build a tokenizer of single letters in upper case.

    Args:
        vocabulary: Tokens in the order of their ids; those of more than one letter are special.
        unk_token: Token of letters that have none.
        special: Roles of special tokens, as `PreTrainedTokenizerFast` takes them.
        after: Special tokens behind each sequence.
        model_max_length: Longest input in tokens, if there is one.
    """
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=unk_token))
    # the library has no upper-casing; other letters are unknown in either case
    letters = [token for token in vocabulary if len(token) == 1 and token.lower() != token]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(a.lower(), a) for a in letters])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if after:
        words = [(token, ids[token]) for token in after]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(["$A", *after]), pair=" ".join(["$A", *after, "$B", *after]), special_tokens=words
        )
    extra = {} if model_max_length is None else {"model_max_length": model_max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk_token, padding_side="right", **special, **extra
    )
