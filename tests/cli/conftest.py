"""A seeded four-block StripedHyena 2, a few sequences, and ways to run the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner

from genoembed import CharTokenizer, StripedHyena2Config, StripedHyena2ForCausalLM
from genoembed.cli import main

if TYPE_CHECKING:
    from pathlib import Path

SEQUENCES = ">a first record\nACGTACGTNN\n>b\nACGTTTGACCA\n>c\nGGGTTTACACACAT\n"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model: four blocks, width 32, context 256."""
    folder = tmp_path_factory.mktemp("cli_model") / "tiny"
    config = StripedHyena2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        hcs_layer_idxs=[0],
        hcm_layer_idxs=[1],
        hcl_layer_idxs=[2],
        attn_layer_idxs=[3],
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        StripedHyena2ForCausalLM(config).save_pretrained(folder)
    CharTokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def fasta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three clean records in the current folder, which is a fresh one."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "seqs.fa"
    path.write_text(SEQUENCES)
    return path


@pytest.fixture
def cli():
    """Run a command in this process; exceptions that are not exits come through."""

    def run(*words: object, stdin: str | bytes | None = None):
        return CliRunner().invoke(
            main, [str(word) for word in words], input=stdin, prog_name="genoembed", catch_exceptions=False
        )

    return run


@pytest.fixture
def spawn():
    """Start a real process of the command line."""
    started = []

    def start(*words: object, **options):
        def receive_interrupts() -> None:  # a shell may have started the tests with SIGINT ignored
            signal.signal(signal.SIGINT, signal.default_int_handler)

        process = subprocess.Popen(
            [sys.executable, "-m", "genoembed", *map(str, words)],
            preexec_fn=receive_interrupts,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None and not stream.closed:
                stream.close()


@pytest.fixture
def run_options() -> set[str]:
    """Options of a training command that belong to the run, not to its configuration."""
    messages = {"help_all", "quiet", "verbose", "as_json"}
    return {"output_dir", "config_file", "resume", "overwrite", "threads", "imported", *messages}
