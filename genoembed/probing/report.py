"""What a probe found: a table, and in words which layer to use and whether it was worth a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from genoembed.probing.cross_validation import METRIC_WORDS, METRICS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from genoembed.config.choices import ProbeTask
    from genoembed.probing.cross_validation import MetricSummary
    from genoembed.probing.recommendation import LayerChoice
    from genoembed.probing.sweep import InsideChoice, Scored


CHOSEN = "layer chosen in training folds"
CHOSEN_FUSION = "layer or fusion chosen in training folds"
UNTRAINED = "untrained copy, layer chosen in the same way"


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
    """What to use, by the rule of one standard error."""
    command: str
    """The ``genoembed extract`` line that makes its vectors; empty where the file does not say how."""
    comparisons: tuple[Comparison, ...]
    """Against each baseline, the strongest first."""
    verdict: str
    """Whether the embeddings were worth it, in plain words."""
    fusion_weights: Mapping[str, float]
    """Weight of each layer in the learned mean; empty where there is none."""
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
        """Which layer or fusion to use, in words."""
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
            "command": self.command,
            "recommendation": self.recommendation,
            "recommended": self.choice.name,
            "recommended_layers": self.choice.layers,
            "fusion": self.choice.fusion,
            "layer": self.choice.layers[0] if self.choice.fusion == "none" else None,
            "near_best": self.choice.near_best,
            **plain,
            "output": str(self.output),
            "embeddings": str(self.embeddings),
            "plots": [str(path) for path in self.plots],
            "table": self.table(),
        }


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
