"""Which rows of an embedding file a map shows, with their vectors.

In: an open pooled file. Out: the vectors of the rows that have one, and how many were left out and why.

N rows, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from genoembed.analysis.fitting import load_transform
from genoembed.analysis.recipes import check_comparable, recipe_of
from genoembed.analysis.vectors import VectorSource, usable_rows
from genoembed.errors import ConfigError
from genoembed.store.schema import has_failed

if TYPE_CHECKING:
    from os import PathLike

    from numpy.typing import NDArray

    from genoembed.analysis.transform import FittedTransform
    from genoembed.store import EmbeddingFile

_FEWEST = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class PointRows:
    """The rows that a map shows."""

    rows: NDArray[np.int64]
    """Their numbers in the file, rising, ``(N,)``."""
    vectors: NDArray[np.float32]
    """``(N, D)``."""
    layer: str
    """Which matrix they are of."""
    num_in_file: int
    """Rows of the file."""
    num_failed: int
    """Left out: the extraction gave them no vector and says so in their flags."""
    num_not_finite: int
    """Left out: among the rows that were looked at, those with NaN or infinity."""
    num_not_sampled: int
    """Left out by chance, because there were more than the map may show."""


def read_points(
    file: EmbeddingFile,
    *,
    layer: str | None = None,
    transform: str | PathLike[str] | None = None,
    max_points: int | None = None,
    seed: int = 0,
) -> PointRows:
    """Read the vectors that a map shows."""
    _ = file.X  # a per-token file says here that it has no row a record
    name = layer or file.layers[0]
    source = VectorSource(file[name], _load(file, name, transform))
    is_spoiled = np.array([has_failed(str(flags)) for flags in file.obs["flags"]], dtype=bool)
    candidates = np.flatnonzero(~is_spoiled)
    num_failed, num_left = len(file) - len(candidates), len(candidates)
    if max_points is not None and num_left > max_points:
        candidates = np.sort(np.random.default_rng(seed).choice(candidates, max_points, replace=False))
    rows, vectors = _finite(source, candidates)
    if len(rows) < _FEWEST:
        message = (
            f"{file.path}: {len(rows)} of {len(file)} rows have a vector ({num_failed} failed), expected "
            f"{_FEWEST} or more for a map; look at the flags of the records"
        )
        raise ConfigError(message)
    return PointRows(
        rows=rows,
        vectors=vectors,
        layer=name,
        num_in_file=len(file),
        num_failed=num_failed,
        num_not_finite=len(candidates) - len(rows),
        num_not_sampled=num_left - len(candidates),
    )


def _load(file: EmbeddingFile, layer: str, path: str | PathLike[str] | None) -> FittedTransform | None:
    if path is None:
        return None
    loaded = load_transform(path)
    check_comparable(loaded.recipe, recipe_of(file.provenance, layer), names=(str(path), str(file.path)))
    return loaded.transform


def _finite(
    source: VectorSource, candidates: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Keep the candidates without NaN or infinity; the file is read once, a block at a time."""
    vectors = np.empty((len(candidates), source.width), dtype=np.float32)
    rows = np.empty(len(candidates), dtype=np.int64)
    filled = 0
    for start, block in source.blocks():
        first, last = np.searchsorted(candidates, (start, start + len(block)))
        mine = candidates[first:last]
        taken = block[mine - start]
        is_finite = usable_rows(taken, allow_zero=True)
        end = filled + int(is_finite.sum())
        vectors[filled:end], rows[filled:end] = taken[is_finite], mine[is_finite]
        filled = end
    return rows[:filled], vectors[:filled]
