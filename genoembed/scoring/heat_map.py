"""A picture of what each change of a base does: positions from left to right, one row per base.

In: maps of records. Out: the bytes of a PNG. Promised: one scale for all records, centered at 0 (white); the
same maps give the same bytes; no global state of matplotlib is touched. Long records go on in lines below
each other, as sequences do on paper.

P positions of a record.
"""

from __future__ import annotations

import io
import math
import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from genoembed.store.mutation_map import MAP_BASES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize

    from genoembed.store.mutation_map import MutationMap

MOST_LINES = 60
"""Lines of a picture: with more, it is taller than programs show."""
_DPI = 160
_WIDTHS = (60, 100, 200, 500)
"""Positions of a line: the first of these with which a picture has few lines, else the last."""
_FEW_LINES = 8
_LETTERS_UP_TO, _DOTS_UP_TO = 100, 200
"""Positions of a line up to which the reference's bases have their letters, or a dot."""
_LINE_INCHES, _ROW_INCHES = 9.0, 0.16
_LEFT, _RIGHT, _TOP, _BOTTOM, _TICKS, _TITLE = 0.4, 0.95, 0.42, 0.42, 0.32, 0.3
"""Inches beside, above and below the lines; below each; above each record."""
_QUANTILE = 0.99
_NO_SCORE = "#cfcfcf"
_TEXT = "#444444"


class _Line(NamedTuple):
    found: MutationMap
    first: int
    """First of its positions, from 0."""
    past: int


