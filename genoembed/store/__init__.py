"""Embedding files: ``EmbeddingWriter`` makes them, ``open_embeddings`` reads them (``docs/FORMAT.md``)."""

from __future__ import annotations

from genoembed.store.atomic import check_output
from genoembed.store.reader import EmbeddingDataset, EmbeddingFile, open_embeddings
from genoembed.store.schema import SCHEMA_VERSION
from genoembed.store.writer import EmbeddingWriter

__all__ = [
    "SCHEMA_VERSION",
    "EmbeddingDataset",
    "EmbeddingFile",
    "EmbeddingWriter",
    "check_output",
    "open_embeddings",
]
