"""Duplicates and contradictions: found on both strands, reported with places, left out only when asked."""

from __future__ import annotations

import pytest

from genoembed.config.labeled import CleaningConfig
from genoembed.errors import ConfigError, LabelError
from genoembed.finetuning.cleaning import clean_labeled
from genoembed.finetuning.labeled import LabeledSequence


def rows(*spec):
    return [
        LabeledSequence(id=f"r{i}", sequence=bases, label=label, source="a.tsv", line=i + 2)
        for i, (bases, label) in enumerate(spec)
    ]


ROWS = rows(
    (b"AAC", "x"),  # 0
    (b"AAC", "x"),  # 1 repeats 0
    (b"GTT", "x"),  # 2 repeats 0 on the other strand
    (b"CCC", "x"),  # 3
    (b"CCC", "y"),  # 4 contradicts 3
    (b"GGG", "x"),  # 5 contradicts 4 on the other strand, repeats 3
    (b"ACG", "y"),  # 6 alone
)


def kept(result):
    return [int(row.id[1:]) for row in result.rows]


def test_cleaning_reports_and_leaves_everything_by_default():
    result = clean_labeled(ROWS, kind="class")
    assert kept(result) == list(range(7))
    report = result.report
    assert (report.rows, report.duplicate_groups, report.duplicate_rows) == (7, 2, 4)
    assert (report.reverse_duplicate_rows, report.conflict_groups, report.conflict_rows) == (2, 1, 3)
    assert (report.dropped_duplicates, report.dropped_conflicts) == (0, 0)
    assert report.duplicate_examples[0].ids == ("r0", "r1", "r2")
    assert report.conflict_examples[0].places == ("a.tsv:5", "a.tsv:6", "a.tsv:7")
    assert str(report.conflict_examples[0]).startswith("r3 (a.tsv:5, 'x'), r4 (a.tsv:6, 'y')")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"duplicate_sequences": "drop"}, [0, 3, 4, 6]),
        ({"conflicts": "drop"}, [0, 1, 2, 6]),
        ({"duplicate_sequences": "drop", "conflicts": "drop"}, [0, 6]),
        ({"duplicate_sequences": "drop", "both_strands": False}, [0, 2, 3, 4, 5, 6]),
        ({"conflicts": "drop", "both_strands": False}, [0, 1, 2, 5, 6]),
    ],
)
def test_cleaning_drops_what_policies_name_and_counts_it(config, expected):
    result = clean_labeled(ROWS, kind="class", config=CleaningConfig(**config))
    assert kept(result) == expected
    assert result.report.dropped_duplicates + result.report.dropped_conflicts == 7 - len(expected)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            {"duplicate_sequences": "error"},
            r"a\.tsv:2: record 'r0': one sequence several times: r0 .* set duplicate_sequences=",
        ),
        ({"conflicts": "error"}, r"a\.tsv:5: record 'r3': labels differ for one sequence: .* set conflicts="),
    ],
)
def test_cleaning_stops_where_asked(config, match):
    with pytest.raises(LabelError, match=match):
        clean_labeled(ROWS, kind="class", config=CleaningConfig(**config))


def test_cleaning_turns_labels_of_bases_with_their_strand():
    agree = rows((b"AAC", ("a", "b", "c")), (b"GTT", ("c", "b", "a")))
    differ = rows((b"AAC", ("a", "b", "c")), (b"GTT", ("a", "b", "c")))
    assert clean_labeled(agree, kind="token").report.conflict_groups == 0
    assert clean_labeled(differ, kind="token").report.conflict_groups == 1


def test_cleaning_ignores_case():
    assert clean_labeled(rows((b"aac", "x"), (b"AAC", "x")), kind="class").report.duplicate_rows == 1


def test_cleaning_config_names_its_keys():
    with pytest.raises(
        ConfigError,
        match="duplicate_sequences is 'delete'; set duplicate_sequences to one of keep",
    ):
        CleaningConfig(duplicate_sequences="delete")
