"""Columns that a map can be colored by: classes with a color each, or numbers and dates on a scale.

The first eight colors stay apart for people with any color vision, on a light and on a dark background. Of
more than twenty classes the most frequent keep a color, the rest is gray.

N points.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np

from genoembed.errors import visible
from genoembed.sequences.tables import as_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import Theme
    from genoembed.plotting.reduction import PlaneMap


MISSING = -1
# Okabe and Ito's first six; the others were chosen one by one, each as far as possible in OKLab from those
# before it, as seen with normal, protan and deutan vision (Vienot 1999). No grays: these mean "no value" or
# "other". At least 1.9 : 1 against white, and 3 : 1 against the dark background.
PALETTE = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8478fc", "#84cc90"),
    *("#b4306c", "#786c48", "#fc90fc", "#f0a8b4", "#846090", "#9c9048", "#6c54cc", "#fc6c6c"),
    *("#488400", "#3090e4", "#9090c0", "#a854c0"),
)
# Seventeen even steps of viridis, which is even to the eye with any color vision and also in gray.
_VIRIDIS = (
    *("#440154", "#48186a", "#472d7b", "#424086", "#3b528b", "#33638d", "#2c728e", "#26828e", "#21918c"),
    *("#1fa088", "#28ae80", "#3fbc73", "#5ec962", "#84d44b", "#addc30", "#d8e219", "#fde725"),
)
_FEW_POINTS = 100
_LOG_RATIO = 100.0
_LARGEST = 1e300  # of a scale's ends: their difference is a number, too
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}([T ].+)?")
_DAY_S = 86_400
_EPOCH = datetime(1970, 1, 1)  # without a zone: times stay as they are written
_FIRST_S, _LAST_S = (
    int((end.replace(microsecond=0) - _EPOCH).total_seconds()) for end in (datetime.min, datetime.max)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ThemeColors:
    """Colors of everything but the classes."""

    background: str
    panel: str
    """Background of the controls."""
    ink: str
    quiet: str
    """Text of less weight; its contrast is above 4.5 on both backgrounds."""
    line: str
    grid: str
    accent: str
    """Of what can be clicked, and of the focus."""
    missing: str
    other: str
    scale: tuple[str, ...]
    """Colors of a scale, low to high: the end that is lost on the background is left out."""


THEMES: dict[Theme, ThemeColors] = {
    "light": ThemeColors(
        background="#ffffff",
        panel="#f7f8f9",
        ink="#1f2328",
        quiet="#555b63",
        line="#8b929b",
        grid="#eceef0",
        accent="#06437f",
        missing="#c8c8c8",
        other="#8c8c8c",
        scale=_VIRIDIS[:-1],
    ),
    "dark": ThemeColors(
        background="#15181c",
        panel="#1d2126",
        ink="#e6e8eb",
        quiet="#a9b1bb",
        line="#77808b",
        grid="#262b31",
        accent="#8ab8f0",
        missing="#4d535b",
        other="#858c95",
        scale=_VIRIDIS[3:],
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassColumn:
    """Classes of the points."""

    name: str
    classes: tuple[str, ...]
    """Named in the legend: by name, numbers in it by value, and ``other (N classes)`` last."""
    has_other: bool
    """Whether the last class joins those that are too many."""
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
        return tuple(np.bincount(self.codes[self.codes != MISSING], minlength=len(self.classes)).tolist())

    def colors(self, theme: Theme) -> tuple[str, ...]:
        """Return one color per class."""
        num_own = len(self.classes) - self.has_other
        return (*PALETTE[:num_own], *[THEMES[theme].other] * self.has_other)


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
    is_date: bool = False
    """Whether the numbers are days since 1970."""

    @property
    def num_missing(self) -> int:
        """Points without a number."""
        return int(np.isnan(self.values).sum())

    @property
    def ticks(self) -> tuple[tuple[float, str], ...]:
        """A few values of the scale, with their labels."""
        if self.is_date:
            return _date_ticks(self.low, self.high)
        values = _log_ticks(self.low, self.high) if self.is_log else _even_ticks(self.low, self.high)
        return tuple((value, number_text(value)) for value in values)

    def text(self, row: int) -> str:
        """Spell out the value of a point; empty where there is none."""
        value = float(self.values[row])
        return "" if math.isnan(value) else date_text(value) if self.is_date else repr(value)


def class_column(name: str, values: Sequence[str | None]) -> ClassColumn:
    """Choose a place in the legend, and with it a color, for classes; the order of the rows does not matter.

    Example:
        >>> column = class_column("cluster", ["10", "10", "9", None])
        >>> column.classes, column.codes.tolist(), column.colors("light")
        (('9', '10'), [1, 1, 0, -1], ('#0072b2', '#e69f00'))
    """
    texts = np.array(["" if value is None else visible(value) for value in values], dtype=object)
    is_there = np.array([value is not None for value in values], dtype=bool)
    found, inverse, counts = np.unique(texts[is_there].astype(str), return_inverse=True, return_counts=True)
    names = found.tolist()
    has_other = len(names) > len(PALETTE)
    frequent = sorted(range(len(names)), key=lambda index: (-counts[index], _natural(names[index])))
    kept = sorted(frequent[: len(PALETTE) - has_other], key=lambda index: _natural(names[index]))
    position = np.full(len(names), len(kept), dtype=np.int16)
    position[kept] = np.arange(len(kept))
    other = [f"other ({len(names) - len(kept):,} classes)"] if has_other else []
    codes = np.full(len(texts), MISSING, dtype=np.int16)
    codes[is_there] = position[inverse]
    return ClassColumn(
        name=visible(name),
        classes=(*(names[index] for index in kept), *other),
        has_other=has_other,
        codes=codes,
        values=tuple(texts.tolist()),
    )


def _natural(name: str) -> tuple[list[str | tuple[int, str]], str]:
    """Sort by letters whatever their case, and by the value of numbers between them."""
    parts = re.split(r"(\d+)", name.casefold())
    # without int(), which refuses numbers of more than 4,300 digits
    bare = [part.lstrip("0") if place % 2 else part for place, part in enumerate(parts)]
    return [(len(part), part) if place % 2 else part for place, part in enumerate(bare)], name


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
    low, high = max(low, -_LARGEST), min(high, _LARGEST)
    is_log = low > 0 and high / low >= _LOG_RATIO and bool((finite > 0).all())
    if low == high:
        high = low + max(1.0, abs(low) * 1e-6)
    return NumberColumn(name=visible(name), values=numbers, low=low, high=high, is_log=is_log)


def text_column(
    name: str, values: Sequence[str | None], *, as_classes: bool = False
) -> ClassColumn | NumberColumn:
    """Make a column of numbers or dates if all values are, else of classes.

    Example:
        >>> type(text_column("x", ["1", "2.5", None])).__name__, type(text_column("x", ["1", "b"])).__name__
        ('NumberColumn', 'ClassColumn')
    """
    numbers = None if as_classes else _as_numbers(values)
    if numbers is not None:
        return number_column(name, numbers)
    return (None if as_classes else date_column(name, values)) or class_column(name, values)


def _as_numbers(values: Sequence[str | None]) -> NDArray[np.float64] | None:
    numbers = np.full(len(values), np.nan)
    for index, value in enumerate(values):
        if value is None:
            continue
        try:
            numbers[index] = as_number(value)
        except ValueError:
            return None
    return numbers if np.isfinite(numbers).any() else None


def date_column(name: str, values: Sequence[str | None]) -> NumberColumn | None:
    """Make a column of dates if all values are, as ``2020-03-31`` or with a time of day.

    Example:
        >>> column = date_column("collected", ["2020-03-31", None, "2021-01-01T12:00"])
        >>> column.text(0), column.text(2), [label for _, label in column.ticks]
        ('2020-03-31', '2021-01-01 12:00', ['2020-04', '2020-07', '2020-10', '2021-01'])
        >>> date_column("collected", ["2020-03-31", "unknown"])
    """
    days = np.full(len(values), np.nan)
    for index, value in enumerate(values):
        if value is None:
            continue
        if not _DATE.fullmatch(value):
            return None
        try:
            when = datetime.fromisoformat(value)
            plain = when if when.tzinfo is None else when.astimezone(UTC).replace(tzinfo=None)
        except (ValueError, OverflowError):  # no such day, or outside the years 1 to 9999 in UTC
            return None
        days[index] = (plain - _EPOCH).total_seconds() / _DAY_S
    finite = days[~np.isnan(days)]
    if not len(finite):
        return None
    low, high = float(finite.min()), float(finite.max())
    if low == high:
        low, high = (low, low + 1) if low + 1 < _LAST_S / _DAY_S else (low - 1, low)
    return NumberColumn(name=visible(name), values=days, low=low, high=high, is_log=False, is_date=True)


def date_text(days: float) -> str:
    """Spell out days since 1970, with the time of day where there is one."""
    return _moment(days).isoformat(" ").removesuffix(":00").removesuffix(" 00:00")


def _moment(days: float) -> datetime:
    """Return a time to the second; what rounding has moved out of the calendar becomes its first or last."""
    return _EPOCH + timedelta(seconds=min(max(round(days * _DAY_S), _FIRST_S), _LAST_S))


def _date_ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Choose firsts of years or months, or days."""
    first, last = _moment(low), _moment(high)
    months = (last.year - first.year) * 12 + last.month - first.month
    if months < 3:
        values = _even_ticks(low, high)
        return tuple((value, date_text(value)) for value in values)
    step = next(step for step in (1, 3, 6, *(12 * n for n in _even_numbers())) if months / step <= 7)
    start = first.year * 12 + first.month - 1
    found = []
    for month in range(start - start % step, start + months + 1, step):
        value = (date(month // 12, month % 12 + 1, 1) - _EPOCH.date()).days if month >= 12 else -math.inf
        label = f"{month // 12:04}" if step % 12 == 0 else f"{month // 12:04}-{month % 12 + 1:02}"
        found += [(float(value), label)] if low <= value <= high else []
    return tuple(found)


def _even_numbers() -> list[int]:
    return [step * 10**power for power in range(4) for step in _STEPS]


_STEPS = (1, 2, 5)


def _even_ticks(low: float, high: float) -> list[float]:
    """Choose up to six multiples of 1, 2 or 5 times a power of ten."""
    raw = high / 5 - low / 5  # a difference of the largest numbers would be infinite
    if raw < max(abs(low), abs(high), 1e-290) * 1e-11:
        return [low, high]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (*_STEPS, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if len(decades) > 4 else _STEPS[::2] if len(decades) > 3 else _STEPS
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    found = [tick for tick in ticks if low <= tick <= high]
    return found[:: math.ceil(len(found) / 8)]


def number_text(value: float) -> str:
    """Write a number as a label.

    Example:
        >>> number_text(12000.0), number_text(0.25), number_text(2e9)
        ('12,000', '0.25', '2e+09')
    """
    return f"{value:,.10g}" if 1e-4 <= abs(value) < 1e7 or value == 0 else f"{value:g}"


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
            num_own = len(column.classes) - column.has_other
            layer = np.where(column.codes == MISSING, 0, 1 + (column.codes < num_own))
        else:
            layer = np.where(np.isnan(column.values), 0, 1)
        sorted_order: NDArray[np.int64] = order[np.argsort(layer[order], kind="stable")]
        return sorted_order
