"""What a probe is asked to do: how layers are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from genoembed.config.choices import Folding, Preset, ProbeTask, UnmatchedPolicy
from genoembed.config.embed import field_problems
from genoembed.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator


MIN_FOLDS = 3
TOP = (2, 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """How layers are compared."""

    task: ProbeTask = "classification"
    """What the labels are: classes, or numbers."""
    cv: Folding = "stratified"
    """Which rows share a fold: any (spread by class), those of a group, kin by shared k-mers, or those of a
    chromosome."""
    num_folds: int = 5
    """Test folds, at least 3."""
    seed: int = 0
    """Of the folds, and of the untrained copy's weights."""
    id_column: str = "id"
    """Column of the record ids in the table of labels."""
    label_column: str = "label"
    """Column of the labels."""
    group_column: str | None = None
    """Column of the groups; with ``cv='grouped'`` None is ``group``."""
    split_column: str | None = None
    """Column that says ``train`` or ``test``, for the preset; None is ``split``, or the table ``split``."""
    split: str | None = None
    """Table with the columns of the ids and of the split, instead of a column of the labels."""
    unmatched: UnmatchedPolicy = "error"
    """Labels whose record is not there: stop, or say how many and go on."""
    kin_identity: float = 0.8
    """Identity from which sequences are kin, for ``cv='homology'``."""
    top: tuple[int, ...] = TOP
    """How many of the best layers are concatenated; each number is a candidate."""
    baselines: bool = True
    """Score 4-mers, 6-mers, GC content with length, and one-hot letters on the same folds."""
    untrained: bool = True
    """Score a copy of the model with fresh weights; this doubles the cost."""
    preset: Preset = "none"
    """``geneb``: also fit on all, ten and one training rows of each class, and score a given test split."""
    sequences: tuple[str, ...] = ()
    """Sequence files, where those that an embedding file names are gone."""
    transform: tuple[str, ...] = ()
    """Fitted transforms (``fit-transform``), each applied to the layer it was fitted on; the untrained copy's
    layers stay as they are."""
    plot: bool = True
    """Draw score by layer as PNG and SVG."""

    def __post_init__(self) -> None:
        problems = list(field_problems(self, at_least={"num_folds": (MIN_FOLDS, "")}))
        if not problems:
            problems += self._rule_problems()
        if problems:
            raise ConfigError(*problems)

    def _rule_problems(self) -> Iterator[str]:
        if not 0 < self.kin_identity <= 1:
            yield f"kin_identity is {self.kin_identity}; set kin_identity above 0, at most 1, such as 0.8"
        if any(number < 2 for number in self.top):
            yield f"top is {list(self.top)}; set top to numbers of 2 or more, such as {list(TOP)}"
        if self.preset == "none" and (self.split or self.split_column):
            yield "split and split_column are for a preset; set preset to 'geneb', or leave them out"
        if self.split and self.split_column:
            yield "split names a table and split_column a column of the labels; give one of the two"
        if self.preset != "none" and self.task != "classification":
            yield f"preset 'geneb' is for classes, but task is {self.task!r}; set task to 'classification'"
        if self.group_column and self.cv != "grouped":
            yield f"group_column is given, but cv is {self.cv!r}; set cv to 'grouped', or leave it out"
