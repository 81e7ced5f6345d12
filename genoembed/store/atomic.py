"""A file that appears complete or not at all, and that survives a full disk.

HDF5 must never see a failed write: when a chunk cannot be written while a file is closed, the library keeps
the broken file open and the process crashes (segmentation fault) as it exits. h5py therefore writes through
this object, which keeps the first error, holds what could not be written in memory, so that HDF5 reads back
what it wrote, and lets HDF5 close in peace. The file is then thrown away.

Room on the disk: asked for before something large is written, so that a full disk is no surprise.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from genoembed.errors import GenoembedError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


logger = logging.getLogger(__name__)

_FOLDER_SYNC_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM}


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Refuse an output that cannot or must not be written, before any work is done."""
    target = Path(os.path.realpath(path))
    problem = None
    if os.fspath(path) == "-":
        problem = "HDF5 cannot be written to standard output; set output to a file name"
    elif target.is_dir():
        problem = "is a folder, expected a file name; set output to a file inside it"
    elif target.exists() and not target.is_file():
        problem = "is a device or pipe, expected a regular file; set output to a file name"
    elif target.exists() and not overwrite:
        problem = "exists already; set overwrite to true, or output to another name"
    elif not target.parent.is_dir():
        problem = f"folder {str(target.parent)!r} does not exist; make it, or set output to another folder"
    elif not os.access(target.parent, os.W_OK | os.X_OK):
        problem = f"folder {str(target.parent)!r} cannot be written to; set output to another folder"
    if problem is not None:
        raise StoreError(problem, path=str(path))
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
    except OSError as error:
        if isinstance(error, GenoembedError) or os.fspath(output) == "-":
            raise
        problem = f"cannot be written ({error.strerror or error}); free space, or set output to another name"
        raise StoreError(problem, path=os.fspath(output)) from error


@contextmanager
def replacing(output: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary path beside an output, whose file becomes the output unless there is an error."""
    target = check_output(output, overwrite=overwrite)
    part = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        yield part
        check_output(output, overwrite=overwrite)  # work takes time, and another process may have written it
        with reporting_writes(output):
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.replace(target)
            _sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)


class AtomicFile:
    """A binary file for h5py to write to, under a temporary name until it is complete.

    The temporary file lies in the target's folder as ``.NAME.RANDOM.tmp`` and only its owner can read it. The
    finished file has the mode that the user's umask gives to new files. A ``with`` that ends without an error
    commits it, any other discards it.
    """

    def __init__(self, target: Path, *, staging: Path | None = None) -> None:
        self.target = target
        self.temporary = (staging or target.parent) / f".{target.name[:100]}.{secrets.token_hex(8)}.tmp"
        self.error: BaseException | None = None
        """What ended the first write that failed (Ctrl-C included); nothing is written after it."""
        self._unwritten: list[tuple[int, bytes]] = []
        self._raw = self.temporary.open("x+b", buffering=0)
        self._final_mode = self.temporary.stat().st_mode & 0o777
        self.temporary.chmod(0o600)

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

    def commit(self) -> None:
        """Bring the file to the disk and give it its name; call it after HDF5 has closed."""
        if self.error is not None:
            raise self.error
        # bytes before the name: after a power cut the name must not stand for what never reached the disk
        os.fsync(self._raw.fileno())
        self._raw.close()
        self.temporary.chmod(self._final_mode)
        self.temporary.replace(self.target)
        # the name itself is kept in the folder, which has a cache of its own
        _sync_folder(self.target.parent)

    def discard(self) -> None:
        """Remove the temporary file, if it is there."""
        self._raw.close()
        self.temporary.unlink(missing_ok=True)


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
    """Tell how much may still be written."""
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        logger.debug("%s: free space is not known (%s)", folder, error)
        return None


def check_space(folder: Path, needed: int, *, what: str) -> None:
    """Refuse to write what a disk has no room for."""
    free = free_bytes(folder)
    if free is not None and free < needed:
        problem = (
            f"{what} needs {needed / 1e6:,.1f} MB, but the disk has {free / 1e6:,.1f} MB left; finished "
            "units are kept: free some space, then run the same command again"
        )
        raise StoreError(problem, path=str(folder))
