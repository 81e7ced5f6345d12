"""The one writer of tables: what cells look like, and what a full disk leaves behind."""

from __future__ import annotations

import ast
import errno
from pathlib import Path

import numpy as np
import pytest

import genoembed
from genoembed.errors import ConfigError, StoreError
from genoembed.store.tables import open_table

ROWS = [("a\tb", 3, 0.1 + 0.2, None), ("c,d", 4, float("nan"), "x")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.tsv", "id\tn\tx\tnote\na b\t3\t0.3\tNA\nc,d\t4\tNA\tx\n"),
        ("t.csv", 'id,n,x,note\na b,3,0.3,NA\n"c,d",4,NA,x\n'),
        ("t.txt", "id\tn\tx\tnote\na b\t3\t0.3\tNA\nc,d\t4\tNA\tx\n"),
    ],
)
def test_rows_and_columns_give_the_same_text(tmp_path, name, text):
    with open_table(tmp_path / name, ("id", "n", "x", "note")) as table:
        for row in ROWS:
            table.write(row)
    assert (tmp_path / name).read_text() == text
    with open_table(tmp_path / name, overwrite=True) as table:
        for row in ROWS:
            table.write_columns(dict(zip(("id", "n", "x", "note"), [[value] for value in row], strict=True)))
    assert (tmp_path / name).read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_every_float32_reads_back_as_it_was(tmp_path):
    values = np.random.default_rng(0).normal(size=500).astype(np.float32) * np.float32(1e-3)
    with open_table(tmp_path / "t.tsv") as table:
        table.write_columns({"x": values})
    read = np.array((tmp_path / "t.tsv").read_text().split()[1:], np.float32)
    np.testing.assert_array_equal(read, values)


def test_parquet_keeps_types_over_parts_and_columns_without_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    with open_table(tmp_path / "t.parquet", ("id", "n", "x")) as table:
        for number in range(5000):
            table.write((f"r{number}", number, number / 2))
    found = parquet.read_table(tmp_path / "t.parquet")
    assert [str(field.type) for field in found.schema] == ["string", "int64", "double"]
    assert (found.num_rows, found.column("n")[4999].as_py()) == (5000, 4999)
    with open_table(tmp_path / "e.parquet", ("id", "n")):
        pass
    assert parquet.read_table(tmp_path / "e.parquet").column_names == ["id", "n"]
    with pytest.raises(ConfigError, match="standard output cannot take"), open_table("-", format="parquet"):
        pass


def write_rows(path, rows):
    with open_table(path, ("id",), overwrite=True) as table:
        for row in rows:
            table.write(row)


class Full:
    """A stream on a full disk: the first kilobyte fits into the buffer, the rest and closing fail."""

    def __init__(self, stream):
        self._stream, self._written = stream, 0

    def write(self, text):
        self._written += len(text)
        if self._written > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):
        self._stream.close()
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("num_rows", [1, 1000])
@pytest.mark.parametrize("name", ["t.tsv", "t.csv"])
def test_full_disk_is_one_line_and_leaves_the_old_table(tmp_path, monkeypatch, name, num_rows):
    (tmp_path / name).write_text("old")
    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, *words, **more: (
            Full(opened(path, *words, **more))
            if path.name.endswith(".partial")
            else opened(path, *words, **more)
        ),
    )
    rows = [(f"record {number}",) for number in range(num_rows)]
    with pytest.raises(
        StoreError, match=r"cannot be written \(No space left on device\); free space"
    ) as caught:
        write_rows(tmp_path / name, rows)
    assert "\n" not in str(caught.value)
    assert caught.value.path == str(tmp_path / name)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "old"


def test_errors_of_what_runs_meanwhile_are_not_blamed_on_the_table(tmp_path):
    with pytest.raises(FileNotFoundError), open_table(tmp_path / "t.tsv", ("id",)):
        (tmp_path / "absent").read_text()
    assert list(tmp_path.iterdir()) == []


def test_no_other_module_writes_tables():
    """Neither the csv module nor joined tabs stand in another module of the package."""
    package = Path(genoembed.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_csv = isinstance(node, ast.Attribute) and ast.unparse(node) in ("csv.writer", "csv.DictWriter")
            is_join = isinstance(node, ast.Call) and ast.unparse(node.func) == r"'\t'.join"
            if is_csv or is_join:
                found.append(path.relative_to(package).as_posix())
    assert set(found) == {"store/tables.py"}
