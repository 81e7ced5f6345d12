"""Markov models against counts made by hand, one base at a time."""

from __future__ import annotations

import json
import math
import re
from collections import Counter

import markov
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SEQUENCES = st.lists(st.text("ACGTN", max_size=40).map(str.encode), min_size=1, max_size=4)


def count_by_hand(sequences, order):
    counts = Counter()
    for sequence in sequences:
        for at in range(len(sequence) - order):
            kmer = sequence[at : at + order + 1].decode()
            if set(kmer) <= set("ACGT"):
                counts[kmer] += 1
    return counts


def kmer_name(code, order):
    return "".join("ACGT"[code >> 2 * (order - place) & 3] for place in range(order + 1))


@settings(max_examples=40)
@given(SEQUENCES, st.integers(0, 3))
def test_count_kmers_equals_counting_by_hand(sequences, order):
    counts = markov.count_kmers(markov.encode(sequences), order)
    named = {kmer_name(code, order): int(n) for code, n in enumerate(counts) if n}
    assert named == count_by_hand(sequences, order)


def test_count_kmers_does_not_depend_on_chunks(monkeypatch):
    codes = markov.encode([b"ACGTTGCANGGATCCA" * 5, b"TTTACG"])
    whole = markov.count_kmers(codes, 3)
    monkeypatch.setattr(markov, "CHUNK", 7)
    assert whole.sum() > 0
    np.testing.assert_array_equal(markov.count_kmers(codes, 3), whole)


def test_add_reverse_complements_equals_counting_both_strands():
    forward, reverse = b"AACGTGGA", b"TCCACGTT"
    both = markov.count_kmers(markov.encode([forward, reverse]), 2)
    np.testing.assert_array_equal(
        markov.add_reverse_complements(markov.count_kmers(markov.encode([forward]), 2), 2), both
    )


def test_scored_positions_stop_at_breaks_and_unknown_letters():
    positions = markov.scored_positions(markov.encode([b"ACGNT", b"GG"]), 2)
    assert positions.history.tolist() == [0, 1, 2, 0, 0, 1]
    assert (positions.kmers & 3).tolist() == [0, 1, 2, 3, 2, 2]


def test_plain_bits_are_smoothed_counts_with_the_longest_order_there_is():
    train, scored = b"ACACACAG", b"CA"
    model = markov.fit(markov.encode([train]), markov.encode([b"ACGT"]), order=1, both_strands=False)
    bits = model.bits(markov.scored_positions(markov.encode([scored]), 1))["plain"]
    # pairs AC 3, CA 3, AG 1; order 0 is their second base: A 3, C 3, G 1
    first, second = -math.log2((3 + 0.5) / (7 + 2)), -math.log2((3 + 0.5) / (3 + 2))
    np.testing.assert_allclose(bits[1], [first, second])


@pytest.mark.parametrize("both_strands", [False, True])
def test_interpolated_probabilities_sum_to_one(both_strands):
    rng = np.random.default_rng(5)
    train, tune = (bytes(rng.choice(list(b"ACGT"), n).astype(np.uint8)) for n in (3000, 400))
    model = markov.fit(markov.encode([train]), markov.encode([tune]), order=4, both_strands=both_strands)
    last_base = markov.scored_positions(markov.encode([b"GATC" + bytes([x]) for x in b"ACGT"]), 4)
    ends = last_base.history == 4
    assert ends.sum() == 4
    for kind in ("plain", "interpolated"):
        total = (2.0 ** -model.bits(last_base)[kind][:, ends]).sum(axis=1)
        np.testing.assert_allclose(total, 1.0)


def test_structure_is_learned_and_noise_costs_two_bits():
    rng = np.random.default_rng(6)
    noise, fresh = (bytes(rng.choice(list(b"ACGT"), 600_000).astype(np.uint8)) for _ in range(2))
    cycle = b"ACGGT" * 120_000
    for train, scored, lowest, highest in ((noise, fresh, 1.999, 2.01), (cycle, cycle[:1000], 0.0, 0.05)):
        model, _ = markov.choose_model([train], order=5, strands="better")
        figures = markov.measure(model, {"x": [scored]})
        row = markov.tabulate(figures["interpolated"], [5])["all bases"]
        assert lowest <= row["5"] <= highest


def test_better_strands_are_both_where_both_look_alike():
    forward = bytes(np.random.default_rng(8).choice(list(b"ACGT"), 20_000).astype(np.uint8))
    reverse = forward.translate(bytes.maketrans(b"ACGT", b"TGCA"))[::-1]
    # the fortieth piece, on which strands are chosen, is the other strand of the first two
    train = [forward, b"A" * 370_000, reverse[:10_000]]
    assert markov.choose_model(train, order=5, strands="better")[1] == "both"
    assert markov.choose_model(train, order=5, strands="forward")[1] == "forward"


def test_choose_model_refuses_training_sequence_without_a_tuning_slice():
    with pytest.raises(ValueError, match="training sequence: 39 pieces of 10000 bases, expected 40 or more"):
        markov.choose_model([b"ACGT" * 97_000], order=2, strands="both")


def test_split_tuning_loses_nothing():
    sequences = [b"A" * 250_000, b"C" * 150_001]
    count, tune = markov.split_tuning(sequences)
    assert sum(map(len, count)) + sum(map(len, tune)) == 400_001
    assert len(tune) == 1


def test_main_writes_the_printed_figures(tmp_path, capsys):
    rng = np.random.default_rng(7)
    text = rng.choice(list("ACGT"), 500_000)
    (tmp_path / "train.fa").write_text(">a|t|1\n" + "".join(text) + "\n")
    (tmp_path / "held.fa").write_text(">a|t|2\nACGTACGT\n>b|t|1\nGGGATTTACCA\n")
    words = ["--train", str(tmp_path / "train.fa"), "--heldout", str(tmp_path / "held.fa"), "--groups"]
    markov.main([*words, "--orders", "2", "3", "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["bases"] == {"a": 8, "b": 11, "all bases": 19}
    rows = result["bits_per_base"]["interpolated"]
    expected = (8 * rows["a"]["3"] + 11 * rows["b"]["3"]) / 19
    assert rows["all bases"]["3"] == pytest.approx(expected, abs=1e-4)
    assert rows["mean of groups"]["2"] == pytest.approx((rows["a"]["2"] + rows["b"]["2"]) / 2, abs=1e-4)
    printed = capsys.readouterr().out
    assert re.search(rf"^\| b \| 11 \| {rows['b']['2']:.4f} \| {rows['b']['3']:.4f} \|$", printed, re.M)
