"""The picture of a sweep: score by layer, with fusions and baselines as lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from genoembed.errors import MissingExtraError, StoreError
from genoembed.probing.linear import METRICS
from genoembed.probing.report import layer_number
from genoembed.probing.sweep import METRIC_WORDS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from genoembed.config.choices import ProbeTask
    from genoembed.probing.sweep import Scored


_BLUE, _GREY, _RED = "#1f5fa8", "#808080", "#b2182b"
_COLOURS = {
    "fusion": ("#1b7837", "#7fbc41", "#e08214", "#c51b7d"),
    "baseline": ("#000000", "#7f3b08", "#542788"),
}
_DASHES = ((0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3)))
_MOST_TICKS = 17


def plot_layers(
    path: Path,
    layers: Sequence[Scored],
    *,
    lines: Sequence[Scored],
    untrained: Sequence[Scored] = (),
    best: str,
    task: ProbeTask,
    title: str,
) -> None:
    """Draw score by layer, with one standard deviation over folds as a band."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(package="matplotlib", extra="analysis", purpose="a plot by layer") from error
    figure = Figure(figsize=(9.0, 5.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    metric = METRICS[task][0]
    place = [layer.name for layer in layers].index(best)
    top = layers[place].metrics[metric].mean
    _draw_curve(axes, layers, metric, colour=_BLUE, label="model, by layer", marker="o")
    axes.plot(
        [place], [top], "o", color=_RED, markersize=9, zorder=5, label=f"best: {_tick(best)} ({top:.3f})"
    )
    _draw_lines(axes, lines, metric)
    if untrained:
        _draw_curve(axes, untrained, metric, colour=_GREY, label="untrained copy, by layer", marker="x")
    _dress(axes, [layer.name for layer in layers])
    axes.set_ylabel(f"{METRIC_WORDS[metric]} (mean, band: 1 s.d. over folds)")
    axes.set_title(title, fontsize=10, loc="left")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    try:
        figure.savefig(path)
    except OSError as error:
        problem = (
            f"cannot be written ({error.strerror or error}); free space, or set output to another folder"
        )
        raise StoreError(problem, path=str(path)) from error


def _draw_curve(
    axes: Axes, layers: Sequence[Scored], metric: str, *, colour: str, label: str, marker: str
) -> None:
    places = np.arange(len(layers))
    means = np.array([layer.metrics[metric].mean for layer in layers])
    sds = np.array([layer.metrics[metric].sd for layer in layers])
    axes.fill_between(places, means - sds, means + sds, color=colour, alpha=0.15, linewidth=0)
    axes.plot(places, means, color=colour, marker=marker, markersize=3.5, linewidth=1.4, label=label)


def _draw_lines(axes: Axes, lines: Sequence[Scored], metric: str) -> None:
    """Draw fusions solid and thin, baselines dashed, each in a colour of its own."""
    counts = {"fusion": 0, "baseline": 0}
    for line in lines:
        kind = "fusion" if line.kind == "fusion" else "baseline"
        number = counts[kind]
        counts[kind] += 1
        mean = line.metrics[metric].mean
        axes.axhline(
            mean,
            color=_COLOURS[kind][number % len(_COLOURS[kind])],
            linestyle="-" if kind == "fusion" else _DASHES[number % len(_DASHES)],
            linewidth=0.9 if kind == "fusion" else 1.5,
            label=f"{line.name} ({mean:.3f})",
        )


def _dress(axes: Axes, names: Sequence[str]) -> None:
    """Name the layers along the axis, as many as there is room for."""
    step = -(-len(names) // _MOST_TICKS)
    places = range(0, len(names), step)
    are_numbers = all(layer_number(name) is not None for name in names)
    axes.set_xticks(list(places), [_tick(names[place]) for place in places], fontsize=8)
    if not are_numbers:
        axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlabel("layer" if are_numbers else "layer (module path)")
    axes.margins(x=0.02)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _tick(path: str) -> str:
    number = layer_number(path)
    return path if number is None else str(number)
