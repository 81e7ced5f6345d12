"""A checksum behind the end of a file, so that HDF5 never parses damaged bytes.

The HDF5 library trusts what it reads: a flipped bit in an index or in the heap of the texts can crash the
process or keep it busy forever. The seal is a SHA-256 of everything but the chunks of numbers (which are
only copied), and stands behind what HDF5 calls the end of the file, where HDF5 does not look. Programs that
change the file cut it off. In: a finished file. Out: whether its seal holds. ``docs/FORMAT.md`` has the
details.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
from typing import TYPE_CHECKING

import h5py
import numpy as np

from genoembed.errors import StoreError, StoreFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import FileIO
    from pathlib import Path

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

    def visit(name: str, node: h5py.Group | h5py.Dataset) -> None:
        if isinstance(node, h5py.Dataset) and node.chunks and node.dtype.kind in _NUMBERS:
            found.extend(_chunks(node))

    hdf5.visititems(visit)
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
        problem = f"cannot be opened ({reason}), expected an embedding file; check the path and its rights"
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
