"""What a pretraining run is made of: groups, clamp and metrics by themselves, and at work in a run."""

from __future__ import annotations

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, TrainerCallback

import genoembed
from genoembed import StripedHyena2ForCausalLM
from genoembed.batching.pack import pack_stream
from genoembed.config.pretrain import RecipeConfig
from genoembed.models.striped_hyena2.blocks import OutFilterDense
from genoembed.training.log import MetricsFile
from genoembed.training.trainer import (
    MAX_LOG_POLE,
    ClampPoles,
    ResumableTrainer,
    parameter_groups,
    training_arguments,
)
from tests.pretraining.test_start import save_causal
from tests.tiny_models import build_config, build_striped_hyena


def groups_of(model, tmp_path):
    recipe = RecipeConfig(max_steps=12, learning_rate=1e-2)
    arguments = training_arguments(recipe, tmp_path)
    return ResumableTrainer(model=model, args=arguments, callbacks=[]).create_optimizer().param_groups


SHAPED = {"like": "evo2_7b", "hidden_size": 32, "layers": 4}
SMALL = {
    "heldout_fraction": 0.2,
    "window": 32,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "logging_steps": 1,
    "eval_steps": 3,
    "save_steps": 3,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "c.fa"
    path.write_text("".join(f">r{i}\n{'ACGGTTAC' * (3 + i % 5)}{'ACGT'[i % 4]}\n" for i in range(40)))
    return str(path)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    genoembed.pretrain(corpus, folder, **SMALL, **SHAPED)
    return folder


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(build_config("llama"))


def lines_of(folder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder, name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines_of(folder) if name in line]


@pytest.mark.parametrize("build", [build_striped_hyena, llama])
def test_parameter_groups_hold_each_parameter_once(build, tmp_path):
    model = build()
    groups = groups_of(model, tmp_path)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert len(set(grouped)) == len(grouped)


@pytest.mark.parametrize("build", [build_striped_hyena, llama])
def test_weight_decay_falls_on_the_matrices_of_linear_maps_only(build):
    model = build()
    groups = parameter_groups(model, rate_of=lambda _: 1e-2, weight_decay=0.1)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | OutFilterDense)
    }
    assert len(linear) > 10
    assert names == linear


def test_poles_have_a_rate_of_their_own(tmp_path):
    model = build_striped_hyena()
    (group,) = [g for g in groups_of(model, tmp_path) if g["lr"] != 1e-2]
    assert group["lr"] == pytest.approx(1e-3)
    assert group["weight_decay"] == 0.0
    assert [id(p) for p in group["params"]] == [id(model.get_parameter("blocks.2.filter.log_poles"))]
    assert {group["lr"] for group in groups_of(llama(), tmp_path)} == {1e-2}


def test_clamp_poles_touches_poles_above_the_bound_only():
    model = build_striped_hyena()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        model.blocks[2].filter.log_poles[0, 0] = 0.3
        model.blocks[2].filter.log_poles[1, 0] = -1e-6
    ClampPoles().on_optimizer_step(None, None, None, model=model)
    expected = before["blocks.2.filter.log_poles"].clone()
    expected[:2, 0] = MAX_LOG_POLE
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected if name.endswith("log_poles") else before[name]), name


def test_clamp_poles_is_at_work_while_training(corpus, tmp_path):
    model = build_striped_hyena()
    with torch.no_grad():
        model.blocks[2].filter.log_poles.fill_(0.01)
    model.save_pretrained(tmp_path / "growing")
    options = SMALL | {"max_steps": 1, "learning_rate": 1e-9}
    report = genoembed.pretrain(corpus, tmp_path / "run", model=str(tmp_path / "growing"), **options)
    trained = StripedHyena2ForCausalLM.from_pretrained(report.output)
    assert (trained.blocks[2].filter.log_poles == MAX_LOG_POLE).all()


