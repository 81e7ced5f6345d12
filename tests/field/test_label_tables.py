"""Tables of labels as people split them: a class that only held-out rows have, in both forms."""

from __future__ import annotations

from pathlib import Path

import pytest

from genoembed.config.finetune import finetune_config
from genoembed.errors import TrainingWarning
from genoembed.finetuning.preparation import read_task_rows

CASE = Path(__file__).parent / "16-class-only-in-test"


@pytest.mark.parametrize(
    ("options", "name", "file"),
    [
        ({"train": "splitnew.tsv", "split": "column", "split_column": "split"}, "new", "splitnew.tsv"),
        ({"train": "train.csv", "validation": "dev.csv", "test": "test.csv"}, "2", "test.csv"),
    ],
)
def test_class_that_only_held_out_rows_have_is_named_with_its_file_and_gets_no_output(options, name, file):
    sides = ("train", "validation", "test")
    paths = {key: str(CASE / value) if key in sides else value for key, value in options.items()}
    with pytest.warns(TrainingWarning, match=rf"{file}:\d+: test rows have class '{name}'"):
        rows = read_task_rows(finetune_config({"task": "classification", **paths}))
    assert rows.space.names == ("0", "1")
    assert {row.label for row in rows.sides.test} == {"0", "1"}
