"""`score_mutations`: the numbers of `score_variants` for every change, as a table, a matrix and a picture."""

from __future__ import annotations

import csv
import json
import math
import sys
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest

import genoembed
from genoembed import load_model
from genoembed.errors import (
    ConfigError,
    EmptyRecordError,
    Interrupted,
    MissingExtraError,
    NonFiniteError,
    StoreError,
    StoreFormatError,
)
from genoembed.models.language_model import LanguageModel
from genoembed.models.masked_model import MaskedModel
from genoembed.scoring import alleles
from genoembed.scoring.heat_map import draw_heat_map, num_lines
from genoembed.store.mutation_map import MutationMap
from tests.by_hand import random_dna, revcomp
from tests.scoring.by_plain_torch import loaded as loaded_causal

GOLDEN = Path(__file__).parents[1] / "golden" / "families"
CONTIG = random_dna(90, 3)
FLANK = 15
SHARED = [
    "pos",
    "ref",
    "alt",
    "window_start",
    "window_end",
    "ref_log_likelihood",
    "alt_log_likelihood",
    "delta",
    "delta_mean",
    "method",
]


@cache
def loaded(name):
    if name == "genoembed-mini":
        return load_model(name, device="cpu", dtype="float32")
    if name == "llama":
        return loaded_causal(name)
    return load_model(str(GOLDEN / name), device="cpu", dtype="float32")


def fasta(folder, text=CONTIG, name="c"):
    path = folder / f"{name}.fa"
    path.write_text(f">{name} a contig\n{text}\n")
    return path


def mutate(folder, *, text=CONTIG, model="llama", **options):
    options = {"flank": FLANK, "threads": 1, "regions": "c:31-40"} | options
    return genoembed.score_mutations(fasta(folder, text), model=loaded(model), **options)


def by_vcf(folder, first, last, *, text=CONTIG, model="llama", **options):
    """The same changes through a VCF."""
    vcf = folder / "calls.vcf"
    changes = [
        (pos, text[pos - 1], alt) for pos in range(first, last + 1) for alt in "ACGT" if alt != text[pos - 1]
    ]
    vcf.write_text("".join(f"c\t{pos}\t.\t{ref}\t{alt}\n" for pos, ref, alt in changes))
    options = {"flank": FLANK, "threads": 1} | options
    return genoembed.score_variants(vcf, fasta(folder, text), model=loaded(model), **options).rows


def assert_same(rows, expected):
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        for name in SHARED:
            found, wanted = getattr(row, name), getattr(other, name)
            assert found == (
                pytest.approx(wanted, abs=1e-5, rel=1e-6) if isinstance(wanted, float) else wanted
            )


@pytest.mark.parametrize("rc", ["none", "mean"])
@pytest.mark.parametrize(
    "model", ["genoembed-mini", "llama", "nt_v2", "dnabert_k6", "dnabert2", "caduceus_ph"]
)
def test_table_is_that_of_the_same_changes_in_a_vcf(tmp_path, model, rc):
    last = 33 if model in ("genoembed-mini", "dnabert2") else 37
    report = mutate(tmp_path, model=model, rc=rc, regions=f"c:31-{last}")
    assert_same(report.rows, by_vcf(tmp_path, 31, last, model=model, rc=rc))
    assert report.num_rows == 3 * report.num_positions == 3 * (last - 30)
    methods = {
        "genoembed-mini": {"likelihood"},
        "llama": {"likelihood"},
        "dnabert2": {"masked-marginal", "pseudo-likelihood"},
    }
    assert set(report.methods) <= methods.get(model, {"masked-marginal"})
    assert {(row.chrom, row.strand) for row in report.rows} == {("c", "+")}


@pytest.mark.parametrize("model", ["llama", "nt_v2"])
def test_ends_of_a_contig_and_whole_records(tmp_path, model):
    text = CONTIG[:12]
    report = mutate(tmp_path, text=text, model=model, regions=None, flank=4)
    assert_same(report.rows, by_vcf(tmp_path, 1, 12, text=text, model=model, flank=4))
    assert {row.id for row in report.rows} == {"c"}
    assert (report.rows[0].window_start, report.rows[-1].window_end) == (0, 12)


