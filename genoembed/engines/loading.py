"""Load the model that a configuration names, under the number of threads that it asks for."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from genoembed.models.load import load_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from genoembed.config import ModelConfig
    from genoembed.models.genomic_model import GenomicModel


def load_configured(config: ModelConfig) -> GenomicModel:
    """Load a model."""
    return load_model(
        config.model,
        device=config.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
    )


@contextmanager
def use_threads(wanted: int | None) -> Iterator[None]:
    """Set torch's number of threads, and set it back."""
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        if wanted is not None:
            torch.set_num_threads(before)
