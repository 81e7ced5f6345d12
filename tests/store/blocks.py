"""Rows and blocks for the tests of the store."""

from __future__ import annotations

import numpy as np

from genoembed.contracts import EmbeddingBlock, ObsRow, TokenBlock
from genoembed.store import EmbeddingWriter


def obs_row(record_id, **fields):
    given = {
        "description": f"about {record_id}",
        "length": 12,
        "start": 3,
        "end": 15,
        "strand": "+",
        "source": "genome.fa",
        "n_windows": 1,
        "sha256": "ab" * 32,
        "flags": "masked:2",
        "unread": 4,
    }
    return ObsRow(id=record_id, **{**given, **fields})


def pooled_block(ids, layers=("blocks.1",), *, width=4, seed=0):
    generator = np.random.default_rng(seed)
    matrices = {name: generator.normal(size=(len(ids), width)).astype(np.float32) for name in layers}
    return EmbeddingBlock(rows=tuple(obs_row(record_id) for record_id in ids), matrices=matrices)


def token_block(lengths, layers=("blocks.1",), *, width=3, prefix="r", seed=0):
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    return TokenBlock(
        rows=tuple(obs_row(f"{prefix}{index}") for index in range(len(lengths))),
        lengths=np.array(lengths, np.int64),
        values={name: generator.normal(size=(total, width)).astype(np.float32) for name in layers},
        spans=side_by_side(lengths),
    )


def side_by_side(lengths):
    """Spans of two bases for each token of each record."""
    starts = np.concatenate([np.zeros(0, np.int64), *(2 * np.arange(length) for length in lengths)])
    return np.stack([starts, starts + 2], axis=1)


def write_file(path, *blocks, provenance=None, **options):
    kind = "tokens" if isinstance(blocks[0], TokenBlock) else "pooled"
    with EmbeddingWriter(path, kind=kind, **options) as writer:
        for block in blocks:
            writer.append(block)
        writer.finish({"version": "0"} if provenance is None else provenance)
    return path
