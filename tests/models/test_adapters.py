"""Facts found by asking the model: causality, masks, padding, context."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import EsmConfig, EsmModel, RobertaConfig, RobertaModel

from genoembed.embedding import embed
from genoembed.errors import ShapeError
from genoembed.models.behavior import Probe, context_length, evaluating, padding_policy
from genoembed.models.load import load_model
from genoembed.models.striped_hyena2.network import PlainStripedHyena2
from tests.models.conftest import make_batch

FACTS = {
    "bert": (False, True, "mask", 64),
    "esm": (False, True, "mask", 64),
    "modernbert": (False, True, "mask", 64),
    "llama": (True, True, "mask", 64),
    "mistral": (True, True, "mask", 64),
    "gpt_neox": (True, True, "mask", 64),
    "mamba": (True, True, "mask", None),
    "custom_conv": (False, False, "equal", None),
}


class Toy(nn.Module):
    """Embeds and mixes in a way that the test chooses."""

    def __init__(self, mix) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 4)
        self.blocks = nn.ModuleList([nn.Identity()])
        self.mix = mix

    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.blocks[0](self.mix(self.embed(input_ids), mask[..., None]))


class Unmasked(Toy):
    """The same without a mask argument."""

    def forward(self, input_ids):  # type: ignore[override]
        return super().forward(input_ids)


def causal(x, mask):
    return x.cumsum(1)


def ignoring(x, mask):
    return x + x.mean(1, keepdim=True)


def honouring(x, mask):
    return x + (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)


def hiding_content_only(x, mask):
    return x + (x * mask).mean(1, keepdim=True)


def probe(module: nn.Module) -> Probe:
    return Probe(module, special_ids=[0, 1], pad_token_id=1)


def test_facts_of_every_family(family, tiny_model):
    model = tiny_model(family)
    assert (model.is_causal, model.accepts_attention_mask, model.padding, model.max_length) == FACTS[family]


@pytest.mark.parametrize(
    ("mix", "is_causal", "accepts_mask"),
    [
        (causal, True, True),
        (ignoring, False, False),
        (honouring, False, True),
        (hiding_content_only, False, False),
    ],
)
def test_probe_tells_what_a_model_really_does(mix, is_causal, accepts_mask):
    assert probe(Toy(mix)).is_causal() is is_causal
    assert probe(Toy(mix)).accepts_attention_mask() is accepts_mask


def test_probe_wants_the_argument_in_the_signature():
    assert probe(Unmasked(causal)).accepts_attention_mask() is False
    assert probe(Unmasked(causal)).is_causal() is True


def test_probe_believes_a_class_that_is_causal_by_construction():
    class Declared(Toy):
        is_causal_by_construction = True

        def forward(self, input_ids, attention_mask=None):
            pytest.fail("a declared model is not run")

    assert probe(Declared(causal)).is_causal() is True
    assert probe(Declared(causal)).accepts_attention_mask() is True


def test_probe_finds_no_final_module_where_none_gives_the_last_state():
    class Scaled(Toy):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids, attention_mask) * 2

    assert probe(Toy(causal)).final_path() == "blocks.0"
    assert probe(Scaled(causal)).final_path() is None


def test_probe_leaves_modes_and_random_state_alone():
    module = Toy(causal).train()
    module.blocks.eval()
    state = torch.get_rng_state()
    probe(module).is_causal()
    assert (module.training, module.blocks.training) == (True, False)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluating_restores_modes_after_an_error():
    module = Toy(causal).train()
    with pytest.raises(ValueError, match="eval mode"), evaluating(module):
        _stop(module)
    assert module.training
    assert torch.backends.cudnn.allow_tf32


def test_every_pass_convolves_float32_numbers_as_they_are(monkeypatch):
    """GPUs would round them to TF32, so that a vector would depend on its batch."""
    allowed = []

    def look(self, *inputs, **kwargs):
        allowed.append(torch.backends.cudnn.allow_tf32)
        return forward(self, *inputs, **kwargs)

    forward = PlainStripedHyena2.forward
    monkeypatch.setattr(PlainStripedHyena2, "forward", look)
    loaded = load_model(device="cpu", dtype="float32")
    for batch_tokens in (None, 64):  # whole, and in blocks
        embed(["ACGT" * 200], model=loaded, layers=0, batch_tokens=batch_tokens)
    loaded.resolve("final")
    assert len(allowed) > 2
    assert not any(allowed)
    assert torch.backends.cudnn.allow_tf32


def test_what_the_user_has_set_for_convolutions_stays(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with evaluating(Toy(causal)):
        assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def _stop(module: nn.Module) -> None:
    message = "train mode" if module.training else "eval mode"
    raise ValueError(message)


@pytest.mark.parametrize(
    ("accepts_mask", "is_causal", "expected"),
    [(True, True, "mask"), (True, False, "mask"), (False, True, "right"), (False, False, "equal")],
)
def test_padding_policy(accepts_mask, is_causal, expected):
    assert padding_policy(accepts_attention_mask=accepts_mask, is_causal=is_causal) == expected


@pytest.mark.parametrize("position_embedding_type", ["absolute", "rotary"])
def test_context_leaves_out_positions_before_the_padding_id(position_embedding_type):
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = EsmConfig(
        **shape,
        vocab_size=10,
        pad_token_id=1,
        mask_token_id=2,
        max_position_embeddings=1026,
        position_embedding_type=position_embedding_type,
    )
    assert context_length(EsmModel(config)) == 1024
    roberta = RobertaConfig(**shape, vocab_size=10, pad_token_id=1, max_position_embeddings=514)
    assert context_length(RobertaModel(roberta)) == 512


def test_padding_changes_no_real_position(family, tiny_model, padded_batch):
    model = tiny_model(family)
    paths = [layer.path for layer in model.resolve(["all", "final"])]
    if model.padding == "equal":
        with pytest.raises(ShapeError, match=r"sees padding .* put only rows of one length into a batch"):
            model.forward(padded_batch, paths)
        return
    together = model.forward(padded_batch, paths)
    lengths = padded_batch.attention_mask.sum(1).tolist()
    assert min(lengths) < max(lengths)
    for row, length in enumerate(lengths):
        alone = model.forward(make_batch(padded_batch.input_ids[row, :length].tolist()), paths)
        for path in paths:
            torch.testing.assert_close(together[path][row, :length], alone[path][0], rtol=1e-5, atol=1e-5)


def test_bfloat16_facts_equal_float32_facts_or_are_safer(family, tiny_folder):
    from genoembed.models.load import load_model

    trusted = family == "custom_conv"
    model = load_model(str(tiny_folder(family)), device="cpu", dtype="bfloat16", trust_remote_code=trusted)
    assert model.dtype == torch.bfloat16
    assert (model.is_causal, model.accepts_attention_mask) == FACTS[family][:2]
