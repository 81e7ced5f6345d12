"""read_sequences: formats, compressions, policies, counts, eager checks."""

import bz2
import gzip
import io
import logging
import lzma
import subprocess
import sys
import tracemalloc
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard

from genoembed.contracts import SequenceRecord
from genoembed.errors import (
    AlphabetError,
    ConfigError,
    DuplicateIdError,
    InputFileError,
    SequenceFormatError,
)
from genoembed.sequences import InputCounts, read_sequences
from genoembed.sequences.compression import BLOCK_BYTES

CASES = Path(__file__).parents[1] / "data" / "sequences"
PLAIN = b">a first one\nACGT\nAC\n>b\nGG\n"
PAIRS = [("a", b"ACGTAC"), ("b", b"GG")]


def write(folder, content, name="input.dat"):
    path = folder / name
    path.write_bytes(content)
    return path


def pairs(path, **policies):
    return [(record.id, record.sequence) for record in read_sequences(path, **policies)]


class StandardInput(io.BytesIO):
    """A pipe: no name and no way back."""

    def seekable(self):
        return False

    def seek(self, *_):
        raise io.UnsupportedOperation("seek")


def test_read_sequences_fills_every_field(tmp_path):
    path = write(tmp_path, PLAIN)
    record = next(read_sequences(str(path)))
    assert record == SequenceRecord(
        id="a",
        sequence=b"ACGTAC",
        description="first one",
        contig="a",
        source=str(path),
        line=1,
        start=0,
        end=6,
    )


@pytest.mark.parametrize(
    "text",
    [
        b"\n\n>a x\r\nACGT\r\nAC\r\n>b\r\nGG",
        b">a x\rACGT\rAC\r>b\rGG\r",
        b"\xef\xbb\xbf>a x\nACGTAC\n>b\nGG\n",
        b"  \n\t>a x\n  ACGT \n AC\t\n\n   >b\n\nGG\n\n",
        b"; made by hand\n>a x\nACGT\n;comment > with ACGT\nAC\n  ; another\n>b\nGG\n;end",
        b">a x > y\nAC GT AC\n> b\nGG\n",
        b"@a x\nACGTAC\n+\nIIIIII\n@b\nGG\n+b\n@@\n",
        b"@a x\r\nACGT\r\nAC\r\n+a x\r\n@III\r\n+I\r\n\r\n@b\r\nGG\r\n+\r\nII",
    ],
    ids=["crlf", "cr", "bom", "spaces", "comments", "arrow", "fastq", "wrapped-fastq"],
)
def test_read_sequences_takes_any_layout(tmp_path, text):
    assert pairs(write(tmp_path, text)) == PAIRS


def test_fastq_record_without_bases_follows_the_empty_policy(tmp_path):
    path = write(tmp_path, b"@a\n\n+\n\n@b\nGG\n+\nII\n@c\n+\n@d\nA\n+\nI\n")
    counts = InputCounts()
    assert pairs(path, empty="skip", counts=counts) == [("b", b"GG"), ("d", b"A")]
    assert counts.skipped_empty == 2


COMPRESSORS = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.compress,
    "zstd-without-size": lambda data: zstandard.ZstdCompressor(write_content_size=False).compress(data),
    "zstd-skippable": lambda data: b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc" + zstandard.compress(data),
}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_compression_is_told_by_content_and_read_across_members(tmp_path, name):
    compress = COMPRESSORS[name]
    cuts = (0, 5, 17, 18, len(PLAIN))
    members = [compress(PLAIN[a:b]) for a, b in pairwise(cuts)]
    assert pairs(write(tmp_path, b"".join(members), "looks_plain.fa")) == PAIRS


def test_gzip_padding_between_and_after_members_is_allowed(tmp_path):
    half = gzip.compress(PLAIN[:9], mtime=0), gzip.compress(PLAIN[9:], mtime=0)
    assert pairs(write(tmp_path, half[0] + bytes(20) + half[1] + bytes(100))) == PAIRS


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_standard_input_needs_no_seek(monkeypatch, compress):
    stream = io.TextIOWrapper(StandardInput(compress(PLAIN)))
    monkeypatch.setattr(sys, "stdin", stream)
    records = list(read_sequences("-"))
    assert [(r.id, r.sequence, r.source) for r in records] == [(*pair, "-") for pair in PAIRS]


def test_closed_standard_input_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(
        InputFileError, match=r"^-: standard input is closed, expected sequences; pipe them in"
    ):
        list(read_sequences("-"))


