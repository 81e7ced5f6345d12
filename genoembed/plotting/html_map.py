"""A map as one HTML page that needs nothing else: no network, no server, no other file.

In: a :class:`MapContent`. Out: the page: plotly.js, the points, and the script of ``page/map.js``. A content
security policy in the page forbids the browser to fetch anything.

Our script draws the page on plotly.js. A figure made by plotly.py would have one trace per class, so that one
class hides another, and could neither search, nor switch between columns of both kinds, nor save a selection.
"""

from __future__ import annotations

import base64
import html
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from genoembed.errors import MissingExtraError
from genoembed.plotting.colors import MISSING_COLOR, ClassColumn, MapContent, NumberColumn, point_style

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
