"""A map as a picture: PNG, or SVG of which the points are pixels where there are many.

In: a :class:`MapContent`. Out: bytes. Promised: the same content gives the same bytes, and no global state of
matplotlib is touched.
"""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from genoembed.errors import MissingExtraError
from genoembed.plotting.colors import MISSING_COLOR, ClassColumn, MapContent, NumberColumn, point_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


_SIZE_INCHES = (9.0, 6.4)
_DPI = 160
_POINTS_AN_INCH = 72
_PIXELS_AN_INCH = 96
_MANY_POINTS = 3000
_LABEL_WIDTH = 28
_NOTE_WIDTH = 110
_PLOT_BOX = (0.075, 0.15, 0.645, 0.755)
_BAR_BOX = (0.755, 0.3, 0.02, 0.45)


def draw_map(content: MapContent, kind: Literal["png", "svg"]) -> bytes:
    """Draw a map, colored by its first column."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(package="matplotlib", extra="analysis", purpose="a picture") from error
    buffer = io.BytesIO()
    # text of an SVG stays text; ids of its parts do not change from run to run
    with mpl.rc_context({"svg.hashsalt": "genoembed", "svg.fonttype": "none", "text.parse_math": False}):
        figure = Figure(figsize=_SIZE_INCHES)
        axes = figure.add_axes(_PLOT_BOX)
        column = content.columns[0]
        if isinstance(column, ClassColumn):
            _draw_classes(axes, content, column)
        else:
            _draw_numbers(figure, axes, content, column)
        _label(figure, axes, content)
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": "genoembed"}
        figure.savefig(buffer, format=kind, dpi=_DPI, metadata=metadata)
    return buffer.getvalue()


def _draw_classes(axes: Axes, content: MapContent, column: ClassColumn) -> None:
    palette = np.array([*column.colors, MISSING_COLOR], dtype=object)  # MISSING is -1: the last one
    order = content.drawing_order()
    _scatter(axes, content, order, c=palette[column.codes[order]].tolist())
    entries = [
        (f"{name} ({number:,})", color)
        for name, number, color in zip(column.classes, column.counts, column.colors, strict=True)
    ]
    if column.num_missing:
        entries.append((f"no value ({column.num_missing:,})", MISSING_COLOR))
    axes.legend(
        handles=[_handle(text, color) for text, color in entries],
        title=textwrap.shorten(column.name, _LABEL_WIDTH, placeholder=" ..."),
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        fontsize=8,
        title_fontsize=9,
        alignment="left",
        handletextpad=0.3,
    )


def _handle(text: str, color: str) -> Any:
    from matplotlib.lines import Line2D

    label = "\n".join(textwrap.wrap(text, _LABEL_WIDTH, max_lines=2, placeholder=" ...")) or " "
    # a leading underscore would hide the entry
    label = "\u200b" + label if label.startswith("_") else label
    return Line2D([], [], linestyle="", marker="o", markersize=6, color=color, label=label)


def _draw_numbers(figure: Figure, axes: Axes, content: MapContent, column: NumberColumn) -> None:
    from matplotlib.colors import LogNorm, Normalize

    order = content.drawing_order()
    is_there = ~np.isnan(column.values[order])
    _scatter(axes, content, order[~is_there], c=MISSING_COLOR)
    norm = (LogNorm if column.is_log else Normalize)(column.low, column.high)
    drawn = _scatter(
        axes, content, order[is_there], c=column.values[order[is_there]], cmap="viridis", norm=norm
    )
    bar = figure.colorbar(drawn, cax=figure.add_axes(_BAR_BOX), extend=_extend(column))
    if bar.solids is not None:
        bar.solids.set_alpha(1.0)
    bar.set_label(column.name + (", log scale" if column.is_log else ""))
    if column.num_missing:
        figure.text(_BAR_BOX[0], 0.25, f"no value: {column.num_missing:,}", fontsize=8, color="#666666")


def _extend(column: NumberColumn) -> Literal["neither", "both", "min", "max"]:
    finite = column.values[~np.isnan(column.values)]
    below, above = bool((finite < column.low).any()), bool((finite > column.high).any())
    if below and above:
        return "both"
    return "min" if below else "max" if above else "neither"


def _scatter(axes: Axes, content: MapContent, rows: NDArray[np.int64], **colors: Any) -> Any:
    size, opacity = point_style(len(content.ids))
    diameter = size * _POINTS_AN_INCH / _PIXELS_AN_INCH
    points = content.plane.points[rows]
    return axes.scatter(
        points[:, 0],
        points[:, 1],
        s=diameter**2,
        alpha=opacity,
        linewidths=0,
        rasterized=len(content.ids) > _MANY_POINTS,
        **colors,
    )


def _label(figure: Figure, axes: Axes, content: MapContent) -> None:
    left = _PLOT_BOX[0]
    figure.text(left, 0.945, _shortened(content.title, 90), fontsize=12, weight="bold")
    notes = textwrap.wrap(" · ".join(content.notes), _NOTE_WIDTH * 6 // 5, max_lines=3, placeholder=" ...")
    figure.text(left, 0.075, "\n".join(notes), fontsize=7.5, color="#555555", va="top", linespacing=1.3)
    axes.set_xlabel(content.plane.axis_labels[0])
    axes.set_ylabel(content.plane.axis_labels[1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7, colors="#666666")
    if content.keeps_scale:
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_xticks([])
        axes.set_yticks([])


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