def test_genbank_and_embl_give_version_definition_and_line(tmp_path):
    text = (CASES / "tiny.gb").read_bytes()
    path = write(tmp_path, b"\n" + text + gzip.decompress(gzip.compress(text)).replace(b"TINY1", b"TINY9"))
    first, second = read_sequences(path)
    assert (first.id, first.description, first.sequence, first.line) == (
        "TINY1.1",
        "A made-up record",
        b"ACGTACGTACGTACGTACGT",
        2,
    )
    assert (second.id, second.line) == ("TINY9.1", 12)
    (embl,) = read_sequences(CASES / "tiny.embl")
    assert (embl.id, embl.description, embl.sequence) == ("TINY2.1", "A made-up record.", first.sequence)


def genbank(locus, *, extra="", name=""):
    return f"""LOCUS       {locus}
DEFINITION  Made up.
ACCESSION   {name}
VERSION     {name}
FEATURES             Location/Qualifiers
     source          1..20
                     /organism="synthetic construct"
{extra}ORIGIN
        1 acgtacgtac gtacgtacgt
//
"""


@pytest.mark.parametrize(
    ("locus", "name"),
    [
        ("NODE_1_length_20_cov_12.1 20 bp   DNA     linear   SYN 01-JAN-2024", "NODE_1_length_20_cov_12.1"),
        ("NODE_1_length_20_cov_12.1 20 bp   DNA     linear       01-JAN-2024", "NODE_1_length_20_cov_12.1"),
        ("contig000001 20 bp", "contig000001"),
        ("NODE_1_length_20_cov_12.120 bp   DNA     linear   SYN 01-JAN-2024", "NODE_1_length_20_cov_12.1"),
        ("NODE_1_length_20_cov_2020 bp   DNA     linear       01-JAN-2024", "NODE_1_length_20_cov_20"),
    ],
)
def test_odd_locus_lines_of_annotation_tools_are_read_and_logged(tmp_path, caplog, locus, name):
    path = write(tmp_path, genbank(locus).encode())
    with caplog.at_level(logging.WARNING, logger="genoembed"):
        assert pairs(path) == [(name, b"ACGTACGTACGTACGTACGT")]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{path}:1: record '{name}': ")


def test_joined_locus_name_gives_way_to_the_version(tmp_path):
    path = write(
        tmp_path, genbank("NODE_1_cov_120 bp   DNA     linear   SYN 01-JAN-2024", name="X1.1").encode()
    )
    assert pairs(path) == [("X1.1", b"ACGTACGTACGTACGTACGT")]


def test_each_kind_of_parser_warning_is_logged_once_a_file(tmp_path, caplog):
    feature = "     gene            nowhere\n"
    text = "".join(genbank(f"contig{number} 20 bp", extra=feature * 2) for number in range(3))
    path = write(tmp_path, text.encode())
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="genoembed"):
            assert [name for name, _ in pairs(path)] == ["contig0", "contig1", "contig2"]
        messages = [record.getMessage() for record in caplog.records]
        assert ["Malformed LOCUS" in message for message in messages] == [True, False]
        assert "nowhere" in messages[1]
        assert all("record 'contig0'" in message for message in messages)


def test_warnings_of_others_pass_through_the_parser(tmp_path, monkeypatch):
    def parse(handle, form):
        warnings.warn("of another library", ImportWarning, stacklevel=1)
        return iter(())

    monkeypatch.setattr("Bio.SeqIO.parse", parse)
    path = write(tmp_path, genbank("contig1 20 bp").encode())
    with warnings.catch_warnings():
        warnings.simplefilter("default", ImportWarning)
        with pytest.warns(ImportWarning, match="of another library"):
            assert pairs(path) == []


def test_policies_act_flag_and_count(tmp_path):
    path = write(tmp_path, b">a\nacJ-u*\n>a\nACGT\n>e\n.\n>a_2\nAC\n")
    counts = InputCounts()
    records = list(
        read_sequences(path, invalid="mask", gaps="strip", duplicates="suffix", empty="skip", counts=counts)
    )
    assert [(r.id, r.sequence, r.flags) for r in records] == [
        ("a", b"ACNT", ("masked:1", "gaps:2", "upper_cased:3", "rna")),
        ("a_2", b"ACGT", ("renamed",)),
        ("a_2_2", b"AC", ("renamed",)),
    ]
    assert counts == InputCounts(
        files=1,
        records=3,
        bases=10,
        upper_cased=3,
        rna_to_dna=1,
        masked_bases=1,
        masked_records=1,
        gaps_stripped=2,
        skipped_empty=1,
        renamed=2,
    )


def test_keep_case_keeps_case_and_still_reads_rna(tmp_path):
    counts = InputCounts()
    (record,) = read_sequences(
        write(tmp_path, b">a\nacGuUnRj\n"), keep_case=True, invalid="mask", counts=counts
    )
    assert record.sequence == b"acGtTnRN"
    assert record.flags == ("masked:1", "rna")
    assert (counts.upper_cased, counts.rna_to_dna) == (0, 2)


