"""`genoembed generate`: FASTA on standard output and in files, exit codes, and Python's sequences."""

from __future__ import annotations

import json

import genoembed


def records_of(text):
    found = {}
    for part in text.split(">")[1:]:
        header, *lines = part.splitlines()
        found[header.split()[0]] = "".join(lines)
    return found


def test_generate_prints_what_python_gives(cli, fasta, tiny):
    result = cli(
        "generate",
        fasta,
        "--model",
        tiny,
        "-n",
        2,
        "--length",
        90,
        "--top-k",
        4,
        "--seed",
        3,
        "--no-stop-at-end",
    )
    assert result.exit_code == 0, result.stderr
    report = genoembed.generate(
        fasta, model=tiny, num_samples=2, length=90, top_k=4, seed=3, stop_at_end=False, device="cpu"
    )
    assert records_of(result.stdout) == {row.id: row.sequence for row in report.rows}
    assert max(map(len, (line for line in result.stdout.splitlines() if line[:1] != ">"))) == 80
    assert "6 sequences for 3 prompts, " in result.stderr
    assert result.stderr.splitlines()[-1].endswith(": standard output")


def test_generate_reads_stdin_writes_a_file_and_says_so_in_json(cli, fasta, tiny):
    options = ("--model", tiny, "--length", 5, "--no-stop-at-end", "-o", "out.fa", "--json")
    result = cli("generate", "-", *options, stdin=fasta.read_text())
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["num_sequences"], facts["num_bases"], facts["ended"]) == (3, 15, {"length": 3})
    assert facts["cached"] is True
    written = records_of(fasta.with_name("out.fa").read_text())
    assert written == {row.id: row.sequence for row in genoembed.generate(
        fasta, model=tiny, length=5, stop_at_end=False, device="cpu"
    ).rows}  # fmt: skip
    again = cli("generate", fasta, *options)
    assert again.exit_code == 1
    assert "out.fa: exists already; add --overwrite" in again.stderr


def test_generate_of_what_score_takes(cli, fasta, tiny):
    made = cli("generate", fasta, "--model", tiny, "--length", 20, "--no-stop-at-end")
    scored = cli("score", "-", "--model", tiny, stdin=made.stdout)
    assert scored.exit_code == 0, scored.stderr
    assert [line.split("\t")[:2] for line in scored.stdout.splitlines()[1:]] == [
        ["a_1", "20"], ["b_1", "20"], ["c_1", "20"],
    ]  # fmt: skip


def test_generate_names_options_as_they_are_typed(cli, fasta, tiny):
    result = cli("generate", fasta, "--model", tiny, "--length", 400)
    assert result.exit_code == 1
    assert "tokens, prompt included; set --length to 254 or less" in result.stderr
    assert cli("generate", fasta, "--top-p", 0).exit_code == 1
    assert "--json prints a summary" in cli("generate", fasta, "--json").stderr


def test_generate_options_come_from_a_file(cli, fasta, tiny):
    fasta.with_name("run.toml").write_text(
        f'model = "{tiny}"\nlength = 7\nstop_at_end = false\nnum_samples = 2\n'
    )
    result = cli("generate", fasta, "--config", "run.toml", "--length", 4)
    assert [len(one) for one in records_of(result.stdout).values()] == [4] * 6
