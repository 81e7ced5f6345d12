"""A picture of a probe's report: score by layer with its spread over folds, and baselines as lines.

``probe`` draws it when it ends; ``plot`` draws it again from ``probe.json``, also in other formats.
"""

from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from genoembed.errors import StoreFormatError
from genoembed.plotting.colors import THEMES, ThemeColors
from genoembed.plotting.drawing import DRAWING_SETTINGS, METADATA

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from genoembed.config.choices import Theme

SUMMARY = "probe.json"
"""Report of a probe in its folder."""
_NUMBERED = re.compile(r"(?:blocks\.(\d+)\.mlp\.l3|(?!blocks\.)[A-Za-z_.]+\.(\d+))")


class DrawnScore(NamedTuple):
    """What is drawn of one candidate."""

    name: str
    kind: str
    """``layer``, ``fusion``, ``baseline`` or ``untrained``."""
    mean: float
    sd: float


def find_probe_report(path: Path) -> Path | None:
    """Return the report if a path is one of a probe, or the folder of one; None for other files."""
    if path.is_dir() and (path / SUMMARY).is_file():
        return path / SUMMARY
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return path if file.read(1) == b"{" else None


class LayerScores(NamedTuple):
    """What a picture shows."""

    layers: Sequence[DrawnScore]
    lines: Sequence[DrawnScore]
    """Fusions and baselines."""
    untrained: Sequence[DrawnScore]
    """The layers of an untrained copy; may be empty."""
    chosen: str
    """The candidate that is recommended."""
    metric: str
    title: str

    def draw(self, kind: Literal["png", "svg", "pdf"], *, theme: Theme = "light") -> bytes:
        """Draw score by layer, with one standard deviation over folds as a band."""
        import matplotlib as mpl
        from matplotlib.figure import Figure

        colors = THEMES[theme]
        with mpl.rc_context({**DRAWING_SETTINGS, **_inks(colors)}):
            figure = Figure(figsize=(9.0, 5.0), layout="constrained", facecolor=colors.background)
            axes = figure.add_subplot(facecolor=colors.background)
            _draw_curve(axes, self.layers, color=_MODEL[theme], label="model, by layer", marker="o")
            names = [layer.name for layer in self.layers]
            if self.chosen in names:
                place = names.index(self.chosen)
                score = self.layers[place].mean
                label = f"recommended: {_tick(self.chosen)} ({score:.3f})"
                axes.plot([place], [score], "o", color=_CHOSEN[theme], markersize=9, zorder=5, label=label)
            _draw_lines(axes, self.lines, self.chosen, theme)
            if self.untrained:
                _draw_curve(
                    axes, self.untrained, color=colors.missing, label="untrained copy, by layer", marker="x"
                )
            _dress(axes, names)
            axes.set_ylabel(f"{self.metric} (mean, band: 1 s.d. over folds)")
            axes.set_title(self.title, fontsize=10, loc="left")
            figure.legend(loc="outside right upper", fontsize=8, frameon=False)
            picture = io.BytesIO()
            figure.savefig(picture, format=kind, dpi=150, metadata=METADATA[kind])
        return picture.getvalue()


