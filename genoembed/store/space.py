"""Room on the disk: asked for before something large is written, so that a full disk is no surprise."""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING

from genoembed.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)


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
