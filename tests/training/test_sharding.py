"""Models spread over processes (FSDP): two processes train as one does, and save what one saves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import genoembed
from genoembed.errors import ConfigError
from tests.finetuning.cases import build_model, write_classes
from tests.training.spread_runs import STEPS, run_both

SCRIPT = Path(__file__).with_name("spread_runs.py")
ROOT = SCRIPT.parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, a corpus whose documents fill rows of 16 tokens with their end, and labeled rows."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for name, count in (("corpus", 16), ("heldout", 4)):
        records = ["".join(rng.choice(list("ACGT"), 15)) for _ in range(count)]
        (folder / f"{name}.fa").write_text("".join(f">r{i}\n{record}\n" for i, record in enumerate(records)))
    build_model(folder / "model")
    for name, count, seed in (("classes", 16, 0), ("held", 8, 1), ("test", 6, 2)):
        write_classes(folder / f"{name}.tsv", count, seed=seed)
    return folder


@pytest.fixture(scope="module")
def spread(files, tmp_path_factory):
    """What two processes wrote, started as users of accelerate start them."""
    output = tmp_path_factory.mktemp("spread")
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    launch += [
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    ran = subprocess.run(
        [*launch, "--main_process_port", "0", str(SCRIPT), str(files), str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    return output


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    """What one process writes that trains on the rows of both."""
    output = tmp_path_factory.mktemp("alone")
    run_both(files, output, distributed="ddp", processes=1)
    return output


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_two_processes_that_share_a_model_train_as_one_does(spread, alone, kind):
    found, expected = lines(spread / kind), lines(alone / kind)
    assert [sorted(line) for line in found] == [sorted(line) for line in expected]
    same = [name for line in expected for name in line if name.endswith(("loss", "norm", "mcc", "base"))]
    assert len(same) > STEPS
    for line, other in zip(found, expected, strict=True):
        for name in set(same) & set(other):
            assert line[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), (line["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_two_processes_that_share_a_model_save_the_weights_of_one(spread, alone, kind):
    folders = spread / kind / "final", alone / kind / "final"
    assert sorted(path.name for path in folders[0].iterdir()) == sorted(p.name for p in folders[1].iterdir())
    for path in folders[0].glob("*.safetensors"):
        found, expected = load_file(path), load_file(folders[1] / path.name)
        assert set(found) == set(expected)
        for name, value in expected.items():
            # a step of Adam is a rate whatever the gradient: rounding moves weights by a part of it
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert configs[0] == configs[1]


@pytest.mark.slow
def test_run_of_a_shared_model_goes_on_as_if_never_stopped(spread):
    assert (spread / "resumed" / f"checkpoint-{STEPS}").is_dir()
    names = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    whole, resumed = (
        [{name: line[name] for name in names if name in line} for line in lines(spread / kind)]
        for kind in ("pretrain", "resumed")
    )
    assert len([line for line in whole if "loss" in line]) == STEPS
    assert whole == resumed
    weights = [load_file(spread / name / "final" / "model.safetensors") for name in ("pretrain", "resumed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_checkpoint_of_a_shared_model_is_that_of_one_process(spread, alone):
    states = [
        torch.load(folder / "pretrain" / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
        for folder in (spread, alone)
    ]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    shapes = [
        {
            number: {name: value.shape for name, value in state.items()}
            for number, state in found["state"].items()
        }
        for found in states
    ]
    assert shapes[0] == shapes[1] != {}


def test_one_process_cannot_share_a_model(files, tmp_path):
    with pytest.raises(ConfigError, match="spreads the model over several processes, but there is one"):
        genoembed.pretrain(
            files / "corpus.fa",
            tmp_path / "run",
            like="evo2_7b",
            heldout=files / "heldout.fa",
            max_steps=1,
            distributed="fsdp",
        )
    assert not (tmp_path / "run").exists()


def test_fsdp_of_accelerate_is_refused_with_what_to_do(files, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(
        ConfigError, match="set distributed='fsdp', and leave --use_fsdp of accelerate launch out"
    ):
        genoembed.finetune(files / "classes.tsv", tmp_path / "run", task="classification")


@pytest.mark.parametrize(("key", "value"), [("optim", "adafactor"), ("dtype", "float16")])
def test_what_needs_whole_matrices_or_one_scale_is_refused(files, tmp_path, key, value):
    with pytest.raises(ConfigError, match=f"{key} '{value}'"):
        genoembed.finetune(
            files / "classes.tsv", tmp_path / "run", task="classification", distributed="fsdp", **{key: value}
        )
