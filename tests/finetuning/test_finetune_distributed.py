"""Fine-tuning in two processes under torchrun: the training of one process with all rows of each step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import genoembed
from tests.finetuning.cases import build_model, sequences, write_classes, write_examples, write_fasta
from tests.finetuning.two_ranks import CASES, ROWS_TOGETHER, lines_of, watched_run

SCRIPT = Path(__file__).with_name("two_ranks.py")
ROOT = SCRIPT.parents[2]
ROWS = 22
"""Two full steps, and one with three rows a process."""

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::genoembed.errors.TrainingWarning")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, and rows of each case: to train on, held out, to test."""
    folder = tmp_path_factory.mktemp("files")
    build_model(folder / "model")
    for side, count, seed in (("", ROWS, 0), ("-held", 8, 1), ("-test", 6, 2)):
        write_fasta(folder / f"views{side}.fa", sequences(count, seed=seed))
        for case in ("labels", "classes"):
            write_classes(folder / f"{case}{side}.tsv", count, seed=seed)
        for case in ("examples", "heads"):
            write_examples(folder / f"{case}{side}.jsonl", count)
    return folder


@pytest.fixture(scope="module")
def ranks(files, tmp_path_factory):
    """What both processes saw, by case."""
    output = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*launch, str(SCRIPT), str(files), str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ran.returncode == 0, ran.stderr
    return [torch.load(output / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module", params=CASES)
def case(request, ranks, files, tmp_path_factory):
    """Both processes, and one process alone with the rows of both."""
    name = request.param
    alone = watched_run(name, files, tmp_path_factory.mktemp(name) / "run", rows_per_device=ROWS_TOGETHER)
    return [rank[name] for rank in ranks], alone


def test_two_processes_draw_every_row_once_and_none_twice(case):
    pair, alone = case
    first, second = (set(rank["rows"]) for rank in pair)
    assert len(pair[0]["rows"]) == len(pair[1]["rows"]) == ROWS // 2
    assert not first & second
    assert first | second == set(alone["rows"]) == set(range(ROWS))


def test_first_step_of_two_processes_has_loss_and_gradient_of_one(case):
    pair, alone = case
    (line, *_), (expected, *_) = (list(lines_of(run["report"])) for run in (pair[0], alone))
    assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    largest = max(float(grad.abs().max()) for grad in alone["grads"].values())
    for rank in pair:
        assert set(rank["grads"]) == set(alone["grads"])
        for name, grad in alone["grads"].items():
            assert torch.allclose(rank["grads"][name], grad, rtol=1e-3, atol=1e-5 * largest), name


def test_metrics_of_two_processes_are_those_of_all_rows(case):
    pair, alone = case
    assert pair[0]["report"] == pair[1]["report"]
    found, expected = (list(lines_of(run["report"])) for run in (pair[0], alone))
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [1, 2, 3]
    same = {"loss": 2e-3, "queries": 0, "negatives_per_query": 1e-6, "chance_loss": 2e-2}
    # means over processes, which may hold different numbers of pairs
    same |= {"positive_score": 2e-2, "negative_score": 2e-2}
    for line, other in zip(found, expected, strict=True):
        assert line["learning_rate"] == pytest.approx(other["learning_rate"])
        for name in set(same) & set(other):
            assert line[name] == pytest.approx(other[name], rel=same[name], abs=1e-6), (line["step"], name)
    for side in ("validation", "test"):
        measured, wanted = (run["report"][side] for run in (pair[0], alone))
        assert set(measured) == set(wanted) != set()
        if "loss" in wanted:
            assert measured["loss"] == pytest.approx(wanted["loss"], rel=1e-3)


def test_folder_of_two_processes_embeds_as_that_of_one(case, tmp_path):
    pair, alone = case
    fasta = write_fasta(tmp_path / "q.fa", sequences(4, seed=9))
    vectors = []
    for number, run in enumerate((pair[0], alone)):
        genoembed.extract(
            [fasta],
            output=str(tmp_path / f"{number}.h5"),
            model=run["report"]["output"],
            layers=None,
            pooling=None,
            dtype="float32",
        )
        with genoembed.open_embeddings(tmp_path / f"{number}.h5") as opened:
            vectors.append(np.asarray(opened.X))
    np.testing.assert_allclose(vectors[0], vectors[1], rtol=0, atol=2e-3 * np.abs(vectors[1]).max())
