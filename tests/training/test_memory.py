"""What saves memory: activations that are computed again, a scaled float16 loss, and small optimizers."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import genoembed
from genoembed.config.finetune import EncoderConfig, finetune_config
from genoembed.config.training import OptimizerConfig
from genoembed.errors import ConfigError, DivergenceError, ModelError
from genoembed.finetuning.trainer import FinetuneTrainer
from genoembed.models.load import load_model
from genoembed.tokenization.hf import build_encoder
from genoembed.training.checkpointing import checkpoint_activations
from genoembed.training.encoder import Encoder
from genoembed.training.log import reporters
from genoembed.training.optimizers import LossScaler, build_optimizer
from tests.finetuning.cases import FAST, build_model, write_classes, write_examples

FAMILIES = Path(__file__).parents[1] / "golden" / "families"
OPTIONS = {**FAST, "max_epochs": 1, "task": "classification"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("rows") / "c.tsv")


def lines_of(report):
    return [json.loads(line) for line in Path(report.metrics).read_text().splitlines()]


def gradients(name, *, layers, fusion="none", checkpointed):
    """Loss gradients of an encoder in training mode, with dropout off."""
    genomic = load_model(str(name), device="cpu", dtype="float32")
    config = EncoderConfig(model=str(name), layers=layers, fusion=fusion)
    encoder = Encoder(genomic, config)
    if checkpointed:
        checkpoint_activations(encoder.backbone, captured=encoder.layers)
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokens = build_encoder(genomic.tokenizer, add_special_tokens=genomic.special_tokens)
    ids = torch.from_numpy(tokens.encode(b"ACGTTGCAAGGT" * 4).input_ids.astype("int64"))[None]
    mask = torch.ones_like(ids)
    encoder.pooled(ids, mask, mask.bool()).square().sum().backward()
    return {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", sorted(path.parent.name for path in FAMILIES.glob("*/config.json")))
def test_checkpointed_blocks_of_every_family_have_the_same_gradients(family):
    """To 1e-6 of the largest."""
    plain, again = (gradients(FAMILIES / family, layers=("final",), checkpointed=on) for on in (False, True))
    assert plain.keys() == again.keys()
    for name, expected in plain.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(again[name], expected, rtol=0, atol=1e-6 * max(scale, 1e-6), msg=name)


@pytest.mark.parametrize("layers", [("final",), ("1",), ("0", "2"), ("blocks.1", "final")])
def test_checkpointed_hyena_blocks_have_the_same_gradients_for_any_layer(layers, model):
    fusion = "concat" if len(layers) > 1 else "none"
    plain, again = (gradients(model, layers=layers, fusion=fusion, checkpointed=on) for on in (False, True))
    assert plain.keys() == again.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(again[name], expected, rtol=1e-6, atol=1e-9, msg=name)


def test_layers_from_inside_every_block_leave_nothing_to_checkpoint(model):
    with pytest.raises(ModelError, match=r"every block gives a layer from its inside; set gradient_checkp"):
        gradients(model, layers=("0", "1", "2"), fusion="mean", checkpointed=True)


def test_a_model_that_does_not_offer_checkpoints_is_refused():
    with pytest.raises(
        ModelError, match=r"Linear does not offer it; set gradient_checkpointing=False, and few"
    ):
        checkpoint_activations(torch.nn.Linear(2, 2))


def test_checkpointing_a_frozen_model_is_refused(rows):
    with pytest.raises(ConfigError, match="tuning is 'frozen', so there is no backward pass to save memory"):
        finetune_config({**OPTIONS, "train": rows, "tuning": "frozen", "gradient_checkpointing": True})


def test_a_run_with_checkpoints_has_the_losses_of_one_without(model, tmp_path):
    path = write_examples(tmp_path / "e.jsonl", 24, negatives=1)
    options = {**OPTIONS, "task": "contrastive", "train_group_size": 2, "tuning": "lora"}
    options |= {"micro_batch": 3, "max_steps": 2, "validation_fraction": 0.0, "test_fraction": 0.0}
    losses = []
    for on in (False, True):
        run = genoembed.finetune(path, tmp_path / str(on), model=model, gradient_checkpointing=on, **options)
        losses.append([line["loss"] for line in lines_of(run) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("optim", ["adamw", "adafactor", "sgd"])
def test_optimizers_step_by_about_their_rate(optim):
    """AdamW and Adafactor take steps of the size of the rate, whatever the gradient's."""
    weight = torch.nn.Parameter(torch.zeros(4, 3))
    groups = [{"params": [weight], "lr": 0.01, "weight_decay": 0.0}]
    optimizer = build_optimizer(optim, groups, betas=(0.9, 0.999), eps=1e-8)
    weight.grad = torch.full((4, 3), 5.0)
    optimizer.step()
    assert float(-weight.detach().mean()) == pytest.approx(0.05 if optim == "sgd" else 0.01, rel=1e-3)


