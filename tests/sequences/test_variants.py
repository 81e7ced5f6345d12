"""VCF rows against a reference: coordinates, normalization, refusals, counts, formats."""

import gzip

import pytest
from Bio import bgzf
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from genoembed.errors import ConfigError, InputFileError, SequenceFormatError, VariantError
from genoembed.sequences.variants import Change, VariantCounts, anchor, left_align, read_variants, trim_change

CHR1 = "GATTACACACAGGGTTTACGTACGTNNACGATTTTTTTTCC"
HEADER = "##fileformat=VCFv4.3\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "ref.fa"
    path.write_text(f">chr1 first\n{CHR1[:20].lower()}\n{CHR1[20:40]}\n{CHR1[40:]}\n>chr2\nRACGT\n")
    return path


def read(folder, reference, rows, *, header=HEADER, **options):
    path = folder / "calls.vcf"
    path.write_text(header + "".join("\t".join(map(str, row)) + "\t.\t.\t.\n" for row in rows))
    return list(read_variants(path, reference, **options))


def slow_left_most(contig, alternative):
    """Every way to write a change of haplotype, by trying them all: the shortest, then the first."""
    ways = [
        (end - start + alt_end - start, start, contig[start:end], alternative[start:alt_end])
        for start in range(len(contig) + 1)
        for end in range(start, len(contig) + 1)
        if (alt_end := len(alternative) - (len(contig) - end)) >= start
        and contig[:start] == alternative[:start]
        and contig[end:] == alternative[alt_end:]
    ]
    _, start, ref, alt = min(ways)
    return Change(start, ref, alt)


@st.composite
def changes(draw):
    """A contig poor in letters, so that repeats abound, and a change of it that need not be short."""
    contig = draw(st.text("AC", min_size=1, max_size=14)).encode()
    start = draw(st.integers(0, len(contig)))
    end = draw(st.integers(start, len(contig)))
    alt = draw(st.text("AC", max_size=5)).encode()
    assume(contig[start:end] != alt)
    return contig, Change(start, contig[start:end], alt)


@settings(deadline=None, max_examples=150)
@given(changes())
def test_left_align_is_what_trying_every_spelling_finds(case):
    contig, change = case
    haplotype = contig[: change.start] + change.alt + contig[change.end :]
    found = left_align(change, lambda start, end: contig[start:end])
    assert found == slow_left_most(contig, haplotype)
    assert contig[: found.start] + found.alt + contig[found.end :] == haplotype
    trimmed = trim_change(change)
    assert contig[: trimmed.start] + trimmed.alt + contig[trimmed.end :] == haplotype


@settings(deadline=None, max_examples=60)
@given(changes())
def test_anchored_change_keeps_the_haplotype_and_has_no_empty_allele(case):
    contig, change = case

    def fetch(start, end):
        return contig[start:end]

    found = anchor(left_align(change, fetch), fetch)
    haplotype = contig[: change.start] + change.alt + contig[change.end :]
    assert contig[: found.start] + found.alt + contig[found.end :] == haplotype
    if haplotype:  # VCF has no word for a contig that is gone
        assert found.ref
        assert found.alt
        assert left_align(found, fetch) == left_align(change, fetch)


def test_left_align_goes_back_over_more_than_one_block():
    contig = b"G" + b"CA" * 700 + b"T"
    found = left_align(Change(1399, b"CA", b""), lambda start, end: contig[start:end])
    assert found == Change(1, b"CA", b"")


def test_snv_shows_both_alleles_in_one_stretch(tmp_path, reference):
    (found,) = read(tmp_path, reference, [("chr1", 5, "rs1", "a", "g")], flank=3)
    assert (found.variant.ref, found.variant.alt, found.variant.id, found.variant.line) == (
        "A",
        "G",
        "rs1",
        3,
    )
    assert (found.start, found.end) == (1, 8)
    assert (found.ref_sequence, found.alt_sequence) == (b"ATTACAC", b"ATTGCAC")
    assert found.normalized == found.variant


def test_stretch_ends_with_the_contig(tmp_path, reference):
    first, last = read(
        tmp_path, reference, [("chr1", 1, ".", "G", "T"), ("chr1", 41, ".", "C", "CA")], flank=5
    )
    assert (first.start, first.end, first.alt_sequence) == (0, 6, b"TATTAC")
    assert (last.start, last.end, last.ref_sequence, last.alt_sequence) == (36, 41, b"TTTCC", b"TTTCCA")


