"""Packed neighbors see nothing of each other: same values as alone, and gradients of exactly zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import ShapeError
from genoembed.models.striped_hyena2.operators import causal_convolution, causal_fir, modal_convolution
from genoembed.models.striped_hyena2.state import lay_out_segments
from tests.tiny_models import two_of_each_kind

if TYPE_CHECKING:
    from genoembed import StripedHyena2ForCausalLM

WIDTH = 8
LENGTHS = (5, 64, 1, 63, 130, 65)


@pytest.fixture(scope="module")
def model() -> StripedHyena2ForCausalLM:
    return two_of_each_kind()


def packed_rows(*rows: tuple[int, ...], length: int) -> torch.Tensor:
    """Segment ids of rows whose segments have these lengths; the rest is padding."""
    ids = torch.full((len(rows), length), -1)
    for row, sizes in enumerate(rows):
        numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        ids[row, : len(numbers)] = numbers
    return ids


def segments_of(segment_ids: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    return [
        (row, (segment_ids[row] == number).nonzero()[:, 0])
        for row in range(len(segment_ids))
        for number in segment_ids[row].unique().tolist()
        if number >= 0
    ]


OPERATORS = {
    "fir": lambda x, starts: causal_fir(x, TAPS[:, :7], starts_BM=starts),
    "convolution": lambda x, starts: causal_convolution(
        x, TAPS, torch.ones(WIDTH).double(), starts_BM=starts
    ),
    "modal": lambda x, starts: modal_convolution(
        x,
        -TAPS[:, :4].abs().repeat_interleave(2, 0),
        TAPS[:, 4:8].repeat_interleave(2, 0),
        torch.ones(WIDTH),
        starts_BM=starts,
    ),
}
TAPS = torch.randn(4, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_operator_gives_each_segment_what_it_gives_it_alone(operator, chunk):
    apply = OPERATORS[operator]
    layout = lay_out_segments(packed_rows(LENGTHS, length=400), chunk=chunk)
    rows = torch.randn(1, 400, WIDTH, dtype=torch.float64, requires_grad=True)
    result = layout.collect(apply(layout.spread(rows), layout.starts_1M))
    seen = 0
    for _, places in segments_of(packed_rows(LENGTHS, length=400)):
        alone = apply(rows[:, places], None)
        torch.testing.assert_close(result[:, places], alone, rtol=1e-10, atol=1e-10)
        (gradient,) = torch.autograd.grad(result[:, places].square().sum(), rows, retain_graph=True)
        others = torch.ones(400, dtype=torch.bool).index_fill(0, places, value=False)
        assert torch.equal(gradient[:, others], torch.zeros_like(gradient[:, others]))
        assert bool((gradient[:, places] != 0).any())
        seen += 1
    assert seen == len(LENGTHS)


def test_model_gives_each_segment_what_it_gives_it_alone(model):
    segment_ids = packed_rows(LENGTHS, (200, 100), length=330)
    input_ids = torch.randint(65, 85, segment_ids.shape, generator=torch.Generator().manual_seed(2))
    embedded = model.embedding_layer(input_ids).detach().requires_grad_()
    output = model(inputs_embeds=embedded, segment_ids=segment_ids, output_hidden_states=True)
    found = segments_of(segment_ids)
    assert len(found) == len(LENGTHS) + 2
    for row, places in found:
        alone = model(input_ids[row, places][None], output_hidden_states=True)
        torch.testing.assert_close(output.logits[row, places], alone.logits[0], rtol=0, atol=1e-5)
        for ours, theirs in zip(output.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(ours[row, places], theirs[0], rtol=0, atol=1e-5)
        (gradient,) = torch.autograd.grad(
            output.logits[row, places].square().sum(), embedded, retain_graph=True
        )
        others = torch.ones_like(segment_ids, dtype=torch.bool)
        others[row, places] = False
        assert not gradient[others].any()
        assert gradient[row, places].any()


def test_model_leaks_between_packed_segments_without_segment_ids(model):
    segment_ids = packed_rows((100, 100), length=200)
    input_ids = torch.randint(65, 85, (1, 200), generator=torch.Generator().manual_seed(3))
    leaking = model(input_ids).logits
    apart = model(input_ids, segment_ids=segment_ids).logits
    torch.testing.assert_close(leaking[:, :100], apart[:, :100], rtol=0, atol=1e-5)
    assert (leaking[:, 100:] - apart[:, 100:]).abs().max() > 1e-2


def test_segments_are_kept_apart_in_bfloat16_too(model):
    segment_ids = packed_rows((70, 90), length=160)
    input_ids = torch.randint(65, 85, (1, 160), generator=torch.Generator().manual_seed(4))
    changed = input_ids.clone()
    changed[:, :70] = 65
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(input_ids, segment_ids=segment_ids).logits
        after = model(changed, segment_ids=segment_ids).logits
    assert torch.equal(before[:, 70:], after[:, 70:])
    assert not torch.equal(before[:, :70], after[:, :70])


@settings(max_examples=40)
@given(
    rows=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=4), min_size=1, max_size=3),
    chunk=st.integers(1, 9),
)
def test_layout_holds_every_token_once_and_starts_segments_at_chunks(rows, chunk):
    length = max(map(sum, rows)) + 1
    segment_ids = packed_rows(*map(tuple, rows), length=length)
    layout = lay_out_segments(segment_ids, chunk=chunk)
    tokens = torch.arange(1.0, segment_ids.numel() + 1).view(*segment_ids.shape, 1)
    spread = layout.spread(tokens)
    back = layout.collect(spread)[..., 0]
    assert torch.equal(back, tokens[..., 0].where(segment_ids >= 0, 0))
    sizes = [size for row in rows for size in row]
    assert layout.lengths == tuple(-(-size // chunk) * chunk for size in sizes)
    assert int((spread > 0).sum()) == sum(sizes)
    assert int(layout.starts_1M.sum()) == len(sizes)
    assert layout.starts_1M.shape[1] * chunk == sum(layout.lengths) == layout.position_ids_1N.shape[1]


def test_segment_ids_of_another_shape_are_refused(model):
    with pytest.raises(ShapeError, match="segment_ids has shape"):
        model(torch.ones(1, 5, dtype=torch.long), segment_ids=torch.zeros(1, 4, dtype=torch.long))
