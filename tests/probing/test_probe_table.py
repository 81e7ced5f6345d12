"""A table of sequences and labels, as fine-tuning takes it, in place of sequence files."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from click.testing import CliRunner

import genoembed
from genoembed.cli import main
from genoembed.config.probe import ProbeConfig
from genoembed.errors import MissingOptionError, SequenceFormatError
from genoembed.finetuning.labeled import read_labeled
from genoembed.probing.rows import read_labels
from genoembed.sequences import read_sequences
from tests.by_hand import STRIPED, model_of
from tests.finetuning.cases import rich, sequences

ROWS = [{"sequence": sequence, "label": rich(sequence)} for sequence in sequences(24, shortest=20)]
LEAN = {"num_folds": 3, "untrained": False, "baselines": False, "plot": False, "layers": [1], "top": 2}


def write(path, rows, kind):
    columns = list(rows[0])
    if kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    else:
        between = {"tsv": "\t", "csv": ",", "semicolons": ";"}[kind]
        lines = [columns, *([row[name] for name in columns] for row in rows)]
        text = "".join(between.join(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.tsv", "tsv"),
        ("a.csv", "csv"),
        ("x", "semicolons"),
        ("a.jsonl", "jsonl"),
        ("a.parquet", "parquet"),
        ("a.gz", "tsv"),
    ],
)
@pytest.mark.parametrize("has_ids", [True, False])
def test_sequences_and_labels_of_a_table_are_those_that_fine_tuning_reads(name, kind, has_ids, tmp_path):
    rows = [{"id": f"s{n}", **row} if has_ids else row for n, row in enumerate(ROWS[:5])]
    path = write(tmp_path / name, rows, kind)
    learned = read_labeled(path)
    found = list(read_sequences(path))
    assert [(r.sequence, r.source) for r in found] == [(r.sequence, r.source) for r in learned]
    labels = read_labels(path, ProbeConfig(), has_sequences=True).labels
    assert labels == {record.id: row.label for record, row in zip(found, learned, strict=True)}
    assert list(labels) == ([f"s{n}" for n in range(5)] if has_ids else [row.id for row in learned])


def test_probe_of_a_table_is_that_of_its_sequences_and_labels(tmp_path):
    table = write(tmp_path / "all.tsv", ROWS, "tsv")
    (tmp_path / "a.fa").write_text("".join(f">row_{n}\n{row['sequence']}\n" for n, row in enumerate(ROWS, 1)))
    ids = [{"id": f"row_{n}", "label": row["label"]} for n, row in enumerate(ROWS, 1)]
    labels = write(tmp_path / "labels.tsv", ids, "tsv")
    model = model_of(STRIPED)
    one = genoembed.probe(table, model=model, output=tmp_path / "one", **LEAN)
    two = genoembed.probe(tmp_path / "a.fa", labels=labels, model=model, output=tmp_path / "two", **LEAN)
    assert [layer.metrics for layer in one.layers] == [layer.metrics for layer in two.layers]


def test_extract_takes_a_table_too(tmp_path):
    table = write(tmp_path / "all.csv", ROWS[:3], "csv")
    found = genoembed.embed([row["sequence"] for row in ROWS[:3]], model=model_of(STRIPED))
    report = genoembed.extract(table, model=model_of(STRIPED), output=tmp_path / "a.h5")
    with genoembed.open_embeddings(report.output) as file:
        assert file.ids == ["row_1", "row_2", "row_3"]
        np.testing.assert_allclose(file.X[:], found.X, rtol=1e-5, atol=1e-6)


def test_labels_that_are_nowhere_are_asked_for(tmp_path):
    (tmp_path / "a.fa").write_text(">a\nACGT\n")
    for inputs in (tmp_path / "a.fa", "-", [tmp_path / "a.fa", tmp_path / "a.fa"]):
        with pytest.raises(MissingOptionError, match="has sequences, but no labels; set labels to the"):
            genoembed.probe(inputs, output=tmp_path / "o")
    only = write(tmp_path / "l.tsv", [{"id": "a", "label": "x"}], "tsv")
    with pytest.raises(SequenceFormatError, match="no column 'sequence'"):
        genoembed.probe(only, output=tmp_path / "o")
    result = CliRunner().invoke(main, ["probe", str(tmp_path / "a.fa"), "-o", str(tmp_path / "o")])
    assert result.exit_code == 2
    assert "Missing option '--labels'" in result.stderr


def test_a_header_of_fasta_that_looks_like_one_of_a_table_is_none(tmp_path):
    (tmp_path / "a.fa").write_text(">a,sequence,of\nACGT\n")
    assert [record.id for record in read_sequences(tmp_path / "a.fa")] == ["a,sequence,of"]
