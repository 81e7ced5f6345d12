"""Caduceus: the scan against its recurrence, flags against a plain computation, ties, what is recognized."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from genoembed.errors import CheckpointError, ConfigError, ModelError, ShapeError
from genoembed.models.describe import describe_layers
from genoembed.models.families import Published, family_of
from genoembed.models.families.caduceus import (
    Caduceus,
    CaduceusConfig,
    CaduceusForMaskedLM,
    CaduceusForSequenceClassification,
)
from genoembed.models.families.caduceus.scan import _recur_in_blocks, selective_scan
from genoembed.models.load import load_model

GOLDEN = Path(__file__).parents[2] / "golden" / "families"
PUBLISHED = ("caduceus_ph", "caduceus_ps")


# --- the scan -------------------------------------------------------------------------------------


def scan_inputs(length, *, batch=2, channels=3, states=5, steep=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    raw_step = noise(batch, length, channels) * (30 if steep else 1)
    rates = -noise(channels, states).mul(2).exp().t().contiguous() * (50 if steep else 1)
    return [
        noise(batch, length, channels),
        raw_step,
        noise(batch, length, channels),
        rates,
        noise(batch, length, states),
        noise(batch, length, states),
        noise(channels),
    ]


def recurrence(u, raw_step, gate, rates, write, read, skip, *, reverse=False):
    """Step after step, as the definition says."""
    step = F.softplus(raw_step)
    state = u.new_zeros(u.shape[0], *rates.shape)
    out = [None] * u.shape[1]
    for t in reversed(range(u.shape[1])) if reverse else range(u.shape[1]):
        decay = torch.exp(step[:, t, None] * rates)
        state = decay * state + (step[:, t] * u[:, t])[:, None] * write[:, t, :, None]
        out[t] = (state * read[:, t, :, None]).sum(1) + skip * u[:, t]
    return torch.stack(out, 1) * F.silu(gate)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steep", [False, True])
@pytest.mark.parametrize("length", [1, 15, 127, 128, 129, 700])
def test_scan_equals_the_recurrence(length, steep, reverse):
    inputs = scan_inputs(length, steep=steep)
    expected = recurrence(*inputs, reverse=reverse)
    found = selective_scan(*(tensor.float() for tensor in inputs), reverse=reverse)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 16, 300])
def test_gradients_of_the_scan_equal_those_of_the_recurrence(length, reverse):
    inputs = [tensor.requires_grad_() for tensor in scan_inputs(length)]
    single = [tensor.detach().float().requires_grad_() for tensor in inputs]
    weights = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(1))
    (recurrence(*inputs, reverse=reverse) * weights).sum().backward()
    (selective_scan(*single, reverse=reverse) * weights).sum().backward()
    for ours, theirs in zip(single, inputs, strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("block", [1, 2, 4, 5, 100])
def test_blocks_side_by_side_equal_steps(length, block):
    generator = torch.Generator().manual_seed(length)
    decay = torch.rand(2, length, 3, 4, generator=generator) ** 3
    inflow, start = torch.randn(2, length, 3, 4, generator=generator), torch.randn(2, 3, 4)
    expected, state = [], start
    for t in range(length):
        state = decay[:, t] * state + inflow[:, t]
        expected.append(state)
    kept = decay.clone()
    found = _recur_in_blocks(decay, inflow.clone(), start, torch.empty_like(decay), block=block)
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-5, atol=1e-6)
    inside = _recur_in_blocks(decay, inflow, start, inflow, block=block)
    torch.testing.assert_close(inside, found, rtol=0, atol=0)
    assert torch.equal(decay, kept)


def test_rows_do_not_depend_on_the_batch():
    inputs = [tensor.float() for tensor in scan_inputs(50, batch=40, channels=64, states=16)]
    together = selective_scan(*inputs)
    alone = selective_scan(*(t if t.shape[0] != 40 else t[7:8] for t in inputs))
    torch.testing.assert_close(together[7:8], alone, rtol=1e-6, atol=1e-6)


class _Largest(TorchDispatchMode):
    """Measures the largest tensor that a computation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel())
        return result


