"""Labelled rows for training: columns, cleaning, splits and augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from genoembed.config.choices import (
    FindingPolicy,
    LabelKind,
    SplitMethod,
    UnlabelledPolicy,
)
from genoembed.config.embed import field_problems
from genoembed.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Which views training sees; by default none but the sequence itself."""

    reverse_complement: float = 0.0
    """Probability of reading the other strand. Leave at 0 where the strand is part of the question."""
    crop_fraction: float = 1.0
    """A crop has at least this share of the sequence, up to all of it; 1 crops nothing."""
    max_crop_bp: int | None = None
    """Longer sequences are cropped to this many bases, wherever the crop falls."""
    mutation_rate: float = 0.0
    """Probability that a base is replaced by one of the three others."""

    def __post_init__(self) -> None:
        problems = list(field_problems(self, at_least={"max_crop_bp": (1, "bases")}))
        if not problems:
            problems += [
                f"{name} is {value}; set {name} from 0 to 1"
                for name in ("reverse_complement", "mutation_rate")
                if not 0 <= (value := getattr(self, name)) <= 1
            ]
            if not 0 < self.crop_fraction <= 1:
                problems.append(
                    f"crop_fraction is {self.crop_fraction}; set crop_fraction above 0, at most 1 for no crop"
                )
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class CleaningConfig:
    """What is looked for, and what becomes of it."""

    both_strands: bool = True
    """A sequence and its reverse complement are one; False where the strand is part of the question."""
    duplicates: FindingPolicy = "keep"
    """Equal sequences with one label: ``drop`` keeps the first."""
    conflicts: FindingPolicy = "keep"
    """Equal sequences with different labels: ``drop`` leaves all of them out."""

    def __post_init__(self) -> None:
        problems = tuple(field_problems(self))
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class TableColumns:
    """Where sequences and labels stand in a table."""

    sequence_column: str = "sequence"
    """Column of the sequences."""
    label_columns: tuple[str, ...] = ("label",)
    """Column of the labels; several for ``multilabel`` (0 or 1 each) and ``regression``."""
    label_delimiter: str | None = None
    """Separates names in one cell, for ``multilabel`` and ``token``."""
    ignore_label: str | None = None
    """For ``token``: the name that stands for a base without label, such as ``.``."""
    id_column: str | None = None
    """Column of the ids. None: ``row_1``, ``row_2`` ...; for a table of labels, the column ``id``."""
    split_column: str | None = None
    """Column that says to which side of the split a row belongs."""
    group_column: str | None = None
    """Column of groups that no split may cut, instead of clusters of homologs."""
    unlabelled: UnlabelledPolicy = "error"
    """A sequence whose id is not in the table of labels: stop, or leave it out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledConfig(TableColumns):
    """Where sequences and labels stand, and what a label is."""

    kind: LabelKind = "class"
    """``class``, ``multilabel``, ``regression``, ``token`` (one a base) or ``none`` (sequences only)."""

    def __post_init__(self) -> None:
        problems = list(field_problems(self))
        if not problems:
            problems += self._rule_problems()
        if problems:
            raise ConfigError(*problems)

    def _rule_problems(self) -> Iterator[str]:
        columns = self.label_columns
        if self.kind != "none" and not columns:
            yield "label_columns is empty; name the column of the labels"
        if len(columns) > 1 and self.kind in ("class", "token"):
            yield (
                f"label_columns names {len(columns)} columns, but kind {self.kind!r} has one; name one, or "
                "set kind='multilabel' or 'regression'"
            )
        if self.label_delimiter is not None and (
            self.kind not in ("multilabel", "token") or len(columns) > 1
        ):
            yield (
                "label_delimiter separates names in the one column of kind 'multilabel' or 'token'; "
                "leave it out"
            )
        if self.ignore_label is not None and self.kind != "token":
            yield "ignore_label is for kind 'token'; leave it out"
        named = [*self._wanted(), *filter(None, (self.id_column, self.split_column, self.group_column))]
        if len(set(named)) < len(named):
            yield f"columns {', '.join(named)}: one is named twice; name each column once"

    def _wanted(self) -> tuple[str, ...]:
        return (self.sequence_column, *(self.label_columns if self.kind != "none" else ()))


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """How rows are parted."""

    split: SplitMethod = "stratified"
    """``random``; ``stratified`` keeps the shares of labels; ``homology`` keeps kin together and the shares
    as well as that allows; ``column`` takes what the file says."""
    validation_fraction: float = 0.1
    """Share of the rows that stops training and chooses the best step; 0 for none."""
    test_fraction: float = 0.1
    """Share of the rows that judges; 0 for none."""
    seed: int = 0
    """Decides which rows."""

    def __post_init__(self) -> None:
        problems = list(field_problems(self, at_least={"seed": (0, "")}))
        if not problems:
            problems += [
                f"{name} is {value}; set {name} from 0 to below 1, such as 0.1"
                for name in ("validation_fraction", "test_fraction")
                if not 0 <= (value := getattr(self, name)) < 1
            ]
            if self.validation_fraction + self.test_fraction >= 1:
                problems.append(
                    f"validation_fraction {self.validation_fraction} and test_fraction {self.test_fraction} "
                    "leave nothing to train on; set them to less than 1 together"
                )
        if problems:
            raise ConfigError(*problems)

    @property
    def fractions(self) -> tuple[float, float, float]:
        """Shares of train, validation and test."""
        return (
            1 - self.validation_fraction - self.test_fraction,
            self.validation_fraction,
            self.test_fraction,
        )
