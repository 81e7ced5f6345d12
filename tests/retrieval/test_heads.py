"""Retrieval heads: padding changes nothing, no position is dropped, terms weigh at their strongest place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.config.retrieval import M3HeadsConfig
from genoembed.errors import ConfigError, ShapeError
from genoembed.pooling.reduce import pool
from genoembed.retrieval.heads import DenseHead, M3Heads, MultiVectorHead, SparseHead, set_trainable
from genoembed.retrieval.m3 import M3Vectors, head_scores, join_vectors, multi_vector_scores
from genoembed.retrieval.terms import NO_TERM, KmerTerms, TokenTerms, collate_terms

WIDTH = 6


def hidden(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "expected"),
    [("mean", [3, 4, 5]), ("weighted_mean", [4, 5, 6]), ("first", [0, 1, 2]), ("last", [6, 7, 8])],
)
def test_pooling_is_that_of_e5_and_leaves_the_mask_alone(method, expected):
    states = torch.arange(12, dtype=torch.float64).reshape(1, 4, 3)
    mask = torch.tensor([[True, True, True, False]])
    before = mask.clone()
    assert pool(states, mask, method=method).tolist() == [expected]
    head = DenseHead(3, pooling=method, normalize=False)
    assert head(states, mask).tolist() == [expected]
    assert torch.equal(mask, before)
    # padded on the left, the first token is still the first real one
    left = pool(states.roll(1, dims=1), mask.roll(1, dims=1), method=method)
    assert left.tolist() == [expected]


def batch(lengths, padding=0, left=False):
    """Rows of these lengths, the same numbers whatever the padding."""
    width = max(lengths) + padding
    states = torch.full((len(lengths), width, WIDTH), 50.0, dtype=torch.float64)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    positions = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    ids = torch.full((len(lengths), max(lengths)), NO_TERM)
    for row, length in enumerate(lengths):
        start = width - length if left else 0
        states[row, start : start + length] = hidden(length, WIDTH, seed=row)
        mask[row, start : start + length] = True
        ids[row, :length] = torch.arange(length) % 4
        positions[row, :length] = torch.arange(start, start + length)
    return states, mask, TokenTerms(ids=ids, positions=positions)


def spread_heads(**config):
    heads = M3Heads(WIDTH, M3HeadsConfig(**config)).double()
    for seed, parameter in enumerate(heads.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    return heads


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(2, 7), min_size=2, max_size=3),
    st.integers(1, 5),
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 1),
)
def test_scores_do_not_depend_on_padding(lengths, padding, left, window, skip_first):
    heads = spread_heads(vector_window=window, skip_first=skip_first)
    scores = []
    for pad, on_left in ((0, False), (padding, left)):
        states, mask, terms = batch(lengths, pad, on_left)
        made = heads(states, mask, terms=terms)
        scores.append(head_scores(made, made))
    assert set(scores[0]) == {"dense", "sparse", "multi_vector"}
    for name, expected in scores[0].items():
        torch.testing.assert_close(scores[1][name], expected, msg=name)


def test_multi_vector_head_keeps_every_position():
    states, mask, _ = batch([5, 3])
    head = spread_heads(vector_window=1).multi_vector
    vectors, kept = head(states, mask)
    assert torch.equal(kept, mask)
    assert vectors[mask].norm(dim=-1).tolist() == pytest.approx([1] * 8)
    assert bool((vectors[~mask] == 0).all())
    # the first base takes part
    moved = states.clone()
    moved[0, 0] += 1
    assert not torch.equal(head(moved, mask)[0][0, 0], vectors[0, 0])


def test_multi_vector_head_averages_windows_and_keeps_the_last():
    states, mask, _ = batch([5, 3])
    head = spread_heads(vector_window=2).multi_vector
    vectors, kept = head(states, mask)
    assert kept.tolist() == [[True, True, True], [True, True, False]]
    whole = MultiVectorHead(WIDTH).double()
    whole.load_state_dict(head.state_dict())
    means = torch.stack([states[0, :2].mean(0), states[0, 2:4].mean(0), states[0, 4]])
    expected, _ = whole(means[None], torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(vectors[:1], expected)


def test_max_sim_equals_the_loop_and_never_looks_at_padding():
    query, passage = hidden(2, 3, 4), -hidden(3, 5, 4, seed=1).abs()
    query = query.abs()  # every dot product is negative: a zero vector would win
    query_mask = torch.tensor([[True, True, True], [True, False, True]])
    passage_mask = torch.arange(5) < torch.tensor([[5], [2], [1]])
    found = multi_vector_scores(query, query_mask, passage, passage_mask)
    for i in range(2):
        for j in range(3):
            rows = query[i][query_mask[i]] @ passage[j][passage_mask[j]].T
            assert float(found[i, j]) == pytest.approx(float(rows.max(1).values.mean()))
    assert bool((found < 0).all())
    with pytest.raises(ShapeError, match=r"passage rows \[1\]: no vector is kept"):
        multi_vector_scores(
            query, query_mask, passage, passage_mask & torch.tensor([[True], [False], [True]])
        )


def test_sparse_head_takes_the_strongest_place_of_a_term():
    head = SparseHead(1, normalize=False).double()
    torch.nn.init.ones_(head.linear.weight)
    torch.nn.init.zeros_(head.linear.bias)
    states = torch.tensor([[[2.0], [5.0], [-3.0], [1.0]]], dtype=torch.float64)
    terms = TokenTerms(ids=torch.tensor([[9, 9, 4, NO_TERM]]), positions=torch.tensor([[0, 1, 2, 3]]))
    ids, weights = head(states, terms)
    assert ids.tolist() == [[4, 9]]
    assert weights.tolist() == [[0.0, 5.0]]


def test_sparse_head_starts_as_the_overlap_of_k_mers():
    kmers = KmerTerms(k=5)
    sequences = [b"ACGTTGCAACGTAGGATC", b"TTGCAACGTAG", b"CCCCCCCCCC", b"AC"]
    terms = collate_terms(sequences, kmers)
    head = SparseHead(4)
    ids, weights = head(hidden(4, 18, 4).float(), terms)
    made = M3Vectors(term_ids=ids, term_weights=weights)
    scores = head_scores(made, made)["sparse"].detach()
    sets = [set(kmers.of(sequence).tolist()) - {NO_TERM} for sequence in sequences]
    for i, first in enumerate(sets):
        for j, second in enumerate(sets):
            size = (len(first) * len(second)) ** 0.5
            expected = len(first & second) / size if size else 0.0
            assert float(scores[i, j]) == pytest.approx(expected, abs=1e-6)
    assert float(scores[0, 1]) > 0.5


def test_sparse_head_refuses_terms_of_other_rows():
    terms = TokenTerms(ids=torch.tensor([[1]]), positions=torch.tensor([[7]]))
    with pytest.raises(ShapeError, match="up to position 7 for hidden states"):
        SparseHead(4)(torch.zeros(1, 3, 4), terms)


def test_join_vectors_pads_chunks_to_the_longest():
    heads = spread_heads(vector_window=1)
    lengths = [5, 4, 2]
    whole_input = batch(lengths)
    whole = heads(whole_input[0], whole_input[1], terms=whole_input[2])
    chunks = []
    for row, length in enumerate(lengths):
        states, mask, terms = (
            whole_input[0][row : row + 1, :length],
            whole_input[1][row : row + 1, :length],
            None,
        )
        terms = TokenTerms(
            ids=whole_input[2].ids[row : row + 1, :length],
            positions=whole_input[2].positions[row : row + 1, :length],
        )
        chunks.append(heads(states, mask, terms=terms).tensors())
    joined = join_vectors(chunks)
    for name, scores in head_scores(whole, whole).items():
        torch.testing.assert_close(head_scores(joined, joined)[name], scores, msg=name)


@pytest.mark.parametrize(
    ("mode", "learns"),
    [
        ("all", {"encoder", "dense", "sparse", "multi_vector"}),
        ("fix_encoder", {"sparse", "multi_vector"}),
        ("dense", {"encoder", "dense"}),
    ],
)
def test_modes_let_their_parameters_learn(mode, learns):
    encoder = torch.nn.Linear(2, 2)
    heads = M3Heads(2, M3HeadsConfig(add_pooler=True), mode=mode)
    set_trainable(encoder, heads)
    named = [("encoder." + n, p) for n, p in encoder.named_parameters()] + list(heads.named_parameters())
    assert {name.split(".")[0] for name, p in named if p.requires_grad} == learns


def test_dense_head_pooler_is_off_by_default():
    assert dict(DenseHead(4).state_dict()) == {}
    states, mask, _ = batch([4, 3])
    plain, pooled = DenseHead(WIDTH), DenseHead(WIDTH, add_pooler=True).double()
    torch.testing.assert_close(plain(states, mask), pooled(states, mask))


def test_heads_config_and_vectors_refuse_what_does_not_fit():
    with pytest.raises(ConfigError, match="vector_window to 1 or more tokens"):
        M3HeadsConfig(vector_window=0)
    with pytest.raises(ShapeError, match="term_ids and term_weights, expected both"):
        M3Vectors(term_ids=torch.zeros(1, 1))
    with pytest.raises(ShapeError, match="tokens and token_mask, expected both"):
        M3Vectors(tokens=torch.zeros(1, 1, 1))
