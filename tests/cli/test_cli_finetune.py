"""``genoembed finetune`` and ``predict``: options are keys, results go where they belong."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import click
import pytest

from genoembed.cli import main
from genoembed.config.finetune import (
    FINETUNE_STAGE,
    EncoderConfig,
    FinetuneConfig,
    FinetuneDataConfig,
    FinetuneRecipe,
    ObjectiveConfig,
)
from genoembed.config.labeled import AugmentConfig

STAGES = (ObjectiveConfig, FinetuneDataConfig, EncoderConfig, AugmentConfig, FinetuneRecipe)
SEQUENCES = [f"{'ACGGT' * (2 + i % 3)}{'ACGT'[i % 4]}{'GATC' * (i % 5)}" for i in range(30)]


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f"{s}\t{'odd' if i % 2 else 'even'}" for i, s in enumerate(SEQUENCES)]
    Path("t.tsv").write_text("\n".join(["sequence\tlabel", *lines]) + "\n")
    return "t.tsv"


def parameters(name="finetune"):
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return {parameter.name: parameter for parameter in found.params}


def test_finetune_has_an_option_for_every_key_and_no_other(run_options):
    assert set(parameters()) - run_options == set(FINETUNE_STAGE)


def test_finetune_choices_are_those_of_the_configuration():
    hints = {name: hint for cls in STAGES for name, hint in get_type_hints(cls).items()}
    # several of them, or none, may be meant: the words are those of the Literal inside
    inner = {
        name: next((a for a in (hint, *get_args(hint)) if get_origin(a) is Literal), None)
        for name, hint in hints.items()
    }
    wanted = {name: get_args(literal) for name, literal in inner.items() if literal is not None}
    found = {
        name: tuple(p.type.choices) for name, p in parameters().items() if isinstance(p.type, click.Choice)
    }
    assert found == wanted
    assert len(found) > 15


def test_finetune_help_shows_the_defaults_of_the_configuration():
    defaults = {key: found.default for key, found in FinetuneConfig.options().items()}
    shown = {
        name: p.help.rpartition("[default: ")[2].rstrip("]")
        for name, p in parameters().items()
        if isinstance(p, click.Option) and "[default: " in (p.help or "") and defaults.get(name) is not None
    }
    assert len(shown) > 40
    for name, text in shown.items():
        default = defaults[name]
        default = ", ".join(default) or "all in the blocks" if isinstance(default, tuple) else default
        text = text.removesuffix(", or as MODEL was trained")
        assert text == {"True": "on"}.get(str(default), str(default).removesuffix(".0")), name


def test_finetune_trains_and_predict_uses_the_folder(cli, table, tiny):
    words = [
        "finetune",
        table,
        "--task",
        "classification",
        "--model",
        tiny,
        "--layer",
        1,
        "--dtype",
        "float32",
    ]
    words += ["--max-epochs", 1, "--rows-per-device", 8, "--logging-steps", 1, "-o", "run"]
    result = cli(*words)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "run/final\n"
    assert "step 1: loss" in result.stderr
    assert "validation: " in result.stderr
    assert "test: " in result.stderr
    again = cli(*words)
    assert (again.exit_code, again.stderr.count("\n")) == (1, 1)
    assert "there is a run already" in again.stderr
    Path("s.fa").write_text("".join(f">s{i}\n{s}\n" for i, s in enumerate(SEQUENCES[:4])))
    shown = cli("predict", "run/final", "s.fa", "-q")
    assert shown.exit_code == 0, shown.stderr
    lines = [line.split("\t") for line in shown.stdout.splitlines()]
    assert lines[0] == ["id", "label", "p_even", "p_odd"]
    assert [line[0] for line in lines[1:]] == ["s0", "s1", "s2", "s3"]
    assert {line[1] for line in lines[1:]} <= {"even", "odd"}
    piped = cli("predict", "run/final", "-", "-q", stdin=Path("s.fa").read_text())
    assert piped.stdout == shown.stdout
    written = cli("predict", "run/final", "s.fa", "-o", "p.tsv")
    assert (written.exit_code, written.stdout) == (0, "")
    assert "4 records, 4 rows" in written.stderr
    assert Path("p.tsv").read_text() == shown.stdout
    assert cli("predict", "run/final", "s.fa", "-o", "p.tsv").exit_code == 1


def test_finetune_takes_a_file_and_options_win(cli, table, tiny):
    values = {"train": [table], "task": "classification", "model": tiny, "max_epochs": 9, "dtype": "float32"}
    Path("run.json").write_text(json.dumps(values | {"layers": [1], "rows_per_device": 16}))
    result = cli("finetune", "--config", "run.json", "--max-epochs", 1, "-o", "run", "-q")
    assert result.exit_code == 0, result.stderr
    stored = json.loads(Path("run/finetune.json").read_text())
    assert (stored["max_epochs"], stored["rows_per_device"], stored["layers"]) == (1, 16, ["1"])
    Path("bad.toml").write_text('train = ["t.tsv"]\ntaks = "classification"\n')
    bad = cli("finetune", "--config", "bad.toml", "-o", "other", "-q")
    assert bad.exit_code == 1
    assert "'taks' is not an option; did you mean 'task'?" in bad.stderr


def test_finetune_interrupted_saves_and_says_how_to_go_on(spawn, table, tiny):
    words = ["finetune", table, "--task", "classification", "--model", tiny, "--dtype", "float32"]
    words += ["--max-epochs", 10000, "--patience", 10000, "--rows-per-device", 8, "--logging-steps", 1]
    process = spawn(*words, "-o", "run", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen = [process.stderr.readline()]
    while seen[-1] and not seen[-1].startswith(b"step 2:"):
        seen.append(process.stderr.readline())
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, b"".join(seen) + stderr
    last = stderr.decode().splitlines()[-1]
    assert last.startswith("Interrupted: run/checkpoint-")
    assert "run the same again with resume to go on at step" in last
    assert last.endswith("(--resume)")
    assert b"Traceback" not in stderr
    assert not stdout
