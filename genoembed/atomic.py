"""Files and folders that appear complete or not at all, written by one process at a time.

An unfinished output is kept next to its target as ``.NAME.partial`` and is locked: a second process on the
same output is refused, and what a killed process left is taken over and written anew by the next one.

HDF5 must never see a failed write: when a chunk cannot be written while a file is closed, the library keeps
the broken file open and the process crashes (segmentation fault) as it exits. h5py therefore writes through
this object, which keeps the first error, holds what could not be written in memory, so that HDF5 reads back
what it wrote, and lets HDF5 close in peace. The file is then thrown away.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from genoembed.config.paths import check_parent
from genoembed.errors import GenoembedError, Problem, Remedy, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

try:
    import fcntl
except ImportError:  # not on Windows; there, two processes on one output are not kept apart
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

MARKER = "genoembed_folder.json"
"""In a folder that genoembed wrote as a whole: the files it wrote. Only such a folder is ever replaced."""
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_FOLDER_SYNC_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM}


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Raise if an output cannot or must not be written, before any work is done."""
    target = Path(os.path.realpath(path))
    problem = None
    if os.fspath(path) == "-":
        problem = "HDF5 cannot be written to standard output; set output to a file name"
    elif target.is_dir():
        problem = "is a folder, expected a file name; set output to a file inside it"
    elif target.exists() and not target.is_file():
        problem = "is a device or pipe, expected a regular file; set output to a file name"
    elif target.exists() and not overwrite:
        problem = Problem("exists already", Remedy("overwrite", True), ", or choose another name")
    if problem is not None:
        raise StoreError(problem, path=str(path))
    check_parent(path)
    return target


def write_text(path: Path, text: str) -> None:
    """Write a small file, which appears complete or not at all, and lasts through a power cut."""
    with AtomicFile(path) as file:
        file.write(memoryview(text.encode()))


