"""Models: load any genomic language model, name its layers, capture what they return.

Public names load on first use, so that importing one architecture does not import all of transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genoembed.models.describe import ModelLayers, describe_layers
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.hooks import capture
    from genoembed.models.layers import list_layers, resolve_layers
    from genoembed.models.load import load_model
    from genoembed.models.registry import KnownModel, find_model, known_models

_HOMES = {
    "GenomicModel": "genoembed.models.genomic_model",
    "KnownModel": "genoembed.models.registry",
    "ModelLayers": "genoembed.models.describe",
    "capture": "genoembed.models.hooks",
    "describe_layers": "genoembed.models.describe",
    "find_model": "genoembed.models.registry",
    "known_models": "genoembed.models.registry",
    "list_layers": "genoembed.models.layers",
    "load_model": "genoembed.models.load",
    "resolve_layers": "genoembed.models.layers",
}

__all__ = [
    "GenomicModel",
    "KnownModel",
    "ModelLayers",
    "capture",
    "describe_layers",
    "find_model",
    "known_models",
    "list_layers",
    "load_model",
    "resolve_layers",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        message = f"module 'genoembed.models' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module(_HOMES[name]), name)
