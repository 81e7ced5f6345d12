"""Columns that a map can be colored by: classes with a color each, or numbers on a scale.

Up to eight classes have colors that people with any color vision can distinguish (close to Okabe and Ito's
set). Of more than twenty classes the most frequent keep a color, the rest is gray.

N points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from genoembed.errors import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from genoembed.plotting.reduction import PlaneMap


MISSING = -1
MISSING_COLOR = "#c8c8c8"
OTHER_COLOR = "#8c8c8c"
# Okabe and Ito's colors, yellow darker and black lighter, then matplotlib's tab10, tab20b and tab20c
# in part: whole lists have greys, which mean "no value" or "other" here, and a yellow that is lost on white.
FEW = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a800", "#333333")
MANY = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf"),
    *("#bcbd22", "#393b79", "#637939", "#8c6d31", "#843c39", "#7b4173", "#6baed6", "#fd8d3c"),
    *("#74c476", "#9e9ac8", "#e7969c", "#cedb9c"),
)
_FEW_POINTS = 100
_LOG_RATIO = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassColumn:
    """Classes of the points."""

    name: str
    classes: tuple[str, ...]
    """Named in the legend: by frequency, and where there are too many ``other (N classes)`` last."""
    colors: tuple[str, ...]
    """One per class."""
    codes: NDArray[np.int16]
    """Class of each point, ``MISSING`` where it has none, ``(N,)``."""
    values: tuple[str, ...]
    """Texts of the points, before any were joined; empty where there is none."""

    @property
    def num_missing(self) -> int:
        """Points without a class."""
        return int((self.codes == MISSING).sum())

    @property
    def counts(self) -> tuple[int, ...]:
        """Points of each class."""
        return tuple(int((self.codes == code).sum()) for code in range(len(self.classes)))


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberColumn:
    """A number for each point."""

    name: str
    values: NDArray[np.float64]
    """``(N,)``, NaN where there is none."""
    low: float
    """Value of the scale's first color; smaller ones have it, too."""
    high: float
    """Value of its last color."""
    is_log: bool
    """Whether the scale is logarithmic."""

    @property
    def num_missing(self) -> int:
        """Points without a number."""
        return int(np.isnan(self.values).sum())


def class_column(name: str, values: Sequence[str | None]) -> ClassColumn:
    """Choose colors for classes.

    Example:
        >>> column = class_column("kind", ["a", "b", "b", None])
        >>> column.classes, column.codes.tolist(), column.colors
        (('b', 'a'), [1, 0, 0, -1], ('#0072b2', '#e69f00'))
    """
    texts = np.array(["" if value is None else visible(value) for value in values], dtype=object)
    is_there = np.array([value is not None for value in values], dtype=bool)
    found, inverse, counts = np.unique(texts[is_there].astype(str), return_inverse=True, return_counts=True)
    ranking = sorted(range(len(found)), key=lambda index: (-counts[index], found[index]))
    classes = [str(found[index]) for index in ranking]
    position = np.empty(len(found), dtype=np.int16 if len(found) < 2**15 else np.int64)
    position[ranking] = np.arange(len(found))
    colors: tuple[str, ...] = FEW if len(classes) <= len(FEW) else MANY
    if len(classes) > len(MANY):
        num_kept = len(MANY) - 1
        position = np.minimum(position, num_kept)
        classes = [*classes[:num_kept], f"other ({len(classes) - num_kept:,} classes)"]
        colors = (*MANY[:num_kept], OTHER_COLOR)
    codes = np.full(len(texts), MISSING, dtype=np.int16)
    codes[is_there] = position[inverse].astype(np.int16)
    return ClassColumn(
        name=visible(name),
        classes=tuple(classes),
        colors=colors[: len(classes)],
        codes=codes,
        values=tuple(texts.tolist()),
    )


def number_column(name: str, values: NDArray[np.floating]) -> NumberColumn:
    """Choose a scale for numbers.

    Example:
        >>> column = number_column("length", np.array([10.0, 5000.0, np.nan]))
        >>> column.low, column.high, column.is_log, column.num_missing
        (10.0, 5000.0, True, 1)
    """
    numbers = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    finite = numbers[~np.isnan(numbers)]
    low, high = 0.0, 1.0
    if len(finite):
        ends = (1, 99) if len(finite) >= _FEW_POINTS else (0, 100)
        low, high = (float(end) for end in np.percentile(finite, ends))
        if low == high:
            low, high = float(finite.min()), float(finite.max())
    is_log = low > 0 and high / low >= _LOG_RATIO and bool((finite > 0).all())
    if low == high:
        high = low + max(1.0, abs(low) * 1e-6)
    return NumberColumn(name=visible(name), values=numbers, low=low, high=high, is_log=is_log)


def text_column(
    name: str, values: Sequence[str | None], *, as_classes: bool = False
) -> ClassColumn | NumberColumn:
    """Make a column of numbers if all values are numbers, else of classes.

    Example:
        >>> type(text_column("x", ["1", "2.5", None])).__name__, type(text_column("x", ["1", "b"])).__name__
        ('NumberColumn', 'ClassColumn')
    """
    numbers = None if as_classes else _as_numbers(values)
    return class_column(name, values) if numbers is None else number_column(name, numbers)


def _as_numbers(values: Sequence[str | None]) -> NDArray[np.float64] | None:
    numbers = np.full(len(values), np.nan)
    for index, value in enumerate(values):
        if value is None:
            continue
        try:
            numbers[index] = float(value)
        except ValueError:
            return None
    return numbers if np.isfinite(numbers).any() else None


def point_style(num_points: int) -> tuple[float, float]:
    """Choose size and opacity so that many points stay legible.

    Example:
        >>> point_style(30), point_style(100_000)
        ((9.0, 0.9), (2.4, 0.4))
    """
    steps = math.log10(max(num_points, 300) / 300)  # 0 for 300 points, 2.5 for 100,000
    size = max(1.8, 9.0 * 0.59**steps)
    return round(size, 1), round(max(0.3, 0.9 - 0.2 * steps), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class MapContent:
    """Points with all that is said about them."""

    plane: PlaneMap
    ids: tuple[str, ...]
    descriptions: tuple[str, ...]
    lengths: NDArray[np.int64]
    """Bases, ``(N,)``."""
    columns: tuple[ClassColumn | NumberColumn, ...]
    """What points can be colored by, the one that is shown first in front."""
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
            is_grey = np.array([color == OTHER_COLOR for color in column.colors] + [True])
            layer = np.where(column.codes == MISSING, 0, 2 - is_grey[column.codes])
        else:
            layer = np.where(np.isnan(column.values), 0, 1)
        sorted_order: NDArray[np.int64] = order[np.argsort(layer[order], kind="stable")]
        return sorted_order
