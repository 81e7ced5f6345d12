"""What a probe found: a table, a plot, and in words which layer to use and whether it was worth a model."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from genoembed.errors import MissingExtraError, StoreError
from genoembed.probing.cross_validation import METRIC_WORDS, METRICS
from genoembed.probing.sweep import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from genoembed.config.choices import ProbeTask
    from genoembed.probing.cross_validation import MetricSummary
    from genoembed.probing.sweep import InsideChoice, Scored


CHOSEN = "layer chosen in training folds"
CHOSEN_FUSION = "layer or fusion chosen in training folds"
UNTRAINED = "untrained copy, layer chosen likewise"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeReport:
    """What a probe found."""

    output: Path
    """Folder with ``probe.json``, the plot, and vectors that were made."""
    embeddings: Path
    """The file that the layers were read from; as input, it probes other labels without another pass."""
    was_extracted: bool
    """Whether this run made it; False where it was there."""
    task: ProbeTask
    metrics: tuple[str, ...]
    """Names of the metrics; the first one decides."""
    cv: str
    num_folds: int
    num_groups: int | None
    """Groups that folds did not cut; None without groups."""
    num_rows: int
    """Rows that were scored (with a split: those to train on)."""
    counts: Mapping[str, int]
    """Rows and labels that were left out, by why."""
    classes: Mapping[str, int]
    """Rows of each class; empty for a regression."""
    layers: tuple[Scored, ...]
    """In the order of the model."""
    fusions: tuple[Scored, ...]
    baselines: tuple[Scored, ...]
    untrained: tuple[Scored, ...]
    """The same layers of an untrained copy."""
    inside: InsideChoice
    """The score when the layer is chosen inside the training folds: the figure to quote."""
    inside_fusion: InsideChoice | None
    """The same with fusions among the candidates; None without fusions."""
    inside_untrained: InsideChoice | None
    choice: LayerChoice
    comparisons: tuple[Comparison, ...]
    """Against each baseline, the strongest first."""
    verdict: str
    """Whether the embeddings were worth it, in plain words."""
    fusion_weights: Mapping[str, float]
    """Weight of each layer in the learned mean; empty where there is none."""
    fusion_options: str
    """What ``genoembed extract`` takes to make that mean; empty where there is none."""
    shots: Mapping[str, Mapping[str, Mapping[str, MetricSummary]]]
    """With the preset: candidate -> regime -> metric; empty without."""
    num_test: int
    """Rows of the test split; 0 without one."""
    notes: tuple[str, ...]
    """What was left out, and why."""
    plots: tuple[Path, ...]
    seconds: Mapping[str, float]
    """Wall time of the passes and of the probes."""

    @property
    def recommendation(self) -> str:
        """Which layer to use, in words."""
        return self.choice.sentence

    def table(self) -> list[dict[str, str | float]]:
        """Collect the scores as rows.

        Returns:
            One row per candidate: name, kind, and mean and deviation of each metric.
        """
        rows = [_row(one.name, one.kind, one.metrics) for one in (*self.layers, *self.fusions)]
        if len(self.layers) > 1:
            rows.append(_row(CHOSEN, "choice", self.inside.metrics))
        if self.inside_fusion is not None:
            rows.append(_row(CHOSEN_FUSION, "choice", self.inside_fusion.metrics))
        rows += [_row(one.name, one.kind, one.metrics) for one in self.baselines]
        if self.inside_untrained is not None:
            rows.append(_row(UNTRAINED, "untrained", self.inside_untrained.metrics))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON holds.

        Returns:
            The fields, with the recommendation and the table.
        """
        plain = asdict(self)
        del plain["choice"]
        return {
            "recommendation": self.recommendation,
            "layer": self.choice.layer,
            "near_best": self.choice.near_best,
            **plain,
            "output": str(self.output),
            "embeddings": str(self.embeddings),
            "plots": [str(path) for path in self.plots],
            "table": self.table(),
        }


def fusion_options(weights: Mapping[str, float], *, are_all: bool, pooling: str | None) -> str:
    """Write down the options of ``genoembed extract`` that make the weighted mean.

    Example:
        >>> fusion_options({"blocks.0": 0.25, "blocks.1": 0.75}, are_all=True, pooling="mean")
        '--layer all --pool mean --fuse weighted --fusion-weights 0.25,0.75'
    """
    if not weights:
        return ""
    words = ["--layer", "all"] if are_all else [word for name in weights for word in ("--layer", name)]
    words += [] if pooling is None else ["--pool", pooling]
    numbers = ",".join(f"{weight:.6g}" for weight in weights.values())
    return shlex.join([*words, "--fuse", "weighted", "--fusion-weights", numbers])


