"""What scores must equal: tiny causal models with heads, and plain transformers calls, one row at a time."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from genoembed import load_model
from tests.by_hand import CAUSAL, build_family

if TYPE_CHECKING:
    from genoembed.models.genomic_model import GenomicModel

__all__ = ["CAUSAL", "folder_of", "loaded", "log_probs", "plain", "start_id"]

_ROOT = TemporaryDirectory(prefix="genoembed-causal-")


@cache
def folder_of(family: str) -> Path:
    """Write a tiny causal model with a head that means something."""
    folder = build_family(family, Path(_ROOT.name) / family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        head = whole.get_output_embeddings()
        if head is not None and not whole.config.tie_word_embeddings:
            torch.nn.init.normal_(head.weight, std=0.5)
        whole.save_pretrained(folder)
    return folder


@cache
def loaded(family: str) -> GenomicModel:
    """Load it through our door."""
    return load_model(str(folder_of(family)), device="cpu", dtype="float32")


@cache
def plain(family: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder_of(family), dtype=torch.float32).eval()


def start_id(family: str) -> int:
    """The token before the first base: EOD of byte tokenizers, EOS of the others."""
    return 0 if family == "striped_hyena2" else 2


def log_probs(family: str, sequence: str, *, start: bool = True) -> torch.Tensor:
    """Natural log-probability of each token, one row without padding; float64."""
    tokenizer = loaded(family).tokenizer
    ids = tokenizer(sequence, add_special_tokens=False)["input_ids"]
    row = torch.tensor([[start_id(family), *ids] if start else ids])
    with torch.inference_mode():
        logits = plain(family)(row).logits[0].float()
    table = torch.log_softmax(logits, dim=-1)
    return torch.stack([table[at - 1, row[0, at]] for at in range(1, row.shape[1])]).double()
