"""Promises 1 to 4: options left out, cheap checks first, outputs that are inputs, outputs that are there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import click
import pytest

from genoembed.cli import main
from tests.promises.columns import ALL, COLUMNS, VARIANTS, having


def command_of(name: str) -> str:
    return name.split()[0]


def required() -> list[tuple[str, str]]:
    """Name the required options and arguments of all commands."""
    context = click.Context(main)
    found = []
    for command in COLUMNS:
        known = main.get_command(context, command)
        for parameter in known.params:
            described = known.described.get(parameter.name)
            if parameter.required or (described and described.required and described.shown_default is None):
                found.append((command, parameter.opts[0]))
    return found


def test_some_options_are_required():
    assert {command for command, _ in required()} >= {"extract", "probe", "export", "export-model", "convert"}


@pytest.mark.promise(1)
@pytest.mark.parametrize(("name", "option"), required())
def test_required_option_that_is_left_out_is_named(name, option, warm, world):
    command, column = name, COLUMNS[name]
    parameters = {p.opts[0]: p for p in main.get_command(click.Context(main), command).params}
    missing = parameters[option]
    words = column.call(command)[1:]
    if isinstance(missing, click.Argument):
        words = [word for word in words if word.startswith("-")][:0]
        expected = "Missing argument"
    else:
        at = next(index for index, word in enumerate(words) if word in missing.opts)
        words = words[:at] + words[at + 2 :]
        expected = "Missing option"
    ran = warm.run(command, *words, cwd=world)
    assert ran.code == 2, ran.err
    assert expected in ran.err
    assert "Traceback" not in ran.err


ABSENT = [(name, file) for name, column in ALL.items() for file in column.inputs]

COLD = """
import sys
from genoembed.cli import main
sys.argv = ["genoembed", *sys.argv[1:]]
try:
    main()
finally:
    print("LOADED", sorted({"torch", "transformers"} & set(sys.modules)), file=sys.stderr)