@pytest.mark.parametrize("row", [("chr1", 8, ".", "CAC", "C"), ("chr1", 6, ".", "CACACAG", "CACAG")])
def test_spellings_of_a_deletion_give_one_stretch(tmp_path, reference, row):
    counts = VariantCounts()
    (found,) = read(tmp_path, reference, [row], flank=4, counts=counts)
    assert (found.normalized.position, found.normalized.ref, found.normalized.alt) == (4, "TAC", "T")
    assert (found.start, found.ref_sequence, found.alt_sequence) == (0, b"GATTACACAC", b"GATTACAC")
    assert (counts.rows, counts.alleles, counts.normalized) == (1, 1, 1)


def test_insertion_before_the_first_base_is_anchored_behind_it(tmp_path, reference):
    (found,) = read(tmp_path, reference, [("chr1", 1, ".", "G", "TTG")], flank=2)
    assert (found.normalized.position, found.normalized.ref, found.normalized.alt) == (1, "G", "TTG")
    assert (found.ref_sequence, found.alt_sequence) == (b"GA", b"TTGA")


def test_alleles_of_a_row_come_one_by_one_and_what_has_no_sequence_is_counted(tmp_path, reference):
    counts = VariantCounts()
    rows = [
        ("chr1", 5, ".", "A", "G,*,<DEL>,AT"),
        ("chr1", 6, ".", "C", "C[chr2:3["),
        ("chr1", 6, ".", "C", ".A"),
        ("chr1", 7, ".", "A", "."),
        ("chr1", 7, ".", "A", "A"),
    ]
    found = read(tmp_path, reference, rows, counts=counts)
    assert [(each.variant.alt, each.variant.line) for each in found] == [("G", 3), ("AT", 3)]
    assert (counts.rows, counts.alleles, counts.spanning, counts.symbolic) == (5, 2, 1, 1)
    assert (counts.breakends, counts.absent, counts.skipped) == (2, 2, 6)


@pytest.mark.parametrize("alt", ["*", "<DEL>", "A]chr2:3]", "."])
def test_allele_without_a_sequence_is_an_error_where_that_is_asked_for(tmp_path, reference, alt):
    with pytest.raises(VariantError, match=r"calls\.vcf:3: ALT .* has no sequence.*unsupported='skip'"):
        read(tmp_path, reference, [("chr1", 5, ".", "A", alt)], unsupported="error")


def test_wrong_ref_is_refused_by_line_with_what_the_reference_has(tmp_path, reference):
    rows = [("chr1", 5, ".", "A", "G"), ("chr1", 6, "rs2", "GG", "G")]
    with pytest.raises(
        VariantError, match=r"REF is 'GG', but .*ref\.fa has 'CA' at chr1:6-7; give the"
    ) as caught:
        read(tmp_path, reference, rows)
    assert (caught.value.path, caught.value.line, caught.value.record_id) == (
        str(tmp_path / "calls.vcf"),
        4,
        "rs2",
    )


def test_position_counted_from_0_is_recognized(tmp_path, reference):
    with pytest.raises(VariantError, match="it fits one base further on: count POS from 1"):
        read(tmp_path, reference, [("chr1", 12, ".", "GGTTT", "G")])


def test_code_of_the_reference_may_stand_as_its_first_base(tmp_path, reference):
    (found,) = read(tmp_path, reference, [("chr2", 1, ".", "A", "T")], flank=1)
    assert (found.ref_sequence, found.alt_sequence) == (b"RA", b"TA")
    with pytest.raises(VariantError, match="has 'R' at chr2:1-1"):
        read(tmp_path, reference, [("chr2", 1, ".", "G", "T")])


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (("1", 5, ".", "A", "G"), r"contig '1' is not in .*\(chr1, chr2\); did you mean 'chr1'"),
        (("chr9", 5, ".", "A", "G"), r"contig 'chr9' is not in .*did you mean 'chr"),
        (("chr1", 42, ".", "A", "G"), "REF ends at base 42, but contig 'chr1' of .* has 41 bases"),
        (("chr1", 0, ".", "A", "G"), "POS is '0', expected a whole number from 1 on"),
        (("chr1", "x", ".", "A", "G"), "POS is 'x'"),
        (("chr1", 5, ".", "", "G"), "REF is '', expected letters"),
        (("chr1", 5, ".", "A", ""), "ALT is '', expected letters"),
        (("chr1", 5, ".", "A", "Q"), "ALT is 'Q', expected letters"),
    ],
)
def test_row_that_does_not_fit_is_refused(tmp_path, reference, row, complaint):
    with pytest.raises(VariantError, match=r"calls\.vcf:3: " + complaint):
        read(tmp_path, reference, [row])


def test_short_row_and_spaces_are_refused(tmp_path, reference):
    path = tmp_path / "calls.vcf"
    path.write_text("chr1 5 . A G\n")
    with pytest.raises(VariantError, match=r"calls\.vcf:1: the row has 1 column.*with tabs"):
        list(read_variants(path, reference))


