"""A map as a picture (PNG, or SVG and PDF of which the points are pixels where there are many) or as a page.

In: a :class:`MapContent`. Out: bytes, or the page's text. Promised: the same content gives the same bytes, no
global state of matplotlib is touched, and the page is self-contained: no network, no server, no other file.
It holds the points, and the scripts of ``page/``; a content security policy in it lets the browser run these
alone, and load nothing.

The scripts draw the points themselves, pixel by pixel: a hundred thousand take a few milliseconds on a CPU,
where a plotting library needs a graphics card to move them.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import textwrap
import warnings
from dataclasses import asdict
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from genoembed.plotting.colors import THEMES, ClassColumn, MapContent, NumberColumn, ThemeColors, point_style

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from genoembed.config.choices import Theme


_SIZE_INCHES = (9.0, 6.4)
_DPI = 160
_POINTS_AN_INCH = 72
_PIXELS_AN_INCH = 96
_MANY_POINTS = 3000
_LABEL_WIDTH = 32
_MANY_ENTRIES = 12
_NOTE_WIDTH = 130
_PLOT_BOX = (0.075, 0.15, 0.645, 0.755)
_BAR_BOX = (0.755, 0.36, 0.02, 0.45)
METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": "genoembed"},
    "svg": {"Date": None},
    "pdf": {"Creator": "genoembed", "CreationDate": None},
}
DRAWING_SETTINGS = {
    "svg.hashsalt": "genoembed",  # ids of its parts do not change from run to run
    "svg.fonttype": "none",  # text of an SVG and of a PDF stays text
    "pdf.fonttype": 42,
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # which matplotlib brings along: the same on all machines
}


def draw_map(content: MapContent, kind: Literal["png", "svg", "pdf"], *, theme: Theme = "light") -> bytes:
    """Draw a map, colored by its first column."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    colors = THEMES[theme]
    with mpl.rc_context(DRAWING_SETTINGS), warnings.catch_warnings():
        # an SVG leaves letters to the fonts of who opens it; a PNG or PDF shows a box for what DejaVu lacks
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        figure = Figure(figsize=_SIZE_INCHES, facecolor=colors.background)
        axes = figure.add_axes(_PLOT_BOX, facecolor=colors.background)
        column = content.columns[0]
        if isinstance(column, ClassColumn):
            _draw_classes(axes, content, column, theme)
        else:
            _draw_numbers(figure, axes, content, column, colors)
        _label(figure, axes, content, colors)
        figure.savefig(buffer, format=kind, dpi=_DPI, metadata=METADATA[kind])
    return buffer.getvalue()


def _draw_classes(axes: Axes, content: MapContent, column: ClassColumn, theme: Theme) -> None:
    missing = THEMES[theme].missing
    palette = np.array([*column.colors(theme), missing], dtype=object)  # MISSING is -1: the last one
    order = content.drawing_order()
    _scatter(axes, content, order, c=palette[column.codes[order]].tolist())
    counts = [f" ({number:,})" for number in column.counts]
    room = _LABEL_WIDTH * (1 if len(column.classes) > _MANY_ENTRIES else 2) - max(map(len, counts), default=0)
    labels = map("".join, zip(_told_apart(column.classes, room), counts, strict=True))
    entries = list(map(_handle, labels, column.colors(theme)))
    if column.num_missing:
        entries.append(_handle(f"no value ({column.num_missing:,})", missing))
    _legend(axes, entries, (1.01, 1.0), THEMES[theme], title=_shortened(column.name, _LABEL_WIDTH - 4))


def _legend(
    axes: Axes,
    handles: list[Any],
    place: tuple[float, float],
    colors: ThemeColors,
    *,
    title: str | None = None,
) -> None:
    axes.legend(
        handles=handles,
        title=title,
        loc="upper left",
        bbox_to_anchor=place,
        borderaxespad=0.0,
        frameon=False,
        fontsize=8,
        title_fontsize=9,
        labelcolor=colors.ink,
        alignment="left",
        handletextpad=0.3,
    ).get_title().set_color(colors.ink)


def _handle(label: str, color: str) -> Any:
    from matplotlib.lines import Line2D

    text = "\n".join(_in_lines(label, _LABEL_WIDTH))
    # a leading underscore would hide the entry
    text = "\u200b" + text if text.startswith("_") else text
    return Line2D([], [], linestyle="", marker="o", markersize=6, color=color, label=text)


def _in_lines(text: str, width: int) -> list[str]:
    """Break a text where its parts end, as those of a path do, or else anywhere.

    Example:
        >>> _in_lines("data/bacterial_genes.fa.gz (32)", 18)
        ['data/bacterial_', 'genes.fa.gz (32)']
    """
    lines = [""]
    for part in re.findall(r"[^ /_.|-]*[ /_.|-]?", text):
        if lines[-1] and len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return [piece for line in lines for piece in textwrap.wrap(line, width)]


def _told_apart(names: Sequence[str], width: int) -> list[str]:
    """Shorten names; where that makes two of them equal, leave out what all long ones share.

    Example:
        >>> _told_apart(["a strain 1 of many", "a strain 2 of many", "other"], 9)
        ['…in 1 of…', '…in 2 of…', 'other']
    """
    short = [_shortened(name, width) for name in names]
    if len(set(short)) == len(set(names)):
        return short
    long = [name for name in names if len(name) > width]
    first, last = _num_shared(long), _num_shared([name[::-1] for name in long])
    own = max(len(name) - first - last for name in long)
    kept = max(0, width - 2 - own) // 2  # of what they share, beside what tells them apart
    first, last = max(0, first - kept), max(0, last - kept)
    return [
        f"…{_shortened(name[first : len(name) - last], width - 2)}…" if len(name) > width else name
        for name in names
    ]


