"""What a map shows, before it is a picture or a page; and the map as a table.

N points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from genoembed.analysis.colours import MISSING, OTHER_COLOUR, ClassColumn, NumberColumn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from genoembed.analysis.reduction import PlaneMap

_BLANKS = str.maketrans({"\t": " ", "\n": " ", "\r": " "})


@dataclass(frozen=True, kw_only=True, slots=True)
class MapContent:
    """Points with all that is said about them."""

    plane: PlaneMap
    ids: tuple[str, ...]
    descriptions: tuple[str, ...]
    lengths: NDArray[np.int64]
    """Bases, ``(N,)``."""
    columns: tuple[ClassColumn | NumberColumn, ...]
    """What points can be coloured by, the one that is shown first in front."""
    title: str
    notes: tuple[str, ...]
    """How the map was made, and what was left out."""
    keeps_scale: bool
    """Whether a step along either axis is as long in the picture: distances mean something."""
    seed: int

    def drawing_order(self) -> NDArray[np.int64]:
        """Mix the points, so that no class hides another because it comes later in the file."""
        order = np.random.default_rng(self.seed).permutation(len(self.ids)).astype(np.int64)
        column = self.columns[0]
        if isinstance(column, ClassColumn):
            is_grey = np.array([colour == OTHER_COLOUR for colour in column.colours] + [True])
            layer = np.where(column.codes == MISSING, 0, 2 - is_grey[column.codes])
        else:
            layer = np.where(np.isnan(column.values), 0, 1)
        sorted_order: NDArray[np.int64] = order[np.argsort(layer[order], kind="stable")]
        return sorted_order


def table_lines(content: MapContent) -> Iterator[str]:
    """Write the map as tab-separated text."""
    names = [column.name for column in content.columns if column.name != "length"]
    yield _line(["id", "x", "y", "description", "length", *names])
    shown = [_texts(column) for column in content.columns if column.name != "length"]
    for index, record_id in enumerate(content.ids):
        x, y = content.plane.points[index]
        cells = [record_id, f"{x:.6g}", f"{y:.6g}", content.descriptions[index], str(content.lengths[index])]
        yield _line([*cells, *(texts[index] for texts in shown)])


def _texts(column: ClassColumn | NumberColumn) -> tuple[str, ...]:
    if isinstance(column, ClassColumn):
        return column.values
    return tuple("" if np.isnan(value) else f"{value:.10g}" for value in column.values)


def _line(cells: list[str]) -> str:
    return "\t".join(cell.translate(_BLANKS) for cell in cells)
