"""Labeled sequences: every format, every kind of label, every policy, and errors with file and line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.config.labeled import LabeledConfig
from genoembed.errors import (
    AlphabetError,
    ConfigError,
    DuplicateIdError,
    EmptyRecordError,
    GenoembedError,
    InputFileError,
    LabelError,
    MissingExtraError,
    MissingOptionError,
    SequenceFormatError,
)
from genoembed.finetuning.labeled import LabeledCounts, iter_labeled, read_labeled
from genoembed.sequences import Policies, read_sequences
from genoembed.sequences.tables import iter_rows

ROWS = [("ACGT", "promoter"), ("ggn", "other"), ("ACUU", "promoter")]
EXPECTED = [(b"ACGT", "promoter"), (b"GGN", "other"), (b"ACTT", "promoter")]


def write(folder, name, text) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def pairs(rows):
    return [(row.sequence, row.label) for row in rows]


def tsv(rows, delimiter="\t") -> str:
    return "".join(f"{a}{delimiter}{b}\n" for a, b in [("sequence", "label"), *rows])


def jsonl(rows) -> str:
    return "".join(json.dumps({"sequence": a, "label": b}) + "\n" for a, b in rows)


def parquet(rows) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    sink = io.BytesIO()
    table = pyarrow.table({"sequence": [a for a, _ in rows], "label": [b for _, b in rows]})
    writer.write_table(table, sink)
    return sink.getvalue()


FORMATS = {
    "tsv": lambda rows: tsv(rows).encode(),
    "csv": lambda rows: tsv(rows, ",").encode(),
    "semicolons": lambda rows: tsv(rows, ";").encode(),
    "jsonl": lambda rows: jsonl(rows).encode(),
    "parquet": parquet,
}
PACKERS = {
    "plain": lambda raw: raw,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("kind", FORMATS)
def test_labeled_reads_every_format_whatever_the_name(tmp_path, kind, packer):
    path = write(tmp_path, "misleading.csv.gz", PACKERS[packer](FORMATS[kind](ROWS)))
    assert pairs(iter_labeled(path)) == EXPECTED


@pytest.mark.parametrize("packer", ["plain", "gzip"])
@pytest.mark.parametrize("kind", FORMATS)
def test_labeled_reads_standard_input(monkeypatch, kind, packer):
    raw = PACKERS[packer](FORMATS[kind](ROWS))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    assert pairs(iter_labeled("-")) == EXPECTED


def test_labeled_streams(tmp_path):
    path = write(tmp_path, "a.tsv", tsv([("ACGT", "x"), ("JJJ", "x")]))
    rows = iter_labeled(path)
    assert next(rows).sequence == b"ACGT"
    with pytest.raises(AlphabetError, match=r"a\.tsv:3: record 'row_2': 'J' at position 1 "):
        next(rows)


def test_labeled_takes_crlf_byte_order_mark_and_blank_lines(tmp_path):
    text = b"\xef\xbb\xbfsequence\tlabel\r\n\r\nACGT\tx\r\n\r\nGG\ty"
    rows = read_labeled(write(tmp_path, "a.tsv", text))
    assert [(row.sequence, row.label, row.line) for row in rows] == [(b"ACGT", "x", 3), (b"GG", "y", 5)]


def test_labeled_takes_quoted_fields_over_lines_and_long_ones(tmp_path):
    long = "ACGT" * 50_000  # above the csv module's limit
    text = f'"label","sequence","note"\n"a ""b"", c","{long}","two\nlines"\nx,GG,plain\n'
    rows = read_labeled(write(tmp_path, "a.csv", text))
    assert [(row.label, len(row.sequence), row.line) for row in rows] == [
        ('a "b", c', 200_000, 2),
        ("x", 2, 4),
    ]


@settings(max_examples=40)
@given(
    rows=st.lists(
        st.tuples(
            st.text("ACGTN", min_size=1), st.text('ab",;\n\t x', min_size=1).filter(lambda text: text.strip())
        ),
        min_size=1,
    ),
    delimiter=st.sampled_from([",", "\t"]),
)
def test_tables_read_what_the_csv_module_writes(tmp_path_factory, rows, delimiter):
    import csv

    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows([("sequence", "label"), *rows])
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_text(text.getvalue(), newline="")
    assert [tuple(row.values.values()) for row in iter_rows(str(path))] == rows


def test_labeled_columns_have_any_names(tmp_path):
    path = write(tmp_path, "a.tsv", "seq\ty\tname\tpart\tfamily\nACGT\tx\tone\ttest\tf1\n")
    config = LabeledConfig(
        sequence_column="seq",
        label_columns=("y",),
        id_column="name",
        split_column="part",
        group_column="family",
    )
    (row,) = read_labeled(path, config=config)
    assert (row.id, row.split, row.group, row.label) == ("one", "test", "f1", "x")


@pytest.mark.parametrize(
    ("config", "text", "label"),
    [
        ({"kind": "multilabel", "label_delimiter": "|"}, "sequence\tlabel\nACGT\tb|a", ("a", "b")),
        ({"kind": "multilabel", "label_delimiter": "|"}, "sequence\tlabel\nACGT\t", ()),
        ({"kind": "multilabel", "label_columns": ("a", "b")}, "sequence\ta\tb\nACGT\t0\t1", ("b",)),
        ({"kind": "multilabel"}, '{"sequence": "ACGT", "label": ["y", "x"]}', ("x", "y")),
        ({"kind": "regression"}, "sequence\tlabel\nACGT\t-1.5e2", (-150.0,)),
        ({"kind": "regression", "label_columns": ("a", "b")}, "sequence\ta\tb\nACGT\t1\t2.5", (1.0, 2.5)),
        ({"kind": "token"}, "sequence\tlabel\nACGT\t0110", ("0", "1", "1", "0")),
        ({"kind": "token", "ignore_label": "."}, "sequence\tlabel\nACGT\t.1..", (None, "1", None, None)),
        ({"kind": "token", "label_delimiter": " "}, "sequence\tlabel\nAC\texon intron", ("exon", "intron")),
        ({"kind": "token"}, '{"sequence": "ACG", "label": ["x", null, 2]}', ("x", None, "2")),
        ({"kind": "none"}, "sequence\nACGT", None),
        ({"kind": "class"}, '{"sequence": "ACGT", "label": 1.0}', "1"),
        ({"kind": "class"}, '{"sequence": "ACGT", "label": true}', "1"),
    ],
)
def test_labeled_reads_every_kind_of_label(tmp_path, config, text, label):
    (row,) = read_labeled(write(tmp_path, "a", text), config=LabeledConfig(**config))
    assert row.label == label


def test_labeled_stripped_gaps_take_their_token_labels_along(tmp_path):
    path = write(tmp_path, "a.tsv", "sequence\tlabel\nA--CG.T\t0xx12x3\n")
    (row,) = read_labeled(path, config=LabeledConfig(kind="token"), policies=Policies(gaps="strip"))
    assert (row.sequence, row.label) == (b"ACGT", ("0", "1", "2", "3"))
    fasta = write(tmp_path, "a.fa", ">r\nA--C\nG.T\n")
    table = write(tmp_path, "l.tsv", "id\tlabel\nr\t0xx12x3\n")
    (joined,) = read_labeled(
        fasta, labels=table, config=LabeledConfig(kind="token"), policies=Policies(gaps="strip")
    )
    assert (joined.sequence, joined.label) == (row.sequence, row.label)


POLICY_CASES = [
    (b"ACJT", {"invalid": "mask"}),
    (b"acgu", {}),
    (b"acgu", {"keep_case": True}),
    (b"AC-G.T*", {"gaps": "strip"}),
    (b"RYKN", {}),
]


@pytest.mark.parametrize(("bases", "policy"), POLICY_CASES)
def test_labeled_policies_are_those_of_extract(tmp_path, bases, policy):
    fasta = write(tmp_path, "a.fa", b">row_1\n" + bases + b"\n")
    table = write(tmp_path, "a.tsv", b"sequence\tlabel\n" + bases + b"\tx\n")
    (expected,) = read_sequences(fasta, **policy)
    (row,) = read_labeled(table, policies=Policies(**policy))
    assert (row.id, row.sequence) == (expected.id, expected.sequence)
    labels = write(tmp_path, "l.tsv", "id\tlabel\nrow_1\tx\n")
    (joined,) = read_labeled(fasta, labels=labels, policies=Policies(**policy))
    assert joined.sequence == row.sequence


def test_labeled_policies_are_counted(tmp_path):
    text = "id\tsequence\tlabel\na\tACJT\tx\na\tAC\tx\nb\t\tx\nc\tJ\tx\n"
    path = write(tmp_path, "a.tsv", text)
    counts = LabeledCounts()
    policies = Policies(invalid="skip", duplicates="suffix", empty="skip")
    rows = read_labeled(path, config=LabeledConfig(id_column="id"), policies=policies, counts=counts)
    assert [row.id for row in rows] == ["a"]
    assert (counts.read.skipped_invalid, counts.read.skipped_empty, counts.read.records) == (2, 1, 1)


def test_labeled_joins_fasta_with_its_labels(tmp_path, caplog):
    fasta = write(tmp_path, "a.fa.gz", gzip.compress(b">x first\nAC\nGT\n>y\nGG\n"))
    table = write(tmp_path, "l.csv", "id,label\ny,1\nz,1\nx,0\n")
    counts = LabeledCounts()
    with caplog.at_level("WARNING"):
        rows = read_labeled(fasta, labels=table, counts=counts)
    assert [(row.id, row.sequence, row.label, row.line) for row in rows] == [
        ("x", b"ACGT", "0", 1),
        ("y", b"GG", "1", 4),
    ]
    assert counts.unused_labels == 1
    assert "1 of 3 labels belong to no record (z ...)" in caplog.text


def test_labeled_unlabeled_record_is_an_error_or_skipped(tmp_path):
    fasta = write(tmp_path, "a.fa", ">seq1\nACGT\n>seq2\nGG\n")
    table = write(tmp_path, "l.tsv", "id\tlabel\nseq1\t0\n")
    with pytest.raises(LabelError, match=r"a\.fa:3: record 'seq2': no label in .*did you mean 'seq1'\?"):
        read_labeled(fasta, labels=table)
    counts = LabeledCounts()
    rows = read_labeled(fasta, labels=table, config=LabeledConfig(unlabeled="skip"), counts=counts)
    assert ([row.id for row in rows], counts.skipped_unlabeled) == (["seq1"], 1)


def test_labeled_without_labels_reads_sequence_files_too(tmp_path):
    fasta = write(tmp_path, "a.txt", "\n>x\nACGT\n")
    table = write(tmp_path, "b.txt", "sequence\nGG\n")
    rows = read_labeled([fasta, table], config=LabeledConfig(kind="none"))
    assert [(row.id, row.sequence, row.label) for row in rows] == [
        ("x", b"ACGT", None),
        ("row_1", b"GG", None),
    ]


def test_labeled_rows_are_numbered_over_all_files(tmp_path):
    files = [write(tmp_path, name, tsv([("ACGT", "x")])) for name in ("a.tsv", "b.tsv")]
    rows = read_labeled(files)
    assert [(row.id, Path(row.source).name) for row in rows] == [("row_1", "a.tsv"), ("row_2", "b.tsv")]


TOKEN, NUMBER = {"kind": "token"}, {"kind": "regression"}
BAD = [
    ("sequence\tlabel\nACJT\tx", {}, AlphabetError, r"f:2: record 'row_1': 'J' at position 3 is not in"),
    ("sequence\tlabel\nAC-T\tx", {}, AlphabetError, r"f:2: record 'row_1': gap '-' at position 3"),
    ("sequence\tlabel\nAC\tx\n\tx", {}, EmptyRecordError, r"f:3: record 'row_2': has no bases"),
    ("sequence\tlabel\nAC\tx\nAC\t ", {}, LabelError, r"f:3: record 'row_2': column 'label' has no label"),
    (
        "sequence\tlabel\nAC\tx\ty",
        {},
        SequenceFormatError,
        r"f:2: the row has 3 column\(s\), expected the 2 of",
    ),
    ("sequence\tlabel\nAC", {}, SequenceFormatError, r"f:2: the row has 1 column\(s\)"),
    (
        "Sequence\tlabel\nAC\tx",
        {},
        SequenceFormatError,
        r"f:2: no column 'sequence' .*did you mean 'Sequence'\?",
    ),
    ("ACGT\t1\nAC\t0", {}, SequenceFormatError, r"f:2: no column 'sequence' \(there are 'ACGT', '1'\)"),
    ("sequence\tlabel\tlabel\nAC\tx\ty", {}, SequenceFormatError, r"f:1: column 'label' appears twice"),
    ("sequence\tlabel\nAC\t1.x", NUMBER, LabelError, r"f:2: .*'1.x', expected a finite number"),
    ("sequence\tlabel\nAC\t1_0", NUMBER, LabelError, r"f:2: .*'1_0', expected a finite number"),
    ("sequence\tlabel\nAC\tnan", NUMBER, LabelError, r"f:2: .*'nan', expected a finite number"),
    ("sequence\tlabel\nACG\t01", TOKEN, LabelError, r"f:2: record 'row_1': 2 labels for 3 letters"),
    ('sequence,label\nAC,"x', {}, SequenceFormatError, r"f:2: a quoted field is not closed"),
    ('sequence,label\nAC,"x"y', {}, SequenceFormatError, r"f:2: text after the closing quote of column 2"),
    (
        b"sequence\tlabel\nAC\t\xe9",
        {},
        SequenceFormatError,
        r"f:2: the line has byte 0xe9, which is not UTF-8",
    ),
    ('{"sequence": "AC", "label": 1}\n{"sequence"', {}, SequenceFormatError, r"f:2: not JSON"),
    (
        '{"sequence": "AC", "label": NaN}',
        NUMBER,
        SequenceFormatError,
        r"f:1: not JSON \(NaN is not a JSON number",
    ),
    (
        '{"sequence": "AC", "label": 1, "label": 2}',
        {},
        SequenceFormatError,
        r"f:1: not JSON \(key 'label' twice",
    ),
    (
        '{"sequence": "AC", "label": 1}\n[1]',
        {},
        SequenceFormatError,
        r"f:2: a JSON array, expected one object",
    ),
    ('{"sequence": 7, "label": 1}', {}, SequenceFormatError, r"f:1: record 'row_1': the sequence is 7"),
    ('{"sequence": "AC", "label": 0.5}', {}, LabelError, r"f:1: .*has 0.5, expected the name of one class"),
    ('[{"sequence": "AC"}]', {}, SequenceFormatError, r"f: this is one JSON array"),
    (
        ">a\nACGT",
        {},
        MissingOptionError,
        r"f has sequences, but no labels; set labels to the table of their labels",
    ),
    ("", {}, SequenceFormatError, r"f: the file is empty"),
    (b"\x00\x01\x02", {}, SequenceFormatError, r"f: this is a binary file \(byte 0x00\)"),
    (gzip.compress(gzip.compress(b"x")), {}, SequenceFormatError, r"f: the file is compressed twice"),
    (
        gzip.compress(tsv(ROWS).encode())[:-6],
        {},
        SequenceFormatError,
        r"f: the gzip data stops before its end",
    ),
    (b"PAR1 and then nothing", {}, SequenceFormatError, r"f: damaged Parquet"),
]


@pytest.mark.parametrize(("text", "config", "error", "match"), BAD)
def test_labeled_names_the_bad_row(tmp_path, monkeypatch, text, config, error, match):
    if "Parquet" in match:
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "f", text)
    with pytest.raises(error, match=match) as raised:
        read_labeled("f", config=LabeledConfig(**config))
    assert isinstance(raised.value, GenoembedError)


def test_labeled_names_the_bad_row_of_parquet(tmp_path):
    path = write(tmp_path, "a.parquet", parquet([("ACGT", "x"), ("ACGT", None)]))
    with pytest.raises(LabelError, match=r"a\.parquet: record 'row_2': column 'label' has no label"):
        read_labeled(path)


def test_labeled_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    path = write(tmp_path, "a", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[parquet\]"):
        read_labeled(path)


def test_labeled_label_table_refuses_an_id_twice(tmp_path):
    fasta = write(tmp_path, "a.fa", ">x\nAC\n")
    table = write(tmp_path, "l.tsv", "id\tlabel\nx\t0\nx\t1\n")
    with pytest.raises(DuplicateIdError, match=r"l\.tsv:3: record 'x': appears again \(first at line 2\)"):
        read_labeled(fasta, labels=table)


def test_labeled_file_that_is_missing_is_named_at_once():
    with pytest.raises(InputFileError, match=r"nowhere\.tsv: file not found"):
        iter_labeled("nowhere.tsv")


def test_labeled_nothing_left_is_an_error_that_counts_in_words(tmp_path):
    path = write(tmp_path, "a.tsv", tsv([("J", "x")]))
    with pytest.raises(ConfigError, match=r"no sequence is left \(1 file, 1 skipped invalid\); give more"):
        read_labeled(path, policies=Policies(invalid="skip"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"label_columns": ("a", "b")}, "kind 'class' has one"),
        ({"label_columns": ()}, "label_columns is empty"),
        ({"label_delimiter": "|"}, "label_delimiter separates names"),
        ({"ignore_label": "."}, "ignore_label is for kind 'token'"),
        ({"kind": "species"}, "set kind to one of class, multilabel"),
        ({"id_column": "label"}, "one is named twice"),
    ],
)
def test_labeled_config_refuses_what_does_not_fit(options, match):
    with pytest.raises(ConfigError, match=match):
        LabeledConfig(**options)
