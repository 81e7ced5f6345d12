"""Retrieval examples: strict lines, policies for every sequence, counts that warn of unused negatives."""

from __future__ import annotations

import gzip
import json

import pytest

from genoembed.errors import (
    AlphabetError,
    ConfigError,
    DuplicateIdError,
    EmptyRecordError,
    LabelError,
    SequenceFormatError,
)
from genoembed.finetuning.pairs import PairCounts, read_pairs
from genoembed.sequences import Policies


def write(folder, *rows, name="pairs.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


GOOD = {"query": "AAC", "pos": ["AAG", "aau"], "neg": ["CCC"]}


def test_pairs_are_cleaned_and_placed(tmp_path):
    path = write(tmp_path, "", GOOD, {"id": "q", "query": "GG", "pos": ["GA"], "group": 3})
    first, second = read_pairs(path)
    assert (first.id, first.query, first.pos, first.neg) == ("row_1", b"AAC", (b"AAG", b"AAT"), (b"CCC",))
    assert (first.teacher_scores, first.group, first.line) == (None, None, 2)
    assert (second.id, second.neg, second.group, second.line) == ("q", (), "3", 3)


def test_pairs_are_read_compressed(tmp_path):
    path = tmp_path / "pairs"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    assert read_pairs(path)[0].query == b"AAC"


def test_pairs_count_negatives_and_rows_without(tmp_path):
    rows = [GOOD | {"neg": []}, GOOD | {"neg": None}, GOOD | {"neg": ["C", "G", "CC"]}]
    counts = PairCounts()
    read_pairs(write(tmp_path, *rows), counts=counts)
    assert (counts.rows, counts.rows_without_neg, counts.neg, counts.pos) == (3, 2, 3, 6)
    assert (counts.fewest_neg, counts.most_neg) == (0, 3)
    assert counts.read.records == 3 * 3 + 3


def test_pairs_teacher_scores_are_one_a_sequence(tmp_path):
    (row,) = read_pairs(write(tmp_path, GOOD | {"teacher_scores": [0.9, 0.8, 0]}))
    assert row.teacher_scores == (0.9, 0.8, 0.0)


@pytest.mark.parametrize(
    ("row", "error", "match"),
    [
        ({"query": "AC", "pos": []}, SequenceFormatError, "pos is empty"),
        ({"query": "AC"}, SequenceFormatError, "no 'pos'"),
        ({"pos": ["AC"]}, SequenceFormatError, "no 'query'"),
        ({"query": ["AC"], "pos": ["AC"]}, SequenceFormatError, "query is .*expected one sequence"),
        (GOOD | {"pos": "AC"}, SequenceFormatError, "pos is 'AC', expected a list"),
        (GOOD | {"neg": "AC"}, SequenceFormatError, "neg is 'AC', expected a list"),
        (GOOD | {"neg": ["AC", 3]}, SequenceFormatError, "item 2 of neg is 3"),
        (GOOD | {"negs": []}, SequenceFormatError, "'negs' is not a key .*did you mean 'neg'"),
        (GOOD | {"pos_scores": [1]}, SequenceFormatError, "write teacher_scores"),
        (GOOD | {"teacher_scores": [1, 2]}, LabelError, "2 numbers for 3 sequences of pos and neg"),
        (GOOD | {"teacher_scores": [1, 2, "3"]}, LabelError, "item 3 of teacher_scores is '3'"),
        (GOOD | {"id": ""}, SequenceFormatError, "id is ''"),
        (GOOD | {"pos": ["AC", "AJ"]}, AlphabetError, "record 'row_2, pos 2': 'J' at position 2"),
        (GOOD | {"neg": [""]}, EmptyRecordError, "record 'row_2, neg 1': has no bases"),
        ("{", SequenceFormatError, "not JSON"),
        ("7", SequenceFormatError, "a JSON number, expected one object per line"),
    ],
)
def test_pairs_name_the_bad_line(tmp_path, row, error, match):
    with pytest.raises(error, match=rf"pairs\.jsonl:2: .*{match}"):
        read_pairs(write(tmp_path, GOOD, row))


def test_pairs_skip_the_whole_row_of_an_invalid_sequence(tmp_path):
    counts = PairCounts()
    rows = read_pairs(
        write(tmp_path, GOOD | {"neg": ["JJ"]}, GOOD), policies=Policies(invalid="skip"), counts=counts
    )
    assert ([row.id for row in rows], counts.skipped_rows) == (["row_2"], 1)


@pytest.mark.parametrize("false_negative", ["AAC", "AAG", "GTT", "CTT"])
def test_pairs_false_negatives_are_found_on_both_strands(tmp_path, false_negative):
    path = write(tmp_path, GOOD | {"neg": ["CCC", false_negative, "GGT"], "teacher_scores": [5, 4, 3, 2, 1]})
    with pytest.raises(
        LabelError, match=r"pairs\.jsonl:1: .*neg 2 is the query or a positive of its own row"
    ):
        read_pairs(path)
    counts = PairCounts()
    (row,) = read_pairs(path, false_negatives="drop", counts=counts)
    assert (row.neg, row.teacher_scores) == ((b"CCC", b"GGT"), (5, 4, 3, 1))
    assert counts.dropped_false_negatives == 1
    (kept,) = read_pairs(path, false_negatives="keep")
    assert len(kept.neg) == 3
    assert len(kept.teacher_scores) == 5


def test_pairs_ids_are_unique(tmp_path):
    path = write(tmp_path, GOOD | {"id": "q"}, GOOD | {"id": "q"})
    with pytest.raises(DuplicateIdError, match=r":2: record 'q': appears again \(first at line 1\)"):
        read_pairs(path)
    assert [row.id for row in read_pairs(path, policies=Policies(duplicates="suffix"))] == ["q", "q_2"]


def test_pairs_are_scored_all_or_none(tmp_path):
    with pytest.raises(ConfigError, match=r":2: no teacher_scores, but 1 of 2 rows have them"):
        read_pairs(write(tmp_path, GOOD | {"teacher_scores": [1, 2, 3]}, GOOD))


def test_pairs_refuse_unknown_policy_and_nothing():
    with pytest.raises(ConfigError, match=r"false_negatives is 'maybe'.*one of error, drop, keep"):
        read_pairs("x", false_negatives="maybe")
    with pytest.raises(ConfigError, match="no input file"):
        read_pairs([])