def plot_report(report: Path, *, title: str | None) -> LayerScores:
    """Read what a report of a probe shows.

    Raises:
        StoreFormatError: If the file is not a report of a probe.
    """
    try:
        found = json.loads(report.read_bytes())
        layers, fusions, baselines, untrained = (
            _scores(found[name]) for name in ("layers", "fusions", "baselines", "untrained")
        )
        return LayerScores(
            layers=layers,
            lines=[*fusions, *baselines],
            untrained=untrained,
            # reports of earlier versions name a layer alone
            chosen=str(found.get("recommended") or found["layer"]),
            metric=str(found["metrics"][0]),
            title=f"{found['num_rows']:,} rows, {found['num_folds']} {found['cv']} folds"
            if title is None
            else title,
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        problem = "is not a report of a probe; give an embedding file, or probe.json of a probe"
        raise StoreFormatError(problem, path=str(report)) from error


def _scores(candidates: list[dict[str, Any]]) -> list[DrawnScore]:
    """Take the first metric of each candidate: the one that decides."""
    found = []
    for one in candidates:
        summary = next(iter(one["metrics"].values()))
        found.append(DrawnScore(one["name"], one["kind"], float(summary["mean"]), float(summary["sd"])))
    return found


def layer_number(path: str) -> int | None:
    """Find the integer that means a module, where there is one.

    Example:
        >>> layer_number("blocks.21.mlp.l3"), layer_number("encoder.layer.5"), layer_number("blocks.21")
        (21, 5, None)
    """
    found = _NUMBERED.fullmatch(path)
    return None if found is None else int(found[1] or found[2])


def order_layers(paths: Iterable[str]) -> list[str]:
    """Sort module paths by depth as far as names tell it: embeddings, blocks by number, what follows them.

    Lists of blocks with different names, of an encoder and a decoder, stay in the order given.

    Example:
        >>> order_layers(["norm", "final", "blocks.28", "blocks.4", "blocks.4.mlp.l3", "embed_tokens"])
        ['embed_tokens', 'blocks.4.mlp.l3', 'blocks.4', 'blocks.28', 'norm', 'final']
    """
    given = list(dict.fromkeys(paths))
    parts = {path: re.split(r"(?:^|(?<=\.))(\d+)(?=\.|$)", path) for path in given}
    lists = list(dict.fromkeys(split[0] for split in parts.values()))

    def depth(path: str) -> tuple[object, ...]:
        before, *behind = parts[path]
        if not behind:
            return (0 if "emb" in path.lower() else 3 if path == "final" else 2,)
        numbers = [int(number) for number in behind[2::2]]
        # a module inside a block comes before the block's own output
        return (1, lists.index(before), int(behind[0]), not behind[1], numbers)

    return sorted(given, key=depth)


_MODEL = {"light": "#1f5fa8", "dark": "#6aa9f0"}
_CHOSEN = {"light": "#b2182b", "dark": "#ff7b72"}
_COLORS = {
    "light": {
        "fusion": ("#1b7837", "#7fbc41", "#e08214", "#c51b7d"),
        "baseline": ("#000000", "#7f3b08", "#542788"),
    },
    "dark": {
        "fusion": ("#5aae61", "#a6dba0", "#fdb863", "#f1a0d0"),
        "baseline": ("#ffffff", "#e0a070", "#b8a0e0"),
    },
}
_DASHES = ((0, (5, 2)), (0, (1, 1.5)), (0, (7, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3)))
_MOST_TICKS = 17


def _inks(colors: ThemeColors) -> dict[str, str]:
    """Return the settings of matplotlib that color text, axes and grid."""
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {**dict.fromkeys(inks, colors.ink), "grid.color": colors.grid}


def _draw_curve(axes: Axes, layers: Sequence[DrawnScore], *, color: str, label: str, marker: str) -> None:
    places = np.arange(len(layers))
    means = np.array([layer.mean for layer in layers])
    sds = np.array([layer.sd for layer in layers])
    axes.fill_between(places, means - sds, means + sds, color=color, alpha=0.15, linewidth=0)
    axes.plot(places, means, color=color, marker=marker, markersize=3.5, linewidth=1.4, label=label)


def _draw_lines(axes: Axes, lines: Sequence[DrawnScore], chosen: str, theme: Theme) -> None:
    """Draw fusions solid and thin, baselines dashed, each in a color of its own."""
    counts = {"fusion": 0, "baseline": 0}
    for line in lines:
        kind = "fusion" if line.kind == "fusion" else "baseline"
        number = counts[kind]
        counts[kind] += 1
        axes.axhline(
            line.mean,
            color=_COLORS[theme][kind][number % len(_COLORS[theme][kind])],
            linestyle="-" if kind == "fusion" else _DASHES[number % len(_DASHES)],
            linewidth=0.9 if kind == "fusion" else 1.5,
            label=f"{'recommended: ' if line.name == chosen else ''}{line.name} ({line.mean:.3f})",
        )


def _dress(axes: Axes, names: Sequence[str]) -> None:
    """Label the layers along the axis, as many as there is room for."""
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
