"""Where training starts: shapes, foreign causal models, and isolation proved on the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MambaForCausalLM,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from genoembed import CharTokenizer
from genoembed.config.pretrain import StartConfig
from genoembed.errors import CheckpointError, ConfigError, ModelError
from genoembed.models.registry import find_model
from genoembed.pretraining import start as isolation
from genoembed.pretraining.start import build_start, forward_options, isolating_inputs
from genoembed.training.start import token_rules
from tests.tiny_models import build_config, build_tiny

CAUSAL = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "gpt_neox": GPTNeoXForCausalLM,
    "mamba": MambaForCausalLM,
}


def start(**keys):
    return build_start(StartConfig(**keys), window=64, seed=1)


def save_causal(family, folder):
    build_tiny(family, folder)  # for its tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CAUSAL[family](build_config(family)).save_pretrained(folder)
    return str(folder)


def test_like_shrinks_and_keeps_the_pattern():
    begun = start(like="evo2_7b", hidden_size=64, layers=8)
    config, full = begun.model.config, find_model("evo2_7b").shape
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (64, 8, 64)
    assert [config.block_kind(i) for i in range(8)] == [full.block_kind(i) for i in range(8)]
    assert (config.intermediate_size, config.hcs_filter_groups, config.num_attention_heads) == (176, 4, 2)
    assert config.rotary_emb_scaling_factor == 1.0
    assert begun.is_new
    assert begun.model.training
    assert isinstance(begun.tokenizer, CharTokenizer)


def test_new_weights_follow_the_seed_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    one, two = (start(like="evo2_7b", hidden_size=32, layers=3).model.state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = build_start(StartConfig(like="evo2_7b", hidden_size=32, layers=3), window=64, seed=2)
    assert not torch.equal(other.model.state_dict()["embedding_layer.weight"], one["embedding_layer.weight"])


def test_shape_is_read_strictly():
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "attn_layer_idxs": [0],
        "num_attention_heads": 2,
    }
    assert start(shape=fields).model.config.num_hidden_layers == 1
    with pytest.raises(
        ConfigError, match="'hiden_size' is not a field of StripedHyena2Config; did you mean 'hid"
    ):
        start(shape={"hiden_size": 3})
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        start(shape={"num_hidden_layers": 2, "attn_layer_idxs": [0]})


def test_too_many_layers_and_odd_widths_are_refused():
    with pytest.raises(ConfigError, match="layers: 40, but evo2_7b has 32 blocks"):
        start(like="evo2_7b", layers=40)
    with pytest.raises(ConfigError, match="hidden_size: 33 does not divide"):
        start(like="evo2_7b", hidden_size=33)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_causal_model_is_gone_on_from_with_its_own_tokenizer(family, tmp_path):
    begun = start(model=save_causal(family, tmp_path / "m"))
    assert not begun.is_new
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = begun.rules.encode(b"ACGTACGT")
    assert tokenizer.decode(ids).replace(" ", "") == "ACGTACGT"
    assert (begun.rules.eod_token_id, begun.rules.pad_token_id) == (2, 1)
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_a_striped_hyena_folder_takes_the_byte_tokenizer(tmp_path):
    start(like="evo2_7b", hidden_size=32, layers=4).model.save_pretrained(tmp_path)
    begun = start(model=str(tmp_path))
    assert np.asarray(begun.rules.encode(b"AC")).tolist() == [65, 67]
    assert (begun.rules.eod_token_id, begun.rules.pad_token_id) == (0, 1)


def test_a_model_without_its_head_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="lm_head"):
        start(model=str(build_tiny("llama", tmp_path / "base")))


def test_a_model_that_is_not_causal_is_refused(tmp_path):
    build_tiny("bert", tmp_path)
    config = BertConfig(**{**build_config("bert").to_dict(), "is_decoder": False})
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokens see what follows them"):
        start(model=str(tmp_path))


def test_damaged_weights_are_not_taken_for_a_model_that_is_not_causal(tmp_path):
    save_causal("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights[min(weights)].fill_(torch.nan)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="its outputs are not finite; its weights are damaged"):
        start(model=str(tmp_path))


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    build_tiny("llama", tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    bare = PreTrainedTokenizerFast(tokenizer_object=loaded.backend_tokenizer, unk_token="<unk>")
    with pytest.raises(ModelError, match="has no eos_token"):
        token_rules(bare, name="x")


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_attention_models_isolate_by_positions(family, tmp_path):
    begun = start(model=save_causal(family, tmp_path / "m"))
    assert isolating_inputs(begun.model, begun.rules) == ("position_ids",)
    assert begun.model.training
    rows = [begun.rules.encode(text) for text in (b"ACGTTGCA", b"GATTACA")]
    positions = [i for ids in rows for i in range(len(ids))]
    embed = begun.model.get_input_embeddings()
    vectors = embed(torch.tensor([[i for ids in rows for i in ids]])).detach().requires_grad_()
    logits = begun.model.eval()(
        inputs_embeds=vectors, position_ids=torch.tensor([positions]), **forward_options(("position_ids",))
    ).logits
    logits[0, len(rows[0]) :].sum().backward()
    assert (vectors.grad[0, : len(rows[0])] == 0).all()
    assert (vectors.grad[0, len(rows[0]) :] != 0).any()


def test_striped_hyena_isolates_by_segments():
    begun = start(like="evo2_7b", hidden_size=32, layers=4)
    assert isolating_inputs(begun.model, begun.rules) == ("segment_ids",)
    assert forward_options(("segment_ids",)) == {}


def test_a_model_that_cannot_isolate_is_refused(tmp_path):
    begun = start(model=save_causal("mamba", tmp_path / "m"))
    with pytest.raises(ModelError, match="MambaForCausalLM lets packed neighbors see each other"):
        isolating_inputs(begun.model, begun.rules)


def test_the_probe_sees_a_model_that_ignores_its_segments(monkeypatch):
    begun = start(like="evo2_7b", hidden_size=32, layers=4)
    inner = begun.model.forward

    def leaky(input_ids=None, segment_ids=None):
        return inner(input_ids=input_ids)

    monkeypatch.setattr(begun.model, "forward", leaky)
    with pytest.raises(ModelError, match="set isolate to False"):
        isolation.isolating_inputs(begun.model, begun.rules)


def test_shape_without_context_takes_the_window():
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "attn_layer_idxs": [0], "num_attention_heads": 2}
    assert start(shape=fields).model.config.max_position_embeddings == 64
    assert start(shape={**fields, "max_position_embeddings": 99}).model.config.max_position_embeddings == 99


def test_a_window_above_the_context_is_refused_or_widens_it(tmp_path):
    name = save_causal("llama", tmp_path / "llama")
    with pytest.raises(
        ConfigError, match=r"window: 65, but the context of .* is 64; set window to 64 or less"
    ):
        build_start(StartConfig(model=name), window=65, seed=0)
    start(like="evo2_7b", hidden_size=32, layers=4).model.save_pretrained(tmp_path / "sh2")
    wider = build_start(StartConfig(model=str(tmp_path / "sh2")), window=96, seed=0)
    assert wider.model.config.max_position_embeddings == 96
    narrower = build_start(StartConfig(model=str(tmp_path / "sh2")), window=32, seed=0)
    assert narrower.model.config.max_position_embeddings == 64
