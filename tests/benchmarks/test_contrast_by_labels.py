"""Orders of classes: the former one as it was, negatives counted, MRR by class, and a whole run."""

from __future__ import annotations

import json

import contrast_by_labels
import numpy as np
import pytest
import torch
from contrast_by_labels import RoundSampler, class_mrr, count_negatives

from genoembed import CharTokenizer
from tests.tiny_models import build_striped_hyena

LABELS = ["common"] * 14 + ["rare"] * 6


def test_former_order_takes_four_of_each_class_until_one_is_left():
    order = RoundSampler(LABELS, seed=0)
    for epoch in range(3):
        order.set_epoch(epoch)
        rows = list(order)
        assert sorted(rows) == list(range(20))
        assert len({LABELS[row] for row in rows[:8]}) == 2
        assert {LABELS[row] for row in rows[-6:]} == {"common"}


@pytest.mark.parametrize(
    ("order", "size", "alone"), [("rounds", 4, 1), ("rounds", 8, 2 / 3), ("spread", 8, 0)]
)
def test_steps_and_anchors_without_negatives_are_counted(order, size, alone):
    # in rounds, batches of four are of one class each, and of eight only the first has both
    target = np.array(["common"] * 20 + ["rare"] * 4)
    found = count_negatives(order, target, batch_size=size, seeds=[0, 1], epochs=2)
    assert found["steps"] == found["steps, triplets"] == alone
    assert found["anchors"] == pytest.approx(alone)


def test_mrr_is_of_rows_or_of_classes():
    target = np.array(["a", "a", "a", "b", "b", "alone"])
    scores = -torch.cdist(*[torch.tensor([[0.0], [1.0], [2.0], [2.9], [4.0], [9.0]])] * 2)
    # a: 1, 1, and second behind b; b: third, behind two of a, and first
    found = class_mrr(scores, target)
    assert found["mrr"] == pytest.approx((1 + 1 + 1 / 2 + 1 / 2 + 1) / 5)
    assert found["macro"] == pytest.approx(((1 + 1 + 1 / 2) / 3 + (1 / 2 + 1) / 2) / 2)


def write_model(folder):
    build_striped_hyena().save_pretrained(folder)
    CharTokenizer().save_pretrained(folder)
    return folder


def test_whole_run_measures_each_order_once(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    lines = ["sequence\tlabel"]
    for row in range(60):
        letters = rng.choice(list("ACGT"), size=20, p=[0.4, 0.1, 0.1, 0.4] if row % 5 else [0.25] * 4)
        lines.append(f"{''.join(letters)}\t{'AT' if row % 5 else 'even'}")
    (tmp_path / "at.tsv").write_text("\n".join(lines) + "\n")
    model = write_model(tmp_path / "model")
    arguments = [str(tmp_path / "at.tsv"), "--cache", str(tmp_path / "kept"), "--model", str(model),
                 "--quick", "--losses", "batch-hard triplets", "--results", str(tmp_path)]  # fmt: skip
    contrast_by_labels.main(arguments)
    stored = json.loads((tmp_path / "contrast_by_labels.json").read_text())
    assert [figure["value"] for figure in stored["figures"]] == [0, 0, 0]
    assert stored["settings"]["tables"] == ["at"]
    rows = stored["tables"]["MRR of test rows"]
    assert [(row["loss"], row["MRR"]) for row in rows] == [
        ("batch-hard triplets", title) for title in contrast_by_labels.AVERAGES.values()
    ]
    assert all(0 < float(row[name]) <= 1 for row in rows for name in ("untrained", "rounds", "spread"))

    monkeypatch.setattr(contrast_by_labels, "train_and_measure", None)  # what was trained is not again
    contrast_by_labels.main(arguments)
    assert json.loads((tmp_path / "contrast_by_labels.json").read_text())["tables"] == stored["tables"]
