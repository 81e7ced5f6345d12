"""A causal model that training goes on from, with its tokenizer.

In: a name or folder. Out: the model, and how DNA becomes its token ids. Promised: no weight is
left random, and what is not causal is refused.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from genoembed._version import __version__
from genoembed.errors import CheckpointError, GenoembedError, ModelError, first_line, foreign_code
from genoembed.models.adapters import merge_adapter
from genoembed.models.architecture import (
    NONSENSE,
    needs_trust,
    read_config,
    trusted_code,
    unbuildable,
)
from genoembed.models.load import check_scales
from genoembed.models.locate import find_source, say_inner_folder
from genoembed.models.pretrained import load_tokenizer, without_progress_bars
from genoembed.models.registry import entry_named
from genoembed.models.trained_folder import (
    FACTS_FILE,
    FACTS_FORMAT,
    HEADS_FILE,
    NEXT_TOKEN_HEAD,
    read_heads,
)
from genoembed.tokenization.char import CharTokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from genoembed.batching.pack import Document
    from genoembed.config.choices import ComputeDtype
    from genoembed.models.trained_folder import FinetunedFacts

logger = logging.getLogger(__name__)

_NAMES_SHOWN = 3


class TokenRules(NamedTuple):
    """How DNA becomes token ids."""

    encode: Callable[[bytes], Document]
    """Token ids of a document, without special tokens."""
    eod_token_id: int
    pad_token_id: int

    def encode_document(self, sequence: bytes) -> NDArray[np.int64]:
        """Encode a document with the token that ends it."""
        return np.array([*self.encode(sequence), self.eod_token_id], dtype=np.int64)


class Start(NamedTuple):
    """What training starts from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rules: TokenRules
    is_new: bool


def load_causal(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: ComputeDtype = "float32",
) -> Start:
    """Load a causal model, in training mode, and check that it is one."""
    with without_progress_bars(), foreign_code(f"model {name!r}"):
        model, tokenizer = _load(name, revision=revision, trust_remote_code=trust_remote_code, dtype=dtype)
        check_causal(model, name=name)
    return Start(model.train(), tokenizer, token_rules(tokenizer, name=name), is_new=False)


def carry_vectors(facts: FinetunedFacts, folder: Path) -> None:
    """Note in the folder of a language model how vectors are made of it, as before it learned on.

    The heads go with them. So the folder embeds with the layers and pooling that it was tuned with, and has a
    next-token head besides.
    """
    heads = {}
    if (facts.folder / HEADS_FILE).is_file():
        heads = read_heads(facts.folder)
    if facts.pooler is not None:
        found = read_heads(facts.folder, facts.pooler)
        heads |= {f"{facts.pooler}.{name}": value for name, value in found.items()}
    if heads:
        save_file(heads, folder / HEADS_FILE, metadata={"format": "pt"})
    values = {
        "format": FACTS_FORMAT,
        **{key: getattr(facts, key) for key in ("layers", "pooling", "skip_first", "fusion")},
        **{key: getattr(facts, key) for key in ("fusion_weights", "normalize", "pooler")},
        "retrieval": facts.values.get("retrieval"),
        "genoembed": __version__,
        "task": "lm",
        NEXT_TOKEN_HEAD: True,
    }
    (folder / FACTS_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    logger.info("layers, pooling and fusion of its vectors stay those of %s", facts.folder)


def _load(
    name: str, *, revision: str | None, trust_remote_code: bool, dtype: ComputeDtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = find_source(name, revision=revision)
    say_inner_folder(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.revision is not None:
        options["revision"] = source.revision
    model_config, family = read_config(source, options)
    try:
        with trusted_code(source, model_config, is_trusted=trust_remote_code):
            model, info = AutoModelForCausalLM.from_pretrained(
                source.location,
                config=model_config,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **options,
            )
    except GenoembedError:
        raise
    except (OSError, *NONSENSE) as error:
        if "trust_remote_code" in str(error):
            raise needs_trust(source) from error
        if isinstance(error, OSError):
            message = f"no weights were found ({first_line(error)}); the folder needs safetensors files"
            raise CheckpointError(message, path=source.location) from error
        raise unbuildable(source, error) from error
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        message = (
            f"{len(wrong)} weights of a causal model are missing or of another shape "
            f"({', '.join(wrong[:_NAMES_SHOWN])}); go on from a causal model with its head"
        )
        raise CheckpointError(message, path=source.location)
    if source.is_local:
        entry = source.entry or entry_named(getattr(model_config, "checkpoint_name", None))
        check_scales(model, entry, Path(source.location))
    if source.adapter is not None:
        merge_adapter(source.adapter, model)
    return model, load_tokenizer(source, model_config, options, family=family)


def token_rules(tokenizer: PreTrainedTokenizerBase, *, name: str) -> TokenRules:
    """Return how a tokenizer turns a document into ids, without special tokens."""
    if isinstance(tokenizer, CharTokenizer):
        return TokenRules(tokenizer.encode_bytes, tokenizer.eod_token_id, int(tokenizer.pad_token_id))
    end = next((i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None), None)
    if end is None:
        message = f"model {name!r}: its tokenizer has no eos_token; set one that ends a document, and save it"
        raise ModelError(message)

    def encode(document: bytes) -> list[int]:
        text = document.decode("ascii")
        return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]

    return TokenRules(
        encode, int(end), int(end if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    )


@torch.no_grad()
def check_causal(model: PreTrainedModel, *, name: str) -> None:
    """Raise if a token sees the tokens after it."""
    was_training = model.training
    model.eval()
    ids = torch.arange(8)[None] % model.config.vocab_size
    other = ids.clone()
    other[0, -1] = 0
    device = model.get_input_embeddings().weight.device
    before, after = (model(input_ids=row.to(device)).logits[0, :-1] for row in (ids, other))
    model.train(was_training)
    if not bool(before.isfinite().all()):
        # NaN equals nothing, so it would look as if the model were not causal
        message = f"model {name!r}: its outputs are not finite; its weights are damaged, fetch them again"
        raise ModelError(message)
    # in 16 bits, sums over more or fewer tokens round differently
    rtol, atol = (1e-4, 1e-5) if before.dtype == torch.float32 else (5e-2, 5e-2)
    if not torch.allclose(before, after, rtol=rtol, atol=atol):
        message = f"model {name!r}: tokens see what follows them, expected a causal model; go on from another"
        raise ModelError(message)
