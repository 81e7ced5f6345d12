"""A map as a picture (PNG, or SVG of which the points are pixels where there are many) or as a page.

In: a :class:`MapContent`. Out: bytes, or the page's text. Promised: the same content gives the same bytes, no
global state of matplotlib is touched, and the page is self-contained: no network, no server, no other file.
It holds plotly.js, the points, and the script of ``page/map.js``; a content security policy in it forbids the
browser to fetch anything.

Our script draws the page on plotly.js. A figure made by plotly.py would have one trace per class, so that one
class hides another, and could neither search, nor switch between columns of both kinds, nor save a selection.
"""

from __future__ import annotations

import base64
import html
import io
import json
import textwrap
from importlib.resources import files
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


# ---------------------------------------------------------------------------------------- the page

_PAGE = files("genoembed.plotting") / "page"
_TICKS_PER_DECADE = (1, 2, 5)


def build_page(content: MapContent) -> str:
    """Build the page."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError(package="plotly", extra="analysis", purpose="an HTML page") from error
    template = (_PAGE / "map.html").read_text(encoding="utf-8")
    parts = {
        "title": html.escape(content.title),
        "style": (_PAGE / "map.css").read_text(encoding="utf-8"),
        "plotly": get_plotlyjs(),
        "content": _as_json(_facts(content)),
        "script": (_PAGE / "map.js").read_text(encoding="utf-8"),
    }
    pieces = template.split("@@")  # text, name, text, name, ..., text
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def _facts(content: MapContent) -> dict[str, Any]:
    size, opacity = point_style(len(content.ids))
    points = content.plane.points
    return {
        "title": content.title,
        "notes": list(content.notes),
        "axes": list(content.plane.axis_labels),
        "keepsScale": content.keeps_scale,
        "size": size,
        "opacity": opacity,
        "missing": MISSING_COLOR,
        "ids": list(content.ids),
        "descriptions": list(content.descriptions),
        "lengths": _encoded(content.lengths, "<f8"),
        "x": _encoded(points[:, 0], "<f4"),
        "y": _encoded(points[:, 1], "<f4"),
        "order": _encoded(content.drawing_order(), "<i4"),
        "columns": [_column(column) for column in content.columns],
    }


def _column(column: ClassColumn | NumberColumn) -> dict[str, Any]:
    if isinstance(column, ClassColumn):
        texts, codes = np.unique(np.array(column.values, dtype=str), return_inverse=True)
        return {
            "kind": "class",
            "name": column.name,
            "classes": list(column.classes),
            "colors": list(column.colors),
            "counts": list(column.counts),
            "codes": _encoded(column.codes, "<i2"),
            "texts": texts.tolist(),
            "textOf": _encoded(codes, "<i4"),
        }
    return {
        "kind": "number",
        "name": column.name,
        "values": _encoded(column.values, "<f8"),
        "low": column.low,
        "high": column.high,
        "ticks": _log_ticks(column.low, column.high) if column.is_log else None,
        "missing": column.num_missing,
    }


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    steps = (1,) if len(decades) > 4 else _TICKS_PER_DECADE
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def _encoded(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode("ascii")


def _as_json(facts: dict[str, Any]) -> str:
    """Write JSON that cannot end the script element it stands in."""
    text = json.dumps(facts, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