def test_header_is_not_needed_but_must_be_one_of_vcf(tmp_path, reference):
    rows = [("chr1", 5, ".", "A", "G")]
    assert len(read(tmp_path, reference, rows, header="")) == 1
    with pytest.raises(VariantError, match=r"calls\.vcf:1: the header has columns #chrom start"):
        read(tmp_path, reference, rows, header="#chrom\tstart\tend\tname\tscore\n")


def test_header_alone_gives_nothing_and_an_empty_file_is_refused(tmp_path, reference):
    assert read(tmp_path, reference, []) == []
    with pytest.raises(SequenceFormatError, match="the file is empty, expected a VCF"):
        read(tmp_path, reference, [], header="")


@pytest.mark.parametrize("kind", ["gz", "bgzip", "crlf", "bom"])
def test_compressed_and_dos_files_are_the_same(tmp_path, reference, kind):
    text = (HEADER + "chr1\t5\trs1\tA\tG\t.\t.\t.\r\n").encode()
    path = tmp_path / "calls.txt"
    if kind == "bgzip":
        with bgzf.BgzfWriter(str(path)) as stream:
            stream.write(text)
    else:
        path.write_bytes(
            {"gz": gzip.compress(text), "crlf": text.replace(b"\n", b"\r\n"), "bom": b"\xef\xbb\xbf" + text}[
                kind
            ]
        )
    (found,) = read_variants(path, reference)
    assert (found.variant.alt, found.variant.id) == ("G", "rs1")


def test_bcf_is_told_from_vcf(tmp_path, reference):
    path = tmp_path / "calls.bcf"
    path.write_bytes(gzip.compress(b"BCF\x02\x02" + bytes(20)))
    with pytest.raises(SequenceFormatError, match="BCF, expected VCF; convert it with: bcftools view"):
        list(read_variants(path, reference))


def test_bytes_that_are_no_text_are_refused(tmp_path, reference):
    path = tmp_path / "calls.vcf"
    path.write_bytes(b"chr1\t5\t\xff\tA\tG\n")
    with pytest.raises(VariantError, match="byte 0xff, expected UTF-8"):
        list(read_variants(path, reference))


def test_bgzip_reference_is_read_and_plain_gzip_refused(tmp_path, reference):
    rows = [("chr1", 8, ".", "CAC", "C")]
    plain = read(tmp_path, reference, rows, flank=4)
    packed = tmp_path / "packed.fa.gz"
    with bgzf.BgzfWriter(str(packed)) as stream:
        stream.write(reference.read_bytes())
    assert read(tmp_path, packed, rows, flank=4) == plain
    gzipped = tmp_path / "gzipped.fa.gz"
    gzipped.write_bytes(gzip.compress(reference.read_bytes()))
    with pytest.raises(SequenceFormatError, match="gzip data cannot be read by region"):
        read(tmp_path, gzipped, rows)


def test_letters_of_the_reference_that_are_no_bases_are_refused(tmp_path):
    path = tmp_path / "odd.fa"
    path.write_text(">c\nACGJACGTACGT\n")
    with pytest.raises(VariantError, match="the reference has 'J' at base 4 of 'c'"):
        read(tmp_path, path, [("c", 6, ".", "C", "G")], flank=3)


def test_options_and_files_are_checked_at_once(tmp_path, reference):
    path = tmp_path / "calls.vcf"
    path.write_text(HEADER)
    with pytest.raises(ConfigError, match="flank is 0; set flank to 1") as caught:
        read_variants(path, "-", flank=0, unsupported="drop")
    assert len(caught.value.problems) == 3
    with pytest.raises(InputFileError, match=r"nothing\.vcf: file not found"):
        read_variants(tmp_path / "nothing.vcf", reference)
    with pytest.raises(InputFileError, match=r"nothing\.fa: file not found"):
        read_variants(path, tmp_path / "nothing.fa")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), flank=st.integers(1, 12))
def test_alternative_stretch_is_a_piece_of_the_alternative_haplotype(tmp_path, reference, data, flank):
    contig = CHR1
    start = data.draw(st.integers(0, len(contig) - 1))
    ref = contig[start : data.draw(st.integers(start + 1, min(len(contig), start + 6)))]
    alt = data.draw(st.text("ACGT", min_size=1, max_size=6).filter(lambda text: text != ref))
    (found,) = read(tmp_path, reference, [("chr1", start + 1, ".", ref, alt)], flank=flank)
    haplotype = contig[:start] + alt + contig[start + len(ref) :]
    assert found.ref_sequence.decode() == contig[found.start : found.end]
    tail = len(contig) - found.end
    assert contig[: found.start] + found.alt_sequence.decode() + contig[len(contig) - tail :] == haplotype
    new = found.normalized
    assert contig[: new.start] + new.alt + contig[new.start + len(new.ref) :] == haplotype
