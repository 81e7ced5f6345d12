"""Weights that do not learn: in 16 bits where the run computes in them; adapters where a model is large."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import genoembed
from genoembed.config.finetune import EncoderConfig, finetune_config
from genoembed.finetuning.preparation import read_task_rows
from genoembed.finetuning.tasks import set_up_task
from genoembed.models.describe import count_up_to
from genoembed.training.start import load_causal
from genoembed.training.tuning import with_tuning
from tests.finetuning.cases import FAST, build_model, sequences, write_classes, write_examples, write_fasta


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("task", ["classification", "token", "retrieval", "lm"])
def test_frozen_weights_have_the_type_of_the_run_and_what_learns_is_float32(task, dtype, model, tmp_path):
    """So a LoRA of 7 billion parameters holds 14 GB of them, not 28."""
    if task == "retrieval":
        rows = write_examples(tmp_path / "rows.jsonl", 12)
    elif task == "lm":
        rows = write_fasta(tmp_path / "rows.fa", sequences(12))
    else:
        rows = write_classes(tmp_path / "rows.tsv", 12)
    if task == "token":
        text = Path(rows).read_text().splitlines()
        pairs = [line.split("\t")[0] for line in text[1:]]
        Path(rows).write_text(
            "sequence\tlabel\n"
            + "".join(f"{s}\t{'ab' * (len(s) // 2) + 'a' * (len(s) % 2)}\n" for s in pairs)
        )
    options = {"task": task, "train": rows, "model": model, "tuning": "lora", "dtype": dtype}
    if task == "retrieval":
        options["train_group_size"] = 3
    config = finetune_config(options)
    setup = set_up_task(config, read_task_rows(config))
    kept = {p.dtype for p in setup.model.parameters() if not p.requires_grad}
    learned = {n: p.dtype for n, p in setup.model.named_parameters() if p.requires_grad}
    assert getattr(torch, dtype) in kept
    assert {torch.float32} == set(learned.values())
    assert any("lora_" in name for name in learned)
    large = [p for p in setup.model.parameters() if not p.requires_grad and p.dim() == 2]
    assert {p.dtype for p in large if p.numel() > 256} == {getattr(torch, dtype)}


def test_full_tuning_keeps_float32_weights(model, tmp_path):
    rows = write_classes(tmp_path / "rows.tsv", 12)
    config = finetune_config({"task": "classification", "train": rows, "model": model, "dtype": "bfloat16"})
    setup = set_up_task(config, read_task_rows(config))
    assert {p.dtype for p in setup.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_on_sixteen_bit_weights_saves_what_it_learned(dtype, model, tmp_path, caplog):
    """Adapters are merged in float32: predictions of the folder are those of the end of training."""
    rows = write_classes(tmp_path / "rows.tsv")
    options = {**FAST, "dtype": dtype, "tuning": "lora", "learning_rate": 3e-3, "max_steps": 3}
    with caplog.at_level(logging.INFO):
        report = genoembed.finetune(rows, tmp_path / "run", task="classification", model=model, **options)
    assert f"({dtype}, float32)" in caplog.text
    saved = load_file(Path(report.output) / "model.safetensors")
    base = load_file(Path(model) / "model.safetensors")
    changed = next(name for name in saved if name.endswith("l3.weight"))
    assert saved[changed].dtype == torch.float32
    stored = next(value for name, value in base.items() if name.endswith(changed))
    assert not torch.equal(saved[changed], stored)
    assert not torch.equal(saved[changed], saved[changed].to(getattr(torch, dtype)).float())


def test_a_billion_parameters_are_tuned_by_adapters_unless_told(caplog):
    with caplog.at_level(logging.INFO):
        assert with_tuning(EncoderConfig(model="evo2_7b")).tuning == "lora"
    assert (
        "tuning lora: evo2_7b has 6.6 billion parameters, and training all of them takes about 105 GB"
        in caplog.text
    )
    assert "set tuning to full for that" in caplog.text
    assert with_tuning(EncoderConfig(model="evo2_7b", tuning="full")).tuning == "full"
    assert with_tuning(EncoderConfig(model="genoembed-mini")).tuning == "full"


def test_small_models_are_not_built_to_be_counted(model, monkeypatch):
    monkeypatch.setattr("genoembed.models.describe._build", None)
    assert count_up_to(model, 10**9) < 10**6


def test_a_causal_model_in_sixteen_bits_is_seen_as_one(model):
    for dtype in ("bfloat16", "float16"):
        assert load_causal(model, dtype=dtype).model.dtype == getattr(torch, dtype)
