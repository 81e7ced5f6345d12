"""A tiny seeded StripedHyena 2 and small files to fine-tune it on, for the tests of fine-tuning."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import torch

from genoembed import CharTokenizer, StripedHyena2Config, StripedHyena2ForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

WIDTH = 16
CONTEXT = 64
FAST = {"max_epochs": 2, "rows_per_device": 8, "logging_steps": 1, "dtype": "float32"}
"""Recipe of a run that takes a second."""


def build_model(folder: Path) -> str:
    """Write a model of three blocks, width 16, context 64."""
    config = StripedHyena2Config(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        hcs_layer_idxs=[0],
        hcm_layer_idxs=[],
        hcl_layer_idxs=[1],
        attn_layer_idxs=[2],
        max_position_embeddings=CONTEXT,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        StripedHyena2ForCausalLM(config).save_pretrained(folder)
    CharTokenizer().save_pretrained(folder)
    return str(folder)


def sequences(count: int, *, seed: int = 0, shortest: int = 12, longest: int = 30) -> list[str]:
    """Draw random DNA of different lengths."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACGT"), int(rng.integers(shortest, longest + 1)))) for _ in range(count)]


def rich(sequence: str) -> str:
    """Return a class that composition gives away."""
    return "gc" if sum(base in "GC" for base in sequence) * 2 > len(sequence) else "at"


def write_table(path: Path, rows: list[dict[str, object]]) -> str:
    """Write rows as TSV."""
    columns = list(rows[0])
    lines = ["\t".join(columns), *("\t".join(str(row[c]) for c in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def write_classes(path: Path, count: int = 48, *, seed: int = 0) -> str:
    """Write sequences labeled by their composition."""
    return write_table(path, [{"sequence": s, "label": rich(s)} for s in sequences(count, seed=seed)])


def write_fasta(path: Path, found: list[str]) -> str:
    """Write records ``s0``, ``s1`` ..."""
    path.write_text("".join(f">s{i}\n{s}\n" for i, s in enumerate(found)))
    return str(path)


def write_examples(
    path: Path, count: int = 24, *, negatives: int = 2, teacher: bool = False, group: bool = False
) -> str:
    """Write queries with a mutated copy as positive, and strangers as negatives."""
    rng = np.random.default_rng(1)
    found = sequences(count * (1 + negatives), seed=3, shortest=20, longest=30)
    lines = []
    for index in range(count):
        query = found[index]
        place = int(rng.integers(len(query)))
        positive = query[:place] + "ACGT"["CGTA".index(query[place])] + query[place + 1 :]
        row: dict[str, object] = {
            "query": query,
            "pos": [positive],
            "neg": found[count + index * negatives :][:negatives],
        }
        if teacher:
            row["teacher_scores"] = [1.0, *[0.1 * n for n in range(negatives)]]
        if group:
            row["group"] = f"g{index // 2}"
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return str(path)
