"""Tokenizers of published models whose repositories bring code for them, and those of fine-tuned folders.

In: a model folder and what its ``tokenizer_config.json`` says. Out: a fast tokenizer, which knows the bases
of each token and, once saved, opens with plain `AutoTokenizer`.
A fine-tuned folder's tokenizer reads sequences by itself as training read them.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from genoembed.tokenization.char import CharTokenizer
from genoembed.tokenization.kmer import KmerTokenizer, read_vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

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


_CODES = "ACGTUNRYSWKMBDHV"
_PLAIN = ("ACGTACGTTGCANNACGRTTAG", "GATTACANTTGACCATGCATGCATTTGCAGN", "T", "NNN", "ACGTAC", "CCGATATWSKN")


def opened(
    tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool, keep_case: bool
) -> PreTrainedTokenizerBase:
    """Copy a tokenizer so that a plain call of it reads sequences as genoembed has read them in training.

    It pads on the right, adds no special tokens where the model was trained without, and reads lower case as
    upper case unless that is another letter.

    Args:
        tokenizer: Of the trained model; it is not changed.
        add_special_tokens: Whether sequences had those that it adds.
        keep_case: Whether lower case was kept.

    Returns:
        A tokenizer to save beside the model.
    """
    made = copy.deepcopy(tokenizer)
    made.padding_side = "right"  # exact for causal models
    if isinstance(made, CharTokenizer | KmerTokenizer):
        if not keep_case:
            made.upper_case = made.init_kwargs["upper_case"] = True
        return made
    if not keep_case and not made.is_fast:
        made = _fast_words(made) or made
    if not made.is_fast:
        return made
    core = made.backend_tokenizer
    if not keep_case:
        steps = [normalizers.Replace(code.lower(), code) for code in _CODES]
        core.normalizer = normalizers.Sequence([*steps, *filter(None, [core.normalizer])])
    if not add_special_tokens:
        core.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return made


def _fast_words(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast | None:
    """Build a fast tokenizer of words of letters, the longest first, if it reads as a slow one does."""
    vocabulary = tokenizer.get_vocab()
    special = [token for token in vocabulary if token[0] + token[-1] in ("<>", "[]")]
    words = [token for token in vocabulary if token not in special]
    lengths = sorted({len(word) for word in words}, reverse=True)
    around = tokenizer("A")["input_ids"]
    if tokenizer.unk_token is None or vocabulary.get("A") not in around or not all(map(str.isalpha, words)):
        return None
    letters = {
        length: "".join(sorted(set("".join(w for w in words if len(w) == length)))) for length in lengths
    }
    pattern = "|".join(f"[{letters[length]}]{{{length}}}" for length in lengths)
    core = Tokenizer(WordLevel(vocabulary, unk_token=tokenizer.unk_token))
    core.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    names = ["$A" if index == vocabulary["A"] else tokenizer.convert_ids_to_tokens(index) for index in around]
    core.post_processor = processors.TemplateProcessing(
        single=" ".join(names),
        pair=" ".join([*names, *(name.replace("$A", "$B") for name in names)]),
        special_tokens=[(name, vocabulary[name]) for name in names if name != "$A"],
    )
    roles = {role: token for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        padding_side="right",
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        **roles,
    )
    is_same = all(made(text)["input_ids"] == tokenizer(text)["input_ids"] for text in _PLAIN)
    return made if is_same else None


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
