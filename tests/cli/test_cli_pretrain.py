"""``genoembed pretrain``: options are keys, results go where they belong, Ctrl-C is survived."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import get_args

import click
import pytest

from genoembed.cli import main
from genoembed.config.choices import (
    ComputeDtype,
    Distributed,
    EmptyPolicy,
    GapPolicy,
    InvalidPolicy,
    Optim,
    Packing,
    Reporter,
)
from genoembed.config.pretrain import KEY_STAGE, TrainConfig

SHAPE = ["--like", "evo2_7b", "--hidden-size", 32, "--layers", 4, "--window", 32, "--dtype", "float32"]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = [f">r{i}\n{'ACGGT' * (5 + i)}{'ACGT'[i % 4]}\n" for i in range(20)]
    Path("c.fa").write_text("".join(records))
    return "c.fa"


def parameters():
    found = main.get_command(click.Context(main), "pretrain")
    assert found is not None
    return {parameter.name: parameter for parameter in found.params}


def test_pretrain_has_an_option_for_every_key_and_no_other(run_options):
    assert set(parameters()) - run_options == set(KEY_STAGE) - {"shape"}


def test_pretrain_choices_are_those_of_the_configuration():
    found = {
        name: tuple(p.type.choices) for name, p in parameters().items() if isinstance(p.type, click.Choice)
    }
    kinds = {
        "packing": Packing,
        "invalid": InvalidPolicy,
        "empty": EmptyPolicy,
        "gaps": GapPolicy,
        "dtype": ComputeDtype,
        "optim": Optim,
        "distributed": Distributed,
        "report_to": Reporter,
    }
    assert found == {name: get_args(kind) for name, kind in kinds.items()}


def test_pretrain_help_shows_the_defaults_of_the_configuration():
    shown = {
        name: p.help.rpartition("[default: ")[2].rstrip("]")
        for name, p in parameters().items()
        if isinstance(p, click.Option) and "[default: " in p.help
    }
    defaults = {key: found.default for key, found in TrainConfig.options().items()}
    plain = {name: text for name, text in shown.items() if defaults.get(name) is not None}
    assert len(plain) > 15
    # of these there may be several
    assert (plain.pop("report_to"), plain.pop("contrast_layers")) == ("auto", "final")
    for name, text in plain.items():
        assert text == {"True": "on"}.get(str(defaults[name]), str(defaults[name]).removesuffix(".0")), name


def test_pretrain_trains_and_names_the_model(cli, corpus):
    words = ["pretrain", corpus, "--heldout-fraction", 0.2, *SHAPE, "--max-steps", 2, "-o", "run"]
    result = cli(*words, "--logging-steps", 1)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "run/final\n"
    assert "step 1: loss" in result.stderr
    assert "bits per base" in result.stderr
    assert "shards" not in result.stderr
    again = cli(*words)
    assert again.exit_code == 1
    assert "there is a run already" in again.stderr
    other = cli(*words, "--resume", "--seed", 5)
    assert other.exit_code == 1
    assert "seed: 5, but 0 in run; set --seed to 0" in other.stderr


def test_pretrain_takes_a_file(cli, corpus):
    table = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "hcs_layer_idxs": [0],
        "attn_layer_idxs": [1],
        "num_attention_heads": 2,
    }
    values = {"corpus": [corpus], "heldout_fraction": 0.2, "max_steps": 9, "window": 32, "shape": table}
    Path("run.json").write_text(json.dumps(values))
    result = cli("pretrain", "--config", "run.json", "--max-steps", 1, "-o", "run", "-q")
    assert result.exit_code == 0, result.stderr
    stored = json.loads(Path("run/run.json").read_text())["compared"]
    assert (stored["recipe"]["max_steps"], stored["data"]["window"]) == (1, 32)


def test_pretrain_interrupted_saves_and_says_how_to_go_on(spawn, corpus):
    words = ["pretrain", corpus, "--heldout-fraction", 0.2, *SHAPE, "--max-steps", 100000, "-o", "run"]
    process = spawn(*words, "--logging-steps", 1, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen = [process.stderr.readline()]
    while seen[-1] and not seen[-1].startswith(b"step 2:"):
        seen.append(process.stderr.readline())
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, b"".join(seen) + stderr
    last = stderr.decode().splitlines()[-1]
    assert last.startswith("Interrupted: run/checkpoint-")
    assert "run the same again with resume to go on at step" in last
    assert last.endswith("(--resume)")
    assert b"Traceback" not in stderr
    (checkpoint,) = Path("run").glob("checkpoint-*")
    assert (checkpoint / "model.safetensors").is_file()
    assert not stdout
