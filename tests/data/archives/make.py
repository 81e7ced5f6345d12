"""Make the files of ``v2``: what schema 2 looked like when it was released; those of ``v1`` are as they were.

Every later release reads them, so they are made once a schema version and never again.
Run from the root: ``python -m tests.data.archives.make FOLDER``. The values are k / 8, exact in float16.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from genoembed.contracts import EmbeddingBlock, ObsRow, TokenBlock
from genoembed.store import EmbeddingWriter

PROVENANCE = {
    "version": "1.0.0",
    "model": {"id": "genoembed-mini", "dtype": "float32"},
    "layers": ["blocks.28.mlp.l3", "blocks/10"],
    "pooling": "mean",
    "policies": {"invalid": "mask", "masked": 12},
    "inputs": [{"path": "genome.fa", "sha256": "00"}],
    "window": None,
    "note": "Grüße",
}


def obs_row(record_id: str, **fields: object) -> ObsRow:
    given = {
        "description": "",
        "length": 10,
        "start": 0,
        "end": 10,
        "strand": "+",
        "source": "genome.fa",
        "n_windows": 1,
        "sha256": "0f" * 32,
        "flags": "",
        "unread": 0,
    }
    return ObsRow(id=record_id, **{**given, **fields})


ROWS = (
    obs_row("chr1", description="first record", flags="masked:12"),
    obs_row("sp|P1/2|é ü", strand="-", start=5, end=15, source="other.fa.gz"),
    obs_row("ctg 3", n_windows=4, length=40, end=40, unread=6),
)


SPANS = np.array([[0, 6], [6, 10], [0, 6], [6, 12], [3, 40]])


def eighths(rows: int, width: int, first: int) -> np.ndarray:
    return (np.arange(rows * width, dtype=np.float32).reshape(rows, width) + first) / 8


def make_pooled(path: Path) -> None:
    matrices = {"blocks.28.mlp.l3": eighths(3, 4, -5), "blocks/10": eighths(3, 2, 100)}
    with EmbeddingWriter(path, kind="pooled") as writer:
        writer.append(EmbeddingBlock(rows=ROWS, matrices=matrices))
        writer.finish(PROVENANCE)


def make_tokens(path: Path) -> None:
    values = {"blocks.28.mlp.l3": eighths(5, 4, -5), "blocks/10": eighths(5, 2, 100)}
    with EmbeddingWriter(path, kind="tokens", dtype="float16") as writer:
        writer.append(TokenBlock(rows=ROWS, lengths=np.array([2, 0, 3]), values=values, spans=SPANS))
        writer.finish({**PROVENANCE, "pooling": "none"})


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    make_pooled(folder / "pooled.h5")
    make_tokens(folder / "tokens.h5")
