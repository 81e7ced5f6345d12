"""``genoembed extract`` end to end on a tiny model."""

from __future__ import annotations

import dataclasses
import gzip
import json
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest

import genoembed
from genoembed.cli.output import POLICY_WORDS, policy_lines
from genoembed.config.embed import embed_config
from genoembed.errors import PrecisionWarning

MESSY = ">a\nACGTacgt\n>b\nACGUJ\n>b\nAC-GT\n>c\n>d\nAC\n"


def test_extract_writes_what_python_writes(cli, fasta, tiny):
    result = cli("extract", fasta, "--model", tiny, "--layer", "2", "--layer", "-1", "--pool", "max")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{fasta.parent / 'seqs.h5'}: 3 rows x 32, blocks.2.mlp.l3, blocks.3.mlp.l3\n"
    genoembed.extract(fasta, model=tiny, layers=[2, -1], pooling="max", output="python.h5")
    with (
        genoembed.open_embeddings("seqs.h5") as cli_file,
        genoembed.open_embeddings("python.h5") as python_file,
    ):
        assert cli_file.ids == python_file.ids == ["a", "b", "c"]
        assert cli_file.layers == python_file.layers == ["blocks.2.mlp.l3", "blocks.3.mlp.l3"]
        for layer in cli_file.layers:
            np.testing.assert_array_equal(cli_file[layer][:], python_file[layer][:])
        left, right = (file.provenance["config"] for file in (cli_file, python_file))
        assert {**left, "output": None} == {**right, "output": None}


def test_every_option_reaches_the_configuration(cli, fasta, tiny, monkeypatch):
    taken = {}

    def extract(**options):
        taken.update(options)
        raise genoembed.GenoembedError("stop here")

    monkeypatch.setattr(genoembed, "extract", extract)
    (fasta.parent / "other.fa").write_text(">other\nACGT\n")
    (fasta.parent / "genes.bed").write_text("a\t0\t4\n")
    words = f"""
    extract {fasta} other.fa -o out.h5 --overwrite --out-dtype float16 --model {tiny} --revision main
    --trust-remote-code --dtype bfloat16 --device cpu --batch-tokens 99 --threads 2 --layer 1 --layer final
    --pool max --skip-first 4 --fuse weighted --fusion-weights 0.25,0.5 --fusion-weights 1 --rc mean
    --window 64 --stride 32 --per-window --carry-state --regions a:1-4 --regions genes.bed --flank 8
    --invalid mask --duplicates suffix --empty skip --gaps strip --keep-case
    --resume --on-error skip --unit-bases 7 --certificate 5 --shard 2/3
    --engine ray --workers 4 --ray-address auto
    """
    result = cli(*words.split())
    assert result.exit_code == 1
    assert taken.pop("progress") is not None
    assert taken == {
        "inputs": (str(fasta), "other.fa"),
        "output": "out.h5",
        "overwrite": True,
        "out_dtype": "float16",
        "model": tiny,
        "revision": "main",
        "trust_remote_code": True,
        "dtype": "bfloat16",
        "device": "cpu",
        "batch_tokens": 99,
        "threads": 2,
        "layers": ("1", "final"),
        "pooling": "max",
        "skip_first": 4,
        "fusion": "weighted",
        "fusion_weights": (0.25, 0.5, 1.0),
        "rc": "mean",
        "window": 64,
        "stride": 32,
        "per_window": True,
        "carry_state": True,
        "regions": ("a:1-4", "genes.bed"),
        "flank": 8,
        "invalid": "mask",
        "duplicates": "suffix",
        "empty": "skip",
        "gaps": "strip",
        "keep_case": True,
        "resume": True,
        "on_error": "skip",
        "unit_bases": 7,
        "certificate": 5,
        "shard": "2/3",
        "engine": "ray",
        "workers": 4,
        "ray_address": "auto",
    }


def test_defaults_are_those_of_the_configuration(cli, fasta, monkeypatch):
    taken = {}

    def extract(**options):
        taken.update(options)
        raise genoembed.GenoembedError("stop here")

    monkeypatch.setattr(genoembed, "extract", extract)
    cli("extract", fasta)
    taken.pop("progress")
    # what was not given is not passed on: a fine-tuned model has a say in it
    assert set(taken) == {"inputs"}
    assert embed_config(taken) == embed_config({"inputs": (str(fasta),)})


