"""What the StripedHyena 2 model promises on padding, batches, positions, the future, losses, gradients."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genoembed import StripedHyena2Config, StripedHyena2ForCausalLM, StripedHyena2Model
from genoembed.errors import ShapeError
from genoembed.models.striped_hyena2 import blocks

# 1 is the padding id of the tokenizer; the model itself does not treat it in any special way
PAD = 1
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Of the largest deviation; observed 1.6e-6 and 1.8e-2 (by rms 7.5e-7 and 0.9e-2)."""
MAX_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2}
RMS_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2.5e-2}
"""Of the largest deviation and of the root mean square of all, beside batch-mates and padding. Observed over
1,100 random rows: at most 2.8e-6 and 3.2e-2, and 1.6e-6 and 1.4e-2; the largest one scatters more."""
EXACT = ("log_poles", "residues", "inv_freq")


def tiny_config(**changes: object) -> StripedHyena2Config:
    """Two blocks of attention and one of each filter, on purpose not in the default order."""
    fields = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "hcl_layer_idxs": [0],
        "attn_layer_idxs": [1, 4],
        "hcm_layer_idxs": [2],
        "hcs_layer_idxs": [3],
        "hcs_filter_groups": 4,
        "hcm_filter_groups": 8,
        "state_size": 4,
    }
    return StripedHyena2Config(**{**fields, **changes})


def tiny_model(dtype: torch.dtype = torch.float32, **changes: object) -> StripedHyena2ForCausalLM:
    """Random weights, biases and skips included, large enough that every part is felt."""
    torch.manual_seed(0)
    model = StripedHyena2ForCausalLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not key.endswith(EXACT):
                parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std().nan_to_num(0.3).clamp(0.1))
                parameter.data = parameter.data.to(dtype)
    return model


