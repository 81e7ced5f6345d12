"""A compressed file that stops anywhere before its end is an error that names it, never a short record."""

import bz2
import gzip
import io
import lzma
import sys

import pytest
import zstandard
from Bio import bgzf

from genoembed.errors import SequenceFormatError
from genoembed.sequences import read_sequences
from genoembed.sequences.annotation import iter_features
from genoembed.sequences.tables import iter_rows
from genoembed.sequences.variants import read_variants

RECORDS = b"".join(b">r%d\n%s\n" % (number, b"ACGTTGCAAGGATCC" * (number + 3)) for number in range(9))


def bgzip(text: bytes, block: int = 150) -> bytes:
    raw = io.BytesIO()
    stream = bgzf.BgzfWriter(fileobj=raw)
    for start in range(0, len(text), block):
        stream.write(text[start : start + block])
        stream.flush()
    return raw.getvalue() + bgzf._bgzf_eof


PACKERS = {
    "bgzip": bgzip,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "zstd without size and checksum": zstandard.ZstdCompressor(
        write_content_size=False, write_checksum=False
    ).compress,
}


@pytest.mark.parametrize("kind", PACKERS)
def test_file_cut_anywhere_is_refused(tmp_path, kind):
    content = PACKERS[kind](RECORDS)
    path = tmp_path / "cut"
    path.write_bytes(content)
    assert len(list(read_sequences(path))) == 9
    step = max(1, len(content) // 60)
    for length in {*range(6, len(content), step), *range(len(content) - 40, len(content))}:
        path.write_bytes(content[:length])
        with pytest.raises(SequenceFormatError, match=r"cut: .*copy or download the file again"):
            list(read_sequences(path))


TEXTS = {
    "fasta": (b">a\nACGTACGTAC\n>b\nGGGGCCCCAT\n", read_sequences),
    "fastq": (b"@a\nACGTACGTAC\n+\nIIIIIIIIII\n@b\nGG\n+\nII\n", read_sequences),
    "vcf": (b"##fileformat=VCFv4.2\na\t3\tx\tG\tT\n", None),
    "bed": (b"chr1\t0\t10\nchr1\t20\t30\n", iter_features),
    "gff3": (b"c\tx\tgene\t1\t9\t.\t+\t.\tID=a\n##FASTA\n>c\nACGT\n", iter_features),
    "table": (b"id\tlabel\nx\t1\ny\t12345\n", iter_rows),
}


@pytest.mark.parametrize("is_piped", [False, True], ids=["file", "stdin"])
@pytest.mark.parametrize("name", TEXTS)
def test_bgzip_without_its_end_block_is_refused_by_every_reader(tmp_path, monkeypatch, name, is_piped):
    text, read = TEXTS[name]
    if read is None:
        (tmp_path / "ref.fa").write_bytes(b">a\nACGTACGT\n")

        def read(vcf):
            return read_variants(vcf, tmp_path / "ref.fa", flank=2)

    for content, is_whole in ((bgzip(text, 9), True), (bgzip(text, 9)[:-28], False)):
        path = tmp_path / "f"
        path.write_bytes(content)
        if is_piped:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        where = "-" if is_piped else str(path)
        if is_whole:
            assert list(read(where))
        else:
            with pytest.raises(SequenceFormatError, match="end block is missing; copy or download"):
                list(read(where))


def test_bgzip_reference_without_its_end_block_is_refused(tmp_path):
    path = tmp_path / "ref.fa.gz"
    path.write_bytes(bgzip(RECORDS)[:-28])
    with pytest.raises(SequenceFormatError, match="end block is missing"):
        list(read_sequences(path, regions="r0:1-3"))


def test_members_may_follow_one_another(tmp_path):
    path = tmp_path / "joined"
    for content in (bgzip(RECORDS) + bgzip(b">x\nAC\n"), bgzip(RECORDS) + gzip.compress(b">x\nAC\n")):
        path.write_bytes(content)
        assert len(list(read_sequences(path))) == 10
