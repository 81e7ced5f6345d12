"""Which rows train, which stop the training, and which judge it.

In: labeled sequences, and clusters of homologs. Out: :class:`Splits`, three sets of row numbers that share
no row and leave none out; and a report of homologs across the split, for held-out sequences that resemble
what was trained on flatter every metric. Promised: the same rows, config and seed give the same split; under
``homology`` no cluster is on two sides. C columns (one for each class, and the rows as a whole), K sides.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, get_args

import numpy as np

from genoembed.config.labeled import SplitConfig
from genoembed.errors import ConfigError
from genoembed.finetuning.cleaning import place
from genoembed.finetuning.labels import label_names
from genoembed.sequences.homology import HomologyConfig, build_sketches, pair_identities
from genoembed.sequences.tables import SplitSide, parse_split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import FindingPolicy, LabelKind
    from genoembed.finetuning.labeled import LabeledSequence
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
        """Return the three sides by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def split_rows(
    rows: Sequence[LabeledSequence],
    *,
    kind: LabelKind,
    config: SplitConfig | None = None,
    clusters: Clusters | None = None,
) -> Splits:
    """Split rows into train, validation and test.

    Example:
        >>> from genoembed.finetuning.labeled import LabeledSequence
        >>> rows = [
        ...     LabeledSequence(id=str(i), sequence=b"A", label=str(i % 2), source="a.tsv")
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
            # rows with several labels have no one stratum: each is a cluster of its own, placed by its labels
            alone = np.arange(len(rows), dtype=np.int64)
            sides = _balanced(_label_counts(rows, kind), alone, chosen, rng)
    splits = Splits(
        train=np.flatnonzero(sides == 0),
        validation=np.flatnonzero(sides == 1),
        test=np.flatnonzero(sides == 2),
    )
    _check_sides(splits, chosen, len(rows))
    return splits


def group_clusters(rows: Sequence[LabeledSequence]) -> NDArray[np.int64]:
    """Number the groups that the file names, for ``Clusters(labels=...)``."""
    numbers: dict[str, int] = {}
    for row in rows:
        if not row.group:
            message = f"record {row.id!r} has no group; set group_column, or fill the column in"
            raise ConfigError(message)
        numbers.setdefault(row.group, len(numbers))
    return np.array([numbers[row.group or ""] for row in rows], dtype=np.int64)


def _by_column(rows: Sequence[LabeledSequence]) -> NDArray[np.int64]:
    sides = np.zeros(len(rows), dtype=np.int64)
    for index, row in enumerate(rows):
        side = parse_split(row.split, path=row.source, line=row.line, record_id=row.id)
        sides[index] = SIDES.index(side)
    return sides


def _sizes(total: int, config: SplitConfig) -> list[int]:
    """Share out rows by largest remainder."""
    # 1e-9: 0.29 of 100 is 28.999999999999996 in floating point, and its floor would take a row away
    exact = [total * fraction for fraction in config.fractions]
    sizes = [int(share + 1e-9) for share in exact]
    by_remainder = sorted(range(len(SIDES)), key=lambda side: sizes[side] - exact[side])
    for side in by_remainder[: total - sum(sizes)]:
        sizes[side] += 1
    return sizes


def _shuffled_sides(total: int, config: SplitConfig, rng: np.random.Generator) -> NDArray[np.int64]:
    return rng.permutation(np.repeat(np.arange(len(SIDES)), _sizes(total, config)))


def _strata(rows: Sequence[LabeledSequence], kind: LabelKind) -> NDArray[np.int64]:
    if kind == "class":
        _, strata = np.unique([str(row.label) for row in rows], return_inverse=True)
        return strata
    # several targets: the first decides, since tenths of all of them together would hold a row or two each
    values = np.array(
        [row.label[0] if isinstance(row.label, tuple) else 0.0 for row in rows], dtype=np.float64
    )
    # twice argsort gives ranks: strata have equal numbers of rows however values are spread
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return ranks * min(_NUM_BINS, max(1, len(rows) // len(SIDES))) // max(1, len(rows))


def _by_stratum(
    strata: NDArray[np.int64], config: SplitConfig, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Deal the rows of each stratum to the sides, so that totals stay right where strata are small."""
    # shuffled before a stable sort, so that which rows of a stratum go where is random
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


