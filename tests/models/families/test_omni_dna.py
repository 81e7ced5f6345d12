"""Omni-DNA's settings, against a plain computation and transformers' Olmo and Llama with the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel, OlmoConfig, OlmoModel

from genoembed import load_model
from genoembed.errors import ModelError
from genoembed.models.families import Published, family_of
from genoembed.models.families.omni_dna import OmniDnaConfig, OmniDnaForCausalLM, OmniDnaModel

GOLDEN = Path(__file__).parents[2] / "golden" / "families" / "omni_dna"
SMALL = {"vocab_size": 40, "d_model": 24, "n_layers": 2, "n_heads": 4, "mlp_ratio": 4}
PLAIN_LAYERS = {"layer_norm_type": "default", "layer_norm_with_affine": False}
VARIANTS = {
    "1B": PLAIN_LAYERS,
    "300M": {"layer_norm_type": "rms"},
    "groups and biases": {
        "n_kv_heads": 2,
        "include_bias": True,
        "bias_for_layer_norm": True,
        "layer_norm_with_affine": True,
        "mlp_hidden_size": 40,
        "activation_type": "gelu",
        "clip_qkv": 0.4,
        "rope_theta": 500.0,
        "norm_after": True,
        "weight_tying": False,
        "scale_logits": True,
    },
    "more norms": {
        "layer_norm_type": "rms",
        "attention_layer_norm": True,
        "multi_query_attention": True,
        "embedding_layer_norm": True,
        "embedding_size": 48,
        "activation_type": "relu",
        "layer_norm_eps": 1e-3,
    },
}
IDS = torch.tensor([[5, 9, 1, 33, 20, 7, 7, 12, 3], [39, 2, 8, 8, 30, 11, 4, 6, 19]])


def seeded(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + (weight.dim() == 1))
    return model.eval()


def plain_logits(config, weights, ids_L):
    """Compute one sequence, head by head, in float64."""
    w = {name.removeprefix("model.transformer."): value.double() for name, value in weights.items()}
    size = config.d_model // config.n_heads

    def norm(x, name):
        if config.layer_norm_type == "rms":
            x = x / (x.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        else:
            variance = x.var(-1, unbiased=False, keepdim=True)
            x = (x - x.mean(-1, keepdim=True)) / (variance + config.layer_norm_eps).sqrt()
        return x * w.get(f"{name}.weight", 1.0) + w.get(f"{name}.bias", 0.0)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def turned(x, position):
        out = x.clone()
        for pair in range(size // 2):
            angle = torch.tensor(position * config.rope_theta ** (-2 * pair / size), dtype=torch.float64)
            a, b = x[pair], x[pair + size // 2]
            out[pair] = a * angle.cos() - b * angle.sin()
            out[pair + size // 2] = b * angle.cos() + a * angle.sin()
        return out

    def attend(x, block):
        projected = linear(x, f"{block}.att_proj")
        if config.clip_qkv:
            projected = projected.clamp(-config.clip_qkv, config.clip_qkv)
        q, k, v = projected.split((config.d_model, config.n_kv_heads * size, config.n_kv_heads * size), -1)
        if config.attention_layer_norm:
            q, k = norm(q, f"{block}.q_norm"), norm(k, f"{block}.k_norm")
        rows = []
        for i in range(len(x)):
            heads = []
            for head in range(config.n_heads):
                group = head // (config.n_heads // config.n_kv_heads)
                at = slice(group * size, (group + 1) * size)
                query = turned(q[i, head * size : (head + 1) * size], i)
                scores = torch.stack([query @ turned(k[j, at], j) for j in range(i + 1)]) / size**0.5
                heads.append(scores.softmax(0) @ v[: i + 1, at])
            rows.append(torch.cat(heads))
        return linear(torch.stack(rows), f"{block}.attn_out")

    def feed_forward(x, block):
        y = linear(x, f"{block}.ff_proj")
        if config.activation_type == "swiglu":
            values, gate = y.chunk(2, -1)
            y = values * gate * gate.sigmoid()
        else:
            y = F.gelu(y) if config.activation_type == "gelu" else y.clamp(min=0)
        return linear(y, f"{block}.ff_out")

    x = w["wte.weight"][ids_L]
    if config.embedding_layer_norm:
        x = norm(x, "emb_norm")
    for index in range(config.n_layers):
        block = f"blocks.{index}"
        for part, name in ((attend, "attn_norm"), (feed_forward, "ff_norm")):
            if config.norm_after:
                x = x + norm(part(x, block), f"{block}.{name}")
            else:
                x = x + part(norm(x, f"{block}.{name}"), block)
    x = norm(x, "ln_f")
    logits = x @ w["wte.weight"].T if config.weight_tying else linear(x, "ff_out")
    return logits / config.d_model**0.5 if config.scale_logits else logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_a_plain_computation(variant):
    config = OmniDnaConfig(**SMALL | VARIANTS[variant])
    model = seeded(OmniDnaForCausalLM(config))
    with torch.inference_mode():
        found = model(IDS, attention_mask=torch.ones_like(IDS)).logits
    for row, ids_L in zip(found, IDS, strict=True):
        expected = plain_logits(config, model.state_dict(), ids_L)
        torch.testing.assert_close(row.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_and_a_cache_change_nothing(variant):
    model = seeded(OmniDnaForCausalLM(OmniDnaConfig(**SMALL | VARIANTS[variant])))
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    with torch.inference_mode():
        whole = model(IDS).logits
        padded = model(IDS, attention_mask=mask).logits
        first = model(IDS[:, :4], use_cache=True)
        second = model(IDS[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(padded[0], whole[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(padded[1, :5], whole[1, :5], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "config_class", "model_class"),
    [("1B", OlmoConfig, OlmoModel), ("300M", LlamaConfig, LlamaModel)],
)
def test_published_sizes_equal_models_of_transformers(variant, config_class, model_class):
    """Their weights under other names, apart where ours lie in one matrix."""
    model = seeded(OmniDnaModel(OmniDnaConfig(**SMALL | VARIANTS[variant])))
    inner = SMALL["mlp_ratio"] * SMALL["d_model"] // 2
    eps = {} if config_class is OlmoConfig else {"rms_norm_eps": 1e-5}
    native = model_class(
        config_class(
            vocab_size=40,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=inner,
            **eps,
        )
    ).eval()
    weights = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("transformer.").replace("blocks.", "layers.")
        simple = {
            "wte": "embed_tokens",
            "ln_f": "norm",
            "attn_out": "self_attn.o_proj",
            "ff_out": "mlp.down_proj",
        }
        simple |= {"attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm"}
        kind = name.split(".")[-2]
        if kind in simple:
            weights[name.replace(kind, simple[kind])] = value
        elif kind == "att_proj":
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                weights[name.replace(kind, f"self_attn.{part}_proj")] = piece
        else:
            for part, piece in zip(("up", "gate"), value.chunk(2), strict=True):
                weights[name.replace(kind, f"mlp.{part}_proj")] = piece
    native.load_state_dict(weights)
    with torch.inference_mode():
        torch.testing.assert_close(
            model(IDS).last_hidden_state, native(IDS).last_hidden_state, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    "missing", [("model_type",), ("auto_map", "architectures"), ("model_type", "auto_map")]
)
def test_folder_is_recognized_by_less_than_it_says(missing, tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in missing}))
    assert isinstance(load_model(str(folder)).module, OmniDnaModel)


def test_olmo_of_transformers_is_not_taken():
    said = OlmoConfig().to_dict() | {"architectures": ["OlmoForCausalLM"]}
    assert family_of(Published(said)) is None


def test_saved_folder_opens_again_and_generates(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        GOLDEN, config=load_model(str(GOLDEN)).module.config, dtype=torch.float32
    )
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(again) is OmniDnaForCausalLM
    ids = IDS[:1, :5]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, again(ids).logits)
    written = again.generate(ids, max_new_tokens=4, do_sample=False)
    step = ids
    for _ in range(4):
        with torch.inference_mode():
            step = torch.cat((step, again(step).logits[:, -1:].argmax(-1)), 1)
    assert written.tolist() == step.tolist()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"alibi": True}, "alibi is True, expected False"),
        ({"n_kv_heads": 3}, "n_heads is 4, expected a divisor"),
    ],
)
def test_settings_that_no_published_model_has_are_refused(setting, message, tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | setting))
    with pytest.raises(ModelError, match=message):
        load_model(str(folder))


def test_half_precision_and_gradient_checkpointing_run():
    model = seeded(OmniDnaForCausalLM(OmniDnaConfig(**SMALL | VARIANTS["300M"])))
    with torch.inference_mode():
        exact = model(IDS).logits
        rounded = model.bfloat16()(IDS).logits.float()
    assert F.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.999
    model = model.float().train()
    model.activation_checkpointing_enable()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
