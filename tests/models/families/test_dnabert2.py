"""DNABERT-2: what configurations can say, against a plain computation; long inputs; what is recognized."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertModel

from genoembed.models.behavior import forward_arguments
from genoembed.models.families import Published, dnabert2, family_of
from genoembed.models.families.dnabert2 import DnaBert2Config, DnaBert2ForMaskedLM, head_slopes
from genoembed.models.layers import capture
from genoembed.models.load import load_model

GOLDEN = Path(__file__).parents[2] / "golden" / "families" / "dnabert2"
IDS = torch.tensor([1, 20, 7, 4, 9, 150, 33, 12, 4, 11, 0, 2])


def slope(head, num_heads):
    """Return a head's slope as ALiBi's authors define it, the longer way."""

    def of_power(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start**k for k in range(1, n + 1)]

    below = 1
    while below * 2 <= num_heads:
        below *= 2
    return [*of_power(below), *of_power(2 * below)[::2]][head]


def oracle(config, weights, ids):
    """Compute the states and logits of one sequence in float64, head by head."""
    w = {name: value.double() for name, value in weights.items()}
    eps, n, num_heads = config["layer_norm_eps"], len(ids), config["num_attention_heads"]

    def product(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name, eps=eps):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    distances = torch.tensor([[float(abs(i - j)) for j in range(n)] for i in range(n)]).double()
    x = w["bert.embeddings.word_embeddings.weight"][ids]
    x = norm(x + w["bert.embeddings.token_type_embeddings.weight"][0], "bert.embeddings.LayerNorm")
    states = [x]
    for i in range(config["num_hidden_layers"]):
        at = f"bert.encoder.layer.{i}"
        q, k, v = product(x, f"{at}.attention.self.Wqkv").chunk(3, dim=-1)
        d = q.shape[-1] // num_heads
        heads = []
        for head in range(num_heads):
            part = slice(head * d, (head + 1) * d)
            scores = q[:, part] @ k[:, part].T / math.sqrt(d) - slope(head, num_heads) * distances
            heads.append(scores.softmax(-1) @ v[:, part])
        y = product(torch.cat(heads, -1), f"{at}.attention.output.dense")
        x = norm(y + x, f"{at}.attention.output.LayerNorm")
        gate, value = product(x, f"{at}.mlp.gated_layers").chunk(2, dim=-1)
        x = norm(product(gelu(gate) * value, f"{at}.mlp.wo") + x, f"{at}.mlp.layernorm")
        states.append(x)
    y = product(x, "cls.predictions.transform.dense")
    y = norm(
        y.relu() if config["hidden_act"] == "relu" else gelu(y), "cls.predictions.transform.LayerNorm", 1e-12
    )
    logits = y @ w["bert.embeddings.word_embeddings.weight"].T + w["cls.predictions.decoder.bias"]
    return states, logits


VARIANTS = {
    "12 heads, and a table shorter than the input": {
        **{"num_attention_heads": 12, "hidden_size": 48, "alibi_starting_size": 4}
    },
    "3 heads": {"num_attention_heads": 3, "hidden_size": 24, "num_hidden_layers": 2},
    "5 heads": {"num_attention_heads": 5, "hidden_size": 40, "intermediate_size": 12},
    "1 head": {"num_attention_heads": 1, "hidden_size": 16},
    "another eps": {"layer_norm_eps": 1e-3},
    "another head": {"hidden_act": "relu"},
    "one type": {"type_vocab_size": 1},
    "a longer buffer": {"max_position_embeddings": 4096},
}


def write_folder(folder, **changes):
    """Write a folder as published, of seeded noise; return its settings and weights."""
    values = json.loads((GOLDEN / "config.json").read_text()) | changes
    torch.manual_seed(5)
    model = DnaBert2ForMaskedLM(DnaBert2Config(**{k: v for k, v in values.items() if k != "auto_map"}))
    weights = {
        name: torch.randn_like(value) * (0.15 if value.dim() > 1 else 0.1)
        + (name.lower().endswith("norm.weight"))
        for name, value in model.state_dict().items()
    }
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(GOLDEN / name, folder / name)
    (folder / "config.json").write_text(json.dumps(values))
    torch.save(weights, folder / "pytorch_model.bin")
    return values, weights


def load(folder, dtype="float32"):
    return load_model(str(folder), device="cpu", dtype=dtype)


def blocks(model, ids, mask=None):
    layers = [layer.path for layer in model.resolve("all")]
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.inference_mode(), capture(model.module, layers) as found:
        model.module(ids, **forward_arguments(model.module, mask))
    return [found[path] for path in layers]


@pytest.mark.parametrize("name", VARIANTS)
def test_configuration_is_followed(name, tmp_path):
    values, weights = write_folder(tmp_path / "x", **VARIANTS[name])
    expected, logits = oracle(values, weights, IDS)
    model = load(tmp_path / "x")
    for state, value in zip(blocks(model, IDS[None]), expected[1:], strict=True):
        torch.testing.assert_close(state[0].double(), value, rtol=0, atol=1e-5)
    whole, info = DnaBert2ForMaskedLM.from_pretrained(
        tmp_path / "x", config=model.module.config, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.inference_mode():
        found = whole.eval()(IDS[None], output_hidden_states=True)
    torch.testing.assert_close(found.logits[0].double(), logits, rtol=0, atol=1e-5)
    assert len(found.hidden_states) == len(expected)
    for state, value in zip(found.hidden_states, expected, strict=True):
        torch.testing.assert_close(state[0].double(), value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_heads", [*range(1, 18), 24, 25])
def test_slopes_are_those_of_alibi(num_heads):
    expected = [slope(head, num_heads) for head in range(num_heads)]
    assert head_slopes(num_heads) == pytest.approx(expected, rel=1e-12)


def test_what_a_model_says_of_itself():
    model = load(GOLDEN)
    assert (model.padding, model.is_causal, model.max_length) == ("mask", False, None)
    assert model.untrained == ()
    assert model.resolve("final")[0].path == "encoder.layer.2"
    assert [layer.path for layer in model.resolve("all")] == [f"encoder.layer.{i}" for i in range(3)]
    assert model.module(IDS[None]).pooler_output is None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_queries_in_parts_give_the_same(implementation, monkeypatch):
    model = load(GOLDEN)
    model.module.set_attn_implementation(implementation)
    ids = torch.randint(5, 200, (2, 37), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    whole = blocks(model, ids, mask)
    for most in (1, 2 * 4 * 37 * 5, 2 * 4 * 37 * 37 - 1):
        monkeypatch.setattr(dnabert2, "_MOST_SCORES", most)
        for part, expected in zip(blocks(model, ids, mask), whole, strict=True):
            torch.testing.assert_close(part, expected, rtol=0, atol=2e-6)


def test_attention_of_parts_is_put_together(monkeypatch):
    model = load(GOLDEN)
    model.module.set_attn_implementation("eager")
    with torch.inference_mode():
        whole = model.module(IDS[None], output_attentions=True).attentions
        monkeypatch.setattr(dnabert2, "_MOST_SCORES", 4 * 12 * 5)
        parts = model.module(IDS[None], output_attentions=True).attentions
    assert [part.shape for part in parts] == [(1, 4, 12, 12)] * 3
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(part.sum(-1), torch.ones(1, 4, 12))


def test_half_precision_stays_close_over_thousands_of_tokens():
    ids = torch.randint(5, 200, (1, 3000), generator=torch.Generator().manual_seed(0))
    full, half = (blocks(load(GOLDEN, dtype), ids)[-1].float() for dtype in ("float32", "bfloat16"))
    assert (half - full).norm() / full.norm() < 2e-2


def test_rows_of_padding_only_are_finite():
    ids = torch.stack([IDS, torch.full_like(IDS, 3)])
    mask = torch.stack([torch.ones_like(IDS), torch.zeros_like(IDS)])
    model = load(GOLDEN)
    final = blocks(model, ids, mask)[-1]
    assert final.isfinite().all()
    torch.testing.assert_close(final[0], blocks(model, IDS[None])[-1][0], rtol=0, atol=1e-5)


def test_head_number_that_does_not_divide_the_width_is_refused():
    with pytest.raises(ValueError, match="hidden_size is 32, expected a multiple of num_attention_heads, 5"):
        DnaBert2Config(hidden_size=32, num_attention_heads=5)


def test_ids_and_embedded_tokens_exclude_each_other():
    module = load(GOLDEN).module
    embedded = module.get_input_embeddings()(IDS[None])
    one, two = module(IDS[None]), module(inputs_embeds=embedded)
    assert torch.equal(one.last_hidden_state, two.last_hidden_state)
    for arguments in ({}, {"input_ids": IDS[None], "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            module(**arguments)


@pytest.mark.parametrize(
    "changes", [{"auto_map": None}, {"alibi_starting_size": None}, {"model_type": "bert"}]
)
def test_folder_is_recognized_by_its_weights(changes, tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "x")
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {k: v for k, v in values.items() if v is not None and (changes.get("auto_map") or k != "auto_map")}
    (folder / "config.json").write_text(json.dumps(kept))
    assert type(load(folder).module).__name__ == "DnaBert2Model"


def test_folder_with_weights_of_the_base_alone_is_recognized(tmp_path):
    """As DNABERT-S is saved: no prefix, no head; and a pooler that no one has trained for embeddings."""
    folder = shutil.copytree(GOLDEN, tmp_path / "x")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    base = {k.removeprefix("bert."): v for k, v in weights.items() if k.startswith("bert.")}
    base |= {"pooler.dense.weight": torch.zeros(32, 32), "pooler.dense.bias": torch.zeros(32)}
    torch.save(base, folder / "pytorch_model.bin")
    assert torch.equal(blocks(load(folder), IDS[None])[-1], blocks(load(GOLDEN), IDS[None])[-1])


def test_tokenizer_needs_no_class_in_its_file(tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "x")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    del values["tokenizer_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    expected = load(GOLDEN).tokenizer("ACGTNNACGTTGCA")["input_ids"]
    assert load(folder).tokenizer("ACGTNNACGTTGCA")["input_ids"] == expected


def test_letters_without_a_token_are_unknown_one_by_one():
    ids = load(GOLDEN).tokenizer("ACGTNNNacgtACGT")["input_ids"]
    assert ids.count(0) == 7


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}


def test_others_are_left_alone(tmp_path):
    BertForMaskedLM(BertConfig(vocab_size=50, **SIZES)).save_pretrained(tmp_path / "bert")
    sizes = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}
    modern = ModernBertConfig(**SIZES, **sizes, sep_token_id=2)
    ModernBertModel(modern).save_pretrained(tmp_path / "modern")
    for name in ("bert", "modern"):
        values = json.loads((tmp_path / name / "config.json").read_text())
        assert family_of(Published(values, tmp_path / name)) is None
        del values["model_type"]
        assert family_of(Published(values, tmp_path / name)) is None
    # gated as well, but with queries, keys and values apart
    parts = ("attention.self.query.weight", "mlp.gated_layers.weight", "mlp.wo.weight")
    (tmp_path / "jina").mkdir()
    torch.save(
        {f"encoder.layer.0.{part}": torch.zeros(2, 2) for part in parts},
        tmp_path / "jina" / "pytorch_model.bin",
    )
    jina = {"position_embedding_type": "alibi", "auto_map": {"AutoModel": "modeling_bert.JinaBertModel"}}
    assert family_of(Published(jina, tmp_path / "jina")) is None


def test_configuration_alone_is_recognized():
    values = json.loads((GOLDEN / "config.json").read_text())
    assert family_of(Published(values)).model_type == "dnabert2"
    assert family_of(Published({k: v for k, v in values.items() if k != "auto_map"})).model_type == "dnabert2"
    assert family_of(Published({"model_type": "bert", "max_position_embeddings": 512})) is None
