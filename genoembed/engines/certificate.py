"""What a file may say about batches: how far the vectors of some records are from those of each record alone.

In: records of a run's first unit, and their rows in it. Out: a few numbers for the file. Promised: the rows
that are measured are those of the file.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from genoembed.contracts import EmbeddingBlock
from genoembed.engines.units import WorkUnit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from genoembed.contracts import SequenceRecord, TokenBlock
    from genoembed.engines.engine import Engine
    from genoembed.store import UnitRows

logger = logging.getLogger(__name__)

TOLERANCES = {"float32": 1e-5, "float64": 1e-5}
"""Largest difference that counts as none, over the largest value of a vector, by the model's type."""
_TOLERANCE_ELSE = 1e-2


def certify_rows(
    engine: Engine, records: Sequence[SequenceRecord], block: EmbeddingBlock | TokenBlock, *, dtype: str
) -> dict[str, float | int | bool]:
    """Embed records one at a time, and compare with the rows that they have in a file."""
    before = replace(engine.stats)
    alone: dict[int, UnitRows] = {}
    units = [WorkUnit(number=number, records=(record,)) for number, record in enumerate(records)]
    engine.run(units, lambda rows: alone.update({rows.record.number: rows}))
    for name in before.__dataclass_fields__:
        setattr(engine.stats, name, getattr(before, name))
    in_file = dict(_vectors(block))
    absolute, relative, cosine = [0.0], [0.0], [1.0]
    for rows in alone.values():
        for key, mine in _vectors(rows.block):
            theirs = in_file[key].astype(np.float64)
            if not np.isfinite(mine).all() or not mine.size:
                continue
            absolute.append(float(np.abs(mine - theirs).max()))
            relative.append(absolute[-1] / (float(np.abs(mine).max()) or 1.0))
            norms = float(np.linalg.norm(mine) * np.linalg.norm(theirs))
            cosine.append(float((mine * theirs).sum()) / norms if norms else 1.0)
    tolerance = TOLERANCES.get(dtype, _TOLERANCE_ELSE)
    is_within = max(relative) <= tolerance
    if not is_within:
        logger.warning(
            "vectors depend on what shares their batch: of %d records, the largest difference is %.2g of the "
            "largest value, over %.0e; set batch_tokens to 1 to embed each alone, and report the model",
            len(records),
            max(relative),
            tolerance,
        )
    return {
        "records": len(records),
        "max_absolute": max(absolute),
        "max_relative": max(relative),
        "min_cosine": min(cosine),
        "tolerance": tolerance,
        "is_within": is_within,
    }


def _vectors(
    block: EmbeddingBlock | TokenBlock,
) -> Iterator[tuple[tuple[str, str], NDArray[np.float64]]]:
    """Give the vectors of each row, by layer and id."""
    if isinstance(block, EmbeddingBlock):
        parts = {name: list(matrix) for name, matrix in block.matrices.items()}
    else:
        cuts = np.cumsum(block.lengths)[:-1]
        parts = {name: np.split(values, cuts) for name, values in block.values.items()}
    for name, vectors in parts.items():
        for row, mine in zip(block.rows, vectors, strict=True):
            yield (name, row.id), np.asarray(mine, np.float64)