def test_invalid_skip_leaves_the_record_out_and_says_so(tmp_path, caplog):
    counts = InputCounts()
    path = write(tmp_path, b">a\nMKLV\n>b\nGG\n>a\nAC\n")
    with caplog.at_level(logging.INFO, logger="genoembed.sequences"):
        assert pairs(path, invalid="skip", counts=counts) == [("b", b"GG"), ("a", b"AC")]
    assert counts.skipped_invalid == 1
    assert f"{path}:1: record 'a' skipped" in caplog.text
    assert "1 skipped_invalid" in caplog.text or "skipped invalid" in caplog.text


def test_all_iupac_letters_pass(tmp_path):
    letters = b"ACGTRYSWKMBDHVN"
    (record,) = read_sequences(write(tmp_path, b">a\n" + letters + letters.lower() + b"Uu"))
    assert record.sequence == letters + letters + b"TT"


@pytest.mark.parametrize("width", [7, 60, 10**9])
def test_alphabet_error_knows_line_and_position_far_into_a_record(tmp_path, width):
    bases = bytearray(b"ACGT" * (BLOCK_BYTES // 2))
    position = len(bases) - 12_345
    bases[position - 1] = ord("J")
    lines = [bytes(bases[i : i + width]) for i in range(0, len(bases), width)]
    path = write(tmp_path, b">a\nAC\n>b\n" + b"\n".join(lines))
    with pytest.raises(AlphabetError, match=f"'J' at position {position} is not") as caught:
        list(read_sequences(path))
    assert (caught.value.path, caught.value.record_id) == (str(path), "b")
    assert caught.value.line == 4 + (position - 1) // width


def test_errors_carry_their_place_as_fields():
    with pytest.raises(DuplicateIdError, match="first at line 1") as caught:
        list(read_sequences(CASES / "twice.fa"))
    assert (caught.value.path, caught.value.line, caught.value.record_id) == (
        str(CASES / "twice.fa"),
        5,
        "ctg7",
    )


def test_headers_and_line_ends_may_fall_on_any_block_edge(tmp_path):
    for shift in range(-8, 9):
        filler = b"A" * (BLOCK_BYTES - 3 + shift)
        path = write(tmp_path, b">a\n" + filler + b"\r\n  >b some text\r\nGG\r\n;note\r\n>c\r\nC")
        first, *rest = read_sequences(path)
        assert first.sequence == filler
        assert [(r.id, r.description, r.sequence, r.line) for r in rest] == [
            ("b", "some text", b"GG", 3),
            ("c", "", b"C", 6),
        ]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"invalid": "drop"}, "invalid is 'drop'; set invalid to one of error, skip, mask"),
        ({"flank": -1}, "flank is -1"),
        ({"keep_case": 1}, "keep_case is 1"),
    ],
)
def test_options_are_checked_before_the_first_record(options, problem):
    with pytest.raises(ConfigError, match=problem):
        read_sequences(CASES / "ok.fa", **options)


def test_all_files_are_looked_for_before_the_first_record():
    with pytest.raises(InputFileError, match="file not found") as caught:
        read_sequences([CASES / "ok.fa", "missing.fa"])
    assert caught.value.path == "missing.fa"
    with pytest.raises(InputFileError, match="not a place such as chr1:1001-2000"):
        read_sequences(CASES / "ok.fa", regions="missing.bed")


def test_a_file_that_may_not_be_read_says_so(monkeypatch):
    def refuse(self, *_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputFileError, match=r"ok\.fa: cannot be read \(Permission denied\); check its perm"):
        read_sequences(CASES / "ok.fa")


def test_a_disk_that_fails_while_reading_says_so(monkeypatch):
    class Broken(io.BytesIO):
        def read(self, *_):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Broken()))
    with pytest.raises(InputFileError, match=r"-: cannot be read \(Input/output error\)"):
        list(read_sequences("-"))


@pytest.mark.parametrize("name", [n for n in COMPRESSORS if n != "zstd-skippable"])
def test_a_compressed_stream_cut_anywhere_is_an_error(tmp_path, name):
    data = COMPRESSORS[name](PLAIN * 20)
    for cut in range(7, len(data)):
        with pytest.raises(SequenceFormatError, match=r"stops before its end|damaged"):
            list(read_sequences(write(tmp_path, data[:cut]), duplicates="suffix"))


def test_reading_holds_one_record_at_a_time(tmp_path):
    path = tmp_path / "many.fa.gz"
    line = b"acgtNACGTA" * 6
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for number in range(30):
            stream.write(b">r%d\n" % number + (line + b"\n") * 50_000)
    tracemalloc.start()
    try:
        total = sum(len(record.sequence) for record in read_sequences(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 30 * 3_000_000
    # A record raw, clean, joined, and the one before it: four times 3 Mb; and a few blocks of text.
    assert peak < 30e6


def test_reading_never_imports_torch():
    code = "import sys, genoembed.sequences; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
