"""Label spaces: fixed order of classes, numbers for losses, and what becomes of an unknown class."""

from __future__ import annotations

import numpy as np
import pytest

from genoembed.errors import ConfigError, LabelError
from genoembed.finetuning.labels import LabelSpace, parse_label, reverse_label


def test_space_orders_classes_naturally_whatever_the_rows_order():
    for labels in (["10", "9", "x", "-1"], ["x", "-1", "10", "9"]):
        assert LabelSpace.of(labels, kind="class").names == ("-1", "9", "10", "x")


def test_space_of_columns_has_no_class_that_no_row_teaches():
    space = LabelSpace.of([("b",)], kind="multilabel", columns=("c", "b", "a"))
    assert space.names == ("b",)
    assert space.encode(("b",)).tolist() == [1]


def test_space_encodes_each_kind():
    assert LabelSpace(kind="class", names=("a", "b")).encode("b").dtype == np.int64
    numbers = LabelSpace(kind="regression", names=("x", "y")).encode((1.5, 2.0))
    assert (numbers.dtype, numbers.tolist()) == (np.float32, [1.5, 2.0])
    tokens = LabelSpace(kind="token", names=("0", "1")).encode(("1", None, "0"))
    assert tokens.tolist() == [1, -100, 0]


def test_space_counts_for_class_weights():
    assert LabelSpace(kind="class", names=("a", "b")).counts(["a", "a", "b"]).tolist() == [2, 1]
    assert LabelSpace(kind="token", names=("0", "1")).counts([("0", None, "1"), ("1", "1")]).tolist() == [
        1,
        3,
    ]
    assert LabelSpace(kind="multilabel", names=("a", "b")).counts([("a", "b"), (), ("b",)]).tolist() == [1, 2]


def test_space_refuses_a_class_it_does_not_have():
    space = LabelSpace(kind="class", names=("promoter", "other"))
    with pytest.raises(LabelError, match=r"'promotor' is none of the 2 classes .*did you mean 'promoter'"):
        space.encode("promotor")


def test_space_of_one_class_is_refused():
    with pytest.raises(ConfigError, match="only 'a' among the rows to train on, expected at least 2"):
        LabelSpace.of(["a", "a"], kind="class")
    with pytest.raises(ConfigError, match="'a' appears twice"):
        LabelSpace(kind="class", names=("a", "a"))


def test_parse_label_refuses_odd_cells():
    with pytest.raises(LabelError, match="expected 0 or 1"):
        parse_label({"a": "1", "b": "yes"}, kind="multilabel")
    with pytest.raises(LabelError, match="names 'x' twice"):
        parse_label({"a": "x|x"}, kind="multilabel", delimiter="|")
    with pytest.raises(LabelError, match="expected a finite number"):
        parse_label({"a": True}, kind="regression")


def test_reverse_label_turns_labels_of_bases_only():
    assert reverse_label(("a", "b"), kind="token") == ("b", "a")
    assert reverse_label(("a", "b"), kind="multilabel") == ("a", "b")
    assert reverse_label("ab", kind="class") == "ab"
