"""What fine-tuning refuses without a model: in well under a second, before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest

from genoembed.config.finetune import finetune_config
from genoembed.errors import ConfigError, TrainingWarning
from genoembed.finetuning.labels import LabelSpace
from genoembed.finetuning.preparation import read_task_rows
from tests.finetuning.cases import write_classes, write_table

REFUSED = [
    ({"train": "nothere.tsv"}, "nothere.tsv"),
    ({"label_columns": "lable"}, "lable"),
    ({"train": "one_class.tsv"}, "classes: only 'a'"),
    ({"split": "column", "split_column": "side"}, "side"),
    ({"train": "words.tsv", "split": "column", "split_column": "split"}, "'holdout'"),
    ({"metric": "mcx"}, "metric is 'mcx'"),
    ({"learning_rate": float("inf")}, "learning_rate is inf"),
    ({"learning_rate": -1.0}, "learning_rate is -1.0"),
    ({"train": "letters.tsv"}, "'J'"),
    ({"task": "triplet", "train": "no_neg.jsonl", "split": "random"}, "no neg"),
    ({"config": "inf.toml"}, "learning_rate is inf"),
    ({"output_dir": "mine"}, "holds no run.json"),
    ({"resume": True}, "no run in"),
]
SCRIPT = """
import json, sys, genoembed
for options in json.loads(sys.argv[1]):
    options = {"train": "good.tsv", "output_dir": "run", "task": "classification"} | options
    try:
        genoembed.finetune(**options)
    except genoembed.GenoembedError as error:
        print(json.dumps([str(error), "torch" in sys.modules]))
"""


def test_wrong_input_is_refused_before_torch_is_imported(tmp_path):
    write_classes(tmp_path / "good.tsv")
    write_table(tmp_path / "one_class.tsv", [{"sequence": "ACGT" * n, "label": "a"} for n in range(1, 20)])
    words = [{"sequence": "ACGT" * n, "label": n % 2, "split": "train"} for n in range(1, 9)]
    write_table(tmp_path / "words.tsv", [*words, {"sequence": "AC", "label": 1, "split": "holdout"}])
    write_table(tmp_path / "letters.tsv", [{"sequence": "ACJT", "label": "a"}])
    (tmp_path / "no_neg.jsonl").write_text('{"query": "ACGT", "pos": ["ACGA"]}\n' * 20)
    (tmp_path / "inf.toml").write_text("learning_rate = 1e400\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    asked = json.dumps([options for options, _ in REFUSED])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, asked], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == len(REFUSED), result.stderr
    for (_, expected), (message, has_torch) in zip(REFUSED, found, strict=True):
        assert expected in message
        assert not has_torch, message
    assert not (tmp_path / "run").exists()


def rows_of(**options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = read_task_rows(finetune_config(options))
    return rows, [str(warning.message) for warning in caught if warning.category is TrainingWarning]


def split_table(path, rows):
    return write_table(path, [dict(zip(("sequence", "label", "split"), row, strict=True)) for row in rows])


SPLIT = {"split": "column", "split_column": "split"}


def test_class_that_only_held_out_rows_have_is_named_with_its_file_and_gets_no_output(tmp_path):
    rows = [("ACGT" * n, "ab"[n % 2], "train") for n in range(1, 9)]
    rows += [("GATTACA", "a", "dev"), ("GATT", "b", "test"), ("CATTAG", "new", "test")]
    path = split_table(tmp_path / "t.tsv", rows)
    found, (warning,) = rows_of(train=(path,), task="classification", **SPLIT)
    assert found.space.names == ("a", "b")
    assert [row.label for row in found.sides.test] == ["b"]
    assert warning.startswith(f"{path}:12: test rows have class 'new'")
    assert "1 of 2 rows left out" in warning
    other = write_table(tmp_path / "test.tsv", [{"sequence": "ACGTA", "label": "new"}])
    alone = write_table(
        tmp_path / "train.tsv", [{"sequence": "ACGT" * n, "label": "ab"[n % 2]} for n in range(1, 9)]
    )
    with pytest.warns(TrainingWarning, match="test rows have class 'new'"):
        with pytest.raises(ConfigError, match="test: no row is left of a class that rows to train on have"):
            read_task_rows(finetune_config({"train": (alone,), "test": (other,), "task": "classification"}))


def test_multilabel_and_token_labels_that_only_held_out_rows_have_are_named(tmp_path):
    rows = [("ACGT" * n, "a|b" if n % 2 else "a", "train") for n in range(1, 9)]
    path = split_table(tmp_path / "m.tsv", [*rows, ("GATT", "b|new", "dev"), ("GATT", "new", "test")])
    found, told = rows_of(train=(path,), task="multilabel", label_delimiter="|", **SPLIT)
    assert found.space.names == ("a", "b")
    assert [row.label for row in (*found.sides.validation, *found.sides.test)] == [("b",), ()]
    assert [text.split(": ", 1)[1][:36] for text in told] == [
        "validation rows have class 'new', wh",
        "test rows have class 'new', which no",
    ]
    rows = [("ACGT" * n, "xyyx" * n, "train") for n in range(1, 9)]
    path = split_table(
        tmp_path / "t.tsv", [*rows, ("GATT", "xxzx", "dev"), ("GATT", "zzzz", "test"), ("AC", "xy", "test")]
    )
    found, told = rows_of(train=(path,), task="token", **SPLIT)
    assert found.space.names == ("x", "y")
    assert [row.label for row in (*found.sides.validation, *found.sides.test)] == [
        ("x", "x", None, "x"),
        ("x", "y"),
    ]
    assert all("class 'z'" in text for text in told)
    assert len(told) == 2


def test_column_of_labels_without_a_row_to_train_on_gets_no_output(tmp_path):
    rows = [{"sequence": "ACGT" * n, "a": n % 2, "b": 1, "c": 0, "split": "train"} for n in range(1, 9)]
    rows += [{"sequence": "GATT", "a": 1, "b": 0, "c": 1, "split": side} for side in ("dev", "test")]
    path = write_table(tmp_path / "m.tsv", rows)
    found, told = rows_of(train=(path,), task="multilabel", label_columns=("a", "b", "c"), **SPLIT)
    assert found.space.names == ("a", "b")
    assert told[0] == "label_columns: no row to train on has class 'c', so nothing is predicted for it"
    assert len(told) == 3


def test_class_that_only_held_out_rows_have_is_fine_where_vectors_are_compared(tmp_path):
    rows = [("ACGT" * n, "ab"[n % 2], "train") for n in range(1, 9)]
    rows += [("GATTACA", "new", "test"), ("GATT", "new", "test")]
    path = split_table(tmp_path / "t.tsv", rows)
    found, told = rows_of(train=(path,), task="contrastive", contrast="labels", **SPLIT)
    assert (found.space.names, len(found.sides.test), told) == (("a", "b"), 2, [])


def test_classes_are_those_of_the_labels_that_are_given():
    space = LabelSpace.of([("a",), ("a", "c")], kind="multilabel", columns=("a", "b", "c"))
    assert space.names == ("a", "c")