def letters(*shape: int, seed: int = 0) -> Tensor:
    """Random DNA."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor([65, 67, 71, 84])[torch.randint(4, shape, generator=generator)]


def relative(ours: Tensor, expected: Tensor) -> float:
    """Largest deviation against the size of the expected values."""
    return ((ours.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def relative_rms(ours: Tensor, expected: Tensor) -> float:
    """Root mean square of the deviations against that of the expected values."""
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> StripedHyena2ForCausalLM:
    """A tiny model in each precision."""
    return tiny_model(request.param)


@pytest.mark.parametrize("length", [2, 60, 128, 129, 300])
@torch.inference_mode()
def test_model_never_looks_ahead(model, length) -> None:
    ids = letters(2, length)
    before = model(ids, output_hidden_states=True)
    for cut in {1, length // 2, length - 1}:
        changed = ids.clone()
        changed[:, cut:] = (changed[:, cut:] + 7) % 512
        after = model(changed, output_hidden_states=True)
        for old, new in zip(before.hidden_states, after.hidden_states, strict=True):
            assert torch.equal(old[:, :cut], new[:, :cut])
        assert torch.equal(before.logits[:, :cut], after.logits[:, :cut])
        assert not torch.equal(before.logits[:, cut:], after.logits[:, cut:])


def test_model_sees_no_future_in_its_gradient() -> None:
    model = tiny_model()
    embeds = torch.randn(1, 150, 32, requires_grad=True)
    model(inputs_embeds=embeds).logits[:, 90].sum().backward()
    assert (embeds.grad[:, 91:] == 0).all()
    assert (embeds.grad[:, :91].abs().amax(-1) > 0).all()


@given(
    length=st.integers(1, 280),
    padding=st.integers(1, 200),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
    side=st.sampled_from(["right", "left"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=12)
@torch.inference_mode()
def test_padding_and_batch_mates_change_nothing(length, padding, before, after, side, dtype) -> None:
    # bitwise equality is not promised: matrix products of another shape may sum in another order
    model = tiny_model(dtype)
    ids = letters(1, length, seed=length)
    alone = model(ids, output_hidden_states=True)
    pad = torch.full((1, padding), PAD)
    row = torch.cat((ids, pad) if side == "right" else (pad, ids), dim=1)
    mates = letters(before + after, length + padding, seed=7)
    batch = torch.cat((mates[:before], row, mates[before:]))
    mask = torch.ones_like(batch)
    mask[before] = (
        torch.arange(length + padding) < length
        if side == "right"
        else torch.arange(length + padding) >= padding
    )
    together = model(batch, attention_mask=mask, output_hidden_states=True)
    kept = slice(0, length) if side == "right" else slice(padding, None)
    pairs = [
        (ours[before, kept], expected[0])
        for ours, expected in zip(
            (together.logits, *together.hidden_states), (alone.logits, *alone.hidden_states), strict=True
        )
    ]
    for ours, expected in pairs:
        assert relative_rms(ours, expected) < RMS_TOLERANCE[dtype]
        assert relative(ours, expected) < MAX_TOLERANCE[dtype]


@torch.inference_mode()
def test_right_padding_needs_no_mask_and_a_mask_changes_nothing(model) -> None:
    ids = torch.cat((letters(2, 40), torch.full((2, 9), PAD)), dim=1)
    mask = (torch.arange(49) < 40).long().expand(2, 49)
    assert torch.equal(model(ids).logits, model(ids, attention_mask=mask).logits)


@torch.inference_mode()
def test_left_padding_without_a_mask_is_felt() -> None:
    # else the tests of the mask would pass without one
    model, ids = tiny_model(), letters(1, 40)
    padded = torch.cat((torch.full((1, 9), PAD), ids), dim=1)
    assert relative(model(padded).logits[:, 9:], model(ids).logits) > 1e-2


@torch.inference_mode()
def test_left_padding_content_is_never_read(model) -> None:
    ids = letters(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    other = ids.clone()
    other[0, :20] = 300
    assert torch.equal(
        model(ids, attention_mask=mask).logits[0, 20:], model(other, attention_mask=mask).logits[0, 20:]
    )
    assert model(ids, attention_mask=torch.zeros_like(ids)).logits.isfinite().all()


@torch.inference_mode()
def test_batch_size_changes_nothing(model) -> None:
    ids = letters(16, 140)
    whole = model(ids).logits
    for size in (1, 3, 16):
        parts = torch.cat([model(part).logits for part in ids.split(size)])
        assert relative(parts, whole) < TOLERANCE[whole.dtype]


@torch.inference_mode()
def test_position_ids_shift_and_scale_attention_only() -> None:
    model, ids = tiny_model(), letters(2, 60)
    plain = model(ids).logits
    positions = torch.arange(60)[None]
    assert torch.equal(model(ids, position_ids=positions).logits, plain)
    assert torch.equal(model(ids, position_ids=positions.expand(2, 60)).logits, plain)
    # rotary attention knows differences of positions only
    assert relative(model(ids, position_ids=positions + 1000).logits, plain) < 1e-4
    assert relative(model(ids, position_ids=positions * 3).logits, plain) > 1e-3
    # interpolation divides positions
    stretched = tiny_model(rotary_emb_scaling_factor=4.0)
    assert relative(stretched(ids, position_ids=positions * 4).logits, plain) < 1e-5
    assert relative(stretched(ids).logits, plain) > 1e-3


@torch.inference_mode()
def test_embedded_input_equals_ids(model) -> None:
    ids = letters(2, 30)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


@torch.inference_mode()
def test_hidden_states_are_the_stream_before_each_block_and_the_normed_end() -> None:
    model, ids = tiny_model(), letters(2, 30)
    outputs = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: outputs.__setitem__(name, output))
        for name, module in model.named_modules()
        if name
    ]
    states = model(ids, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    expected = [outputs["embedding_layer"], *(outputs[f"blocks.{i}"] for i in range(4)), outputs["norm"]]
    assert len(states.hidden_states) == 6
    assert all(map(torch.equal, states.hidden_states, expected))
    assert torch.equal(outputs["unembed"], states.logits)
    assert model(ids).hidden_states is None


@torch.inference_mode()
def test_output_switches_follow_transformers() -> None:
    ids = letters(1, 10)
    model = tiny_model()
    logits = model(ids).logits
    assert torch.equal(model(ids, return_dict=False)[0], logits)
    assert isinstance(model(ids, return_dict=False), tuple)
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 6
    assert model(ids, output_hidden_states=False).hidden_states is None
    base = StripedHyena2Model(tiny_config())
    assert isinstance(base(ids, return_dict=False), tuple)
    assert base(ids).last_hidden_state.shape == (1, 10, 32)


def test_inputs_that_do_not_fit_are_refused() -> None:
    model, ids = tiny_model(), letters(2, 10)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(2, 10, 32)}):
        with pytest.raises(ShapeError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)
    for shape in ((2, 9), (10,), (2, 1, 10, 10)):
        with pytest.raises(ShapeError, match=r"attention_mask has shape .*, expected \(2, 10\); give 1"):
            model(ids, attention_mask=torch.ones(shape))


@torch.inference_mode()
def test_loss_ignores_labels_by_value_minus_100_never_by_token_id() -> None:
    model = tiny_model()
    ids = letters(2, 12)
    ids[0, 5], ids[1, 7:] = 0, PAD
    logits = model(ids).logits
    log_probabilities = logits.double().log_softmax(-1)
    every = [-log_probabilities[row, t, ids[row, t + 1]] for row in range(2) for t in range(11)]
    assert model(ids, labels=ids).loss.item() == pytest.approx(torch.stack(every).mean().item(), rel=1e-5)
    labels = ids.clone()
    labels[1, 7:], labels[0, 0] = -100, -100
    kept = every[:11] + every[11:17]
    assert model(ids, labels=labels).loss.item() == pytest.approx(torch.stack(kept).mean().item(), rel=1e-5)
    total = model(ids, labels=labels, num_items_in_batch=10).loss.item()
    assert total == pytest.approx(torch.stack(kept).sum().item() / 10, rel=1e-5)
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0
    # a product of fewer rows may be summed in another order
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:], rtol=1e-5, atol=1e-5)


def test_fresh_weights_are_finite_on_long_input_and_know_nothing() -> None:
    torch.manual_seed(1)
    model = StripedHyena2ForCausalLM(StripedHyena2Config(hidden_size=32, intermediate_size=48))
    ids = torch.randint(512, (1, 2048))
    with torch.inference_mode():
        output = model(ids, labels=ids)
    assert len(model.blocks) == 32
    assert output.logits.isfinite().all()
    assert output.loss.item() == pytest.approx(math.log(512), abs=0.1)


def test_gradients_reach_every_parameter() -> None:
    model = tiny_model()
    ids = letters(2, 140)
    model(ids, labels=ids).loss.backward()
    parameters = dict(model.named_parameters())
    assert len(parameters) > 40
    for key, parameter in parameters.items():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert (parameter.grad != 0).any(), key


def test_gradient_is_finite_for_rows_of_zeros() -> None:
    # the norm of a zero row has no derivative
    model = tiny_model()
    with torch.no_grad():
        model.embedding_layer.weight[65] = 0
    ids = letters(1, 20)
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.inference_mode()
def test_copies_and_pickles_compute_the_same(model) -> None:
    ids = letters(1, 20)
    expected = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, expected)


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 255, 256, 257, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_products_equals_that_of_torch(length, dtype, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "_MAX_SCORES", 2 * 256 * length)  # so that heads come in several products
    generator = torch.Generator().manual_seed(length)
    heads = [torch.randn(2, length, 3, 8, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]
    found = blocks.attend_by_products(*heads)
    expected = F.scaled_dot_product_attention(*(each.double() for each in heads), is_causal=True)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    alone = blocks.attend_by_products(*(each[1:] for each in heads))
    torch.testing.assert_close(alone, found[1:], rtol=tolerance / 2, atol=tolerance / 2)


def test_model_attends_by_products_only_where_that_is_faster_and_nothing_is_trained(monkeypatch) -> None:
    monkeypatch.setattr(blocks, "_LIBRARY_ATTENDS_IN_FLOAT32", True)
    monkeypatch.setattr(blocks, "product_dtype", lambda x: x.dtype)
    calls: list[torch.dtype] = []

    def spy(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append(query.dtype)
        return by_products(query, key, value)

    by_products = blocks.attend_by_products
    monkeypatch.setattr(blocks, "attend_by_products", spy)
    ids, half = letters(2, 40), tiny_model(torch.bfloat16)
    trained = half(ids).logits
    tiny_model()(ids)
    with torch.no_grad():
        tiny_model()(ids)
        half(ids[:, :0])
        assert not calls
        found = half(ids).logits
    assert calls == [torch.bfloat16] * 2
    deviation = (
        found.float() - trained.float()
    ).square().mean().sqrt() / trained.float().square().mean().sqrt()
    assert 0 < deviation < RMS_TOLERANCE[torch.bfloat16]


def test_empty_batches_and_sequences_give_empty_logits(model) -> None:
    assert model(letters(2, 0)).logits.shape == (2, 0, 512)
    assert model(letters(0, 20)).logits.shape == (0, 20, 512)


@torch.inference_mode()
def test_channels_in_thirds_equal_permuted_triples() -> None:
    ids = letters(1, 40)
    triples, thirds = tiny_model(), tiny_model(interleave=False)
    state = triples.state_dict()
    order = torch.arange(96).view(32, 3).T.reshape(-1)
    for key in state:
        if key.endswith(("projections.weight", "short_filter_weight")):
            state[key] = state[key][order]
    assert relative(thirds(ids).logits, triples(ids).logits) > 1e-2
    thirds.load_state_dict(state)
    assert relative(thirds(ids).logits, triples(ids).logits) < 1e-5


def test_no_captured_output_is_overwritten_later_in_the_pass() -> None:
    # inference multiplies into memory that nobody else holds; what a hook holds must stay as it was
    model = tiny_model()
    ids = letters(1, 150)
    for watched in (lambda name: True, lambda name: name.endswith(("l1", "projections"))):
        kept, copies = {}, {}

        def keep(module, _inputs, output, kept=kept, copies=copies):
            kept[module], copies[module] = output, output.clone()

        modules = [m for name, m in model.named_modules() if watched(name) and not list(m.children())]
        handles = [module.register_forward_hook(keep) for module in modules]
        try:
            with torch.inference_mode():
                model(ids)
        finally:
            for handle in handles:
                handle.remove()
        assert len(kept) >= 8
        assert all(torch.equal(kept[module], copies[module]) for module in kept)
    with torch.inference_mode():
        in_place = model(ids).logits
    assert torch.allclose(in_place, model(ids).logits.detach(), atol=1e-6)
