"""Which rows train, which stop the training, and which judge it.

In: labelled sequences (and clusters of kin). Out: :class:`Splits`, three sets of row numbers that share no
row and leave none out. Promised: the same rows, config and seed give the same split; under ``homology`` no
cluster is on two sides. C columns (one a class, and the rows as a whole), K sides.

Kin across the split: held-out sequences that resemble something trained on flatter every measure.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, get_args

import numpy as np

from genoembed.config.labelled import SplitConfig
from genoembed.errors import ConfigError
from genoembed.finetuning.cleaning import place
from genoembed.sequences.homology import HomologyConfig, build_sketches, pair_identities
from genoembed.sequences.tables import SplitSide, parse_split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import FindingPolicy, LabelKind
    from genoembed.finetuning.labelled import LabelledSequence
    from genoembed.finetuning.labels import Label
    from genoembed.sequences.homology import Clusters


logger = logging.getLogger(__name__)

SIDES: tuple[SplitSide, ...] = get_args(SplitSide)

_NUM_BINS = 10
"""Strata of a number: tenths of the rows, by value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """Row numbers by side, each ascending."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]

    def sides(self) -> dict[SplitSide, NDArray[np.int64]]:
        """Give the three sides by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def split_rows(
    rows: Sequence[LabelledSequence],
    *,
    kind: LabelKind,
    config: SplitConfig | None = None,
    clusters: Clusters | None = None,
) -> Splits:
    """Part rows into train, validation and test.

    Example:
        >>> from genoembed.finetuning.labelled import LabelledSequence
        >>> rows = [
        ...     LabelledSequence(id=str(i), sequence=b"A", label=str(i % 2), source="a.tsv")
        ...     for i in range(20)
        ... ]
        >>> splits = split_rows(rows, kind="class", config=SplitConfig(validation_fraction=0.2))
        >>> [len(side) for side in (splits.train, splits.validation, splits.test)]
        [14, 4, 2]
    """
    chosen = config or SplitConfig()
    if chosen.split == "column":
        sides = _by_column(rows)
    else:
        rng = np.random.default_rng(chosen.seed)
        if chosen.split == "random":
            sides = _shuffled_sides(len(rows), chosen, rng)
        elif chosen.split == "homology":
            sides = _by_cluster(rows, kind, chosen, clusters, rng)
        elif kind in ("class", "regression"):
            sides = _by_stratum(_strata(rows, kind), chosen, rng)
        else:
            alone = np.arange(len(rows), dtype=np.int64)
            sides = _balanced(_label_counts(rows, kind), alone, chosen, rng)
    splits = Splits(
        train=np.flatnonzero(sides == 0),
        validation=np.flatnonzero(sides == 1),
        test=np.flatnonzero(sides == 2),
    )
    _check_sides(splits, chosen, len(rows))
    return splits


def group_clusters(rows: Sequence[LabelledSequence]) -> NDArray[np.int64]:
    """Number the groups that the file names, for ``Clusters(labels=...)``."""
    numbers: dict[str, int] = {}
    for row in rows:
        if not row.group:
            message = f"record {row.id!r} has no group; set group_column, or fill the column in"
            raise ConfigError(message)
        numbers.setdefault(row.group, len(numbers))
    return np.array([numbers[row.group or ""] for row in rows], dtype=np.int64)


def label_shares(rows: Sequence[LabelledSequence], splits: Splits) -> dict[SplitSide, dict[str, float]]:
    """Give the share of each class on each side, for the report."""
    shares: dict[SplitSide, dict[str, float]] = {}
    for side, members in splits.sides().items():
        counted = Counter(name for index in members for name in _names(rows[index].label))
        shares[side] = {name: times / len(members) for name, times in sorted(counted.items())}
    return shares


def _names(label: Label) -> set[str]:
    if isinstance(label, str):
        return {label}
    return {name for name in label or () if isinstance(name, str)}


def _by_column(rows: Sequence[LabelledSequence]) -> NDArray[np.int64]:
    sides = np.zeros(len(rows), dtype=np.int64)
    for index, row in enumerate(rows):
        side = parse_split(row.split, path=row.source, line=row.line, record_id=row.id)
        sides[index] = SIDES.index(side)
    return sides


def _sizes(total: int, config: SplitConfig) -> list[int]:
    """Share out rows by largest remainder."""
    exact = [total * fraction for fraction in config.fractions]
    sizes = [int(share + 1e-9) for share in exact]
    by_remainder = sorted(range(len(SIDES)), key=lambda side: sizes[side] - exact[side])
    for side in by_remainder[: total - sum(sizes)]:
        sizes[side] += 1
    return sizes


def _shuffled_sides(total: int, config: SplitConfig, rng: np.random.Generator) -> NDArray[np.int64]:
    return rng.permutation(np.repeat(np.arange(len(SIDES)), _sizes(total, config)))


