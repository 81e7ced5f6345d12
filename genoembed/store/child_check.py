"""Try a file that has no seal in a process of its own, before this one opens it.

HDF5 can crash or hang on bytes that make no sense. A file of another program, or one that was changed since
it was written, is therefore walked through once by a short-lived child: if that ends in good order, however
the file reads, this process may read it too. A sealed file needs none of this.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from genoembed.errors import StoreFormatError

if TYPE_CHECKING:
    from pathlib import Path


_LOG = logging.getLogger(__name__)

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from genoembed.store.trial import main; main(sys.argv[2])"
)
ORDERLY = b"walked through"
"""What the child says at its end."""
_WALL_SECONDS = 600
"""For a child that waits without computing: a disk that does not answer."""


def check_in_child(path: Path) -> None:
    """Let a child process walk through a file.

    Takes about a third of a second for a small file. The child may compute for four seconds, and one more for
    every 50 MB.
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
        is_orderly = done.returncode == 0 and ORDERLY in done.stdout
        reason = f"ended with status {done.returncode}"
    except subprocess.TimeoutExpired:
        is_orderly, reason = False, f"took over {_WALL_SECONDS} s"
    if not is_orderly:
        problem = (
            f"cannot be read: HDF5 crashed or hung on it in a trial (which {reason}), the file is damaged; "
            "make it again or restore it from a copy"
        )
        raise StoreFormatError(problem, path=str(path))