def test_extract_reads_stdin_gzip_and_several_files(cli, fasta, tiny):
    packed = gzip.compress(fasta.read_bytes())
    (fasta.parent / "more.fa.gz").write_bytes(gzip.compress(b">z\nACGT\n"))
    options = ("--model", tiny, "--layer", 0, "--json")
    piped = json.loads(cli("extract", "-", *options, stdin=packed).stdout)
    both = json.loads(cli("extract", "more.fa.gz", fasta, *options).stdout)
    assert (piped["output"], piped["num_rows"]) == ("embeddings.h5", 3)
    assert (both["output"], both["num_rows"], both["counts"]["files"]) == ("more.h5", 4, 2)
    with genoembed.open_embeddings("more.h5") as joined, genoembed.open_embeddings("embeddings.h5") as alone:
        assert joined.ids == ["z", "a", "b", "c"]
        np.testing.assert_allclose(joined.X[1:], alone.X[:], rtol=1e-5, atol=1e-6)


def test_summary_says_what_the_policies_did(cli, fasta, tiny):
    fasta.write_text(MESSY)
    policies = "--invalid mask --duplicates suffix --empty skip --gaps strip".split()
    result = cli("extract", fasta, "--model", tiny, "--layer", 1, *policies)
    assert result.exit_code == 0, result.stderr
    lines = result.stderr.splitlines()
    assert f"{tiny}: layers blocks.1.mlp.l3" in lines
    assert "read 4 records, 19 bases from 1 file, cut into 4 windows" in lines
    for line in (
        "4 soft-masked bases upper-cased",
        "1 RNA letter read as DNA (U as T)",
        "1 invalid letter masked to N",
        "1 record with masked letters",
        "1 gap letter taken out",
        "1 record without bases skipped",
        "1 record renamed (id seen before)",
    ):
        assert line in lines
    assert sum("tokens/s" in line and "% padding" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("again", "words"), [(0, ""), (1, ", 1 repeat not run again"), (3, ", 3 repeats not")]
)
def test_summary_counts_what_was_not_run_again(again, words, cli, fasta, tiny):
    fasta.write_text(
        "".join(f">{name}\n{'ACGTT' if name <= again else 'A' * name}\n" for name in range(9)[1:])
    )
    fasta.write_text(fasta.read_text() + ">x\nACGTT\n")
    result = cli("extract", fasta, "--model", tiny, "--layer", 1, "--json")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("read 9 records")]
    assert line.partition("9 windows")[2].startswith(words)
    assert bool(line.partition("9 windows")[2]) == bool(words)
    assert json.loads(result.stdout)["stats"]["repeats"] == again


def test_every_count_of_a_policy_has_words():
    plain = {"files", "records", "bases", "windows"}
    plain.add("unread")  # no policy's doing: a line of its own says it
    names = [field.name for field in dataclasses.fields(genoembed.InputCounts)]
    assert set(names) - plain == set(POLICY_WORDS)
    assert policy_lines(genoembed.InputCounts(records=3)) == []
    assert policy_lines(genoembed.InputCounts(skipped_invalid=1200)) == [
        "1,200 records skipped for invalid letters"
    ]


def test_json_is_the_only_thing_on_stdout_and_quiet_empties_stderr(cli, fasta, tiny):
    result = cli("extract", fasta, "--model", tiny, "--layer", "1", "--json", "-q", "-o", "q.h5")
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["layers"] == ["blocks.1.mlp.l3"]
    assert (report["num_rows"], report["width"], report["output"]) == (3, 32, "q.h5")
    assert report["counts"]["bases"] == 35
    assert 0 <= report["stats"]["padding_share"] < 1
    assert report["tokens_per_s"] > 0


def test_verbose_shows_what_the_library_logs(cli, fasta, tiny):
    words = ("extract", fasta, "--model", tiny, "--layer", 0, "--overwrite")
    assert "wrote 3 rows" not in cli(*words).stderr
    assert "wrote 3 rows" in cli(*words, "-v").stderr