@pytest.mark.parametrize("model", ["llama", "dnabert_k6"])
@pytest.mark.parametrize("rc", ["none", "mean"])
def test_region_on_the_reverse_strand_is_read_there_and_keeps_places_and_letters(tmp_path, model, rc):
    report = mutate(tmp_path, model=model, rc=rc, regions="c:31-40(-)")
    assert [(row.pos, row.ref) for row in report.rows[::3]] == [(at, CONTIG[at - 1]) for at in range(31, 41)]
    assert {row.strand for row in report.rows} == {"-"}
    backward = revcomp(CONTIG)
    there = {
        (len(CONTIG) + 1 - row.pos, revcomp(row.alt)): row
        for row in by_vcf(tmp_path, 51, 60, text=backward, model=model, rc=rc)
    }
    for row in report.rows:
        other = there[row.pos, row.alt]
        assert row.delta == pytest.approx(other.delta, abs=1e-5)
        assert (row.window_start, row.window_end) == (
            len(CONTIG) - other.window_end,
            len(CONTIG) - other.window_start,
        )
    if rc == "mean":  # of both strands, which one is read first does not matter
        forward = mutate(tmp_path, model=model, rc=rc)
        assert [row.delta for row in report.rows] == pytest.approx(
            [row.delta for row in forward.rows], abs=1e-5
        )


def test_joined_parts_have_the_places_and_letters_of_the_contig(tmp_path):
    rows = [f"c\tx\tCDS\t{first}\t{last}\t.\t-\t0\tID=cds\n" for first, last in ((11, 13), (41, 42))]
    (tmp_path / "c.gff3").write_text("".join(rows))
    options = {"regions": tmp_path / "c.gff3", "feature": "CDS", "heat_map": tmp_path / "m.png"}
    report = mutate(tmp_path, matrix=tmp_path / "m.h5", **options)
    assert [(row.pos, row.ref) for row in report.rows[::3]] == [
        (pos, CONTIG[pos - 1]) for pos in (11, 12, 13, 41, 42)
    ]
    assert len({row.delta for row in report.rows}) == len(report.rows) == 15
    with h5py.File(tmp_path / "m.h5") as file:
        assert file["obs/pos"][:].tolist() == [11, 12, 13, 41, 42]
        assert [value for value in file["X"][:].ravel() if value] == [
            pytest.approx(row.delta, abs=1e-6) for row in report.rows
        ]


@pytest.mark.parametrize(
    ("model", "regions", "passes"),
    [("nt_v2", "c:31-40", 10), ("dnabert_k6", "c:31-40", 10), ("nt_v2", None, 2)],
)
def test_masked_models_run_once_per_position_or_word(tmp_path, monkeypatch, model, regions, passes):
    run, rows = MaskedModel.word_log_probs, []

    def counting(self, ids, attention, hidden):
        rows.append(len(ids))
        return run(self, ids, attention, hidden)

    monkeypatch.setattr(MaskedModel, "word_log_probs", counting)
    text = CONTIG if regions else CONTIG[:12]  # all of it in one stretch: two words
    report = mutate(tmp_path, text=text, model=model, regions=regions)
    assert (sum(rows), report.methods) == (passes, {"masked-marginal": report.num_rows})


def test_letters_that_are_no_bases_are_skipped_and_counted(tmp_path, caplog):
    text = CONTIG[:33] + "NR" + CONTIG[35:]
    report = mutate(tmp_path, text=text, matrix=tmp_path / "m.h5")
    assert (report.num_positions, report.skipped, report.num_rows) == (10, 2, 24)
    assert "2 positions were skipped: their letter is not A, C, G or T" in caplog.text
    with h5py.File(tmp_path / "m.h5") as file:
        assert np.isnan(file["X"][:]).all(axis=1).tolist() == [False, False, False, True, True] + [False] * 5
    with pytest.raises(EmptyRecordError, match="no base A, C, G or T is there to change"):
        mutate(tmp_path, text="N" * 50)


def test_soft_masked_letters_stay_so_where_case_is_kept(tmp_path, monkeypatch):
    text = CONTIG[:32].lower() + CONTIG[32:]
    seen = []
    monkeypatch.setattr(
        "genoembed.scoring.mutagenesis.compare_part",
        lambda part, scorer: seen.extend(part) or ["x"] * len(part),
    )
    mutate(tmp_path, text=text, keep_case=True, regions="c:32-33", on_error="skip")
    changed = [allele.context.alt_sequence[FLANK:-FLANK].decode() for allele in seen]
    assert [letter.islower() for letter in changed] == [True] * 3 + [False] * 3
    assert all(allele.context.variant.alt.isupper() for allele in seen)


# --- the matrix -----------------------------------------------------------------------------------


