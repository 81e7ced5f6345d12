"""Embedding files: ``EmbeddingWriter`` makes them, ``open_embeddings`` reads them (``docs/FORMAT.md``).

``Parts`` keeps the finished units of a run, and ``merge_parts`` joins them to its output.
"""

from __future__ import annotations

from genoembed.atomic import check_output, free_bytes
from genoembed.store.merging import (
    Merged,
    differences_from,
    find_merged,
    finish_removal,
    is_output_of,
    merge_parts,
    read_block,
)
from genoembed.store.parts import InputFacts, Manifest, Parts, UnitRecord, UnitRows, parts_folder
from genoembed.store.reader import EmbeddingDataset, EmbeddingFile, open_embeddings
from genoembed.store.schema import SCHEMA_VERSION
from genoembed.store.writer import EmbeddingWriter

__all__ = [
    "SCHEMA_VERSION",
    "EmbeddingDataset",
    "EmbeddingFile",
    "EmbeddingWriter",
    "InputFacts",
    "Manifest",
    "Merged",
    "Parts",
    "UnitRecord",
    "UnitRows",
    "check_output",
    "differences_from",
    "find_merged",
    "finish_removal",
    "free_bytes",
    "is_output_of",
    "merge_parts",
    "open_embeddings",
    "parts_folder",
    "read_block",
]
