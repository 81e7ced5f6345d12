"""One file, one reader: a stretch of a contig has the letters that reading the whole file gives it."""

import hashlib
from pathlib import Path

import pytest
from Bio import bgzf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genoembed.errors import GenoembedError, InputFileError
from genoembed.sequences import compression, read_sequences
from genoembed.sequences import formats as fasta
from genoembed.sequences.compression import InputDigests
from genoembed.sequences.contigs import FastaContigs

FIELD = Path(__file__).parents[1] / "field" / "space_in_line.fa"

_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
_BLANKS = st.sampled_from([b"", b"", b" ", b"\t", b"  ", b"\v", b"\f "])
_LETTERS = st.text("acgtnACGTN", min_size=0, max_size=12).map(str.encode)
_ODD_LINES = st.sampled_from([b"", b" ", b"; a comment", b"  ;>no header", b"\t", b";"])


@st.composite
def ugly_fasta(draw):
    """Lines of any length and end, blanks anywhere, comments, empty lines, indented headers."""
    end = draw(_ENDS)
    lines = [draw(_ODD_LINES) for _ in range(draw(st.integers(0, 2)))]
    for number in range(draw(st.integers(1, 3))):
        lines.append(draw(st.sampled_from([b"", b" ", b"\t "])) + b">c%d text > more ; x " % number)
        for _ in range(draw(st.integers(0, 6))):
            if draw(st.integers(0, 4)) == 0:
                lines.append(draw(_ODD_LINES))
            lines.append(draw(_BLANKS) + draw(_LETTERS) + draw(_BLANKS) + draw(_LETTERS) + draw(_BLANKS))
    mixed = draw(st.booleans())
    text = b"".join(line + (draw(_ENDS) if mixed else end) for line in lines)
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + (text if draw(st.booleans()) else text.rstrip())


def put(folder, text, *, packed):
    path = folder / ("ugly.gz" if packed else "ugly.fa")
    if packed:
        with bgzf.BgzfWriter(path) as stream:
            for start in range(0, len(text), 7):  # many blocks, cut anywhere
                stream.write(text[start : start + 7])
                stream.flush()
    else:
        path.write_bytes(text)
    return path


def whole(path):
    """Contigs as the reader of whole files has them, by name."""
    try:
        return {record.id: record.sequence for record in read_sequences(path, keep_case=True, empty="skip")}
    except GenoembedError:
        return None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ugly_fasta(), packed=st.booleans(), block=st.sampled_from([3, 17, 1 << 20]), data=st.data())
def test_any_stretch_is_a_slice_of_the_whole(tmp_path, text, packed, block, data):
    path = put(tmp_path, text, packed=packed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "BLOCK_BYTES", block)
        patch.setattr(fasta, "_MAX_HEADER_BYTES", 64)
        contigs = whole(path)
        if contigs is None:
            return
        with FastaContigs(str(path)) as found:
            assert {name for name in found.names if found.length(name)} == set(contigs)
            for name, sequence in contigs.items():
                assert found.length(name) == len(sequence)
                start = data.draw(st.integers(0, len(sequence)))
                end = data.draw(st.integers(start, len(sequence)))
                assert found.fetch(name, start, end) == sequence[start:end]
    for name, sequence in contigs.items():
        start = data.draw(st.integers(0, len(sequence) - 1))
        end = data.draw(st.integers(start + 1, len(sequence)))
        (record,) = read_sequences(path, regions=f"{name}:{start + 1}-{end}", keep_case=True)
        assert record.sequence == sequence[start:end]


def test_blank_in_a_line_shifts_no_region():
    """A FASTA copied from a web page: one blank within the line."""
    (record,) = read_sequences(FIELD)
    (region,) = read_sequences(FIELD, regions="construct:201-260")
    assert region.sequence == record.sequence[200:260]


def test_pieces_longer_than_a_block_are_found(tmp_path):
    sequence = (b"ACGTTGCAAC" * 300_001)[:3_000_003]
    path = tmp_path / "long.fa"
    path.write_bytes(b">a\n" + sequence + b"\n;" + b"x" * 3_000_000 + b"\nGATTACA\n>b\nCC\n")
    with FastaContigs(str(path)) as found:
        assert found.fetch("a", 2_999_998, 3_000_009) == (sequence + b"GATTACA")[2_999_998:3_000_009]
        assert found.fetch("b", 0, 2) == b"CC"


def test_an_index_of_another_file_is_not_believed(tmp_path):
    path = tmp_path / "a.fa"
    path.write_bytes(b">a\nACGTACGT\nGATTACA\n")
    Path(f"{path}.fai").write_text("a\t15\t0\t3\t4\n")
    (record,) = read_sequences(path, regions="a:1-3")
    assert record.sequence == b"ACG"
    assert {found.name for found in tmp_path.iterdir()} == {"a.fa", "a.fa.fai"}


def test_a_file_that_changes_meanwhile_is_an_error(tmp_path):
    path = tmp_path / "a.fa"
    path.write_bytes(b">a\nACGTACGT\n")
    with FastaContigs(str(path)) as found:
        path.write_bytes(b">a\nTTTTTTTTT\n")
        with pytest.raises(InputFileError, match="has changed while it was read"):
            found.fetch("a", 0, 3)


def test_digests_are_of_the_bytes_that_were_read(tmp_path):
    path, rows = put(tmp_path, b">a\nACGTACGT\n", packed=True), tmp_path / "r.gff3"
    rows.write_text("a\tx\texon\t1\t4\t.\t+\t.\t.\n##FASTA\n>more\n")
    before = {name: hashlib.sha256(name.read_bytes()).hexdigest() for name in (path, rows)}
    digests = InputDigests()
    records = read_sequences(path, regions=rows, digests=digests)
    assert next(records).sequence == b"ACGT"
    list(records)
    rows.write_text("other")
    for name in (path, rows):
        assert digests.facts(str(name))["sha256"] == before[name]
