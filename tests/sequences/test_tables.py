"""The one reader of tables: every consumer reads every form of one, and every word for a side of a split."""

from __future__ import annotations

import gzip

import pytest

from genoembed.config.labeled import LabeledConfig, SplitConfig
from genoembed.config.probe import ProbeConfig
from genoembed.errors import LabelError, SequenceFormatError
from genoembed.finetuning.labeled import read_labeled
from genoembed.finetuning.splits import split_rows
from genoembed.probing.rows import read_labels
from genoembed.sequences.tables import SPLIT_WORDS, iter_rows, parse_split

HEADER = ("id", "sequence", "label", "split")
ROWS = [("a", "ACGT", "x", "training"), ("b", "GGCC", "y", "eval"), ("c", "TTTT", "x", "testing")]
TABLE = "".join("\t".join(row) + "\n" for row in (HEADER, *ROWS)).encode()
FORMS = {
    "tsv": TABLE,
    "tsv.gz": gzip.compress(TABLE),
    "csv": TABLE.replace(b"\t", b","),
    "semicolons": TABLE.replace(b"\t", b";"),
    "bom": b"\xef\xbb\xbf" + TABLE,
    "crlf": TABLE.replace(b"\n", b"\r\n"),
}
SIDES = ["train", "validation", "test"]


def labeled_rows(path):
    config = LabeledConfig(id_column="id", split_column="split")
    rows = read_labeled(path, config=config)
    splits = split_rows(rows, kind="class", config=SplitConfig(split="column"))
    return [
        (row.id, row.label, next(s for s in SIDES if at in getattr(splits, s))) for at, row in enumerate(rows)
    ]


def joined_labels(path):
    (path.parent / "r.fa").write_text("".join(f">{row[0]}\n{row[1]}\n" for row in ROWS))
    config = LabeledConfig(split_column="split")
    rows = read_labeled(path.parent / "r.fa", labels=path, config=config)
    return [(row.id, row.label, parse_split(row.split, path=row.source)) for row in rows]


def probe_labels(path):
    table = read_labels(str(path), ProbeConfig(preset="geneb"))
    return [(name, label, table.sides[name]) for name, label in table.labels.items()]


def probe_split(path):
    table = read_labels(str(path), ProbeConfig(preset="geneb", split=str(path)))
    return [(name, label, table.sides[name]) for name, label in table.labels.items()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("consumer", [labeled_rows, joined_labels, probe_labels, probe_split])
def test_every_consumer_reads_every_form_and_every_split_word(tmp_path, consumer, form):
    path = tmp_path / "table.dat"
    path.write_bytes(FORMS[form])
    assert consumer(path) == [(row[0], row[2], side) for row, side in zip(ROWS, SIDES, strict=True)]


def test_split_words_are_read_in_any_case_and_others_are_errors_with_their_place():
    assert {parse_split(f" {word.upper()} ", path="t") for word in SPLIT_WORDS} == set(SIDES)
    for word in ("holdout", "", None):
        with pytest.raises(
            LabelError, match=rf"t\.tsv:7: record 'r': the split column has {word!r}, expected"
        ) as e:
            parse_split(word, path="t.tsv", line=7, record_id="r")
        assert (e.value.path, e.value.line, e.value.record_id) == ("t.tsv", 7, "r")


@pytest.mark.parametrize("delimiter", ["\t", ",", ";"])
def test_first_line_is_a_row_if_it_begins_with_a_known_id(tmp_path, delimiter):
    path = tmp_path / "t"
    path.write_text(delimiter.join(("s1", '"1, 5; 2"')) + "\n" + delimiter.join(("s2", "3")) + "\n")
    rows = list(iter_rows(str(path), ids={"s1", "s2"}))
    assert [row.values for row in rows] == [
        {"column_1": "s1", "column_2": "1, 5; 2"},
        {"column_1": "s2", "column_2": "3"},
    ]
    assert [(row.line, row.number) for row in rows] == [(1, 1), (2, 2)]
    assert [row.line for row in iter_rows(str(path), ids={"s2"})] == [2]


def test_tab_parts_columns_whatever_commas_a_header_holds(tmp_path):
    (tmp_path / "t").write_text("id\tfound in A, B, C\nx\t1\n")
    assert [row.values for row in iter_rows(str(tmp_path / "t"))] == [{"id": "x", "found in A, B, C": "1"}]


def test_column_that_is_missing_is_named_with_the_nearest_one(tmp_path):
    (tmp_path / "t.csv").write_text("id,Label\na,1\n")
    (row,) = iter_rows(str(tmp_path / "t.csv"))
    with pytest.raises(
        SequenceFormatError, match=r"t\.csv:2: no column 'label' .*did you mean 'Label'\? Set label_"
    ):
        row.cell("label", option="label_column")
    assert row.text("Label", option="label_column") == "1"


def test_parquet_and_text_spell_numbers_the_same(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"id": [7.0, 8.0], "label": [True, None]})
    parquet.write_table(table, tmp_path / "t")
    texts = [
        (row.text("id", option=""), row.text("label", option="")) for row in iter_rows(str(tmp_path / "t"))
    ]
    assert texts == [("7", "1"), ("8", "")]