def test_matrix_has_the_table_by_position_and_base(tmp_path):
    path = tmp_path / "m.h5"
    regions = ["c:31-36", "c:34-38(-)"]
    report = mutate(tmp_path, model="dnabert2", regions=regions, matrix=path)
    with h5py.File(path) as file:
        matrix, methods = file["X"][:], file["layers/method"][:]
        provenance = json.loads(file["uns/genoembed/provenance_json"].asstr()[()])
        names = file["obs/_index"].asstr()[:].tolist()
        assert file.attrs["genoembed-mutations"] == 1
        assert list(file.attrs["records"]) == ["c:31-36(+)", "c:34-38(-)"]
    assert (matrix.shape, matrix.dtype, methods.shape) == ((11, 4), np.float32, (11, 4))
    assert names == [f"c:31-36(+):{at}" for at in range(31, 37)] + [
        f"c:34-38(-):{at}" for at in range(34, 39)
    ]
    letters = CONTIG[30:36] + CONTIG[33:38]
    for row, letter in enumerate(letters):
        own = "ACGT".index(letter)
        assert matrix[row, own] == methods[row, own] == 0
        mine = report.rows[3 * row : 3 * row + 3]
        for change in mine:
            column = "ACGT".index(change.alt)
            assert matrix[row, column] == np.float32(change.delta)
            assert provenance["methods"][methods[row, column]] == change.method
    assert provenance["config"] == {"flank": FLANK, "rc": "none"}
    assert provenance["model"]["id"]
    assert [found["name"] for found in provenance["inputs"]] == [str(tmp_path / "c.fa")]
    assert len(provenance["inputs"][0]["sha256"]) == 64


def test_matrix_opens_in_anndata_and_is_no_file_of_embeddings(tmp_path):
    anndata = pytest.importorskip("anndata")
    path = tmp_path / "m.h5"
    mutate(tmp_path, matrix=path)
    read = anndata.read_h5ad(path)
    assert read.var_names.tolist() == list("ACGT")
    assert read.obs["pos"].tolist() == list(range(31, 41))
    assert "".join(read.obs["ref"]) == CONTIG[30:40]
    assert set(read.obs["chrom"]) == {"c"}
    assert read.uns["genoembed"]["kind"] == "changes of single bases, alt - ref"
    with pytest.raises(StoreFormatError, match="is a matrix of score --mutagenesis, which anndata"):
        genoembed.open_embeddings(path)


# --- the picture ----------------------------------------------------------------------------------


