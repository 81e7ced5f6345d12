"""Whole pretraining runs: what is measured, what is written, and going on as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

import genoembed
from genoembed.config.pretrain import CorpusConfig, RecipeConfig, StartConfig
from genoembed.errors import ConfigError, DivergenceError, GenoembedError, ModelError, StoreError
from genoembed.models import precision
from genoembed.pretraining import training as pretraining_run
from genoembed.pretraining.corpus import DocumentStream
from genoembed.pretraining.start import build_start
from genoembed.training.checkpointing import checkpoint_activations
from genoembed.training.run_folder import newest_checkpoint
from genoembed.training.trainer import StopOnSignal
from tests.pretraining.test_start import save_causal

SMALL = {
    "like": "evo2_7b",
    "hidden_size": 32,
    "layers": 4,
    "heldout_fraction": 0.2,
    "window": 32,
    "rows_per_device": 2,
    "accumulation_steps": 2,
    "max_steps": 8,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "logging_steps": 1,
    "eval_steps": 4,
    "save_steps": 3,
    "dtype": "float32",
}
SAME = (
    "loss",
    "grad_norm",
    "learning_rate",
    "eval_loss",
    "eval_bits_per_base",
    "packing_percent",
    "padded_cost",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("corpus") / "c.fa"
    # about 21 rows an epoch and 32 are used: the run crosses an epoch
    records = ["ACGGT" * int(size) for size in generator.integers(2, 8, 30)]
    path.write_text("".join(f">r{i}\n{record}{'ACGT'[i % 4]}\n" for i, record in enumerate(records)))
    return str(path)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, genoembed.pretrain(corpus, folder, **SMALL)


def curve(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if "train_runtime" not in line]
    return [{"step": x["step"]} | {key: x[key] for key in SAME if key in x} for x in kept]


def interrupt_at(step, monkeypatch):
    """Send this process SIGINT while a step is done."""

    class Interrupter(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("genoembed.training.trainer.ClampPoles", Interrupter)


def test_the_loss_falls_and_everything_is_reported(whole):
    folder, report = whole
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 1
    training = [line for line in lines if "loss" in line]
    for name in ("grad_norm", "learning_rate", "tokens_per_second", "padding_percent", "packing_percent"):
        assert all(name in line for line in training)
    assert all(line["tokens_per_second"] > 0 for line in training)
    assert training[-1]["padded_cost"] > 1.05
    assert training[-1]["corpus_epoch"] >= 1
    assert report.steps == 8
    assert report.bits_per_base == [x["eval_bits_per_base"] for x in lines if "eval_loss" in x][-1]


def test_the_final_folder_is_a_model_and_every_checkpoint_too(whole):
    folder, report = whole
    for path in (report.output, folder / "checkpoint-6"):
        assert genoembed.load_model(str(path)).tokenizer.eos_token_id == 0
    assert AutoModelForCausalLM.from_pretrained(report.output).config.max_position_embeddings == 32


def test_bits_per_base_are_those_of_a_forward_by_hand(whole, corpus):
    _, report = whole
    model = AutoModelForCausalLM.from_pretrained(report.output).eval()
    config = CorpusConfig(both_strands=False, shuffle_documents=1, heldout_fraction=0.2, heldout=True)
    ids = [i for document in DocumentStream([corpus], config=config) for i in (*document, 0)]
    nats = []
    with torch.inference_mode():
        for start in range(0, len(ids), 32):
            row = torch.tensor([ids[start : start + 32]])
            logs = model(input_ids=row).logits.double().log_softmax(-1)
            for i in range(1, row.shape[1]):
                # a base after an EOD begins a document: it is no target, and an EOD is no base
                if row[0, i] != 0 and row[0, i - 1] != 0:
                    nats.append(-float(logs[0, i - 1, row[0, i]]))
    assert report.bits_per_base == pytest.approx(np.mean(nats) / math.log(2), rel=1e-4)


@pytest.mark.parametrize("step", [2, 5])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(step, corpus, whole, tmp_path, monkeypatch):
    interrupt_at(step, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match=rf"checkpoint-{step} is saved; .* step {step + 1} of 8"):
        genoembed.pretrain(corpus, tmp_path / "run", **SMALL)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "final").exists()
    report = genoembed.pretrain(corpus, tmp_path / "run", resume=True, **SMALL)
    assert len(curve(whole[0])) == 10
    assert curve(tmp_path / "run") == curve(whole[0])
    one, other = (AutoModelForCausalLM.from_pretrained(r.output).state_dict() for r in (report, whole[1]))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_run_goes_on_in_its_type_on_a_machine_of_another_kind(corpus, tmp_path, monkeypatch):
    options = SMALL | {"dtype": "auto", "max_steps": 3, "save_steps": 1}
    with monkeypatch.context() as patched:
        patched.setitem(precision._decided, "cpu", False)
        interrupt_at(1, patched)
        with pytest.raises(KeyboardInterrupt, match="checkpoint-1"):
            genoembed.pretrain(corpus, tmp_path / "run", **options)
    monkeypatch.setitem(precision._decided, "cpu", True)
    report = genoembed.pretrain(corpus, tmp_path / "run", resume=True, **options)
    assert report.steps == 3
    assert genoembed.pretrain(corpus, tmp_path / "run", resume=True, **options) == report
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["dtype"] == "float32"
    with pytest.raises(ConfigError, match="dtype: 'bfloat16', but 'float32' in"):
        genoembed.pretrain(corpus, tmp_path / "run", resume=True, **options | {"dtype": "bfloat16"})


@pytest.mark.parametrize(
    "changes", [{"packing": "bins"}, {"isolate": True}, {"gradient_checkpointing": True}]
)
def test_other_ways_resume_exactly_too(changes, corpus, tmp_path, monkeypatch):
    options = SMALL | changes | {"max_steps": 5, "eval_steps": 5}
    genoembed.pretrain(corpus, tmp_path / "whole", **options)
    interrupt_at(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match="checkpoint-3"):
        genoembed.pretrain(corpus, tmp_path / "cut", **options)
    monkeypatch.undo()
    genoembed.pretrain(corpus, tmp_path / "cut", resume=True, **options)
    lines = curve(tmp_path / "whole")
    assert sum("loss" in line for line in lines) == 5
    assert curve(tmp_path / "cut") == lines


def test_isolation_changes_what_is_learned(corpus, tmp_path, whole):
    genoembed.pretrain(corpus, tmp_path, **SMALL | {"isolate": True, "max_steps": 2})
    apart = [line["loss"] for line in curve(tmp_path) if "loss" in line]
    together = [line["loss"] for line in curve(whole[0]) if "loss" in line][:2]
    assert apart != together
    assert apart[0] == pytest.approx(together[0], rel=0.05)


def test_accumulated_rows_weigh_as_rows_of_one_pass(corpus, tmp_path, whole):
    genoembed.pretrain(
        corpus, tmp_path, **SMALL | {"rows_per_device": 4, "accumulation_steps": 1, "max_steps": 8}
    )
    one = [line["loss"] for line in curve(tmp_path) if "loss" in line]
    two = [line["loss"] for line in curve(whole[0]) if "loss" in line]
    assert one == pytest.approx(two, rel=1e-3)


def test_resume_refuses_another_config_and_shows_what_differs(whole, corpus):
    with pytest.raises(ConfigError, match=r"window: 16, but 32 in .*; set window to 32") as caught:
        genoembed.pretrain(corpus, whole[0], resume=True, **SMALL | {"window": 16, "max_steps": 9})
    assert [text.split(":")[0] for text in caught.value.problems] == ["max_steps", "window"]


def test_resume_refuses_other_files(whole, corpus, tmp_path):
    longer = tmp_path / "c.fa"
    shutil.copy(corpus, longer)
    with longer.open("a") as file:
        file.write(">more\nACGT\n")
    with pytest.raises(ConfigError, match="corpus: contents or order of the files are not those"):
        genoembed.pretrain(longer, whole[0], resume=True, **SMALL)


def test_resuming_a_finished_run_changes_nothing_and_files_may_have_moved(whole, corpus, tmp_path):
    moved = shutil.copy(corpus, tmp_path)
    before = curve(whole[0])
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    shutil.rmtree(folder / "final")
    report = genoembed.pretrain(moved, folder, resume=True, **SMALL)
    assert (report.bits_per_base, report.steps) == (whole[1].bits_per_base, 8)
    assert curve(folder) == before
    one, other = (AutoModelForCausalLM.from_pretrained(r.output).state_dict() for r in (report, whole[1]))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_run_is_not_replaced_unasked(whole, corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"there is a run already \(run.json\); set resume"):
        genoembed.pretrain(corpus, whole[0], **SMALL)
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds 'notes.txt', which genoembed did not write"):
        genoembed.pretrain(corpus, folder, overwrite=True, **SMALL)
    (folder / "notes.txt").unlink()
    genoembed.pretrain(corpus, folder, overwrite=True, **SMALL | {"max_steps": 1})
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    assert {line["step"] for line in curve(folder)} == {1}
    assert not list(tmp_path.glob(".*"))


def test_run_that_is_to_replace_another_and_fails_leaves_it_as_it_was(whole, corpus, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    bad = tmp_path / "bad.fa"
    bad.write_text(Path(corpus).read_text() + ">late\nACGJ\n")
    with pytest.raises(GenoembedError, match="'J'"):
        genoembed.pretrain(bad, folder, overwrite=True, **SMALL)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("rate", [1e30, 1e4])
def test_run_that_diverges_ends_with_a_sentence(corpus, tmp_path, rate):
    options = SMALL | {"learning_rate": rate, "warmup_steps": 0, "max_steps": 30, "save_steps": 1}
    with pytest.raises(DivergenceError, match=r"step \d+: .* set learning_rate below 1"):
        genoembed.pretrain(corpus, tmp_path / "run", **options)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines)
    kept = newest_checkpoint(tmp_path / "run")
    if kept is not None:
        weights = AutoModelForCausalLM.from_pretrained(kept).state_dict()
        assert all(bool(torch.isfinite(values).all()) for values in weights.values())
    assert not (tmp_path / "run" / "final").exists()


def test_resume_without_a_run_is_refused(corpus, tmp_path):
    with pytest.raises(ConfigError, match="resume: no run in"):
        genoembed.pretrain(corpus, tmp_path / "none", resume=True, **SMALL)


def test_resume_passes_over_a_checkpoint_in_pieces(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert newest.name == "checkpoint-8"
    (newest / "trainer_state.json").write_text('{"global_st')
    assert newest_checkpoint(folder) == folder / "checkpoint-6"


def test_pretraining_goes_on_from_a_model_with_another_tokenizer(corpus, tmp_path):
    name = save_causal("gpt_neox", tmp_path / "neox")
    options = SMALL | {"like": None, "hidden_size": None, "layers": None, "model": name, "isolate": True}
    report = genoembed.pretrain(corpus, tmp_path / "run", **options | {"max_steps": 4})
    lines = curve(tmp_path / "run")
    measured = [line for line in lines if "eval_loss" in line][-1]
    # a token is several bases
    assert measured["eval_bits_per_base"] < measured["eval_loss"] / math.log(2)
    assert genoembed.load_model(report.output).tokenizer.decode([5]) in "ACGTN"


def test_a_model_that_cannot_isolate_is_refused_before_anything_is_written(corpus, tmp_path):
    name = save_causal("mamba", tmp_path / "mamba")
    options = SMALL | {"like": None, "hidden_size": None, "layers": None, "model": name}
    with pytest.raises(ModelError, match="set isolate to False"):
        genoembed.pretrain(corpus, tmp_path / "run", isolate=True, **options)
    assert not (tmp_path / "run").exists()


def test_heldout_files_are_measured_whole(corpus, tmp_path):
    heldout = tmp_path / "h.fa"
    heldout.write_text(">h\n" + "ACGGT" * 30 + "\n")
    options = SMALL | {"heldout_fraction": None, "heldout": heldout, "max_steps": 1}
    report = genoembed.pretrain(corpus, tmp_path / "run", **options)
    assert 0 < report.bits_per_base < 12
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["heldout"] == [str(heldout)]


def test_wrong_threads_are_refused(corpus, tmp_path):
    with pytest.raises(ConfigError, match="threads is 0"):
        genoembed.pretrain(corpus, tmp_path, threads=0, **SMALL)


def test_number_of_threads_is_put_back(tmp_path):
    before = torch.get_num_threads()
    with pytest.raises(GenoembedError, match="nothere"):
        genoembed.pretrain(tmp_path / "nothere.fa", tmp_path / "run", threads=before + 1, **SMALL)
    assert torch.get_num_threads() == before


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    stop = StopOnSignal()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == before
    assert signal.getsignal(signal.SIGINT) == before
    assert stop.stopped_at is None


def test_gradient_checkpointing_computes_blocks_again():
    model = build_start(StartConfig(like="evo2_7b", hidden_size=32, layers=4), window=32, seed=0).model
    calls = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.full((1, 32), 65)
    for expected in (1, 2):
        calls.clear()
        model(input_ids=ids, labels=ids).loss.backward()
        assert len(calls) == expected
        checkpoint_activations(model)


@pytest.mark.parametrize(("is_new", "rate"), [(True, 2e-3 / 2), (False, 2e-4 / 2)])
def test_rate_warmup_and_type_are_filled_in(is_new, rate, monkeypatch):
    model = build_start(StartConfig(like="evo2_7b", hidden_size=512, layers=1), window=32, seed=0)
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr("genoembed.training.trainer.automatic_dtype", lambda _, dtype=dtype: dtype)
        recipe = pretraining_run._resolved_recipe(RecipeConfig(max_steps=1000), model._replace(is_new=is_new))
        assert recipe.learning_rate == pytest.approx(rate)
        assert (recipe.warmup_steps, recipe.dtype) == (50, str(dtype).removeprefix("torch."))
    given = RecipeConfig(max_steps=10, learning_rate=0.5, warmup_steps=3, dtype="bfloat16")
    recipe = pretraining_run._resolved_recipe(given, model)
    assert (recipe.learning_rate, recipe.warmup_steps, recipe.dtype) == (0.5, 3, "bfloat16")
