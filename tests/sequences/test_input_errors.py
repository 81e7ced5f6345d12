"""docs/INPUT_ERRORS.md is a list of test cases: every row is run, and every message of the code has a row."""

import ast
import io
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from genoembed.errors import GenoembedError
from genoembed.sequences import read_sequences
from genoembed.sequences.variants import read_variants

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "INPUT_ERRORS.md"
CASES = ROOT / "tests" / "data" / "sequences"
READERS = {"read_sequences": read_sequences, "read_variants": read_variants}
OF_TABLES = {"tables.py", "homology.py", "composition.py"}
"""Not about sequence files; docs/FINETUNING_DATA.md is about tables."""
SOURCES = sorted(
    path for path in (ROOT / "genoembed" / "sequences").glob("*.py") if path.name not in OF_TABLES
)
# Raised by limits.py, or only when a disk or a permission fails; tested beside the code.
NO_ROW = (
    "cannot be read (",
    "has changed while",
    "is not a regular file",
    "one record or line",
    "environment variable",
)


class Row(NamedTuple):
    what: str
    call: str
    message: str
    exit_code: int


def documented_rows() -> list[Row]:
    text = DOC.read_text().partition("## Errors")[2]
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| ")]
    return [
        Row(what, call.strip("` "), message.strip("`"), int(code))
        for what, call, message, code in rows
        if code not in ("exit code", "---")
    ]


def run_documented_call(call: str) -> None:
    node = ast.parse(call, mode="eval").body
    assert isinstance(node, ast.Call)
    read = READERS[ast.unparse(node.func)]
    values = [ast.literal_eval(value) for value in node.args]
    list(read(*values, **{key.arg: ast.literal_eval(key.value) for key in node.keywords}))


@pytest.fixture
def case_folder(tmp_path, monkeypatch):
    folder = shutil.copytree(CASES, tmp_path / "cases")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("row", documented_rows(), ids=lambda row: row.what.replace(" ", "-"))
def test_documented_error_has_its_message(row, case_folder, monkeypatch):
    if "standard input closed" in row.what:
        monkeypatch.setattr(sys, "stdin", None)
    if "GFF3 on standard input" in row.what:
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO((case_folder / "types.gff3").read_bytes()))
        )
    with pytest.raises(GenoembedError, match=f"^{re.escape(row.message)}$"):
        run_documented_call(row.call)
    assert row.exit_code == 1


def test_documented_rows_cover_every_case_file():
    rows = documented_rows()
    named = {name for row in rows for name in re.findall(r'"([^"]+)"', row.call)}
    unused = {path.name for path in CASES.iterdir()} - named - {"tiny.gb", "tiny.embl"}
    assert len(rows) > 70
    assert not unused


def message_patterns() -> list[str]:
    """Every literal that the code assigns to ``problem`` or appends to ``problems``, as a pattern."""
    patterns = []
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "problem":
                patterns.append(_pattern(node.value))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "problems.append":
                patterns.append(_pattern(node.args[0]))
    return patterns


def _pattern(value: ast.expr) -> str:
    if isinstance(value, ast.JoinedStr):
        return "".join(_pattern(part) if isinstance(part, ast.Constant) else ".*" for part in value.values)
    assert isinstance(value, ast.Constant), ast.unparse(value)
    return re.escape(str(value.value))


def test_every_message_of_the_code_has_a_row():
    messages = [row.message for row in documented_rows()]
    patterns = [p for p in message_patterns() if not re.sub(r"\\(.)", r"\1", p).startswith(NO_ROW)]
    assert len(patterns) > 50
    assert [p for p in patterns if not any(re.search(p, message) for message in messages)] == []
