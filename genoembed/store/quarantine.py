"""Try a file that has no seal in a process of its own, before this one opens it.

HDF5 can crash or hang on bytes that make no sense. A file of another program, or one that was changed since
it was written, is therefore walked through once by a short-lived child: if that ends in good order, however
the file reads, this process may read it too. A sealed file needs none of this.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py

from genoembed.errors import GenoembedError, StoreFormatError

_LOG = logging.getLogger(__name__)

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from genoembed.store.quarantine import main; main(sys.argv[2])"
)
_ORDERLY = b"walked through"
_CPU_SECONDS = 4
_BYTES_PER_SECOND = 50_000_000
_WALL_SECONDS = 600
"""For a child that waits without computing: a disk that does not answer."""
_SMALL_BYTES = 1 << 20


def check_in_child(path: Path) -> None:
    """Let a child process walk through a file.

    Takes about a third of a second for a small file. The child may compute for four seconds, and one more for
    every 50 MB.

    Args:
        path: The file.

    Raises:
        StoreFormatError: If the child crashed, or was not done in time.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        _LOG.warning("%s: has no seal, and there is no Python to try it with; it is opened as it is", path)
        return
    _LOG.info("%s: has no seal, so it is tried in a process of its own first", path)
    words = [sys.executable, "-I", "-c", _CHILD, json.dumps(sys.path), str(path.absolute())]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
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


def main(path: str) -> None:
    """Walk through a file, as the child process: the way it ends is the answer.

    Args:
        path: The file.
    """
    with contextlib.suppress(ImportError):
        import resource

        seconds = _CPU_SECONDS + Path(path).stat().st_size // _BYTES_PER_SECOND
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    walk(Path(path))
    sys.stdout.buffer.write(_ORDERLY)


def walk(path: Path) -> None:
    """Touch everything in a file that HDF5 has to make sense of; errors are in order, crashes are the point.

    Texts and attributes are read; of large numbers, the chunks are looked up.

    Args:
        path: The file.
    """
    from genoembed.store.layout import check_size, read_layout

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
                _quiet(lambda: _touch(node, str(path), check_size), errors)

        visit("/", hdf5)
        with contextlib.suppress(*errors):
            hdf5.visititems(visit)


def _quiet(action: Any, errors: tuple[type[Exception], ...]) -> Any:
    with contextlib.suppress(*errors):
        return action()
    return None


def _touch(dataset: h5py.Dataset, path: str, check_size: Any) -> None:
    check_size(dataset, path)
    if dataset.dtype.kind == "O" or dataset.nbytes <= _SMALL_BYTES:
        dataset[()]
        return
    for row in range(0, dataset.shape[0], dataset.chunks[0] if dataset.chunks else dataset.shape[0]):
        dataset[row : row + 1]
