"""The packing benchmark counts padding right, and writes what it measures."""

from __future__ import annotations

import json

import packing
import pytest


def test_piece_lengths_cut_at_the_window_and_count_eod():
    assert packing.piece_lengths([b"A" * 9, b"A" * 8, b"A" * 3, b"A" * 4], 5) == [5, 5, 5, 4, 4, 5]


def test_padded_slots_pad_each_batch_to_its_longest():
    assert packing.padded_slots([1, 5, 2, 2, 2, 2, 2, 2, 7]) == 8 * 5 + 7


def test_grouping_keeps_every_length_and_sorts_within_groups():
    lengths = list(range(1000))
    grouped = packing.grouped_by_length(lengths)
    size = packing.ROWS_PER_BATCH * packing.BATCHES_PER_GROUP
    assert sorted(grouped) == lengths
    groups = [grouped[at : at + size] for at in range(0, 1000, size)]
    assert len(groups) == 3
    assert all(group == sorted(group, reverse=True) for group in groups)
    assert packing.padded_slots(grouped) < packing.padded_slots(lengths[::37] * 37)


def test_packing_benchmark_writes_its_figures(tmp_path, capsys):
    path = tmp_path / "a.fa"
    path.write_text("".join(f">r{n}\n{'ACGT' * (n % 40 + 1)}\n" for n in range(200)))
    packing.main([str(path), "--window", "64", "--output", str(tmp_path / "out.json"), "--note", "busy"])
    figures = json.loads((tmp_path / "out.json").read_text())
    tokens = sum(4 * (n % 40 + 1) + 1 for n in range(200))
    rows = -(-tokens // 64)
    assert figures["packed"]["pack_stream"]["efficiency"] == pytest.approx(tokens / (rows * 64))
    assert (
        figures["padded"]["padded_to_window"] < figures["packed"]["pack_bins, buffer 4096"]["efficiency"] < 1
    )
    assert figures["note"] == "busy"
    assert (tmp_path / "out.md").read_text() == capsys.readouterr().out.removesuffix("\n")