@pytest.mark.parametrize(("verbose", "shown"), [((), False), (("-v",), True)])
def test_warnings_are_one_line_and_those_of_others_are_hidden(verbose, shown, cli, fasta, monkeypatch):
    def extract(**options):
        for _ in range(3):
            warnings.warn(PrecisionWarning("evo2_40b: numbers\nwill differ"), stacklevel=1)
        warnings.warn("old way of doing things", DeprecationWarning, stacklevel=1)
        raise genoembed.GenoembedError("stop here")

    monkeypatch.setattr(genoembed, "extract", extract)
    lines = cli("extract", fasta, *verbose).stderr.splitlines()
    assert lines.count("Warning: evo2_40b: numbers will differ") == 1
    assert ("Warning: DeprecationWarning: old way of doing things" in lines) is shown
    assert lines[-1] == "Error: stop here"


@pytest.mark.parametrize(
    ("content", "options", "line"),
    [
        (
            ">a\nACGJ\n",
            "",
            "Error: seqs.fa:2: record 'a': 'J' at position 4 is not in alphabet dna-iupac; "
            "set --invalid mask or fix it",
        ),
        (
            ">a\nAC\n>a\nGT\n",
            "",
            "Error: seqs.fa:3: record 'a': appears again (first at line 1); "
            "rename one or set --duplicates suffix",
        ),
        (
            ">a\nACGT\n",
            "--layer 9",
            "Error: layer '9' is not in tiny (blocks 0-3); name a block from 0 to 3, "
            "or from -4 to -1 counted from the end",
        ),
        (
            ">a\nACGT\n",
            "--fuse weighted --window 0",
            "Error: --fuse is 'weighted', but there are no weights; set --fusion-weights to one weight per "
            "layer, such as 0.2,0.8; --window is 0; set --window to 1 or more bases",
        ),
        (
            ">a\nACGT\n",
            "-o there.h5",
            "Error: there.h5: exists already; add --overwrite, or choose another name",
        ),
        (
            ">a\nACGT\n",
            "-o no/where.h5",
            "Error: no/where.h5: folder 'NO' does not exist; make it, or set --output to another folder",
        ),
    ],
)
def test_error_is_one_line_and_exit_code_1(content, options, line, cli, fasta, tiny):
    fasta.write_text(content)
    (fasta.parent / "there.h5").write_bytes(b"precious")
    (fasta.parent / "tiny").symlink_to(tiny)
    before = sorted(fasta.parent.iterdir())
    result = cli("extract", "seqs.fa", "--model", "tiny", "-q", *options.split())
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == line.replace("NO", str(fasta.parent / "no")) + "\n"
    assert sorted(fasta.parent.iterdir()) == before
    assert (fasta.parent / "there.h5").read_bytes() == b"precious"


def test_notes_of_an_error_are_on_its_line(cli, fasta, monkeypatch):
    def extract(**options):
        error = genoembed.GenoembedError("no room\nleft")
        error.add_note("record 'chr1'")
        raise error

    monkeypatch.setattr(genoembed, "extract", extract)
    assert cli("extract", fasta, "-q").stderr == "Error: no room left; record 'chr1'\n"


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (False, "nothing was written to out.h5; run the command again to start over."),
        (True, "out.h5 had been written already and is complete."),
    ],
)
def test_interruption_says_what_became_of_the_output(write, line, cli, fasta, monkeypatch):
    def extract(**options):
        if write:
            Path("out.h5").write_bytes(b"complete")
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(genoembed, "extract", extract)
    result = cli("extract", fasta, "-o", "out.h5")
    assert (result.exit_code, result.stdout, result.stderr) == (143, "", f"Interrupted: {line}\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_exceptions_keep_their_traceback(cli, fasta, monkeypatch):
    def extract(**options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(genoembed, "extract", extract)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli("extract", fasta)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["extract"], "Missing argument"),
        (["extract", "a.fa", "--pool", "median"], "'median' is not one of 'mean', 'max'"),
        (["extract", "a.fa", "--fuse", "weighted", "--fusion-weights", "1,x"], "not a list of numbers"),
        (["extract", "a.fa", "--window", "many"], "not a valid integer"),
        (["convert", "a.pt"], "Missing option '-o'"),
        (["extarct"], "No such command 'extarct'"),
    ],
)
def test_usage_error_is_exit_code_2(words, problem, cli):
    result = cli(*words)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert result.stdout == ""
