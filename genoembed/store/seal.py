"""A checksum behind the end of a file, so that HDF5 never parses damaged bytes.

The HDF5 library trusts what it reads: a flipped bit in an index or in the heap of the texts can crash the
process or keep it busy forever. The seal is a SHA-256 of everything but the chunks of numbers (which are
only copied), and stands behind what HDF5 calls the end of the file, where HDF5 does not look. Programs that
change the file cut it off. In: a finished file. Out: whether its seal holds. ``docs/FORMAT.md`` has the
details.

Files without a seal are opened only after a process of their own got through them unharmed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import struct
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import h5py
import numpy as np

from genoembed.errors import GenoembedError, StoreError, StoreFormatError
from genoembed.store.layout import read_layout
from genoembed.store.schema import DAMAGE, check_size, reading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import FileIO

    from numpy.typing import NDArray

    from genoembed.atomic import AtomicFile


MAGIC = b"genoembed-seal-1"
_TRAILER = struct.Struct("<32sQQ16s")
"""SHA-256, number of gaps, end of the HDF5 file, magic."""
_GAP = np.dtype("<u8")
_NUMBERS = "iufb"
_BLOCK_BYTES = 1 << 20
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# HDF5 File Format Specification, level 0A, for addresses of 8 bytes, as h5py writes them
_SUPERBLOCK_ENDS = {0: 40, 1: 44, 2: 28, 3: 28}
"""By version of the superblock: where it says how long the file is."""


def number_chunks(hdf5: h5py.File) -> NDArray[np.uint64]:
    """List where the chunks of numbers lie: the bytes that a seal leaves out."""
    hdf5.flush()  # what waits in HDF5's cache has no place yet
    found: list[tuple[int, int]] = []

    def visit(name: bytes) -> None:
        # most objects are scalars: each as an object of h5py's takes longer than all that is looked up here
        node = h5py.h5o.open(hdf5.id, name)
        if not isinstance(node, h5py.h5d.DatasetID):
            return
        if node.get_create_plist().get_layout() == h5py.h5d.CHUNKED and node.dtype.kind in _NUMBERS:
            found.extend(_chunks(h5py.Dataset(node)))

    h5py.h5o.visit(hdf5.id, visit)
    joined: list[list[int]] = []
    # chunks mostly follow one another: joined, the list is some lines long, not as long as the file
    for offset, size in sorted(found):
        if joined and sum(joined[-1]) == offset:
            joined[-1][1] += size
        else:
            joined.append([offset, size])
    return np.array(joined, _GAP).reshape(-1, 2)


def _chunks(dataset: h5py.Dataset) -> Iterator[tuple[int, int]]:
    steps = (range(0, size, step) for size, step in zip(dataset.shape, dataset.chunks, strict=True))
    for place in itertools.product(*steps):
        chunk = dataset.id.get_chunk_info_by_coord(place)
        if chunk.byte_offset is not None and chunk.size:  # a chunk that was never written has no place
            yield chunk.byte_offset, chunk.size


def write_seal(file: AtomicFile, gaps: NDArray[np.uint64]) -> None:
    """Append the seal to a file that HDF5 has closed."""
    end = file.seek(0, os.SEEK_END)
    digest = _digest(file, end, gaps)
    file.seek(0, os.SEEK_END)
    file.write(memoryview(gaps.tobytes() + _TRAILER.pack(digest, len(gaps), end, MAGIC)))


def _digest(file: AtomicFile | FileIO, end: int, gaps: NDArray[np.uint64]) -> bytes:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    start = 0
    for offset, size in itertools.chain(gaps.tolist(), [(end, 0)]):
        file.seek(start)
        while start < offset:
            count = file.readinto(buffer[: min(len(buffer), offset - start)])
            if not count:
                message = f"the file ends at byte {start}, before byte {end}"
                raise OSError(message)
            digest.update(buffer[:count])
            start += count
        start = offset + size
    # the list of gaps as well: damage in it could take any bytes out of the digest
    digest.update(gaps.tobytes() + end.to_bytes(8, "little"))
    return digest.digest()


def has_seal(path: Path) -> bool:
    """Return whether a file ends with a seal, without checking it."""
    with path.open("rb", buffering=0) as file:
        return _read(file, max(0, file.seek(0, os.SEEK_END) - len(MAGIC)), len(MAGIC)) == MAGIC


def check_seal(path: Path) -> bool:
    """Compare a file with its seal, without HDF5."""
    try:
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            _check_superblock(file, size, path)
            return _holds(file, size, path)
    except StoreError:
        raise
    except OSError as error:
        reason = error.strerror or error
        problem = f"cannot be opened ({reason}), expected an embedding file; check its name and permissions"
        if any((path / name).is_file() for name in (".zgroup", "zarr.json")):
            problem = (
                f"cannot be opened ({reason}): it is a Zarr store, expected an HDF5 file; read it with "
                "anndata.read_zarr and save it with write_h5ad"
            )
        raise StoreError(problem, path=str(path)) from error


def _check_superblock(file: AtomicFile | FileIO, size: int, path: Path) -> None:
    if not size:
        problem = "is empty, expected an HDF5 file; make it again"
        raise StoreFormatError(problem, path=str(path))
    head = _read(file, 0, 64)
    if not head.startswith(_SIGNATURE):
        # HDF5 lets others put something in front: 512 bytes, or 1024, 2048 ...
        starts = itertools.takewhile(lambda start: start < size, (512 << power for power in range(40)))
        if any(_read(file, start, 8) == _SIGNATURE for start in starts):
            return
        problem = "is not an HDF5 file, expected one that genoembed wrote; check the path"
        raise StoreFormatError(problem, path=str(path))
    place = _SUPERBLOCK_ENDS.get(head[8] if len(head) > 8 else -1)
    end = None if place is None else int.from_bytes(head[place : place + 8], "little")
    if place is None or len(head) < place + 8 or (end is not None and end > size):
        problem = (
            f"is cut off or damaged: it has {size} bytes, expected {end}; make it again or restore it "
            "from a copy"
        )
        raise StoreFormatError(problem, path=str(path))


def _holds(file: AtomicFile | FileIO, size: int, path: Path) -> bool:
    trailer = _read(file, max(0, size - _TRAILER.size), _TRAILER.size)
    if len(trailer) < _TRAILER.size or not trailer.endswith(MAGIC):
        return False
    expected, num_gaps, end, _ = _TRAILER.unpack(trailer)
    if end + num_gaps * 2 * _GAP.itemsize + _TRAILER.size == size:
        gaps = np.frombuffer(_read(file, end, num_gaps * 2 * _GAP.itemsize), _GAP).reshape(-1, 2)
        # checked before they are used: damaged gaps could point behind the file, or back and round in it
        if _are_gaps(gaps, end) and _digest(file, end, gaps) == expected:
            return True
    problem = (
        "is not what was written: its checksum differs, so the file is damaged; make it again or restore it "
        "from a copy"
    )
    raise StoreFormatError(problem, path=str(path))


def _are_gaps(gaps: NDArray[np.uint64], end: int) -> bool:
    offsets, sizes = gaps[:, 0], gaps[:, 1]
    if not len(gaps):
        return True
    is_inside = bool((offsets <= end).all() and (sizes <= end - offsets).all())
    return is_inside and bool((offsets[1:] >= offsets[:-1] + sizes[:-1]).all())


def _read(file: AtomicFile | FileIO, start: int, size: int) -> bytes:
    buffer = bytearray(size)
    file.seek(start)
    filled = 0
    while filled < size and (count := file.readinto(memoryview(buffer)[filled:])):
        filled += count
    return bytes(buffer[:filled])


_LOG = logging.getLogger(__name__)

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from genoembed.store.seal import walk_in_child as walk; walk(sys.argv[2])"
)
_ORDERLY = b"walked through"
"""What the child says at its end: a status of 0 alone could come from any crash handler."""
_WALL_SECONDS = 600
"""For a child that waits without computing: a disk that does not answer."""
_CPU_SECONDS, _BYTES_PER_SECOND = 4, 50_000_000
_SMALL_BYTES = 1 << 20
_ORDERLY_ERRORS = (*DAMAGE, MemoryError, GenoembedError)


def open_hdf5(path: Path, *, untrusted: bool = False) -> h5py.File:
    """Open a file for reading, or say why that cannot be.

    HDF5 sees it only if its seal holds, or a child process got through it unharmed.
    """
    if not check_seal(path) or untrusted:
        check_in_child(path)
    with reading(str(path)):
        hdf5 = h5py.File(path, "r", locking="best-effort")
        try:
            check_storage(hdf5, str(path))
        except BaseException:
            hdf5.close()
            raise
    return hdf5


def check_in_child(path: Path) -> None:
    """Make a child process walk through a file.

    Takes about a third of a second for a small file. The child may compute for four seconds, and one more for
    every 50 MB.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        _LOG.warning("%s: has no seal, and there is no Python to try it with; it is opened as it is", path)
        return
    _LOG.info("%s: has no seal, so it is tried in a process of its own first", path)
    # -I: the working folder and the environment must not decide which code the child runs
    words = [sys.executable, "-I", "-c", _CHILD, json.dumps(sys.path), str(path.absolute())]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            timeout=_WALL_SECONDS,
            check=False,
        )
        is_orderly = done.returncode == 0 and _ORDERLY in done.stdout
        reason = f"ended with status {done.returncode}"
    except subprocess.TimeoutExpired:
        is_orderly, reason = False, f"took over {_WALL_SECONDS} s"
    if not is_orderly:
        problem = (
            f"cannot be read: HDF5 crashed or hung on it in a trial (which {reason}), the file is damaged; "
            "make it again or restore it from a copy"
        )
        raise StoreFormatError(problem, path=str(path))


