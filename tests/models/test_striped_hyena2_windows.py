"""A state carried across windows of attention gives what one pass gives whose attention is cut to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed import StripedHyena2ForCausalLM
from genoembed.errors import ShapeError
from genoembed.models.families.evo1 import Evo1Config, Evo1Model
from genoembed.models.striped_hyena2.state import AttentionWindows, StripedHyena2Cache, iter_spans
from tests.banded import banded
from tests.tiny_models import letters, two_of_each_kind


@pytest.fixture(scope="module")
def model() -> StripedHyena2ForCausalLM:
    return two_of_each_kind()


def carried(model, ids, windows, block):
    cache, parts = model.new_cache(windows), []
    for span in iter_spans(ids.shape[1], block=block, windows=windows):
        output = model(ids[:, span], past_key_values=cache, output_hidden_states=True)
        parts.append(output.hidden_states)
    return [torch.cat(layer, dim=1) for layer in zip(*parts, strict=True)]


@st.composite
def window_plans(draw):
    window = draw(st.integers(1, 90))
    return AttentionWindows(window=window, stride=draw(st.integers(1, window)))


@given(windows=window_plans(), length=st.integers(1, 140), block=st.integers(1, 100))
@settings(max_examples=12, deadline=None)
@torch.inference_mode()
def test_windows_equal_one_pass_with_such_a_mask(model, windows, length, block) -> None:
    ids = letters(2, length, seed=length)
    for layer, (found, expected) in enumerate(
        zip(carried(model, ids, windows, block), banded(model, ids, windows).hidden_states, strict=True)
    ):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max(), (layer, windows)


@pytest.mark.parametrize("block", [7, 64, 300])
@torch.inference_mode()
def test_one_window_that_holds_all_equals_one_pass(model, block) -> None:
    ids = letters(2, 250)
    whole = model(ids, output_hidden_states=True).hidden_states
    for found, expected in zip(
        carried(model, ids, AttentionWindows(window=250, stride=9), block), whole, strict=True
    ):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.inference_mode()
def test_evo1_carries_its_state_across_windows() -> None:
    torch.manual_seed(1)
    config = Evo1Config(
        hidden_size=32,
        num_filters=32,
        inner_mlp_size=48,
        num_layers=4,
        num_attention_heads=2,
        attn_layer_idxs=[1, 3],
        hyena_layer_idxs=[0, 2],
        state_size=4,
        vocab_size=512,
    )
    evo1 = Evo1Model(config).eval()
    ids, windows = letters(1, 150), AttentionWindows(window=40, stride=25)
    found, expected = carried(evo1, ids, windows, 16)[-1], banded(evo1, ids, windows).hidden_states[-1]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.inference_mode()
def test_keys_in_half_precision_do_not_drift_from_window_to_window(model) -> None:
    half = StripedHyena2ForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half = half.bfloat16().eval()
    ids, windows = letters(1, 200), AttentionWindows(window=64, stride=1)
    cache = half.new_cache(windows)
    for span in iter_spans(200, block=64, windows=windows):
        half(ids[:, span], past_key_values=cache)
    for layer in cache.attention:
        state = cache.attention[layer]
        rotary = half.blocks[layer].inner_mha_cls.rotary_emb
        again = rotary(
            state._unrotated[:, :, : state.length].transpose(1, 2), torch.arange(state.length)[None]
        )
        assert torch.equal(again.transpose(1, 2), state._keys[:, :, : state.length])
        # what is held does not grow with what was read
        assert state.length == 64
        assert state._keys.shape[2] <= 128


@torch.inference_mode()
def test_what_would_cross_a_window_is_an_error(model) -> None:
    cache = StripedHyena2Cache(windows=AttentionWindows(window=8, stride=4))
    with pytest.raises(ShapeError, match="positions 0 to 8; give blocks that lie in one window"):
        model(letters(1, 9), past_key_values=cache)
    with pytest.raises(ShapeError, match="an attention_mask"):
        model(letters(1, 4), attention_mask=torch.ones(1, 4), past_key_values=cache)
