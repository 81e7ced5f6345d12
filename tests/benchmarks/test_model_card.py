"""The tables of a model card: the script on a set of a few rows."""

from __future__ import annotations

import json

import model_card
import numpy as np
import pytest


def test_figures_of_counts_stand_side_by_side(tmp_path, capsys):
    random = np.random.default_rng(0)
    rows = ["".join(random.choice(list(letters), 60)) for letters in ("ACGT", "AATC") for _ in range(15)]
    labels = ["even"] * 15 + ["rich"] * 15
    lines = "".join(map("{}\t{}\n".format, rows, labels))
    (tmp_path / "toy.tsv").write_text("sequence\tlabel\n" + lines)
    letters = "".join(random.choice(list("ACGT"), 3000))
    (tmp_path / "held.fa").write_text(f">a group=one\n{letters}\n")
    out = tmp_path / "counts.json"
    words = ["measure", str(tmp_path), "--model", "none", "--heldout", str(tmp_path / "held.fa")]
    model_card.main([*words, "--fragments", "12", "--output", str(out)])
    found = json.loads(out.read_text())
    assert found["sets"]["toy"]["probe"]["4-mer counts"][0] > 0.5
    assert found["fragments"]["7-mers, Jaccard"]["0.05"] == pytest.approx(1, abs=0.1)
    model_card.main(["table", str(out), str(out)])
    assert capsys.readouterr().out.count("| toy |") == 2


def test_rank_of_the_own_row_counts():
    scores = np.array([[3.0, 2, 1], [3, 2, 1], [3, 2, 1]])
    assert model_card.mean_reciprocal_rank(scores) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
