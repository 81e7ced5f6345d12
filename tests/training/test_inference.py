"""Prediction, validation and search see sequences as ``extract`` does, and divide batches as it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import genoembed
from genoembed.config.finetune import EncoderConfig
from genoembed.errors import ModelError, NonFiniteError
from genoembed.finetuning.models import CausalModel
from genoembed.finetuning.saved import load_predictor
from genoembed.retrieval.models import load_retriever
from genoembed.tokenization.hf import build_encoder
from genoembed.training.encoder import Encoder
from genoembed.training.inference import SequenceRunner
from tests.by_hand import random_dna
from tests.finetuning.cases import FAST, build_model, write_examples, write_fasta, write_table
from tests.tiny_models import build_six_mers, build_tiny

pytestmark = pytest.mark.filterwarnings("ignore::genoembed.errors.TrainingWarning")

KINDS = ("bpe", "six_mers_causal", "six_mers_both_sides", "letters")
LONG = [random_dna(length, length) for length in (1500, 700, 401, 60, 7)]
"""Longer than the context of every kind, and shorter."""
ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("CUDA error: out of memory"),
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    return {
        "bpe": str(build_tiny("gpt_neox", root / "bpe")),
        "six_mers_causal": str(build_six_mers("llama", root / "causal")),
        "six_mers_both_sides": str(build_six_mers("bert", root / "both")),
        "letters": build_model(root / "letters"),
    }


@pytest.fixture(scope="session")
def regressions(folders, tmp_path_factory):
    """A model of each kind that predicts a number, measured on sequences longer than its context."""
    root = tmp_path_factory.mktemp("regressions")
    rows = [{"sequence": random_dna(40, seed), "label": seed % 5} for seed in range(24)]
    train = write_table(root / "train.tsv", rows)
    test = write_table(root / "test.tsv", [{"sequence": s, "label": i} for i, s in enumerate(LONG)])
    return {
        kind: genoembed.finetune(
            train, root / kind, task="regression", model=folder, layers=1, test=test, **FAST
        )
        for kind, folder in folders.items()
    }


def vectors_of_extract(model, tmp_path, **options):
    output = tmp_path / "v.h5"
    report = genoembed.extract(write_fasta(tmp_path / "s.fa", LONG), model=model, output=output, **options)
    assert report.stats.windows > len(LONG)
    return genoembed.open_embeddings(output)


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_and_validation_are_of_the_vectors_of_extract(kind, regressions, tmp_path):
    report = regressions[kind]
    saved = load_predictor(report.output, device="cpu")
    with vectors_of_extract(saved.genomic, tmp_path) as file:
        vectors_ND = torch.from_numpy(file.X[:])
    with torch.no_grad():
        output = saved.model(vectors=vectors_ND, want="predict")
    genoembed.predict(report.output, tmp_path / "s.fa", output=tmp_path / "p.tsv")
    found = np.loadtxt(tmp_path / "p.tsv", delimiter="\t", skiprows=1, usecols=1)
    np.testing.assert_allclose(found, output["predictions"][:, 0].numpy(), rtol=1e-4, atol=1e-5)
    labels = torch.arange(len(LONG), dtype=torch.float32)[:, None]
    with torch.no_grad():
        expected = saved.model.head.loss(output["logits"], labels)
    assert report.test["loss"] == pytest.approx(float(expected), rel=1e-4)


def runner_of(folder, **options):
    model = genoembed.load_model(folder, device="cpu", dtype="float32")
    config = EncoderConfig(layers=("1",), **options)
    encoder = Encoder(model, config).eval()
    return model, SequenceRunner(encoder, build_encoder(model.tokenizer), max_tokens=model.max_length)


@pytest.mark.parametrize("kind", KINDS)
def test_token_states_are_those_of_extract(kind, folders, tmp_path):
    """What the heads of hybrid search are given."""
    model, runner = runner_of(folders[kind])
    found = runner.states([sequence.encode() for sequence in LONG])
    with vectors_of_extract(model, tmp_path, layers=1, pooling="none") as file:
        for index, tokens in enumerate(found):
            expected = file.tokens(f"s{index}")
            assert tokens.values["states"].shape == expected.shape
            np.testing.assert_allclose(tokens.values["states"].numpy(), expected, rtol=1e-5, atol=1e-5)
            assert (np.diff(tokens.spans[:, 0]) > 0).all()


class Allocator:
    """Fails passes of an encoder without gradient that have more than some slots."""

    def __init__(self, monkeypatch, slots, error):
        self.shapes = []
        original = Encoder._run

        def run(encoder, input_ids, *rest):
            if not torch.is_grad_enabled():
                self.shapes.append(tuple(input_ids.shape))
                if input_ids.numel() > slots:
                    raise error
            return original(encoder, input_ids, *rest)

        monkeypatch.setattr(Encoder, "_run", run)


@pytest.mark.parametrize("error", ERRORS)
def test_predict_divides_its_batches_when_memory_is_short(error, regressions, tmp_path, monkeypatch):
    folder = regressions["letters"].output
    fasta = write_fasta(tmp_path / "s.fa", LONG)
    genoembed.predict(folder, fasta, output=tmp_path / "whole.tsv")
    memory = Allocator(monkeypatch, 150, error)
    genoembed.predict(folder, fasta, output=tmp_path / "short.tsv")
    tried = [rows * length for rows, length in memory.shapes]
    assert max(tried) > 150
    assert sum(slots > 150 for slots in tried) <= 4  # what was short once is not tried again
    whole, short = (
        np.loadtxt(tmp_path / name, delimiter="\t", skiprows=1, usecols=1)
        for name in ("whole.tsv", "short.tsv")
    )
    np.testing.assert_allclose(short, whole, rtol=1e-5, atol=1e-6)
    Allocator(monkeypatch, 30, error)  # the probe at loading fits
    with pytest.raises(ModelError, match="has no memory left for 1 x"):
        genoembed.predict(folder, fasta, output=tmp_path / "none.tsv")


@pytest.mark.parametrize("error", ERRORS)
def test_validation_divides_its_batches_when_memory_is_short(error, folders, tmp_path, monkeypatch):
    rows = [{"sequence": random_dna(40, seed), "label": seed % 5} for seed in range(24)]
    train = write_table(tmp_path / "train.tsv", rows)
    test = write_table(tmp_path / "test.tsv", [{"sequence": s, "label": i} for i, s in enumerate(LONG)])
    options = {"task": "regression", "model": folders["letters"], "test": test}
    whole = genoembed.finetune(train, tmp_path / "whole", **options, **FAST)
    memory = Allocator(monkeypatch, 150, error)
    short = genoembed.finetune(train, tmp_path / "short", **options, **FAST)
    assert max(rows * length for rows, length in memory.shapes) > 150
    assert short.test["loss"] == pytest.approx(whole.test["loss"], rel=1e-4)


@pytest.mark.parametrize("error", ERRORS)
def test_validation_of_a_causal_model_divides_its_batches(error, folders, tmp_path, monkeypatch):
    fasta = write_fasta(tmp_path / "s.fa", [random_dna(40, seed) for seed in range(16)])
    test = write_fasta(tmp_path / "test.fa", [random_dna(40, seed) for seed in range(20, 28)])
    options = {"task": "lm", "model": folders["letters"], "test": test}
    whole = genoembed.finetune(fasta, tmp_path / "whole", **options, **FAST)
    rows, original = [], CausalModel.forward

    def forward(model, input_ids, *args, want="loss", **inputs):
        if want == "predict":
            rows.append(len(input_ids))
            if len(input_ids) > 3:
                raise error
        return original(model, input_ids, *args, want=want, **inputs)

    monkeypatch.setattr(CausalModel, "forward", forward)
    short = genoembed.finetune(fasta, tmp_path / "short", **options, **FAST)
    assert max(rows) > 3
    assert short.test["loss"] == pytest.approx(whole.test["loss"], rel=1e-5)


@pytest.mark.parametrize("error", ERRORS)
def test_validation_of_retrieval_heads_divides_its_batches(error, folders, tmp_path, monkeypatch):
    options = {
        "task": "retrieval", "mode": "all", "model": folders["letters"], "train_group_size": 2,
        "test": write_examples(tmp_path / "test.jsonl", 8),
    }  # fmt: skip
    examples = write_examples(tmp_path / "e.jsonl", 12)
    whole = genoembed.finetune(examples, tmp_path / "whole", **options, **FAST)
    memory = Allocator(monkeypatch, 100, error)
    short = genoembed.finetune(examples, tmp_path / "short", **options, **FAST)
    assert max(rows * length for rows, length in memory.shapes) > 100
    assert short.test == pytest.approx(whole.test, rel=1e-4)


@pytest.mark.parametrize("error", ERRORS)
def test_retriever_divides_its_batches_when_memory_is_short(error, folders, tmp_path, monkeypatch):
    report = genoembed.finetune(
        write_examples(tmp_path / "e.jsonl"), tmp_path / "run", task="retrieval", mode="all",
        model=folders["letters"], train_group_size=2, **{**FAST, "max_epochs": 1},
    )  # fmt: skip
    retriever = load_retriever(report.output, device="cpu")
    sequences = [sequence.encode() for sequence in LONG]
    whole = retriever.encode(sequences)
    memory = Allocator(monkeypatch, 150, error)
    short = retriever.encode(sequences)
    assert max(rows * length for rows, length in memory.shapes) > 150
    for one, other in zip(whole, short, strict=True):
        assert (one.term_ids == other.term_ids).all()
        np.testing.assert_allclose(other.term_weights, one.term_weights, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(other.vectors, one.vectors, rtol=1e-4, atol=1e-5)


def test_predict_names_the_record_whose_values_are_not_finite(regressions, tmp_path, monkeypatch):
    original = Encoder._run

    def run(encoder, input_ids, *rest):
        found = original(encoder, input_ids, *rest)
        return {layer: torch.full_like(values, torch.nan) for layer, values in found.items()}

    monkeypatch.setattr(Encoder, "_run", run)
    fasta = write_fasta(tmp_path / "s.fa", ["ACGTACGT"])
    with pytest.raises(NonFiniteError, match="record 's0'"):
        genoembed.predict(regressions["letters"].output, fasta, output=tmp_path / "p.tsv")
