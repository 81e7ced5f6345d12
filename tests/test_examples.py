"""Every example is run, as a user would run it: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genoembed import load_model, read_sequences
from genoembed.doctor import KNOWN_ANSWER, embed_sequences, run_doctor

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
RUN_HERE = ("pretrain_mini.py", "nearest_genes.py")
TINY = ("--window", "64", "--hidden-size", "32", "--layers", "4", "--heldout-rows", "4", "--threads", "1")


def run_example(*words: object) -> str:
    ran = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")
    data = EXAMPLES / "data"
    run_example(
        EXAMPLES / "pretrain_mini.py", "train", data / "virus.fa", data / "bacterial_genes.fa.gz", folder,
        "--steps", 2, "--eval-steps", 1, *TINY,
    )  # fmt: skip
    return folder


def test_every_example_is_run():
    scripts = {path.name for path in EXAMPLES.rglob("*.py")}
    assert scripts == set(RUN_HERE)


def test_pretrain_mini_trains(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    measured = [line["eval_loss_bits"] for line in lines if "eval_loss_bits" in line]
    assert len(measured) == 2
    assert measured[1] < measured[0] < 12
    assert (trained / "checkpoint-2").is_dir()


def test_pretrain_mini_packages_a_model_whose_known_answer_holds(trained, tmp_path):
    target = tmp_path / "packaged"
    shown = run_example(
        EXAMPLES / "pretrain_mini.py", "package", trained / "final", target, "--layer", "blocks.2.mlp.l3"
    )
    assert shown.startswith(f"{target}: ")
    assert {path.name for path in target.iterdir()} >= {"config.json", "model.safetensors", KNOWN_ANSWER}
    answer = json.loads((target / KNOWN_ANSWER).read_text())
    model = load_model(str(target), device="cpu", dtype="float32")
    assert len(model.tokenizer) == 512
    vector = embed_sequences(model, [answer["sequence"].encode()], answer["layer"])[0]
    torch.testing.assert_close(vector, torch.tensor(answer["vector"]), rtol=1e-4, atol=1e-6)
    assert [check.name for check in run_doctor(model=str(target)) if not check.passed] == []


def test_nearest_genes_names_a_neighbour_of_every_gene():
    header, *rows = run_example(EXAMPLES / "nearest_genes.py").splitlines()
    assert header == "32 genes, 128 features from blocks.28.mlp.l3"
    names = {record.id for record in read_sequences(EXAMPLES / "data" / "bacterial_genes.fa.gz")}
    pairs = [row.split() for row in rows]
    assert {name for name, _, _ in pairs} == names
    assert all(neighbour in names - {name} for name, neighbour, _ in pairs)
    assert all(-1 < float(cosine) <= 1 for _, _, cosine in pairs)
