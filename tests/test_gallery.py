"""The stories of the gallery run on small real data, and the pictures in the docs are there and small."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA, SCRIPTS = ROOT / "examples" / "data", ROOT / "examples" / "gallery"
STORIES = ("coding_along_a_genome", "rrna_map", "promoters_by_layer", "every_change_of_a_gene")
PNG = b"\x89PNG\r\n\x1a\n"
LAYERS = ("--layer", 4, "--layer", 28)


def assert_is_picture(path: Path) -> None:
    """A PNG with something drawn on it: more than a frame."""
    image = pytest.importorskip("matplotlib.image")
    assert path.read_bytes()[:8] == PNG
    assert image.imread(path)[..., :3].std() > 0.05


@pytest.fixture
def reference() -> str:
    return "".join((DATA / "umaydis.fa").read_text().splitlines()[1:])


def test_coding_along_a_genome_leaves_out_pieces_of_the_region(run_example, tmp_path, reference):
    pytest.importorskip("sklearn")
    reverse = reference[::-1].translate(str.maketrans("ACGT", "TGCA"))
    inside = [f"{reference[2000:2110]}\tcds", f"{reverse[900:1010]}\tintergenic"]
    pieces = tmp_path / "pieces.tsv"
    pieces.write_text((DATA / "umaydis_pieces.tsv").read_text() + "\n".join(inside) + "\n")
    first, second, header, *rows = run_example(
        *(SCRIPTS / "coding_along_a_genome.py", pieces, DATA / "umaydis.fa", DATA / "umaydis.gff3"),
        *("chr01_29001-33000:1-4000", *LAYERS, "-o", tmp_path / "made"),
    ).splitlines()
    assert first == "36 pieces; left out 2 that share 24-mers with the stretch"
    # by hand: of windows at 400, 800, 1800 ... 3400 at least half lies in exons 350-660, 773-1055, 1759-3576
    assert second == "chr01_29001-33000:1-4000: 20 windows of 200 bases, 55% coding"
    assert header.split("\t")[1:3] == ["AUROC, pieces", "AUROC, region"]
    cells = [row.split("\t") for row in rows]
    assert re.fullmatch(r"embedding, blocks\.(4|28)\.mlp\.l3", cells[0][0])
    assert [cell[0] for cell in cells[1:]] == ["6-mers", "4-mers", "GC"]
    assert all(0 <= float(value) <= 1 for cell in cells for value in cell[1:3])
    assert cells[0][3] == "+0.000 (+0.000 to +0.000)"
    gains = [float(cells[0][2]) - float(cell[2]) for cell in cells]
    assert [float(cell[3].split()[0]) for cell in cells] == pytest.approx(gains, abs=0.0011)
    assert_is_picture(tmp_path / "made" / "coding_along_a_genome.png")


def test_rrna_map_scores_embeddings_and_kmers(run_example, tmp_path):
    pytest.importorskip("sklearn")
    first, header, *rows = run_example(
        SCRIPTS / "rrna_map.py", DATA / "rrna_windows.tsv", *LAYERS, "-o", tmp_path
    ).splitlines()
    assert first == "45 windows scored; layer and penalties chosen on 15 others"
    assert header == "features\tMCC, linear probe\tMCC, 5 nearest"
    cells = [row.split("\t") for row in rows]
    assert re.fullmatch(r"embedding, blocks\.(4|28)\.mlp\.l3", cells[0][0])
    assert [cell[0] for cell in cells[1:]] == ["6-mers", "4-mers", "GC"]
    scores = {cell[0]: [float(value.split(" ± ")[0]) for value in cell[1:]] for cell in cells}
    assert all(-1 <= value <= 1 for values in scores.values() for value in values)
    assert scores["6-mers"][1] > 0.2  # chance is 0
    assert_is_picture(tmp_path / "rrna_map.png")


def test_promoters_by_layer_keeps_groups_together(run_example, tmp_path):
    pytest.importorskip("sklearn")
    table = tmp_path / "windows.tsv"
    table.write_bytes((DATA / "rrna_windows.tsv").read_bytes())
    # runs of five hold a row of each class
    table.with_suffix(".groups").write_text("\n".join(str(row // 5) for row in range(60)) + "\n")
    shown = run_example(
        SCRIPTS / "promoters_by_layer.py", table, *LAYERS, "--folds", 3, "-o", tmp_path / "made"
    ).splitlines()
    scores = dict(line.split("\t") for line in shown if "\t" in line)
    assert {"blocks.4.mlp.l3", "blocks.28.mlp.l3", "4-mer counts", "6-mer counts"} < scores.keys()
    assert any(name.startswith("untrained copy") for name in scores)
    assert all(re.fullmatch(r"-?[01]\.\d{3} ± 0\.\d{3}", score) for score in scores.values())
    assert shown[len(scores)].startswith("use layer ")
    summary = json.loads((tmp_path / "made" / "probe" / "probe.json").read_text())
    assert (summary["num_groups"], summary["num_rows"]) == (12, 60)
    assert_is_picture(tmp_path / "made" / "promoters_by_layer.png")


def test_every_change_of_a_gene_sorts_changes_by_what_they_do_to_codons(run_example, tmp_path):
    header, *rows = run_example(
        *(SCRIPTS / "every_change_of_a_gene.py", DATA / "phages.fa", "NC_007458.1:1-31903:4176-4184"),
        *("--start", 4178, "--flank", 20, "-o", tmp_path),
    ).splitlines()
    assert header == "changes\tnumber\tmean delta\tmedian delta"
    cells = [row.split("\t") for row in rows]
    # by hand: TG, then ATG TCA AAA (start, serine, lysine): TCA -> TAA, TGA and AAA -> TAA are stops
    assert {cell[0]: int(cell[1]) for cell in cells} == {
        "before the gene": 6,
        "of the start codon": 9,
        "silent": 3,
        "another amino acid": 6,
        "to a stop": 3,
    }
    assert all(float(value) < 5 for cell in cells for value in cell[2:])
    assert_is_picture(tmp_path / "every_change_of_a_gene.png")
    assert len((tmp_path / "every_change_of_a_gene.tsv").read_text().splitlines()) == 28


def test_gallery_shows_a_small_picture_and_the_command_of_every_story():
    page = (ROOT / "docs" / "GALLERY.md").read_text(encoding="utf-8")
    assert {path.stem for path in SCRIPTS.glob("*.py")} == set(STORIES)
    for story in STORIES:
        picture = ROOT / "docs" / "gallery" / f"{story}.png"
        assert f"](gallery/{story}.png)" in page
        assert f"python examples/gallery/{story}.py " in page
        assert_is_picture(picture)
        assert picture.stat().st_size < 150_000
