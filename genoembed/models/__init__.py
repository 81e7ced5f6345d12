"""Models: load any genomic language model, name its layers, capture what they return."""

from __future__ import annotations

from genoembed.models.genomic_model import GenomicModel
from genoembed.models.hooks import capture
from genoembed.models.layers import LayerSpec, list_layers, resolve_layers
from genoembed.models.load import load_model
from genoembed.models.registry import KnownModel, find_model, known_models

__all__ = [
    "GenomicModel",
    "KnownModel",
    "LayerSpec",
    "capture",
    "find_model",
    "known_models",
    "list_layers",
    "load_model",
    "resolve_layers",
]
