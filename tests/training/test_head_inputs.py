"""What a new head is shown before training: states of any scale become standard units, and are saved."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from genoembed import finetune, load_model
from genoembed.config.finetune import EncoderConfig
from genoembed.training.encoder import Encoder
from tests.finetuning.cases import FAST, build_model, rich, sequences, write_classes, write_table

SCALE = 500.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose residual stream has the scale of a middle block of a large one."""
    folder = tmp_path_factory.mktemp("model")
    build_model(folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "embed" in name)
    weights[name] *= SCALE / float(weights[name].std())
    save_file(weights, path, metadata={"format": "pt"})
    return str(folder)


def losses_of(report):
    lines = Path(report.metrics).read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def hidden_of(model, layer, found):
    encoder = Encoder(load_model(model, dtype="float32"), EncoderConfig(layers=(layer,), tuning="frozen"))
    rows = []
    for sequence in found:
        ids = torch.tensor([list(sequence.encode())])
        rows.append(encoder.eval().hidden(ids, torch.ones_like(ids))[0])
    return rows


def test_first_loss_is_that_of_guessing_whatever_the_scale_of_the_states(model, tmp_path):
    table = write_classes(tmp_path / "train.tsv")
    report = finetune(
        table, tmp_path / "run", task="classification", model=model, layers="blocks.1", split="random",
        test_fraction=0.0, dropout=0.0, **FAST,
    )  # fmt: skip
    assert losses_of(report)[0] == pytest.approx(math.log(2), abs=0.15)


def test_saved_head_knows_mean_and_deviation_of_the_vectors_it_learned_from(model, tmp_path):
    rows = [{"sequence": s, "label": rich(s), "side": "train"} for s in sequences(40)]
    rows += [{"sequence": s, "label": rich(s), "side": "test"} for s in sequences(8, seed=5)]
    report = finetune(
        write_table(tmp_path / "rows.tsv", rows), tmp_path / "run", task="classification", model=model,
        layers="blocks.1", split="column", split_column="side", tuning="frozen", **FAST,
    )  # fmt: skip
    pooled = torch.stack([h.mean(0) for h in hidden_of(model, "blocks.1", sequences(40))])
    heads = load_file(tmp_path / "run" / "final" / "model.safetensors")
    torch.testing.assert_close(heads["head.input_mean"], pooled.mean(0), rtol=1e-4, atol=1e-2)
    deviation = pooled.std(0, unbiased=False)
    torch.testing.assert_close(heads["head.input_deviation"], deviation, rtol=1e-3, atol=1e-2)
    assert float(pooled.abs().mean()) > 50
    assert report.test["accuracy"] >= 0


def test_head_of_bases_is_fitted_to_states_of_bases(model, tmp_path):
    found = sequences(20)
    rows = [{"sequence": s, "label": s.replace("A", "C").replace("T", "G")} for s in found]
    finetune(
        write_table(tmp_path / "rows.tsv", rows), tmp_path / "run", task="token", model=model,
        layers="blocks.0", split="random", validation_fraction=0.0, test_fraction=0.0, tuning="frozen",
        **FAST,
    )  # fmt: skip
    states = torch.cat(hidden_of(model, "blocks.0", found))
    heads = load_file(tmp_path / "run" / "final" / "model.safetensors")
    torch.testing.assert_close(heads["head.input_mean"], states.mean(0), rtol=1e-3, atol=0.05)
