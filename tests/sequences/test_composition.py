"""Plain sequence features, against slow counting."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import ConfigError, EmptyRecordError, SequenceLengthError
from genoembed.sequences.composition import (
    BASELINES,
    composition,
    kmer_frequencies,
    one_hot,
    usable_baselines,
)

letters = st.text(alphabet="ACGTNacgu", min_size=1, max_size=60)


@settings(deadline=None, max_examples=60)
@given(text=letters, k=st.integers(1, 4))
def test_kmer_frequencies_equal_counting_by_hand(text, k):
    clean = text.upper().replace("U", "T")
    pieces = [clean[at : at + k] for at in range(len(clean) - k + 1)]
    counts = Counter(piece for piece in pieces if "N" not in piece)
    kmers = ["".join(kmer) for kmer in product("ACGT", repeat=k)]
    expected = [counts[kmer] / max(sum(counts.values()), 1) for kmer in kmers]
    np.testing.assert_allclose(kmer_frequencies([text.encode()], k=k)[0], expected, atol=1e-7)


@settings(deadline=None, max_examples=60)
@given(text=letters)
def test_composition_equals_counting_by_hand(text):
    clean = text.upper()
    known = sum(clean.count(letter) for letter in "ACGTU")
    expected = [sum(map(clean.count, "GC")) / max(known, 1), np.log(len(text))]
    np.testing.assert_allclose(composition([text.encode()])[0], expected, rtol=1e-6)


def test_one_hot_marks_one_letter_a_position():
    matrix = one_hot([b"acgu", b"TNAA"])
    assert matrix[0].reshape(4, 4).argmax(1).tolist() == [0, 1, 2, 3]
    assert matrix[1].reshape(4, 4).sum(1).tolist() == [1, 0, 1, 1]


def test_one_hot_is_a_baseline_of_short_sequences_of_one_length():
    assert "one-hot letters" not in usable_baselines([b"ACG", b"AC"])
    assert usable_baselines([b"ACG", b"ACT"]) == usable_baselines([b"A" * 1024]) == tuple(BASELINES)
    assert "one-hot letters" not in usable_baselines([b"A" * 1025])


def test_baselines_say_what_does_not_fit():
    with pytest.raises(SequenceLengthError, match="lengths from 2 to 3"):
        one_hot([b"ACG", b"AC"])
    with pytest.raises(ConfigError, match="k: 9, expected 1 to 8"):
        kmer_frequencies([b"ACG"], k=9)
    with pytest.raises(EmptyRecordError, match="sequence 1: no letters"):
        composition([b"A", b""])


def test_one_hot_of_nothing_is_empty():
    assert one_hot([]).shape == (0, 0)
