"""GENA-LM beyond its golden folder: every setting against plain torch, and what is not GENA-LM."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
)

from genoembed.errors import ModelError
from genoembed.models.families import Published, family_of
from genoembed.models.load import load_model

GOLDEN = Path(__file__).parents[2] / "golden" / "families" / "gena_lm"
IDS = torch.tensor([[1, 30, 41, 77, 120, 5, 8, 9, 10, 2], [1, 7, 8, 9, 2, 3, 3, 3, 3, 3]])
MASK = (IDS != 3).long()


def norm(x, w, name, eps):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def linear(x, w, name):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def turned(x, config):
    """Rotate queries or keys ``(H, L, D)`` pair by pair, written out."""
    length, width = x.shape[1:]
    part = config.get("rotary_dim", width)
    out = x.clone()
    for position in range(length):
        for pair in range(part // 2):
            angle = position * config.get("rotary_base", 10000) ** (-2 * pair / part)
            a, b = x[:, position, pair], x[:, position, pair + part // 2]
            out[:, position, pair] = a * math.cos(angle) - b * math.sin(angle)
            out[:, position, pair + part // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def oracle(config, w, ids):
    """Run one sequence in float64 as the published code does; gives every hidden state and the logits."""
    w = {name: value.double() for name, value in w.items()}
    eps, heads = config["layer_norm_eps"], config["num_attention_heads"]
    pre = config.get("pre_layer_norm", False)
    rotary = config.get("position_embedding_type") == "rotary"
    x = w["bert.embeddings.word_embeddings.weight"][ids]
    x = x + w["bert.embeddings.token_type_embeddings.weight"][0]
    if not rotary:
        x = x + w["bert.embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x, w, "bert.embeddings.LayerNorm", eps)
    states = [x]
    for index in range(config["num_hidden_layers"]):
        at = f"bert.encoder.layer.{index}"
        y = norm(x, w, f"{at}.pre_attention_ln", eps) if pre else x
        q, k, v = (
            linear(y, w, f"{at}.attention.self.{name}").view(len(ids), heads, -1).transpose(0, 1)
            for name in ("query", "key", "value")
        )
        if rotary:
            q, k = turned(q, config), turned(k, config)
        y = ((q @ k.transpose(1, 2)) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        y = linear(y.transpose(0, 1).flatten(1), w, f"{at}.attention.output.dense")
        x = x + y if pre else norm(x + y, w, f"{at}.attention.output.LayerNorm", eps)
        y = norm(x, w, f"{at}.post_attention_ln", eps) if pre else x
        y = linear(F.gelu(linear(y, w, f"{at}.intermediate.dense")), w, f"{at}.output.dense")
        x = x + y if pre else norm(x + y, w, f"{at}.output.LayerNorm", eps)
        states.append(x)
    if config.get("last_layer_norm", pre):
        states[-1] = norm(x, w, "bert.encoder.last_layer_ln", eps)
    y = F.gelu(linear(states[-1], w, "cls.predictions.transform.dense"))
    y = norm(y, w, "cls.predictions.transform.LayerNorm", eps)
    return states, y @ w["bert.embeddings.word_embeddings.weight"].T + w["cls.predictions.bias"]


def folder_with(tmp_path, **settings):
    """Write a folder in the published layout with other settings; None removes one."""
    folder = shutil.copytree(GOLDEN, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text()) | settings
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    w = {"bert.embeddings.word_embeddings.weight": noise(config["vocab_size"], hidden)}
    w["bert.embeddings.token_type_embeddings.weight"] = noise(2, hidden)
    if config.get("position_embedding_type") != "rotary":
        w["bert.embeddings.position_embeddings.weight"] = noise(config["max_position_embeddings"], hidden)
    norms, dense = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"], {}
    for index in range(config["num_hidden_layers"]):
        at = f"bert.encoder.layer.{index}"
        own = (
            ("pre_attention_ln", "post_attention_ln")
            if config.get("pre_layer_norm")
            else ("attention.output.LayerNorm", "output.LayerNorm")
        )
        norms += [f"{at}.{name}" for name in own]
        dense |= {f"{at}.attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
        dense |= {f"{at}.attention.output.dense": (hidden, hidden)}
        dense |= {f"{at}.intermediate.dense": (inner, hidden), f"{at}.output.dense": (hidden, inner)}
    if config.get("last_layer_norm", config.get("pre_layer_norm", False)):
        norms.append("bert.encoder.last_layer_ln")
    dense["cls.predictions.transform.dense"] = (hidden, hidden)
    for name in norms:
        w |= {f"{name}.weight": 1 + noise(hidden), f"{name}.bias": noise(hidden)}
    for name, shape in dense.items():
        w |= {f"{name}.weight": noise(*shape), f"{name}.bias": noise(shape[0])}
    w["cls.predictions.bias"] = noise(config["vocab_size"])
    (folder / "pytorch_model.bin").unlink()
    extra = {}
    if config.get("position_embedding_type") == "rotary":  # the published files hold the frequencies
        part = config.get("rotary_dim", hidden // config["num_attention_heads"])
        for index in range(config["num_hidden_layers"]):
            name = f"bert.encoder.layer.{index}.attention.self.rotary_emb.inv_freq"
            extra[name] = config.get("rotary_base", 10000) ** -(torch.arange(0, part, 2) / part)
    save_file(w | extra, folder / "model.safetensors")
    return folder, config, w


VARIANTS = {
    "last norm by default": {"last_layer_norm": None},
    "last norm": {"last_layer_norm": True},
    "two heads, another eps": {"num_attention_heads": 2, "layer_norm_eps": 1e-3},
    "rotary": {"position_embedding_type": "rotary", "rotary_dim": 4, "rotary_base": 10000},
    "rotary, all of a head": {"position_embedding_type": "rotary", "rotary_dim": 8, "rotary_base": 500},
    "rotary, unsaid": {"position_embedding_type": "rotary", "last_layer_norm": True},
    "rotary, norms behind": {
        "position_embedding_type": "rotary",
        "rotary_dim": 6,
        "pre_layer_norm": False,
        "last_layer_norm": None,
    },
    "wider, one block": {"hidden_size": 40, "num_hidden_layers": 1, "intermediate_size": 24},
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_setting_equals_plain_torch(name, implementation, tmp_path):
    folder, config, w = folder_with(tmp_path, **VARIANTS[name])
    model = load_model(str(folder), device="cpu", dtype="float32")
    assert model.family.name == "GENA-LM"
    whole = AutoModelForMaskedLM.from_pretrained(folder, config=model.module.config).eval()
    model.module.set_attn_implementation(implementation)
    whole.set_attn_implementation(implementation)
    with torch.inference_mode():
        found = model.module(IDS, attention_mask=MASK, output_hidden_states=True)
        logits = whole(IDS, attention_mask=MASK).logits
    for row, ids in enumerate(IDS):
        real = int(MASK[row].sum())
        states, expected = oracle(config, w, ids[:real])
        assert len(states) == len(found.hidden_states)
        for hidden, state in zip(found.hidden_states, states, strict=True):
            torch.testing.assert_close(hidden[row, :real], state.float(), rtol=0, atol=1e-5)
        torch.testing.assert_close(logits[row, :real], expected.float(), rtol=0, atol=2e-5)


def test_final_is_the_last_norm_where_there_is_one(tmp_path):
    folder, _, _ = folder_with(tmp_path, last_layer_norm=True)
    assert load_model(str(folder)).resolve("final")[0].path == "encoder.last_layer_ln"
    assert load_model(str(GOLDEN)).resolve("final")[0].path == "encoder.layer.2"


def test_bfloat16_is_near_float32():
    exact, half = (
        load_model(str(GOLDEN), device="cpu", dtype=kind).module for kind in ("float32", "bfloat16")
    )
    with torch.inference_mode():
        expected = exact(IDS, attention_mask=MASK).last_hidden_state
        found = half(IDS, attention_mask=MASK).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected)[MASK.bool()].abs().max() < 0.05 * expected.abs().max()


def test_checkpointed_gradients_equal_plain_ones(tmp_path):
    folder, _, _ = folder_with(tmp_path, position_embedding_type="rotary", rotary_dim=4)
    gradients = []
    for checkpointed in (False, True):
        model = load_model(str(folder), device="cpu", dtype="float32").module.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointed:
            model.activation_checkpointing_enable()
        model(IDS, attention_mask=MASK).last_hidden_state.square().sum().backward()
        gradients.append(model.encoder.layer[0].attention.self.query.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_saved_folder_opens_with_every_head(tmp_path):
    model = load_model(str(GOLDEN), dtype="float32")
    whole = AutoModelForMaskedLM.from_pretrained(GOLDEN, config=model.module.config)
    whole.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").model_type == "gena_lm"
    again, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
    with torch.inference_mode():
        assert torch.equal(again.eval()(IDS).logits, whole.eval()(IDS).logits)
    for auto, shape in (
        (AutoModelForSequenceClassification, (2, 3)),
        (AutoModelForTokenClassification, (2, 10, 3)),
    ):
        head = auto.from_pretrained(tmp_path / "saved", num_labels=3)
        output = head(IDS, attention_mask=MASK, labels=torch.zeros(shape[:-1], dtype=torch.long))
        assert output.logits.shape == shape
        assert output.loss.isfinite()


def test_special_tokens_named_in_their_own_file_only_are_read():
    assert "unk_token" not in json.loads((GOLDEN / "tokenizer_config.json").read_text())
    tokenizer = load_model(str(GOLDEN)).tokenizer
    assert tokenizer.pad_token_id == 3
    assert tokenizer.mask_token == "[MASK]"
    assert {0, 1, 2, 3, 4} <= set(tokenizer.all_special_ids)
    assert tokenizer(["ACGT", "ACGTACGTACGTAC"], padding=True)["input_ids"][0][-1] == 3


@pytest.mark.parametrize(
    "removed", [("auto_map",), ("model_type",), ("auto_map", "model_type", "architectures")]
)
def test_folder_is_recognized_without_its_labels(removed, tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in removed}))
    found = load_model(str(folder), dtype="float32").module(IDS).last_hidden_state
    expected = load_model(str(GOLDEN), dtype="float32").module(IDS).last_hidden_state
    assert torch.equal(found, expected)


def test_plain_bert_is_not_taken_for_gena_lm(tmp_path):
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for more in (
        {},
        {"pre_layer_norm": False},
        {"position_embedding_type": "absolute"},
        {"model_type": None},
    ):
        assert family_of(Published(values | more, tmp_path)) is None


def test_published_sparse_attention_is_said_to_be_dense(tmp_path, caplog):
    folder, _, _ = folder_with(
        tmp_path,
        position_embedding_type="rotary",
        rotary_dim=4,
        sparse_config_cls="deepspeed.ops.sparse_attention:BigBirdSparsityConfig",
        sparse_attention={"num_heads": 4, "block": 64},
    )
    with caplog.at_level(logging.WARNING):
        assert load_model(str(folder)).layers
    assert "block-sparse" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"position_embedding_type": "relative_key"}, "'relative_key', expected 'absolute' or 'rotary'"),
        ({"pre_layer_norm": False, "last_layer_norm": True}, "last_layer_norm"),
    ],
)
def test_settings_that_no_gena_lm_has_are_refused(settings, words, tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words):
        load_model(str(folder))
