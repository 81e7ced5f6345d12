"""Annotation in the form of NCBI, Ensembl, Bakta, Prokka and GenBank: each coding sequence translates."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from Bio.Seq import Seq

from genoembed.sequences import read_sequences

DATA = Path(__file__).parents[2] / "examples" / "data"
PHAGE, FUNGUS = DATA / "annotation" / "phix174.fna", DATA / "umaydis.fa"
GENES = ("A", "B", "K", "C", "D", "J", "G")


def read(sequences, annotation, **options):
    regions = None if annotation is None else DATA / "annotation" / annotation
    return list(read_sequences(sequences, regions=regions, **options))


def is_coding(record, *, has_stop=True):
    core = record.sequence[record.core_start : record.core_end].decode()
    protein = str(Seq(core).translate(table=11))
    return protein[0] == "M" and protein.endswith("*") is has_stop and "*" not in protein[:-1]


@pytest.mark.parametrize(
    ("sequences", "annotation", "options", "ids"),
    [
        (PHAGE, "phix174_ncbi.gff3", {"name_attribute": "gene"}, GENES),
        (PHAGE.with_name("phix174_bakta.gff3"), None, {"name_attribute": "gene"}, GENES),
        (PHAGE.with_name("phix174_prokka.gff"), None, {}, [f"PHIX_0000{n}" for n in range(1, 6)]),
        (PHAGE.with_name("phix174.gbk"), None, {"name_attribute": "gene", "flank": 40}, GENES),
        (FUNGUS, "umaydis_ensembl.gff3", {}, ["CDS:UMAG_00009-T1"]),
        (FUNGUS, "../umaydis.gff3", {}, ["mRNA:um00009", "mRNA:um12107"]),
    ],
    ids=["ncbi", "bakta", "prokka", "genbank", "ensembl", "mips"],
)
def test_coding_sequences_translate(sequences, annotation, options, ids):
    records = read(sequences, annotation, feature="CDS", **options)
    assert [record.id for record in records] == list(ids)
    assert all(is_coding(record) for record in records)


def test_gtf_leaves_the_stop_codon_out_and_joins_exons_to_the_transcript():
    (coding,) = read(FUNGUS, "umaydis_ensembl.gtf", feature="CDS")
    (whole,) = read(FUNGUS, "umaydis_ensembl.gff3", feature="CDS")
    assert is_coding(coding, has_stop=False)
    assert coding.sequence == whole.sequence[:-3]
    (transcript,) = read(FUNGUS, "umaydis_ensembl.gtf", feature="exon")
    (joined,) = read(FUNGUS, "umaydis_ensembl.gff3", feature="exon", join_by="Parent")
    assert transcript.sequence == joined.sequence == whole.sequence
    exons = read(FUNGUS, "umaydis_ensembl.gff3", feature="exon")
    assert b"".join(record.sequence for record in exons) == whole.sequence


def test_all_files_give_the_same_vectors_of_the_same_gene():
    found = {
        (record.sequence, record.start, record.end)
        for name in ("phix174_bakta.gff3", "phix174.gbk", None)
        for record in (
            read(PHAGE.with_name(name), None, feature="CDS", flank=30)
            if name
            else read(PHAGE, "phix174_ncbi.gff3", feature="CDS", flank=30)
        )
    }
    assert len(found) == len(GENES)
    assert max(end for _, _, end in found) == 5386 + 136


@pytest.mark.parametrize("name", ["phix174_ncbi.gff3", "umaydis_ensembl.gff3", "umaydis_ensembl.gtf"])
def test_no_contig_is_read_without_being_chosen(name, tmp_path):
    sequences = PHAGE if "phix" in name else FUNGUS
    records = read(sequences, name)
    assert max(len(record.sequence) for record in records) < 1600
    packed = tmp_path / "rows.gz"
    text = (DATA / "annotation" / name).read_bytes().replace(b"\n", b"\r\n")
    packed.write_bytes(gzip.compress(text))
    again = list(read_sequences(sequences, regions=packed))
    assert [(one.id, one.sequence) for one in again] == [(one.id, one.sequence) for one in records]


def test_genbank_types_share_names_which_are_told_apart():
    records = read(PHAGE.with_name("phix174.gbk"), None, feature=["gene", "CDS"])
    assert [record.id for record in records[:2]] == ["gene-phiX174p01", "CDS-phiX174p01"]
    rows = read(PHAGE, "phix174_ncbi.gff3", feature=["gene", "CDS"], name_attribute="locus_tag")
    assert {"gene-phiX174p01", "CDS-phiX174p01"} <= {record.id for record in rows}