def _num_shared(names: Sequence[str]) -> int:
    """Count the letters with which all names begin."""
    places = enumerate(zip(*names, strict=False))
    return next((place for place, letters in places if len(set(letters)) > 1), min(map(len, names)))


def _draw_numbers(
    figure: Figure, axes: Axes, content: MapContent, column: NumberColumn, colors: ThemeColors
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    order = content.drawing_order()
    is_there = ~np.isnan(column.values[order])
    _scatter(axes, content, order[~is_there], c=colors.missing)
    scale: dict[str, Any] = {
        "cmap": LinearSegmentedColormap.from_list("scale", colors.scale),
        "norm": (LogNorm if column.is_log else Normalize)(column.low, column.high),
    }
    _scatter(axes, content, order[is_there], c=column.values[order[is_there]], **scale)
    # a scale of its own: that of the points would be half transparent, as they are
    bar = figure.colorbar(ScalarMappable(**scale), cax=figure.add_axes(_BAR_BOX), extend=_extend(column))
    bar.set_ticks([value for value, _ in column.ticks], labels=[label for _, label in column.ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8, color=colors.line, labelcolor=colors.ink)
    bar.outline.set_visible(False)
    name = _shortened(column.name, 40) + (", log scale" if column.is_log else "")
    bar.set_label(name, fontsize=9, color=colors.ink)
    if column.num_missing:
        handle = _handle(f"no value ({column.num_missing:,})", colors.missing)
        _legend(axes, [handle], (1.04, 0.22), colors)


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
        zorder=2,
        **colors,
    )


def _label(figure: Figure, axes: Axes, content: MapContent, colors: ThemeColors) -> None:
    left = _PLOT_BOX[0]
    figure.text(left, 0.945, _shortened(content.title, 80), fontsize=12, weight="bold", color=colors.ink)
    notes = textwrap.wrap(" · ".join(content.notes), _NOTE_WIDTH, max_lines=3, placeholder=" ...")
    figure.text(left, 0.075, "\n".join(notes), fontsize=7.5, color=colors.quiet, va="top", linespacing=1.3)
    axes.set_xlabel(content.plane.axis_labels[0], fontsize=9, color=colors.ink)
    axes.set_ylabel(content.plane.axis_labels[1], fontsize=9, color=colors.ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(colors.line)
    axes.tick_params(labelsize=7.5, color=colors.line, labelcolor=colors.quiet)
    if content.keeps_scale:
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_xticks([])
        axes.set_yticks([])
    else:
        axes.grid(color=colors.grid, linewidth=0.7)
        axes.set_axisbelow(True)


def _shortened(text: str, width: int) -> str:
    """Leave out the middle of what is too long.

    Example:
        >>> _shortened("sp|P0A7V8|RS4_ECOLI", 11)
        'sp|P0…ECOLI'
    """
    kept = width - 1
    return text if len(text) <= width else f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


# ---------------------------------------------------------------------------------------- the page

_PAGE = files("genoembed.plotting") / "page"


def build_page(content: MapContent) -> str:
    """Build the page."""
    template, style, *scripts = (
        (_PAGE / name).read_text(encoding="utf-8") for name in ("map.html", "map.css", "points.js", "map.js")
    )
    parts = {
        "title": html.escape(content.title),
        "style": f"{_css_colors()}\n{style}",
        "content": _as_json(_facts(content)),
        "script": "\n".join(scripts),
    }
    # of all that a browser could run in the page, it runs what has these digests
    parts |= {f"{name}Digest": _digest(f"\n{parts[name]}\n") for name in ("style", "script")}
    pieces = template.split("@@")  # text, name, text, name, ..., text
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _css_colors() -> str:
    light, dark = asdict(THEMES["light"]), asdict(THEMES["dark"])
    pairs = [f"--{name}: light-dark({light[name]}, {dark[name]});" for name in light if name != "scale"]
    return f":root {{ {' '.join(pairs)} }}"


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
        "themes": {name: asdict(colors) for name, colors in THEMES.items()},
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
        joined: dict[str, Any] = {}
        if column.has_other:  # the classes do not say it all
            texts, codes = np.unique(np.array(column.values, dtype=str), return_inverse=True)
            joined = {"texts": texts.tolist(), "textOf": _encoded(codes, "<i4")}
        return {
            "kind": "class",
            "name": column.name,
            "classes": list(column.classes),
            "colors": {theme: list(column.colors(theme)) for theme in THEMES},
            "hasOther": column.has_other,
            "counts": list(column.counts),
            "codes": _encoded(column.codes, "<i2"),
            **joined,
        }
    return {
        "kind": "number",
        "name": column.name,
        "values": _encoded(column.values, "<f8"),
        "low": column.low,
        "high": column.high,
        "isLog": column.is_log,
        "isDate": column.is_date,
        "ticks": [list(tick) for tick in column.ticks],
        "missing": column.num_missing,
    }


def _encoded(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode("ascii")


def _as_json(facts: dict[str, Any]) -> str:
    """Write JSON that cannot end the script element it stands in."""
    text = json.dumps(facts, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
