"""Nearest neighbours between two embedding files: which rows of one are near those of the other.

The database is read in blocks; the queries, and what was found, are in memory. Files whose vectors were made
in different ways are refused, with the difference.

Q queries, N rows, k neighbours.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from genoembed.analysis.fitting import load_transform
from genoembed.analysis.nearest_index import SEARCH_EFFORT, Origin, open_index
from genoembed.analysis.neighbours import NO_ROW, Metric, Neighbours, Owners, exact_neighbours
from genoembed.analysis.recipes import check_comparable, recipe_of
from genoembed.analysis.vectors import VectorSource, usable_rows
from genoembed.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

    from numpy.typing import NDArray

    from genoembed.store import EmbeddingFile

logger = logging.getLogger(__name__)

_TIE = 1e-6
"""Scores that are this close, relative to the largest, count as equal when recall is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchOptions:
    """What is near, and how it is looked for."""

    k: int = 10
    """Neighbours of a query."""
    metric: Metric = "cosine"
    """``cosine`` and ``dot``: larger is nearer; ``euclidean``: smaller is nearer."""
    layer: str | None = None
    """Which matrix of the files; None is the database's first."""
    exclude_self: bool = False
    """Leave out rows of the record that the query is."""
    transform: str | PathLike[str] | None = None
    """A file of ``fit_transform``, applied to both sides."""
    approximate: bool = False
    """Use a graph index beside the database instead of looking at every row."""
    index: str | PathLike[str] | None = None
    """The index file; None is beside the database."""
    effort: int = SEARCH_EFFORT
    """Candidates that the index looks at; more find more, and take longer."""
    measure_recall: int = 0
    """Queries to answer exactly, too, to measure the index by."""
    search_threads: int = 1
    """Threads of the index."""
    seed: int = 0
    """Of the choice of queries that recall is measured on."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}; set {name} to {least} or more"
            for name, least in (("k", 1), ("effort", 1), ("search_threads", 1), ("measure_recall", 0))
            if (value := getattr(self, name)) < least
        ]
        if self.metric not in get_args(Metric):
            problems.append(f"metric is {self.metric!r}; set metric to one of {', '.join(get_args(Metric))}")
        problems += [
            f"{name} is for the approximate search; set approximate to True, or leave {name} out"
            for name, given in (("index", self.index is not None), ("measure_recall", self.measure_recall))
            if given and not self.approximate
        ]
        if problems:
            raise ConfigError(*problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundNeighbours:
    """What was found, and how."""

    neighbours: Neighbours
    layer: str
    """Which matrix was searched."""
    index: Path | None = None
    """The index file that was used."""
    index_built: bool = False
    """Whether it was built for this search."""
    recall: float | None = None
    """Share of the true neighbours that the index found, where it was measured."""
    unusable_queries: int = 0
    """Queries without a vector to compare (NaN, or zeros for cosines)."""


def find_neighbours(
    queries: EmbeddingFile,
    database: EmbeddingFile,
    options: SearchOptions | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> FoundNeighbours:
    """Find, for each row of one file, the nearest rows of another."""
    options = options or SearchOptions()
    for file in (queries, database):
        _ = file.X  # a per-token file says here that it has no row a record
    layer = options.layer or database.layers[0]
    recipe = recipe_of(database.provenance, layer)
    check_comparable(
        recipe_of(queries.provenance, layer), recipe, names=(str(queries.path), str(database.path))
    )
    loaded = None if options.transform is None else load_transform(options.transform)
    if loaded is not None:
        check_comparable(loaded.recipe, recipe, names=(str(options.transform), str(database.path)))
    transform = None if loaded is None else loaded.transform
    source = VectorSource(database[layer], transform)
    asked = VectorSource(queries[layer], transform).read(0, len(queries))
    owners = _owners(queries, database) if options.exclude_self else None
    unusable = len(asked) - int(usable_rows(asked, allow_zero=options.metric != "cosine").sum())
    if unusable:
        logger.warning("%s: %d rows have no vector to compare, so nothing is near", queries.path, unusable)
    if not options.approximate:
        found = exact_neighbours(asked, source, k=options.k, metric=options.metric, owners=owners)
        return FoundNeighbours(neighbours=found, layer=layer, unusable_queries=unusable)
    index, path, is_new = open_index(
        source,
        Origin(
            path=Path(database.path),
            layer=layer,
            metric=options.metric,
            transform=None if loaded is None else loaded.digest,
        ),
        path=None if options.index is None else Path(options.index),
        threads=options.search_threads,
        progress=progress,
    )
    found = index.neighbours(
        asked, source, k=options.k, owners=owners, effort=options.effort, threads=options.search_threads
    )
    recall = _recall(found, asked, source, options, owners) if options.measure_recall else None
    return FoundNeighbours(
        neighbours=found,
        layer=layer,
        index=path,
        index_built=is_new,
        recall=recall,
        unusable_queries=unusable,
    )


def _recall(
    found: Neighbours,
    asked: NDArray[np.float64],
    source: VectorSource,
    options: SearchOptions,
    owners: Owners | None,
) -> float:
    number = min(options.measure_recall, len(asked))
    chosen = np.sort(np.random.default_rng(options.seed).choice(len(asked), number, replace=False))
    mine = None if owners is None else Owners(queries=owners.queries[chosen], rows=owners.rows)
    exact = exact_neighbours(asked[chosen], source, k=options.k, metric=options.metric, owners=mine)
    part = Neighbours(found.rows[chosen], found.scores[chosen])
    return recall_of(part, exact, metric=options.metric)


def recall_of(found: Neighbours, exact: Neighbours, *, metric: Metric) -> float:
    """Measure which share of the true neighbours was found.

    A row that is as near as the last true neighbour counts, too: of several that are equally near, none is
    truer.

    Example:
        >>> exact = Neighbours(np.array([[4, 7]]), np.array([[0.9, 0.8]]))
        >>> recall_of(Neighbours(np.array([[4, 9]]), np.array([[0.9, 0.7]])), exact, metric="cosine")
        0.5
    """
    is_true = exact.rows != NO_ROW
    sign = -1.0 if metric == "euclidean" else 1.0
    truth = np.where(is_true, sign * exact.scores, np.inf)
    last = truth.min(axis=1, initial=np.inf)
    room = _TIE * np.abs(np.where(is_true, exact.scores, 0)).max(initial=0)
    is_found = found.rows != NO_ROW
    near = is_found & (np.where(is_found, sign * found.scores, -np.inf) >= (last - room)[:, None])
    total = is_true.sum(axis=1)
    return float(np.minimum(near.sum(axis=1), total).sum() / total.sum()) if total.sum() else float("nan")


def _owners(queries: EmbeddingFile, database: EmbeddingFile) -> Owners:
    """Number the records that rows belong to; queries of records that the database has not get -1."""
    numbers: dict[str, int] = {}
    rows = [numbers.setdefault(name, len(numbers)) for name in record_names(database)]
    asked = [numbers.get(name, -1) for name in record_names(queries)]
    return Owners(queries=np.array(asked, np.int64), rows=np.array(rows, np.int64))


def record_names(file: EmbeddingFile) -> list[str]:
    """Name the record that each row belongs to."""
    config = file.provenance.get("config")
    windows = config.get("windows", {}) if isinstance(config, dict) else {}
    if not windows.get("per_window"):
        return file.ids
    return [
        name.removesuffix(f":{start + 1}-{end}")
        for name, start, end in zip(file.ids, file.obs["start"], file.obs["end"], strict=True)
    ]
