"""NTv3: what configurations can say against a plain computation, any length, a vector of each base."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from genoembed.cli import main
from genoembed.errors import ConfigError, ShapeError
from genoembed.models.describe import describe_layers
from genoembed.models.families import Published, family_of
from genoembed.models.families.ntv3 import Ntv3Config, Ntv3ForMaskedLM, Ntv3Model
from genoembed.models.layers import capture
from genoembed.models.load import load_model
from genoembed.store.reader import open_embeddings

GOLDEN = Path(__file__).parents[2] / "golden" / "families" / "ntv3_pre"


def oracle(config, weights, ids):
    """Compute what each block gives and the logits of one sequence, position by position, in float64."""
    weights = {key.removeprefix("core."): value.double() for key, value in weights.items()}

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def linear(x, name):
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def convolve(x, taps, bias):
        half = taps.shape[-1] // 2
        rows = []
        for position in range(len(x)):
            row = bias.clone()
            for tap in range(taps.shape[-1]):
                if 0 <= position + tap - half < len(x):
                    row = row + taps[:, :, tap] @ x[position + tap - half]
            rows.append(row)
        return torch.stack(rows)

    def block(x, at, *, doubles=False, transposed=False):
        x = norm(x, f"{at}.layer_norm", 1e-5)
        taps = weights[f"{at}.conv.weight"]
        if doubles and config["deconv_upsample_type"] == "repeat+conv":
            x = torch.stack((x, x), 1).flatten(0, 1)
        elif doubles:
            zero = torch.zeros_like(x)
            x = torch.stack((zero, x) if config["deconv_phase"] == "odd" else (x, zero), 1).flatten(0, 1)
            transposed = True
        return gelu(convolve(x, taps.transpose(0, 1) if transposed else taps, weights[f"{at}.conv.bias"]))

    def rotate(x):
        half = x.shape[-1] // 2
        angles = torch.arange(len(x)).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        first, second = x[:, :half], x[:, half:]
        return torch.cat(
            (
                first * angles.cos() - second * angles.sin(),
                second * angles.cos() + first * angles.sin(),
            ),
            -1,
        )

    x = weights["embed_layer.weight"][ids]
    x = gelu(convolve(x, weights["stem.conv.weight"], weights["stem.conv.bias"]))
    given, skips = [x], []
    for index in range(config["num_downsamples"]):
        at = f"conv_tower_blocks.{index}"
        skips.append(x)
        x = block(x, f"{at}.conv")
        x = x + block(x, f"{at}.res_conv.conv_block")
        given.append(x)
        x = (x[::2] + x[1::2]) / 2
    for index in range(config["num_layers"]):
        at = f"transformer_blocks.{index}"
        y = norm(x, f"{at}.self_attention_layer_norm", config["layer_norm_eps"])
        heads = []
        for start in range(0, config["embed_dim"], config["key_size"]):
            span = slice(start, start + config["key_size"])
            q, k, v = (
                linear(y, f"{at}.sa_layer.{name}_head.linear")[:, span] for name in ("query", "key", "value")
            )
            scores = rotate(q) @ rotate(k).T / math.sqrt(config["key_size"])
            heads.append(scores.softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), f"{at}.sa_layer.mha_output")
        gate, value = linear(norm(x, f"{at}.final_layer_norm", config["layer_norm_eps"]), f"{at}.fc1").chunk(
            2, -1
        )
        x = x + linear(F.silu(gate) * value, f"{at}.fc2")
        given.append(x)
    for index in range(config["num_downsamples"]):
        at = f"deconv_tower_blocks.{index}"
        x = block(x, f"{at}.conv", doubles=True)
        x = x + block(x, f"{at}.res_conv.conv_block", transposed=True)
        x = x + skips.pop() if config["use_skip_connection"] else x
        given.append(x)
    y = gelu(x)
    for index in range(config["num_hidden_layers_head"]):
        y = gelu(linear(y, f"lm_head.hidden_layers.{index}"))
    return given, linear(y, "lm_head.head")


BASE = {
    "alphabet_size": 11,
    "num_downsamples": 2,
    "attention_heads": 2,
    "key_size": 4,
    "token_embed_dim": 6,
    "conv_init_embed_dim": 8,
    "embed_dim": 8,
    "ffn_embed_dim": 12,
    "num_layers": 2,
    "layer_norm_eps": 1e-5,
    "num_hidden_layers_head": 0,
    "use_skip_connection": True,
    "deconv_upsample_type": "repeat+conv",
    "deconv_phase": "odd",
}
VARIANTS = {
    "published": {},
    "zeros_odd": {"deconv_upsample_type": "conv_transpose"},
    "zeros_even": {"deconv_upsample_type": "conv_transpose", "deconv_phase": "even"},
    "widths_grow": {"conv_init_embed_dim": 5, "embed_dim": 12, "key_size": 6, "num_downsamples": 3},
    "widths_grow_zeros": {
        "conv_init_embed_dim": 5,
        "embed_dim": 12,
        "key_size": 6,
        "deconv_upsample_type": "conv_transpose",
    },
    "no_skips": {"use_skip_connection": False},
    "deeper_head": {"num_hidden_layers_head": 2},
    "other_epsilon": {"layer_norm_eps": 1e-2, "attention_heads": 4, "key_size": 2, "num_layers": 3},
    "one_step": {"num_downsamples": 1, "num_layers": 1},
}


def build(changes, *, seed=0, head=Ntv3ForMaskedLM):
    torch.manual_seed(seed)
    model = head(Ntv3Config(**BASE | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_a_plain_computation(variant, tmp_path):
    changes = VARIANTS[variant]
    config = BASE | changes
    model = build(changes)
    model.save_pretrained(tmp_path)
    multiple = 2 ** config["num_downsamples"]
    ids = torch.randint(6, 11, (3 * multiple - 1,), generator=torch.Generator().manual_seed(0))
    filled = torch.cat((ids, torch.tensor([1])))
    given, logits = oracle(config, load_file(tmp_path / "model.safetensors"), filled)
    again, info = AutoModelForMaskedLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for each in (model, again.eval()):
        with torch.no_grad():
            found = each(ids[None], output_hidden_states=True)
        assert len(found.hidden_states) == len(given)
        for ours, theirs in zip(found.hidden_states, given, strict=True):
            assert_near(ours[0], theirs)
        assert_near(found.logits[0], logits[: len(ids)])


def assert_near(found, expected):
    scale = max(float(expected.abs().max()), 1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * scale)


# --- lengths and layers ---------------------------------------------------------------------------


def golden_outputs(name):
    outputs = load_file(GOLDEN / "outputs.safetensors")
    return {k.removeprefix(f"{name}."): v for k, v in outputs.items() if k.startswith(f"{name}.")}


@pytest.fixture(scope="module")
def model():
    return load_model(str(GOLDEN), device="cpu", dtype="float32")


@pytest.mark.parametrize("name", ["len1", "len5", "len7", "len37", "len150", "with_n"])
def test_any_length_gives_what_the_official_code_gives_on_the_filled_sequence(model, name):
    expected = golden_outputs(name)
    sequence = json.loads((GOLDEN / "inputs.json").read_text())[name]
    ids = torch.tensor(model.tokenizer(sequence)["input_ids"])
    with torch.no_grad():
        found = model.module(ids[None])
        embedded = model.module(inputs_embeds=model.module.core.embed_layer(ids[None]))
    assert found.last_hidden_state.shape == (1, len(sequence), 24)
    torch.testing.assert_close(found.last_hidden_state[0], expected["final"][: len(ids)], rtol=0, atol=2e-5)
    assert torch.equal(embedded.last_hidden_state, found.last_hidden_state)


def test_other_fill_is_taken_as_it_is(model):
    for name in ("len7", "len37"):
        expected = golden_outputs(f"{name}.padn")
        assert 1 not in expected["input_ids"]
        with torch.no_grad():
            found = model.module(expected["input_ids"].long()[None]).last_hidden_state[0]
        torch.testing.assert_close(found, expected["final"], rtol=0, atol=2e-5)


def test_every_base_has_a_vector_of_every_block(model):
    ids = torch.randint(6, 10, (2, 13), generator=torch.Generator().manual_seed(0))
    config = model.module.config
    strides = {
        "core.stem": 1,
        **{f"core.conv_tower_blocks.{i}": 2**i for i in range(3)},
        **{f"core.transformer_blocks.{i}": 8 for i in range(2)},
        **{f"core.deconv_tower_blocks.{i}": 4 // 2**i for i in range(3)},
    }
    with torch.no_grad():
        with capture(model.module, list(strides)) as found:
            model.module(ids)
        given = model.module(ids, output_hidden_states=True).hidden_states
    assert len(given) == 2 * config.num_downsamples + config.num_layers + 1
    for (path, stride), states in zip(strides.items(), given, strict=True):
        assert states.shape[1] == 16 // stride
        expected = torch.stack([states[:, base // stride] for base in range(13)], dim=1)
        assert torch.equal(found[path], expected), path


def test_numbers_are_transformer_blocks_and_widths_are_told(model, tmp_path):
    described = describe_layers(str(GOLDEN))
    assert described.numbered == ("core.transformer_blocks.0", "core.transformer_blocks.1")
    assert described.final == "core.deconv_tower_blocks.2" == model.resolve("final")[0].path
    assert (model.padding, model.is_causal, model.accepts_attention_mask) == ("equal", False, False)
    build({"conv_init_embed_dim": 5, "embed_dim": 12, "key_size": 6}).save_pretrained(tmp_path)
    widths = {layer.path: layer.width for layer in describe_layers(str(tmp_path)).layers}
    assert widths["core.stem"] == widths["core.deconv_tower_blocks.1"] == 5
    assert widths["core.conv_tower_blocks.0"] == widths["core.deconv_tower_blocks.0"] == 8
    assert widths["core.transformer_blocks.1"] == widths["core.conv_tower_blocks.1"] == 12


def test_extract_gives_a_vector_of_each_base_at_any_layer(model, tmp_path):
    (tmp_path / "in.fa").write_text(">a\nACGTACGTACG\n>b\nGGAT\n>c\nTTGACGATACA\n")
    layers = ["0", "core.deconv_tower_blocks.1", "final"]
    options = [word for layer in layers for word in ("--layer", layer)]
    output = str(tmp_path / "o.h5")
    words = ["extract", str(tmp_path / "in.fa"), "--model", str(GOLDEN), "--pool", "none", *options]
    result = CliRunner().invoke(main, [*words, "-o", output, "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    paths = [layer.path for layer in model.resolve(layers)]
    with open_embeddings(output) as embeddings:
        for record, sequence in (("a", "ACGTACGTACG"), ("b", "GGAT"), ("c", "TTGACGATACA")):
            ids = torch.tensor([model.tokenizer(sequence)["input_ids"]])
            with torch.no_grad(), capture(model.module, paths) as found:
                model.module(ids)
            for path in paths:
                vectors = embeddings.tokens(record, layer=path)
                assert vectors.shape == (len(sequence), 24)
                np.testing.assert_allclose(vectors, found[path][0].numpy(), rtol=0, atol=1e-5)


# --- plain transformers ---------------------------------------------------------------------------


def test_saved_folder_opens_with_plain_auto_classes(model, tmp_path):
    model.module.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer("ACGTNacgtTT", return_tensors="pt")
    assert batch["input_ids"].tolist() == [[6, 8, 9, 7, 10, 6, 8, 9, 7, 7, 7]]
    again = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.module(batch["input_ids"]).last_hidden_state
        assert torch.equal(again(**batch).last_hidden_state, expected)
    assert AutoModelForTokenClassification.from_pretrained(tmp_path)(**batch).logits.shape == (1, 11, 2)
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    filled = F.pad(batch["input_ids"], (0, 5), value=1)
    with torch.no_grad():
        one, other = head(**batch, labels=torch.tensor([2])), head(filled)
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.loss, F.cross_entropy(one.logits, torch.tensor([2])))


@pytest.mark.parametrize("kind", ["repeat+conv", "conv_transpose"])
def test_trainer_takes_a_step_and_checkpointing_changes_no_gradient(kind, tmp_path):
    model = build({"deconv_upsample_type": kind})
    ids = torch.randint(6, 10, (4, 11), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=1, report_to=[], use_cpu=True, per_device_train_batch_size=2
    )
    before = model.core.embed_layer.weight.detach().clone()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert not torch.equal(before, model.core.embed_layer.weight)
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("kind", ["repeat+conv", "conv_transpose"])
def test_half_precision_is_near(kind):
    model = build({"deconv_upsample_type": kind, "embed_dim": 12, "key_size": 6}, head=Ntv3Model)
    ids = torch.randint(6, 10, (1, 61), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(ids).last_hidden_state
        found = model.to(torch.bfloat16)(ids).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.03 * expected.norm()
    assert (mixed.float() - expected).norm() < 0.03 * expected.norm()
    with pytest.raises(ShapeError, match="exactly one of input_ids and inputs_embeds"):
        model()


# --- folders --------------------------------------------------------------------------------------


def test_file_that_was_saved_after_a_pass_is_read(model, tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "x")
    weights = load_file(folder / "model.safetensors")
    for index in range(2):
        at = f"core.transformer_blocks.{index}.sa_layer.rotary_embedding"
        weights[f"{at}.cos_cached"] = torch.zeros(1, 13, 1, 3)
        weights[f"{at}.sin_cached"] = torch.zeros(1, 13, 1, 3)
        weights[f"{at}.inv_freq"] = weights[f"{at}.inv_freq"].bfloat16().float()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    ids = torch.randint(6, 10, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = load_model(str(folder), dtype="float32").module(ids).last_hidden_state
        assert torch.equal(found, model.module(ids).last_hidden_state)


def test_weights_that_wait_on_the_disk_give_the_same(model):
    stages = ("conv_tower_blocks", "transformer_blocks", "deconv_tower_blocks")
    places = {f"core.{name}": "disk" for name in stages} | {"core.embed_layer": "cpu", "core.stem": "cpu"}
    placed = load_model(str(GOLDEN), device="cpu", dtype="float32", device_map=places)
    assert {parameter.device.type for parameter in placed.module.parameters()} == {"cpu", "meta"}
    ids = torch.randint(6, 10, (1, 13), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(placed.module(ids).last_hidden_state, model.module(ids).last_hidden_state)


def published(**changes):
    values = json.loads((GOLDEN / "config.json").read_text()) | changes
    return Published({key: value for key, value in values.items() if value is not None}, GOLDEN)


def test_folder_is_recognized_whatever_is_left_out():
    silent = {"model_type": None, "architectures": None, "auto_map": None}
    assert family_of(published()).name == "NTv3"
    assert family_of(published(**silent)).name == "NTv3"
    assert family_of(published(**silent, num_downsamples=None)).name == "NTv3"
    assert family_of(Published({"architectures": ["NTv3PreTrained"]})).name == "NTv3"
    tracks = {"model_type": "ntv3_posttrained", "architectures": ["NTv3PostTrained"]}
    assert family_of(published(**tracks, bigwigs_per_species={"human": []})) is None


def test_nonsense_is_refused():
    with pytest.raises(ConfigError, match="expected repeat\\+conv or conv_transpose"):
        Ntv3Config(deconv_upsample_type="bilinear")
    with pytest.raises(ConfigError, match="expected odd or even"):
        Ntv3Config(deconv_phase="third")
    with pytest.raises(ConfigError, match="not as wide as embed_dim"):
        Ntv3Config(key_size=7)
    with pytest.raises(ConfigError, match="must be above 0"):
        Ntv3Config(num_downsamples=0)
    assert Ntv3Config(deconv_upsample_type="DeConvUpsampleType.CONV_TRANSPOSE").deconv_upsample_type == (
        "conv_transpose"
    )
    assert Ntv3Config(conv_init_embed_dim=100, embed_dim=256).widths == [
        100,
        122,
        144,
        166,
        189,
        211,
        233,
        256,
    ]
