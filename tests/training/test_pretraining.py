"""Pretraining of tiny models: the loss falls, a killed run goes on exactly, poles stay poles."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM, TrainerCallback

from genoembed import StripedHyena2Config, StripedHyena2ForCausalLM
from genoembed.errors import ConfigError
from genoembed.models.striped_hyena2.blocks import OutFilterDense
from genoembed.training import pretraining
from genoembed.training.datasets import PackedCorpus
from genoembed.training.pretraining import (
    MAX_LOG_POLE,
    ClampPoles,
    MetricsFile,
    PretrainConfig,
    pretrain_rows,
)
from tests.tiny_models import build_config

REPEATS = [b"ACGGTTAC" * 40, b"GATTACAG" * 40]
CONFIG = PretrainConfig(
    max_steps=12,
    rows_per_device=4,
    accumulation_steps=1,
    learning_rate=1e-2,
    warmup_steps=1,
    bf16=False,
    save_steps=6,
    eval_steps=6,
    logging_steps=2,
)


def striped_hyena(seed: int = 0) -> StripedHyena2ForCausalLM:
    torch.manual_seed(seed)
    return StripedHyena2ForCausalLM(
        StripedHyena2Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            hcs_layer_idxs=[0],
            hcm_layer_idxs=[1],
            hcl_layer_idxs=[2],
            attn_layer_idxs=[3],
            hcs_filter_groups=8,
            hcm_filter_groups=8,
        )
    )


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(build_config("llama"))


def rows(documents: list[bytes] = REPEATS) -> PackedCorpus:
    return PackedCorpus(documents, window=32)


def letter_rows() -> PackedCorpus:
    to_ids = bytes.maketrans(b"ACGT", bytes([5, 6, 7, 8]))
    return PackedCorpus([d.translate(to_ids) for d in REPEATS], window=32, eod_token_id=2, pad_token_id=1)


def lines_of(folder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder, name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines_of(folder) if name in line]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model = striped_hyena()
    pretrain_rows(model, rows(), rows(REPEATS[:1]), config=CONFIG, output_dir=folder)
    return folder, model


def test_pretrain_lets_the_loss_fall(whole_run):
    losses = [loss for _, loss in curve(whole_run[0], "loss_bits")]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 1
    (_, first), (_, last) = curve(whole_run[0], "eval_loss_bits")
    assert last < first


def test_pretrain_writes_steps_and_bits(whole_run):
    lines = lines_of(whole_run[0])
    assert [step for step, _ in curve(whole_run[0], "loss")] == [2, 4, 6, 8, 10, 12]
    assert [step for step, _ in curve(whole_run[0], "eval_loss")] == [6, 12]
    for name in ("loss", "eval_loss"):
        shown = [line for line in lines if name in line]
        assert shown
        assert all(line[f"{name}_bits"] == line[name] / math.log(2) for line in shown)


def test_pretrain_writes_checkpoints_and_the_final_model(whole_run):
    folder, model = whole_run
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-6"]
    final = StripedHyena2ForCausalLM.from_pretrained(folder / "final")
    for name, tensor in model.state_dict().items():
        assert torch.equal(final.state_dict()[name], tensor), name


def test_pretrain_keeps_every_pole_negative(whole_run):
    poles = [p for name, p in whole_run[1].named_parameters() if name.endswith("log_poles")]
    assert poles
    assert all((pole <= MAX_LOG_POLE).all() for pole in poles)


def test_pretrain_prints_nothing_and_leaves_what_it_was_given(capsys, tmp_path):
    given = rows()
    before = [given[index]["input_ids"].tolist() for index in range(len(given))]
    config = dataclasses.replace(CONFIG, max_steps=1)
    pretrain_rows(striped_hyena(), given, rows(), config=config, output_dir=tmp_path)
    assert capsys.readouterr().out == ""
    assert [given[index]["input_ids"].tolist() for index in range(len(given))] == before


def test_pretrain_resumed_equals_uninterrupted(whole_run, tmp_path, monkeypatch):
    class KilledError(RuntimeError):
        pass

    class Killer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 9:
                raise KilledError("killed at step 9")

    monkeypatch.setattr(pretraining, "ClampPoles", lambda: Killer())
    with pytest.raises(KilledError, match="step 9"):
        pretrain_rows(striped_hyena(), rows(), rows(REPEATS[:1]), config=CONFIG, output_dir=tmp_path)
    monkeypatch.undo()
    assert curve(tmp_path, "loss")[-1][0] == 8
    resumed = striped_hyena(seed=5)
    pretrain_rows(resumed, rows(), rows(REPEATS[:1]), config=CONFIG, output_dir=tmp_path, resume=True)
    for name in ("loss", "eval_loss"):
        assert curve(tmp_path, name) == curve(whole_run[0], name)
    for name, tensor in whole_run[1].state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_pretrain_from_scratch_forgets_the_metrics_of_an_earlier_run(whole_run, tmp_path):
    shutil.copy(whole_run[0] / "metrics.jsonl", tmp_path)
    config = dataclasses.replace(CONFIG, max_steps=2)
    pretrain_rows(striped_hyena(), rows(), rows(), config=config, output_dir=tmp_path)
    assert [step for step, _ in curve(tmp_path, "loss")] == [2]


def test_pretrain_is_the_same_for_the_same_seed(whole_run, tmp_path):
    pretrain_rows(striped_hyena(), rows(), rows(REPEATS[:1]), config=CONFIG, output_dir=tmp_path)
    assert curve(tmp_path, "loss") == curve(whole_run[0], "loss")


def test_pretrain_in_bfloat16_stays_near_float32(whole_run, tmp_path):
    config = dataclasses.replace(CONFIG, bf16=True)
    pretrain_rows(striped_hyena(), rows(), rows(REPEATS[:1]), config=config, output_dir=tmp_path)
    exact, rounded = curve(whole_run[0], "loss"), curve(tmp_path, "loss")
    assert [loss for _, loss in rounded] == pytest.approx([loss for _, loss in exact], rel=0.1)


def test_pretrain_trains_a_hugging_face_model_too(tmp_path):
    pretrain_rows(llama(), letter_rows(), letter_rows(), config=CONFIG, output_dir=tmp_path)
    losses = [loss for _, loss in curve(tmp_path, "loss")]
    assert losses[-1] < losses[0] - 0.5
    assert LlamaForCausalLM.from_pretrained(tmp_path / "final").config.num_hidden_layers == 3


@pytest.mark.parametrize("build", [striped_hyena, llama])
def test_compile_blocks_compiles_each_block_once(build, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    model, corpus = build(), letter_rows()
    config = dataclasses.replace(CONFIG, max_steps=1, compile_blocks=True)
    pretrain_rows(model, corpus, corpus, config=config, output_dir=tmp_path)
    blocks = model.blocks if build is striped_hyena else model.model.layers
    assert [module for module, _ in compiled] == list(blocks)
    assert all(options == {"dynamic": False} for _, options in compiled)


def test_evaluation_counts_a_batch_that_is_not_full(tmp_path):
    heldout = PackedCorpus([b"ACGGTTA" * 4], window=32)
    assert len(heldout) == 1 < CONFIG.rows_per_device
    config = dataclasses.replace(CONFIG, max_steps=1, learning_rate=0.0, eval_steps=1)
    model = striped_hyena()
    pretrain_rows(model, rows(), heldout, config=config, output_dir=tmp_path)
    with torch.inference_mode():
        expected = model.eval()(**{name: tensor[None] for name, tensor in heldout[0].items()}).loss
    ((_, measured),) = curve(tmp_path, "eval_loss")
    assert measured == pytest.approx(float(expected), rel=1e-4)


def test_pretrain_reports_all_that_is_missing(tmp_path):
    class NoRows:
        def __len__(self):
            return 0

        def __getitem__(self, index):
            raise IndexError(index)

    with pytest.raises(ConfigError, match="no checkpoint in") as caught:
        pretrain_rows(
            striped_hyena(), NoRows(), NoRows(), config=CONFIG, output_dir=tmp_path / "new", resume=True
        )
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "train_rows",
        "heldout_rows",
        "resume",
    ]
    assert not (tmp_path / "new").exists()


def test_compiled_blocks_need_a_full_batch(tmp_path):
    few = PackedCorpus([b"ACG"], window=4)
    config = dataclasses.replace(CONFIG, compile_blocks=True)
    with pytest.raises(ConfigError, match="train_rows: 1 rows, expected 4 or more"):
        pretrain_rows(striped_hyena(), few, rows(), config=config, output_dir=tmp_path)


@pytest.mark.parametrize("build", [striped_hyena, llama])
def test_parameter_groups_hold_each_parameter_once(build):
    model = build()
    groups = pretraining.parameter_groups(model, CONFIG)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert len(set(grouped)) == len(grouped)


@pytest.mark.parametrize("build", [striped_hyena, llama])
def test_weight_decay_falls_on_the_matrices_of_linear_maps_only(build):
    model = build()
    groups = pretraining.parameter_groups(model, CONFIG)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | OutFilterDense)
    }
    assert len(linear) > 10
    assert names == linear


def test_poles_have_a_rate_of_their_own():
    model = striped_hyena()
    (group,) = [g for g in pretraining.parameter_groups(model, CONFIG) if "lr" in g]
    assert group["lr"] == CONFIG.learning_rate * CONFIG.pole_rate_scale
    assert group["weight_decay"] == 0.0
    assert [id(p) for p in group["params"]] == [id(model.get_parameter("blocks.2.filter.log_poles"))]
    assert all("lr" not in group for group in pretraining.parameter_groups(llama(), CONFIG))


def test_clamp_poles_touches_poles_above_the_bound_only():
    model = striped_hyena()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        model.blocks[2].filter.log_poles[0, 0] = 0.3
        model.blocks[2].filter.log_poles[1, 0] = -1e-6
    ClampPoles().on_optimizer_step(None, None, None, model=model)
    expected = before["blocks.2.filter.log_poles"].clone()
    expected[:2, 0] = MAX_LOG_POLE
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected if name.endswith("log_poles") else before[name]), name


def test_clamp_poles_is_at_work_while_training(tmp_path):
    model = striped_hyena()
    with torch.no_grad():
        model.blocks[2].filter.log_poles.fill_(0.01)
    config = dataclasses.replace(CONFIG, max_steps=1, learning_rate=0.0)
    pretrain_rows(model, rows(), rows(), config=config, output_dir=tmp_path)
    assert (model.blocks[2].filter.log_poles == MAX_LOG_POLE).all()


def test_metrics_file_survives_a_line_that_was_cut(tmp_path):
    class State:
        global_step = 4
        is_world_process_zero = True

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1.0}\n{"step": 6, "loss": 0.9}\n{"step": 4, "lo')
    metrics = MetricsFile(path)
    metrics.on_train_begin(None, State(), None)
    metrics.on_log(None, State(), None, {"loss": 0.5})
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4]
    assert lines_of(tmp_path)[1]["loss_bits"] == 0.5 / math.log(2)
