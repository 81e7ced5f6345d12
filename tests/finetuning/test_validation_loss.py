"""The loss of held-out rows of tasks that compare, and what is said when it alone rises."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

import genoembed
from genoembed.config.finetune import finetune_config
from genoembed.finetuning.preparation import read_task_rows
from genoembed.finetuning.tasks import set_up_task
from genoembed.training.log import OverfittingHint
from tests.finetuning.cases import FAST, build_model, sequences, write_classes, write_examples, write_fasta


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model"))


CASES = [
    ("contrastive", {"contrast": "labels"}),
    ("contrastive", {"contrast": "views"}),
    ("contrastive", {"contrast": "examples", "train_group_size": 3}),
    ("triplet", {"contrast": "labels"}),
    ("triplet", {"contrast": "examples"}),
    ("retrieval", {"train_group_size": 3}),
]


def write_rows(folder, contrast, name, count, *, negatives=2):
    if contrast == "labels":
        return write_classes(folder / f"{name}.tsv", count)
    if contrast == "views":
        return write_fasta(folder / f"{name}.fa", sequences(count))
    return write_examples(folder / f"{name}.jsonl", count, negatives=negatives)


@pytest.mark.parametrize(("task", "options"), CASES)
def test_loss_of_held_out_rows_is_that_of_the_same_rows_in_training(task, options, model, tmp_path):
    """One batch of all rows, no augmentation, the same passages: the same loss."""
    contrast = options.get("contrast", "examples")
    negatives = 1 if task == "triplet" else 2
    train, held_out = (write_rows(tmp_path, contrast, n, 8, negatives=negatives) for n in ("train", "held"))
    if contrast == "views":
        options = {
            **options,
            "view_mutation_rate": 0.0,
            "view_crop_fraction": 1.0,
            "view_reverse_complement": 0.0,
        }
    asked = {"task": task, "train": train, "validation": held_out, "model": model, **options}
    config = finetune_config({**asked, "dtype": "float32", "rows_per_device": 8})
    setup = set_up_task(config, read_task_rows(config))
    setup.model.eval()
    found = setup.measures["eval"](setup.model)
    batch = setup.collate([setup.dataset[index] for index in range(8)])
    with torch.no_grad():
        expected = float(setup.model(**batch)["loss"])
    assert found["loss"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0


@pytest.mark.parametrize(("task", "options"), [CASES[0], CASES[2], CASES[5]])
def test_a_run_reports_it_and_can_stop_by_it(task, options, model, tmp_path):
    rows = write_rows(tmp_path, options.get("contrast", "examples"), "rows", 30)
    options = {**options, **FAST, "max_epochs": 1, "metric": "loss"}
    report = genoembed.finetune(rows, tmp_path / "run", task=task, model=model, **options)
    assert report.metric == "loss"
    assert report.validation["loss"] > 0
    assert report.test["loss"] > 0


def test_a_last_row_is_not_compared_with_nothing(model, tmp_path):
    """Nine rows in batches of eight: five and four, for one alone would have a loss of 0."""
    rows, held_out = (write_rows(tmp_path, "views", name, 9) for name in ("train", "held"))
    asked = {"task": "contrastive", "train": rows, "validation": held_out, "model": model, "seed": 3}
    config = finetune_config({**asked, "dtype": "float32", "rows_per_device": 8})
    setup = set_up_task(config, read_task_rows(config))
    losses, original = [], setup.model.contrast_loss

    def noted(chunks, batch):
        losses.append(len(batch["ids"]))
        return original(chunks, batch)

    setup.model.contrast_loss = noted
    setup.measures["eval"](setup.model.eval())
    assert losses == [5, 4]


def evaluate(hint, losses, caplog):
    """Notify of each evaluation; return the warnings after each."""
    history, said = [], []
    for step, (loss, held_out) in enumerate(losses, start=1):
        history += [{"loss": loss, "step": step}, {"eval_loss": held_out, "step": step}]
        hint.on_evaluate(None, SimpleNamespace(log_history=history, is_world_process_zero=True), None)
        said.append(len(caplog.records))
    return said


def test_overfitting_is_said_once(caplog):
    losses = [(1.0, 0.9), (0.9, 0.8), (0.8, 0.85), (0.7, 0.9), (0.6, 0.95), (0.5, 1.0), (0.4, 1.1)]
    with caplog.at_level(logging.WARNING):
        assert evaluate(OverfittingHint(), losses, caplog) == [0, 0, 0, 0, 1, 1, 1]
        assert (
            "the held-out loss has risen for 3 evaluations, to 0.95: rows are learned by heart" in caplog.text
        )


@pytest.mark.parametrize(
    "losses",
    [
        [(1.0, 0.9), (1.1, 1.0), (1.2, 1.1), (1.3, 1.2)],  # both rise: it diverges, which is something else
        [(1.0, 0.9), (0.9, 1.0), (0.8, 0.95), (0.7, 1.1), (0.6, 1.2)],  # not in a row
        [(1.0, 0.9), (0.9, 0.9), (0.8, 0.9), (0.7, 0.9)],
    ],
)
def test_other_curves_are_not_called_overfitting(losses, caplog):
    assert set(evaluate(OverfittingHint(), losses, caplog)) == {0}
