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


def kept(rows):
    return [int(row.id[1:]) for row in rows]


def test_cleaning_reports_and_leaves_everything_by_default(caplog):
    with caplog.at_level("INFO"):
        assert kept(clean_labeled(ROWS, kind="class")) == list(range(7))
    assert caplog.messages == [
        "4 of 7 rows repeat a sequence (2 as its reverse complement), 0 dropped; "
        "first: r0 (a.tsv:2, 'x'), r1 (a.tsv:3, 'x'), r2 (a.tsv:4, 'x')",
        "1 sequences have contradicting labels (3 rows, 0 dropped); "
        "first: r3 (a.tsv:5, 'x'), r4 (a.tsv:6, 'y'), r5 (a.tsv:7, 'x')",
    ]


@pytest.mark.parametrize(
    ("config", "expected", "dropped"),
    [
        ({"duplicate_sequences": "drop"}, [0, 3, 4, 6], (3, 0)),
        ({"conflicts": "drop"}, [0, 1, 2, 6], (0, 3)),
        ({"duplicate_sequences": "drop", "conflicts": "drop"}, [0, 6], (2, 3)),
        ({"duplicate_sequences": "drop", "both_strands": False}, [0, 2, 3, 4, 5, 6], (1, 0)),
        ({"conflicts": "drop", "both_strands": False}, [0, 1, 2, 5, 6], (0, 2)),
    ],
)
def test_cleaning_drops_what_policies_name_and_counts_it(config, expected, dropped, caplog):
    with caplog.at_level("INFO"):
        assert kept(clean_labeled(ROWS, kind="class", config=CleaningConfig(**config))) == expected
    duplicates, conflicts = caplog.messages
    assert f", {dropped[0]} dropped; first" in duplicates
    assert f", {dropped[1]} dropped); first" in conflicts


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
    drop = CleaningConfig(conflicts="drop")
    assert kept(clean_labeled(agree, kind="token", config=drop)) == [0, 1]
    assert kept(clean_labeled(differ, kind="token", config=drop)) == []


def test_cleaning_ignores_case():
    drop = CleaningConfig(duplicate_sequences="drop")
    assert kept(clean_labeled(rows((b"aac", "x"), (b"AAC", "x")), kind="class", config=drop)) == [0]


def test_cleaning_config_names_its_keys():
    with pytest.raises(
        ConfigError,
        match="duplicate_sequences is 'delete'; set duplicate_sequences to one of keep",
    ):
        CleaningConfig(duplicate_sequences="delete")
