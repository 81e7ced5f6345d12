"""Regions of an indexed FASTA: coordinates, strands, flanks, policies, index files."""

import gzip
from pathlib import Path

import pytest
from Bio import bgzf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genoembed.errors import AlphabetError, DuplicateIdError
from genoembed.sequences import InputCounts, read_sequences, reverse_complement

CHR1 = b"ACGTTGCAACGGATCCTTAGACCA" * 100
CHR2 = b"GATTACA" * 10


def wrapped(sequence, width=60, end=b"\n"):
    return b"".join(sequence[i : i + width] + end for i in range(0, len(sequence), width))


def build_reference(folder, width=60, end=b"\n"):
    path = folder / "ref.fa"
    path.write_bytes(
        b">chr1 first" + end + wrapped(CHR1, width, end) + b">chr2" + end + wrapped(CHR2, width, end)
    )
    return path


@pytest.fixture
def reference(tmp_path):
    return build_reference(tmp_path)


def write_rows(folder, text, name="rows.bed"):
    path = folder / name
    path.write_text(text)
    return path


def test_bed_gff_and_place_give_the_same_record(tmp_path, reference):
    bed = write_rows(tmp_path, "track name=x\nbrowser hide all\n# note\n\nchr1\t1000\t2000\n")
    gff = write_rows(
        tmp_path, "##gff-version 3\nchr1\tx\texon\t1001\t2000\t.\t+\t.\t.\n##FASTA\n>chr1\n", "r.gff3"
    )
    sources = [bed, gff, "chr1:1001-2000", "chr1:1,001-2,000(+)"]
    records = [next(read_sequences(reference, regions=source, flank=7)) for source in sources]
    assert [r.line for r in records] == [5, 2, None, None]
    for record in records:
        assert record.id == "chr1:1001-2000(+)"
        assert record.sequence == CHR1[993:2007]
        assert (record.start, record.end, record.strand) == (1000, 2000, "+")
        assert (record.core_start, record.core_end) == (7, 1007)
        assert record.source == str(reference)


def test_names_and_strands_come_from_the_rows(tmp_path, reference):
    bed = write_rows(tmp_path, "chr1 10 20 geneA 0 -\nchr1 10 20 . 0 .\n")
    gff = write_rows(
        tmp_path,
        "chr1\tx\tgene\t11\t20\t.\t-\t.\tName=n;ID=gene%3B1;note=y\nchr1\tx\tgene\t11\t20\t.\t?\t.\tName=n\n",
        "rows.gff",
    )
    records = list(read_sequences(reference, regions=[bed, gff]))
    assert [(r.id, r.strand, r.description) for r in records] == [
        ("geneA", "-", "chr1:11-20(-)"),
        ("chr1:11-20(+)", "+", ""),
        ("gene;1", "-", "chr1:11-20(-) gene"),
        ("n", "+", "chr1:11-20(+) gene"),
    ]
    assert records[0].sequence == reverse_complement(records[1].sequence)


def test_region_files_may_be_compressed_and_crlf(tmp_path, reference):
    path = tmp_path / "rows.txt"
    path.write_bytes(gzip.compress(b"chr2\t0\t7\tx\r\nchr2\t7\t14\ty\r\n"))
    assert [r.sequence for r in read_sequences(reference, regions=path)] == [b"GATTACA"] * 2


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bounds=st.tuples(st.integers(0, len(CHR1)), st.integers(0, len(CHR1))).filter(lambda b: b[0] != b[1]),
    flank=st.integers(0, 300),
    strand=st.sampled_from("+-"),
    kind=st.sampled_from(["plain", "crlf", "one-line", "bgzip"]),
)
def test_regions_are_slices_of_the_contig(tmp_path_factory, bounds, flank, strand, kind):
    folder = tmp_path_factory.getbasetemp() / f"reference-{kind}"
    path = folder / ("ref.fa.gz" if kind == "bgzip" else "ref.fa")
    if not folder.exists():
        folder.mkdir()
        build_reference(folder, 10**6 if kind == "one-line" else 60, b"\r\n" if kind == "crlf" else b"\n")
        if kind == "bgzip":
            with bgzf.BgzfWriter(str(path)) as stream:
                stream.write((folder / "ref.fa").read_bytes())
    start, end = sorted(bounds)
    bed = folder / "one.bed"
    bed.write_text(f"chr1\t{start}\t{end}\tx\t0\t{strand}\n")
    (by_bed,) = read_sequences(path, regions=bed, flank=flank)
    (by_place,) = read_sequences(path, regions=f"chr1:{start + 1}-{end}({strand})", flank=flank)
    shown = CHR1[max(0, start - flank) : end + flank]
    core = CHR1[start:end]
    turn = reverse_complement if strand == "-" else bytes
    assert by_bed.sequence == by_place.sequence == turn(shown)
    assert by_bed.sequence[by_bed.core_start : by_bed.core_end] == turn(core)
    assert (by_bed.start, by_bed.end) == (by_place.start, by_place.end) == (start, end)