def metric_names(task: ProbeTask) -> tuple[str, ...]:
    """Return the metrics of a task as people write them."""
    return tuple(METRIC_WORDS[name] for name in METRICS[task])


def _row(name: str, kind: str, metrics: Mapping[str, Any]) -> dict[str, str | float]:
    row: dict[str, str | float] = {"name": name, "kind": kind}
    for metric, summary in metrics.items():
        row[metric], row[f"{metric}_sd"] = summary.mean, summary.sd
    return row


def describe_classes(target: Sequence[object]) -> dict[str, int]:
    """Count the rows of each class.

    Example:
        >>> describe_classes(["b", "a", "b"])
        {'a': 1, 'b': 2}
    """
    names = [str(label) for label in target]
    return {name: names.count(name) for name in sorted(set(names))}


NEAR_BEST = 0.95
"""Layers with this share of the best score are as good as it for most purposes."""
_NUMBERED = re.compile(r"(?:blocks\.(\d+)\.mlp\.l3|(?!blocks\.)[A-Za-z_.]+\.(\d+))")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerChoice:
    """Which layer to use."""

    layer: str
    """Module path of the best one."""
    near_best: tuple[str, ...]
    """Layers that reach 95 % of its score, in the order of the model; none where that is 0 or less."""
    sentence: str
    """Such as ``use layer 21 (blocks.21.mlp.l3), mean pooling: MCC 0.71 +- 0.02; ...``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The model against one baseline, on the same folds."""

    name: str
    score: MetricSummary
    """The baseline's first metric."""
    difference: float
    """Mean over folds of the model's score less the baseline's."""
    difference_sd: float
    """Standard deviation of that difference over folds."""
    is_beaten: bool
    """Whether the model is above it on average, by more than the differences scatter."""


def name_layer(path: str) -> str:
    """Return a layer's name as a user would write it.

    Example:
        >>> name_layer("blocks.21.mlp.l3"), name_layer("encoder.layer.5"), name_layer("blocks.21")
        ('layer 21 (blocks.21.mlp.l3)', 'layer 5 (encoder.layer.5)', 'layer blocks.21')
    """
    number = layer_number(path)
    return f"layer {path}" if number is None else f"layer {number} ({path})"


def layer_number(path: str) -> int | None:
    """Find the integer that means a module, where there is one."""
    found = _NUMBERED.fullmatch(path)
    return None if found is None else int(found[1] or found[2])


def choose_layer(
    layers: Sequence[Scored],
    inside: InsideChoice,
    *,
    fusions: Sequence[Scored] = (),
    pooling: str | None,
    task: ProbeTask,
) -> LayerChoice:
    """Recommend the layer with the best mean score, the first of equals."""
    metric = METRICS[task][0]
    means = [layer.metrics[metric].mean for layer in layers]
    best = int(np.argmax(means))
    near = [place for place, mean in enumerate(means) if means[best] > 0 and mean >= NEAR_BEST * means[best]]
    is_one_range = bool(near) and near[-1] - near[0] + 1 == len(near)
    pooled = "" if pooling is None else f", {pooling} pooling"
    parts = [f"use {name_layer(layers[best].name)}{pooled}: {shown(layers[best], task)}"]
    if len(layers) > 1:
        parts.append(_reach([layers[place].name for place in near], is_one_range=is_one_range))
        parts.append(f"{shown(inside, task)} where the layer is chosen without the test fold")
    above = max(fusions, key=lambda fusion: fusion.metrics[metric].mean, default=None)
    if above is not None and above.metrics[metric].mean > means[best]:
        parts.append(f"above it: {above.name}, {shown(above, task)}")
    return LayerChoice(
        layer=layers[best].name,
        near_best=tuple(layers[place].name for place in near),
        sentence="; ".join(filter(None, parts)),
    )