def _strata(rows: Sequence[LabelledSequence], kind: LabelKind) -> NDArray[np.int64]:
    if kind == "class":
        _, strata = np.unique([str(row.label) for row in rows], return_inverse=True)
        return strata
    values = np.array(
        [row.label[0] if isinstance(row.label, tuple) else 0.0 for row in rows], dtype=np.float64
    )
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return ranks * min(_NUM_BINS, max(1, len(rows) // len(SIDES))) // max(1, len(rows))


def _by_stratum(
    strata: NDArray[np.int64], config: SplitConfig, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Deal the rows of each stratum to the sides, so that totals stay right where strata are small."""
    shuffled = rng.permutation(len(strata))
    order = shuffled[np.argsort(strata[shuffled], kind="stable")]
    sides = np.zeros(len(strata), dtype=np.int64)
    bounds = np.concatenate([[0], np.cumsum(np.bincount(strata))]) if len(strata) else np.zeros(1, np.int64)
    given = np.zeros(len(SIDES))
    for start, end in pairwise(bounds.tolist()):
        # what the strata so far owe to each side, less what they gave: remainders carry over
        owed = np.array(config.fractions) * end - given
        sizes = np.floor(np.maximum(owed, 0) + 1e-9).astype(np.int64)
        for side in np.argsort(sizes - owed, kind="stable")[: max(0, end - start - int(sizes.sum()))]:
            sizes[side] += 1
        dealt = np.repeat(np.arange(len(SIDES)), sizes)[: end - start]
        sides[order[start:end]] = rng.permutation(dealt)
        given += np.bincount(dealt, minlength=len(SIDES))
    return sides


def _label_counts(rows: Sequence[LabelledSequence], kind: LabelKind) -> NDArray[np.float64]:
    """Count, for each row, each class or stratum; the last column is the row itself. Shape ``(N, C + 1)``."""
    if kind in ("class", "regression"):
        columns = [{str(stratum)} for stratum in _strata(rows, kind)]
    else:
        columns = [_names(row.label) for row in rows]
    index = {name: place for place, name in enumerate(sorted(set().union(*columns)))}
    counts = np.zeros((len(rows), len(index) + 1))
    counts[:, -1] = 1
    for row, names in enumerate(columns):
        counts[row, [index[name] for name in names]] = 1
    return counts


def _by_cluster(
    rows: Sequence[LabelledSequence],
    kind: LabelKind,
    config: SplitConfig,
    clusters: Clusters | None,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    if clusters is None or len(clusters.labels) != len(rows):
        found = (
            "none are given" if clusters is None else f"there are {len(clusters.labels)} for {len(rows)} rows"
        )
        message = f"split 'homology' needs a cluster for each row, but {found}; cluster these rows first"
        raise ConfigError(message)
    counts = _label_counts(rows, kind)
    totals = np.zeros((int(clusters.labels.max(initial=-1)) + 1, counts.shape[1]))
    np.add.at(totals, clusters.labels, counts)
    return _balanced(totals, clusters.labels, config, rng)


def _balanced(
    totals: NDArray[np.float64],
    clusters: NDArray[np.int64],
    config: SplitConfig,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Give whole clusters to sides, the largest first, each where it lowers chi-squared most.

    Chi-squared is taken over sides and classes, between what a side has and its share; so a cluster that is
    large for a small side goes to a large one.
    """
    wanted_KC = np.outer(config.fractions, totals.sum(axis=0))
    has_KC = np.zeros_like(wanted_KC)
    weight_KC = np.where(wanted_KC > 0, 1 / np.where(wanted_KC > 0, wanted_KC, 1), 0)
    open_sides = np.flatnonzero(np.array(config.fractions) > 0)
    order = rng.permutation(len(totals))
    order = order[np.argsort(-totals[order, -1], kind="stable")]
    side_of = np.zeros(len(totals), dtype=np.int64)
    for cluster in order.tolist():
        gain_K = (totals[cluster] * (2 * (has_KC - wanted_KC) + totals[cluster]) * weight_KC).sum(axis=1)
        side = int(open_sides[np.argmin(gain_K[open_sides])])
        side_of[cluster] = side
        has_KC[side] += totals[cluster]
    return side_of[clusters]


def _check_sides(splits: Splits, config: SplitConfig, total: int) -> None:
    problems = []
    for (side, members), fraction in zip(splits.sides().items(), config.fractions, strict=True):
        is_wanted = side == "train" if config.split == "column" else fraction > 0
        if is_wanted and not len(members):
            remedy = (
                "mark some in the file" if config.split == "column" else "give more rows, or another split"
            )
            problems.append(f"split {config.split!r}: no row of {total} is left for {side}; {remedy}")
    if problems:
        raise ConfigError(*problems)
    logger.info(
        "split %s, seed %d: %d rows to train on, %d to validate, %d to test",
        config.split,
        config.seed,
        len(splits.train),
        len(splits.validation),
        len(splits.test),
    )
    if config.split == "homology":
        for side, fraction in zip(SIDES, config.fractions, strict=True):
            share = len(splits.sides()[side]) / total
            if abs(share - fraction) > max(0.02, fraction / 4):
                logger.warning(
                    "split homology: %s has %.1f %% of the rows, %.1f %% were asked for: clusters are large",
                    side,
                    100 * share,
                    100 * fraction,
                )


_NUM_EXAMPLES = 5
_KIN_TRIED = 500
"""Members of a cluster among which an example's nearest is looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leak:
    """A held-out row and its nearest kin on the training side."""

    heldout_id: str
    heldout_place: str
    train_id: str
    train_place: str
    identity: float
    """Estimated from k-mers; below the threshold if the two are kin through others only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeakReport:
    """Kin across the split."""

    clusters_across: int
    """Clusters with rows to train on and rows held out."""
    leaked: dict[SplitSide, int]
    """Rows of validation and of test that have kin to train on."""
    train_rows: int
    """Rows to train on that have kin held out."""
    dropped: int
    """Those of them that were left out."""
    examples: tuple[Leak, ...]


class Sealed(NamedTuple):
    """The split after the policy, and what was found."""

    splits: Splits
    report: LeakReport


def check_leaks(
    rows: Sequence[LabelledSequence],
    splits: Splits,
    clusters: Clusters,
    *,
    policy: FindingPolicy = "keep",
    config: HomologyConfig | None = None,
) -> Sealed:
    """Look for kin across the split."""
    if len(clusters.labels) != len(rows):
        message = f"clusters: {len(clusters.labels)} labels for {len(rows)} rows; cluster these rows"
        raise ConfigError(message)
    of_train = set(clusters.labels[splits.train].tolist())
    of_heldout = set(clusters.labels[np.concatenate([splits.validation, splits.test])].tolist())
    across = np.array(sorted(of_train & of_heldout), dtype=np.int64)
    is_kin = np.isin(clusters.labels[splits.train], across)
    leaked: dict[SplitSide, int] = {
        "validation": _count_in(clusters, splits.validation, across),
        "test": _count_in(clusters, splits.test, across),
    }
    report = LeakReport(
        clusters_across=len(across),
        leaked=leaked,
        train_rows=int(is_kin.sum()),
        dropped=int(is_kin.sum()) if policy == "drop" else 0,
        examples=tuple(_examples(rows, splits, clusters, across, config or HomologyConfig())),
    )
    _report(report, splits, policy)
    if policy == "drop" and len(across):
        if is_kin.all():
            message = "homologs='drop' leaves nothing to train on; set split='homology'"
            raise ConfigError(message)
        splits = replace(splits, train=splits.train[~is_kin])
    return Sealed(splits, report)


def _count_in(clusters: Clusters, members: NDArray[np.int64], across: NDArray[np.int64]) -> int:
    return int(np.isin(clusters.labels[members], across).sum())


def _examples(
    rows: Sequence[LabelledSequence],
    splits: Splits,
    clusters: Clusters,
    across: NDArray[np.int64],
    config: HomologyConfig,
) -> list[Leak]:
    examples = []
    heldout = np.sort(np.concatenate([splits.validation, splits.test]))
    for cluster in across[:_NUM_EXAMPLES]:
        row = int(heldout[clusters.labels[heldout] == cluster][0])
        kin = splits.train[clusters.labels[splits.train] == cluster][:_KIN_TRIED]
        sequences = [rows[index].sequence for index in (row, *kin.tolist())]
        number = np.arange(1, len(sequences), dtype=np.int64)
        identities = pair_identities(build_sketches(sequences, config=config), np.zeros_like(number), number)
        nearest = int(identities.argmax())
        train = rows[int(kin[nearest])]
        is_equal = train.sequence == rows[row].sequence
        examples.append(
            Leak(
                heldout_id=rows[row].id,
                heldout_place=place(rows[row]),
                train_id=train.id,
                train_place=place(train),
                identity=1.0 if is_equal else float(identities[nearest]),
            )
        )
    return examples


def _report(report: LeakReport, splits: Splits, policy: FindingPolicy) -> None:
    if not report.clusters_across:
        return
    first = report.examples[0]
    found = (
        f"{report.leaked['validation']} of {len(splits.validation)} validation rows and "
        f"{report.leaked['test']} of {len(splits.test)} test rows have kin among the rows to train on; "
        f"first: {first.heldout_id} ({first.heldout_place}) and {first.train_id} ({first.train_place}), "
        f"identity {first.identity:.2f}"
    )
    if policy == "error":
        message = f"homologs: {found}; set split='homology', or homologs='drop' or 'keep'"
        raise ConfigError(message)
    logger.warning("%s; %d rows to train on dropped", found, report.dropped)
