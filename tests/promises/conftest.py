"""A folder with all that commands read, and a fresh copy for each test."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.promises.columns import build_world

if TYPE_CHECKING:
    from pathlib import Path

    from tests.promises.warm import WarmStarter


@pytest.fixture(scope="session")
def made(warm: WarmStarter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands read, made once."""
    folder = tmp_path_factory.mktemp("promises") / "world"
    folder.mkdir()
    build_world(folder, warm.run)
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A copy of what commands read, to run in."""
    return shutil.copytree(made, tmp_path / "world", symlinks=True)
