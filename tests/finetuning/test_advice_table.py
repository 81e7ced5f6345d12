"""The table of what model systems advise, in ``docs/FINETUNING.md``: what it names exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

import genoembed.training
from genoembed.config.finetune import FinetuneOptions
from genoembed.config.pretrain import TrainConfig

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "FINETUNING.md"
SYSTEMS = ("Evo 2", "Savanna", "E5", "SimLM", "BGE-M3", "BCEmbedding", "FlagEmbedding")
TOPICS = (
    *(
        "pooling",
        "add_pooler",
        "learning_rate",
        "warmup_fraction",
        "warmup_steps",
        "max_grad_norm",
        "patience",
    ),
    *("packing", "pad_to_multiple_of", "ignore_label", "layers", "fusion", "schedule", "accumulation_steps"),
    *("weight_decay", "dropout", "duplicate_sequences", "reverse_complement", "margin", "train_group_size"),
)
"""What the systems' guidance is about, as options."""


def rows() -> list[list[str]]:
    section = PAGE.read_text(encoding="utf-8").partition("\n## What five model systems advise\n")[2]
    section = section.partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|") and "---" not in line]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if "they say" not in line
    ]


@cache
def options() -> dict[str, object]:
    """Every option of training with its type; of a name in both, that of fine-tuning."""
    sections = [*TrainConfig.sections().values(), *FinetuneOptions.sections().values()]
    return {key: section.model_fields[key].annotation for section in sections for key in section.options()}


@cache
def names_in(path: str) -> set[str]:
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_table_has_four_cells_a_row_and_every_system_and_topic():
    assert len(rows()) > 50
    assert {len(row) for row in rows()} == {4}
    said = " ".join(row[0] for row in rows())
    assert [system for system in SYSTEMS if system not in said] == []
    named = {word for row in rows() for word in re.findall(r"`(\w+)", row[1])}
    assert [topic for topic in TOPICS if topic not in named] == []


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:50])
def test_row_names_options_and_a_test_that_exist(row):
    words = re.findall(r"`([^`]+)`", row[1])
    assert words
    for word in words:
        key, _, value = word.partition("=")
        assert key in options() or key in genoembed.training.__all__, key
        if value:
            choices = [get_args(part) or part for part in (options()[key], *get_args(options()[key]))]
            assert any(value.strip('"') in part for part in choices if isinstance(part, tuple)), word
    (place,) = re.findall(r"`([^`]+)`", row[2])
    path, _, name = place.partition("::")
    assert name in names_in(path), place


def test_defaults_that_the_table_says_are_the_defaults():
    said = {
        **{
            "layers": ("final",),
            "pooling": "mean",
            "add_pooler": None,
            "schedule": "cosine",
            "scope": "auto",
        },
        **{"weight_decay": 0.01, "max_grad_norm": 1.0, "dropout": 0.1, "pad_to_multiple_of": 1},
        **{"train_group_size": 8, "across_devices": False, "reverse_complement": 0.0, "max_crop_bp": None},
        **{"self_distillation_start": None, "lora_rank": 8, "lora_alpha": 16.0, "keep_case": False},
    }
    fields = {key: section.model_fields[key] for section in FinetuneOptions.sections().values()
              for key in section.options()}  # fmt: skip
    assert {key: fields[key].default for key in said} == said
