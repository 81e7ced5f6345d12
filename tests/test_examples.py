"""Every example is run in a process of its own: one in a fresh interpreter, the others as forks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from examples.package_mini import FLOAT32_TENSORS, KNOWN_SEQUENCE
from genoembed import load_model, read_sequences
from genoembed.config.pretrain import train_config
from genoembed.doctor.checks import embed_sequences
from genoembed.doctor.results import KNOWN_ANSWER
from genoembed.doctor.run import run_doctor
from genoembed.models import registry
from genoembed.models.provenance import weights_digest
from genoembed.models.registry import BUNDLED_FOLDER, find_model
from tests.by_hand import shorten_fasta
from tests.plotting.map_file import write_map_file

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
RUN_HERE = (
    "package_mini.py",
    "nearest_genes.py",
    "score_variants.py",
    "continue_sequences.py",
    "choose_a_layer.py",
    "sklearn_pipeline.py",
    "map_with_scanpy.py",
    "to_other_libraries.py",
)
RUN_BY_THE_GALLERY = (
    "coding_along_a_genome.py",
    "rrna_map.py",
    "promoters_by_layer.py",
    "every_change_of_a_gene.py",
)
"""In ``tests/test_gallery.py``."""


def copy_examples(folder: Path, **kept: int) -> Path:
    """Copy the examples, with the first bases of the first genes only."""
    copied = shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    shorten_fasta(copied / "data" / "bacterial_genes.fa.gz", **kept)
    return copied


@pytest.fixture(scope="module")
def trained(run_example, tmp_path_factory):
    """The recipe of the bundled model, cut to two steps of short rows."""
    folder = tmp_path_factory.mktemp("mini")
    data = EXAMPLES / "data"
    run_example(
        None, "pretrain", data / "virus.fa", "--heldout", data / "bacterial_genes.fa.gz",
        "--config", EXAMPLES / "mini.toml", "-o", folder, "--threads", 1,
        "--max-steps", 2, "--warmup-steps", 1, "--window", 64, "--heldout-rows", 4, "--eval-steps", 1,
    )  # fmt: skip
    return folder


def test_every_example_is_run():
    scripts = {path.name for path in EXAMPLES.rglob("*.py")}
    assert scripts == {*RUN_HERE, *RUN_BY_THE_GALLERY}


def test_mini_recipe_is_that_of_the_card():
    config = train_config({"corpus": ("a.fa",), "heldout": ("b.fa",)}, file=EXAMPLES / "mini.toml")
    data, recipe = config.data, config.recipe
    assert (data.window, data.packing, data.isolate, data.heldout_rows) == (1024, "stream", False, 96)
    assert (recipe.max_steps, recipe.rows_per_device, recipe.accumulation_steps) == (4900, 4, 1)
    assert (recipe.learning_rate, recipe.warmup_steps, recipe.weight_decay) == (2e-3, 200, 0.1)
    assert (recipe.max_grad_norm, recipe.seed) == (1, 0)


def test_recipe_of_the_vectors_is_that_of_the_card():
    start = {
        "corpus": ("a.fa",),
        "heldout": ("b.fa",),
        "model": "runs/codes/final",
        "teacher": "runs/mini/final",
    }
    config = train_config(start, file=EXAMPLES / "mini_vectors.toml")
    data, recipe, vectors = config.data, config.recipe, config.vectors
    assert (data.window, data.packing, data.isolate, data.heldout_rows) == (1024, "stream", False, 32)
    assert (recipe.max_steps, recipe.rows_per_device, recipe.learning_rate) == (2150, 3, 1.2e-3)
    assert (vectors.contrast, vectors.kmer_codes, vectors.contrast_layers) == (0, 0.15, ("28+24",))
    assert config.teacher.teacher_weight == 0.4


def test_mini_recipe_trains_a_model_of_the_bundled_shape(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    measured = [line["eval_loss_bits"] for line in lines if "eval_loss_bits" in line]
    assert len(measured) == 2
    assert measured[1] < measured[0] < 12
    made, bundled = (
        json.loads((folder / "config.json").read_text()) for folder in (trained / "final", BUNDLED_FOLDER)
    )
    fields = bundled.keys() - {"transformers_version"}
    assert len(fields) > 30
    assert {name: made[name] for name in fields} == {name: bundled[name] for name in fields}


def test_package_mini_packages_a_model_whose_known_answer_holds(run_example, trained, tmp_path):
    target = tmp_path / "packaged"
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"what was there")
    replaced = weights_digest(target)
    words = (trained / "final", target, "--context", 64, "--vectors", 28, "--vectors", 24)
    shown = run_example(EXAMPLES / "package_mini.py", *words)
    size = sum(path.stat().st_size for path in target.iterdir()) / 1e6
    assert shown == f"{target}: {size:.2f} MB\n"
    assert {path.name for path in target.iterdir()} >= {
        path.name for path in BUNDLED_FOLDER.iterdir() if path.suffix != ".md"
    }
    weights = load_file(target / "model.safetensors")
    kept = {name for name, tensor in weights.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in weights if name.endswith(FLOAT32_TENSORS)} != set()
    assert {weights[name].dtype for name in weights.keys() - kept} == {torch.float16}
    answer = json.loads((target / KNOWN_ANSWER).read_text())
    assert (answer["sequence"], answer["layer"]) == (KNOWN_SEQUENCE, "blocks.28.mlp.l3")
    model = load_model(str(target), device="cpu", dtype="float32")
    assert (len(model.tokenizer), model.max_length) == (512, 64)
    entry = registry._bundled(target)
    assert dict(entry.vectors) == {"layers": ("28", "24"), "pooling": "mean", "fusion": "concat"}
    assert (entry.context, entry.earlier_weights) == (64, (replaced,))
    vector = embed_sequences(model, [answer["sequence"].encode()], answer["layer"])[0]
    torch.testing.assert_close(vector, torch.tensor(answer["vector"]), rtol=1e-4, atol=1e-6)
    assert [check.name for check in run_doctor(model=str(target)) if not check.passed] == []


def test_nearest_genes_names_a_neighbor_of_every_gene(tmp_path):
    """In a fresh interpreter: nothing is imported but what the script imports."""
    copied = copy_examples(tmp_path, bases=60)
    words = [sys.executable, str(copied / "nearest_genes.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    header, *rows = ran.stdout.splitlines()
    width = find_model("genoembed-mini").config["hidden_size"]
    assert header == f"32 genes, {width} features from blocks.28.mlp.l3"
    names = {record.id for record in read_sequences(EXAMPLES / "data" / "bacterial_genes.fa.gz")}
    pairs = [row.split() for row in rows]
    assert {name for name, _, _ in pairs} == names
    assert all(neighbor in names - {name} for name, neighbor, _ in pairs)
    assert all(-1 < float(cosine) <= 1 for _, _, cosine in pairs)


def test_score_variants_scores_every_allele_of_the_file(run_example):
    header, *rows = run_example(EXAMPLES / "score_variants.py").splitlines()
    assert header == "6 alleles, vectors of blocks.28.mlp.l3"
    cells = [row.split() for row in rows]
    assert [cell[:3] for cell in cells] == [
        ["Y36", "27959", "T>C"],
        ["Y36", "27959", "T>A"],
        ["K49", "27996", "A>T"],
        ["K49T", "27997", "A>C"],
        ["L53del", "28007", "TTTA>T"],
        ["K178fs", "28388", "AA>A"],
    ]
    assert [cell[5] for cell in cells[4:]] == ["28007:TTTA>T", "28384:TA>T"]
    assert all(abs(float(cell[3])) > 0 and float(cell[4]) > 0 for cell in cells)


def test_continue_sequences_continues_each_prompt_twice(run_example):
    header, *rows = run_example(EXAMPLES / "continue_sequences.py").splitlines()
    assert header == "6 sequences for 3 prompts, 360 bases"
    cells = [row.split() for row in rows]
    assert [cell[0][-2:] for cell in cells] == ["_1", "_2"] * 3
    assert all(abs(float(cell[2]) - float(cell[4])) < 0.35 for cell in cells)
    assert 1 < sum(float(cell[5]) for cell in cells) / 6 < 2


def test_choose_a_layer_recommends_one_and_holds_it_against_baselines(run_example, tmp_path):
    copied = copy_examples(tmp_path, records=12, bases=270)
    header, recommendation, *baselines, verdict = run_example(copied / "choose_a_layer.py").splitlines()
    assert header == "36 pieces of 12 genes, 32 layers"
    assert re.match(r"use layer \d+ \(blocks\.\d+\.mlp\.l3\), mean pooling: MCC 0\.\d+ \+- ", recommendation)
    names = {"4-mer counts", "6-mer counts", "GC content and length", "one-hot letters", "the untrained copy"}
    assert {line[:24].strip() for line in baselines} == names
    assert verdict.startswith("the probe (MCC 0.")


def test_sklearn_pipeline_searches_over_layers_and_poolings(run_example):
    *rows, best = run_example(EXAMPLES / "sklearn_pipeline.py").splitlines()
    cells = [row.split() for row in rows]
    candidates = [("4", "mean"), ("4", "max"), ("28", "mean"), ("28", "max")]
    assert [(cell[1], cell[2]) for cell in cells] == candidates
    assert all(0.5 < float(cell[4]) <= 1 for cell in cells)
    assert max(float(cell[4]) for cell in cells) > 0.75
    assert best in ("best: blocks.4.mlp.l3", "best: blocks.28.mlp.l3")


def test_map_with_scanpy_clusters_an_embedding_file(run_example, tmp_path):
    for package in ("scanpy", "leidenalg", "igraph"):
        pytest.importorskip(package)
    write_map_file(tmp_path / "a.h5")
    shown = run_example(EXAMPLES / "map_with_scanpy.py", tmp_path / "a.h5", tmp_path / "clusters.tsv")
    assert shown.splitlines()[0] == "60 rows in 3 clusters"
    header, *lines = [line.split("\t") for line in (tmp_path / "clusters.tsv").read_text().splitlines()]
    assert header[1] == "leiden"
    clusters = [{line[1] for line in lines[group::3]} for group in range(3)]
    assert sorted(map(len, clusters)) == [1, 1, 1]
    assert len(set.union(*clusters)) == 3


def test_to_other_libraries_opens_one_file_in_three(run_example, tmp_path):
    vectors = write_map_file(tmp_path / "a.h5")
    lines = run_example(EXAMPLES / "to_other_libraries.py", tmp_path / "a.h5").splitlines()
    assert lines[0] == "pandas: 60 rows x 12 features, first r0"
    assert lines[1] == "anndata: 60 x 12, columns description, length, start ..."
    norm = (vectors[:4].astype(float) ** 2).sum(axis=1) ** 0.5
    assert lines[2] == f"torch: a batch of (4, 12), 4 ids, mean norm {norm.mean():.2f}"