def test_states_of_a_long_sequence_never_exist_at_once():
    length, channels, states = 8192, 64, 16
    inputs = [t.float() for t in scan_inputs(length, batch=1, channels=channels, states=states)]
    with _Largest() as without_graph, torch.no_grad():
        selective_scan(*inputs)
    for tensor in inputs:
        tensor.requires_grad_()
    with _Largest() as forward:
        y = selective_scan(*inputs)
    with _Largest() as backward:
        y.sum().backward()
    for measured in (without_graph, forward, backward):
        assert 0 < measured.size <= length * channels  # what comes in and goes out, no more


# --- flags against a plain computation ------------------------------------------------------------


def oracle(config, weights, ids):
    """Compute what each block gives, the final states and the logits of one sequence, in float64."""
    ssm = {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto"} | config["ssm_cfg"]
    rank = -(-config["d_model"] // 16) if ssm["dt_rank"] == "auto" else ssm["dt_rank"]
    width = config["d_model"]
    weights = {key.removeprefix("caduceus."): value for key, value in weights.items()}
    weights = {k: v.double() if v.is_floating_point() else v for k, v in weights.items()}
    complement = torch.tensor([config["complement_map"].get(i, i) for i in range(16)])

    def rc(x):
        return x.flip(0, 1)

    def linear(x, name):
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def mamba(x, at, tied):
        u, gate = linear(x, f"{tied}.in_proj").chunk(2, -1)
        taps = weights[f"{at}.conv1d.weight"][:, 0]
        padded = torch.cat((u.new_zeros(ssm["d_conv"] - 1, u.shape[1]), u))
        u = torch.stack([(padded[t : t + ssm["d_conv"]].T * taps).sum(1) for t in range(len(x))])
        u = F.silu(u + weights.get(f"{at}.conv1d.bias", 0))
        low, write, read = linear(u, f"{at}.x_proj").split([rank, ssm["d_state"], ssm["d_state"]], -1)
        raw = linear(low, f"{at}.dt_proj")
        inputs = (u, raw, gate, -weights[f"{at}.A_log"].exp().T, write, read, weights[f"{at}.D"])
        rows = (tensor[None] if index not in (3, 6) else tensor for index, tensor in enumerate(inputs))
        return linear(recurrence(*rows)[0], f"{tied}.out_proj")

    def both_directions(x, at):
        forward = mamba(x, f"{at}.mamba_fwd", f"{at}.mamba_fwd")
        if not config["bidirectional"]:
            return forward
        tied = f"{at}.mamba_fwd" if config["bidirectional_weight_tie"] else f"{at}.mamba_rev"
        backward = mamba(x.flip(0), f"{at}.mamba_rev", tied).flip(0)
        return forward * backward if config["bidirectional_strategy"] == "ew_multiply" else forward + backward

    def norm(x, name):
        scale = weights[f"{name}.weight"]
        if config["rms_norm"]:
            return x * (x.square().mean(-1, keepdim=True) + config["norm_epsilon"]).rsqrt() * scale
        return F.layer_norm(x, x.shape[-1:], scale, weights[f"{name}.bias"], config["norm_epsilon"])

    def strands(x, function):
        return torch.cat((function(x[:, :width]), rc(function(rc(x[:, width:])))), -1)

    base = "backbone.embeddings.word_embeddings"
    if config["rcps"]:
        table = weights[f"{base}.embedding.weight"]
        hidden = torch.cat((table[ids], rc(table[complement[ids.flip(0)]])), -1)
        inner, wrapped = ".submodule", "" if config["fused_add_norm"] else ".submodule"
    else:
        table = weights[f"{base}.weight"]
        hidden, inner, wrapped = table[ids], "", ""
    states, residual = [hidden], torch.zeros_like(hidden)
    for index in range(config["n_layer"]):
        at = f"backbone.layers.{index}"
        residual = residual + hidden
        if config["rcps"]:
            if config["fused_add_norm"]:
                residual = torch.cat((residual[:, width:], residual[:, :width]), -1)
            normed = strands(residual, lambda x, at=at: norm(x, f"{at}.norm{wrapped}"))
            hidden = strands(normed, lambda x, at=at: both_directions(x, f"{at}.mixer{inner}"))
        else:
            hidden = both_directions(norm(residual, f"{at}.norm"), f"{at}.mixer")
        states.append(hidden)
    residual = residual + hidden
    if not config["rcps"]:
        final = norm(residual, "backbone.norm_f")
        return states, final, final @ weights.get("lm_head.weight", table).T
    final = strands(residual, lambda x: norm(x, f"backbone.norm_f{wrapped}"))
    logits = final[:, :width] @ table.T + final[:, width:].flip(-1) @ table[complement].T
    return states, final, logits


COMPLEMENT = {7: 10, 8: 9, 9: 8, 10: 7}
BASE = {
    "d_model": 12,
    "n_layer": 2,
    "vocab_size": 12,
    "pad_vocab_size_multiple": 8,
    "ssm_cfg": {},
    "rms_norm": True,
    "norm_epsilon": 1e-5,
    "residual_in_fp32": False,
    "fused_add_norm": True,
    "bidirectional": True,
    "bidirectional_strategy": "add",
    "bidirectional_weight_tie": True,
    "rcps": False,
    "complement_map": COMPLEMENT,
}
RC = {"rcps": True}
OTHER = {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 4, "bias": True, "conv_bias": False}
VARIANTS = {
    "published_ph": {},
    "published_ps": RC,
    "ps_not_fused": RC | {"fused_add_norm": False},
    "ph_not_fused": {"fused_add_norm": False},
    "layer_norm_ph": {"rms_norm": False, "norm_epsilon": 1e-3},
    "layer_norm_ps": RC | {"rms_norm": False, "norm_epsilon": 1e-3},
    "layer_norm_ps_not_fused": RC | {"rms_norm": False, "fused_add_norm": False},
    "one_direction_ph": {"bidirectional": False},
    "one_direction_ps": RC | {"bidirectional": False},
    "multiplied": {"bidirectional_strategy": "ew_multiply"},
    "multiplied_ps": RC | {"bidirectional_strategy": "ew_multiply"},
    "not_tied": {"bidirectional_weight_tie": False},
    "not_tied_ps": RC | {"bidirectional_weight_tie": False},
    "other_mixer": {"ssm_cfg": OTHER},
    "other_mixer_ps": RC | {"ssm_cfg": OTHER, "residual_in_fp32": True},
    "wide_rank": {"d_model": 40, "ssm_cfg": {"dt_rank": "auto", "use_fast_path": True}},
    "deep": RC | {"n_layer": 5},
    "own_head": {"tie_word_embeddings": False},
}


def build(changes, *, seed=0, head=CaduceusForMaskedLM):
    torch.manual_seed(seed)
    model = head(CaduceusConfig(**BASE | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", "dt_proj.bias")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_a_plain_computation(variant, tmp_path):
    changes = VARIANTS[variant]
    model = build(changes)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    # as published: nothing that is tied is in the file
    stray = [key for key in weights if "mamba_rev.in_proj" in key or "mamba_rev.out_proj" in key]
    assert bool(stray) == (changes.get("bidirectional_weight_tie") is False)
    assert ("lm_head.weight" in weights) == (variant == "own_head")
    ids = torch.tensor([7, 8, 9, 10, 11, 7, 7, 9, 10, 8, 6, 7, 1])
    states, final, logits = oracle(BASE | changes, weights, ids)
    again, info = AutoModelForMaskedLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for each in (model, again.eval()):
        with torch.no_grad():
            found = each(ids[None], output_hidden_states=True)
        assert len(found.hidden_states) == len(states)
        for ours, theirs in zip(found.hidden_states[:-1], states[:-1], strict=True):
            assert_near(ours[0], theirs)
        assert_near(found.hidden_states[-1][0], final)
        assert_near(found.logits[0], logits)


def assert_near(found, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * max(scale, 1))


# --- ties -----------------------------------------------------------------------------------------


def assert_tied(model):
    """Check that each tied weight is one object with what it is tied to."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    pairs = [
        (name, name.replace("mamba_rev", "mamba_fwd"))
        for name in parameters
        if "mamba_rev.in_proj" in name or "mamba_rev.out_proj" in name
    ]
    embedding = model.get_input_embeddings().weight
    assert len(pairs) == 2 * model.config.n_layer
    for name, other in pairs:
        assert parameters[name] is parameters[other], name
    if model.get_output_embeddings() is not None:
        assert model.get_output_embeddings().weight is embedding


def assert_loaded(model, folder):
    """Check that every value is that of the file, or of what it is tied to."""
    stored = load_file(folder / "model.safetensors")
    for name, value in model.state_dict().items():
        key = name.replace("mamba_rev.in_proj", "mamba_fwd.in_proj")
        key = key.replace("mamba_rev.out_proj", "mamba_fwd.out_proj")
        if key.startswith("lm_head"):
            key = "caduceus.backbone.embeddings.word_embeddings" + (
                ".embedding.weight" if key == "lm_head.lm_head.weight" else ".weight"
            )
        if not key.startswith("caduceus."):
            key = f"caduceus.{key}"
        assert torch.equal(value, stored[key].to(value.dtype)), name


@pytest.mark.parametrize("golden", PUBLISHED)
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM])
def test_ties_are_kept_by_the_loader_and_by_everything_after(golden, auto, tmp_path):
    config = load_model(str(GOLDEN / golden), dtype="float32").module.config
    model = auto.from_pretrained(GOLDEN / golden, config=config, dtype=torch.float32)
    assert_tied(model)
    assert_loaded(model, GOLDEN / golden)
    model.save_pretrained(tmp_path / "again")
    again, info = auto.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"]
    assert_tied(again)
    assert_loaded(again, GOLDEN / golden)
    assert_tied(copy.deepcopy(again))
    assert_tied(again.to(torch.bfloat16))
    assert_tied(again.to(torch.float32).half())
    again.tie_weights()
    assert_tied(again)
    halves = auto.from_pretrained(GOLDEN / golden, config=config, dtype=torch.bfloat16)
    assert_tied(halves)
    assert_loaded(halves, GOLDEN / golden)


@pytest.mark.parametrize("golden", PUBLISHED)
def test_one_training_step_moves_both_ends_of_a_tie(golden):
    model = load_model(str(GOLDEN / golden), dtype="float32").module
    before = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    model.train()(torch.tensor([[7, 8, 9, 10, 7]])).last_hidden_state.square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = dict(model.named_parameters(remove_duplicate=False))
    moved = [name for name in before if "in_proj" in name and not torch.equal(before[name], after[name])]
    assert len(moved) == 2 * model.config.n_layer
    assert_tied(model)


def test_file_that_holds_different_ends_of_a_tie_is_run_as_it_is(tmp_path, caplog):
    folder = shutil.copytree(GOLDEN / "caduceus_ph", tmp_path / "x")
    weights = load_file(folder / "model.safetensors")
    key = "caduceus.backbone.layers.1.mixer.mamba_{}.in_proj.weight"
    weights[key.format("rev")] = weights[key.format("fwd")] * 2
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    mixer = load_model(str(folder), dtype="float32").module.backbone.layers[1].mixer
    assert torch.equal(mixer.mamba_rev.in_proj.weight, 2 * mixer.mamba_fwd.in_proj.weight)
    assert mixer.mamba_rev.out_proj.weight is mixer.mamba_fwd.out_proj.weight


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("golden", PUBLISHED)
def test_adapters_on_tied_weights_merge_into_the_same_model(golden):
    peft = pytest.importorskip("peft")
    model = load_model(str(GOLDEN / golden), dtype="float32").module
    names = ["in_proj", "out_proj", "x_proj", "dt_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=names)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    ids = torch.tensor([[7, 8, 9, 10, 7, 7, 11]])
    plain = load_model(str(GOLDEN / golden), dtype="float32").module
    with torch.no_grad():
        before = adapted(input_ids=ids).last_hidden_state
        assert (before - plain(ids).last_hidden_state).abs().max() > 0.01
        # what never runs never learns: here it would, and is left out as training leaves it at zero
        for name, parameter in adapted.named_parameters():
            if "mamba_rev" in name and ("in_proj" in name or "out_proj" in name) and "lora_B" in name:
                parameter.zero_()
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(ids).last_hidden_state, before, rtol=1e-5, atol=1e-5)
    assert_tied(merged)


def test_weight_that_is_missing_is_refused(tmp_path):
    folder = shutil.copytree(GOLDEN / "caduceus_ph", tmp_path / "x")
    weights = load_file(folder / "model.safetensors")
    del weights["caduceus.backbone.layers.1.mixer.mamba_fwd.in_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing and would be random .*mamba_fwd\.in_proj"):
        load_model(str(folder))


# --- complements ----------------------------------------------------------------------------------


def rc_ids(ids):
    complement = torch.tensor([COMPLEMENT.get(i, i) for i in range(16)])
    return complement[ids].flip(-1)


@pytest.mark.parametrize("fused", [True, False])
def test_reverse_complement_gives_reversed_states(fused):
    model = build(RC | {"fused_add_norm": fused, "n_layer": 3}, head=Caduceus)
    ids = torch.randint(7, 12, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one = model(ids, output_hidden_states=True).hidden_states
        other = model(rc_ids(ids), output_hidden_states=True).hidden_states
    assert len(one) == 4
    for first, second in zip(one, other, strict=True):
        torch.testing.assert_close(second, first.flip(1, 2), rtol=1e-5, atol=1e-5)


def test_map_of_the_weights_is_used_and_that_of_the_configuration_where_a_file_has_none(tmp_path):
    expected = load_model(str(GOLDEN / "caduceus_ps"), dtype="float32")
    ids = torch.tensor([[7, 8, 9, 10, 11]])

    def final(folder):
        module = load_model(str(folder), dtype="float32").module
        with torch.no_grad():
            return module(ids).last_hidden_state

    with torch.no_grad():
        wanted = expected.module(ids).last_hidden_state
    folder = shutil.copytree(GOLDEN / "caduceus_ps", tmp_path / "x")
    values = json.loads((folder / "config.json").read_text())
    stored = values["complement_map"]
    wrong = values | {"complement_map": {key: int(key) for key in stored}}
    (folder / "config.json").write_text(json.dumps(wrong))
    assert torch.equal(final(folder), wanted)
    none = {key: value for key, value in values.items() if key != "complement_map"}
    (folder / "config.json").write_text(json.dumps(none))
    assert torch.equal(final(folder), wanted)
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "complement_map" not in key}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="rcps needs complement_map"):
        load_model(str(folder))
    # sorted as text: 0, 1, 10, 11, ...
    text = values | {"complement_map": dict(sorted(stored.items()))}
    (folder / "config.json").write_text(json.dumps(text))
    assert torch.equal(final(folder), wanted)


def test_widths_and_padding_are_told():
    layers = {layer.path: layer.width for layer in describe_layers(str(GOLDEN / "caduceus_ps")).layers}
    assert [layers[f"backbone.layers.{i}"] for i in range(3)] == [32, 32, 32]
    assert layers["backbone.norm_f"] == layers["backbone.embeddings"] == 32
    assert describe_layers(str(GOLDEN / "caduceus_ps")).final == "backbone.norm_f"
    one = {layer.path: layer.width for layer in describe_layers(str(GOLDEN / "caduceus_ph")).layers}
    assert one["backbone.layers.2"] == one["backbone.norm_f"] == one["backbone.layers.0.norm"] == 16
    for golden in PUBLISHED:
        model = load_model(str(GOLDEN / golden), dtype="float32")
        assert (model.padding, model.is_causal, model.accepts_attention_mask) == ("equal", False, False)


def test_mask_over_padding_is_warned_about(monkeypatch):
    said = []
    monkeypatch.setattr("genoembed.models.families.caduceus.modeling.logger.warning_once", said.append)
    model = build({}, head=Caduceus)
    ids = torch.tensor([[7, 8, 9]])
    model(ids, attention_mask=torch.ones_like(ids))
    assert said == []
    model(ids, attention_mask=torch.tensor([[1, 1, 0]]))
    assert len(said) == 1
    assert "sequences of one length" in said[0]
    with pytest.raises(ShapeError, match="exactly one of input_ids and inputs_embeds"):
        model()
    embedded = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded)[0], model(ids, return_dict=False)[0])


# --- plain transformers ---------------------------------------------------------------------------


@pytest.mark.parametrize("golden", PUBLISHED)
def test_saved_folder_opens_with_plain_auto_classes(golden, tmp_path):
    model = load_model(str(GOLDEN / golden), dtype="float32")
    model.module.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer("ACGTNacgt", return_tensors="pt")
    again = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.module(batch["input_ids"]).last_hidden_state
        assert torch.equal(again(**batch).last_hidden_state, expected)
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        head = auto.from_pretrained(tmp_path, num_labels=3)
        assert head(**batch).logits.shape[-1] == 3
        assert_tied(head)


def test_sequence_and_reverse_complement_get_one_class():
    model = build(RC | {"num_labels": 3}, head=CaduceusForSequenceClassification)
    ids = torch.randint(7, 11, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        one, other = model(ids, labels=labels), model(rc_ids(ids), labels=labels)
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.loss, F.cross_entropy(one.logits, labels))


@pytest.mark.parametrize("golden", PUBLISHED)
def test_trainer_takes_a_step_and_checkpointing_changes_no_gradient(golden, tmp_path):
    config = load_model(str(GOLDEN / golden), dtype="float32").module.config
    model = AutoModelForMaskedLM.from_pretrained(GOLDEN / golden, config=config, dtype=torch.float32)
    ids = torch.randint(7, 11, (4, 30), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=1, report_to=[], use_cpu=True, per_device_train_batch_size=2
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    before = model.get_input_embeddings().weight.detach().clone()
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert not torch.equal(before, model.get_input_embeddings().weight)
    assert_tied(model)
    trainer.save_model(tmp_path / "saved")
    assert_tied(AutoModelForMaskedLM.from_pretrained(tmp_path / "saved"))


@pytest.mark.parametrize("golden", PUBLISHED)
def test_half_precision_is_near(golden):
    full = load_model(str(GOLDEN / golden), dtype="float32").module
    half = load_model(str(GOLDEN / golden), dtype="bfloat16").module
    ids = torch.randint(7, 11, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = full(ids).last_hidden_state, half(ids).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.02 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = full.train()(ids).last_hidden_state
    mixed.float().sum().backward()
    assert (mixed.float() - expected).norm() < 0.02 * expected.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in full.parameters())


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("golden", PUBLISHED)
def test_weights_that_wait_on_the_disk_give_the_same(golden):
    places = {"backbone.embeddings": "cpu", "backbone.layers": "disk", "backbone.norm_f": "cpu"}
    placed = load_model(str(GOLDEN / golden), device="cpu", dtype="float32", device_map=places).module
    assert {parameter.device.type for parameter in placed.parameters()} == {"cpu", "meta"}
    ids = torch.randint(7, 11, (1, 13), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_model(str(GOLDEN / golden), dtype="float32").module(ids).last_hidden_state
        assert torch.equal(placed(ids).last_hidden_state, expected)


def test_plant_caduceus_is_read_as_published(tmp_path):
    """Encoder only, keys without a prefix, a pickled file with both ends of each tie, its own tokenizer."""
    model = build(RC | {"vocab_size": 7, "complement_map": {3: 6, 4: 5, 5: 4, 6: 3}}, head=Caduceus)
    values = model.config.to_dict() | {
        "architectures": ["Caduceus"],
        "vocab_size": 7,
        "residual_in_fp32": True,
        "complement_map": {"0": 0, "1": 1, "2": 2, "3": 6, "4": 5, "5": 4, "6": 3},
        "auto_map": {"AutoModel": "modeling_caduceus.Caduceus"},
    }
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    state = model.state_dict()
    assert any("mamba_rev.in_proj" in key for key in state)
    assert not any(key.startswith("caduceus.") for key in state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    words = {"[UNK]": 0, "[PAD]": 1, "[MASK]": 2, "a": 3, "c": 4, "g": 5, "t": 6}
    tokenizer = Tokenizer(BPE(words, [], unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    loaded = load_model(str(tmp_path), dtype="float32")
    assert loaded.family.name == "Caduceus"
    assert loaded.module.config.vocab_size == 8
    assert_tied(loaded.module)
    ids = torch.tensor(loaded.tokenizer("acgtta")["input_ids"])
    assert ids.tolist() == [3, 4, 5, 6, 6, 3]
    with torch.no_grad():
        assert torch.equal(loaded.module(ids[None])[0], model(ids[None])[0])
    whole, info = AutoModelForMaskedLM.from_pretrained(
        tmp_path, config=loaded.module.config, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert_tied(whole)


def published(golden, **changes):
    folder = GOLDEN / golden
    values = json.loads((folder / "config.json").read_text()) | changes
    return Published({key: value for key, value in values.items() if value is not None}, folder)


@pytest.mark.parametrize("golden", PUBLISHED)
def test_folder_is_recognized_whatever_is_left_out(golden):
    silent = {"model_type": None, "architectures": None, "auto_map": None}
    assert family_of(published(golden)).name == "Caduceus"
    assert family_of(published(golden, **silent)).name == "Caduceus"
    flags = {key: None for key in BASE if key.startswith("bidirectional")}
    assert family_of(published(golden, **silent, **flags)).name == "Caduceus"
    assert family_of(Published({"architectures": ["CaduceusForMaskedLM"]})).name == "Caduceus"
    assert (
        family_of(Published({"model_type": "mamba", "architectures": ["MambaModel"], "d_model": 8})) is None
    )


def test_other_mixers_and_flags_are_refused(tmp_path):
    folder = shutil.copytree(GOLDEN / "caduceus_ph", tmp_path / "x")
    values = json.loads((folder / "config.json").read_text())
    values["ssm_cfg"] |= {"layer": "Mamba2", "headdim": 64}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises((ConfigError, ModelError), match="not Mamba 1"):
        load_model(str(folder))
    with pytest.raises(ConfigError, match="expected add or ew_multiply"):
        CaduceusConfig(bidirectional_strategy="concat")
    with pytest.raises(ConfigError, match="leads out of the vocabulary"):
        CaduceusConfig(rcps=True, complement_map={0: 99})


def test_vocabulary_of_both_strands_is_fixed():
    model = build(RC)
    with pytest.raises(NotImplementedError, match="is fixed"):
        model.resize_token_embeddings(30)
    one = build({})
    one.resize_token_embeddings(30)
    assert one.lm_head.weight is one.get_input_embeddings().weight
    assert one(torch.tensor([[29, 7]])).logits.shape == (1, 2, 30)
