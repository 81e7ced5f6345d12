"""What a command reads and writes, checked by file identity before anything is loaded.

In: names of files. Promised: what is read is there; what is written is never what is read, by whatever name;
what is there is replaced only where that was requested, and only by a file of its own kind.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from genoembed.errors import InputFileError, Problem, Remedy, StoreError, check_installed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

FileKind: TypeAlias = Literal["hdf5", "table", "fasta", "picture", "export", "index", "folder"]
"""What an option writes."""
STANDARD_STREAM = "-"
# Greedy: names of contigs may have colons and digits themselves, such as HLA-A*01:01.
PLACE_PATTERN = re.compile(r"(?P<contig>.+):(?P<first>[0-9,]+)-(?P<last>[0-9,]+)(\((?P<strand>[+-])\))?")
_SHOWN_TEXT = 200
_PATH_LIKE = ("./", "../", "/", "~")
"""How a name begins that can only be a path."""
_HEAD_BYTES = 64
_SEAL = b"genoembed-seal-1"
"""Last bytes of an HDF5 file that genoembed wrote and nobody has changed since."""
_GENERATED = b" generated_by=genoembed-"
"""In the first header of a FASTA file that genoembed wrote."""
_LONGEST_LINE = 1 << 16
_MAGIC = {
    b"\x89HDF": "HDF5",
    b"PAR1": "Parquet",
    b"PK": "zip",
    b"\x89PNG": "PNG",
    b"%PDF": "PDF",
    b"\x1f\x8b": "gzip",
    b">": "sequence",
    b"@": "sequence",
    b"LOCUS": "sequence",
    b"##": "annotation",
    b"{": "JSON",
    b"[": "JSON",
    b"<": "markup",
}
_MAY_REPLACE: Mapping[FileKind, frozenset[str]] = {
    "hdf5": frozenset({"HDF5"}),
    "table": frozenset({"text", "Parquet"}),
    "fasta": frozenset({"sequence"}),
    "picture": frozenset({"PNG", "PDF", "markup", "text"}),
    "export": frozenset({"HDF5", "zip", "Parquet", "text"}),
    "index": frozenset({"binary"}),
}
"""What each kind of output may replace, by what the bytes of the old file say of it."""


def check_paths(
    reads: Iterable[str | os.PathLike[str]] = (),
    writes: Iterable[tuple[str | os.PathLike[str] | None, FileKind]] = (),
    *,
    may_read: Iterable[str | os.PathLike[str]] = (),
    places: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> None:
    """Raise if an input is missing, or an output cannot be written, is an input, or is there and must stay.

    Args:
        reads: Files and folders that are read; ``-`` is standard input.
        writes: What is written, and of what kind it is; ``-`` is standard output, None is nothing.
        may_read: Names that may be files or folders, and may be something else: models.
        places: Files of regions, or places such as ``chr1:1001-2000``.
        overwrite: Whether files that are there may be replaced. Folders are checked by who writes them.

    Raises:
        InputFileError: If something that is read is not there.
        MissingExtraError: If a package that writes an output is not installed.
        StoreError: If an output is something that is read, must stay, or has no folder.
    """
    inputs = [os.fspath(path) for path in reads if os.fspath(path) != STANDARD_STREAM]
    for name in inputs:
        if not Path(name).exists():
            problem = "file not found; check the name and the current folder"
            raise InputFileError(problem, path=name)
    regions = [os.fspath(name) for name in places]
    for name in regions:
        if name != STANDARD_STREAM and not _exists(name) and PLACE_PATTERN.fullmatch(name) is None:
            problem = "file not found, and not a place such as chr1:1001-2000; check regions"
            raise InputFileError(problem, path=name[:_SHOWN_TEXT])
    uncertain = [os.fspath(name) for name in may_read]
    for name in uncertain:
        if name.startswith(_PATH_LIKE) and not Path(name).expanduser().exists():
            problem = "file or folder not found; check the name and the current folder"
            raise InputFileError(problem, path=name)
    outputs = [(os.fspath(path), kind) for path, kind in writes if path is not None]
    outputs = [(path, kind) for path, kind in outputs if path != STANDARD_STREAM]
    _check_apart([path for path, _ in outputs])
    for output, kind in outputs:
        for name in (*inputs, *uncertain, *regions):
            if _is_within(output, name):
                problem = Problem(
                    f"is also read, as {name!r}, and would be lost", Remedy("output", words="another name")
                )
                raise StoreError(problem, path=output)
        if kind != "folder":
            check_parent(output)
            _check_writer(output, kind)
            if overwrite and Path(output).is_file():
                _check_kind(output, kind)


def check_parent(output: str | os.PathLike[str]) -> None:
    """Raise if the folder of an output is not there, or cannot be written to."""
    folder = Path(os.path.realpath(output)).parent
    if not folder.is_dir():
        problem = f"folder {str(folder)!r} does not exist; make it, or set output to another folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = f"folder {str(folder)!r} cannot be written to; set output to another folder"
    else:
        return
    raise StoreError(problem, path=os.fspath(output))


def _check_writer(output: str, kind: FileKind) -> None:
    """Raise if the package that writes a format is missing."""
    suffix = Path(output).suffix.lower()
    if kind in ("table", "export") and suffix == ".parquet":
        check_installed("pyarrow", extra="parquet", purpose="writing Parquet")
    if kind == "picture" and suffix in (".png", ".svg", ".pdf"):
        check_installed("matplotlib", extra="analysis", purpose="a picture")


def is_place(text: str) -> bool:
    """Return whether a text is a place such as ``chr1:1001-2000`` or ``chr1:1,001-2,000(-)``, no file."""
    return PLACE_PATTERN.fullmatch(text) is not None and not _exists(text)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # longer than any file name, say
        return False


def _check_apart(outputs: list[str]) -> None:
    for index, first in enumerate(outputs):
        for second in outputs[index + 1 :]:
            if os.path.realpath(first) == os.path.realpath(second) or _is_same(first, second):
                problem = Problem(
                    f"would be written twice, as {second!r} too", Remedy("output", words="two names")
                )
                raise StoreError(problem, path=first)


def _is_within(output: str, read: str) -> bool:
    """Tell whether an output is a file or folder that is read, by whatever name, or lies inside one."""
    if _is_same(output, read):
        return True
    folder = Path(os.path.realpath(read))
    if not folder.is_dir() or not os.path.lexists(output):
        return False
    target = Path(os.path.realpath(output))
    return folder in target.parents or any(_is_same(output, path) for path in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    """List the files of a folder: those that a hard link elsewhere could stand for."""
    yield from (path for path in folder.iterdir() if path.is_file())


def _is_same(first: str | Path, second: str | Path) -> bool:
    try:
        return os.path.samefile(first, second)  # noqa: PTH121 - names as the user gave them
    except OSError:
        return False


def _check_kind(output: str, kind: FileKind) -> None:
    """Raise where the file that would be replaced is of another kind than what is written."""
    with Path(output).open("rb") as file:
        head = file.read(_HEAD_BYTES)
        first_line = head.partition(b"\n")[0] + (b"" if b"\n" in head else file.readline(_LONGEST_LINE))
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(_SEAL)))
        tail = file.read()
    if not head:
        return
    found = kind_of(head)
    if found not in _MAY_REPLACE[kind]:
        problem = Problem(
            f"is a file of another kind ({found}), which is not replaced",
            Remedy("output", words="another name"),
        )
        raise StoreError(problem, path=output)
    is_ours = {"hdf5": tail == _SEAL, "fasta": _GENERATED in first_line}.get(kind, True)
    if not is_ours:
        problem = Problem(
            "was not written by genoembed, or changed since, and is not replaced",
            Remedy("output", words="another name, or remove the file"),
        )
        raise StoreError(problem, path=output)


def path_strings(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None) -> tuple[str, ...]:
    """Return one path or several as strings.

    Example:
        >>> path_strings("a.fa"), path_strings(["a.fa", "b.fa"]), path_strings([])
        (('a.fa',), ('a.fa', 'b.fa'), ())
    """
    if paths is None:
        return ()
    if isinstance(paths, str | os.PathLike):
        paths = (paths,)
    return tuple(os.fspath(path) for path in paths)


def kind_of(head: bytes) -> str:
    """Tell the kind of a file by its first bytes.

    Example:
        >>> kind_of(b"id\\tlabel\\n"), kind_of(b">chr1\\nACGT"), kind_of(bytes(8))
        ('text', 'sequence', 'binary')
    """
    found = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    if found is not None:
        return found
    is_text = not re.search(rb"[\x00-\x08\x0e-\x1f]", head)
    return "text" if is_text else "binary"