def draw_heat_map(maps: Sequence[MutationMap], notes: Sequence[str]) -> bytes:
    """Draw maps; notes say how the scores were made."""
    import matplotlib as mpl
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    lengths = [len(found.reference) for found in maps]
    width = _line_width(lengths)
    longest = max(lengths)
    lines = [
        _Line(found, first, min(first + width, len(found.reference)))
        for found in maps
        for first in range(0, len(found.reference), width)
    ]
    height = len(MAP_BASES) * _ROW_INCHES
    size = (
        _LEFT + _LINE_INCHES + _RIGHT,
        _TOP + len(lines) * (height + _TICKS) + len(maps) * _TITLE + _BOTTOM,
    )
    with mpl.rc_context({"text.parse_math": False, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=size)
        colors = mpl.colormaps["RdBu"].with_extremes(bad=_NO_SCORE)
        limit = color_limit(maps)
        norm = Normalize(-limit, limit)
        top = size[1] - _TOP
        for line in lines:
            if line.first == 0:
                top -= _TITLE
                figure.text(
                    _LEFT / size[0], (top + 0.1) / size[1], _name(line.found), fontsize=9, weight="bold"
                )
            top -= height
            shown = (line.past - line.first) / min(width, longest)
            box = (_LEFT, top, _LINE_INCHES * shown, height)
            axes = figure.add_axes(_relative(box, size))
            _draw_line(axes, line, colors, norm, width=min(width, longest))
            top -= _TICKS
        figure.text(
            _LEFT / size[0],
            1 - 0.25 / size[1],
            "Every change of a single base: ln p(change) \u2212 ln p(reference)",
            fontsize=11,
            weight="bold",
        )
        legend = ["blue: the model prefers the change", "red: the reference"]
        if width <= _DOTS_UP_TO:
            legend.append(f"{'letters' if width <= _LETTERS_UP_TO else 'dots'}: the reference")
        if any(np.isnan(found.delta_P4).any() for found in maps):
            legend.append("gray: no score")
        # lines end between notes, not in them
        words = " · ".join(note.replace(" ", "\u00a0") for note in [*legend, *notes])
        text = "\n".join(textwrap.wrap(words, 160, max_lines=2, placeholder=" ...", break_on_hyphens=False))
        figure.text(_LEFT / size[0], 0.36 / size[1], text, fontsize=7.5, color=_TEXT, va="top")
        _draw_scale(figure, size, colors, norm, limit, maps)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": "genoembed"})
    return buffer.getvalue()


def num_lines(lengths: Sequence[int]) -> int:
    """Count the lines of a picture of records of some lengths.

    Example:
        >>> num_lines([300]), num_lines([1000, 20]), num_lines([6000])
        (5, 6, 12)
    """
    width = _line_width(lengths)
    return sum(-(-length // width) for length in lengths)


def _line_width(lengths: Sequence[int]) -> int:
    for width in _WIDTHS:
        if sum(-(-length // width) for length in lengths) <= max(_FEW_LINES, len(lengths)):
            return width
    return _WIDTHS[-1]


def _relative(
    box: tuple[float, float, float, float], size: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Turn inches into parts of the figure."""
    left, bottom, width, height = box
    return left / size[0], bottom / size[1], width / size[0], height / size[1]


def color_limit(maps: Sequence[MutationMap]) -> float:
    """Return the score of the last color: a quantile, so that a few large ones leave the others visible.

    Example:
        >>> from genoembed.store.mutation_map import MutationMap
        >>> delta = np.array([[0, -1, -2, np.nan]], dtype=np.float32)
        >>> color_limit([MutationMap(record="r", contig="c", start=0, strand="+", reference="A",
        ...                          delta_P4=delta, method_P4=np.zeros((1, 4), np.uint8))])
        2.0
    """
    values = np.concatenate([np.abs(found.delta_P4).ravel() for found in maps])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return 1.0
    return float(np.quantile(values, _QUANTILE, method="higher"))


def _name(found: MutationMap) -> str:
    place = f"{found.contig}:{int(found.positions.min()) + 1:,}-{int(found.positions.max()) + 1:,}"
    if found.joined_P is not None:
        place += ", joined parts"
    name = place if found.record == found.contig or found.record.startswith(found.contig + ":") else ""
    name = name or f"{found.record}  ({place})"
    strand = ", read on the reverse strand" if found.strand == "-" else ""
    return textwrap.shorten(name, 90, placeholder=" ...") + strand


def _draw_line(axes: Axes, line: _Line, colors: Colormap, norm: Normalize, *, width: int) -> None:
    span = slice(line.first, line.past)
    # parts that are joined have no common axis: theirs counts along them
    start = 0 if line.found.joined_P is not None else line.found.start
    first, past = start + line.first + 1, start + line.past + 1
    axes.imshow(
        line.found.delta_P4[span].T,
        aspect="auto",
        interpolation="nearest",
        cmap=colors,
        norm=norm,
        extent=(first - 0.5, past - 0.5, len(MAP_BASES) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(MAP_BASES)), list(MAP_BASES), fontsize=8, family="monospace")
    step = _step(width)
    axes.set_xticks([place for place in range(first, past) if place % step == 0])
    axes.set_xticklabels([f"{int(place):,}" for place in axes.get_xticks()], fontsize=7)
    axes.tick_params(axis="both", length=2.5, colors=_TEXT, pad=2)
    axes.spines[:].set_color("#999999")
    axes.spines[:].set_linewidth(0.6)
    own = [
        (place, MAP_BASES.index(base))
        for place, base in enumerate(line.found.reference[span], start=first)
        if base in MAP_BASES
    ]
    if width <= _LETTERS_UP_TO:
        size = 7.5 if width <= _WIDTHS[0] else 5.5
        for place, row in own:
            text = MAP_BASES[row]
            axes.text(place, row, text, fontsize=size, ha="center", va="center_baseline", family="monospace")
    elif width <= _DOTS_UP_TO and own:
        axes.plot(*zip(*own, strict=True), ".", color="black", markersize=1.5)


def _step(width: int) -> int:
    """Distance of the labeled positions: a round number that leaves room for large numbers."""
    rough = width / 10
    power = 10 ** math.floor(math.log10(max(rough, 1)))
    return next(int(power * part) for part in (1, 2, 5, 10) if power * part >= rough)


def _draw_scale(
    figure: Any,
    size: tuple[float, float],
    colors: Colormap,
    norm: Normalize,
    limit: float,
    maps: Sequence[MutationMap],
) -> None:
    from matplotlib.cm import ScalarMappable

    height = min(2.2, size[1] - _TOP - _BOTTOM)
    box = (_LEFT + _LINE_INCHES + 0.25, size[1] - _TOP - _TITLE - height, 0.14, height)
    axes = figure.add_axes(_relative(box, size))
    values = np.concatenate([found.delta_P4.ravel() for found in maps])
    below, above = bool((values < -limit).any()), bool((values > limit).any())
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    bar = figure.colorbar(ScalarMappable(norm, colors), cax=axes, extend=extend)
    # above, not beside: of one line, the picture is too low for a label along the bar
    axes.set_title("nats", fontsize=8, color=_TEXT, loc="left", pad=7)
    axes.tick_params(labelsize=7, colors=_TEXT)
    axes.spines[:].set_linewidth(0.6)
    bar.outline.set_linewidth(0.6)
