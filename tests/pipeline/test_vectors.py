"""Vectors of pieces: found again by number, side by side in one matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.pipeline.assemble import PieceVectors


@settings(max_examples=60)
@given(
    batches=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    expected_pieces=st.integers(0, 12),
    picks=st.lists(st.integers(0, 10**6), max_size=8),
)
def test_pooled_vectors_are_found_by_number(batches, expected_pieces, picks):
    """Also where more pieces come than were expected."""
    held = PieceVectors(expected_pieces)
    given_rows = {"a": [], "b": []}
    numbers = []
    for count in batches:
        made = {layer: torch.randn(count, width) for layer, width in (("a", 3), ("b", 2))}
        numbers.extend(held.add(made))
        for layer, rows in made.items():
            given_rows[layer].extend(rows.clone())
            rows.fill_(torch.nan)  # what was handed over may be gone
    assert numbers == list(range(sum(batches)))
    wanted = [pick % len(numbers) for pick in picks]
    for layer, rows in given_rows.items():
        found = held.pooled(layer, numbers)
        assert torch.equal(found, torch.stack(rows))
        found.fill_(0)  # a copy
        if wanted:
            assert torch.equal(held.pooled(layer, wanted), torch.stack([rows[number] for number in wanted]))


def test_pooled_vectors_take_one_matrix_a_layer():
    held = PieceVectors(100)
    for _ in range(20):
        held.add({"a": torch.ones(5, 3), "b": torch.ones(5, 2)})
    assert {layer: [tuple(block.shape) for block in blocks] for layer, blocks in held._blocks.items()} == {
        "a": [(100, 3)],
        "b": [(100, 2)],
    }


def test_token_vectors_are_joined_in_the_order_asked_for():
    held = PieceVectors(3)
    tokens = [torch.full((length, 2), float(length)) for length in (1, 2, 3)]
    assert list(held.add({"a": tuple(tokens[:2])})) == [0, 1]
    assert list(held.add({"a": tuple(tokens[2:])})) == [2]
    assert held.tokens("a", [2, 0])[:, 0].tolist() == [3.0, 3.0, 3.0, 1.0]
    assert held.num_tokens("a", [2, 0]) == 4


def test_unknown_layer_is_a_mistake_of_ours():
    with pytest.raises(KeyError, match="b"):
        PieceVectors(1).pooled("b", [0])
