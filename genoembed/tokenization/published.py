"""Tokenizers of published models whose repositories bring code for them, built from the same vocabularies.

In: a model folder and what its ``tokenizer_config.json`` says. Out: a fast tokenizer, which knows the bases
of each token and, once saved, opens with plain `AutoTokenizer`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from genoembed.tokenization.char import CharTokenizer
from genoembed.tokenization.kmer import read_vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_NTV3_ROLES = ("unk_token", "pad_token", "mask_token", "cls_token", "eos_token", "bos_token")
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


def evo1_bytes(folder: Path, values: Mapping[str, Any]) -> CharTokenizer:
    """Build the tokenizer of Evo 1: a byte is a token, as in Evo 2; saved ones keep their settings."""
    if values.get("tokenizer_class") == CharTokenizer.__name__:
        return CharTokenizer.from_pretrained(folder)
    return CharTokenizer()


def ntv3_characters(folder: Path, values: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Build the character tokenizer of NTv3 from its ``vocab.json``: upper case, no special tokens added."""
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    roles = {role: f"<{role.partition('_')[0]}>" for role in _NTV3_ROLES}
    roles |= {role: values[role] for role in roles if isinstance(values.get(role), str)}
    return characters(
        sorted(ids, key=ids.__getitem__),
        unk_token=roles.pop("unk_token"),
        special={role: token for role, token in roles.items() if token in ids},
        model_max_length=values.get("model_max_length"),
    )


def generator_kmers(folder: Path, values: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Build the tokenizer of GENERator: non-overlapping 6-mers, and one token for what remains at the end.

    Letters are read in runs of upper case, k at a time from the left; a word that is not in the vocabulary
    (the remainder, one with an N) and each other character are ``unk_token``.
    """
    vocabulary = read_vocabulary(folder / "vocab.txt")
    ids = {token: index for index, token in enumerate(vocabulary)}
    special = [token for token in vocabulary if not token.isalpha()]
    k = max(len(token) for token in vocabulary if token.isalpha())
    roles = {"unk_token": "<oov>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    roles |= {"mask_token": "<mask>"}
    roles |= {role: values[role] for role in roles if isinstance(values.get(role), str)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=roles["unk_token"]))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"[A-Z]{{{k}}}|[A-Z]+|[^A-Z]"), "isolated")
    before = [roles["bos_token"]] if values.get("add_bos_token", True) else []
    after = [roles["eos_token"]] if values.get("add_eos_token", False) else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*before, "$A", *after]),
            pair=" ".join([*before, "$A", *after, *before, "$B", *after]),
            special_tokens=[(token, ids[token]) for token in (*before, *after)],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **roles)


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