def walk_in_child(path: str) -> None:
    """Walk through a file, as the child process: the way it ends is the answer."""
    with suppress(ImportError):
        import resource

        seconds = _CPU_SECONDS + Path(path).stat().st_size // _BYTES_PER_SECOND
        # the kernel ends a loop inside HDF5, which no Python signal handler could
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    walk(Path(path))
    sys.stdout.buffer.write(_ORDERLY)


def walk(path: Path) -> None:
    """Touch everything in a file that HDF5 has to make sense of; errors are in order, crashes are the point.

    Texts and attributes are read; of large numbers, the chunks are looked up.
    """
    with suppress(*_ORDERLY_ERRORS), h5py.File(path, "r", locking="best-effort") as hdf5:
        check_storage(hdf5, str(path))  # before anything is read, as where it will be read
        _quietly(lambda: read_layout(hdf5, str(path)))

        def visit(name: str, node: h5py.Group | h5py.Dataset) -> None:
            with suppress(*_ORDERLY_ERRORS):
                for key in list(node.attrs):
                    _quietly(partial(node.attrs.__getitem__, key))
            if isinstance(node, h5py.Dataset):
                _quietly(lambda: _touch(node, str(path)))

        visit("/", hdf5)
        hdf5.visititems(visit)


def _quietly(action: Callable[[], object]) -> None:
    with suppress(*_ORDERLY_ERRORS):
        action()


