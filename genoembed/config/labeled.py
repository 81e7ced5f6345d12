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
        metavar="FRACTION",
        help="Probability of reading the reverse complement instead. Keep 0 if the label depends on "
        "the strand.",
    )
    crop_fraction: float = option(
        1.0,
        gt=0,
        le=1,
        group=AUGMENTATION,
        metavar="FRACTION",
        help="A random crop keeps at least this fraction of a sequence. 1: no cropping.",
    )
    max_crop_bp: int | None = option(
        None,
        ge=1,
        unit="bases",
        group=AUGMENTATION,
        metavar="BASES",
        help="Crop longer sequences to this many bases, at a random position.",
    )
    mutation_rate: float = option(
        0.0,
        ge=0,
        le=1,
        group=AUGMENTATION,
        metavar="FRACTION",
        help="Probability that a base is replaced by another.",
    )


class CleaningConfig(Config):
    """What is looked for among equal sequences, and what becomes of it."""

    both_strands: bool = option(
        True,
        group=DATA,
        help="Treat a sequence and its reverse complement as equal. Switch this off if the label "
        "depends on the strand.",
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
        help="Column of the labels. Repeat the option for multilabel (0 or 1 in each column) and regression.",
    )
    label_delimiter: str | None = option(
        None,
        group=DATA,
        metavar="TEXT",
        help="For multilabel and token labels: text that separates the names in one cell.",
    )
    ignore_label: str | None = option(
        None, group=DATA, metavar="NAME", help="For token labels: name of the bases without a label."
    )
    id_column: str | None = option(
        None,
        group=DATA,
        metavar="NAME",
        shown_default="row_1, row_2 ...; in a table of labels, id",
        help="Column of the record ids.",
    )
    split_column: str | None = option(
        None,
        group=SPLIT,
        metavar="NAME",
        help="For --split column: column with the values train, validation and test.",
    )
    group_column: str | None = option(
        None,
        group=SPLIT,
        metavar="NAME",
        help="For --split homology: column of groups that stay together. Without it, "
        "clusters of homologs do.",
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
        help="How to split the rows if no files are given: at random; with equal shares of each label "
        "(stratified); with homologs together; or by a column.",
    )
    validation_fraction: float = option(
        0.1,
        ge=0,
        lt=1,
        group=SPLIT,
        metavar="FRACTION",
        help="Fraction of the rows for validation, which chooses the best step and stops training "
        "early. 0: none.",
    )
    test_fraction: float = option(
        0.1,
        ge=0,
        lt=1,
        group=SPLIT,
        metavar="FRACTION",
        help="Fraction of the rows for the test at the end. 0: none.",
    )


class SplitConfig(SplitShares):
    """How rows are divided, and with which seed."""

    seed: int = option(0, ge=0, help="Random seed. It determines which rows are chosen.")

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