@contextmanager
def reporting_writes(output: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a failed write, such as to a full disk, into an error of one line that names the output.

    Standard output is left out: that its reader went away is no failure.
    """
    try:
        yield
    except GenoembedError:
        raise
    except Exception as error:
        reason = _failed_write(error)
        if reason is None or os.fspath(output) == "-":
            raise
        problem = f"cannot be written ({reason}); free space, or set output to another name"
        raise StoreError(problem, path=os.fspath(output)) from error


_WRITE_FAILED = re.compile(
    r"os error \d+|PytorchStreamWriter|inline_container|iostream error|No space left|File too large", re.I
)


def _failed_write(error: Exception) -> str | None:
    """Say why a write failed; for an OSError torch and safetensors raise errors of their own."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = " ".join(str(error).split())
    return text[:200] if _WRITE_FAILED.search(text) else None


@contextmanager
def replacing(output: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to an output; its file becomes the output unless there is an error."""
    target = check_output(output, overwrite=overwrite)
    part = partial_of(target)
    with reporting_writes(output):
        descriptor = claim(part, output=output)
    try:
        yield part
        check_output(output, overwrite=overwrite)  # work takes time, and another process may have written it
        with reporting_writes(output):
            os.fsync(descriptor)
            part.chmod(0o666 & ~_umask())  # until it is complete, only its owner can read it
            part.replace(target)
            _sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)
        os.close(descriptor)


def partial_of(target: Path) -> Path:
    """Return the name of an output until it is complete.

    Example:
        >>> partial_of(Path("run/out.h5")).as_posix()
        'run/.out.h5.partial'
    """
    name = target.name
    if len(name) > 200:  # file systems allow 255 bytes
        name = f"{name[:100]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return target.with_name(f".{name}.partial")


def claim(partial: Path, *, output: str | os.PathLike[str]) -> int:
    """Open an empty partial file, or an empty partial folder, that no other process writes, and lock it.

    The lock ends with the process, whatever ends that, so that what a killed one left is taken over here.
    """
    descriptor = lock(partial, output=output)
    if partial.is_dir():
        _empty(partial)
    else:
        os.ftruncate(descriptor, 0)
    return descriptor


def lock(path: Path, *, output: str | os.PathLike[str]) -> int:
    """Lock a folder, or a file that is made if it is not there; another process that has it is an error."""
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    # the name can be guessed: in a folder that others write to, a link may wait there for what we would empty
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    foreign = f"{path.name!r} {_FOREIGN}"
    while True:
        if path.is_symlink():
            raise StoreError(foreign, path=os.fspath(output))
        descriptor = os.open(path, flags, 0o600)
        if not _is_ours(os.fstat(descriptor)):
            os.close(descriptor)
            raise StoreError(foreign, path=os.fspath(output))
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            problem = "is being written by another process; wait for it, or set output to another name"
            raise StoreError(problem, path=os.fspath(output)) from error
        except OSError as error:  # a file system without locks
            logger.debug("%s: no locks here (%s)", path, error)
        # between opening and locking, its owner may have finished: then this is the complete file by now
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


_FOREIGN = "beside it is a link, or a file of another user; remove it, or set output to another folder"


def _is_ours(found: os.stat_result) -> bool:
    """Tell whether a file or folder is this user's alone: a second name would be emptied with it."""
    is_owner = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    return is_owner and (stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1))


def check_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Raise if a folder cannot or must not be written as a whole, before any work is done."""
    target = Path(os.path.realpath(path))
    take_back(target)
    problem = None
    if target.exists() and not target.is_dir():
        problem = "is a file, expected a folder; set output to another name"
    elif target.is_dir() and any(target.iterdir()):
        problem = _folder_problem(target) if overwrite else _EXISTS
    if problem is not None:
        raise StoreError(problem, path=os.fspath(path))
    check_parent(path)
    return target


_EXISTS = Problem("exists already", Remedy("overwrite", True), ", or choose another output")


def _folder_problem(target: Path) -> str | None:
    """Return why a folder is not replaced: genoembed did not write it, or it holds files of others."""
    try:
        listed = set(json.loads((target / MARKER).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"holds no {MARKER}, so genoembed did not write it; set output to another name, or remove it"
    foreign = sorted(set(_files_of(target)) - listed - {MARKER})
    if foreign:
        return f"holds {foreign[0]!r}, which genoembed did not write; move it, or set output to another name"
    return None


@contextmanager
def replacing_folder(output: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder next to an output, which becomes the output unless there is an error.

    The old folder stays until the new one is on the disk; then the two are exchanged, and the old one goes.
    """
    target = check_folder(output, overwrite=overwrite)
    part = partial_of(target)
    with reporting_writes(output):
        part.mkdir(exist_ok=True)
        descriptor = claim(part, output=output)
    try:
        with reporting_writes(output):
            yield part
            (part / MARKER).write_text(json.dumps({"files": sorted(_files_of(part))}, indent=1))
            for name in _files_of(part):
                _sync_file(part / name)
            check_folder(output, overwrite=overwrite)
            put_in_place(part, target)
            _sync_folder(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(descriptor)


def _files_of(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]


def put_in_place(part: Path, target: Path) -> None:
    """Rename a complete folder to its target; what was there has the partial name afterwards, or is gone."""
    if not target.exists():
        part.rename(target)
    elif not _exchange(part, target):
        aside = target.with_name(f".{target.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        part.rename(target)  # killed before this line: ``take_back`` helps
        shutil.rmtree(aside, ignore_errors=True)


def take_back(target: Path) -> None:
    """Give an old folder its name again, if a process was killed between the two renames of a replacement."""
    aside = target.with_name(f".{target.name}.old")
    if aside.is_dir() and not target.exists():
        aside.rename(target)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step, so that a kill leaves the old folder or the new one (Linux only)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library from before 2018
        return False
    names = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second))
    return bool(renameat2(*names, _RENAME_EXCHANGE) == 0)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


class AtomicFile:
    """A binary file for h5py to write to, under a temporary name until it is complete.

    The temporary file is in the target's folder as ``.NAME.partial``, locked, and only its owner can read
    it. The finished file has the mode that the user's umask gives to new files. A ``with`` that
    ends without an error commits it, any other discards it.
    """

    def __init__(self, target: Path, *, staging: Path | None = None) -> None:
        self.target = target
        self.temporary = partial_of((staging or target.parent) / target.name)
        self.error: BaseException | None = None
        """What ended the first write that failed (Ctrl-C included); nothing is written after it."""
        self._unwritten: list[tuple[int, bytes]] = []
        self._raw = os.fdopen(claim(self.temporary, output=target), "r+b", buffering=0)

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, exception_type: object, *exception: object) -> None:
        try:
            if exception_type is None:
                self.commit()
        finally:
            self.discard()

    def write(self, buffer: memoryview) -> int:
        """Write all of a buffer, or keep the error."""
        view = memoryview(buffer).cast("B")
        offset = self._raw.tell()
        self._keeping_errors(lambda: self._write_all(view))
        if self.error is not None:
            self._unwritten.append((offset, bytes(view)))
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        written = 0
        while written < len(view):
            written += self._raw.write(view[written:])

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer from the current position."""
        view = memoryview(buffer).cast("B")
        start = self._raw.tell()
        filled = 0
        while filled < len(view) and (count := self._raw.readinto(view[filled:])):
            filled += count
        # what the disk refused overlays what it has, so that HDF5 finds its bytes where it put them
        for offset, content in self._unwritten:
            first, last = max(start, offset), min(start + len(view), offset + len(content))
            if first < last:
                view[first - start : last - start] = content[first - offset : last - offset]
                filled = max(filled, last - start)
        return filled

    def read(self, size: int = -1) -> bytes:
        """Read from the current position (h5py knows a file by this method)."""
        return self._raw.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position."""
        if whence == os.SEEK_END:
            ends = [
                self._raw.seek(0, os.SEEK_END),
                *(start + len(content) for start, content in self._unwritten),
            ]
            return self._raw.seek(max(ends) + offset)
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        """Return the current position."""
        return self._raw.tell()

    def truncate(self, size: int) -> int:
        """Set the length of the file, or keep the error."""
        self._keeping_errors(lambda: self._raw.truncate(size))
        return size

    def _keeping_errors(self, action: Callable[[], object]) -> None:
        """Run an action, unless one failed before."""
        if self.error is not None:
            return
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - raised again outside HDF5, by ``commit`` at the latest
            self.error = error

    def flush(self) -> None:
        """Do nothing: writes are not buffered here."""

    def check(self) -> None:
        """Raise what ended the first write that failed; call this now and then outside HDF5."""
        if self.error is not None:
            raise self.error

    def commit(self) -> None:
        """Flush the file to the disk and rename it to its final name; call this after HDF5 has closed it."""
        self.check()
        # bytes before the name: after a power cut the name must not stand for what never reached the disk
        os.fsync(self._raw.fileno())
        self.temporary.chmod(0o666 & ~_umask())
        self.temporary.replace(self.target)
        self._raw.close()  # and with it the lock, once the name is taken
        # the name itself is kept in the folder, which has a cache of its own
        _sync_folder(self.target.parent)

    def discard(self) -> None:
        """Remove the temporary file, if it is there."""
        if not self._raw.closed:
            self.temporary.unlink(missing_ok=True)
            self._raw.close()


def _umask() -> int:
    """Read the mode bits that new files of this process do not get; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can do that for folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _FOLDER_SYNC_UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int | None:
    """Return how much may still be written."""
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        logger.debug("%s: free space is not known (%s)", folder, error)
        return None


def check_space(folder: Path, needed: int, *, what: str) -> None:
    """Raise if a disk has no room for what is to be written."""
    free = free_bytes(folder)
    if free is not None and free < needed:
        problem = (
            f"{what} needs {needed / 1e6:,.1f} MB, but the disk has {free / 1e6:,.1f} MB left; finished "
            "units are kept: free some space, then run the same command again"
        )
        raise StoreError(problem, path=str(folder))
