"""Evo 1: what configurations can say, against a plain computation; state, packing, padding; transformers."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from genoembed.cli import main
from genoembed.contracts import Batch
from genoembed.errors import ConfigError
from genoembed.models.families import Published, evo1, family_of
from genoembed.models.families.evo1 import Evo1Config, Evo1ForCausalLM, Evo1Model
from genoembed.models.language_model import LanguageModel
from genoembed.models.load import load_model
from genoembed.store.reader import open_embeddings
from genoembed.tokenization.char import CharTokenizer
from tests.models.families.test_goldens import GOLDEN

PUBLISHED = GOLDEN / "evo1"
SMALL = {
    "vocab_size": 128,
    "hidden_size": 16,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attn_layer_idxs": [1],
    "hyena_layer_idxs": [0, 2],
    "inner_mlp_size": 24,
    "mlp_activation": "gelu",
    "state_size": 3,
    "max_seqlen": 300,
}


def tiny(**settings):
    """Build a model whose weights are drawn, poles within the unit circle."""
    model = Evo1ForCausalLM(Evo1Config(**(SMALL | settings))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("poles"):
                shape = tensor.shape[:-1]
                sizes = 0.5 + 0.49 * torch.rand(shape, generator=generator)
                angles = 6 * torch.rand(shape, generator=generator)
                tensor.copy_(torch.view_as_real(torch.polar(sizes, angles)))
            else:
                tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
    return model


def ids_of(length, seed=0):
    letters = torch.tensor([65, 67, 71, 84, 78])
    return letters[torch.randint(0, 5, (length,), generator=torch.Generator().manual_seed(seed))]


def batch_of(*rows):
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return Batch(input_ids=ids, attention_mask=mask, pool_mask=mask.bool(), rows=tuple(range(len(rows))))


def oracle(config, weights, ids):
    """Compute the states and logits of one sequence in float64, one position after the other."""
    weights = {name.removeprefix("backbone."): value.double() for name, value in weights.items()}
    n, width, heads = len(ids), config["hidden_size"], config["num_attention_heads"]
    size = width // heads

    def product(x, name):
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(x, name):
        root = x.pow(2).sum(-1, keepdim=True).sqrt() / math.sqrt(width)
        return weights[f"{name}.scale"] * x / (root + config["eps"])

    def activation(x):
        if config["mlp_activation"] == "silu":
            return x / (1 + (-x).exp())
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def convolution(u, at):
        z = product(norm(u, f"{at}.pre_norm"), f"{at}.projections")
        taps = weights[f"{at}.filter.short_filter_weight"][:, 0]
        short = torch.zeros_like(z) + weights.get(f"{at}.filter.short_filter_bias", 0)
        for position in range(n):
            for back in range(config["short_filter_length"]):
                if back <= position:
                    short[position] += taps[:, -1 - back] * z[position - back]
        if config["column_split_hyena"]:
            parts = [
                torch.cat(
                    [short[:, (3 * h + i) * size : (3 * h + i + 1) * size] for h in range(heads)], dim=-1
                )
                for i in range(3)
            ]
        else:
            parts = short.split(width, dim=-1)
        gated = parts[1] * parts[2]
        poles, residues = (
            torch.view_as_complex(weights[f"{at}.filter.{name}"])[..., 0] for name in ("poles", "residues")
        )
        mixed = torch.zeros_like(gated)
        for channel in range(width):
            system = channel // config["hyena_filter_groups"]
            state = torch.zeros(config["state_size"], dtype=torch.complex128)
            for position in range(n):
                state = poles[system] * state + gated[position, channel]
                mixed[position, channel] = (residues[system] * state).sum().real
        mixed = (mixed + weights[f"{at}.filter.D"] * gated) * parts[0]
        return u + product(mixed, f"{at}.out_filter_dense")

    def attention(u, at):
        qkv = product(norm(u, f"{at}.pre_norm"), f"{at}.inner_mha_cls.Wqkv")
        shared = config["proj_groups"]
        query, key, value = qkv.split((width, width // shared, width // shared), dim=-1)
        factor = config["rotary_emb_scaling_factor"] if config["use_interpolated_rotary_pos_emb"] else 1
        half = size // 2
        mixed = torch.zeros_like(query)

        def rotate(x, position):
            angle = position / factor * config["rotary_emb_base"] ** (-torch.arange(half) * 2.0 / size)
            a, b = x[:half], x[half:]
            return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()))

        for h in range(heads):
            own = slice(h * size, (h + 1) * size)
            other = slice(h // shared * size, (h // shared + 1) * size)
            for position in range(n):
                q = rotate(query[position, own], position)
                ks = torch.stack([rotate(key[p, other], p) for p in range(position + 1)])
                weight = (ks @ q / math.sqrt(size)).softmax(0)
                mixed[position, own] = weight @ value[: position + 1, other]
        return u + product(mixed, f"{at}.inner_mha_cls.out_proj")

    x = weights["embedding_layer.weight"][ids]
    states = [x]
    for index in range(config["num_layers"]):
        at = f"blocks.{index}"
        x = attention(x, at) if index in config["attn_layer_idxs"] else convolution(x, at)
        y = norm(x, f"{at}.post_norm")
        y = activation(product(y, f"{at}.mlp.l1")) * product(y, f"{at}.mlp.l2")
        x = x + product(y, f"{at}.mlp.l3")
        states.append(x)
    final = norm(x, "norm") if config["final_norm"] else x
    head = "embedding_layer.weight" if config["tie_embeddings"] else "unembed.weight"
    return states, final, final @ weights[head].T


VARIANTS = {
    "as published": {},
    "interpolated positions": {"use_interpolated_rotary_pos_emb": True, "rotary_emb_scaling_factor": 16},
    "a factor that is not used": {"rotary_emb_scaling_factor": 16},
    "thirds one after the other": {"column_split_hyena": False},
    "another activation": {"mlp_activation": "silu"},
    "an activation left out": {"mlp_activation": None},
    "shared keys": {"proj_groups": 2},
    "shared filters": {"hyena_filter_groups": 4},
    "no biases": {"qkv_proj_bias": False, "mha_out_proj_bias": False, "short_filter_bias": False},
    "other lengths and bases": {"short_filter_length": 4, "rotary_emb_base": 500, "state_size": 1},
    "no last norm": {"final_norm": False},
    "a head of its own": {"tie_embeddings": False},
    "inner size left out": {"inner_mlp_size": None, "inner_size_multiple_of": 8},
    "large eps": {"eps": 0.3},
    "filters only": {"attn_layer_idxs": [], "hyena_layer_idxs": [0, 1, 2]},
    "attention only": {"attn_layer_idxs": [0, 1, 2], "hyena_layer_idxs": []},
    "eight heads": {"num_attention_heads": 8},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_variant_saved_and_loaded_equals_a_plain_computation(settings, tmp_path, monkeypatch):
    """With filters written out, and by chunks."""
    given = {key: value for key, value in (SMALL | settings).items() if value is not None}
    stated = {key: getattr(Evo1Config(**given), key) for key in SMALL | settings}
    tiny(**stated).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu", dtype="float32")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(loaded.module) is Evo1Model
    weights, config = load_file(tmp_path / "model.safetensors"), loaded.module.config.to_dict()
    for length, written_out in ((2, 1024), (67, 1024), (67, 0)):
        monkeypatch.setattr(evo1, "_WRITTEN_OUT", written_out)
        ids = ids_of(length)
        if written_out:
            states, final, logits = oracle(config, weights, ids)
        with torch.inference_mode():
            found = loaded.module(ids[None], output_hidden_states=True)
            scored = whole(ids[None]).logits
        scale = max(1, float(final.abs().max()))
        for ours, theirs in zip(found.hidden_states, [*states[:-1], final], strict=True):
            torch.testing.assert_close(ours[0].double(), theirs, rtol=1e-5, atol=1e-5 * scale)
        torch.testing.assert_close(scored[0].double(), logits, rtol=1e-5, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"hyena_layer_idxs": [0]}, r"must name each of the 3 blocks \(num_layers\) exactly once"),
        ({"hidden_size": 20}, "hidden_size 20 is not an even multiple of num_attention_heads 4"),
        ({"proj_groups": 3}, "num_attention_heads 4 is not a multiple of proj_groups 3"),
        ({"mlp_activation": "relu"}, "mlp_activation is 'relu'"),
        ({"proj_groups": 2, "smeared_gqa": True}, "smeared_gqa must be False"),
    ],
)
def test_settings_that_make_no_model_are_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        Evo1Config(**(SMALL | settings))


def test_bfloat16_is_as_near_as_the_official_precision():
    model = load_model(str(PUBLISHED), device="cpu", dtype="bfloat16")
    kept = {t.dtype for name, t in model.module.named_parameters() if name.endswith(("poles", "residues"))}
    assert kept == {torch.float32}
    assert {t.dtype for t in model.module.to(torch.bfloat16).parameters()} == {torch.float32, torch.bfloat16}
    assert model.provenance["dtype"] == "bfloat16"
    exact = load_file(PUBLISHED / "outputs.safetensors")
    official = load_file(PUBLISHED / "outputs_bf16.safetensors")["len100.final"]
    with torch.inference_mode():
        found = model.module(exact["len100.input_ids"].long()[None])[0][0].float()
    off = (official - exact["len100.final"]).abs().max()
    assert (found - exact["len100.final"]).abs().max() < 1.5 * off
    assert (found - official).abs().max() < 1.5 * off


def test_rotary_frequencies_are_computed_not_read(tmp_path):
    folder = shutil.copytree(PUBLISHED, tmp_path / "x")
    weights = load_file(folder / "model.safetensors")
    stored = [name for name in weights if name.endswith("inv_freq")]
    assert stored
    for name in stored:
        weights[name] = weights[name] * 7
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ids = ids_of(40)[None]
    with torch.inference_mode():
        found = load_model(str(folder), dtype="float32").module(ids)[0]
        assert torch.equal(found, load_model(str(PUBLISHED), dtype="float32").module(ids)[0])


# --- rows -----------------------------------------------------------------------------------------


def test_blocks_of_a_sequence_go_on_where_the_one_before_ended():
    model, ids = tiny(), ids_of(200)[None]
    with torch.inference_mode():
        whole = model(ids).logits
        cache, parts, start = model.backbone.new_cache(), [], 0
        for step in (1, 1, 70, 64, 3, 61):
            parts.append(model(ids[:, start : start + step], past_key_values=cache).logits)
            start += step
    assert start == 200
    torch.testing.assert_close(
        torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max())
    )


def test_packed_neighbors_do_not_see_each_other():
    model, ids = tiny(), torch.cat((ids_of(50), ids_of(90, seed=1)))[None]
    segments = torch.tensor([[0] * 50 + [1] * 90])
    with torch.inference_mode():
        packed = model(ids, segment_ids=segments).logits
        apart = torch.cat((model(ids[:, :50]).logits, model(ids[:, 50:]).logits), dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4 * float(apart.abs().max()))
    embedded = model.backbone.embedding_layer(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, segment_ids=segments).logits[:, 50:].sum().backward()
    assert embedded.grad[:, :50].abs().max() == 0 < embedded.grad[:, 50:].abs().max()


@pytest.mark.parametrize("written_out", [evo1._WRITTEN_OUT, 0])
def test_padding_on_either_side_changes_nothing(written_out, monkeypatch):
    monkeypatch.setattr(evo1, "_WRITTEN_OUT", written_out)
    model, ids = tiny(), ids_of(80)
    with torch.inference_mode():
        alone = model(ids[None]).logits[0]
        for left, right in ((40, 0), (0, 40), (7, 9)):
            padded, mask = (F.pad(x, (left, right), value=v)[None] for x, v in ((ids, 1), (ids * 0 + 1, 0)))
            found = model(padded, attention_mask=mask).logits[0, left : left + 80]
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))


def test_training_takes_the_chunks_and_gives_the_gradients_of_the_written_filter():
    model, ids = tiny(), ids_of(100)[None]

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    written = gradients()
    model.train()
    chunked = gradients()
    assert all(gradient.abs().max() > 0 for gradient in written.values())
    for name, gradient in written.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-3, atol=1e-3 * scale, msg=name)


# --- folders --------------------------------------------------------------------------------------


def changed(tmp_path, **changes):
    folder = shutil.copytree(PUBLISHED, tmp_path / "x")
    values = json.loads((folder / "config.json").read_text()) | changes
    values = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "gone",
    [
        ("model_type",),
        ("auto_map", "architectures"),
        ("model_type", "auto_map"),
        ("model_type", "auto_map", "architectures"),
        ("model_type", "auto_map", "architectures", "hyena_layer_idxs"),
    ],
)
def test_folder_is_recognized_by_what_is_left(gone, tmp_path):
    model = load_model(str(changed(tmp_path, **dict.fromkeys(gone))))
    assert type(model.module) is Evo1Model
    assert model.max_length == 131072


def test_stripedhyena_2_is_left_alone():
    settings = {"attn_layer_idxs": [3], "hcl_layer_idxs": [2], "state_size": 16}
    assert family_of(Published(settings)) is None
    assert load_model("genoembed-mini").family is None


def test_a_stored_copy_of_the_tied_head_is_left_out_and_a_head_of_its_own_is_not(tmp_path):
    folder = changed(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["backbone.unembed.weight"] = weights["backbone.embedding_layer.weight"].clone() * 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    batch = batch_of(ids_of(30))

    def score():
        language = LanguageModel(load_model(str(folder), dtype="float32"))
        return language.log_probs(batch, layers=(), take=lambda *_: None, block_tokens=64)

    tied = score()
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"tie_embeddings": False}))
    own = score()
    assert not torch.allclose(tied[:, 1:], own[:, 1:], atol=1e-2)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = whole(batch.input_ids).logits.log_softmax(-1)[:, :-1]
    expected = expected.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(own[:, 1:], expected, rtol=0, atol=1e-5)


def test_long_sequences_are_scored_block_by_block():
    language = LanguageModel(load_model(str(PUBLISHED), dtype="float32"))
    batch = batch_of(ids_of(500), ids_of(300, seed=1))
    nothing = {"layers": (), "take": lambda *_: None}
    whole = language.log_probs(batch, block_tokens=1000, **nothing)
    blocks = language.log_probs(batch, block_tokens=64, **nothing)
    torch.testing.assert_close(blocks, whole, rtol=0, atol=2e-5, equal_nan=True)


def test_default_layer_is_the_normed_end_and_a_number_the_output_of_a_block(tmp_path):
    model = load_model(str(PUBLISHED), dtype="float32")
    assert [layer.path for layer in model.resolve(["final", 1, -1])] == ["norm", "blocks.1", "blocks.3"]
    (tmp_path / "in.fa").write_text(">a\nACGTTGCAAGGT\n")
    words = ["extract", str(tmp_path / "in.fa"), "--model", str(PUBLISHED), "-o", str(tmp_path / "a.h5")]
    result = CliRunner().invoke(main, [*words, "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    ids = torch.tensor([list(b"ACGTTGCAAGGT")])
    with open_embeddings(tmp_path / "a.h5") as found, torch.inference_mode():
        expected = model.module(ids)[0].mean(dim=1)
        torch.testing.assert_close(torch.tensor(found.X[:]), expected, rtol=0, atol=1e-5)


# --- plain transformers ---------------------------------------------------------------------------


def test_auto_classes_open_the_published_folder():
    ids = ids_of(9)[None]
    with torch.inference_mode():
        base = AutoModel.from_pretrained(PUBLISHED, dtype=torch.float32).eval()
        assert torch.equal(base(ids)[0], load_model(str(PUBLISHED), dtype="float32").module(ids)[0])
        for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
            assert auto.from_pretrained(PUBLISHED, num_labels=3)(ids).logits.shape[-1] == 3


@pytest.mark.parametrize("use_cache", [False, True])
def test_generate_goes_on_with_and_without_a_state(use_cache):
    model = AutoModelForCausalLM.from_pretrained(PUBLISHED, dtype=torch.float32).eval()
    ids = ids_of(5)[None]
    found = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=1)
    with torch.inference_mode():
        for _ in range(6):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert found.tolist() == ids.tolist()


def test_trainer_takes_a_step_and_its_model_opens_again(tmp_path):
    tokenizer = load_model(str(PUBLISHED)).tokenizer
    assert isinstance(tokenizer, CharTokenizer)
    model = AutoModelForCausalLM.from_pretrained(PUBLISHED, dtype=torch.float32)
    rows = [tokenizer(text) for text in ("ACGTTGCA", "GGCATTAC", "TTGACGAT")]
    before = model.backbone.blocks[0].filter.poles.detach().clone()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
    assert not torch.equal(before, model.backbone.blocks[0].filter.poles)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "saved")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token_id == 0
    assert load_model(str(tmp_path / "saved")).tokenizer.pad_token_id == 0
    ids = ids_of(20)[None]
    with torch.inference_mode():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_new_models_start_with_fading_poles():
    poles = torch.view_as_complex(Evo1Model(Evo1Config(**SMALL)).blocks[0].filter.poles.detach())
    assert 0.85 < poles.abs().min() < poles.abs().max() < 1