def test_adafactor_states_take_almost_no_memory():
    weight = torch.nn.Parameter(torch.zeros(256, 256))
    optimizer = build_optimizer("adafactor", [{"params": [weight], "lr": 0.01}], betas=(0.9, 0.9), eps=1e-8)
    weight.grad = torch.ones(256, 256)
    optimizer.step()
    held = sum(value.numel() for value in optimizer.state[weight].values() if torch.is_tensor(value))
    assert held < 2 * 256 + 8  # AdamW: 2 * 256 * 256


def test_sgd_needs_a_rate(rows):
    with pytest.raises(ConfigError, match=r"optim is 'sgd', which has no default rate; set learning_rate to"):
        finetune_config({**OPTIONS, "train": rows, "optim": "sgd"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"optim": "adamw_8bit"},
            r"which bitsandbytes does, and that is not installed; set optim='adafactor'",
        ),
        (
            {"report_to": "wandb"},
            r"report_to names 'wandb', which is not installed; set report_to='none', or",
        ),
        ({"report_to": ["none", "wandb"]}, "report_to names none and wandb; name auto or none alone"),
    ],
)
def test_packages_that_are_missing_are_refused_before_anything_is_read(options, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        genoembed.finetune(tmp_path / "nothere.tsv", tmp_path / "run", task="regression", **options)
    with pytest.raises(ConfigError, match=words):
        genoembed.pretrain(
            tmp_path / "nothere.fa",
            tmp_path / "run",
            like="evo2_7b",
            heldout_fraction=0.1,
            max_steps=1,
            **options,
        )


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder of packages that only this test has."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("bitsandbytes", "wandb"):
            del sys.modules[name]


def test_eight_bit_adam_is_that_of_bitsandbytes(packages):
    package = packages / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "optim.py").write_text("from torch.optim import AdamW as AdamW8bit\n")
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.5}]
    optimizer = build_optimizer("adamw_8bit", groups, betas=(0.5, 0.6), eps=1e-8)
    assert (optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["lr"]) == ((0.5, 0.6), 0.5)


FAKE_WANDB = """
calls = []
class Run:
    step = 0
    def log(self, line, step): calls.append(("log", step, line))
    def finish(self): calls.append(("finish",))
def init(**given):
    calls.append(("init", given))
    return Run()
"""


