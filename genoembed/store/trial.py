"""The child process of ``quarantine``: walk through a file, and let the way it ends be the answer."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import h5py

from genoembed.errors import GenoembedError
from genoembed.store.child_check import ORDERLY
from genoembed.store.layout import check_size, read_layout

_CPU_SECONDS = 4
_BYTES_PER_SECOND = 50_000_000
_SMALL_BYTES = 1 << 20


def main(path: str) -> None:
    """Walk through a file, as the child process: the way it ends is the answer."""
    with contextlib.suppress(ImportError):
        import resource

        seconds = _CPU_SECONDS + Path(path).stat().st_size // _BYTES_PER_SECOND
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    walk(Path(path))
    sys.stdout.buffer.write(ORDERLY)


def walk(path: Path) -> None:
    """Touch everything in a file that HDF5 has to make sense of; errors are in order, crashes are the point.

    Texts and attributes are read; of large numbers, the chunks are looked up.
    """
    errors = (
        OSError,
        RuntimeError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        MemoryError,
        GenoembedError,
    )
    with contextlib.suppress(*errors), h5py.File(path, "r", locking="best-effort") as hdf5:
        with contextlib.suppress(*errors):
            read_layout(hdf5, str(path))

        def visit(name: str, node: h5py.Group | h5py.Dataset) -> None:
            for key in _quiet(lambda: list(node.attrs), errors) or []:
                _quiet(lambda key=key: node.attrs[key], errors)
            if isinstance(node, h5py.Dataset):
                _quiet(lambda: _touch(node, str(path)), errors)

        visit("/", hdf5)
        with contextlib.suppress(*errors):
            hdf5.visititems(visit)


def _quiet(action: Any, errors: tuple[type[Exception], ...]) -> Any:
    with contextlib.suppress(*errors):
        return action()
    return None


def _touch(dataset: h5py.Dataset, path: str) -> None:
    check_size(dataset, path)
    if dataset.dtype.kind == "O" or dataset.nbytes <= _SMALL_BYTES:
        dataset[()]
        return
    for row in range(0, dataset.shape[0], dataset.chunks[0] if dataset.chunks else dataset.shape[0]):
        dataset[row : row + 1]
