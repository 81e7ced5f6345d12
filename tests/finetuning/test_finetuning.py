"""``genoembed.finetune``: each task learns, saves and reports; runs repeat and resume bit by bit."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import TrainerState

import genoembed
from genoembed.config.finetune import EncoderConfig
from genoembed.errors import (
    ConfigError,
    DivergenceError,
    ForeignCodeError,
    ModelError,
    SequenceLengthError,
    TrainingWarning,
)
from genoembed.finetuning import trainer as finetune_trainer
from genoembed.finetuning.trainer import FinetuneTrainer
from genoembed.training.encoder import Encoder
from tests.finetuning.cases import (
    CONTEXT,
    FAST,
    build_model,
    sequences,
    write_classes,
    write_examples,
    write_fasta,
    write_table,
)
from tests.tiny_models import build_tiny

pytestmark = pytest.mark.filterwarnings("ignore::genoembed.errors.TrainingWarning")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("finetune") / "model")


def lines_of(report):
    return [json.loads(line) for line in Path(report.metrics).read_text().splitlines()]


def losses_of(report):
    return [line["loss"] for line in lines_of(report) if "loss" in line]


def write_task(folder, task):
    """Write rows of a task, and give the path with the options that it needs."""
    found = sequences(40)
    if task == "multilabel":
        rows = [{"sequence": s, "a": int("AC" in s), "b": int("GG" in s)} for s in found]
        return write_table(folder / "m.tsv", rows), {"label_columns": ("a", "b")}
    if task == "regression":
        return write_table(folder / "r.tsv", [{"sequence": s, "label": s.count("G")} for s in found]), {}
    if task == "token":
        names = str.maketrans("ACGT", "0110")
        rows = [{"sequence": s, "label": s.translate(names)} for s in found]
        return write_table(folder / "t.tsv", rows), {"ignore_label": "."}
    if task == "lm":
        return write_fasta(folder / "l.fa", found), {}
    return write_classes(folder / "c.tsv", 40), {}


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("classification", "mcc"),
        ("multilabel", "auprc"),
        ("regression", "spearman"),
        ("token", "macro_f1"),
        ("lm", "loss"),
    ],
)
def test_finetune_learns_a_task_and_reports_both_sides(model, tmp_path, task, metric):
    path, options = write_task(tmp_path, task)
    report = genoembed.finetune(
        path, tmp_path / "run", task=task, model=model, learning_rate=3e-3, **FAST, **options
    )
    assert report.metric == metric
    assert set(report.validation) >= {metric, "loss"}
    assert set(report.test) >= {metric, "loss"}
    first, *_, last = losses_of(report)
    assert last < first
    shares = [line["padding_percent"] for line in lines_of(report) if "loss" in line]
    assert len(shares) == report.steps
    assert 0 < max(shares) < 60
    packed = [line["packed_padding_percent"] for line in lines_of(report) if "loss" in line]
    assert all(0 <= share < 100 for share in packed)


def test_finetune_learns_what_composition_gives_away(model, tmp_path):
    held_out = {
        side: write_classes(tmp_path / f"{side}.tsv", 60, seed=n)
        for n, side in ((1, "validation"), (2, "test"))
    }
    report = genoembed.finetune(
        write_classes(tmp_path / "c.tsv", 100), tmp_path / "run", task="classification", model=model,
        learning_rate=3e-3, head_learning_rate=1e-2, **{**FAST, "max_epochs": 8}, **held_out,
    )  # fmt: skip
    assert report.test["auroc"] > 0.85
    assert report.test["accuracy"] > 0.75


@pytest.mark.parametrize("tuning", ["full", "frozen", "last_n", "lora"])
def test_tuning_moves_what_it_says_and_nothing_else(model, tmp_path, tuning):
    path = write_classes(tmp_path / "c.tsv")
    report = genoembed.finetune(
        path, tmp_path / "run", task="classification", model=model, tuning=tuning,
        last_n=1 if tuning == "last_n" else None, learning_rate=1e-2, layers=1, **FAST,
    )  # fmt: skip
    before = load_file(Path(model) / "model.safetensors")
    after = load_file(Path(report.output) / "model.safetensors")
    beside = {name for name in after if name.startswith(("head.", "bases."))}
    assert set(before) == set(after) - beside
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    blocks = {name.split(".")[1] for name in moved if name.startswith("blocks.")}
    expected = {"full": {"0", "1"}, "frozen": set(), "last_n": {"1"}, "lora": {"0", "1"}}
    assert blocks == expected[tuning]
    assert ("embedding_layer.weight" in moved) == (tuning == "full")
    assert not any(name.startswith(("norm.", "blocks.2.")) for name in moved)
    if tuning == "lora":
        ends = {name.split(".", 2)[2] for name in moved}
        assert ends == {
            *("projections.weight", "out_filter_dense.weight"),
            *("mlp.l1.weight", "mlp.l2.weight", "mlp.l3.weight"),
        }


@pytest.mark.parametrize("family", ["bert", "esm", "llama", "mamba"])
def test_lora_finds_the_linear_layers_of_other_families(family, tmp_path):
    folder = str(build_tiny(family, tmp_path / family))
    path = write_classes(tmp_path / "c.tsv", 30)
    report = genoembed.finetune(
        path, tmp_path / "run", task="classification", model=folder, tuning="lora",
        **{**FAST, "max_epochs": 1},
    )  # fmt: skip
    before, after = (AutoModel.from_pretrained(name).state_dict() for name in (folder, report.output))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_lora_targets_that_match_nothing_are_named(model, tmp_path):
    path = write_classes(tmp_path / "c.tsv")
    with pytest.raises(ConfigError, match=r"lora_targets: 'Wqk' is the end of no linear .* 'Wqkv'"):
        genoembed.finetune(
            path, tmp_path / "run", task="classification", model=model, tuning="lora",
            lora_targets=("Wqk",), **FAST,
        )  # fmt: skip


def test_code_that_a_model_brings_is_saved_with_it(tmp_path):
    folder = str(build_tiny("custom_conv", tmp_path / "conv"))
    rows = [{"sequence": s[:12], "label": i % 2} for i, s in enumerate(sequences(40))]
    path = write_table(tmp_path / "equal.tsv", rows)
    options = {"task": "classification", "model": folder, "trust_remote_code": True}
    report = genoembed.finetune(path, tmp_path / "run", **options, **FAST)
    again = genoembed.load_model(report.output, trust_remote_code=True)
    assert type(again.module).__name__ == "TinyConvModel"


def test_rows_of_different_lengths_learn_as_alone_where_a_model_sees_padding(tmp_path):
    folder = build_tiny("custom_conv", tmp_path / "conv")
    model = genoembed.load_model(str(folder), trust_remote_code=True, dtype="float32")
    encoder = Encoder(model, EncoderConfig(layers=("final", "0"), fusion="concat"))
    assert encoder.padding == "equal"
    ids = torch.randint(5, 10, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.tensor([9, 4, 9, 6])[:, None]
    together = encoder.pooled(ids, mask.long(), mask)
    together.square().sum().backward()
    gradients = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad()
    alone = [
        encoder.pooled(row[None, real], torch.ones(1, int(real.sum()), dtype=torch.long), real[None, real])
        for row, real in zip(ids, mask, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    torch.cat(alone).square().sum().backward()
    assert gradients
    for one, other in zip(
        gradients, (p.grad for p in encoder.parameters() if p.grad is not None), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("task", "options", "writer"),
    [
        ("contrastive", {}, "fasta"),
        ("contrastive", {"micro_batch": 3}, "fasta"),
        ("contrastive", {}, "classes"),
        ("contrastive", {"train_group_size": 3, "scope": "full"}, "examples"),
        ("triplet", {"distance": "cosine"}, "classes"),
        ("triplet", {"contrast": "examples"}, "examples"),
        ("retrieval", {"train_group_size": 3, "micro_batch": 4}, "examples"),
        ("retrieval", {"train_group_size": 2, "mode": "fix_encoder"}, "examples"),
        ("retrieval", {"train_group_size": 2, "mode": "dense", "add_pooler": True}, "examples"),
    ],
)
def test_finetune_learns_from_pairs(model, tmp_path, task, options, writer):
    path = {
        "fasta": lambda: write_fasta(tmp_path / "l.fa", sequences(40)),
        "classes": lambda: write_classes(tmp_path / "c.tsv", 40),
        "examples": lambda: write_examples(tmp_path / "e.jsonl", 40),
    }[writer]()
    report = genoembed.finetune(
        path, tmp_path / "run", task=task, model=model, learning_rate=1e-3, **FAST, **options
    )
    assert report.metric == ("heads_mrr" if task == "retrieval" else "mrr")
    assert 0 <= report.validation["recall_at_1"] <= report.validation["recall_at_10"] <= 1
    lines = [line for line in lines_of(report) if "loss" in line]
    if writer == "examples":  # elsewhere batches differ in how hard they are
        assert min(line["loss"] for line in lines[1:]) < lines[0]["loss"]
    for line in lines:
        assert {"negatives_per_query", "spread", "left_out"} <= set(line)
    assert any({"positive_score", "negative_score"} <= set(line) for line in lines)
    heads = {name for name in lines[0] if name.startswith("grad_norm_")}
    if options.get("mode") == "fix_encoder":
        assert heads == {"grad_norm_sparse", "grad_norm_multi_vector"}
    else:
        assert lines[0]["grad_norm_encoder"] > 0
    if task == "retrieval" and options.get("mode") != "dense":
        heads = [report.validation[f"{name}_mrr"] for name in ("dense", "sparse", "multi_vector")]
        assert report.validation["heads_mrr"] == pytest.approx(sum(heads) / 3)
    if writer == "examples" and task == "contrastive":
        in_batch, group = 8, 3
        # one softmax over passages, and over queries and positives from either side
        assert lines[0]["negatives_per_query"] == in_batch * group - 1 + 3 * (in_batch - 1)


def test_cached_gradients_train_as_whole_batches_do(model, tmp_path):
    path = write_examples(tmp_path / "e.jsonl", 32)
    options = {"task": "retrieval", "model": model, "train_group_size": 3, **FAST}
    whole = genoembed.finetune(path, tmp_path / "whole", **options)
    pieces = genoembed.finetune(path, tmp_path / "pieces", micro_batch=3, **options)
    assert losses_of(pieces) == pytest.approx(losses_of(whole), rel=1e-4)


def test_teacher_and_groups_reach_the_loss(model, tmp_path):
    options = {"task": "retrieval", "model": model, "train_group_size": 2, **FAST, "max_epochs": 1}
    plain = genoembed.finetune(write_examples(tmp_path / "a.jsonl", 20), tmp_path / "a", **options)
    taught = genoembed.finetune(
        write_examples(tmp_path / "b.jsonl", 20, teacher=True), tmp_path / "b", **options
    )
    grouped = genoembed.finetune(
        write_examples(tmp_path / "c.jsonl", 20, group=True), tmp_path / "c", **options
    )
    assert losses_of(plain) != losses_of(taught)
    assert sum(line.get("masked_false_negatives", 0) for line in lines_of(plain)) == 0
    assert sum(line.get("masked_false_negatives", 0) for line in lines_of(grouped)) > 0


def test_more_negatives_than_are_drawn_is_said(model, tmp_path):
    path = write_examples(tmp_path / "e.jsonl", 16, negatives=3)
    with pytest.warns(TrainingWarning, match="have more negatives than the 1 that train_group_size 2 takes"):
        genoembed.finetune(
            path, tmp_path / "run", task="retrieval", model=model, train_group_size=2,
            mode="dense", **{**FAST, "max_epochs": 1},
        )  # fmt: skip


def test_a_query_alone_is_refused(model, tmp_path):
    path = write_examples(tmp_path / "e.jsonl", 12)
    with pytest.raises(ConfigError, match="a batch has one query on its own: loss and gradient would be 0"):
        genoembed.finetune(
            path, tmp_path / "run", task="contrastive", model=model, train_group_size=1,
            **{**FAST, "rows_per_device": 1},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("classification", {"tuning": "lora", "lora_dropout": 0.2, "reverse_complement": 0.5}),
        ("classification", {"schedule": "plateau", "accumulation_steps": 2}),
        ("classification", {"optim": "adafactor", "gradient_checkpointing": True, "dropout": 0.3}),
        ("classification", {"optim": "sgd", "learning_rate": 0.05, "dtype": "float16", "tuning": "lora"}),
        ("retrieval", {"train_group_size": 2, "self_distillation_start": 4, "micro_batch": 3}),
    ],
)
def test_resumed_run_has_the_losses_of_one_that_was_never_stopped(
    model, tmp_path, monkeypatch, task, options
):
    path = (write_examples if task == "retrieval" else write_classes)(tmp_path / "rows", 40)
    asked = {"task": task, "model": model, **FAST, "max_epochs": 3, "eval_steps": 2, **options}
    whole = genoembed.finetune(path, tmp_path / "whole", **asked)

    def stop_after(step):
        original, seen = FinetuneTrainer.training_step, []

        def interrupted(self, *args, **kwargs):
            if self.state.global_step == step - 1 and not seen:
                seen.append(step)
                signal.raise_signal(signal.SIGINT)
            return original(self, *args, **kwargs)

        return interrupted

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "training_step", stop_after(5))
        with pytest.raises(KeyboardInterrupt, match="checkpoint-5 is saved; run the same again with resume"):
            genoembed.finetune(path, tmp_path / "parts", **asked)
    parts = genoembed.finetune(path, tmp_path / "parts", resume=True, **asked)
    assert losses_of(parts) == losses_of(whole)
    assert len(losses_of(whole)) >= 6
    assert parts.test == whole.test
    assert parts.best_step == whole.best_step
    files = sorted(path.name for path in Path(whole.output).glob("*.safetensors"))
    one, other = (
        {name: value for file in files for name, value in load_file(Path(r.output) / file).items()}
        for r in (whole, parts)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    if task == "retrieval":
        assert any("loss_self_dense" in line for line in lines_of(parts))
        newest = max((tmp_path / "parts").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        assert int(load_file(newest / "model.safetensors")["loss.forwards"]) == parts.steps > 5


def test_finetune_gives_the_same_model_for_the_same_seed_and_leaves_the_generator_alone(model, tmp_path):
    path = write_classes(tmp_path / "c.tsv")
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    options = {"task": "classification", "model": model, "mutation_rate": 0.1, **FAST}
    one = genoembed.finetune(path, tmp_path / "one", **options)
    assert torch.equal(torch.rand(3), expected)
    other = genoembed.finetune(path, tmp_path / "other", **options)
    third = genoembed.finetune(path, tmp_path / "third", **options, seed=1)
    assert losses_of(one) == losses_of(other)
    assert losses_of(one) != losses_of(third)


def test_written_config_runs_the_same_training_again(model, tmp_path):
    path = write_classes(tmp_path / "c.tsv")
    first = genoembed.finetune(
        path, tmp_path / "first", task="classification", model=model, layers=(0, 1), fusion="weighted", **FAST
    )
    again = genoembed.finetune(None, tmp_path / "again", config=first.config)
    assert losses_of(again) == losses_of(first)
    assert again.test == first.test


def test_folder_with_a_run_is_not_overwritten_unasked(model, tmp_path):
    path = write_classes(tmp_path / "c.tsv")
    options = {"task": "classification", "model": model, **FAST}
    report = genoembed.finetune(path, tmp_path / "run", **options)
    with pytest.raises(ConfigError, match="there is a run already"):
        genoembed.finetune(path, tmp_path / "run", **options)
    assert genoembed.finetune(path, tmp_path / "run", resume=True, **options) == report
    with pytest.raises(ConfigError, match=r"seed: 4, but 0 in .*; set seed to 0"):
        genoembed.finetune(path, tmp_path / "run", resume=True, **options, seed=4)
    other = write_classes(tmp_path / "d.tsv", seed=9)
    with pytest.raises(
        ConfigError, match="rows: the rows of train, validation and test are not those of the run"
    ):
        genoembed.finetune(other, tmp_path / "run", resume=True, **options)
    assert genoembed.finetune(path, tmp_path / "run", overwrite=True, **options).test == report.test


def test_training_ends_when_the_metric_stalls_but_not_before_the_least_epochs(model, tmp_path, monkeypatch):
    path = write_classes(tmp_path / "c.tsv")
    options = {"task": "classification", "model": model, **FAST, "max_epochs": 9, "patience": 2}
    values = iter([0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0] * 2)
    monkeypatch.setattr(
        finetune_trainer.FinetuneTrainer,
        "_measures",
        property(lambda _: {"eval": lambda _model: {"mcc": next(values), "loss": 1.0}}, lambda *_: None),
        raising=False,
    )
    trainers = []
    original = FinetuneTrainer.train_from

    def train_from(self, checkpoint):
        trainers.append(self)
        original(self, checkpoint)
        raise InterruptedError

    monkeypatch.setattr(FinetuneTrainer, "train_from", train_from)
    with pytest.raises(InterruptedError):
        genoembed.finetune(path, tmp_path / "a", **options)
    trainer = trainers[0]
    assert trainer.state.epoch == 3
    assert trainer.state.best_global_step * 3 == trainer.state.global_step
    values = iter([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    with pytest.raises(InterruptedError):
        genoembed.finetune(path, tmp_path / "b", **options, min_epochs=5)
    assert trainers[1].state.epoch == 5


STOPS_EARLY = {"max_epochs": 30, "patience": 1, "learning_rate": 0.3, "head_learning_rate": 0.3}


def test_other_processes_do_not_take_themselves_for_the_first_one_after_the_last_step(tmp_path):
    TrainerState(is_world_process_zero=True).save_to_json(str(tmp_path / "trainer_state.json"))
    trainer = SimpleNamespace(
        args=SimpleNamespace(load_best_model_at_end=False),
        model=None,
        accelerator=SimpleNamespace(prepare_model=lambda model, evaluation_mode: None),
        is_world_process_zero=lambda: False,
        is_local_process_zero=lambda: True,
        _load_from_checkpoint=lambda folder: None,
    )
    FinetuneTrainer._restore(trainer, tmp_path)
    assert (trainer.state.is_world_process_zero, trainer.state.is_local_process_zero) == (False, True)


def test_a_finished_run_goes_on_for_more_epochs(model, tmp_path):
    path = write_classes(tmp_path / "c.tsv")
    asked = {"task": "classification", "model": model, **FAST, "layers": 1, "schedule": "constant"}
    asked |= {"warmup_steps": 0, "patience": 9}
    whole = genoembed.finetune(path, tmp_path / "whole", **asked | {"max_epochs": 2})
    first = genoembed.finetune(path, tmp_path / "parts", **asked | {"max_epochs": 1})
    grown = genoembed.finetune(path, tmp_path / "parts", resume=True, **asked | {"max_epochs": 2})
    assert (2 * first.steps, grown.steps) == (whole.steps, whole.steps)
    assert (losses_of(grown), grown.test) == (losses_of(whole), whole.test)


@pytest.mark.parametrize("changes", [{"max_steps": 3, "dtype": "bfloat16"}, STOPS_EARLY])
def test_run_killed_before_its_model_was_saved_is_finished_without_another_step(
    model, tmp_path, monkeypatch, changes
):
    path = write_classes(tmp_path / "c.tsv")
    options = {"task": "classification", "model": model, **FAST, "eval_steps": 1, "layers": 1, **changes}
    whole = genoembed.finetune(path, tmp_path / "whole", **options)
    assert whole.steps < 20  # of 150, where nothing but patience ends it

    def killed(_model, folder, **_options):
        (folder / "config.json").write_text("{}")
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("genoembed.finetuning.training.save_finetuned", killed)
        with pytest.raises(MemoryError):
            genoembed.finetune(path, tmp_path / "run", **options)
    assert not [found for found in (tmp_path / "run").iterdir() if "final" in found.name]
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "training_step", None)
        report = genoembed.finetune(path, tmp_path / "run", resume=True, **options)
    assert (report.steps, report.best_step, report.validation) == (
        whole.steps,
        whole.best_step,
        whole.validation,
    )
    assert report.test == whole.test
    one, other = (load_file(Path(r.output) / "model.safetensors") for r in (whole, report))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_resume_of_a_complete_run_is_refused_for_another_model(model, tmp_path):
    path = write_classes(tmp_path / "c.tsv")
    own = shutil.copytree(model, tmp_path / "model")
    options = {"task": "classification", "model": str(own), **FAST, "max_steps": 1}
    report = genoembed.finetune(path, tmp_path / "run", **options)
    moved = own.rename(tmp_path / "moved")
    again = genoembed.finetune(path, tmp_path / "run", resume=True, **options | {"model": str(moved)})
    assert again == report
    values = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ConfigError, match=r"model: config.json is not that of the run"):
        genoembed.finetune(path, tmp_path / "run", resume=True, **options | {"model": str(moved)})


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_short_memory_says_how_to_take_less(model, tmp_path, monkeypatch, micro_batch):
    def short(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("genoembed.retrieval.models.RetrievalModel.forward", short)
    path = write_examples(tmp_path / "e.jsonl")
    with pytest.raises(ModelError, match=r"step 1: there is no memory for 8 rows .* rows_per_device below 8"):
        genoembed.finetune(
            path, tmp_path / "run", task="retrieval", model=model, micro_batch=micro_batch, **FAST
        )


def test_code_that_a_model_brings_is_blamed_for_what_it_raises_in_a_step(tmp_path):
    folder = build_tiny("custom_conv", tmp_path / "conv")
    (code,) = Path(folder).glob("*.py")
    line = "        x = self.embed(input_ids)\n"
    assert line in code.read_text()
    code.write_text(
        code.read_text().replace(line, f"        if self.training: raise KeyError('rope')\n{line}")
    )
    path = write_table(
        tmp_path / "t.tsv", [{"sequence": s[:12], "label": i % 2} for i, s in enumerate(sequences(40))]
    )
    options = {"task": "classification", "model": str(folder), "trust_remote_code": True}
    with pytest.raises(ForeignCodeError, match=r"the code that it brings failed at .*\.py:\d+ \(KeyError"):
        genoembed.finetune(path, tmp_path / "run", **options, **FAST)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("classification", {}),
        ("token", {}),
        ("lm", {}),
        ("contrastive", {}),
        ("retrieval", {"micro_batch": 4}),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_run_that_diverges_ends_with_a_sentence_and_keeps_the_last_good_checkpoint(
    model, tmp_path, task, options
):
    path = write_examples(tmp_path / "e.jsonl", 40) if task == "retrieval" else write_task(tmp_path, task)[0]
    recipe = {**FAST, "eval_steps": 1, "max_epochs": 20, "warmup_fraction": 0.0, "learning_rate": 1e25}
    with pytest.raises(DivergenceError, match=r"step \d+: .* set learning_rate below 1e\+25 and start again"):
        genoembed.finetune(path, tmp_path / "run", task=task, model=model, **recipe, **options)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines)
    for found in (tmp_path / "run").glob("checkpoint-*"):
        assert all(
            bool(values.isfinite().all()) for values in load_file(found / "model.safetensors").values()
        )
    assert not (tmp_path / "run" / "final").exists()


def test_saved_folder_opens_as_a_plain_model(model, tmp_path):
    path = write_classes(tmp_path / "c.tsv")
    report = genoembed.finetune(path, tmp_path / "run", task="classification", model=model, **FAST)
    opened = AutoModel.from_pretrained(report.output)
    assert type(opened).__name__ == "StripedHyena2Model"
    assert AutoTokenizer.from_pretrained(report.output)("ACGT").input_ids == [65, 67, 71, 84]
    facts = json.loads((Path(report.output) / "genoembed_finetuned.json").read_text())
    assert (facts["task"], facts["layers"], facts["pooling"]) == ("classification", ["norm"], "mean")
    assert facts["labels"] == {"kind": "class", "names": ["at", "gc"]}
    text = write_fasta(tmp_path / "l.fa", sequences(30))
    report = genoembed.finetune(text, tmp_path / "lm", task="lm", model=model, **FAST)
    assert type(AutoModelForCausalLM.from_pretrained(report.output)).__name__ == "StripedHyena2ForCausalLM"


def test_sequences_beyond_the_context_are_refused_until_they_are_cropped(model, tmp_path):
    rows = [{"sequence": s * 6, "label": i % 2} for i, s in enumerate(sequences(20))]
    path = write_table(tmp_path / "long.tsv", rows)
    options = {"task": "classification", "model": model, **FAST}
    with pytest.raises(SequenceLengthError, match=f"the model's context is {CONTEXT}; set max_crop_bp"):
        genoembed.finetune(path, tmp_path / "run", **options)
    with pytest.raises(SequenceLengthError, match=f"max_crop_bp is 65, .* set max_crop_bp to {CONTEXT}"):
        genoembed.finetune(path, tmp_path / "run", **options, max_crop_bp=65)
    report = genoembed.finetune(path, tmp_path / "run", **options, max_crop_bp=40)
    assert "mcc" in report.test


def test_a_regression_head_knows_its_units(model, tmp_path):
    rows = [{"sequence": s, "label": 1000 + s.count("G")} for s in sequences(30)]
    report = genoembed.finetune(
        write_table(tmp_path / "r.tsv", rows), tmp_path / "run", task="regression", model=model, **FAST
    )
    heads = load_file(Path(report.output) / "model.safetensors")
    assert heads["head.target_mean"].item() == pytest.approx(1005, abs=5)
    assert losses_of(report)[0] < 5


def test_own_files_for_each_side_are_taken_as_they_are(model, tmp_path, caplog):
    files = [write_classes(tmp_path / f"{name}.tsv", 16, seed=n) for n, name in enumerate("abc")]
    with caplog.at_level(logging.INFO):
        genoembed.finetune(
            files[0], tmp_path / "run", task="classification", model=model, validation=files[1],
            test=[files[2]], **{**FAST, "max_epochs": 1},
        )  # fmt: skip
    assert "rows: 16 to train on, 16 to validate, 16 to test" in caplog.text


def test_kin_across_the_split_are_dropped_where_asked(model, tmp_path, caplog):
    found = sequences(30, shortest=30, longest=40)
    twins = [s + "A" for s in found]
    rows = [{"sequence": s, "label": i % 2} for i, s in enumerate([*found, *twins])]
    path = write_table(tmp_path / "kin.tsv", rows)
    with caplog.at_level(logging.INFO):
        genoembed.finetune(
            path, tmp_path / "run", task="classification", model=model, homologs="drop",
            **{**FAST, "max_epochs": 1},
        )  # fmt: skip
    assert "have homologs among the rows to train on" in caplog.text
    assert "rows: 48 to train" not in caplog.text


def test_options_are_checked_together(model, tmp_path):
    path = write_classes(tmp_path / "c.tsv")
    with pytest.raises(ConfigError, match="'poling' is not an option; did you mean 'pooling'"):
        genoembed.finetune(path, tmp_path / "run", task="classification", poling="mean")
    with pytest.raises(ConfigError, match="metric is 'f1'; set metric to one of mcc"):
        genoembed.finetune(path, tmp_path / "run", task="classification", model=model, metric="f1", **FAST)
    with pytest.raises(ConfigError, match="fusion is 'none' for 2 layers"):
        genoembed.finetune(path, tmp_path / "run", task="classification", model=model, layers=(0, 1))
    with pytest.raises(
        ConfigError, match="tuning is 'frozen' and task is 'contrastive': nothing would learn"
    ):
        genoembed.finetune(path, tmp_path / "run", task="contrastive", model=model, tuning="frozen")
    with pytest.raises(ConfigError, match="the model is causal"):
        genoembed.finetune(path, tmp_path / "run", task="classification", model=model, pooling="cls")
    assert not (tmp_path / "run").exists()


def test_nothing_is_said_by_warnings_in_a_plain_run(model, tmp_path):
    path = write_classes(tmp_path / "c.tsv")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        genoembed.finetune(
            path, tmp_path / "run", task="classification", model=model, **{**FAST, "max_epochs": 1}
        )
