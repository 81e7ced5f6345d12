"""Who divides an accumulated loss: models of ours take the number of labels, or say that they do not."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from genoembed.models.families import FAMILIES, Published, family_of
from genoembed.models.striped_hyena2.modeling import StripedHyena2ForCausalLM
from genoembed.training.auto_models import trained_class
from tests.tiny_models import build_striped_hyena

GOLDEN = Path(__file__).parents[2] / "golden" / "families"
FOLDERS = (
    "caduceus_ph",
    "dnabert2",
    "evo1",
    "gena_lm",
    "gena_lm_bigbird",
    "hyenadna",
    "nt_v2",
    "ntv3_pre",
    "omni_dna",
)
IDS = torch.tensor([[5, 6, 7, 8] * 16])


def heads(family):
    classes = importlib.import_module(family.port).AUTO_CLASSES
    return [ours for name, ours in classes.items() if name not in ("AutoConfig", "AutoModel")]


def takes_number_of_labels(model):
    """Whether the loss is the sum of losses by the number that is given."""
    is_sequence = "Sequence" in type(model).__name__
    labels = torch.tensor([1]) if is_sequence else torch.where(torch.arange(64) % 9 == 3, 1, -100)[None]
    with torch.no_grad():
        plain, few, many = (
            float(
                model.eval()(
                    input_ids=IDS, labels=labels, **{"num_items_in_batch": count} if count else {}
                ).loss
            )
            for count in (0, 50, 100)
        )
    assert few == pytest.approx(2 * many, rel=1e-4) or few == many == plain
    return few != plain


def check(model):
    assert getattr(model, "accepts_loss_kwargs", True) == takes_number_of_labels(model), type(model)


@pytest.mark.parametrize("folder", FOLDERS)
def test_heads_of_families_take_the_number_of_labels_or_say_that_they_do_not(folder):
    published = Published(json.loads((GOLDEN / folder / "config.json").read_text()))
    family = family_of(published)
    for head in heads(family):
        config = family.read_config(published.config)
        config.num_labels = 2
        check(head(config).float())


def test_all_families_with_heads_are_looked_at():
    found = {
        family_of(Published(json.loads((GOLDEN / name / "config.json").read_text()))) for name in FOLDERS
    }
    assert {family.name for family in FAMILIES if family.port} - {family.name for family in found} <= {
        "MutBERT"
    }
    for family in FAMILIES:
        if family.port:
            for head in heads(family):
                counts = "ForCausalLM" in head.__name__ or head.__name__ in (
                    "CaduceusForMaskedLM",
                    "Ntv3ForMaskedLM",
                )
                assert getattr(head, "accepts_loss_kwargs", True) == counts, head


def tiny_trained(kind):
    model = build_striped_hyena()
    config = model.config
    config.num_labels = 2
    return trained_class(type(config), kind, name=f"Tiny{kind}")(config)


@pytest.mark.parametrize("kind", ["ForSequenceClassification", "ForTokenClassification"])
def test_accumulated_gradient_of_a_trained_folder_is_that_of_one_batch(kind, tmp_path):
    torch.manual_seed(0)
    model = tiny_trained(kind)
    check(model)
    label = torch.tensor(1) if "Sequence" in kind else torch.ones(8, dtype=torch.int64)
    rows = [{"input_ids": torch.tensor(ids), "labels": label} for ids in ([65, 67] * 4, [71, 84] * 4)]
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    steps = []
    for size, accumulated in ((2, 1), (1, 2)):
        model.load_state_dict(start)
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=accumulated,
            max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, report_to=[], save_strategy="no",
            use_cpu=True, logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        weight = model.head.state_dict()
        change = torch.cat([(weight[name] - start[f"head.{name}"]).flatten() for name in weight])
        steps.append((change, trainer.state.log_history[0]["loss"]))
    assert steps[0][0].abs().max() > 0
    torch.testing.assert_close(steps[1][0], steps[0][0], rtol=1e-3, atol=1e-5)
    assert steps[1][1] == pytest.approx(steps[0][1], rel=1e-3)


def test_language_model_of_ours_takes_the_number_of_labels():
    model = build_striped_hyena()
    assert isinstance(model, StripedHyena2ForCausalLM)
    check(model)
