"""The bundled model on real genes: fine-tune a head, embed with the folder, predict, and all three agree."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import genoembed
from genoembed import open_embeddings

GENES = Path(__file__).parents[2] / "examples" / "data" / "bacterial_genes.fa.gz"
BASES, CHANGED = 60, 6


def gene_pieces():
    """The first bases of each gene, and as many from its inside."""
    pieces = []
    for record in gzip.decompress(GENES.read_bytes()).decode("ascii").split(">")[1:]:
        header, *lines = record.splitlines()
        gene = "".join(lines)
        name = header.split()[0]
        pieces.append((f"{name}:start", gene[:BASES], "start"))
        pieces.append((f"{name}:inside", gene[200 : 200 + BASES], "inside"))
    return pieces


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pieces = gene_pieces()
    held_out, learned = pieces[:8], pieces[8:]
    table, fasta = folder / "train.tsv", folder / "new.fa"
    rows = [f"{name}\t{sequence}\t{label}" for name, sequence, label in learned]
    table.write_text("\n".join(["id\tsequence\tlabel", *rows]) + "\n")
    fasta.write_text("".join(f">{name}\n{sequence}\n" for name, sequence, _ in held_out))
    report = genoembed.finetune(
        table, folder / "out", task="classification", id_column="id", tuning="frozen", layers=CHANGED,
        max_epochs=6, head_learning_rate=1e-2, test_fraction=0.2, threads=1, dtype="float32",
    )  # fmt: skip
    return folder, held_out, fasta, report


def matrix_of(folder, fasta, name, **options):
    output = folder / name
    genoembed.extract(fasta, output=output, threads=1, dtype="float32", **options)
    with open_embeddings(output) as found:
        return list(found.ids), np.asarray(found.X)


def read_predictions(path):
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


def test_head_on_a_frozen_encoder_learns_gene_starts(run):
    *_, report = run
    assert report.metric == "mcc"
    assert report.validation["accuracy"] > 0.6
    assert 0 <= report.test["accuracy"] <= 1


def test_folder_embeds_as_the_model_it_was_frozen_from(run):
    folder, held_out, fasta, report = run
    ids, tuned = matrix_of(folder, fasta, "tuned.h5", model=report.output)
    assert ids == [name for name, _, _ in held_out]
    _, bundled = matrix_of(folder, fasta, "bundled.h5", layers=CHANGED, pooling="mean")
    np.testing.assert_allclose(tuned, bundled, rtol=1e-4, atol=1e-5)
    _, other = matrix_of(folder, fasta, "other.h5", layers="final", pooling="mean")
    assert not np.allclose(tuned, other, atol=1e-2)


def test_predictions_are_the_saved_head_on_the_vectors_of_the_folder(run):
    folder, held_out, fasta, report = run
    output = folder / "predicted.tsv"
    told = genoembed.predict(report.output, fasta, output=output, threads=1)
    rows = read_predictions(output)
    assert (told.num_records, [row["id"] for row in rows]) == (8, [name for name, _, _ in held_out])

    heads = load_file(Path(report.output) / "model.safetensors")
    _, vectors = matrix_of(folder, fasta, "vectors.h5", model=report.output)
    standard = (torch.from_numpy(vectors) - heads["head.input_mean"]) / heads["head.input_deviation"]
    logits = standard @ heads["head.output.weight"].T + heads["head.output.bias"]
    expected = torch.softmax(logits, dim=1).numpy()
    found = np.array([[float(row[f"p_{name}"]) for name in told.names] for row in rows])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert [row["label"] for row in rows] == [told.names[index] for index in expected.argmax(axis=1)]


def test_three_lines_of_transformers_predict_the_same(run):
    folder, held_out, fasta, report = run
    tokenizer = AutoTokenizer.from_pretrained(report.output)
    model = AutoModelForSequenceClassification.from_pretrained(report.output)
    batch = tokenizer([sequence for _, sequence, _ in held_out], padding=True, return_tensors="pt")
    with torch.inference_mode():
        found = model(**batch).logits.softmax(-1).numpy()
    output = folder / "opened.tsv"
    genoembed.predict(report.output, fasta, output=output, threads=1)
    names = [model.config.id2label[index] for index in range(2)]
    expected = [[float(row[f"p_{name}"]) for name in names] for row in read_predictions(output)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
