"""Weights of hybrid scores: chosen by validation queries, saved, and used unless others are requested."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import genoembed
from genoembed.errors import CheckpointError
from genoembed.finetuning.evaluation import ranking_metrics
from genoembed.models.trained_folder import FACTS_FILE
from genoembed.retrieval.m3 import add_scores
from genoembed.retrieval.models import load_retriever
from genoembed.retrieval.weights import HEADS, HybridWeights, candidate_weights, choose_weights
from tests.finetuning.cases import FAST, build_model, sequences, write_examples, write_fasta

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::genoembed.errors.TrainingWarning")
RECIPE = {"task": "retrieval", "train_group_size": 2, "learning_rate": 1e-3, "term_bases": 5, **FAST}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("weights") / "model")


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """A run whose dense head is worse than its words, and what was said."""
    folder = tmp_path_factory.mktemp("trained")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("genoembed.finetuning.training")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        path = write_examples(folder / "e.jsonl", 60)
        report = genoembed.finetune(path, folder / "run", model=model, validation_fraction=0.3, **RECIPE)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return report, "\n".join(said)


@settings(max_examples=6)
@given(seed=st.integers(0, 1000), bias=st.sampled_from(HEADS))
def test_chosen_weights_are_never_below_a_head_alone_nor_the_usual_ones(seed, bias):
    generator = torch.Generator().manual_seed(seed)
    relevant = torch.eye(6, dtype=torch.bool)
    by_head = {head: torch.randn(6, 6, generator=generator) for head in HEADS}
    by_head[bias] += 3 * relevant

    @functools.cache
    def measure(weights):
        return ranking_metrics(add_scores(by_head, weights), relevant)["mrr"]

    chosen = choose_weights(measure)
    assert chosen.metric == measure(chosen.weights) == max(map(measure, candidate_weights()))
    assert chosen.usual == measure(HybridWeights())
    for head, values in by_head.items():
        assert chosen.alone[head] == ranking_metrics(values, relevant)["mrr"] <= chosen.metric


def test_of_equal_weights_the_middle_is_chosen():
    assert choose_weights(lambda weights: 1.0).weights.shares == pytest.approx((1 / 3,) * 3, abs=0.05)
    chosen = choose_weights(lambda weights: float(weights.shares[1] >= 0.5)).weights
    assert 0.6 <= chosen.sparse <= 0.7
    # where only the usual weights are best, they stay
    assert choose_weights(lambda weights: float(weights == HybridWeights())).weights == HybridWeights()


def test_a_run_chooses_weights_by_validation_queries_saves_and_says_them(trained):
    report, said = trained
    weights = HybridWeights(*report.hybrid_weights)
    assert weights == load_retriever(report.output).model.hybrid_weights != HybridWeights()
    alone = [report.validation[f"{head}_mrr"] for head in HEADS]
    assert report.validation["mrr"] >= max(alone) > min(alone)
    assert f"hybrid weights {weights} (dense : sparse : multi-vector), chosen by 18 validation" in said
    assert f"MRR {report.validation['mrr']:.3f}, with 1 : 0.3 : 1 " in said
    assert f"and alone dense {alone[0]:.3f}, sparse {alone[1]:.3f}, multi-vector {alone[2]:.3f}" in said
    assert json.loads((Path(report.output).parent / "report.json").read_text())["hybrid_weights"] == list(
        report.hybrid_weights
    )


def test_without_validation_rows_the_usual_weights_stay_and_that_is_said(model, tmp_path, caplog):
    path = write_examples(tmp_path / "e.jsonl", 16)
    with caplog.at_level("INFO", logger="genoembed"):
        report = genoembed.finetune(
            path, tmp_path / "run", model=model, validation_fraction=0.0, test_fraction=0.0,
            **{**RECIPE, "max_epochs": 1},
        )  # fmt: skip
    assert report.hybrid_weights == [1.0, 0.3, 1.0]
    assert (
        "hybrid weights stay 1 : 0.3 : 1 (dense : sparse : multi-vector): there are no valid" in caplog.text
    )


def test_search_adds_as_the_folder_says_unless_others_are_requested(trained, tmp_path, caplog):
    report, _ = trained
    fasta = write_fasta(tmp_path / "d.fa", sequences(12, shortest=20))
    database = genoembed.extract(fasta, model=report.output, dtype="float32", output=tmp_path / "d.h5").output

    def found(folder=report.output, **options):
        caplog.clear()
        with caplog.at_level("INFO", logger="genoembed"):
            hits = genoembed.search(
                database, database, mode="hybrid", k=5, model=folder, subject_sequences=[fasta], **options
            ).hits.columns()
        parts = np.stack([hits[head] for head in HEADS], axis=1).astype(float)
        return np.asarray(hits["score"], float), parts, caplog.text

    own = np.array(report.hybrid_weights)
    scores, parts, said = found()
    np.testing.assert_allclose(scores, parts @ own, atol=1e-6)
    assert f"hybrid weights {HybridWeights(*own)} (dense : sparse : multi-vector), those of the" in said
    scores, parts, said = found(hybrid_weights=(0.0, 1.0, 0.0))
    np.testing.assert_allclose(scores, parts[:, 1], atol=1e-6)
    assert f"as requested; those of the model are {HybridWeights(*own)}" in said


def test_a_folder_of_an_earlier_version_has_the_usual_weights(trained, tmp_path):
    report, _ = trained
    folder = tmp_path / "old"
    shutil.copytree(report.output, folder)
    facts = json.loads((folder / FACTS_FILE).read_text())
    del facts["retrieval"]["hybrid_weights"]
    (folder / FACTS_FILE).write_text(json.dumps(facts))
    assert load_retriever(folder).model.hybrid_weights == HybridWeights()
    facts["retrieval"]["hybrid_weights"] = [1.0, -1.0]
    (folder / FACTS_FILE).write_text(json.dumps(facts))
    with pytest.raises(
        CheckpointError, match=r"hybrid_weights is .* expected three numbers; fine-tune again"
    ):
        load_retriever(folder)
