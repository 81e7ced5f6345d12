"""No option is ignored in silence: it is refused where its task, or the source of pairs, has no use of it."""

from __future__ import annotations

import sys
from collections import defaultdict

import pytest

import genoembed
from genoembed.config.finetune import FinetuneConfig, finetune_config
from genoembed.config.tasks import APPLIES_TO, applies
from genoembed.errors import ConfigError
from tests.finetuning.cases import FAST, build_model, sequences, write_classes, write_examples, write_fasta
from tests.finetuning.test_finetuning import write_task

pytestmark = pytest.mark.filterwarnings("ignore::genoembed.errors.TrainingWarning")
USES = {
    "classification": (None,), "multilabel": (None,), "regression": (None,), "token": (None,), "lm": (None,),
    "contrastive": ("labels", "views", "examples"), "triplet": ("labels", "examples"),
    "retrieval": ("all", "fix_encoder", "dense"),
}  # fmt: skip
PAIRS = [(task, way) for task, ways in USES.items() for way in ways]
OPTIONS = FinetuneConfig.options()
GIVEN = ("task", "train", "contrast", "mode")
"""What chooses the use."""


def chosen_by(task, way):
    if way is None:
        return {"task": task, "train": ("rows.tsv",)}
    return {"task": task, "train": ("rows.tsv",), "mode" if task == "retrieval" else "contrast": way}


def other_value(option):
    """Make a value that is not the default, and valid by itself."""
    if option.choices:
        value = next(choice for choice in option.choices if choice != option.default)
    elif option.kind is bool:
        value = option.default is not True
    elif option.kind in (int, float):
        low = option.bounds.get("ge", option.bounds.get("gt", 0))
        most, below = option.bounds.get("le", 9), option.bounds.get("lt", 9)
        tried = (step for step in (low + 1, low + 0.25) if step <= most and step < below)
        value = next(step for step in tried if step != option.default)
        value = option.kind(value)
    else:
        value = "x"
    return (value,) if option.several else value


NEEDED = {
    **{key: {"schedule": "plateau"} for key in ("plateau_factor", "plateau_patience")},
    **{f"lora_{key}": {"tuning": "lora"} for key in ("rank", "alpha", "dropout", "targets")},
}


@pytest.mark.parametrize("key", sorted(set(OPTIONS) - set(GIVEN)))
def test_an_option_is_refused_where_it_would_be_ignored_and_nowhere_else(key):
    assert set(APPLIES_TO) <= set(OPTIONS)
    for task, way in PAIRS:
        try:
            finetune_config({**chosen_by(task, way), **NEEDED.get(key, {}), key: other_value(OPTIONS[key])})
            said = ""
        except ConfigError as error:
            said = str(error)
        refused = "but task is" in said or f"{key} is not for task " in said
        assert refused is not applies(key, task, way), (task, way, said)
        if refused:
            assert f"leave {key} out" in said
            assert repr(task) in said


@pytest.mark.parametrize("key", ["contrast", "mode"])
def test_so_is_what_chooses_the_use(key):
    for task in ("classification", "lm", "retrieval" if key == "contrast" else "contrastive"):
        with pytest.raises(ConfigError, match=f"{key} is for .* but task is '{task}'; leave {key} out"):
            finetune_config(
                {"task": task, "train": ("a.tsv",), key: "views" if key == "contrast" else "dense"}
            )


@pytest.mark.parametrize(
    ("writer", "options", "said"),
    [
        (write_classes, {"scope": "full"}, "scope is for .* but task is 'contrastive' with labels"),
        (write_examples, {"label_columns": "kind"}, "label_columns is not for task .* with examples"),
        (write_fasta, {"train_group_size": 3}, "train_group_size is for .* with views"),
    ],
)  # fmt: skip
def test_where_pairs_come_from_is_known_after_a_look_at_the_rows(tmp_path, writer, options, said):
    path = writer(tmp_path / "rows", *([sequences(8)] if writer is write_fasta else [8]))
    with pytest.raises(ConfigError, match=said):
        genoembed.finetune(path, tmp_path / "run", task="contrastive", **options)
    assert not (tmp_path / "run").exists()


CONDITIONS = {
    "last_n": "tuning",
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"), "tuning"),
    **dict.fromkeys(("plateau_factor", "plateau_patience"), "schedule"),
}
"""Options that are read where another option has a certain value, and refused elsewhere."""
SIMILAR = (("multilabel", None), ("regression", None), ("triplet", "labels"), ("retrieval", "fix_encoder"))
"""Uses that read what another one reads."""


@pytest.mark.parametrize("key", CONDITIONS)
def test_options_of_another_tuning_or_schedule_are_refused(key):
    with pytest.raises(ConfigError, match=f"{key} is for {CONDITIONS[key]} .*, or leave {key} out"):
        finetune_config({**chosen_by("classification", None), key: other_value(OPTIONS[key])})


@pytest.mark.parametrize("key", ["metric", "patience", "min_epochs"])
def test_what_looks_at_validation_rows_is_refused_without_any(key):
    value = {"metric": "auroc", "patience": 5, "min_epochs": 2}[key]
    options = {**chosen_by("classification", None), key: value, "validation_fraction": 0.0}
    with pytest.raises(
        ConfigError, match=f"{key} is for validation rows, but there are none; set validation"
    ):
        finetune_config(options)
    finetune_config({**options, "validation": ("other.tsv",)})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("options") / "model")


@pytest.mark.parametrize(
    ("task", "way"), [pair for pair in PAIRS if pair not in SIMILAR], ids=lambda value: str(value)
)
def test_a_run_reads_every_option_that_its_task_takes(model, tmp_path, monkeypatch, task, way):
    """Reading is not yet using, but what is never read is ignored for sure."""
    read: dict[str, set[str]] = defaultdict(set)

    def noted(self, name):
        # checks and copies read everything, whatever it is for
        caller = sys._getframe(1).f_code
        if not caller.co_filename.endswith("config/fields.py") and caller.co_name not in (
            "_problems",
            "misplaced",
        ):
            read[type(self).__name__].add(name)
        return object.__getattribute__(self, name)

    for section in FinetuneConfig.sections().values():
        monkeypatch.setattr(section, "__getattribute__", noted, raising=False)
    options = {"task": task, "model": model, **FAST, "max_steps": 1}
    if way == "examples" or task == "retrieval":
        path = write_examples(tmp_path / "e.jsonl", 24)
    elif way == "views":
        path = write_fasta(tmp_path / "v.fa", sequences(24))
    else:
        path, more = write_task(tmp_path, task)
        options |= more
    if way is not None:
        options["mode" if task == "retrieval" else "contrast"] = way
    genoembed.finetune(path, tmp_path / "run", **options)
    seen = set().union(*read.values())
    unread = {key for key in OPTIONS if key not in seen and applies(key, task, way)}
    assert unread - set(CONDITIONS) == set()
    assert {key for key in OPTIONS if key not in seen} > unread  # it is noted what is not read
