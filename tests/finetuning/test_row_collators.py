"""Collators for users' own loops: rows as mappings and as pairs, labels by position, packed rows apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from genoembed import CharTokenizer
from genoembed.errors import ConfigError, InputError, SequenceLengthError, ShapeError
from genoembed.training import KmerTerms, PackedCollator, PairCollator, PairIds, RowCollator, info_nce
from tests.tiny_models import build_striped_hyena

CHAR = CharTokenizer()


def same(first, second) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_mappings_with_other_keys_and_names_and_pairs_give_one_batch():
    collate = RowCollator(CHAR, sequence="seq", label="y", classes=("other", "promoter"))
    rows = [{"seq": "ACG", "y": "promoter", "id": "a"}, {"id": "b", "y": "other", "seq": "t"}]
    batch = collate(rows)
    assert same(batch, collate([("ACG", "promoter"), ["t", "other"]]))
    assert batch["input_ids"].tolist() == [[65, 67, 71], [84, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert [tensor.dtype for tensor in batch.values()] == [torch.int64] * 3


@pytest.mark.parametrize(
    ("label", "dtype", "shape"),
    [(1, torch.int64, (1,)), (0.5, torch.float32, (1,)), ([0.0, 1.0], torch.float32, (1, 2)),
     ([0, 1, 1], torch.float32, (1, 3)), (np.float64(2), torch.float32, (1,)), (True, torch.int64, (1,))],
)  # fmt: skip
def test_labels_keep_their_kind(label, dtype, shape):
    labels = RowCollator(CHAR)([("ACGT", label)])["labels"]
    assert (labels.dtype, tuple(labels.shape)) == (dtype, shape)


def test_numbers_are_float32_whatever_the_batch_and_a_mixed_batch_says_how():
    collate = RowCollator(CHAR, target="numbers")
    for values in ([1, 2.5], [1, 3], [True], [[0, 1]], [[0, 1], [0.5, 1]]):
        labels = collate([("ACGT", value) for value in values])["labels"]
        assert labels.dtype == torch.float32
        assert labels.tolist() == values
    with pytest.raises(
        InputError, match=r"row 1 has a whole number .* row 0 has none; set target=\"numbers\""
    ):
        RowCollator(CHAR)([("ACGT", 2.5), ("ACGT", 1)])
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    assert loss(torch.zeros(1, 2), RowCollator(CHAR)([("ACGT", [0, 1])])["labels"]) > 0


@pytest.mark.parametrize(
    ("options", "label", "message"),
    [
        ({"classes": ("a", "b")}, ["a"], r"row 0: label \['a'\] is none of a, b"),
        ({"classes": (0, 1)}, 2, "row 0: label 2 is none of 0, 1"),
        ({}, [[1], [1, 2]], r"row 0: label .* is not a number"),
        ({"target": "token"}, "HEH", "row 0: labels 'HEH', expected a whole number for each base; name the"),
        ({"target": "token"}, [0, 0.5, 1], r"row 0: labels .* expected a whole number"),
        ({"target": "token"}, None, "row 0: labels None, expected a whole number"),
        ({"target": "token", "classes": "HE"}, None, "row 0: labels None, expected a whole number"),
    ],
)
def test_labels_that_are_none_are_input_errors(options, label, message):
    with pytest.raises(InputError, match=message):
        RowCollator(CHAR, **options)([("ACG", label)])


def test_classes_may_be_numbers():
    collate = RowCollator(CHAR, classes=(1, 0))
    assert collate([("A", 0), ("A", np.int64(1))])["labels"].tolist() == [1, 0]


def test_genuine_end_counts_where_padding_has_its_id():
    tokenizer = CharTokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    batch = RowCollator(tokenizer, target="causal")([{"sequence": "ACG"}, {"sequence": "T"}])
    assert batch["input_ids"].tolist() == [[65, 67, 71, 0], [84, 0, 0, 0]]
    assert batch["labels"].tolist() == [[65, 67, 71, 0], [84, 0, -100, -100]]


def test_labels_of_bases_are_texts_lists_or_names():
    collate = RowCollator(CHAR, target="token", classes="HE", ignore_label="-")
    expected = [[0, 1, -100], [1, -100, -100]]
    assert collate([("ACG", "HE-"), ("T", "E")])["labels"].tolist() == expected
    numbers = RowCollator(CHAR, target="token")
    assert numbers([("ACG", [0, 1, -100]), ("T", [1])])["labels"].tolist() == expected
    with pytest.raises(ShapeError, match=r"labels of shape \(2,\), expected \(3,\), one per base"):
        numbers([("ACG", [0, 1])])


def test_pool_mask_leaves_out_first_bases_and_is_not_there_unless_requested():
    collate = RowCollator(CHAR, target="none", skip_first=1, add_pool_mask=True)
    assert collate(["ACG", b"AC"])["pool_mask"].tolist() == [[False, True, True], [False, True, False]]
    assert "pool_mask" not in RowCollator(CHAR, target="none")(["ACG"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"label": 1},
            "row 0: no 'sequence' among 'label'; name the key, and have transformers.Trainer leave",
        ),
        (("ACG",), r"row 0: \('ACG',\) has no value 2 \(label\); give a pair"),
        ("ACG", r"row 0: 'ACG' has no value 2 \(label\)"),
        ((7, 1), "row 0: int for a sequence, expected text"),
        (("ACG", "x"), "row 0: label 'x' is not a number; name the classes"),
    ],
)
def test_row_that_is_none_says_what_it_lacks(row, message):
    with pytest.raises(InputError, match=message):
        RowCollator(CHAR)([row])


def test_class_without_a_number_and_rows_that_do_not_fit_are_errors():
    with pytest.raises(InputError, match="row 1: label 'c' is none of a, b"):
        RowCollator(CHAR, classes=("a", "b"))([("A", "a"), ("A", "c")])
    for target in ("none", "causal"):
        with pytest.raises(SequenceLengthError, match="row 0"):
            RowCollator(CHAR, target=target, max_tokens=3)(["ACGT"])


def test_pairs_fill_short_groups_and_know_equal_sequences():
    collate = PairCollator(CHAR, group_size=3, query="q", positive="p", negative="n", terms=KmerTerms(k=3))
    rows = [{"q": "ACGA", "p": ["ACG", "unused"], "n": "TTTT"}, {"q": "AAC", "p": "AAC"}]
    batch = collate(rows)
    assert same(batch, collate([("ACGA", "ACG", "TTTT"), ("AAC", "AAC")]))
    assert batch["passage_input_ids"].shape == (6, 4)
    assert batch["passage_mask"].tolist() == [True, True, False, True, False, False]
    assert batch["query_term_ids"].shape == (2, 2)
    in_lists = PairCollator(CHAR, group_size=3)([("AC", "ACG", ["GT", "TT"]), ("AC", "ACG", "GT", ["TT"])])
    assert in_lists["passage_mask"].all()
    assert in_lists["passage_ids"][:3].tolist() == in_lists["passage_ids"][3:].tolist()
    reverse = collate([("GTT", "AAC")])
    assert reverse["query_ids"].tolist() == batch["query_ids"][1:].tolist(), "the other strand is the same"
    vectors = torch.nn.functional.normalize(torch.randn(8, 4), dim=-1)
    ids = PairIds(**{name: batch[name] for name in ("query_ids", "passage_ids", "passage_mask")})
    assert info_nce(vectors[:2], vectors[2:], ids=ids).statistics.negatives_per_query == 2


def test_pairs_without_a_positive_are_errors():
    with pytest.raises(InputError, match="row 0: no positive"):
        PairCollator(CHAR)([{"query": "A", "pos": []}])
    with pytest.raises(InputError, match="row 0: no positive"):
        PairCollator(CHAR)([{"query": "A", "pos": None}])
    with pytest.raises(InputError, match="row 0: int for a sequence"):
        PairCollator(CHAR)([("A", 7)])
    with pytest.raises(ConfigError, match="group_size is 0"):
        PairCollator(CHAR, group_size=0)


@pytest.mark.parametrize("packing", ["bins", "stream"])
def test_packed_rows_have_the_loss_of_each_sequence_alone(packing):
    model = build_striped_hyena().eval()
    rows = [{"sequence": "ACGTTGCA"}, ("GATTACA", None), "CCGG"]
    batch = PackedCollator(CHAR, window=32, packing=packing)(rows)
    assert batch["input_ids"].shape == (1, 32)
    alone = RowCollator(CHAR, target="causal")
    with torch.no_grad():
        packed = float(model(**batch).loss)
        losses = [float(model(**alone([text])).loss) for text in ("ACGTTGCA", "GATTACA", "CCGG")]
    counts = (8, 7, 4)  # the first token of a document is no target, its end is one
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert packed == pytest.approx(expected, rel=1e-5)


def test_packed_rows_of_long_and_many_sequences_come_as_one_batch_of_whole_tokens():
    rows = ["ACGT" * 5, "AC", "GATTACA"] * 4
    for packing in ("bins", "stream"):
        batch = PackedCollator(CHAR, window=8, packing=packing, isolate="position_ids")(rows)
        assert sorted(batch) == ["input_ids", "labels", "position_ids"]
        real = batch["input_ids"][batch["input_ids"] > 1]
        assert sorted(real.tolist()) == sorted("".join(rows).encode())
    plain = PackedCollator(CHAR, window=8, isolate="none")(rows)
    assert torch.equal(plain["attention_mask"] == 0, plain["input_ids"] == 1)


def test_rows_of_datasets_are_taken_as_they_are():
    datasets = pytest.importorskip("datasets")
    rows = [{"sequence": "ACG", "label": 1}, {"sequence": "T", "label": 0}]
    loader = DataLoader(datasets.Dataset.from_list(rows), batch_size=2, collate_fn=RowCollator(CHAR))
    (batch,) = loader
    assert same(batch, RowCollator(CHAR)(rows))
