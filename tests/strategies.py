"""Hypothesis strategies for sequences, lengths and masks."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st


def dna(min_size=0, max_size=200, letters="ACGTN"):
    """Sequences as bytes."""
    return st.text(letters, min_size=min_size, max_size=max_size).map(str.encode)


def dna_lists(max_sequences=8, min_size=1, max_size=60):
    """Several sequences, none empty unless ``min_size`` is 0."""
    return st.lists(dna(min_size=min_size, max_size=max_size), min_size=1, max_size=max_sequences)


def lengths(max_length=100, max_count=40):
    """Lengths of pieces, in tokens."""
    return st.lists(st.integers(1, max_length), max_size=max_count)


@st.composite
def hidden_and_mask(draw, max_rows=4, max_length=12, max_width=5):
    """Float64 hidden states (B, L, D) and a mask (B, L) that keeps a token in each row."""
    rows, length, width = (draw(st.integers(1, high)) for high in (max_rows, max_length, max_width))
    seed = draw(st.integers(0, 2**32 - 1))
    hidden = np.random.default_rng(seed).normal(scale=10.0, size=(rows, length, width))
    masks = st.lists(st.booleans(), min_size=length, max_size=length).filter(any)
    mask = np.array([draw(masks) for _ in range(rows)])
    return hidden, mask