def _label_counts(rows: Sequence[LabeledSequence], kind: LabelKind) -> NDArray[np.float64]:
    """Count, for each row, each class or stratum; the last column is the row itself. Shape ``(N, C + 1)``."""
    if kind in ("class", "regression"):
        columns = [{str(stratum)} for stratum in _strata(rows, kind)]
    else:
        columns = [set(label_names(row.label)) for row in rows]
    index = {name: place for place, name in enumerate(sorted(set().union(*columns)))}
    counts = np.zeros((len(rows), len(index) + 1))
    counts[:, -1] = 1
    for row, names in enumerate(columns):
        counts[row, [index[name] for name in names]] = 1
    return counts


def _by_cluster(
    rows: Sequence[LabeledSequence],
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
    """Assign whole clusters to sides, the largest first, each where it lowers chi-squared most.

    Chi-squared is taken over sides and classes, between what a side has and its share; so a cluster that is
    large for a small side goes to a large one.
    """
    wanted_KC = np.outer(config.fractions, totals.sum(axis=0))
    has_KC = np.zeros_like(wanted_KC)
    # a side of no size adds nothing instead of dividing by 0
    weight_KC = np.where(wanted_KC > 0, 1 / np.where(wanted_KC > 0, wanted_KC, 1), 0)
    open_sides = np.flatnonzero(np.array(config.fractions) > 0)
    # largest first, as in bin packing: small clusters then even out what large ones left; ties at random
    order = rng.permutation(len(totals))
    order = order[np.argsort(-totals[order, -1], kind="stable")]
    side_of = np.zeros(len(totals), dtype=np.int64)
    for cluster in order.tolist():
        # change of chi-squared if the cluster joins each side: ((h + t - w)^2 - (h - w)^2) / w
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
                    "split homology: %s has %.1f %% of the rows, %.1f %% were requested: clusters are large",
                    side,
                    100 * share,
                    100 * fraction,
                )


_MEMBERS_TRIED = 500
"""Members of a cluster among which the closest to an example is looked for."""


def check_leaks(
    rows: Sequence[LabeledSequence],
    splits: Splits,
    clusters: Clusters,
    *,
    policy: FindingPolicy = "keep",
    config: HomologyConfig | None = None,
) -> Splits:
    """Look for homologs across the split, report one pair, and return the split after the policy."""
    labels = clusters.labels
    if len(labels) != len(rows):
        message = f"clusters: {len(labels)} labels for {len(rows)} rows; cluster these rows"
        raise ConfigError(message)
    heldout = np.concatenate([splits.validation, splits.test])
    across = np.intersect1d(labels[splits.train], labels[heldout])
    if not len(across):
        return splits
    is_homolog = np.isin(labels[splits.train], across)
    example = _leak(rows, splits, labels, int(across[0]), config or HomologyConfig())
    found = (
        f"{np.isin(labels[splits.validation], across).sum()} of {len(splits.validation)} validation rows and "
        f"{np.isin(labels[splits.test], across).sum()} of {len(splits.test)} test rows have homologs among "
        f"the rows to train on; first: {example}"
    )
    if policy == "error":
        message = f"homologs: {found}; set split='homology', or homologs='drop' or 'keep'"
        raise ConfigError(message)
    num_dropped = int(is_homolog.sum()) if policy == "drop" else 0
    logger.warning("%s; %d rows to train on dropped", found, num_dropped)
    if policy == "keep":
        return splits
    if is_homolog.all():
        message = "homologs='drop' leaves nothing to train on; set split='homology'"
        raise ConfigError(message)
    # training rows go, never held-out ones: the test set stays the one that other runs report
    return replace(splits, train=splits.train[~is_homolog])


def _leak(
    rows: Sequence[LabeledSequence],
    splits: Splits,
    labels: NDArray[np.int64],
    cluster: int,
    config: HomologyConfig,
) -> str:
    """Describe the first held-out row of a cluster, and what it is most like among those to train on."""
    heldout = np.sort(np.concatenate([splits.validation, splits.test]))
    row = rows[int(heldout[labels[heldout] == cluster][0])]
    candidates = [rows[i] for i in splits.train[labels[splits.train] == cluster][:_MEMBERS_TRIED]]
    number = np.arange(1, 1 + len(candidates), dtype=np.int64)
    sketches = build_sketches([row.sequence, *(one.sequence for one in candidates)], config=config)
    # below the threshold where the two are homologs through others only
    identities = pair_identities(sketches, np.zeros_like(number), number)
    closest = int(identities.argmax())
    train = candidates[closest]
    # a sketch holds a sample of the k-mers: equal sequences are recognized by their letters
    identity = 1.0 if train.sequence == row.sequence else float(identities[closest])
    return f"{row.id} ({place(row)}) and {train.id} ({place(train)}), identity {identity:.2f}"
