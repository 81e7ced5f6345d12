"""Bits per base: each base is scored once, whatever the windows, as one pass over the contig does."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from types import SimpleNamespace

import bits_per_base
import pytest
import torch

from tests.tiny_models import build_striped_hyena

SEQUENCE = b"ACGGTTACNGATTACAGATTACAACGTTGCA" * 3


def num_scored(sequence: bytes) -> int:
    return len(sequence[1:].replace(b"N", b""))


class Previous:
    """Gives the next base a probability that depends on the current one only: windows cannot matter."""

    def __init__(self):
        self.shapes = []
        self.table_VV = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))

    def __call__(self, ids_BL):
        self.shapes.append(tuple(ids_BL.shape))
        return SimpleNamespace(logits=self.table_VV[ids_BL])

    def bits(self, sequence: bytes) -> list[float]:
        log_p = torch.log_softmax(self.table_VV.double(), dim=-1)
        pairs = pairwise(sequence)
        return [-float(log_p[a, b]) / math.log(2) for a, b in pairs if chr(b) in "ACGT"]


@pytest.mark.parametrize(
    ("window", "context", "rows"),
    [(1000, 500, 4), (93, 10, 2), (92, 10, 2), (20, 5, 3), (20, 19, 4), (20, 1, 1), (16, 8, 4)],
)
@pytest.mark.parametrize("length", [2, 12, 20, 21, 35, 36, 93])
def test_score_contig_scores_each_base_after_the_first_once(window, context, rows, length):
    model, sequence = Previous(), SEQUENCE[:length]
    expected = model.bits(sequence)
    bits, count = bits_per_base.score_contig(
        model, sequence, window=window, context=context, rows=rows, dtype=torch.float32
    )
    assert count == len(expected)
    assert bits == pytest.approx(sum(expected), rel=1e-5)
    assert all(shape[0] <= rows and shape[1] <= window for shape in model.shapes)


def test_score_contig_of_one_window_equals_the_loss_of_the_model():
    model = build_striped_hyena().eval()
    sequence = SEQUENCE.replace(b"N", b"")
    ids = torch.tensor([list(sequence)])
    with torch.inference_mode():
        loss = float(model(ids, labels=ids).loss)
    bits, count = bits_per_base.score_contig(
        model, sequence, window=512, context=256, rows=4, dtype=torch.float32
    )
    assert count == len(sequence) - 1
    assert bits / count == pytest.approx(loss / math.log(2), rel=1e-5)


def test_score_contig_of_one_base_scores_nothing():
    result = bits_per_base.score_contig(Previous(), b"A", window=8, context=4, rows=2, dtype=torch.float32)
    assert result == (0.0, 0)


def test_read_groups_keeps_contigs_under_the_first_word_of_their_header(tmp_path):
    path = tmp_path / "heldout.fa"
    path.write_text(">phage|x|1\nACGT\n>human|y|1\nGG\n>phage|z|2\nTT\n")
    assert bits_per_base.read_groups(path) == {"phage": [b"ACGT", b"TT"], "human": [b"GG"]}


def test_script_writes_figures_beside_markov_models(tmp_path, monkeypatch, capsys):
    build_striped_hyena().save_pretrained(tmp_path / "model")
    contig = SEQUENCE.decode()
    (tmp_path / "heldout.fa").write_text(
        f">phage|x|1\n{contig}\n>phage|x|2\n{contig}\n>human|y|1\n{contig[:50]}\n"
    )
    figures = {name: {"3": 1.9, "11": 2.5} for name in ("phage", "human", "mean of groups", "all bases")}
    (tmp_path / "markov.json").write_text(json.dumps({"bits_per_base": {"interpolated": figures}}))
    monkeypatch.setattr(
        sys, "argv",
        ["bits_per_base.py", str(tmp_path / "model"), "--heldout", str(tmp_path / "heldout.fa"),
         "--window", "32", "--context", "16", "--dtype", "float32", "--limit", "100",
         "--markov", str(tmp_path / "markov.json"), "--json", str(tmp_path / "out.json")],
    )  # fmt: skip
    bits_per_base.main()
    summary = json.loads((tmp_path / "out.json").read_text())
    groups = summary["groups"]
    first = num_scored(SEQUENCE)
    assert groups["phage"]["bases"] == first + num_scored(SEQUENCE[: 100 - first]) <= 100
    assert groups["human"]["bases"] == num_scored(SEQUENCE[:50])
    rates = [entry["bits_per_base"] for entry in groups.values()]
    assert all(5 < rate < 13 for rate in rates)
    assert summary["mean_of_groups"] == pytest.approx(sum(rates) / 2)
    total = sum(entry["bits_per_base"] * entry["bases"] for entry in groups.values())
    assert summary["all_bases"] == pytest.approx(total / sum(entry["bases"] for entry in groups.values()))
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| phage |")]
    rate = groups["phage"]["bits_per_base"]
    assert row == f"| phage | {rate:.4f} | 1.9000 (3) | {rate - 1.9:+.4f} | 1.9000 | 2.5000 |"
