"""VCF files as callers of structural variants and clinical databases write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from genoembed import score_variants
from genoembed.errors import VariantError
from genoembed.scoring import scorer
from genoembed.sequences.variants import VariantCounts, read_variants

FIELD = Path(__file__).parent
SV, LATE = FIELD / "10-sv-ref-N", FIELD / "12-late-bad-row"


def read(name, **options):
    counts = VariantCounts()
    folder = name.parent
    found = list(read_variants(name, folder / "ref.fa", flank=20, counts=counts, check_first=True, **options))
    return found, counts


def test_symbolic_alleles_and_breakends_with_ref_n_are_skipped_and_counted():
    found, counts = read(SV / "symN.vcf")
    assert [context.variant.id for context in found] == ["snv"]
    assert (counts.symbolic, counts.breakends, counts.alleles) == (2, 1, 1)


def test_ref_n_reads_as_the_base_of_the_reference():
    found, counts = read(SV / "sniffles.vcf")
    assert [context.variant.id for context in found] == ["INS1"]
    assert b"TGGTGCTCGGCGTTGTTACC" in found[0].alt_sequence
    assert b"N" not in found[0].alt_sequence
    assert (counts.refs_filled, counts.unknown, counts.symbolic, counts.breakends) == (1, 1, 2, 1)


def test_ref_n_whose_alt_is_what_the_reference_has_is_no_change(tmp_path):
    (tmp_path / "ref.fa").write_text(">chr1\nACGTACGTAC\n")
    (tmp_path / "a.vcf").write_text("chr1\t2\tsame\tN\tC\nchr1\t2\tother\tN\tT\nchr1\t1\tlong\tNN\tAC\n")
    found, counts = read(tmp_path / "a.vcf")
    assert [context.variant.id for context in found] == ["other"]
    assert (counts.alleles, counts.absent, counts.refs_filled) == (1, 2, 1)


def test_alt_of_n_only_has_no_sequence_of_its_own():
    found, counts = read(SV / "delN.vcf")
    assert (found, counts.unknown) == ([], 1)
    with pytest.raises(VariantError, match="ALT 'N' has no sequence to look at"):
        read(SV / "delN.vcf", unsupported="error")


def test_alt_with_an_iupac_code_falls_under_the_policy():
    found, counts = read(LATE / "clinvar.vcf")
    assert (found, counts.ambiguous, counts.absent) == ([], 1, 1)
    with pytest.raises(VariantError, match="ALT 'R' has no sequence to look at"):
        read(LATE / "clinvar.vcf", unsupported="error")


def test_rows_that_are_skipped_need_not_fit_the_reference():
    found, counts = read(LATE / "late.vcf")  # its last row is symbolic, with REF N beyond the contig
    assert (len(found), counts.symbolic) == (60, 1)


def test_a_bad_row_late_in_the_file_is_found_before_the_model_is_loaded(tmp_path, monkeypatch):
    vcf = tmp_path / "late.vcf"
    vcf.write_text((LATE / "late.vcf").read_text() + "chr1\t101\tbad\tG\tT\n")
    monkeypatch.setattr(scorer, "load_configured", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(VariantError, match=r"late\.vcf:\d+: record 'bad': REF is 'G'"):
        score_variants(vcf, LATE / "ref.fa", output=tmp_path / "out.tsv")
    assert [path.name for path in tmp_path.iterdir()] == ["late.vcf"]
