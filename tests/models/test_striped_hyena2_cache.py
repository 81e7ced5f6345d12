"""A sequence in blocks of any size gives what it gives at once; generate goes on, not back to the start."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import ShapeError
from genoembed.models.striped_hyena2 import blocks
from genoembed.models.striped_hyena2.operators import (
    causal_convolution,
    causal_fir,
    modal_convolution,
    modal_convolution_from,
)
from genoembed.models.striped_hyena2.state import StripedHyena2Cache, last_positions
from tests.tiny_models import letters, two_of_each_kind

if TYPE_CHECKING:
    from genoembed import StripedHyena2ForCausalLM

WIDTH = 6


@pytest.fixture(scope="module")
def model() -> StripedHyena2ForCausalLM:
    return two_of_each_kind()


cuts = st.lists(st.integers(1, 330), max_size=5, unique=True).map(sorted)


def cut(tensor: torch.Tensor, places: list[int]) -> list[torch.Tensor]:
    """Cut positions at these places; none beyond the end."""
    length = tensor.shape[1]
    edges = [0, *(place for place in places if place < length), length]
    return [tensor[:, a:b] for a, b in itertools.pairwise(edges)]


@given(places=cuts, length=st.integers(1, 340), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_operators_go_on_from_any_block(places, length, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64)
    taps, many = torch.randn(2, 7, dtype=torch.float64), torch.randn(3, 128, dtype=torch.float64)
    poles = -torch.logspace(-4, 0.5, WIDTH * 4, dtype=torch.float64).view(WIDTH, 4)
    residues, skip = torch.randn(WIDTH, 4, dtype=torch.float64), torch.randn(WIDTH, dtype=torch.float64)
    short = long = state = None
    outputs: dict[str, list[torch.Tensor]] = {"fir": [], "convolution": [], "modal": []}
    blocks = cut(x, places)
    for block in blocks:
        outputs["fir"].append(causal_fir(block, taps, history=short))
        outputs["convolution"].append(causal_convolution(block, many, skip, history=long))
        modal = modal_convolution_from(block, poles, residues, skip, state_BDS=state)
        outputs["modal"].append(modal.output)
        short = last_positions(short, block, count=6)
        long = last_positions(long, block, count=127)
        state = modal.state_BDS
    whole = {
        "fir": causal_fir(x, taps),
        "convolution": causal_convolution(x, many, skip),
        "modal": modal_convolution(x, poles, residues, skip),
    }
    for name, parts in outputs.items():
        assert torch.allclose(torch.cat(parts, dim=1), whole[name], atol=1e-10), (name, places)
    # a state does not grow with what it has seen
    assert short.shape == (2, 6, WIDTH)
    assert long.shape == (2, 127, WIDTH)
    assert state.shape == (2, WIDTH, 4)


@given(places=cuts, length=st.integers(1, 300), padding=st.sampled_from([0, 0, 1, 5, 40]))
@settings(max_examples=20, deadline=None)
@torch.inference_mode()
def test_model_in_blocks_equals_model_at_once(model, places, length, padding) -> None:
    ids = letters(2, length, seed=length)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    if padding >= length:
        mask[1] = 1
    whole = model(ids, attention_mask=mask, output_hidden_states=True)
    cache, logits, streams, seen = StripedHyena2Cache(), [], [], 0
    for block in cut(ids, places):
        seen += block.shape[1]
        output = model(block, attention_mask=mask[:, :seen], past_key_values=cache, output_hidden_states=True)
        assert output.past_key_values is cache
        assert cache.get_seq_length() == seen
        logits.append(output.logits)
        streams.append(output.hidden_states)
    is_real = mask.bool()
    joined = torch.cat(logits, dim=1)
    assert (joined - whole.logits)[is_real].abs().max() < 1e-5 * whole.logits.abs().max()
    for layer, expected in enumerate(whole.hidden_states):
        stream = torch.cat([block[layer] for block in streams], dim=1)
        assert (stream - expected)[is_real].abs().max() < 1e-5 * expected.abs().max(), layer


@torch.inference_mode()
def test_masked_queries_in_slices_equal_one_product(model, monkeypatch) -> None:
    ids, mask = letters(1, 130), torch.ones(1, 130)
    mask[0, :9] = 0
    cache = StripedHyena2Cache()
    model(ids[:, :60], attention_mask=mask[:, :60], past_key_values=cache)
    monkeypatch.setattr(blocks, "_MAX_MASK_ELEMENTS", 1000)  # seven queries at a time
    second = model(ids[:, 60:], attention_mask=mask, past_key_values=cache).logits
    assert torch.allclose(second, model(ids, attention_mask=mask).logits[:, 60:], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_to_kept_keys_is_the_same_with_and_without_a_mask(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, length, 8, generator=generator).to(dtype) for length in (70, 300, 300)
    )
    with torch.no_grad():
        found = blocks._attend(query, key, value)
    masked = blocks._attend(query, key, value)  # where gradients are recorded
    assert found.dtype == dtype
    limit = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert (found - masked).abs().max() < limit * masked.abs().max()


@torch.inference_mode()
def test_use_cache_starts_a_state_and_no_state_comes_unasked(model) -> None:
    ids = letters(2, 20)
    assert model(ids).past_key_values is None
    output = model(ids[:, :11], use_cache=True)
    rest = model(ids[:, 11:], past_key_values=output.past_key_values).logits
    assert torch.allclose(rest, model(ids).logits[:, 11:], atol=1e-5)


@torch.inference_mode()
def test_a_mask_must_cover_earlier_blocks_and_segments_have_no_cache(model) -> None:
    cache, ids = StripedHyena2Cache(), letters(1, 8)
    model(ids, past_key_values=cache)
    with pytest.raises(ShapeError, match=r"attention_mask has shape \(1, 8\), expected \(1, 16\)"):
        model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
    with pytest.raises(ShapeError, match="run packed rows without a cache"):
        model(ids, segment_ids=torch.zeros_like(ids), use_cache=True)


@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_generate_with_a_cache_writes_the_same_sequence(model, how) -> None:
    ids = letters(2, 70)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    settings = dict(attention_mask=mask, max_new_tokens=25, min_new_tokens=25, pad_token_id=1, **how)
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].shape[1]))
    try:
        with_cache = model.generate(ids, use_cache=True, **settings)
        assert seen == [70, *[1] * 24]
        seen.clear()
        without = model.generate(ids, use_cache=False, **settings)
        assert seen == list(range(70, 95))
    finally:
        handle.remove()
    assert torch.equal(with_cache, without)


def test_generate_goes_on_from_embedded_prompts(model) -> None:
    ids = letters(1, 30)
    embeds = model.get_input_embeddings()(ids).detach()
    settings = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=1)
    expected = model.generate(ids, **settings)[:, 30:]
    assert torch.equal(model.generate(inputs_embeds=embeds, **settings), expected)


@torch.inference_mode()
def test_only_keys_and_values_grow(model) -> None:
    cache = StripedHyena2Cache()
    model(letters(1, 200), past_key_values=cache)
    sizes = {index: [t.numel() for t in (*state.short, state.inner)] for index, state in cache.hyena.items()}
    model(letters(1, 500, seed=1), past_key_values=cache)
    after = {index: [t.numel() for t in (*state.short, state.inner)] for index, state in cache.hyena.items()}
    assert sizes == after
    assert {state.length for state in cache.attention.values()} == {700}
    assert sorted(cache.hyena) == [0, 1, 2, 4, 5, 6]
    assert sorted(cache.attention) == [3, 7]
