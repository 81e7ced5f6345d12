"""What all tests of training share: garbage collections that look at what a run has made alone."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="package", autouse=True)
def _imports_are_no_garbage() -> Iterator[None]:
    """Leave out what imports have made: each run of a Trainer ends with a whole collection, half its time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
