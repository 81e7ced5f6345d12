"""Windows of long passages: the reranker's spans, every token covered, the best window's score."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import SequenceLengthError, ShapeError
from genoembed.finetuning.windowed import best_window_scores, passage_spans

GOLDEN = Path(__file__).parents[1] / "golden" / "losses" / "values.json"
RERANKER = json.loads(GOLDEN.read_text())["reranker_windows"]


def test_passage_spans_are_those_of_the_reranker():
    shape = {key: RERANKER[key] for key in ("context", "query_tokens", "special_tokens")}
    spans = [passage_spans(length, **shape) for length in RERANKER["passages"]]
    found = [[span.start, span.end] for windows in spans for span in windows]
    assert found == RERANKER["spans"]
    beside = shape["query_tokens"] + shape["special_tokens"]
    assert [end - start + beside for start, end in found] == RERANKER["total_tokens"]
    owners = [passage for passage, windows in enumerate(spans) for _ in windows]
    assert owners == RERANKER["windows_of_passage"]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 3000), st.integers(1, 600))
def test_passage_spans_cover_every_token_and_end_with_the_passage(length, window):
    spans = passage_spans(length, context=window)
    assert spans[0].start == 0
    assert spans[-1].end == length
    for before, after in itertools.pairwise(spans):
        assert before.end - after.start == min(80, window // 4)
        assert before.end - before.start == window
        assert before.end < length


@pytest.mark.parametrize(("length", "context"), [(0, 10), (5, 7)])
def test_passage_spans_refuse_what_does_not_fit(length, context):
    with pytest.raises(SequenceLengthError, match="expected 1 or more of each; shorten the query"):
        passage_spans(length, context=context, query_tokens=5, special_tokens=2)


def test_best_window_scores_are_maxima_and_carry_the_gradient():
    scores = torch.tensor([[-0.5, -0.2, -0.9, 3.0], [1.0, 0.0, 2.0, -1.0]], requires_grad=True)
    best = best_window_scores(scores, torch.tensor([0, 0, 0, 1]), num_passages=2)
    assert best.tolist() == [pytest.approx([-0.2, 3.0]), [2.0, -1.0]]
    best.sum().backward()
    assert scores.grad.tolist() == [[0, 1, 0, 1], [0, 0, 1, 1]]


def test_best_window_scores_refuse_a_passage_without_a_window():
    with pytest.raises(ShapeError, match=r"of passages \[0, 2\], expected one or more for each of 3"):
        best_window_scores(torch.zeros(2), torch.tensor([0, 2]), num_passages=3)
