"""What a probe found: tables, words, and the options that put it to use."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from genoembed.analysis.metrics import METRICS
from genoembed.analysis.sweep import METRIC_WORDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from genoembed.analysis.few_shot import ShotSummary
    from genoembed.analysis.folds import Task
    from genoembed.analysis.layer_choice import Comparison, LayerChoice
    from genoembed.analysis.sweep import InsideChoice, Scored

CHOSEN = "layer chosen in training folds"
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
    task: Task
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
    inside_untrained: InsideChoice | None
    choice: LayerChoice
    comparisons: tuple[Comparison, ...]
    """Against each baseline, the strongest first."""
    verdict: str
    """Whether the embeddings were worth it, in plain words."""
    fusion_weights: Mapping[str, float]
    """Weight of each layer in the learnt mean; empty where there is none."""
    fusion_options: str
    """What ``genoembed extract`` takes to make that mean; empty where there is none."""
    shots: Mapping[str, Mapping[str, Mapping[str, ShotSummary]]]
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
        """Lay the scores out.

        Returns:
            A row a candidate: name, kind, and mean and deviation of each metric.
        """
        rows = [_row(one.name, one.kind, one.metrics) for one in (*self.layers, *self.fusions)]
        if len(self.layers) > 1:
            rows.append(_row(CHOSEN, "choice", self.inside.metrics))
        rows += [_row(one.name, one.kind, one.metrics) for one in self.baselines]
        if self.inside_untrained is not None:
            rows.append(_row(UNTRAINED, "untrained", self.inside_untrained.metrics))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Give everything as values that JSON holds.

        Returns:
            The fields, with the recommendation and the table.
        """
        plain = {
            name: getattr(self, name)
            for name in (
                *("was_extracted", "task", "metrics", "cv", "num_folds", "num_groups", "num_rows", "counts"),
                *("classes", "verdict", "fusion_weights", "fusion_options", "num_test", "notes", "seconds"),
            )
        }
        scored = {
            name: [asdict(one) for one in getattr(self, name)]
            for name in ("layers", "fusions", "baselines", "untrained", "comparisons")
        }
        return {
            "recommendation": self.recommendation,
            "layer": self.choice.layer,
            "near_best": self.choice.near_best,
            **plain,
            "output": str(self.output),
            "embeddings": str(self.embeddings),
            "plots": [str(path) for path in self.plots],
            "table": self.table(),
            **scored,
            "inside": asdict(self.inside),
            "inside_untrained": None if self.inside_untrained is None else asdict(self.inside_untrained),
            "shots": {
                name: {
                    regime: {metric: asdict(summary) for metric, summary in scores.items()}
                    for regime, scores in regimes.items()
                }
                for name, regimes in self.shots.items()
            },
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


def metric_names(task: Task) -> tuple[str, ...]:
    """Name the metrics of a task as people write them."""
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
