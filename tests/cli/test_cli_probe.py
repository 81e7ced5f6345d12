"""``genoembed probe``: what goes to standard output, and how it ends."""

from __future__ import annotations

import json

import pytest

from tests.probing.test_rows import NUM, store, write_labels

LEAN = ("--num-folds", "3", "--no-untrained", "--no-baselines", "--no-plot")


@pytest.fixture
def folder(tmp_path):
    store(tmp_path / "a.h5")
    write_labels(tmp_path / "l.tsv")
    return tmp_path


def run(cli, folder, *words):
    return cli("probe", folder / "a.h5", "--labels", folder / "l.tsv", "-o", folder / "out", *LEAN, *words)


def test_table_recommendation_and_verdict_go_to_standard_output(cli, folder):
    result = run(cli, folder)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["candidate", "kind", "MCC", "accuracy", "macro-F1"]
    assert lines[1].startswith("blocks.0 ")
    assert "use layer blocks.1: MCC 1.000 +- 0.000" in result.stdout
    assert "no baselines were measured" in result.stdout
    assert "genoembed extract" not in result.stdout  # the file does not say how it was made
    assert f"{NUM} rows in 3 stratified folds" in result.stderr


def test_json_is_what_the_file_holds(cli, folder):
    result = run(cli, folder, "--json", "-q")
    stored = json.loads((folder / "out" / "probe.json").read_text())
    assert json.loads(result.stdout) == stored
    assert result.stderr == ""


def test_rows_without_a_vector_end_in_three(cli, tmp_path):
    store(tmp_path / "a.h5", failed=(3,), flagged=(3,))
    write_labels(tmp_path / "l.tsv")
    result = run(cli, tmp_path)
    assert result.exit_code == 3
    assert "1 rows without a vector" in result.stderr


def test_zero_is_not_taken_for_left_out(cli, folder):
    result = run(cli, folder, "--homolog-identity", "0")
    assert result.exit_code == 1
    assert "set --homolog-identity above 0" in result.stderr


def test_preset_shows_the_test_split(cli, folder):
    table = (folder / "l.tsv").read_text().splitlines()
    split = ["split", *("test" if number >= 30 else "train" for number in range(NUM))]
    (folder / "l.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in zip(table, split, strict=True)))
    result = run(cli, folder, "--preset", "geneb")
    assert result.exit_code == 0, result.output
    header = next(line for line in result.stdout.splitlines() if line.startswith("test split, 10 rows"))
    assert "full mcc" in header
    assert "1-shot macro_f1" in header
