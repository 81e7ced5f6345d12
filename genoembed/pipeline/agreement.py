"""Whether two sets of vectors agree: the one measure, and the tolerances that it is held against.

The certificate of a file, ``compare`` and ``verify`` all use this measure. Promised: a vector with NaN or
infinity on one side only never agrees.

D features, T tokens.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genoembed.contracts import EmbeddingBlock
from genoembed.pipeline.units import WorkUnit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from genoembed.contracts import SequenceRecord, TokenBlock
    from genoembed.pipeline.embedder import UnitEngine
    from genoembed.store import UnitRows

logger = logging.getLogger(__name__)

FP8 = "fp8"
"""Name of the type that Evo 2's input projections round to."""
COMPUTED_TOLERANCES = {"float64": 1e-5, "float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2, FP8: 2e-2}
"""Largest relative difference that counts as none, by the type of numbers that a model computed in. float64
has the tolerance of float32, since vectors are kept in float32. With FP8, a difference in the last bit of a
float32 may round to the other of two numbers of four bits."""
STORED_TOLERANCES = {"float64": 0.0, "float32": 0.0, "float16": 1e-3}
"""The same by the type that a file stores: float16 keeps eleven bits."""


class Difference(NamedTuple):
    """How far two vectors differ; of several vectors, the worst of each measure."""

    cosine: float
    """1 where both are zero, or neither has a value; NaN where they cannot be compared."""
    absolute: float
    """Largest difference of a value; infinite where they cannot be compared."""
    relative: float
    """The same, divided by the largest value of either vector."""

    def is_within(self, tolerance: float) -> bool:
        """Whether the relative difference counts as none."""
        return self.relative <= tolerance


SAME = Difference(1.0, 0.0, 0.0)
INCOMPARABLE = Difference(float("nan"), float("inf"), float("inf"))
"""Of vectors of unequal shape, or of which one has values that are not finite."""


def difference(first: NDArray[np.floating], second: NDArray[np.floating]) -> Difference:
    """Measure how far two vectors differ, or the vectors of two runs of tokens, token by token.

    Example:
        >>> difference(np.array([3.0, 4.0]), np.array([3.0, 4.5])).relative
        0.1111111111111111
        >>> difference(np.array([3.0, 4.0]), np.array([3.0, np.nan])).is_within(1.0)
        False
    """
    if first.shape != second.shape:
        return INCOMPARABLE
    a_TD, b_TD = (np.atleast_2d(np.asarray(each, dtype=np.float64)) for each in (first, second))
    # a record that failed has NaN for a vector: twice the same outcome
    if not a_TD.size or (np.isnan(a_TD).all() and np.isnan(b_TD).all()):
        return SAME
    # explicitly, as max() and min() pass over NaN, depending on where it stands
    if not (np.isfinite(a_TD).all() and np.isfinite(b_TD).all()):
        return INCOMPARABLE
    absolute_T = np.abs(a_TD - b_TD).max(axis=1)
    largest_T = np.maximum(np.abs(a_TD).max(axis=1), np.abs(b_TD).max(axis=1))
    lengths_T = np.linalg.norm(a_TD, axis=1) * np.linalg.norm(b_TD, axis=1)
    products_T = np.einsum("td,td->t", a_TD, b_TD)
    cosine_T = np.where(absolute_T == 0, 1.0, products_T / np.where(lengths_T == 0, 1.0, lengths_T))
    relative_T = absolute_T / np.where(largest_T == 0, 1.0, largest_T)
    return Difference(float(cosine_T.min()), float(absolute_T.max()), float(relative_T.max()))


def worst(differences: Iterable[Difference]) -> Difference:
    """Join the differences of several vectors; those of none are the same.

    Example:
        >>> worst([SAME, Difference(0.9, 0.5, 0.1)])
        Difference(cosine=0.9, absolute=0.5, relative=0.1)
    """
    found = list(differences)
    if not found:
        return SAME
    cosines, absolutes, relatives = np.array(found, dtype=np.float64).T
    # NumPy's minimum and maximum hand NaN on
    return Difference(float(cosines.min()), float(absolutes.max()), float(relatives.max()))


def tolerance_of(computed: Iterable[str], stored: Iterable[str] = ()) -> float:
    """Choose a tolerance by the names of the types that vectors were computed in, and are stored in.

    Example:
        >>> tolerance_of(["float32"]), tolerance_of(["float32"], ["float16"]), tolerance_of(["bfloat16"])
        (1e-05, 0.001, 0.01)
    """
    other = COMPUTED_TOLERANCES["bfloat16"]  # of types that are not known
    limits = [COMPUTED_TOLERANCES.get(name, other) for name in computed]
    return max([*limits, *(STORED_TOLERANCES.get(name, other) for name in stored)])


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerComparison:
    """How far two matrices agree."""

    layer: str
    num_compared: int
    num_outside: int
    """Records that differ by more than the tolerance."""
    min_cosine: float
    """NaN where nothing was compared."""
    mean_cosine: float
    max_absolute: float
    max_relative: float
    worst: tuple[tuple[str, Difference], ...]
    """Up to ten records that differ most, the worst first."""


def summarize(
    layer: str, found: Iterable[tuple[str, Difference]], *, tolerance: float, num_worst: int = 10
) -> LayerComparison:
    """Sum differences up.

    Example:
        >>> summary = summarize("x", [("a", SAME), ("b", Difference(0.9, 0.5, 0.1))], tolerance=0.01)
        >>> summary.num_outside, summary.worst[0][0], summary.mean_cosine
        (1, 'b', 0.95)
    """
    pairs = list(found)
    ranked = sorted((pair for pair in pairs if pair[1].relative > 0), key=lambda pair: -pair[1].relative)
    cosines = np.array([pair[1].cosine for pair in pairs])
    comparable = cosines[~np.isnan(cosines)]
    return LayerComparison(
        layer=layer,
        num_compared=len(pairs),
        num_outside=sum(not pair[1].is_within(tolerance) for pair in pairs),
        min_cosine=float(comparable.min()) if len(comparable) else float("nan"),
        mean_cosine=float(comparable.mean()) if len(comparable) else float("nan"),
        max_absolute=max((pair[1].absolute for pair in pairs), default=0.0),
        max_relative=max((pair[1].relative for pair in pairs), default=0.0),
        worst=tuple(ranked[:num_worst]),
    )


def certify_rows(
    engine: UnitEngine,
    records: Sequence[SequenceRecord],
    block: EmbeddingBlock | TokenBlock,
    *,
    types: Sequence[str],
) -> dict[str, float | int | bool | None]:
    """Embed records one at a time, and compare with the rows that they have in a file."""
    before = replace(engine.stats)
    alone: dict[int, UnitRows] = {}
    units = [WorkUnit(number=number, records=(record,)) for number, record in enumerate(records)]
    engine.run(units, lambda rows: alone.update({rows.record.number: rows}))
    for name in before.__dataclass_fields__:
        setattr(engine.stats, name, getattr(before, name))
    in_file = dict(_vectors(block))
    found = worst(
        difference(vectors, in_file[key]) for rows in alone.values() for key, vectors in _vectors(rows.block)
    )
    tolerance = tolerance_of(types)
    is_within = found.is_within(tolerance)
    if not is_within:
        logger.warning(
            "vectors depend on what shares their batch: of %d records, the largest difference is %.2g of the "
            "largest value, over %.0e; set batch_tokens to 1 to embed each alone, and report the model",
            len(records),
            found.relative,
            tolerance,
        )
    is_comparable = math.isfinite(found.relative)  # JSON has no word for infinity
    return {
        "records": len(records),
        "max_absolute": found.absolute if is_comparable else None,
        "max_relative": found.relative if is_comparable else None,
        "min_cosine": found.cosine if is_comparable else None,
        "tolerance": tolerance,
        "is_within": is_within,
    }


def _vectors(
    block: EmbeddingBlock | TokenBlock,
) -> Iterator[tuple[tuple[str, str], NDArray[np.floating]]]:
    """Return the vectors of each row, by layer and id."""
    if isinstance(block, EmbeddingBlock):
        parts = {name: list(matrix) for name, matrix in block.matrices.items()}
    else:
        cuts = np.cumsum(block.lengths)[:-1]
        parts = {name: np.split(values, cuts) for name, values in block.values.items()}
    for name, vectors in parts.items():
        for row, mine in zip(block.rows, vectors, strict=True):
            yield (name, row.id), mine
