"""Features of GFF3, GTF, BED12 and GenBank: joined exactly, on both strands, over an origin, with flanks."""

import random

import numpy as np
import pytest
from Bio import SeqIO
from Bio.Seq import Seq
from Bio.SeqFeature import CompoundLocation, SeqFeature, SimpleLocation
from Bio.SeqRecord import SeqRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.contracts import Window
from genoembed.errors import DuplicateIdError, RegionError
from genoembed.pipeline.assemble import _window_row
from genoembed.sequences import InputCounts, read_sequences, reverse_complement
from genoembed.sequences.annotation import FeatureChoice, iter_features
from genoembed.sequences.records import contig_places
from genoembed.sequences.variants import iter_substitutions

LENGTH = 400
CONTIG = "".join(random.Random(5).choices("ACGT", k=LENGTH))


def cores(records):
    return {r.id: r.sequence[r.core_start : r.core_end].decode() for r in records}


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "c.fa"
    path.write_text(f">c\n{CONTIG}\n")
    return path


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def gff(kind, start, end, strand, attributes):
    return ("c", "x", kind, start, end, ".", strand, ".", attributes)


@st.composite
def locations(draw):
    """Parts of one strand that do not overlap, in the order of the transcript; a contig may be circular."""
    bounds = sorted(draw(st.lists(st.integers(1, LENGTH - 1), min_size=2, max_size=8, unique=True)))
    spans = list(zip(bounds[::2], bounds[1::2], strict=False))
    strand = draw(st.sampled_from([1, -1]))
    is_circular = draw(st.booleans())
    if is_circular and draw(st.booleans()) and spans[0][0] > 1:
        # over the origin: a last part up to the contig's end, then one from its first base on
        cut = draw(st.integers(0, len(spans) - 1))
        last_end = spans[-1][1]
        spans = [*spans[cut:], *([(last_end, LENGTH)] if last_end < LENGTH else []), (0, 1), *spans[:cut]]
    return spans[::strand], strand, is_circular


