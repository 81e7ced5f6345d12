"""HyenaDNA: what configurations can say, against a plain computation; long inputs; plain transformers."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from genoembed.errors import CheckpointError, ConfigError, ModelError, ShapeError
from genoembed.models.behavior import Probe
from genoembed.models.families import Published, family_of, hyenadna
from genoembed.models.families.hyenadna import HyenaDNAConfig, HyenaDNAForCausalLM, HyenaDNAModel
from genoembed.models.language_model import LanguageModel
from genoembed.models.layers import capture
from genoembed.models.load import load_model
from genoembed.tokenization.published import hyena_characters
from tests.models.families.test_goldens import GOLDEN

PUBLISHED = GOLDEN / "hyenadna"
SMALL = {"d_model": 8, "n_layer": 2, "d_inner": 12, "filter_order": 6, "emb_dim": 5, "max_seq_len": 40}


def tiny(**settings):
    """Build a model whose every tensor, constants included, is drawn."""
    config = HyenaDNAConfig(**(SMALL | {"activation_freq": 2} | settings))
    model = HyenaDNAForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
    return model


def ids_of(length, seed=0):
    return torch.randint(7, 12, (length,), generator=torch.Generator().manual_seed(seed))


def oracle(config, weights, ids):
    """Compute the states and logits of one sequence in float64, one position after the other."""
    weights = {name.removeprefix("hyena.backbone."): value.double() for name, value in weights.items()}
    width, n = config["d_model"], len(ids)

    def product(x, name):
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(x, name, eps=1e-5):
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def long_filter(at):
        t, z = weights[f"{at}.pos_emb.t"][0, :n], weights[f"{at}.pos_emb.z"][0, :n]
        frequency = weights.get(f"{at}.implicit_filter.1.freq", config["activation_freq"])
        for index in range(config["num_inner_mlps"] + 1):
            z = (frequency * product(z, f"{at}.implicit_filter.{2 * index}")).sin()
        z = product(z, f"{at}.implicit_filter.{2 * config['num_inner_mlps'] + 2}")
        return z * ((-t * weights[f"{at}.modulation.deltas"][0].abs()).exp() + 0.05)

    def mixer(x, at):
        z = product(x, f"{at}.in_proj")
        taps = weights[f"{at}.short_filter.weight"][:, 0]
        short = torch.zeros_like(z) + weights[f"{at}.short_filter.bias"]
        for position in range(n):
            for k in range(config["short_filter_order"]):
                if 0 <= position - 2 + k < n:  # starts two positions back
                    short[position] += taps[:, k] * z[position - 2 + k]
        *gates, value = short.split(width, dim=-1)
        filters = long_filter(f"{at}.filter_fn")
        for index, gate in enumerate(reversed(gates[1:])):
            channels = slice(index * width, (index + 1) * width)
            value = value * gate
            skipped = value * weights[f"{at}.filter_fn.bias"][channels]
            mixed = [(filters[: p + 1, channels].flip(0) * value[: p + 1]).sum(0) for p in range(n)]
            value = torch.stack(mixed) + skipped
        return product(value * gates[0], f"{at}.out_proj")

    def gelu(x):
        return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())

    x = weights["embeddings.word_embeddings.weight"][ids]
    states = [x]
    for index in range(config["n_layer"]):
        at = f"layers.{index}"
        x = x + mixer(norm(x, f"{at}.norm1"), f"{at}.mixer")
        x = x + product(gelu(product(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
        states.append(x)
    states.append(norm(x, "ln_f", config["layer_norm_epsilon"]))
    return states, states[-1] @ weights["lm_head.weight"].T


VARIANTS = {
    "as published": {},
    "no inner layers": {"num_inner_mlps": 0},
    "three inner layers": {"num_inner_mlps": 3, "filter_order": 5},
    "fixed frequency": {"train_freq": False, "activation_freq": 3},
    "two filters": {"hyena_order": 3},
    "three filters": {"hyena_order": 4, "d_model": 6, "n_layer": 1},
    "one tap": {"short_filter_order": 1},
    "two taps": {"short_filter_order": 2},
    "five taps, which see later positions": {"short_filter_order": 5},
    "three features of a position": {"emb_dim": 3},
    "eps of the last norm": {"layer_norm_epsilon": 0.5},
    "no padded vocabulary": {"pad_vocab_size_multiple": 1},
    "inner width left out": {"d_inner": None},
    "without use of the bias, as it says": {"use_bias": False},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_variant_saved_and_loaded_equals_a_plain_computation(settings, tmp_path):
    tiny(**settings).save_pretrained(tmp_path)
    hyena_characters(tmp_path, {}).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device="cpu", dtype="float32")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    weights = load_file(tmp_path / "model.safetensors")
    config = model.module.config.to_dict()
    assert model.max_length == 40
    assert len(weights["lm_head.weight"]) == (12 if "pad_vocab_size_multiple" in settings else 16)
    for length in (1, 2, 3, 7, 40):
        ids = ids_of(length)
        states, logits = oracle(config, weights, ids)
        with torch.inference_mode():
            found = model.module(ids[None], output_hidden_states=True)
            scored = whole(ids[None]).logits
        assert len(found.hidden_states) == len(states) == config["n_layer"] + 2
        for ours, theirs in zip(found.hidden_states, states, strict=True):
            torch.testing.assert_close(ours[0].double(), theirs, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(scored[0].double(), logits, rtol=1e-5, atol=1e-4)


def test_causality_is_declared_as_it_is_measured():
    for taps in (1, 3, 4, 5):
        model = tiny(short_filter_order=taps).hyena
        assert model.is_causal_by_construction is (taps <= 3)
        declared = Probe(model, special_ids=range(7), pad_token_id=4).is_causal()
        ids = ids_of(20)
        changed = torch.cat((ids[:11], (ids[11:] - 6) % 5 + 7))
        with torch.inference_mode():
            before, after = model(ids[None])[0], model(changed[None])[0]
        assert torch.allclose(before[:, :11], after[:, :11], atol=1e-5) is declared is (taps <= 3)


def test_rows_padded_on_the_right_are_unchanged():
    model = load_model(str(PUBLISHED), dtype="float32")
    assert (model.padding, model.is_causal, model.accepts_attention_mask) == ("right", True, False)
    ids = ids_of(30)
    padded = F.pad(ids, (0, 200), value=4)
    with torch.inference_mode():
        alone, batched = model.module(ids[None])[0], model.module(padded[None])[0]
    torch.testing.assert_close(batched[:, :30], alone, rtol=0, atol=1e-4)


def test_padding_on_the_left_and_too_long_inputs_are_refused():
    model = tiny().hyena
    ids = ids_of(6)[None]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    with pytest.raises(ShapeError, match="pad on the right"):
        model(ids, attention_mask=mask)
    model(ids, attention_mask=mask.flip(1))
    with pytest.raises(ShapeError, match="input has 41 tokens, expected at most 40"):
        model(ids_of(41)[None])
    with pytest.raises(ShapeError, match="exactly one of"):
        model()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"hyena_order": 1}, "hyena_order is 1, expected 2 or more"),
        ({"short_filter_order": 6}, "short_filter_order is 6, expected 1 to 5"),
        ({"emb_dim": 4}, "emb_dim is 4, expected an odd number"),
    ],
)
def test_settings_that_make_no_model_are_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        HyenaDNAConfig(**settings)


# --- long inputs ----------------------------------------------------------------------------------


def test_groups_of_channels_and_stretches_of_positions_change_nothing(monkeypatch):
    model, ids = tiny(hyena_order=3), ids_of(40)[None]
    with torch.inference_mode():
        whole = model(ids, output_hidden_states=True)
        monkeypatch.setattr(hyenadna, "_MOST_VALUES", 1 << 8)
        parts = model(ids, output_hidden_states=True)
        assert len(list(hyenadna._spans(8, hyenadna._MOST_VALUES // 128))) > 1
        # a captured module inside is called once
        with capture(model.hyena, ["backbone.layers.0.mlp.fc1"]) as outputs:
            model.hyena(ids)
    for a, b in zip(whole.hidden_states, parts.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert outputs["backbone.layers.0.mlp.fc1"].shape == (1, 40, 12)


def test_gradients_are_those_of_the_whole(monkeypatch):
    model, ids = tiny(), ids_of(40)[None]

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    whole = gradients()
    monkeypatch.setattr(hyenadna, "_MOST_VALUES", 1 << 8)
    parts = gradients()
    assert all(gradient.abs().max() > 0 for gradient in whole.values())
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-5, msg=name)


def test_filters_stay_float32_in_half_precision():
    model = load_model(str(PUBLISHED), dtype="bfloat16")
    exact = load_model(str(PUBLISHED), dtype="float32")
    for module in (model.module, exact.module.to(torch.bfloat16)):
        kept = {t.dtype for name, t in module.state_dict().items() if "filter_fn" in name}
        others = {t.dtype for name, t in module.state_dict().items() if "filter_fn" not in name}
        assert (kept, others) == ({torch.float32}, {torch.bfloat16})
    assert model.provenance["dtype"] == "bfloat16"
    ids = ids_of(200)[None]
    expected = load_model(str(PUBLISHED), dtype="float32").module
    with torch.inference_mode():
        found, wanted = model.module(ids)[0].float(), expected(ids)[0]
    # a filter in bfloat16 is off by more than half of the largest value
    assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()


# --- folders --------------------------------------------------------------------------------------


def folder_with(tmp_path, **changes):
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
        ("model_type", "auto_map", "architectures", "hyena_order"),
    ],
)
def test_folder_is_recognized_by_what_is_left(gone, tmp_path):
    folder = folder_with(tmp_path, **dict.fromkeys(gone))
    assert type(load_model(str(folder)).module) is HyenaDNAModel


def test_other_models_are_left_alone():
    for values in (
        {"model_type": "bert"},
        {"model_type": "gpt2", "n_layer": 2},
        {"d_model": 4, "n_layer": 1},
    ):
        assert family_of(Published(values)) is None


def test_frequencies_in_torch_files_come_once_for_each_layer(tmp_path):
    folder = folder_with(tmp_path)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("implicit_filter.1.freq")]:
        for other in (3, 5):
            weights[name.replace(".1.freq", f".{other}.freq")] = weights[name]
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    ids = ids_of(50)[None]
    with torch.inference_mode():
        found = load_model(str(folder), dtype="float32").module(ids)[0]
        expected = load_model(str(PUBLISHED), dtype="float32").module(ids)[0]
    assert torch.equal(found, expected)


def test_missing_positions_are_refused(tmp_path):
    folder = folder_with(tmp_path, max_seq_len=300)
    with pytest.raises(CheckpointError, match="have another shape"):
        load_model(str(folder))


def test_a_model_that_sees_later_positions_gives_no_probabilities(tmp_path):
    tiny(short_filter_order=5).save_pretrained(tmp_path)
    hyena_characters(tmp_path, {}).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype="float32")
    assert model.padding == "equal"
    with pytest.raises(ModelError, match="see what follows"):
        LanguageModel(model)


# --- plain transformers ---------------------------------------------------------------------------


def test_auto_classes_open_the_published_folder():
    with torch.inference_mode():
        ids = ids_of(9)[None]
        base = AutoModel.from_pretrained(PUBLISHED).eval()
        assert torch.equal(base(ids)[0], load_model(str(PUBLISHED), dtype="float32").module(ids)[0])
        for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
            assert auto.from_pretrained(PUBLISHED, num_labels=3)(ids).logits.shape[-1] == 3


@pytest.mark.parametrize("use_cache", [None, False, True])
def test_generate_reads_the_whole_sequence_at_each_step(use_cache):
    model = AutoModelForCausalLM.from_pretrained(PUBLISHED).eval()
    ids = ids_of(5)[None]
    found = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use_cache)
    embedded = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=6, do_sample=False
    )
    with torch.inference_mode():
        for _ in range(6):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert found.tolist() == ids.tolist()
    assert embedded.tolist() == ids[:, 5:].tolist()


def test_trainer_takes_a_step_and_its_model_opens_again(tmp_path):
    tokenizer = load_model(str(PUBLISHED)).tokenizer
    tokenizer.save_pretrained(tmp_path / "saved")
    rows = [
        tokenizer(text) | {"labels": index % 2}
        for index, text in enumerate(["ACGTTGCA", "GGCAT", "TTGACGATT", "CA"])
    ]
    model = AutoModelForSequenceClassification.from_pretrained(PUBLISHED, num_labels=2)
    before = model.score.weight.detach().clone()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
    assert not torch.equal(before, model.score.weight)
    model.save_pretrained(tmp_path / "saved")
    again, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not info["missing_keys"] | info["unexpected_keys"]
    opened = AutoTokenizer.from_pretrained(tmp_path / "saved")
    batch = opened(["ACGTTGCA", "GGCAT"], padding=True, return_tensors="pt")
    assert opened.padding_side == "right"
    with torch.inference_mode():
        assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)
    assert load_model(str(tmp_path / "saved")).max_length == 258


def test_new_models_start_with_positions_that_differ():
    model = HyenaDNAModel(HyenaDNAConfig(**SMALL))
    positions = model.backbone.layers[0].mixer.filter_fn.pos_emb
    assert positions.t[0, [0, -1], 0].tolist() == [0.0, 1.0]
    assert len(positions.z[0].unique(dim=0)) == 40
    assert model.backbone.layers[0].mixer.filter_fn.modulation.deltas.abs().min() > 3
