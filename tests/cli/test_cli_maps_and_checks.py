"""The commands on embedding files: plot, compare, verify, export, export-model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from genoembed import open_embeddings


@pytest.fixture
def made(cli, fasta, tiny):
    """``seqs.h5``: three records of two layers."""
    words = ("--model", tiny, "--layer", 0, "--layer", 2, "--dtype", "float32", "-q")
    assert cli("extract", fasta, *words).exit_code == 0
    return "seqs.h5"


def test_plot_names_its_files_and_says_what_it_drew(cli, fasta, made):
    (fasta.parent / "kinds.tsv").write_text("a\tone\nb\ttwo\nz\tone\n")
    result = cli("plot", made, "--values", "kinds.tsv", "-o", "map.svg", "-o", "map.tsv")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "map.svg\nmap.tsv\n"
    assert "3 points of blocks.0.mlp.l3; PCA" in result.stderr
    assert "1 point without a value of 'kinds'" in result.stderr
    assert "1 id of the values not in the file" in result.stderr
    rows = [line.split("\t") for line in (fasta.parent / "map.tsv").read_text().splitlines()]
    assert [row[:1] + row[3:6] for row in rows[:2]] == [
        ["id", "description", "length", "kinds"],
        ["a", "first record", "10", "one"],
    ]


def test_plot_json_is_the_report(cli, made):
    result = cli("plot", made, "--json", "-q", "--color", "strand", "--color", "length", "-o", "map.html")
    facts = json.loads(result.stdout)
    assert facts["outputs"] == ["map.html"]
    assert facts["colors"][:2] == ["strand", "length"]
    assert (facts["num_points"], facts["num_in_file"], facts["num_failed"]) == (3, 3, 0)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--color", "nothing"), "color is 'nothing', which is not a column of seqs.h5"),
        (("-o", "map.gif"), "set --output to names that end in .png, .svg, .pdf, .html, .tsv"),
        (("--layer", "nothing"), "layer 'nothing' is not among"),
        (("--values", "missing.tsv"), "missing.tsv: file not found"),
    ],
)
def test_plot_errors_are_one_line(words, problem, cli, made):
    result = cli("plot", made, "-q", *words)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert problem in result.stderr


def test_compare_says_equal_or_not_by_its_exit_code(cli, fasta, tiny, made):
    same = ("--model", tiny, "--layer", 2, "--dtype", "float32", "--batch-tokens", 8, "-q")
    assert cli("extract", fasta, *same, "-o", "again.h5").exit_code == 0
    result = cli("compare", made, "again.h5")
    assert result.exit_code == 0, result.stdout
    assert result.stdout.startswith("blocks.2.mlp.l3: 3 records; cosine 1.0000")
    assert result.stdout.endswith("equal within 1e-05\n")
    cli("extract", fasta, *same, "--pool", "max", "-o", "other.h5")
    differs = cli("compare", made, "other.h5", "-o", "d.tsv")
    assert differs.exit_code == 1
    assert "3 outside 1e-05" in differs.stdout
    assert differs.stdout.endswith("not equal\n")
    assert "made differently: pooling: 'mean' against 'max'" in differs.stderr
    assert len((fasta.parent / "d.tsv").read_text().splitlines()) == 4
    facts = json.loads(cli("compare", made, "other.h5", "--json", "-q").stdout)
    assert facts["is_within"] is False
    assert facts["layers"][0]["num_outside"] == 3


def test_verify_says_verified_or_not_by_its_exit_code(cli, fasta, made):
    result = cli("verify", made, "--certify")
    assert result.exit_code == 0, result.stdout
    assert result.stdout.endswith("verified: 3 records\n")
    assert "alone against batches of 2,048 tokens: 3 records" in result.stdout
    (fasta.parent / "moved.fa").write_text(">a\nACGTACGTNN\n>b\nTTTTTTTTTTT\n")
    fasta.unlink()
    lost = cli("verify", made)
    assert (lost.exit_code, lost.stderr.count("\n")) == (1, 1)
    changed = cli("verify", made, "moved.fa", "--json", "-q")
    assert changed.exit_code == 1
    facts = json.loads(changed.stdout)
    assert (facts["missing"], facts["other_sequence"]) == (["c"], ["b"])
    assert facts["certificate"] is None


def test_export_writes_what_the_file_holds(cli, made):
    result = cli("export", made, "--to", "npz")
    assert (result.exit_code, result.stdout) == (0, "seqs.npz\n")
    with np.load("seqs.npz") as found, open_embeddings(made) as file:
        np.testing.assert_array_equal(found["blocks.2.mlp.l3"], file["blocks.2.mlp.l3"][:])
    refused = cli("export", made, "--to", "csv", "-q")
    assert refused.exit_code == 1
    assert "holds 2 layers (blocks.0.mlp.l3, blocks.2.mlp.l3), but csv one; set --layer" in refused.stderr
    facts = json.loads(
        cli("export", made, "--to", "csv", "--layer", "blocks.2.mlp.l3", "--json", "-q").stdout
    )
    assert facts["layers"] == ["blocks.2.mlp.l3"]


def test_export_model_refuses_a_folder_that_is_there(cli, fasta, tiny):
    result = cli("export-model", tiny, "-o", fasta.parent, "-q")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "exists already; add --overwrite" in result.stderr