@settings(deadline=None, max_examples=60)
@given(location=locations(), flank=st.integers(0, 60))
def test_genbank_features_are_what_biopython_extracts(tmp_path_factory, location, flank):
    spans, strand, is_circular = location
    parts = [SimpleLocation(start, end, strand) for start, end in spans]
    found = parts[0] if len(parts) == 1 else CompoundLocation(parts)
    record = SeqRecord(Seq(CONTIG), id="c", name="c")
    record.annotations = {"molecule_type": "DNA", "topology": "circular" if is_circular else "linear"}
    record.features = [
        SeqFeature(SimpleLocation(0, LENGTH, 1), type="source"),
        SeqFeature(found, type="CDS", qualifiers={"locus_tag": ["b1"], "product": ["a protein"]}),
    ]
    path = tmp_path_factory.getbasetemp() / "one.gb"
    SeqIO.write([record], path, "genbank")
    expected = str(SeqIO.read(path, "genbank").features[1].extract(Seq(CONTIG)))
    (read,) = read_sequences(path, feature="CDS", flank=flank)
    assert (read.id, read.sequence[read.core_start : read.core_end].decode()) == ("b1", expected)
    assert read.strand == ("+" if strand == 1 else "-")
    assert read.description.endswith("CDS a protein")
    # each base is where it says it is on the contig
    places, _ = contig_places(read)
    letters = np.frombuffer(CONTIG.encode(), np.uint8)[places].tobytes()
    if strand == -1:
        letters = reverse_complement(letters)[::-1]
    assert letters == read.sequence
    before, after = read.core_start, len(read.sequence) - read.core_end
    if is_circular:
        rest = LENGTH - (read.end - read.start)
        assert (before, after) == (min(flank, rest - rest // 2), min(flank, rest // 2))
    if not is_circular:
        left, right = min(start for start, _ in spans), LENGTH - max(end for _, end in spans)
        left, right = min(flank, left), min(flank, right)
        assert (before, after) == ((left, right) if strand == 1 else (right, left))
    assert len(set(places.tolist())) == len(places)


@settings(deadline=None, max_examples=60)
@given(location=locations(), order=st.randoms(use_true_random=False), flank=st.integers(0, 60))
def test_rows_of_one_id_are_joined_as_genbank_joins_them(tmp_path_factory, location, order, flank):
    spans, strand, is_circular = location
    parts = [SimpleLocation(start, end, strand) for start, end in spans]
    found = parts[0] if len(parts) == 1 else CompoundLocation(parts)
    expected = str(SeqFeature(found).extract(Seq(CONTIG)))
    mark = "+" if strand == 1 else "-"
    rows = [gff("CDS", start + 1, end, mark, "ID=cds-b;Parent=g") for start, end in spans]
    order.shuffle(rows)  # files have them ascending, descending, or with others in between
    region = [gff("region", 1, LENGTH, "+", "ID=c:1..400;Is_circular=true")] if is_circular else []
    # a part up to the last base and one from the first on could be two ends of a long feature, too
    ends = {end for _, end in spans}, {start for start, _ in spans}
    folder = tmp_path_factory.getbasetemp()
    path = write(folder, "parts.gff3", [*region, *rows])
    (folder / "parts.fa").write_text(f">c\n{CONTIG}\n")
    (read,) = read_sequences(folder / "parts.fa", regions=path, feature="CDS", flank=flank)
    core = read.sequence[read.core_start : read.core_end].decode()
    assert read.core_end - read.core_start == len(expected)
    if not (LENGTH in ends[0] and 0 in ends[1]):
        assert core == expected


def test_a_row_that_ends_beyond_a_circular_contig_goes_on_at_its_start(tmp_path, fasta):
    rows = [
        gff("region", 1, LENGTH, "+", "ID=c;Is_circular=true"),
        gff("gene", 391, 420, "+", "ID=g1"),
        gff("gene", 391, 420, "-", "ID=g2"),
        gff("CDS", 371, 380, "-", "ID=w;part=2/2"),
        gff("CDS", 401, 410, "-", "ID=w;part=1/2"),
        gff("gene", 1, 400, "+", "ID=whole"),
        gff("CDS", 1, 20, "+", "ID=rows"),
        gff("CDS", 371, 380, "+", "ID=rows"),
        gff("CDS", 391, 400, "+", "ID=rows"),
    ]
    path = write(tmp_path, "w.gff3", rows)
    records = list(read_sequences(fasta, regions=path, feature=["gene", "CDS"], flank=15))
    expected = CONTIG[390:] + CONTIG[:20]
    other = CONTIG[370:380] + CONTIG[:10]
    turned = {
        name: reverse_complement(text.encode()).decode()
        for name, text in {"g2": expected, "w": other}.items()
    }
    assert cores(records) == {"g1": expected, **turned, "whole": CONTIG, "rows": CONTIG[370:380] + expected}
    assert [(r.start, r.end) for r in records] == [(390, 420), (390, 420), (370, 410), (0, 400), (370, 420)]
    assert records[0].sequence.decode() == CONTIG[375:] + CONTIG[:35]
    assert len(records[3].sequence) == LENGTH
    with pytest.raises(RegionError, match="end 420 is beyond contig 'c' of 400 bases"):
        list(read_sequences(fasta, regions=write(tmp_path, "l.gff3", rows[1:]), feature="gene"))


@pytest.mark.parametrize("strand", ["+", "-"])
@pytest.mark.parametrize("next_row", [(21, 30), (421, 430)])
def test_a_row_over_the_origin_is_read_before_the_rows_behind_it(tmp_path, fasta, next_row, strand):
    rows = [
        gff("region", 1, LENGTH, "+", "ID=c;Is_circular=true"),
        gff("CDS", *next_row, strand, "ID=a"),
        gff("CDS", 391, 410, strand, "ID=a"),
        gff("CDS", 371, 380, strand, "ID=a"),
    ]
    path = write(tmp_path, "o.gff3", rows)
    (read,) = read_sequences(fasta, regions=path, feature="CDS", flank=5)
    forward = CONTIG[365:380] + CONTIG[390:] + CONTIG[:10] + CONTIG[20:35]
    assert read.sequence.decode() == (forward if strand == "+" else str(Seq(forward).reverse_complement()))
    assert (read.start, read.end) == (370, 430)


@pytest.mark.parametrize("rows", [[(11, 30), (41, 60)], [(13, 40)]])
@pytest.mark.parametrize("strand", ["+", "-"])
def test_places_of_stripped_gaps_are_left_out(tmp_path, rows, strand):
    gapped = "".join("-" if place in (9, 12, 17, 18, 45) else CONTIG[place] for place in range(100))
    (tmp_path / "g.fa").write_text(f">c\n{gapped}\n")
    path = write(tmp_path, "g.gff3", [gff("CDS", *row, strand, "ID=a") for row in rows])
    (read,) = read_sequences(tmp_path / "g.fa", regions=path, feature="CDS", gaps="strip", flank=4)
    places, is_turned = contig_places(read)
    letters = "".join(gapped[place] for place in places)
    if strand == "-":
        letters = letters.translate(str.maketrans("ACGT", "TGCA"))
    assert letters == read.sequence.decode()
    assert is_turned.tolist() == [strand == "-"] * len(letters)
    assert (read.start, read.end) == (rows[0][0] - 1, rows[-1][1])


def test_parts_on_both_strands_follow_their_numbers_or_the_policy(tmp_path, fasta):
    rows = [
        gff("CDS", 101, 110, "+", "ID=rps12;part=2"),
        gff("CDS", 121, 130, "+", "ID=rps12;part=2"),
        gff("CDS", 51, 60, "-", "ID=rps12;part=1"),
        gff("CDS", 201, 210, "+", "ID=b"),
    ]
    expected = reverse_complement(CONTIG[50:60].encode()).decode() + CONTIG[100:110] + CONTIG[120:130]
    path = write(tmp_path, "t.gff3", rows)
    (first, second) = read_sequences(fasta, regions=path, feature="CDS", flank=5)
    assert first.sequence[5:-5].decode() == expected
    assert first.sequence.decode().startswith(reverse_complement(CONTIG[60:65].encode()).decode())
    assert first.sequence.decode().endswith(CONTIG[130:135])
    assert second.id == "b"
    bare = write(tmp_path, "u.gff3", [(*row[:8], row[8].partition(";")[0]) for row in rows])
    counts = InputCounts()
    assert [r.id for r in read_sequences(fasta, regions=bare, bad_regions="skip", counts=counts)] == ["b"]
    assert counts.skipped_regions == 1
    with pytest.raises(
        RegionError, match=r"u.gff3:1: record 'rps12': its parts .* strands \(lines 1, 2, 3\)"
    ):
        list(read_sequences(fasta, regions=bare))
    each = [r.strand for r in read_sequences(fasta, regions=bare, join_by="none")]
    assert each == ["-", "+", "+", "+"]


def test_genbank_of_trans_splicing_is_what_biopython_extracts(tmp_path):
    record = SeqRecord(Seq(CONTIG), id="c", name="c", annotations={"molecule_type": "DNA"})
    parts = [SimpleLocation(300, 320, -1), SimpleLocation(10, 30, 1), SimpleLocation(50, 70, 1)]
    record.features = [SeqFeature(CompoundLocation(parts), type="CDS", qualifiers={"gene": ["rps12"]})]
    SeqIO.write([record], tmp_path / "t.gb", "genbank")
    (read,) = read_sequences(tmp_path / "t.gb", feature="CDS")
    assert read.sequence.decode() == str(record.features[0].extract(Seq(CONTIG)))


def test_names_come_from_the_first_attribute_there_is_or_the_chosen_one(tmp_path, fasta, caplog):
    rows = [
        gff("gene", 1, 9, "+", "ID=gene%2C1;Name=n1;locus_tag=l1;gene=g1"),
        gff("gene", 11, 19, "+", "Name=n2;gene=g2;locus_tag=l2"),
        gff("gene", 21, 29, "+", "Name=n3;gene=g3"),
        gff("gene", 31, 39, "+", "Name=n4"),
        gff("gene", 41, 49, "+", "note=none"),
    ]
    path = write(tmp_path, "n.gff3", rows)
    names = [r.id for r in read_sequences(fasta, regions=path)]
    assert names == ["gene,1", "l2", "g3", "n4", "c:41-49(+)"]
    caplog.set_level("WARNING", "genoembed")
    names = [r.id for r in read_sequences(fasta, regions=path, name_attribute="Name")]
    assert "1 of 5 have no attribute 'Name'" in caplog.text
    assert names == ["n1", "n2", "n3", "n4", "c:41-49(+)"]


def test_transcripts_are_joined_by_parent_and_rows_may_have_several(tmp_path, fasta):
    rows = [
        gff("exon", 1, 10, "+", "ID=e1;Parent=r1,r2"),
        gff("exon", 21, 30, "+", "ID=e2;Parent=r1"),
        gff("exon", 41, 50, "+", "ID=e3;Parent=r1,r2"),
        gff("CDS", 3, 10, "+", "Parent=r1"),
        gff("CDS", 21, 30, "+", "Parent=r1"),
    ]
    path = write(tmp_path, "e.gff3", rows)
    exons = CONTIG[:10], CONTIG[20:30], CONTIG[40:50]
    assert cores(read_sequences(fasta, regions=path, feature="exon")) == dict(
        zip(("e1", "e2", "e3"), exons, strict=True)
    )
    joined = cores(read_sequences(fasta, regions=path, feature="exon", join_by="Parent"))
    assert joined == {"r1": "".join(exons), "r2": exons[0] + exons[2]}
    assert cores(read_sequences(fasta, regions=path, feature="CDS")) == {"r1": CONTIG[2:10] + exons[1]}
    parts = cores(read_sequences(fasta, regions=path, feature="CDS", join_by="none"))
    assert parts == {"r1_part1": CONTIG[2:10], "r1_part2": exons[1]}


def test_gtf_joins_the_rows_of_a_transcript(tmp_path, fasta):
    ids = 'gene_id "g1"; transcript_id "g1.t1"; exon_number "1";'
    rows = [
        gff("gene", 1, 50, "-", 'gene_id "g1"; gene_name "ABC; 1";'),
        gff("transcript", 1, 50, "-", ids),
        gff("exon", 31, 50, "-", ids),
        gff("exon", 1, 10, "-", ids),
        gff("CDS", 31, 45, "-", ids),
        gff("CDS", 3, 10, "-", ids),
    ]
    path = write(tmp_path, "a.gtf", rows)
    turned = reverse_complement(CONTIG.encode()).decode()
    at = LENGTH
    assert cores(read_sequences(fasta, regions=path, feature="CDS")) == {
        "g1.t1": turned[at - 45 : at - 30] + turned[at - 10 : at - 2]
    }
    assert cores(read_sequences(fasta, regions=path, feature="gene")) == {"g1": turned[at - 50 :]}
    names = [r.id for r in read_sequences(fasta, regions=path, feature="gene", name_attribute="gene_name")]
    assert names == ["ABC; 1"]
    # types share their names, so that they are told apart where several are read
    names = [r.id for r in read_sequences(fasta, regions=path)]
    assert names == ["gene-g1", "transcript-g1.t1", "exon-g1.t1", "CDS-g1.t1"]


def test_gtf_of_ncbi_names_features_without_a_transcript_by_their_gene(tmp_path, fasta):
    ids = 'gene_id "b0001"; transcript_id "unassigned_transcript_1"; locus_tag "b0001";'
    path = write(
        tmp_path, "b.gtf", [gff("CDS", 1, 9, "+", ids), gff("CDS", 21, 29, "+", ids.replace('1"', '2"'))]
    )
    assert [r.id for r in read_sequences(fasta, regions=path, feature="CDS")] == ["b0001", "b0002"]


def test_blocks_of_bed12_are_joined_whatever_is_thick(tmp_path, fasta):
    row = ("c", 100, 160, "tx", 0, "-", 110, 120, "0,0,0", 2, "10,20,", "0,40,")
    path = write(tmp_path, "b.bed", [row])
    expected = reverse_complement((CONTIG[100:110] + CONTIG[140:160]).encode()).decode()
    assert cores(read_sequences(fasta, regions=path)) == {"tx": expected}
    assert list(cores(read_sequences(fasta, regions=path, join_by="none"))) == ["tx_part1", "tx_part2"]
    # two BED rows side by side, as bedtools writes them, have twelve columns as well
    beside = write(tmp_path, "c.bed", [("c", 5, 9, "a", 0, "+", "1", 100, 200, "7", 0, "+")])
    assert cores(read_sequences(fasta, regions=beside)) == {"a": CONTIG[5:9]}


def test_rows_of_the_contig_itself_are_read_only_if_they_are_chosen(tmp_path, fasta, caplog):
    kinds = ("region", "chromosome", "supercontig", "scaffold", "contig", "gene")
    path = write(tmp_path, "r.gff3", [gff(kind, 1, 400, "+", f"ID={kind}1") for kind in kinds])
    caplog.set_level("INFO", "genoembed")
    assert [r.id for r in read_sequences(fasta, regions=path)] == ["gene1"]
    assert "left out as the contig itself: chromosome, contig, region, scaffold, supercontig" in caplog.text
    assert [r.id for r in read_sequences(fasta, regions=path, feature="region")] == ["region1"]


def test_rows_with_one_id_that_are_no_parts_are_duplicates(tmp_path, fasta):
    rows = [
        gff("gene", 1, 90, "+", "ID=a"),
        gff("gene", 11, 20, "+", "ID=a"),
        gff("CDS", 11, 20, "+", "ID=a"),
    ]
    path = write(tmp_path, "d.gff3", rows)
    with pytest.raises(DuplicateIdError, match=r"d\.gff3:2: record 'a': appears again \(first at line 1\)"):
        list(read_sequences(fasta, regions=path))
    lengths = [len(r.sequence) for r in read_sequences(fasta, regions=path, duplicates="suffix")]
    assert lengths == [90, 10, 10]


def test_ribosomal_slippage_reads_a_base_twice(tmp_path, fasta):
    rows = [gff("CDS", 11, 20, "+", "ID=orf1ab"), gff("CDS", 20, 40, "+", "ID=orf1ab")]
    path = write(tmp_path, "s.gff3", rows)
    assert cores(read_sequences(fasta, regions=path)) == {"orf1ab": CONTIG[10:20] + CONTIG[19:40]}


def test_gff_with_its_sequences_needs_no_second_file(tmp_path):
    rows = "##gff-version 3\n# a comment\nc\tx\tCDS\t11\t20\t.\t-\t0\tID=P_1;product=a%20b\n###\n##FASTA\n"
    for end, name in (("\n", "p.gff"), ("\r\n", "crlf.gff")):
        text = f"{rows}>c desc\n{CONTIG[:200]}\n{CONTIG[200:]}\n".replace("\n", end)
        (tmp_path / name).write_bytes(text.encode())
        (record,) = read_sequences(tmp_path / name, feature="CDS", flank=3)
        assert record.sequence == reverse_complement(CONTIG[7:23].encode())
        assert (record.id, record.description) == ("P_1", "c:11-20(-) CDS a b")


@pytest.mark.parametrize(
    ("head", "line"), [("# by us\n#!x\n##gff-version 3\n", "##FASTA\n"), ("##gff-version 3\n", "")]
)
def test_gff_with_sequences_may_begin_with_comments_and_lack_the_line_fasta(tmp_path, head, line):
    path = tmp_path / "p.gff"
    path.write_text(f"{head}c\tx\tCDS\t11\t20\t.\t+\t0\tID=P_1\n{line}>c desc\n{CONTIG}\n>d\nAC\n")
    assert cores(read_sequences(path, feature="CDS")) == {"P_1": CONTIG[10:20]}
    assert cores(read_sequences(path, regions="d:1-2")) == {"d:1-2(+)": "AC"}


def test_contig_names_of_gtf_are_not_percent_decoded(tmp_path):
    (tmp_path / "c.fa").write_text(f">a%7Cb\n{CONTIG}\n>a|b\n{CONTIG[::-1]}\n")
    rows = [("a%7Cb", "x", "exon", 1, 9, ".", "+", ".", 'gene_id "g"; transcript_id "t";')]
    path = write(tmp_path, "x.gtf", rows)
    assert cores(read_sequences(tmp_path / "c.fa", regions=path)) == {"exon-t": CONTIG[:9]}
    path = write(tmp_path, "x.gff3", [(*rows[0][:-1], "ID=e")])
    assert cores(read_sequences(tmp_path / "c.fa", regions=path)) == {"e": CONTIG[::-1][:9]}


def test_types_of_gff3_that_share_names_are_told_apart_by_their_type(tmp_path, fasta):
    for attributes, options in (("ID={};locus_tag=L", {"name_attribute": "locus_tag"}), ("locus_tag=L", {})):
        rows = [gff(kind, 1, 9, "+", attributes.format(kind)) for kind in ("gene", "CDS")]
        path = write(tmp_path, "n.gff3", rows)
        records = cores(read_sequences(fasta, regions=path, feature=["gene", "CDS"], **options))
        assert list(records) == ["gene-L", "CDS-L"]


def test_rows_that_are_read_alone_need_no_order_by_contig(tmp_path):
    (tmp_path / "c.fa").write_text(f">c\n{CONTIG}\n>d\n{CONTIG}\n")
    rows = [gff("CDS", first, first + 8, "+", "ID=a") for first in (1, 21, 41)]
    rows.insert(2, ("d", *gff("CDS", 5, 9, "+", "ID=b")[1:]))
    path = write(tmp_path, "u.gff3", rows)
    with pytest.raises(RegionError, match="sort the file by contig"):
        list(read_sequences(tmp_path / "c.fa", regions=path))
    found = cores(read_sequences(tmp_path / "c.fa", regions=path, join_by="none"))
    expected = {"a_part1": CONTIG[:9], "a_part2": CONTIG[20:29], "b": CONTIG[4:9], "a_part3": CONTIG[40:49]}
    assert found == expected


def test_an_attribute_that_no_joined_feature_has_is_an_error_with_each_part_alone(tmp_path):
    record = SeqRecord(Seq(CONTIG), id="c", name="c", annotations={"molecule_type": "DNA"})
    found = CompoundLocation([SimpleLocation(1, 9, 1), SimpleLocation(20, 30, 1)])
    record.features = [SeqFeature(found, type="CDS", qualifiers={"locus_tag": ["b1"]})]
    SeqIO.write([record], tmp_path / "c.gb", "genbank")
    with pytest.raises(RegionError, match="has an attribute 'nothing'"):
        list(read_sequences(tmp_path / "c.gb", feature="CDS", join_by="none", name_attribute="nothing"))


def test_error_positions_are_those_of_the_contig_in_joined_parts(tmp_path):
    (tmp_path / "x.fa").write_text(">c\n" + CONTIG[:119] + "J" + CONTIG[120:] + "\n")
    rows = [gff("CDS", 11, 20, "-", "ID=a"), gff("CDS", 101, 130, "-", "ID=a")]
    path = write(tmp_path, "x.gff3", rows)
    with pytest.raises(Exception, match="'J' at position 120 of 'c'"):
        list(read_sequences(tmp_path / "x.fa", regions=path))


def test_a_large_file_is_not_held(tmp_path):
    """Features come as soon as their contig ends, not at the end of the file."""
    rows = [(f"c{n}", "x", "gene", 1, 9, ".", "+", ".", f"ID=g{n}") for n in range(50)]
    features = iter_features(str(write(tmp_path, "big.gff3", rows)), FeatureChoice(types=("gene",)))
    assert next(features).name == "g0"
    assert len(list(features)) == 49


def test_changes_of_joined_parts_have_the_places_and_letters_of_the_contig(tmp_path, fasta):
    rows = [gff("CDS", 11, 14, "-", "ID=a"), gff("CDS", 31, 33, "-", "ID=a")]
    (record,) = read_sequences(fasta, regions=write(tmp_path, "m.gff3", rows), flank=6)
    changes = list(iter_substitutions(record, flank=3))
    places = [11, 12, 13, 14, 31, 32, 33]
    assert [change.variant.position for change in changes[::3]] == places
    for change in changes:
        assert change.variant.ref == CONTIG[change.variant.position - 1]
        assert change.ref_sequence in record.sequence
    assert (changes[9].start, changes[9].end) == (10, 33)  # base 14 with the three on either side of it


def test_windows_of_a_feature_over_the_origin_count_on(tmp_path, fasta):
    rows = [gff("region", 1, LENGTH, "+", "ID=c;Is_circular=true"), gff("gene", 391, 420, "+", "ID=g")]
    (record,) = read_sequences(fasta, regions=write(tmp_path, "o.gff3", rows), feature="gene", flank=4)
    windows = [
        Window(start=first, end=first + 10, core_start=first, core_end=first + 10) for first in (4, 14, 24)
    ]
    found = [_window_row(record, window) for window in windows]
    assert [row.id for row in found] == ["g:391-400", "g:401-410", "g:411-420"]
