"""Kin across the split: held-out sequences that resemble something trained on flatter every measure.

In: rows, their sides and their clusters. Out: a :class:`LeakReport` with counts and examples, and, where the
policy says so, a training side without the kin of what is held out.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genoembed.errors import ConfigError
from genoembed.training.cleaning import place
from genoembed.training.sketches import KinshipConfig, build_sketches, pair_identities

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from genoembed.training.cleaning import FindingPolicy
    from genoembed.training.kinship import Clusters
    from genoembed.training.labelled import LabelledSequence
    from genoembed.training.splits import Side, Splits

logger = logging.getLogger(__name__)

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
    leaked: dict[Side, int]
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
    config: KinshipConfig | None = None,
) -> Sealed:
    """Look for kin across the split."""
    if len(clusters.labels) != len(rows):
        message = f"clusters: {len(clusters.labels)} labels for {len(rows)} rows; cluster these rows"
        raise ConfigError(message)
    of_train = set(clusters.labels[splits.train].tolist())
    of_heldout = set(clusters.labels[np.concatenate([splits.validation, splits.test])].tolist())
    across = np.array(sorted(of_train & of_heldout), dtype=np.int64)
    is_kin = np.isin(clusters.labels[splits.train], across)
    leaked: dict[Side, int] = {
        "validation": _count_in(clusters, splits.validation, across),
        "test": _count_in(clusters, splits.test, across),
    }
    report = LeakReport(
        clusters_across=len(across),
        leaked=leaked,
        train_rows=int(is_kin.sum()),
        dropped=int(is_kin.sum()) if policy == "drop" else 0,
        examples=tuple(_examples(rows, splits, clusters, across, config or KinshipConfig())),
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
    config: KinshipConfig,
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
