"""`genoembed score`: tables on standard output and in files, exit codes, and the Python call's numbers."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest

import genoembed
from genoembed.cli import score as score_module


@pytest.fixture
def calls(fasta):
    path = fasta.with_name("calls.vcf")
    path.write_text("b\t4\tv1\tT\tG\nb\t6\t.\tTG\tT,<DEL>\n")
    return path


def rows_of(text):
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


def test_score_prints_what_python_gives(cli, fasta, tiny):
    result = cli("score", fasta, "--model", tiny, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    rows = rows_of(result.stdout)
    expected = genoembed.score(fasta, model=tiny, device="cpu").rows
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    for row, score in zip(rows, expected, strict=True):
        assert float(row["log_likelihood"]) == pytest.approx(score.log_likelihood, rel=1e-8)
        assert row["start_token"] == "0"
    assert rows[0]["scored"] == "8"
    assert "3 records scored, start token 0" in result.stderr


def test_score_reads_stdin_and_writes_files(cli, fasta, tiny):
    options = ("--model", tiny, "--device", "cpu", "--start-token", "none", "--rc", "mean", "-q")
    text = fasta.read_text()
    result = cli("score", "-", *options, "-o", "out.tsv", "--per-base", "bases.tsv", stdin=text)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    rows = rows_of((fasta.parent / "out.tsv").read_text())
    bases = rows_of((fasta.parent / "bases.tsv").read_text())
    assert {row["start_token"] for row in rows} == {"none"}
    assert len(bases) == sum(int(row["length"]) for row in rows)
    again = cli("score", fasta, *options, "-o", "out.tsv")
    assert again.exit_code == 1
    assert "out.tsv: exists already" in again.stderr


def test_score_vcf_from_gzip_and_stdin_is_what_python_gives(cli, fasta, calls, tiny):
    packed = calls.with_suffix(".vcf.gz")
    packed.write_bytes(gzip.compress(calls.read_bytes()))
    options = ("--reference", fasta, "--model", tiny, "--device", "cpu", "--flank", "3", "--layer", "2")
    result = cli("score", "--vcf", packed, *options, "--vectors", "deltas.h5")
    assert result.exit_code == 0, result.stderr
    expected = genoembed.score_variants(calls, fasta, model=tiny, device="cpu", flank=3, layer=2).rows
    rows = rows_of(result.stdout)
    assert [row["alt"] for row in rows] == ["G", "T"]
    assert [float(row["delta"]) for row in rows] == pytest.approx([row.delta for row in expected], abs=1e-6)
    assert [float(row["l2"]) for row in rows] == pytest.approx([row.l2 for row in expected], rel=1e-6)
    assert "2 alleles of 2 rows scored" in result.stderr
    assert "1 alleles without a sequence were skipped" in result.stderr
    assert genoembed.open_embeddings("deltas.h5").X.shape == (2, 32)
    piped = cli("score", "--vcf", "-", *options, stdin=calls.read_text())
    assert piped.stdout == result.stdout


def test_score_wrong_ref_fails_in_one_line(cli, fasta, calls, tiny):
    calls.write_text("b\t4\tv1\tA\tG\n")
    result = cli("score", "--vcf", calls, "--reference", fasta, "--model", tiny, "--device", "cpu", "-q")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert f"calls.vcf:1: record 'v1': REF is 'A', but {fasta} has 'T' at b:4-4" in result.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "give INPUT files to score sequences, or --vcf"),
        (("seqs.fa", "--vcf", "calls.vcf", "--reference", "seqs.fa"), "give INPUT files"),
        (("--vcf", "calls.vcf"), "--vcf needs --reference"),
        (("seqs.fa", "--pool", "max"), "--pool is for variants (--vcf), not for sequences"),
        (
            ("seqs.fa", "--flank", "9"),
            "--flank is for variants (--vcf) and mutations (--mutagenesis), not for",
        ),
        (("--mutagenesis",), "--mutagenesis makes all changes of INPUT by itself"),
        (("--mutagenesis", "seqs.fa", "--vcf", "calls.vcf"), "give INPUT files, and no --vcf"),
        (("--mutagenesis", "seqs.fa", "--per-base", "x"), "--per-base is for sequences, not for mutations"),
        (("--mutagenesis", "seqs.fa", "--layer", "2"), "--layer is for variants (--vcf)"),
        (("--vcf", "calls.vcf", "--reference", "seqs.fa", "--per-base", "x"), "--per-base is for sequences"),
    ],
)
def test_score_wrong_usage_exits_with_2(cli, fasta, words, complaint):
    (fasta.parent / "calls.vcf").write_text("##fileformat=VCFv4.2\n")
    result = cli("score", *words)
    assert result.exit_code == 2
    assert complaint in result.stderr


def test_score_options_of_each_task_are_options_of_the_command():
    names = {parameter.name for parameter in score_module.score_command.params}
    assert {key for task in score_module.SCORE_TASKS.values() for key in task.keys} <= names


def test_score_mutagenesis_prints_what_python_gives_and_writes_files(cli, fasta, tiny):
    pytest.importorskip("matplotlib")
    options = ("--model", tiny, "--device", "cpu", "--flank", "3")
    files = ("--matrix", "m.h5", "--heat-map", "m.png")
    result = cli("score", "--mutagenesis", fasta, "--regions", "b:3-4", *options, *files)
    assert result.exit_code == 0, result.stderr
    expected = genoembed.score_mutations(fasta, regions="b:3-4", model=tiny, device="cpu", flank=3).rows
    rows = rows_of(result.stdout)
    assert [(row["pos"], row["alt"]) for row in rows] == [(str(row.pos), row.alt) for row in expected]
    assert [float(row["delta"]) for row in rows] == pytest.approx([row.delta for row in expected], abs=1e-6)
    assert "6 changes of 2 positions in 1 record scored (6 by likelihood), start token 0" in result.stderr
    assert result.stderr.splitlines()[-1].endswith(": standard output, m.h5, m.png")
    assert Path("m.png").read_bytes()[:4] == b"\x89PNG"
