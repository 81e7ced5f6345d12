"""`score_variants` against plain torch: both alleles in one stretch, strands, vectors, files, refusals."""

from __future__ import annotations

import csv
import gzip
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import genoembed
from genoembed.errors import ConfigError, LayerError, PrecisionWarning, StoreError, VariantError
from genoembed.scoring.alleles import TOO_LONG, failed_allele
from tests.by_hand import CAUSAL, random_dna, revcomp
from tests.scoring.by_plain_torch import folder_of, loaded, log_probs

CONTIG = random_dna(40, 11) + "ACACAC" + random_dna(40, 12)
FLANK = 12


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "ref.fa"
    path.write_text(f">c\n{CONTIG}\n")
    return path


def write_vcf(folder, rows):
    path = folder / "calls.vcf"
    path.write_text("".join(f"c\t{pos}\t{name}\t{ref}\t{alt}\n" for pos, name, ref, alt in rows))
    return path


def other(base):
    return "ACGT"["ACGT".index(base) - 1]


def snv(position):
    ref = CONTIG[position - 1]
    return (position, f"s{position}", ref, other(ref))


def score(folder, reference, rows, family="llama", **options):
    options = {"flank": FLANK, "model": loaded(family)} | options
    return genoembed.score_variants(write_vcf(folder, rows), reference, **options)


@pytest.mark.parametrize("family", CAUSAL)
def test_delta_is_alt_minus_ref_of_plain_log_softmax(tmp_path, reference, family):
    report = score(tmp_path, reference, [snv(30), snv(3), (41, "d", "ACA", "A"), snv(84)], family)
    assert report.num_rows == report.counts.alleles == 4
    for row in report.rows:
        stretch = CONTIG[row.window_start : row.window_end]
        place = int(row.normalized.split(":")[0]) - 1 - row.window_start
        ref, alt = row.normalized.split(":")[1].split(">")
        assert stretch[place : place + len(ref)] == ref
        changed = stretch[:place] + alt + stretch[place + len(ref) :]
        totals = [float(log_probs(family, text).sum()) for text in (stretch, changed)]
        assert row.ref_log_likelihood == pytest.approx(totals[0], abs=1e-4)
        assert row.alt_log_likelihood == pytest.approx(totals[1], abs=1e-4)
        assert row.delta == pytest.approx(row.alt_log_likelihood - row.ref_log_likelihood, abs=1e-12)
        means = [total / len(text) for total, text in zip(totals, (stretch, changed), strict=True)]
        assert row.delta_mean == pytest.approx(means[1] - means[0], abs=1e-5)
    assert next((row.pos, row.id, row.chrom) for row in report.rows) == (30, "s30", "c")
    assert [row.window_start for row in report.rows[:2]] == [30 - 1 - FLANK, 0]


def test_alone_is_as_in_company(tmp_path, reference):
    rows = [snv(30), snv(3), snv(84), (41, "d", "ACA", "A")]
    together = score(tmp_path, reference, rows, layer=1).rows
    for row, found in zip(rows, together, strict=True):
        (alone,) = score(tmp_path, reference, [row], layer=1).rows
        assert alone.delta == pytest.approx(found.delta, abs=1e-5)
        assert alone.l2 == pytest.approx(found.l2, abs=1e-5)


def test_reference_stretch_of_two_alleles_runs_once(tmp_path, reference):
    ref = CONTIG[29]
    two = ",".join(base for base in "ACGT" if base != ref)
    report = score(tmp_path, reference, [(30, "m", ref, two)])
    assert len(report.rows) == 3
    assert report.stats.repeats == 2
    assert len({row.ref_log_likelihood for row in report.rows}) == 1


