"""Nucleotide Transformer: what configurations can say, against a plain computation; what is recognized."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, EsmConfig, EsmForMaskedLM

from genoembed.errors import CheckpointError
from genoembed.models.families import Published, family_of
from genoembed.models.families.nucleotide_transformer import (
    NucleotideTransformerConfig,
    NucleotideTransformerForMaskedLM,
)
from genoembed.models.load import load_model

GOLDEN = Path(__file__).parents[2] / "golden" / "families"
MASK = 2


def oracle(config, weights, ids, is_gated):
    """Compute the states and logits of one sequence, one step after the other."""

    def product(x, name, bias=True):
        return x @ weights[f"{name}.weight"].T + (weights[f"{name}.bias"] if bias else 0)

    def norm(x, name):
        return F.layer_norm(
            x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config["layer_norm_eps"]
        )

    def rotate(x, positions, frequencies):
        angles = positions[:, None] * frequencies
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    n, d = len(ids), config["hidden_size"] // config["num_attention_heads"]
    x = weights["esm.embeddings.word_embeddings.weight"][ids].double()
    if config["token_dropout"]:
        x = x * (ids != MASK)[:, None] * 0.88 / (1 - (ids == MASK).double().mean())
    if config["position_embedding_type"] == "absolute":
        x = x + weights["esm.embeddings.position_embeddings.weight"][torch.arange(n) + 2]
    if config["emb_layer_norm_before"]:
        x = norm(x, "esm.embeddings.layer_norm")
    states = [x]
    for i in range(config["num_hidden_layers"]):
        at = f"esm.encoder.layer.{i}"
        y = norm(x, f"{at}.attention.LayerNorm")
        q, k, v = (product(y, f"{at}.attention.self.{name}") for name in ("query", "key", "value"))
        heads = []
        for start in range(0, q.shape[-1], d):
            qh, kh, vh = (t[:, start : start + d] for t in (q / math.sqrt(d), k, v))
            if config["position_embedding_type"] == "rotary":
                stored = weights.get(f"{at}.attention.self.rotary_embeddings.inv_freq")
                frequencies = 10000 ** -(torch.arange(0, d, 2).double() / d) if stored is None else stored
                qh, kh = (rotate(t, torch.arange(n).double(), frequencies) for t in (qh, kh))
            heads.append((qh @ kh.T).softmax(-1) @ vh)
        x = x + product(torch.cat(heads, -1), f"{at}.attention.output.dense")
        y = product(norm(x, f"{at}.LayerNorm"), f"{at}.intermediate.dense", config["add_bias_fnn"])
        if is_gated:
            gate, value = y.chunk(2, -1)
            y = gate * torch.sigmoid(gate) * value
        else:
            y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + product(y, f"{at}.output.dense", config["add_bias_fnn"])
        states.append(x)
    final = norm(x, "esm.encoder.emb_layer_norm_after")
    y = product(final, "lm_head.dense")
    y = norm(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), "lm_head.layer_norm")
    return states, final, y @ weights["lm_head.decoder.weight"].T + weights["lm_head.bias"]


SIZES = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 20}
VARIANTS = {
    "as published": {},
    "biases": {"add_bias_fnn": True},
    "eps of the 3-mer model": {"layer_norm_eps": 1e-5, "vocab_size": 75},
    "heads": {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 7, "num_hidden_layers": 3},
    "one head": {"num_attention_heads": 1},
    "masks dropped": {"token_dropout": True},
    "norm before": {"emb_layer_norm_before": True, "layer_norm_eps": 1e-3},
    "absolute": {"position_embedding_type": "absolute"},
    "all at once": {
        **{"position_embedding_type": "absolute", "emb_layer_norm_before": True},
        **{"token_dropout": True, "add_bias_fnn": True, "layer_norm_eps": 1e-5},
    },
    "tied": {"tie_word_embeddings": True},
}


def settings(**changed):
    values = json.loads((GOLDEN / "nt_v2" / "config.json").read_text())
    return values | {"vocab_size": 80, "max_position_embeddings": 40} | SIZES | changed


def write_folder(folder, values, *, stored_frequencies=True, weights_file="model.safetensors"):
    """Write a folder as published, of seeded noise; return its weights."""
    kept = {key: value for key, value in values.items() if key not in ("auto_map", "model_type")}
    torch.manual_seed(3)
    model = NucleotideTransformerForMaskedLM(NucleotideTransformerConfig(**kept))
    weights = {
        name: torch.randn_like(value) * (0.2 if value.dim() > 1 else 0.1) + (name.endswith("orm.weight"))
        for name, value in model.state_dict().items()
        if "inv_freq" not in name
    }
    if values["tie_word_embeddings"]:
        weights["lm_head.decoder.weight"] = weights["esm.embeddings.word_embeddings.weight"]
    if values["position_embedding_type"] == "rotary":
        d = values["hidden_size"] // values["num_attention_heads"]
        weights["esm.embeddings.position_embeddings.weight"] = torch.randn(40, values["hidden_size"])
        for i in range(values["num_hidden_layers"] if stored_frequencies else 0):
            frequencies = 10000 ** -(torch.arange(0, d, 2) / d)
            weights[f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"] = frequencies
    folder.mkdir(exist_ok=True)
    for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(GOLDEN / "nt_v2" / name, folder / name)
    (folder / "config.json").write_text(json.dumps(values))
    if weights_file.endswith(".bin"):
        columns = {k: v.T.contiguous().T if v.dim() == 2 else v for k, v in weights.items()}
        torch.save(columns, folder / weights_file)
    else:
        save_file({name: value.clone() for name, value in weights.items()}, folder / weights_file)
    return weights


def blocks_and_final(model, ids):
    from genoembed.models.layers import capture

    layers = [layer.path for layer in model.resolve(["all", "final"])]
    with torch.inference_mode(), capture(model.module, layers) as found:
        model.module(ids[None], attention_mask=torch.ones_like(ids)[None])
    return [found[path][0] for path in layers]


@pytest.mark.parametrize("name", VARIANTS)
def test_configuration_is_followed(name, tmp_path):
    values = settings(**VARIANTS[name])
    weights = write_folder(tmp_path / "x", values)
    double = {key: value.double() for key, value in weights.items()}
    ids = torch.tensor([3, 20, 7, MASK, 9, 70, 33, 12, MASK, 11, 8])
    expected, final, logits = oracle(values, double, ids, is_gated=True)
    model = load_model(str(tmp_path / "x"), device="cpu", dtype="float32")
    found = blocks_and_final(model, ids)
    for state, value in zip(found, [*expected[1:], final], strict=True):
        torch.testing.assert_close(state.double(), value, rtol=0, atol=1e-5)
    whole, info = NucleotideTransformerForMaskedLM.from_pretrained(
        tmp_path / "x", config=model.module.config, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"] - {"esm.embeddings.position_embeddings.weight"}
    with torch.inference_mode():
        found_logits = whole.eval()(ids[None]).logits[0].double()
    torch.testing.assert_close(found_logits, logits, rtol=0, atol=2e-5)


def test_what_a_model_says_of_itself(tmp_path):
    write_folder(tmp_path / "x", settings())
    model = load_model(str(tmp_path / "x"), device="cpu", dtype="float32")
    assert (model.padding, model.is_causal, model.max_length) == ("mask", False, 38)
    assert model.untrained == ()
    assert model.resolve("final")[0].path == "encoder.emb_layer_norm_after"
    assert [layer.path for layer in model.resolve("all")] == ["encoder.layer.0", "encoder.layer.1"]


def test_hidden_states_end_with_the_normed_ones(tmp_path):
    write_folder(tmp_path / "x", settings())
    module = load_model(str(tmp_path / "x"), device="cpu", dtype="float32").module
    with torch.inference_mode():
        output = module(torch.tensor([[3, 20, 7]]), output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@pytest.mark.parametrize("weights_file", ["pytorch_model.bin", "model.safetensors"])
def test_both_kinds_of_weights_give_the_same(weights_file, tmp_path):
    write_folder(tmp_path / "x", settings())
    write_folder(tmp_path / "y", settings(), weights_file=weights_file)
    ids = torch.arange(3, 14)
    one, two = (load_model(str(tmp_path / name), device="cpu", dtype="float32") for name in "xy")
    assert torch.equal(blocks_and_final(one, ids)[-1], blocks_and_final(two, ids)[-1])


def test_folder_without_frequencies_gets_them_from_the_configuration(tmp_path):
    write_folder(tmp_path / "x", settings())
    write_folder(tmp_path / "y", settings(), stored_frequencies=False)
    ids = torch.arange(3, 14)
    one, two = (load_model(str(tmp_path / name), device="cpu", dtype="float32") for name in "xy")
    torch.testing.assert_close(blocks_and_final(one, ids)[-1], blocks_and_final(two, ids)[-1])


def test_stored_frequencies_are_taken_in_full_precision(tmp_path):
    weights = write_folder(tmp_path / "x", settings())
    for name in weights:
        if name.endswith("inv_freq"):
            weights[name] = weights[name] * 0.9
    save_file({name: value.clone() for name, value in weights.items()}, tmp_path / "x" / "model.safetensors")
    for dtype in ("float32", "bfloat16"):
        model = load_model(str(tmp_path / "x"), device="cpu", dtype=dtype)
        stored = [value for name, value in model.module.named_buffers() if name.endswith("inv_freq")]
        assert len(stored) == 2
        for value in stored:
            assert value.dtype == torch.float32
            assert value[0] == torch.tensor(0.9)


@pytest.mark.parametrize("left_out", [("auto_map",), ("model_type",), ("auto_map", "model_type")])
@pytest.mark.parametrize("add_bias_fnn", [True, False])
def test_gated_folder_is_recognized_by_its_matrices(left_out, add_bias_fnn, tmp_path):
    values = settings(add_bias_fnn=add_bias_fnn)
    write_folder(tmp_path / "x", values)
    kept = {key: value for key, value in values.items() if key not in (*left_out, "architectures")}
    if add_bias_fnn:
        del kept["add_bias_fnn"]  # what the published code takes it for
    (tmp_path / "x" / "config.json").write_text(json.dumps(kept))
    model = load_model(str(tmp_path / "x"), device="cpu", dtype="float32")
    assert type(model.module).__name__ == "NucleotideTransformerModel"
    assert model.module.config.add_bias_fnn is add_bias_fnn


def test_configuration_alone_is_recognized():
    assert family_of(Published(settings())).model_type == "nucleotide_transformer"
    without_map = {key: value for key, value in settings().items() if key != "auto_map"}
    assert family_of(Published(without_map)).model_type == "nucleotide_transformer"


def test_plain_esm_stays_as_it_is(tmp_path):
    config = EsmConfig(vocab_size=33, mask_token_id=32, pad_token_id=1, max_position_embeddings=40, **SIZES)
    EsmForMaskedLM(config).save_pretrained(tmp_path / "x")
    values = json.loads((tmp_path / "x" / "config.json").read_text())
    assert family_of(Published(values)) is None
    assert family_of(Published(values, tmp_path / "x")) is None
    named = values | {"auto_map": {"AutoModelForMaskedLM": "modeling_esm.EsmForMaskedLM"}}
    assert family_of(Published(named | {"add_bias_fnn": True}, tmp_path / "x")) is None


def test_models_built_on_it_are_not_taken_for_it(tmp_path):
    values = settings(architectures=["SegmentNT"], auto_map={"AutoModel": "modeling_segment_nt.SegmentNT"})
    write_folder(tmp_path / "x", values)
    assert family_of(Published(values)) is None
    assert family_of(Published(values, tmp_path / "x")) is None
    with pytest.raises(CheckpointError, match="the repository brings its own code"):
        load_model(str(tmp_path / "x"), device="cpu")


@pytest.mark.parametrize("left_out", [(), ("model_type",), ("model_type", "architectures")])
def test_version_one_is_recognized_and_stays_transformers_own(left_out, tmp_path):
    folder = shutil.copytree(GOLDEN / "nt_v1", tmp_path / "x")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in left_out}))
    model = load_model(str(folder), device="cpu", dtype="float32")
    assert type(model.module).__name__ == "EsmModel"
    assert model.family.name == "Nucleotide Transformer v1"
    assert (model.padding, model.max_length, model.untrained) == ("mask", 1000, ("pooler",))


@pytest.mark.parametrize("token_dropout", [True, False])
def test_version_one_follows_its_flag(token_dropout, tmp_path):
    folder = shutil.copytree(GOLDEN / "nt_v1", tmp_path / "x")
    values = json.loads((folder / "config.json").read_text()) | {"token_dropout": token_dropout}
    (folder / "config.json").write_text(json.dumps(values))
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    ids = torch.tensor([3, 20, 7, MASK, 9, 70])
    double = {key: value.double() for key, value in weights.items()}
    _, final, _ = oracle(values | {"add_bias_fnn": True}, double, ids, is_gated=False)
    model = load_model(str(folder), device="cpu", dtype="float32")
    torch.testing.assert_close(blocks_and_final(model, ids)[-1].double(), final, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["nt_v1", "nt_v2"])
def test_saved_tokenizer_adds_no_token_that_the_model_has_not(family, tmp_path):
    """The vocabulary of version 1 has an end token without an embedding."""
    model = load_model(str(GOLDEN / family), device="cpu", dtype="float32")
    ids = model.tokenizer("ACGTACGTAC")["input_ids"]
    model.tokenizer.save_pretrained(tmp_path / "x")
    model.module.save_pretrained(tmp_path / "x")
    again = AutoTokenizer.from_pretrained(tmp_path / "x")
    assert again("ACGTACGTAC")["input_ids"] == ids
    assert again.eos_token is None
    reloaded = load_model(str(tmp_path / "x"), device="cpu", dtype="float32")
    assert reloaded.tokenizer("ACGTACGTAC")["input_ids"] == ids
    found, expected = (blocks_and_final(m, torch.tensor(ids))[-1] for m in (reloaded, model))
    assert torch.equal(found, expected)


def test_published_frequencies_stay_in_a_saved_folder(tmp_path):
    write_folder(tmp_path / "x", settings())
    model = load_model(str(tmp_path / "x"), device="cpu", dtype="float32")
    model.module.save_pretrained(tmp_path / "y")
    names = set(load_file(tmp_path / "y" / "model.safetensors"))
    assert "encoder.layer.1.attention.self.rotary_embeddings.inv_freq" in names
    assert "encoder.layer.1.intermediate.dense.weight" in names