"""


def run_cold(words, cwd) -> subprocess.CompletedProcess[str]:
    """Run in a fresh interpreter, which says at its end whether torch was imported."""
    return subprocess.run(
        [sys.executable, "-c", COLD, *words], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.promise(2)
@pytest.mark.parametrize(("name", "file"), ABSENT)
def test_absent_input_is_seen_before_torch_is_imported(name, file, world):
    if (world / file).is_dir():
        shutil.rmtree(world / file)
    else:
        (world / file).unlink()
    ran = run_cold(ALL[name].call(command_of(name)), world)
    assert ran.returncode in (1, 2), ran.stderr
    *said, loaded = ran.stderr.splitlines()
    assert file in said[-1]
    assert "Traceback" not in ran.stderr
    assert loaded == "LOADED []"


BAD = [(name, options) for name, column in ALL.items() for options in column.bad_options]


@pytest.mark.promise(2)
@pytest.mark.parametrize(
    ("name", "options"), BAD, ids=lambda value: " ".join(value) if isinstance(value, tuple) else value
)
def test_bad_option_is_seen_before_torch_is_imported(name, options, world):
    before = sorted(world.iterdir())
    ran = run_cold([*ALL[name].call(command_of(name)), *options], world)
    assert ran.returncode in (1, 2), ran.stderr
    *said, loaded = ran.stderr.splitlines()
    assert "Traceback" not in ran.stderr
    assert any(option.lstrip("-") in said[-1] for option in options if option.startswith("-")), said
    assert loaded == "LOADED []"
    assert sorted(world.iterdir()) == before


NAMING = [name for name, column in ALL.items() if "--model" in column.words]


@pytest.mark.promise(2)
@pytest.mark.parametrize("name", NAMING)
def test_unknown_model_is_seen_before_torch_is_imported(name, world):
    words = ALL[name].call(command_of(name))
    words[words.index("--model") + 1] = "evo2-7b"
    ran = run_cold(words, world)
    assert ran.returncode == 1, ran.stderr
    *said, loaded = ran.stderr.splitlines()
    assert said[-1].startswith("Error: model 'evo2-7b': not found")
    assert said[-1].endswith("did you mean 'evo2_7b'?")
    assert loaded == "LOADED []"


def outputs() -> list[tuple[str, str, str]]:
    """Each option that names an output, with each file that is read."""
    found = []
    for name, column in ALL.items():
        options = [column.output] if column.output and column.output[0] else []
        for option, _ in [*options, *column.more_outputs]:
            found += [(name, option, file) for file in column.inputs]
    return found


@pytest.mark.promise(3)
@pytest.mark.parametrize("link", ["name", "symlink", "hardlink"])
@pytest.mark.parametrize(("name", "option", "file"), outputs())
def test_output_is_never_an_input(name, option, file, link, warm, world):
    column, before = ALL[name], (world / file).read_bytes()
    target = file
    if link != "name":
        target = f"other{os.path.splitext(file)[1]}"  # noqa: PTH122
        (os.symlink if link == "symlink" else os.link)(world / file, world / target)
    more = ["--overwrite"] if column.has_overwrite else []
    if option == column.output[0]:
        words = column.call(command_of(name), *more, output=target)
    else:
        words = column.call(command_of(name), option, target, *more)
    ran = warm.run(*words, cwd=world)
    assert ran.code in (1, 2), ran.err
    assert "Traceback" not in ran.err
    assert (world / file).read_bytes() == before


@pytest.mark.promise(3)
@pytest.mark.parametrize("link", ["name", "symlink"])
@pytest.mark.parametrize("name", [name for name, column in having(3).items() if column.model_option])
def test_output_is_never_the_model_folder(name, link, warm, world):
    before, target = snapshot(world / "model"), "model"
    if link == "symlink":
        target = "other"
        (world / target).symlink_to("model")
    ran = warm.run(*ALL[name].call(command_of(name), "--overwrite", output=target), cwd=world)
    assert ran.code in (1, 2), ran.err
    assert "Traceback" not in ran.err
    assert snapshot(world / "model") == before


WRITERS = having(4)


@pytest.mark.promise(4)
@pytest.mark.parametrize("name", WRITERS)
def test_output_that_is_there_stays_without_overwrite(name, warm, world):
    column = WRITERS[name]
    target = world / column.output[1]
    if column.is_folder:
        target.mkdir()
        (target / "thesis.txt").write_text("precious")
    else:
        target.write_text("precious")
    ran = warm.run(*column.call(command_of(name)), cwd=world)
    assert ran.code in (1, 2), ran.err
    assert "Traceback" not in ran.err
    assert column.output[1] in ran.lines[-1]
    assert "overwrite" in ran.lines[-1] or column.is_folder
    kept = target / "thesis.txt" if column.is_folder else target
    assert kept.read_text() == "precious"


@pytest.mark.promise(4)
@pytest.mark.parametrize("name", [name for name, column in WRITERS.items() if column.is_folder])
def test_folder_that_is_not_ours_is_never_replaced(name, warm, world):
    column = WRITERS[name]
    target = world / column.output[1]
    target.mkdir()
    (target / "thesis.txt").write_text("precious")
    ran = warm.run(*column.call(command_of(name), "--overwrite"), cwd=world)
    assert ran.code == 1, ran.err
    assert "Traceback" not in ran.err
    assert sorted(path.name for path in target.iterdir()) == ["thesis.txt"]
    assert (target / "thesis.txt").read_text() == "precious"


@pytest.mark.promise(4)
@pytest.mark.parametrize("name", [name for name, column in WRITERS.items() if not column.is_folder])
def test_file_of_another_kind_is_never_replaced(name, warm, world):
    column = WRITERS[name]
    shutil.copy(world / "model" / "model.safetensors", world / column.output[1])
    before = (world / column.output[1]).read_bytes()
    ran = warm.run(*column.call(command_of(name), "--overwrite"), cwd=world)
    assert ran.code == 1, ran.err
    assert "Traceback" not in ran.err
    assert (world / column.output[1]).read_bytes() == before


@pytest.mark.promise(4)
@pytest.mark.parametrize("name", WRITERS)
def test_overwrite_replaces_what_the_command_wrote(name, warm, world):
    column = WRITERS[name]
    words = column.call(command_of(name))
    assert warm.run(*words, cwd=world).code == 0
    ran = warm.run(*words, "--overwrite", cwd=world)
    assert ran.code == 0, ran.err
    ends = (".parts", ".tmp", ".old", ".new", ".partial")
    assert [path.name for path in world.iterdir() if path.name.endswith(ends)] == ["shared.parts"]


BREAKS = {
    "extract": "seqs.fa", "score": "queries.fa", "predict": "queries.fa", "search": "queries.fa",
    "generate": "queries.fa",
    "pretrain": "seqs.fa", "probe": "seqs.fa", "finetune": "train.tsv", "score --vcf": "calls.vcf",
    "score --mutagenesis": "place.bed",
}  # fmt: skip


@pytest.mark.promise(4)
@pytest.mark.parametrize("name", BREAKS)
def test_failed_run_leaves_the_old_output(name, warm, world):
    """What is wrong stands in the last record."""
    column = WRITERS[name]
    words = column.call(command_of(name))
    assert warm.run(*words, cwd=world).code == 0
    target = world / column.output[1]
    before = snapshot(target)
    with (world / BREAKS[name]).open("a") as file:
        file.write(
            {
                "finetune": "ACGTJJ\tone\n",
                "score --vcf": "chr1\t9\tx\n",
                "score --mutagenesis": "chr1\t290\t310\n",
            }.get(name, ">bad\nACGTJJACGT\n")
        )
    ran = warm.run(*words, "--overwrite", cwd=world)
    assert ran.code == 1, ran.err
    assert "Traceback" not in ran.err
    assert snapshot(target) == before


def snapshot(target) -> dict[str, bytes]:
    """Read a file, or all files of a folder."""
    files = [target] if target.is_file() else sorted(path for path in target.rglob("*") if path.is_file())
    return {str(path.relative_to(target.parent)): path.read_bytes() for path in files}


def test_columns_are_not_changed_by_tests():
    assert replace(VARIANTS) == VARIANTS