def _reach(near: Sequence[str], *, is_one_range: bool) -> str:
    if not near:
        return "no layer is better than chance"
    share = f"{NEAR_BEST:.0%}".replace("%", " %")
    numbers = [layer_number(path) for path in near]
    if len(near) == 1:
        return f"no other layer reaches {share} of it"
    first, last = (str(near[end] if numbers[end] is None else numbers[end]) for end in (0, -1))
    if is_one_range:
        return f"{share} of the best within layers {first}-{last}"
    return f"{share} of the best at {len(near)} layers between {first} and {last}"


def compare_baselines(
    model: InsideChoice, baselines: Sequence[tuple[str, MetricSummary]], *, task: ProbeTask
) -> list[Comparison]:
    """Compare the model with baselines, fold by fold.

    Args:
        model: Its score with everything chosen inside the training folds.
        baselines: First metric of each baseline by name, on the same folds.
        task: What the target is.

    Returns:
        A comparison a baseline, the strongest baseline first.
    """
    mine = np.array(model.metrics[METRICS[task][0]].values)
    found = []
    for name, score in sorted(baselines, key=lambda pair: -pair[1].mean):
        by_fold = mine - np.array(score.values)
        mean, sd = float(by_fold.mean()), float(by_fold.std(ddof=1))
        found.append(
            Comparison(
                name=name,
                score=score,
                difference=mean,
                difference_sd=sd,
                is_beaten=bool(mean > sd / np.sqrt(len(by_fold)) and mean > 0),
            )
        )
    return found


def verdict(model: InsideChoice, comparisons: Sequence[Comparison], *, task: ProbeTask) -> str:
    """Write in plain words whether the embeddings were worth it."""
    metric = METRIC_WORDS[METRICS[task][0]]
    mine = f"{metric} {model.metrics[METRICS[task][0]].mean:.3f}"
    if not comparisons:
        return "no baselines were measured, so nothing says that the model was needed"
    lost = [one for one in comparisons if one.difference <= 0]
    close = [one for one in comparisons if one.difference > 0 and not one.is_beaten]
    if lost:
        named = ", ".join(f"{one.name} ({metric} {one.score.mean:.3f})" for one in lost)
        return f"the probe ({mine}) does NOT beat {named}: for this label the embeddings are not needed"
    if close:
        named = ", ".join(f"{one.name} ({_by(one)})" for one in close)
        return (
            f"the probe ({mine}) is above {named}, but the difference is within the variation between "
            "folds: not clearly better"
        )
    first = comparisons[0]
    return (
        f"the probe ({mine}) beats every baseline; the strongest is {first.name} "
        f"({metric} {first.score.mean:.3f}), beaten by {_by(first)}"
    )


def _by(one: Comparison) -> str:
    return f"{one.difference:+.3f} +- {one.difference_sd:.3f}"


# ------------------------------------------------------------------------------------------------- the plot


_BLUE, _GREY, _RED = "#1f5fa8", "#808080", "#b2182b"
_COLORS = {
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
    _draw_curve(axes, layers, metric, color=_BLUE, label="model, by layer", marker="o")
    axes.plot(
        [place], [top], "o", color=_RED, markersize=9, zorder=5, label=f"best: {_tick(best)} ({top:.3f})"
    )
    _draw_lines(axes, lines, metric)
    if untrained:
        _draw_curve(axes, untrained, metric, color=_GREY, label="untrained copy, by layer", marker="x")
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
    axes: Axes, layers: Sequence[Scored], metric: str, *, color: str, label: str, marker: str
) -> None:
    places = np.arange(len(layers))
    means = np.array([layer.metrics[metric].mean for layer in layers])
    sds = np.array([layer.metrics[metric].sd for layer in layers])
    axes.fill_between(places, means - sds, means + sds, color=color, alpha=0.15, linewidth=0)
    axes.plot(places, means, color=color, marker=marker, markersize=3.5, linewidth=1.4, label=label)


def _draw_lines(axes: Axes, lines: Sequence[Scored], metric: str) -> None:
    """Draw fusions solid and thin, baselines dashed, each in a color of its own."""
    counts = {"fusion": 0, "baseline": 0}
    for line in lines:
        kind = "fusion" if line.kind == "fusion" else "baseline"
        number = counts[kind]
        counts[kind] += 1
        mean = line.metrics[metric].mean
        axes.axhline(
            mean,
            color=_COLORS[kind][number % len(_COLORS[kind])],
            linestyle="-" if kind == "fusion" else _DASHES[number % len(_DASHES)],
            linewidth=0.9 if kind == "fusion" else 1.5,
            label=f"{line.name} ({mean:.3f})",
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