def test_rc_mean_is_the_mean_of_both_strands(tmp_path, reference):
    (row,) = score(tmp_path, reference, [snv(30)], rc="mean").rows
    stretch = CONTIG[row.window_start : row.window_end]
    changed = stretch[:FLANK] + row.alt + stretch[FLANK + 1 :]
    expected = [
        sum(float(log_probs("llama", text).sum()) for text in (allele, revcomp(allele))) / 2
        for allele in (stretch, changed)
    ]
    assert row.delta == pytest.approx(expected[1] - expected[0], abs=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
def test_vectors_are_those_of_extract(tmp_path, reference, pooling):
    file = tmp_path / "deltas.h5"
    report = score(tmp_path, reference, [snv(30), snv(3)], layer=1, pooling=pooling, vectors=file)
    alleles = tmp_path / "alleles.fa"
    texts = []
    for row in report.rows:
        stretch = CONTIG[row.window_start : row.window_end]
        place = row.pos - 1 - row.window_start
        texts += [stretch, stretch[:place] + row.alt + stretch[place + 1 :]]
    alleles.write_text("".join(f">{number}\n{text}\n" for number, text in enumerate(texts)))
    genoembed.extract(
        alleles, model=loaded("llama"), layers=1, pooling=pooling, output=tmp_path / "alleles.h5"
    )
    with genoembed.open_embeddings(tmp_path / "alleles.h5") as opened:
        vectors = opened.X[:].astype(np.float64)
    with genoembed.open_embeddings(file) as opened:
        deltas, ids, provenance = opened.X[:], opened.ids, opened.provenance
        assert opened.layers == [report.layer]
    # extract has no start token before its sequences, so the two differ where that is seen
    started = score(tmp_path, reference, [snv(30), snv(3)], layer=1, pooling=pooling, start_token="none").rows
    for number, row in enumerate(started):
        ref, alt = vectors[2 * number], vectors[2 * number + 1]
        assert row.l2 == pytest.approx(np.linalg.norm(alt - ref), abs=1e-5)
        cosine = ref @ alt / np.linalg.norm(ref) / np.linalg.norm(alt)
        assert row.cosine_distance == pytest.approx(1 - cosine, abs=1e-6)
    assert deltas.dtype == np.float32
    assert np.linalg.norm(deltas, axis=1) == pytest.approx([row.l2 for row in report.rows], abs=1e-6)
    assert ids == [f"c:{row.pos}:{row.ref}>{row.alt}" for row in report.rows]
    assert provenance["start_token"] == report.start_token == "2"


def test_same_allele_twice_gets_a_row_each(tmp_path, reference):
    file = tmp_path / "deltas.h5"
    report = score(tmp_path, reference, [snv(30), snv(30)], layer="final", vectors=file)
    assert report.rows[0] == report.rows[1]
    with genoembed.open_embeddings(file) as opened:
        assert len(set(opened.ids)) == 2


def test_table_has_columns_of_vectors_only_with_a_layer(tmp_path, reference):
    plain, with_layer = tmp_path / "plain.tsv", tmp_path / "layer.tsv"
    assert score(tmp_path, reference, [snv(30)], output=plain).rows == ()
    score(tmp_path, reference, [snv(30)], output=with_layer, layer=0)
    with plain.open() as stream:
        (row,) = csv.DictReader(stream, delimiter="\t")
    assert list(row)[:5] == ["chrom", "pos", "id", "ref", "alt"]
    assert list(row)[-2:] == ["start_token", "method"]
    assert row["method"] == "likelihood"
    with with_layer.open() as stream:
        (more,) = csv.DictReader(stream, delimiter="\t")
    assert list(more)[-2:] == ["l2", "cosine_distance"]
    assert float(more["l2"]) > 0
    assert float(row["delta"]) == float(more["delta"])


def test_wrong_ref_is_refused_by_line_and_leaves_nothing(tmp_path, reference):
    position, name, ref, alt = snv(30)
    rows = [snv(3), (position, name, alt, ref)]
    with pytest.raises(
        VariantError, match=rf"calls\.vcf:2: record 's30': REF is '{alt}', but .* has '{ref}'"
    ):
        score(tmp_path, reference, rows, output=tmp_path / "out.tsv", layer=0, vectors=tmp_path / "out.h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls.vcf", "ref.fa"]


def test_skipped_alleles_are_counted_and_said(tmp_path, reference, caplog):
    position, name, ref, alt = snv(30)
    report = score(tmp_path, reference, [(position, name, ref, f"{alt},<DEL>,*")])
    assert (report.counts.symbolic, report.counts.spanning, report.num_rows) == (1, 1, 1)
    assert "2 alleles without a sequence were skipped" in caplog.text


def test_stretch_beyond_the_context_is_refused(tmp_path, reference):
    with pytest.raises(
        VariantError,
        match=r"calls\.vcf:1: record 's43': the stretch around c:43 has 81 bases.*context holds 63",
    ):
        score(tmp_path, reference, [snv(43)], flank=40)


def test_nothing_to_score_is_an_empty_table_but_no_file_of_vectors(tmp_path, reference):
    output = tmp_path / "out.tsv"
    rows = [(30, ".", CONTIG[29], "<DEL>")]
    assert score(tmp_path, reference, rows, output=output).num_rows == 0
    assert output.read_text().startswith("chrom\tpos\t")
    with pytest.raises(VariantError, match="no allele is left to score"):
        score(tmp_path, reference, rows, layer=0, vectors=tmp_path / "out.h5")


def test_gzipped_vcf_gives_the_same(tmp_path, reference):
    path = write_vcf(tmp_path, [snv(30)])
    packed = tmp_path / "calls.vcf.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    options = {"model": loaded("llama"), "flank": FLANK, "layer": 0}
    plain = genoembed.score_variants(path, reference, **options)
    assert genoembed.score_variants(packed, reference, **options).rows == plain.rows


def test_half_precision_is_warned_of(tmp_path, reference):
    with pytest.warns(PrecisionWarning, match="runs in bfloat16: differences between alleles are rounded"):
        report = score(
            tmp_path, reference, [snv(30)], model=folder_of("llama"), dtype="bfloat16", device="cpu"
        )
    assert torch.isfinite(torch.tensor(report.rows[0].delta))


def test_options_are_refused(tmp_path, reference):
    with pytest.raises(ConfigError, match="vectors are requested without a layer; set layer, too"):
        score(tmp_path, reference, [snv(30)], vectors=tmp_path / "x.h5")
    with pytest.raises(ConfigError, match="layer 'all' means 3 layers; set layer to one of them"):
        score(tmp_path, reference, [snv(30)], layer="all")
    with pytest.raises(ConfigError, match="pooling is 'cls'; set pooling to one of mean, max, last"):
        score(tmp_path, reference, [snv(30)], layer=0, pooling="cls")
    with pytest.raises(LayerError, match="layer"):
        score(tmp_path, reference, [snv(30)], layer=9)
    with pytest.raises(ConfigError, match="'window' is not an option"):
        score(tmp_path, reference, [snv(30)], window=9)
    (tmp_path / "x.h5").write_text("mine")
    with pytest.raises(StoreError, match=r"x\.h5: exists already"):
        score(tmp_path, reference, [snv(30)], layer=0, vectors=tmp_path / "x.h5")


@pytest.mark.parametrize(
    ("method", "told"), [("marginal", "marginal"), ("likelihood", "likelihood"), (TOO_LONG, "")]
)
def test_rows_without_scores_say_how_they_would_have_been_compared(method, told):
    found = failed_allele(SimpleNamespace(method=method))
    assert (found.method, math.isnan(found.ref_total)) == (told, True)