def a_map(length, **fields):
    letters = (CONTIG * (length // len(CONTIG) + 1))[:length]
    delta = np.random.default_rng(2).normal(-1, 1, (length, 4)).astype(np.float32)
    delta[np.arange(length), ["ACGT".index(letter) for letter in letters]] = 0
    fields = {"record": "r", "contig": "c", "start": 1000, "strand": "+"} | fields
    return MutationMap(reference=letters, delta_P4=delta, method_P4=np.ones((length, 4), np.uint8), **fields)


def pixels(content, folder):
    image = pytest.importorskip("matplotlib.image")
    path = folder / "x.png"
    path.write_bytes(content)
    return image.imread(path)[..., :3]


def test_picture_has_a_cell_of_its_color_for_each_change(tmp_path):
    found = a_map(60)
    found.delta_P4[:] = 0
    found.delta_P4[10, "ACGT".index("A" if found.reference[10] != "A" else "C")] = -3
    found.delta_P4[20] = np.nan
    drawn = pixels(draw_heat_map([found], ["a note"]), tmp_path)
    is_gray = (np.abs(drawn - 0.812) < 0.01).all(axis=-1)
    is_red = (drawn[..., 0] > 0.3) & (drawn[..., 1:].max(axis=-1) < 0.15)
    gray, red = (np.flatnonzero(mask[:, :1500].sum(axis=0) > 15) for mask in (is_gray, is_red))
    assert 22 <= len(gray) <= 25  # a position is 24 pixels wide, a row 26 high
    assert 22 <= len(red) <= 25
    assert abs(gray[0] - red[0] - 240) <= 1
    assert 95 <= is_gray[:, gray[12]].sum() <= 105
    assert 22 <= is_red[:, red[12]].sum() <= 27


def test_same_maps_give_the_same_bytes_and_any_length_fits(tmp_path):
    pytest.importorskip("matplotlib")
    maps = [a_map(70), a_map(7, record="x", strand="-")]
    assert draw_heat_map(maps, ["note"]) == draw_heat_map(maps, ["note"])
    for length in (1, 1000):
        drawn = pixels(draw_heat_map([a_map(length)], ["note"]), tmp_path)
        assert max(drawn.shape) < 1700
    assert num_lines([300]) == 5


def test_picture_that_cannot_be_shown_is_refused_before_anything_runs(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"heat_map to a name that ends in \.png"):
        mutate(tmp_path, heat_map=tmp_path / "x.svg")
    long = fasta(tmp_path, random_dna(40_000, 1))
    with pytest.raises(ConfigError, match="heat_map would have 80 lines for 40,000 positions, and 60 is the"):
        genoembed.score_mutations(long, model="genoembed-mini", heat_map=tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="matplotlib"):
        mutate(tmp_path, heat_map=tmp_path / "x.png")


# --- promises -------------------------------------------------------------------------------------


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(alleles, "PART_BASES", 300)


def interrupt_after(monkeypatch, rows, error=None):
    run, done = LanguageModel.log_probs, []

    def stopping(self, batch, **options):
        if len(done) >= rows:
            raise error or Interrupted()
        done.extend(batch.rows)
        return run(self, batch, **options)

    monkeypatch.setattr(LanguageModel, "log_probs", stopping)
    return done


def outputs(folder):
    return {
        "output": folder / "t.tsv",
        "matrix": folder / "m.h5",
        "heat_map": folder / "p.png",
    }


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("kept", ["output", "matrix"])
def test_run_that_was_cut_off_goes_on_where_it_was(tmp_path, monkeypatch, kept):
    pytest.importorskip("matplotlib")
    files = {name: path for name, path in outputs(tmp_path).items() if name in (kept, "matrix", "heat_map")}
    with monkeypatch.context() as patched:
        done = interrupt_after(patched, 20)
        with pytest.raises(KeyboardInterrupt) as caught:
            mutate(tmp_path, **files)
    assert 0 < len(done) < 40
    assert "finished unit" in caught.value.__notes__[0]
    assert not any(path.exists() for path in files.values())
    with pytest.raises(StoreError, match="rc was 'none' and is 'mean'"):
        mutate(tmp_path, rc="mean", **files)
    report = mutate(tmp_path, **files)
    assert report.stats.units_kept > 0
    assert all(path.exists() for path in files.values())
    assert not list(tmp_path.glob("*.parts"))
    expected = mutate(tmp_path).rows
    with h5py.File(tmp_path / "m.h5") as file:
        deltas = file["X"][:][file["layers/method"][:] > 0]
    assert deltas.tolist() == pytest.approx([row.delta for row in expected], abs=1e-6)


@pytest.mark.usefixtures("small_units")
def test_change_that_fails_stops_or_is_left_without_numbers(tmp_path, monkeypatch):
    run, target = LanguageModel.log_probs, CONTIG[20:35]

    def spoiled(self, batch, **options):
        found = run(self, batch, **options)
        ids = self.model.tokenizer(target + "A", add_special_tokens=False)["input_ids"]
        for row, mine in enumerate(batch.input_ids.unfold(1, len(ids), 1)):
            if (mine.tolist()).count(ids):
                found[row, 3] = math.nan
        return found

    at = 36  # the base after the target
    assert CONTIG[at - 1] != "A"
    monkeypatch.setattr(LanguageModel, "log_probs", spoiled)
    regions = f"c:{at}-{at}"
    with pytest.raises(NonFiniteError, match=f"c:{at}:{CONTIG[at - 1]}>A"):
        mutate(tmp_path, regions=regions, **outputs(tmp_path))
    assert not any(path.exists() for path in outputs(tmp_path).values())
    report = mutate(tmp_path, regions=regions, on_error="skip", **outputs(tmp_path))
    assert report.failed == {f"c:{at}:{CONTIG[at - 1]}>A": "not finite"}
    with (tmp_path / "t.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["delta"] == "NA" for row in rows] == [row["alt"] == "A" for row in rows]
    with h5py.File(tmp_path / "m.h5") as file:
        assert np.isnan(file["X"][0]).tolist() == [True, False, False, False]


def test_output_that_is_read_or_written_twice_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"is also read, as .*, and would be lost"):
        mutate(tmp_path, matrix=tmp_path / "c.fa", overwrite=True)
    with pytest.raises(StoreError, match="would be written twice"):
        mutate(tmp_path, output=tmp_path / "x.png", heat_map=tmp_path / "x.png")
    (tmp_path / "m.h5").write_text("precious")
    with pytest.raises(StoreError, match="exists already"):
        mutate(tmp_path, matrix=tmp_path / "m.h5")
    with pytest.raises(StoreError, match="another kind"):
        mutate(tmp_path, matrix=tmp_path / "m.h5", overwrite=True)
    assert (tmp_path / "m.h5").read_text() == "precious"


def test_matrix_is_replaced_on_request(tmp_path):
    for flank in (5, 6):
        mutate(tmp_path, matrix=tmp_path / "m.h5", flank=flank, overwrite=True)
    with h5py.File(tmp_path / "m.h5") as file:
        assert json.loads(file["uns/genoembed/provenance_json"].asstr()[()])["config"]["flank"] == 6


def test_places_that_stripped_gaps_would_move_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="places in regions are counted with the gaps"):
        mutate(tmp_path, gaps="strip")


def test_totals_count_changes_and_never_fall(tmp_path):
    seen = []
    report = mutate(tmp_path, batch_tokens=64, progress=lambda totals: seen.append(totals.records))
    assert seen == sorted(seen)
    assert report.stats.records == report.num_rows == 30