def test_regions_at_the_edges_of_bgzip_blocks_are_right(tmp_path):
    """pyfaidx 0.9.2 cannot fetch a base that opens a block; here a contig does, and a line in it too."""
    contig = CHR1 * 60
    path = tmp_path / "blocks.fa.gz"
    with bgzf.BgzfWriter(str(path)) as stream:
        stream.write(b">first\n".ljust(65536 - 7, b"A") + b"\n>chr1\n" + contig + b"\n")
    starts = [0, 1, *range(65536 - 3, 65536 + 3), *range(131072 - 3, 131072 + 3)]
    spans = [(start, start + width) for start in starts for width in (1, 2, 7000)]
    places = [f"chr1:{start + 1}-{end}" for start, end in spans]
    records = list(read_sequences(path, regions=places))
    assert [record.sequence for record in records] == [contig[start:end] for start, end in spans]


def test_policies_hold_inside_regions_and_the_core_stays_the_core(tmp_path):
    path = tmp_path / "dirty.fa"
    path.write_bytes(b">c\nAA--CCjcGU-G-TTT\n")
    options = {"invalid": "mask", "gaps": "strip"}
    counts = InputCounts()
    forward, backward = read_sequences(
        path, regions=["c:5-12", "c:5-12(-)"], flank=4, counts=counts, **options
    )
    assert (forward.sequence, forward.core_start, forward.core_end) == (b"AACCNCGTGTTT", 2, 9)
    assert backward.sequence == reverse_complement(forward.sequence)
    assert (backward.core_start, backward.core_end) == (3, 10)
    assert forward.flags == ("masked:1", "gaps:4", "upper_cased:2", "rna")
    assert (counts.records, counts.gaps_stripped, counts.bases) == (2, 8, 24)


def test_region_of_gaps_only_is_empty_whatever_its_flanks_hold(tmp_path):
    path = tmp_path / "gaps.fa"
    path.write_bytes(b">c\nAC--GT\n")
    counts = InputCounts()
    assert (
        list(read_sequences(path, regions="c:3-4", flank=2, gaps="strip", empty="skip", counts=counts)) == []
    )
    assert counts.skipped_empty == 1


def test_alphabet_error_in_a_region_names_the_row_and_the_contig_position(tmp_path):
    path = tmp_path / "bad.fa"
    path.write_bytes(b">c\nACGTACGTAC\nACJT\n")
    bed = write_rows(tmp_path, "c\t0\t4\nc\t11\t14\tgeneA\t0\t-\n")
    with pytest.raises(AlphabetError, match=r"'J' at position 13 of 'c'") as caught:
        list(read_sequences(path, regions=bed, flank=3))
    assert (caught.value.path, caught.value.line, caught.value.record_id) == (str(bed), 2, "geneA")


def test_duplicate_names_of_regions_follow_the_policy(tmp_path, reference):
    bed = write_rows(tmp_path, "chr1\t0\t5\tx\nchr1\t5\t9\tx\n")
    assert [r.id for r in read_sequences(reference, regions=bed, duplicates="suffix")] == ["x", "x_2"]
    with pytest.raises(DuplicateIdError, match=r"rows\.bed:2: record 'x': appears again \(first at line 1\)"):
        list(read_sequences(reference, regions=bed))
    with pytest.raises(DuplicateIdError, match=r"appears again \(first at chr1:1-5\)"):
        list(read_sequences(reference, regions=["chr1:1-5", "chr1:1-5"]))


def test_contig_names_may_hold_colons_and_a_file_wins_over_a_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hla.fa").write_bytes(b">HLA:A:01\nACGTACGT\n")
    (record,) = read_sequences("hla.fa", regions="HLA:A:01:3-4")
    assert record.sequence == b"GT"
    Path("HLA:A:01:3-4").write_text("HLA:A:01\t0\t1\n")
    (record,) = read_sequences("hla.fa", regions="HLA:A:01:3-4")
    assert record.sequence == b"A"
