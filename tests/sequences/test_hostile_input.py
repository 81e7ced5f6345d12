"""What no honest program writes (bombs, endless lines, odd ids): records or one clear error."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tracemalloc

import pytest
import zstandard

from genoembed.errors import (
    ConfigError,
    DuplicateIdError,
    GenoembedError,
    InputFileError,
    RegionError,
    SequenceFormatError,
)
from genoembed.sequences import InputCounts, compression, read_sequences
from genoembed.sequences import compression as limits
from genoembed.sequences import formats as fasta
from genoembed.sequences.annotation import iter_features
from genoembed.sequences.tables import iter_rows

MIB = 1 << 20
COMPRESS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstandard.compress}


def write(folder, content, name="input"):
    path = folder / name
    path.write_bytes(content)
    return path


def pairs(path, **policies):
    return [(record.id, record.sequence) for record in read_sequences(path, **policies)]


# --- size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPRESS)
def test_decompression_bomb_ends_in_an_error_before_memory_does(tmp_path, monkeypatch, name):
    monkeypatch.setenv(limits.VARIABLE, str(2 * MIB))
    bomb = write(tmp_path, COMPRESS[name](b">a\n" + b"A" * (64 * MIB)))
    assert bomb.stat().st_size < MIB
    tracemalloc.start()
    try:
        with pytest.raises(
            SequenceFormatError, match=r"input:1: record 'a': one record or line of over 2097152"
        ):
            pairs(bomb)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * MIB


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b">a\n" + b"ACGT\n" * 400, "input:1: record 'a': "),
        (b">a\n;" + b"x" * 400 + b"\n" + b" " * 2000 + b"ACGT\n", "input:1: record 'a': "),
        (b"@a\n" + b"ACGT\n" * 400 + b"+\n", "input:1: record 'a': "),
        (b"@a\n" + b"A" * 2000 + b"\n", "input: "),
        (b"LOCUS       A 20 bp DNA linear BCT\nDEFINITION  " + b"x\n            " * 200, "input:1: "),
        (
            b"ID   A; SV 1; linear; genomic DNA; STD; PRO; 20 BP.\n" + b"DE   xxxxxxxxxxxxxx\n" * 80,
            "input:1: ",
        ),
    ],
    ids=["fasta", "fasta-line", "fastq", "fastq-line", "genbank", "embl"],
)
def test_record_over_the_limit_is_refused_in_every_format(tmp_path, monkeypatch, content, place):
    path = write(tmp_path, content)
    monkeypatch.setenv(limits.VARIABLE, "1000")
    monkeypatch.setattr(compression, "BLOCK_BYTES", 64)
    monkeypatch.setattr(fasta, "_MAX_HEADER_BYTES", 200)
    with pytest.raises(
        SequenceFormatError, match=rf"{place}one record or line of over 1000 bytes, decompressed"
    ):
        pairs(path)


def test_limit_is_for_one_record_not_for_the_file(tmp_path, monkeypatch):
    path = write(tmp_path, b"".join(b">r%d\n%s\n" % (number, b"ACGT" * 200) for number in range(50)))
    monkeypatch.setenv(limits.VARIABLE, "1000")
    monkeypatch.setattr(compression, "BLOCK_BYTES", 128)
    assert len(pairs(path)) == 50


@pytest.mark.parametrize("text", ["0", "-1", "4 GB", "1e9", "٣", "9" * 19])
def test_limit_that_is_no_number_is_named(tmp_path, monkeypatch, text):
    monkeypatch.setenv(limits.VARIABLE, text)
    with pytest.raises(
        ConfigError, match=r"environment variable GENOEMBED_MAX_RECORD_BYTES is '.*'; set it to"
    ):
        pairs(write(tmp_path, b">a\nAC\n"))


def test_limit_holds_for_rows_and_regions_too(tmp_path, monkeypatch):
    monkeypatch.setenv(limits.VARIABLE, "1000")
    monkeypatch.setattr(compression, "BLOCK_BYTES", 128)
    table = write(tmp_path, b"sequence,label\n" + b"A" * 3000 + b",1\n")
    with pytest.raises(SequenceFormatError, match="one record or line of over 1000 bytes"):
        list(iter_rows(str(table)))
    quoted = write(tmp_path, b'sequence,label\n"' + b"ACGT\n" * 300 + b'",1\n')
    with pytest.raises(SequenceFormatError, match=r"input:2: one record or line of over 1000 bytes"):
        list(iter_rows(str(quoted)))
    rows = write(tmp_path, b"chr1\t0\t5\t" + b"x" * 3000)
    with pytest.raises(SequenceFormatError, match="one record or line of over 1000 bytes"):
        list(iter_features(str(rows)))


def test_long_single_line_is_read_exactly_in_twice_its_memory(tmp_path):
    line = b"ACGTN" * (10 * MIB)
    path = write(tmp_path, b">a\n" + line + b"\n")
    tracemalloc.start()
    try:
        ((record_id, sequence),) = pairs(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (record_id, sequence == line) == ("a", True)
    assert peak < 2.2 * len(line)


# --- lines ----------------------------------------------------------------------------------------


def test_comment_longer_than_any_header_adds_no_bases(tmp_path):
    comment = b";" + b"A" * (3 * MIB)
    path = write(tmp_path, b">a\nACGT\n" + comment + b"\nGG\n" + b"  " + comment + b"\n>b\nCC\n" + comment)
    assert pairs(path) == [("a", b"ACGTGG"), ("b", b"CC")]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 17, 64])
@pytest.mark.parametrize("length", [61, 62, 63, 64, 65, 66, 130])
def test_header_at_the_limit_is_whole_or_refused_wherever_blocks_end(monkeypatch, block, length):
    monkeypatch.setattr(fasta, "_MAX_HEADER_BYTES", 64)
    text = b">a\nAC\n>" + b"C" * length + b"\nGG\n"
    blocks = [text[start : start + block] for start in range(0, len(text), block)]
    if length <= 64:
        found = [
            (record.id, b"".join(raw for raw, _ in record.body).strip())
            for record in fasta.iter_fasta("f", blocks)
        ]
        assert found == [("a", b"AC"), ("C" * length, b"GG")]
    else:
        with pytest.raises(SequenceFormatError, match=r"^f:3: a header line of over 64 bytes"):
            [list(record.body) for record in fasta.iter_fasta("f", blocks)]


# --- ids ------------------------------------------------------------------------------------------


def test_odd_ids_stay_as_they_are(tmp_path):
    ids = [
        "a/b",
        "/",
        "..",
        "../../etc/passwd",
        "sp|P1|é",
        "日本語",
        "%2F",
        "\U0001f9ec",
        "x" * 100_000,
        "C:\\x",
    ]
    path = write(tmp_path, "".join(f">{name} with spaces\nACGT\n" for name in ids).encode())
    records = list(read_sequences(path))
    assert [record.id for record in records] == ids
    assert {record.description for record in records} == {"with spaces"}


def test_duplicate_ids_by_the_thousand_are_numbered_in_one_pass(tmp_path):
    path = write(tmp_path, b">same\nAC\n" * 30_000 + b">same_2\nGG\n" * 2)
    with pytest.raises(DuplicateIdError, match=r"input:3: record 'same': appears again \(first at line 1\)"):
        pairs(path)
    counts = InputCounts()
    ids = [record.id for record in read_sequences(path, duplicates="suffix", counts=counts)]
    assert len(set(ids)) == len(ids) == 30_002
    assert (ids[1], ids[29_999], ids[-1]) == ("same_2", "same_30000", "same_2_3")
    assert counts.renamed == 30_001


@pytest.mark.parametrize("row", [b"chr1\t0\t5\tna\0me\n", b"ch\x1br1\t0\t5\n"])
def test_control_characters_in_bed_are_damage(tmp_path, row):
    with pytest.raises(RegionError, match=r"rows:1: control character 0x(00|1b) in a name"):
        list(iter_features(str(write(tmp_path, row, "rows"))))


def test_control_characters_that_gff3_spells_with_percent_are_damage(tmp_path):
    row = b"chr1\t.\tgene\t1\t5\t.\t+\t.\tID=a%00b\n"
    with pytest.raises(RegionError, match="rows:1: control character 0x00 in a name"):
        list(iter_features(str(write(tmp_path, row, "rows"))))


def test_control_byte_in_a_genbank_id_is_damage(tmp_path):
    text = b"LOCUS       A\x01B 4 bp DNA linear BCT 01-JAN-2000\nORIGIN\n        1 acgt\n//\n"
    with pytest.raises(
        SequenceFormatError, match=r"input:1: (control byte 0x01 in the id|Biopython cannot read)"
    ):
        pairs(write(tmp_path, text))


# --- names of files -------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [read_sequences, lambda text: list(iter_rows(text))])
def test_sequence_given_for_a_file_name_is_one_line(call):
    with pytest.raises(InputFileError, match=r"^(ACGT){50}: cannot be read \(File name too long\)"):
        call("ACGT" * 200)


def test_sequence_given_for_a_region_is_one_line(tmp_path):
    path = write(tmp_path, b">chr1\nACGT\n", "a.fa")
    with pytest.raises(InputFileError, match="file not found, and not a place such as"):
        list(read_sequences(path, regions="ACGT" * 200))


# --- everything at once ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 5000,
        bytes(range(256)) * 20,
        b"\x1f\x8b" + bytes(40),
        b"BZh9" + bytes(99),
        b"\n>" * 500,
        b"@\n+\n" * 9,
    ],
)
def test_noise_is_refused_in_one_line(tmp_path, content):
    with pytest.raises(GenoembedError, match=r"^[^\n]*input[^\n]+$"):
        pairs(write(tmp_path, content), invalid="mask", gaps="strip", empty="skip", duplicates="suffix")
