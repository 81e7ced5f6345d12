"""``genoembed search`` and ``fit-transform``: the same as the Python calls."""

from __future__ import annotations

import json

import pytest

from genoembed import fit_transform, search
from genoembed.store.tables import cell


@pytest.fixture
def database(cli, fasta, tiny):
    shown = cli("extract", fasta, "--model", tiny, "--layer", 1, "--dtype", "float32", "-q", "-o", "d.h5")
    assert shown.exit_code == 0, shown.stderr
    return "d.h5"


def test_search_prints_what_python_finds(cli, fasta, database):
    shown = cli("search", fasta, "--against", database, "-k", 2, "--metric", "euclidean")
    assert shown.exit_code == 0, shown.stderr
    report = search(fasta, database, k=2, metric="euclidean")
    assert shown.stdout.splitlines() == [
        "\t".join(map(cell, row)) for row in (report.hits.header(), *report.hits.rows())
    ]
    assert "6 hits for 3 queries among 3 rows of blocks.1.mlp.l3 by euclidean" in shown.stderr


def test_search_takes_standard_input_and_writes_files(cli, fasta, database):
    piped = cli("search", "-", "--against", database, "-q", stdin=fasta.read_text())
    assert piped.exit_code == 0, piped.stderr
    written = cli("search", fasta, "--against", database, "-o", "t.tsv", "-q")
    assert (written.exit_code, written.stdout) == (0, "")
    assert (fasta.parent / "t.tsv").read_text() == piped.stdout
    again = cli("search", fasta, "--against", database, "-o", "t.tsv")
    assert again.exit_code == 1
    assert "exists already" in again.stderr


def test_search_keeps_an_index_and_measures_it(cli, database):
    words = ("search", database, "--against", database, "--approximate", "--exclude-self", "-k", 1)
    first = cli(*words, "--measure-recall", 3)
    assert first.exit_code == 0, first.stderr
    assert "recall of the index: 1.0000" in first.stderr
    assert " built" in first.stderr
    second = cli(*words)
    assert " built" not in second.stderr
    assert second.stdout == first.stdout
    hits = [line.split("\t") for line in second.stdout.splitlines()[1:]]
    assert all(hit[0] != hit[1] for hit in hits)


def test_fit_transform_reports_and_search_applies_it(cli, fasta, database):
    shown = cli("fit-transform", database, "-o", "t.h5", "--json", "-q")
    assert shown.exit_code == 0, shown.stderr
    told = json.loads(shown.stdout)
    report = fit_transform(database, output="again.h5")
    assert told["before"]["mean_cosine"] == report.before.mean_cosine
    assert told["after"]["resultant"] < told["before"]["resultant"]
    line = cli("fit-transform", database, "-o", "t.h5", "--overwrite").stdout
    assert line.startswith("t.h5: center of blocks.1.mlp.l3, 3 rows x 32 to 32; mean cosine ")
    found = cli("search", fasta, "--against", database, "--transform", "t.h5", "-k", 1, "-q")
    assert [row.split("\t")[:2] for row in found.stdout.splitlines()[1:]] == [
        ["a", "a"],
        ["b", "b"],
        ["c", "c"],
    ]


def test_search_says_in_one_line_what_is_wrong(cli, fasta, database):
    for words, said in (
        (("search", fasta, "--against", "absent.h5"), "absent.h5"),
        (("search", fasta, "--against", database, "-k", 0), "--neighbors is 0"),
        (("fit-transform", database, "-o", "t.h5", "--components", 3), "leave --components out"),
    ):
        shown = cli(*words)
        assert shown.exit_code == 1
        assert said in shown.stderr
        assert shown.stderr.count("\n") == 1
    assert cli("search", fasta).exit_code == 2
    assert cli("search", fasta, "--against", database, "--hybrid-weights", "a,b").exit_code == 2
