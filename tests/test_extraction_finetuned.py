"""``extract`` with a fine-tuned folder: the vectors that were trained, or others with a warning."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import genoembed
from genoembed.cli import main
from genoembed.config.retrieval import ContrastiveConfig
from genoembed.errors import ConfigError, PoolingMismatchWarning
from genoembed.models.trained_folder import read_finetuned
from genoembed.retrieval.heads import DenseHead
from genoembed.retrieval.models import ContrastModel
from genoembed.serving.service import EmbeddingService
from genoembed.tokenization.hf import build_encoder
from genoembed.training.encoder import load_encoder, load_heads
from genoembed.training.inference import SequenceRunner
from tests.finetuning.cases import (
    CONTEXT,
    FAST,
    build_model,
    sequences,
    write_classes,
    write_examples,
    write_fasta,
)

pytestmark = pytest.mark.filterwarnings("ignore::genoembed.errors.TrainingWarning")
SEQUENCES = [*sequences(5, seed=8), "".join(sequences(9, seed=9))]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A contrastive model with everything that vectors can need, and a classifier of one layer."""
    folder = tmp_path_factory.mktemp("carried")
    options = {"model": build_model(folder / "model"), "learning_rate": 3e-3, **FAST}
    views = genoembed.finetune(
        write_fasta(folder / "v.fa", sequences(30)), folder / "views", task="contrastive", **options,
        layers=(0, 2), fusion="weighted", pooling="max", skip_first=2, add_pooler=True,
    )  # fmt: skip
    classes = genoembed.finetune(
        write_classes(folder / "c.tsv"), folder / "classes", task="classification", layers=1, **options
    )
    search = genoembed.finetune(
        write_examples(folder / "e.jsonl"), folder / "search", task="retrieval", train_group_size=2, **options
    )
    return {"views": views.output, "classes": classes.output, "search": search.output, "fa": folder}


@pytest.fixture
def fasta(tmp_path):
    return write_fasta(tmp_path / "s.fa", SEQUENCES)


def rows_of(fasta, folder, **options):
    output = Path(fasta).with_suffix(".h5")
    genoembed.extract(fasta, model=folder, output=output, overwrite=True, dtype="float32", **options)
    with genoembed.open_embeddings(output) as file:
        return file.X[:], file.provenance


@pytest.mark.parametrize("name", ["views", "classes"])
def test_server_gives_the_vectors_that_were_trained(name, folders, fasta):
    expected, _ = rows_of(fasta, folders[name])
    service = EmbeddingService(folders[name], dtype="float32")
    records = [
        genoembed.SequenceRecord(id=str(n), sequence=text.encode()) for n, text in enumerate(SEQUENCES)
    ]
    service.start()
    found = service.submit(records).result(30).vectors_ND
    service.close()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def trained_vectors(folder):
    """Run the saved model as training ran it."""
    facts = read_finetuned(folder)
    genomic = genoembed.load_model(folder, dtype="float32", device="cpu")
    encoder = load_encoder(facts, genomic)
    head = DenseHead(encoder.width, add_pooler=True, normalize=True)
    model = ContrastModel(encoder, head, contrast="views", config=ContrastiveConfig())
    load_heads(model, facts)
    runner = SequenceRunner(
        encoder, build_encoder(genomic.tokenizer), max_tokens=CONTEXT, skip_first=facts.skip_first
    )
    vectors = runner.vectors(model.eval(), [s.encode() for s in SEQUENCES])
    with torch.no_grad():
        return model(vectors=vectors, want="predict")["dense"].numpy()


def test_extract_gives_the_vectors_that_were_trained(folders, fasta):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, provenance = rows_of(fasta, folders["views"])
    assert np.allclose(found, trained_vectors(folders["views"]), atol=1e-5)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert provenance["layers"] == ["blocks.0.mlp.l3", "blocks.2.mlp.l3"]
    embedding = provenance["config"]["embedding"]
    assert (embedding["pooling"], embedding["fusion"], embedding["skip_first"]) == ("max", "weighted", 2)
    assert provenance["finetuned"]["normalize"] is True


def test_extract_of_a_loaded_model_and_of_the_command_line_are_the_same(folders, fasta, monkeypatch):
    expected, _ = rows_of(fasta, folders["views"])
    loaded = genoembed.load_model(folders["views"], dtype="float32", device="cpu")
    genoembed.extract(fasta, model=loaded, output=fasta + ".loaded.h5")
    words = ["extract", fasta, "--model", folders["views"], "--dtype", "float32", "-o", fasta + ".cli.h5"]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for name in ("loaded", "cli"):
        with genoembed.open_embeddings(f"{fasta}.{name}.h5") as file:
            assert np.allclose(file.X[:], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pooling": "mean"}, "pooling is 'mean', it was trained with 'max'"),
        ({"layers": 1}, "layers is blocks.1.mlp.l3, it was trained with blocks.0.mlp.l3, blocks.2.mlp.l3"),
        ({"skip_first": 0}, "skip_first is 0, it was trained with 2"),
        ({"fusion": "mean"}, "fusion is 'mean', it was trained with 'weighted'"),
    ],
)
def test_other_vectors_than_were_trained_are_given_with_a_warning(folders, fasta, options, said):
    with pytest.warns(PoolingMismatchWarning, match=said):
        found, _ = rows_of(fasta, folders["views"], **options)
    assert not np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-2)


def test_strands_are_finished_each_by_itself(folders, fasta):
    forward, _ = rows_of(fasta, folders["views"])
    both, _ = rows_of(fasta, folders["views"], rc="concat")
    mean, _ = rows_of(fasta, folders["views"], rc="mean")
    width = forward.shape[1]
    assert np.allclose(both[:, :width], forward, atol=1e-6)
    assert np.allclose(np.linalg.norm(both[:, width:], axis=1), 1, atol=1e-6)
    assert np.allclose(mean, (both[:, :width] + both[:, width:]) / 2, atol=1e-6)


def test_a_classifier_carries_its_layer_and_lengths_stay(folders, fasta):
    found, provenance = rows_of(fasta, folders["classes"])
    assert provenance["layers"] == ["blocks.1.mlp.l3"]
    assert not np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-2)
    tokens = Path(fasta).with_name("tokens.h5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        genoembed.extract(fasta, model=folders["views"], pooling="none", fusion="weighted",
                          fusion_weights=(1.0, 1.0), layers=(0, 2), output=tokens)  # fmt: skip


def test_retrieval_folder_gives_its_dense_vectors(folders, fasta):
    found, provenance = rows_of(fasta, folders["search"])
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert provenance["layers"] == ["norm"]


def test_layers_and_strands_side_by_side_are_refused(folders, fasta, tmp_path):
    report = genoembed.finetune(
        write_fasta(tmp_path / "v.fa", sequences(20)), tmp_path / "run", task="contrastive",
        model=build_model(tmp_path / "model"), layers=(0, 1), fusion="concat", **{**FAST, "max_epochs": 1},
    )  # fmt: skip
    assert rows_of(fasta, report.output)[0].shape[1] == 32
    with pytest.raises(ConfigError, match="concatenates layers; set rc to 'mean' or 'none'"):
        rows_of(fasta, report.output, rc="concat")
