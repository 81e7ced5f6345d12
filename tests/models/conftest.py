"""Tiny folders, written once a session, and models loaded from them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

from genoembed.contracts import Batch
from genoembed.models.load import load_model
from tests.tiny_models import FAMILIES, build_tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from genoembed.models.genomic_model import GenomicModel


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a family; callers must not change it."""
    root = tmp_path_factory.mktemp("tiny")
    return cache(lambda family: build_tiny(family, root / family))


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Callable[[str], Path]) -> Callable[[str], GenomicModel]:
    """Load a family's tiny model, once."""
    return cache(
        lambda family: load_model(
            str(tiny_folder(family)),
            device="cpu",
            dtype="float32",
            trust_remote_code=family == "custom_conv",
        )
    )


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return request.param


def make_batch(*rows: list[int], pad_id: int = 1) -> Batch:
    """Pad rows of ids on the right."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return Batch(input_ids=ids, attention_mask=mask, pool_mask=mask.bool(), rows=tuple(range(len(rows))))


@pytest.fixture
def batch() -> Batch:
    """Two rows of ten letters, no padding."""
    return make_batch([5, 6, 7, 8, 5, 5, 8, 6, 7, 9], [8, 8, 5, 6, 6, 7, 9, 5, 7, 6])


@pytest.fixture
def padded_batch() -> Batch:
    """Rows of ten, four and one letters."""
    return make_batch([5, 6, 7, 8, 5, 5, 8, 6, 7, 9], [8, 8, 5, 6], [7])
