"""The example data are what ``examples/data/SOURCES.md`` says, and CI runs what ``README.md`` says."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT / "examples" / "data"
SEQUENCE_FILES = {"phages.fa": 5, "virus.fa": 1, "bacterial_genes.fa.gz": 32, "umaydis.fa": 1}
LABELED = {
    "umaydis_pieces.tsv": {"cds": 12, "intron": 12, "intergenic": 12},
    "rrna_windows.tsv": dict.fromkeys(
        ("lsu_eukarya", "lsu_prok", "ssu_archaea", "ssu_bacteria", "ssu_eukarya"), 12
    ),
}
STOPS = ("TAA", "TAG", "TGA")


def read_records(name: str) -> dict[str, str]:
    content = (DATA / name).read_bytes()
    text = (gzip.decompress(content) if name.endswith(".gz") else content).decode("ascii")
    records: dict[str, str] = {}
    for block in text.split(">")[1:]:
        header, _, body = block.partition("\n")
        record_id = header.split()[0]
        assert record_id not in records
        records[record_id] = body.replace("\n", "")
    return records


def read_bed() -> dict[str, tuple[str, int, int, str]]:
    rows = [line.split("\t") for line in (DATA / "regions.bed").read_text().splitlines()]
    return {row[3]: (row[0], int(row[1]), int(row[2]), row[5]) for row in rows}


def read_gff3(kind: str) -> list[tuple[str, int, int, str, dict[str, str]]]:
    rows = [line.split("\t") for line in (DATA / "regions.gff3").read_text().splitlines() if line[0] != "#"]
    return [
        (row[0], int(row[3]) - 1, int(row[4]), row[6], dict(item.split("=") for item in row[8].split(";")))
        for row in rows
        if row[2] == kind
    ]


@pytest.mark.parametrize("name", SEQUENCE_FILES)
def test_sequence_file_holds_the_stated_records(name):
    records = read_records(name)
    assert len(records) == SEQUENCE_FILES[name]
    assert all(re.fullmatch("[ACGT]+", sequence) for sequence in records.values())
    sources = (DATA / "SOURCES.md").read_text()
    if len(records) > 6:
        total = sum(map(len, records.values()))
        assert f"| {name} | {len(records)} genes | {total:,} |" in sources
    else:
        for record_id, sequence in records.items():
            assert f"| {name} | {record_id} | {len(sequence):,} |" in sources


@pytest.mark.parametrize("name", LABELED)
def test_labeled_file_holds_the_stated_rows(name):
    header, *lines = (DATA / name).read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    assert header == "sequence\tlabel"
    assert dict(Counter(label for _, label in rows)) == LABELED[name]
    assert all(re.fullmatch("[ACGT]+", sequence) for sequence, _ in rows)
    assert len({sequence for sequence, _ in rows}) == len(rows)
    total = sum(len(sequence) for sequence, _ in rows)
    row = next(line for line in (DATA / "SOURCES.md").read_text().splitlines() if f"| {name} |" in line)
    assert re.search(rf"\| {len(rows)} \w+ \| {total:,} \|", row)


def test_exons_of_the_fungus_join_to_open_reading_frames():
    (reference,) = read_records("umaydis.fa").values()
    rows = [line.split("\t") for line in (DATA / "umaydis.gff3").read_text().splitlines() if line[0] != "#"]
    spans: dict[tuple[str, str], str] = {}
    for row in (row for row in rows if row[2] == "CDS"):
        gene = row[8].split(";")[0].removeprefix("Parent="), row[6]
        spans[gene] = spans.get(gene, "") + reference[int(row[3]) - 1 : int(row[4])]
    complement = str.maketrans("ACGT", "TGCA")
    joined = {
        name: exons if strand == "+" else exons[::-1].translate(complement)
        for (name, strand), exons in spans.items()
    }
    assert len(joined) == 2
    for name, coding in joined.items():
        assert coding.startswith("ATG"), name
        assert coding.endswith(STOPS), name
        assert len(coding) % 3 == 0, name


def test_every_file_is_described_and_small():
    files = [
        path
        for path in DATA.iterdir()
        if path.name != "SOURCES.md" and path.suffix != ".fai" and path.is_file()
    ]
    tables = {"regions.bed", "regions.gff3", "variants.vcf", "umaydis.gff3"}
    assert {path.name for path in files} == {*SEQUENCE_FILES, *LABELED, *tables}
    described = (DATA / "SOURCES.md").read_text()
    assert all(path.name in described for path in (*files, *(DATA / "annotation").iterdir()))
    assert sum(path.stat().st_size for path in DATA.rglob("*")) < 400_000


def test_bed_and_gff3_name_the_same_genes():
    genes = {row[4]["Name"]: row[:4] for row in read_gff3("gene")}
    assert len(genes) == 9
    assert genes == read_bed()


def test_regions_are_open_reading_frames_of_the_reference():
    (reference,) = read_records("virus.fa").values()
    joined: dict[str, str] = {}
    for seqid, start, end, strand, attributes in read_gff3("CDS"):
        assert (seqid, strand) == ("NC_019843.2", "+")
        joined[attributes["ID"]] = joined.get(attributes["ID"], "") + reference[start:end]
    assert len(joined) == 10
    for name, coding in joined.items():
        assert coding.startswith("ATG"), name
        assert coding.endswith(STOPS), name
        assert len(coding) % 3 == 0, name
        assert not any(coding[at : at + 3] in STOPS for at in range(0, len(coding) - 3, 3)), name


def test_bacterial_genes_are_four_of_each_of_eight_classes():
    headers = [
        line
        for line in gzip.decompress((DATA / "bacterial_genes.fa.gz").read_bytes()).decode().splitlines()
        if line.startswith(">")
    ]
    classes = [line.split(maxsplit=1)[1] for line in headers]
    assert {classes.count(name) for name in classes} == {4}
    assert len(set(classes)) == 8


def test_ci_runs_the_test_command_of_the_readme():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    command = lines[lines.index("# README-TEST-COMMAND") + 1]
    assert command.endswith("python -m pytest -n 2")
    assert command in (ROOT / "README.md").read_text().splitlines()


@pytest.mark.parametrize("fails", ["pip", "check", "pytest", "test-avx2", None])
def test_ci_fails_with_any_of_its_parts(fails, tmp_path):
    refused = f"*{fails}*" if fails else "''"
    for name in ("python", "make"):
        stand_in = tmp_path / name
        stand_in.write_text(
            f'#!/bin/sh\necho "$@" >> {tmp_path}/log\ncase "$*" in {refused}) exit 3;; esac\n'
        )
        stand_in.chmod(0o755)
    script = tmp_path / "checkout" / ".ci" / "run"
    script.parent.mkdir(parents=True)
    # nothing is installed: the stand-ins are what the fresh environment would hold
    lines = (ROOT / ".ci" / "run").read_text().splitlines(keepends=True)
    script.write_text("".join(line for line in lines if "bin/activate" not in line))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python"}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == (fails is not None), done.stderr
    steps = ["-m venv", "-m pip", "check", "-m pytest", "test-avx2"]
    ran = (tmp_path / "log").read_text().splitlines()
    assert all(line.startswith(step) for line, step in zip(ran, steps, strict=False))
    assert (fails or "test-avx2") in ran[-1]


def test_ci_runs_numeric_tests_that_exist():
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    paths = re.search(r"^NUMERIC_TESTS = (.*)$", text, re.MULTILINE)[1].split()
    assert len(paths) > 4
    for path in paths:
        file, _, name = path.partition("::")
        assert (ROOT / file).exists(), path
        assert not name or f"def {name}(" in (ROOT / file).read_text(), path


def test_constraints_are_exact_and_name_no_place():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"]
    assert len(lines) > 60
    pin = re.compile(r"[a-z0-9-]+==[0-9][0-9a-z.]*")
    assert [line for line in lines if not pin.fullmatch(line)] == []
    names = [line.split("==")[0] for line in lines]
    assert len(set(names)) == len(names)
    assert {"torch", "transformers", "h5py", "numpy", "pytest", "ruff", "mypy"} <= set(names)