@pytest.fixture
def wandb(tmp_path_factory, monkeypatch):
    """A new module each time: one that monkeypatch deletes comes back, with its calls, for the next test."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module("wandb")
    del sys.modules["wandb"]


def test_wandb_gets_settings_and_lines_and_a_run_that_goes_on_is_the_same_one(tmp_path, wandb):
    (tmp_path / "run").mkdir()
    settings = {"learning_rate": 0.1, "train": ("a.tsv",)}
    ids = []
    for first in (1, 3):
        (callback,) = reporters(("wandb",), tmp_path / "run", settings, name="given")
        others = SimpleNamespace(is_world_process_zero=False, global_step=1)
        callback.on_train_begin(None, others, None)
        callback.on_log(None, others, None, logs={})
        for step in (first, first + 1):
            state = SimpleNamespace(is_world_process_zero=True, global_step=step)
            if step == first:
                callback.on_train_begin(None, state, None)
            callback.on_log(None, state, None, logs={"loss": 0.5, "grad_norm": math.inf})
        callback.close()
        begun, *lines, end = wandb.calls
        assert begun[1]["config"] == {"learning_rate": 0.1, "train": ["a.tsv"]}
        assert (begun[1]["name"], begun[1]["resume"]) == ("given", "allow")
        assert lines == [("log", n, {"loss": 0.5, "grad_norm": None}) for n in (first, first + 1)]
        assert end == ("finish",)
        ids.append(begun[1]["id"])
        wandb.calls.clear()
    assert ids[0] == ids[1]


def test_lines_after_the_last_step_of_a_resumed_run_come_after_those_that_wandb_has(
    tmp_path, monkeypatch, wandb
):
    monkeypatch.setattr(wandb.Run, "step", 6)
    (callback,) = reporters(("wandb",), tmp_path, {}, name="run")
    state = SimpleNamespace(is_world_process_zero=True, global_step=5)
    callback.on_log(None, state, None, logs={"test_loss": 0.5})
    callback.close()
    assert [call[0] for call in wandb.calls] == ["init", "log", "finish"]
    assert wandb.calls[1] == ("log", 6, {"test_loss": 0.5})


def test_a_run_tells_wandb_of_its_steps_and_its_test_under_its_own_name(model, rows, tmp_path, wandb):
    options = {**OPTIONS, "max_steps": 2, "validation_fraction": 0.0, "overwrite": True}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    genoembed.finetune(rows, tmp_path / "run", model=model, report_to="wandb", **options)
    begun, *_, tested, end = wandb.calls
    assert (begun[1]["name"], end) == ("run", ("finish",))
    assert begun[1]["dir"] != str(tmp_path / "run")
    assert "test_loss" in tested[2]
    assert [call[1] for call in wandb.calls if call[0] == "log" and "loss" in call[2]] == [1, 2]


def test_tensorboard_is_written_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("genoembed.training.log.TensorBoardCallback", SimpleNamespace)
    for is_there, expected in ((True, 1), (False, 0)):
        monkeypatch.setattr("genoembed.training.log.find_spec", lambda _, is_there=is_there: is_there)
        found = reporters(("auto",), tmp_path, {}, name="run")
        assert len(found) == expected
    assert reporters(("none",), tmp_path, {}, name="run") == []
    (board,) = reporters(("tensorboard",), tmp_path, {}, name="run")
    assert board.logging_dir == str(tmp_path / "tensorboard")


def test_float16_trains_as_float32_does_but_for_rounding(model, rows, tmp_path):
    losses = {}
    for dtype in ("float32", "float16"):
        run = genoembed.finetune(rows, tmp_path / dtype, model=model, **{**OPTIONS, "dtype": dtype})
        losses[dtype] = [line["loss"] for line in lines_of(run) if "loss" in line]
        scaled = [line.get("loss_scale") for line in lines_of(run) if "loss" in line]
    assert losses["float16"] != losses["float32"]
    assert losses["float16"] == pytest.approx(losses["float32"], rel=2e-2)
    assert scaled[0] >= 1024


def test_steps_that_overflow_are_left_out_and_counted(model, rows, tmp_path, monkeypatch):
    """One gradient with an infinity: no weight moves, the scale halves, and the run goes on."""
    original, before = FinetuneTrainer._clip_grad_norm, {}

    def overflowing(self, wrapped):
        if self.state.global_step == 1:
            before.update({n: p.detach().clone() for n, p in wrapped.named_parameters()})
            next(p for p in wrapped.parameters() if p.grad is not None).grad.fill_(math.inf)
        elif self.state.global_step == 2:
            assert all(torch.equal(before[n], p) for n, p in wrapped.named_parameters())
        return original(self, wrapped)

    monkeypatch.setattr(FinetuneTrainer, "_clip_grad_norm", overflowing)
    run = genoembed.finetune(rows, tmp_path / "run", model=model, **{**OPTIONS, "dtype": "float16"})
    lines = [line for line in lines_of(run) if "loss" in line]
    assert [line["skipped_steps"] for line in lines][:3] == [0, 1, 1]
    assert lines[1]["loss_scale"] == lines[0]["loss_scale"] / 2
    assert lines[1]["learning_rate"] == lines[2]["learning_rate"]


def test_float16_that_always_overflows_ends_with_a_sentence(model, rows, tmp_path, monkeypatch):
    original = FinetuneTrainer._clip_grad_norm

    def overflowing(self, wrapped):
        next(p for p in wrapped.parameters() if p.grad is not None).grad.fill_(math.nan)
        return original(self, wrapped)

    monkeypatch.setattr(FinetuneTrainer, "_clip_grad_norm", overflowing)
    options = {**OPTIONS, "dtype": "float16", "max_epochs": 9, "validation_fraction": 0.0}
    with pytest.raises(
        DivergenceError, match=r"not finite \(nan\); float16 ends at 65504.*set dtype='float32'"
    ):
        genoembed.finetune(rows, tmp_path / "run", model=model, **options)


def test_a_scaler_that_goes_on_has_its_scale_and_its_count():
    scaler = LossScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    assert [scaler.count(norm) for norm in (1.0, math.inf, torch.tensor(math.nan))] == [False, True, True]
    other = LossScaler("cpu")
    other.load_state_dict(scaler.state_dict())
    other.scale(torch.ones(1))
    assert (other.get_scale(), other.num_skipped) == (8.0, 2)


def test_settings_of_both_kinds_of_training_are_the_same_ones():
    for key in ("optim", "distributed", "report_to", "gradient_checkpointing", "dtype"):
        described = OptimizerConfig.options()[key]
        assert genoembed.config.pretrain.RecipeConfig.options()[key] == described
        assert genoembed.config.finetune.FinetuneRecipe.options()[key] == described