def _touch(dataset: h5py.Dataset, path: str) -> None:
    check_size(dataset, path)
    if dataset.dtype.kind == "O" or dataset.nbytes <= _SMALL_BYTES:
        dataset[()]
        return
    for row in range(0, dataset.shape[0], dataset.chunks[0] if dataset.chunks else dataset.shape[0]):
        dataset[row : row + 1]


_LAYOUTS = {h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED}
_FILTERS = {
    h5py.h5z.FILTER_DEFLATE: "gzip",
    h5py.h5z.FILTER_SHUFFLE: "shuffle",
    h5py.h5z.FILTER_FLETCHER32: "fletcher32",
    h5py.h5z.FILTER_LZF: "lzf",
}
"""Those that are part of h5py: others are loaded from a folder of plugins."""
_TYPES = {h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.STRING, h5py.h5t.ENUM}
_LINKS = {
    h5py.h5l.TYPE_SOFT: "a soft link",
    h5py.h5l.TYPE_EXTERNAL: "a link to another file",
}
_DEPTH = 32


def check_storage(hdf5: h5py.File, path: str) -> None:
    """Refuse a file that has anything but groups and data sets of its own, by hard links."""
    seen: set[int] = set()
    for where, node in _objects(hdf5.id, "", path, seen, 0):
        if isinstance(node, h5py.h5d.DatasetID):
            _check_dataset(node, where, path)


def _objects(
    group: h5py.h5g.GroupID, where: str, path: str, seen: set[int], depth: int
) -> Iterator[tuple[str, h5py.h5g.GroupID | h5py.h5d.DatasetID]]:
    if depth > _DEPTH:
        _refuse_storage(where, "lies deeper than any group of ours", path)
    for name in group:
        place = f"{where}/{name.decode('utf-8', 'replace')}"
        kind = group.links.get_info(name).type
        if kind != h5py.h5l.TYPE_HARD:  # told before anything is opened: opening is what follows a link
            _refuse_storage(place, f"is {_LINKS.get(kind, 'a link of an unknown kind')}", path)
        address = h5py.h5o.get_info(group, name).addr
        if address in seen:
            continue
        seen.add(address)
        node = h5py.h5o.open(group, name)
        if not isinstance(node, h5py.h5g.GroupID | h5py.h5d.DatasetID):
            _refuse_storage(place, "is neither a group nor a data set", path)
        yield place, node
        if isinstance(node, h5py.h5g.GroupID):
            yield from _objects(node, place, path, seen, depth + 1)


def _check_dataset(dataset: h5py.h5d.DatasetID, where: str, path: str) -> None:
    plan = dataset.get_create_plist()
    if plan.get_layout() not in _LAYOUTS:
        _refuse_storage(where, "is put together from other data sets (virtual storage)", path)
    if plan.get_external_count():
        _refuse_storage(where, "keeps its values in another file (external storage)", path)
    filters = [plan.get_filter(number)[0] for number in range(plan.get_nfilters())]
    if strange := [number for number in filters if number not in _FILTERS]:
        _refuse_storage(
            where, f"is packed by filter {strange[0]}, expected {', '.join(_FILTERS.values())}", path
        )
    if not _is_plain(dataset.get_type(), 0):
        _refuse_storage(where, "has values that are no numbers or texts, such as references", path)


def _is_plain(kind: h5py.h5t.TypeID, depth: int) -> bool:
    if depth > _DEPTH:
        return False
    found = kind.get_class()
    if found == h5py.h5t.COMPOUND:
        members = (kind.get_member_type(number) for number in range(kind.get_nmembers()))
        return all(_is_plain(member, depth + 1) for member in members)
    if found in {h5py.h5t.VLEN, h5py.h5t.ARRAY}:
        return _is_plain(kind.get_super(), depth + 1)
    return found in _TYPES


def _refuse_storage(where: str, what: str, path: str) -> NoReturn:
    problem = (
        f"{where} {what}, expected groups and data sets of the file itself; do not read it, or copy what you "
        "need of it to a new file"
    )
    raise StoreFormatError(problem, path=path)