@pytest.mark.parametrize(("step", "kept"), [(4, [2]), (0, [])])
def test_metrics_file_leaves_out_steps_trained_again_and_a_line_that_was_cut(step, kept, tmp_path):
    state = SimpleNamespace(global_step=step, is_world_process_zero=True)
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1.0}\n{"step": 6, "loss": 0.9}\n{"step": 4, "lo')
    metrics = MetricsFile(path)
    metrics.on_train_begin(None, state, None)
    metrics.on_log(None, state, None, {"loss": 0.5})
    assert [line["step"] for line in lines_of(tmp_path)] == [*kept, step]


def test_metrics_file_gives_losses_in_bits_beside_nats(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    state = SimpleNamespace(global_step=1, is_world_process_zero=True)
    metrics.on_log(None, state, None, {"loss": 0.5, "grad_norm": 2.0})
    metrics.on_log(None, state, None, {"eval_loss": 0.25})
    assert lines_of(tmp_path) == [
        {"step": 1, "loss": 0.5, "grad_norm": 2.0, "loss_bits": 0.5 / math.log(2)},
        {"step": 1, "eval_loss": 0.25, "eval_loss_bits": 0.25 / math.log(2)},
    ]


def test_metrics_file_is_written_by_the_first_process_only(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    other = SimpleNamespace(global_step=1, is_world_process_zero=False)
    metrics.on_train_begin(None, other, None)
    metrics.on_log(None, other, None, {"loss": 0.5})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_killed_run_goes_on_exactly_from_its_newest_checkpoint(corpus, whole, tmp_path, monkeypatch):
    class KilledError(RuntimeError):
        pass

    class Killer(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KilledError("killed in step 6")

    monkeypatch.setattr("genoembed.training.trainer.ClampPoles", Killer)
    with pytest.raises(KilledError, match="step 6"):
        genoembed.pretrain(corpus, tmp_path / "run", **SMALL, **SHAPED)
    monkeypatch.undo()
    assert curve(tmp_path / "run", "loss")[-1][0] == 5
    report = genoembed.pretrain(corpus, tmp_path / "run", resume=True, **SMALL, **SHAPED)
    assert [step for step, _ in curve(whole, "loss")] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "eval_loss"):
        assert curve(tmp_path / "run", name) == curve(whole, name)
    expected = StripedHyena2ForCausalLM.from_pretrained(whole / "final").state_dict()
    for name, tensor in StripedHyena2ForCausalLM.from_pretrained(report.output).state_dict().items():
        assert torch.equal(expected[name], tensor), name


def test_the_rate_rises_from_a_tenth_and_falls_to_a_tenth(whole):
    """A first step at a rate of 0 would be wasted."""
    rates = [rate for _, rate in curve(whole, "learning_rate")]
    assert rates[:2] == [pytest.approx(1e-3), pytest.approx(1e-2)]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert 1e-3 < rates[-1] < 3e-3


def test_heldout_loss_counts_a_batch_that_is_not_full(corpus, tmp_path):
    heldout = tmp_path / "h.fa"
    heldout.write_text(">h\n" + "ACGGTTA" * 4 + "\n")
    options = SMALL | {"heldout": heldout, "heldout_fraction": None, "max_steps": 1}
    report = genoembed.pretrain(corpus, tmp_path / "run", **options, **SHAPED)
    (row,) = pack_stream([b"ACGGTTA" * 4], window=SMALL["window"])
    model = StripedHyena2ForCausalLM.from_pretrained(report.output).eval()
    with torch.inference_mode():
        expected = float(model(input_ids=row.input_ids, labels=row.labels).loss)
    assert len(row.input_ids) == 1
    ((_, measured),) = curve(tmp_path / "run", "eval_loss")
    assert measured == pytest.approx(expected, rel=1e-4)


def test_bfloat16_stays_near_float32(corpus, whole, tmp_path):
    genoembed.pretrain(corpus, tmp_path / "run", **SMALL | {"dtype": "bfloat16"}, **SHAPED)
    exact, rounded = ([loss for _, loss in curve(folder, "loss")] for folder in (whole, tmp_path / "run"))
    assert rounded == pytest.approx(exact, rel=0.1)
    assert rounded != exact


def test_a_causal_model_of_transformers_learns_too(corpus, tmp_path):
    name = save_causal("llama", tmp_path / "llama")
    report = genoembed.pretrain(corpus, tmp_path / "run", model=name, **SMALL | {"max_steps": 12})
    losses = [loss for _, loss in curve(tmp_path / "run", "loss")]
    assert losses[-1] < losses[0] - 0.5
    assert LlamaForCausalLM.from_pretrained(report.output).config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("family", "blocks"),
    [("striped_hyena2", {"HyenaBlock": 3, "AttentionBlock": 1}), ("llama", {"LlamaDecoderLayer": 3})],
)
def test_compile_blocks_compiles_each_block_once(family, blocks, corpus, tmp_path, monkeypatch):
    start = SHAPED if family == "striped_hyena2" else {"model": save_causal(family, tmp_path / "model")}
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    options = SMALL | {"max_steps": 1, "compile_blocks": True}
    genoembed.pretrain(corpus, tmp_path / "run", **options, **start)
    modules = {id(module): module for module, _ in compiled}
    assert len(modules) == len(compiled)
    assert Counter(type(module).__name__ for module in modules.values()) == blocks
    assert all(options == {"dynamic": False} for _, options in compiled)
