"""Names from files neither steer a terminal nor pass for others: not in messages, tables or pages."""

import random
import re

import pytest
from click.testing import CliRunner

from genoembed.cli import main
from genoembed.errors import ConfigError, GenoembedError, Problem, Remedy, python_spelling, visible

# a right-to-left override, an isolate, the CSI of one byte, a line end of C1, a line separator
NAMES = ("a\u202e1rhc", "b\u2066c", "c\u009b31m", "d\u0085e", "f\u2028g")
HIDDEN = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
LABELS = ("x", "l$\\frac{\u202e\u009bm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    letters = random.Random(0)
    records = [
        f">{name} about \u202e\u009b2J{name}\n{''.join(letters.choices('ACGT', k=60))}\n" for name in NAMES
    ]
    (folder / "in.fa").write_text("".join(records), encoding="utf-8")
    rows = [f"{name}\t{LABELS[index % 2]}\n" for index, name in enumerate(NAMES)]
    (folder / "labels.tsv").write_text("id\tlabel\n" + "".join(rows), encoding="utf-8")
    (folder / "far.bed").write_text("chr\u202e1\t0\t5\tname\u009bx\n", encoding="utf-8")
    (folder / "wrong.bed").write_text(f"{NAMES[0]}\t0\t5000\tname\u009bx\n", encoding="utf-8")
    header = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\n"
    (folder / "v.vcf").write_text(f"{header}{NAMES[0]}\t1\tid\u009b\u202e\t<DEL>\t<DEL>\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("extract in.fa --layer 1 -o a.h5").exit_code == 0
    return folder


def run(words):
    return CliRunner().invoke(main, words.split())


@pytest.mark.parametrize(
    ("words", "exit_code", "outputs"),
    [
        ("info a.h5", 0, ()),
        ("search a.h5 --against a.h5", 0, ()),
        ("search a.h5 --against a.h5 -o hits.tsv", 0, ("hits.tsv",)),
        ("export a.h5 --to csv -o a.csv", 0, ("a.csv",)),
        ("score in.fa", 0, ()),
        ("score in.fa -o in.tsv --per-base bases.tsv", 0, ("in.tsv", "bases.tsv")),
        ("generate in.fa --length 2 -o out.fa", 0, ("out.fa",)),
        ("compare a.h5 a.h5 -o c.tsv", 0, ("c.tsv",)),
        ("plot a.h5 -o p.svg -o p.tsv -o p.html --values labels.tsv", 0, ("p.svg", "p.tsv", "p.html")),
        ("probe a.h5 --labels labels.tsv", 1, ()),
        ("extract in.fa --regions far.bed --layer 1 -o r.h5", 1, ()),
        ("extract in.fa --regions wrong.bed --layer 1 -o r.h5", 1, ()),
        ("score --vcf v.vcf --reference in.fa --unsupported error", 1, ()),
    ],
)
def test_hostile_names_are_spelled_out_wherever_they_are_shown(
    folder, monkeypatch, words, exit_code, outputs
):
    monkeypatch.chdir(folder)
    done = run(words)
    assert done.exit_code == exit_code, done.output
    shown = done.stdout + done.stderr + "".join((folder / name).read_text() for name in outputs)
    assert not HIDDEN.findall(shown)
    if not words.startswith("compare"):
        assert re.search(r"\\u202e|\\x9b", shown)


def test_message_of_an_error_is_visible_in_python_too_and_its_remedy_is_still_spelled():
    error = ConfigError(Problem("id 'a\u202eb\x9b'", Remedy("overwrite", True)))
    assert str(error) == "id 'a\\u202eb\\x9b'; set overwrite=True"
    assert error.spelled("--{}".format) == "id 'a\\u202eb\\x9b'; add --overwrite"
    assert str(GenoembedError("x", place="\u202e")) == "\\u202e: x"
    assert error.spelled(python_spelling) == str(error)


def test_what_is_no_danger_stays():
    for text in (
        "日本語",
        "sp|P1|é",
        "\u05e2\u05d1",
        "a\tb\nc",
        "e\u0301",
        "a\xa0b",
        "\U0001f9ec",
        "\u0645\u200c\u062e",
    ):
        assert visible(text) == text
