"""Small embedding files with three clear groups, for the maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import h5py
import numpy as np

from genoembed.contracts import EmbeddingBlock, ObsRow
from genoembed.store.writer import EmbeddingWriter

if TYPE_CHECKING:
    from pathlib import Path

NASTY = "</script><b>bold</b>&amp; 'quoted' \"too\""
WIDTH = 12


def write_map_file(
    path: Path, *, num_rows: int = 60, failed: tuple[int, ...] = (), nan: tuple[int, ...] = ()
):
    """Write rows in three groups, ``group = row % 3``; gives the vectors."""
    generator = np.random.default_rng(3)
    centers = generator.normal(size=(3, WIDTH)) * 8
    vectors = (centers[np.arange(num_rows) % 3] + generator.normal(size=(num_rows, WIDTH))).astype(np.float32)
    vectors[list(failed)] = np.nan
    rows = tuple(
        ObsRow(
            id="r1/x" if row == 1 else f"r{row}",
            description=NASTY if row == 0 else f"record number {row}",
            length=100 + 10 * row,
            start=0,
            end=100 + 10 * row,
            strand="+-"[row % 2],
            source="a.fa",
            n_windows=1,
            sha256="",
            flags="failed:nothing left to pool" if row in failed else "rna" if row == 2 else "",
        )
        for row in range(num_rows)
    )
    with EmbeddingWriter(path, kind="pooled") as writer:
        writer.append(EmbeddingBlock(rows=rows, matrices={"blocks.1": vectors}))
        writer.finish({"genoembed_version": "0"})
    if nan:  # which a writer refuses
        with h5py.File(path, "r+") as file:
            file["X"][list(nan)] = np.nan
    return vectors


def write_values(path: Path, *, num_rows: int = 60) -> None:
    """Write a table: a class (missing for row 4), a number and a cluster for each row, and a stranger."""
    lines = ["id\tkind\tgc\tcluster"]
    for row in range(num_rows):
        name = "r1/x" if row == 1 else f"r{row}"
        lines.append(f"{name}\t{'NA' if row == 4 else 'abc'[row % 3]}\t{row / num_rows:.3f}\t{row % 3}")
    path.write_text("\n".join([*lines, "stranger\ta\t0.5\t0"]) + "\n")
