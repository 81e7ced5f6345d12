"""Labeled rows for training: columns, cleaning, splits and augmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genoembed.config.choices import FindingPolicy, LabelKind, SplitMethod, UnlabeledPolicy
from genoembed.config.fields import Config, option
from genoembed.config.training import DATA
from genoembed.errors import Problem, Remedy

if TYPE_CHECKING:
    from collections.abc import Iterator

AUGMENTATION, SPLIT = "Augmentation", "Train, validation and test"


class AugmentConfig(Config):
    """Which views training sees; by default none but the sequence itself."""

    reverse_complement: float = option(
        0.0,
        ge=0,
        le=1,
        group=AUGMENTATION,
        metavar="SHARE",
        help="Probability of reading the other strand; leave it at 0 where the strand is part of the "
        "question.",
    )
    crop_fraction: float = option(
        1.0,
        gt=0,
        le=1,
        group=AUGMENTATION,
        metavar="SHARE",
        help="A random crop keeps at least this share of a sequence; 1 crops nothing.",
    )
    max_crop_bp: int | None = option(
        None,
        ge=1,
        unit="bases",
        group=AUGMENTATION,
        metavar="BASES",
        help="Crop longer sequences to this many bases, at a random place.",
    )
    mutation_rate: float = option(
        0.0,
        ge=0,
        le=1,
        group=AUGMENTATION,
        metavar="SHARE",
        help="Probability that a base is replaced by one of the three others.",
    )


class CleaningConfig(Config):
    """What is looked for among equal sequences, and what becomes of it."""

    both_strands: bool = option(
        True,
        group=DATA,
        help="A sequence and its reverse complement count as equal; switch it off where the strand is part "
        "of the question.",
    )
    duplicate_sequences: FindingPolicy = option(
        "keep",
        group=DATA,
        help="Equal sequences with the same label: report them, drop all but the first, or stop.",
    )
    conflicts: FindingPolicy = option(
        "keep", group=DATA, help="Equal sequences with different labels: report them, drop all, or stop."
    )


class TableColumns(Config):
    """Where sequences and labels stand in a table."""

    sequence_column: str = option("sequence", group=DATA, metavar="NAME", help="Column of the sequences.")
    label_columns: tuple[str, ...] = option(
        ("label",),
        group=DATA,
        basic=True,
        flag="--label-column",
        metavar="NAME",
        help="Column of the labels. Repeat it for multilabel (0 or 1 in each) and regression.",
    )
    label_delimiter: str | None = option(
        None,
        group=DATA,
        metavar="TEXT",
        help="For multilabel and token: what separates the names in one cell.",
    )
    ignore_label: str | None = option(
        None, group=DATA, metavar="NAME", help="For token: the name that stands for a base without a label."
    )
    id_column: str | None = option(
        None,
        group=DATA,
        metavar="NAME",
        shown_default="row_1, row_2 ...; in a table of labels, id",
        help="Column of the ids.",
    )
    split_column: str | None = option(
        None,
        group=SPLIT,
        metavar="NAME",
        help="For --split column: the column that says train, validation or test.",
    )
    group_column: str | None = option(
        None,
        group=SPLIT,
        metavar="NAME",
        help="For --split homology: column of groups that stay together, instead of clusters of homologs.",
    )
    unlabeled: UnlabeledPolicy = option(
        "error", group=DATA, help="A sequence whose id is not in the table of labels: stop, or skip it."
    )


class LabeledConfig(TableColumns):
    """Where sequences and labels stand, and what a label is."""

    kind: LabelKind = option("class", help="What a label is; none reads sequences only.")

    def _problems(self) -> Iterator[str]:
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
        wanted = (self.sequence_column, *(columns if self.kind != "none" else ()))
        named = [*wanted, *filter(None, (self.id_column, self.split_column, self.group_column))]
        if len(set(named)) < len(named):
            yield f"columns {', '.join(named)}: one is named twice; name each column once"


class SplitShares(Config):
    """How rows are divided into train, validation and test."""

    split: SplitMethod = option(
        "stratified",
        group=SPLIT,
        basic=True,
        help="How rows are divided where no files are given: at random; keeping the shares of labels; "
        "keeping homologs together; or by a column.",
    )
    validation_fraction: float = option(
        0.1,
        ge=0,
        lt=1,
        group=SPLIT,
        metavar="SHARE",
        help="Share of the rows that stops training and chooses the best step; 0 for none.",
    )
    test_fraction: float = option(
        0.1,
        ge=0,
        lt=1,
        group=SPLIT,
        metavar="SHARE",
        help="Share of the rows that is evaluated once, at the end; 0 for none.",
    )


class SplitConfig(SplitShares):
    """How rows are divided, and with which seed."""

    seed: int = option(0, ge=0, help="Random seed: which rows.")

    def _problems(self) -> Iterator[str]:
        return split_problems(self.validation_fraction, self.test_fraction)

    @property
    def fractions(self) -> tuple[float, float, float]:
        """Shares of train, validation and test."""
        return (
            1 - self.validation_fraction - self.test_fraction,
            self.validation_fraction,
            self.test_fraction,
        )


def split_problems(validation: float, test: float) -> Iterator[str]:
    """Yield a problem if no rows are left to train on."""
    if validation + test >= 1:
        words = "less than 1 together with test_fraction"
        yield Problem(
            f"validation_fraction {validation} and test_fraction {test} leave nothing to train on",
            Remedy("validation_fraction", words=words),
        )
