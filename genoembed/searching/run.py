"""``search``: from sequences or vectors to what is near them in an embedding file.

``queries -> neighbors by vectors, by k-mers or by both -> hits, with what their sequences have in common``.

Vectors of a language model share a large part, so that every cosine is near 1. By default the mean of the
database's own vectors is subtracted, and leading components are removed (Mu & Viswanath 2018,
"All-but-the-top") until no few directions rule the rest. Both are fitted on rows that a hash of their ids
chooses, in the order of that hash, so that the order of the file changes nothing.

Q queries, N rows of the database, D features, k neighbors.
"""

from __future__ import annotations

import hashlib
import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genoembed.config.fields import named_options
from genoembed.config.paths import check_paths
from genoembed.config.search import NeighborConfig, SearchConfig
from genoembed.errors import ConfigError, GenoembedError, Problem, Remedy, check_installed
from genoembed.pipeline.embedding_file import (
    VectorSource,
    check_comparable,
    comparable_settings,
    find_embedding_file,
    iter_row_sequences,
    load_transform_for,
    record_names,
)
from genoembed.pooling.transform import fit_rows, ruling_directions, unit_rows, usable_rows
from genoembed.retrieval.weights import HybridWeights
from genoembed.searching.hits import Hits, HybridScores, Places
from genoembed.searching.hybrid import HybridOptions, rescore
from genoembed.searching.index import Origin, open_index
from genoembed.searching.kmers import (
    HybridTerms,
    KmerIndex,
    KmerNeighbors,
    kmer_neighbors,
    measure_likeness,
    no_likeness,
)
from genoembed.searching.neighbors import NO_ROW, Neighbors, Owners, exact_neighbors
from genoembed.searching.queries import (
    QUERY_OPTIONS,
    READING_OPTIONS,
    Queries,
    embed_queries,
    queries_of,
    read_queries,
)
from genoembed.store import check_output, open_embeddings
from genoembed.store.tables import STDOUT, open_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import Metric, SearchMode
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.pooling.transform import FittedTransform
    from genoembed.searching.kmers import Likeness
    from genoembed.store import EmbeddingFile


logger = logging.getLogger(__name__)

MIN_ROWS = 24
"""Rows that a database needs to be centered: the mean of fewer is mostly that of the neighbors sought."""
MOST_COMPONENTS = 8
"""Leading components that are removed at most, and directions in which the rest effectively varies at least.

Next-token models mostly have 2 to 4 directions that rule, of composition, and removing them helps; vectors
that vary in 20 or more lose relatives by it (``benchmarks/results/search_modes.md``).
"""
_ROWS_PER_COMPONENT, _FEATURES_PER_COMPONENT = 12, 16
_FITTED_ROWS = 2000
_FIT_VERSION = 3
"""Of the rule above: an index that was built with another one does not fit."""
_LEAST_SPREAD = 1e-12
PLAIN_WEIGHTS = HybridWeights(1.0, 50.0, 0.0)
"""Of cosine and share of k-mers; on the same sets, k-mers lead and vectors order what they leave equal."""
_HEAD_OPTIONS = ("device", "trust_remote_code")
_QUERY_BLOCK = 2048
"""Queries that are compared at a time, in float64."""
_TIE = 1e-6
"""Scores that are this close, relative to the largest, count as equal when recall is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchReport:
    """What was found, and how."""

    hits: Hits
    """Iterate over it, or take ``columns()``."""
    output: str | None
    """The table that was written; ``-`` is standard output, None is none."""
    num_queries: int
    failed: Mapping[str, str]
    """Queries without a vector, by id: why; each has a row without a subject in the table."""
    num_subjects: int
    """Rows of the database."""
    layer: str
    """Which matrix was searched."""
    mode: SearchMode
    """What rows were ranked by."""
    metric: str
    vectors: str
    """How vectors were compared, in words; empty for a search by k-mers alone."""
    index: Path | None
    """The index that was used; None where every row was looked at, or the index could not be kept."""
    index_built: bool
    """Whether it was built for this search."""
    recall: float | None
    """Share of the true neighbors that the index found, where ``measure_recall`` requested it."""
    seconds: float
    """Wall time of the search, without embedding the queries."""


@named_options(SearchConfig)
def search(
    queries: str | PathLike[str] | Sequence[str | PathLike[str]],
    against: str | PathLike[str],
    *,
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
    model: str | PathLike[str] | GenomicModel | None = None,
    hybrid_weights: Sequence[float] | None = None,
    depth: int = 100,
    compare_sequences: bool = True,
    subject_sequences: Sequence[str | PathLike[str]] = (),
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> SearchReport:
    """Find what is near each query in an embedding file.

    Args:
        queries: One embedding file, or sequence files (``-`` is standard input), which are embedded as the
            database was.
        against: The database, a pooled file that genoembed wrote.
        output: A table to write; ``-`` is standard output, None writes none.
        overwrite: Replace an existing table.
        model: To embed sequences with, if it is not where the database says. Its weights must be the same.
        hybrid_weights: For ``mode="hybrid"``: of the scores by vectors and by k-mers; None is 1 and 50. For a
            retrieval model with trained heads, of its dense, sparse and multi-vector scores; None takes those
            that its training chose by validation queries, or 1, 0.3 and 1 where it had none.
        depth: For ``mode="hybrid"`` with trained heads: rows per query that they score again.
        compare_sequences: Read the sequences of the hits again, for ``shared_kmers`` and ``identity``.
        subject_sequences: Where the database's sequences are; empty takes the files that it names.
        progress: Called while an index is built, with the number of rows.
        **options: Fields of :class:`~genoembed.config.search.NeighborConfig`: ``k``, ``mode``, ``metric``,
            ``layer``, ``exclude_self``, ``transform``, ``center``, ``approximate``, ``index``, ``effort``,
            ``measure_recall``, ``search_threads``, ``seed``, ``kmer_size``. For sequences also ``invalid``,
            ``duplicates``, ``empty``, ``gaps``, ``on_error``, ``device``, ``threads``, ``batch_tokens``,
            ``dtype`` and ``trust_remote_code``, as for ``extract``; a query that failed has one row, without
            a subject. None stands for the default.

    Returns:
        What was found.

    Raises:
        ConfigError: If options are wrong, or queries and database were made in different ways.
        GenoembedError: If input, model, index or output fail; the output is then as it was before.
    """
    given = {name: value for name, value in options.items() if value is not None}
    embedding = {name: given.pop(name) for name in QUERY_OPTIONS if name in given}
    wanted = NeighborConfig.build(given)
    heads = HybridOptions(
        weights=None if hybrid_weights is None else _weights(hybrid_weights),
        depth=depth,
        subject_sequences=tuple(fspath(path) for path in subject_sequences),
    )
    _check_mode(wanted, heads, compare_sequences=compare_sequences, model=model, embedding=embedding)
    names = [queries] if isinstance(queries, str | PathLike) else list(queries)
    check_paths(
        [
            *names,
            against,
            *heads.subject_sequences,
            *([] if wanted.transform is None else [wanted.transform]),
        ],
        [(output, "table"), (wanted.index, "index")],
        overwrite=overwrite,
    )
    if wanted.approximate:
        check_installed("usearch", extra="search", purpose="approximate search")
    if output is not None and fspath(output) != STDOUT:
        check_output(output, overwrite=overwrite)
    with ExitStack() as stack:
        database = stack.enter_context(open_embeddings(against))
        _ = database.X  # a per-token file says here that it has no row per record
        layer = wanted.layer or database.layers[0]
        path = find_embedding_file(names, what="queries")
        has_heads = wanted.mode == "hybrid" and _has_heads(database)
        if wanted.mode == "hybrid" and not has_heads:
            _check_plain_hybrid(wanted, heads)
        if path is not None:
            useless = [name for name in embedding if not (has_heads and name in _HEAD_OPTIONS)]
            if useless:
                message = f"{', '.join(useless)}: the queries are embedded already; leave it out"
                raise ConfigError(message)
            asked = queries_of(stack.enter_context(open_embeddings(path)), layer)
        elif wanted.mode == "kmer":
            asked = read_queries(names, embedding)
        else:
            asked = embed_queries(names, database, layer, model=model, options=embedding)
        started = time.perf_counter()
        scores: Mapping[tuple[int, int], HybridScores] = {}
        if wanted.mode == "vectors" or has_heads:
            first = wanted.changed(k=max(wanted.k, depth)) if has_heads else wanted
            found = find_neighbors(asked, database, first, progress=progress)
            neighbors = found.neighbors
        else:
            found, scores = _find_by_kmers(asked, database, wanted, heads)
            neighbors = found.neighbors
        if has_heads:
            neighbors, scores = rescore(
                asked.seen(),
                database,
                neighbors,
                heads,
                k=wanted.k,
                folder=model if isinstance(model, str | PathLike) else None,
                **{name: embedding.get(name) for name in _HEAD_OPTIONS},
            )
        hits = Hits(
            neighbors=neighbors,
            queries=asked.places,
            subjects=Places.of(database),
            likeness=_likeness(neighbors, asked, database, heads.subject_sequences)
            if compare_sequences
            else no_likeness(neighbors),
            hybrid=scores,
            has_heads=has_heads,
        )
        report = SearchReport(
            hits=hits,
            output=None if output is None else fspath(output),
            num_queries=len(asked.places.ids),
            failed=asked.failed,
            num_subjects=len(database),
            layer=layer,
            mode=wanted.mode,
            metric=wanted.metric,
            vectors=found.vectors,
            index=found.index,
            index_built=found.index_built,
            recall=found.recall,
            seconds=time.perf_counter() - started,
        )
    if output is not None:
        with open_table(output, hits.header(), overwrite=overwrite) as table:
            for row in hits.rows(asked.failed):
                table.write(row)
    return report


def _check_mode(
    wanted: NeighborConfig,
    heads: HybridOptions,
    *,
    compare_sequences: bool,
    model: object,
    embedding: Mapping[str, Any],
) -> None:
    """Raise if options do not go with the mode."""
    if heads.weights is not None and wanted.mode != "hybrid":
        raise ConfigError(
            Problem(
                "hybrid_weights is for a hybrid search",
                Remedy("mode", "hybrid"),
                ", or leave hybrid_weights out",
            )
        )
    if heads.subject_sequences and wanted.mode == "vectors" and not compare_sequences:
        message = "subject_sequences: no sequences are read here; leave it out, or compare sequences"
        raise ConfigError(message)
    if wanted.mode == "kmer":
        useless = [name for name in embedding if name not in (*READING_OPTIONS, "threads")]
        useless += [] if model is None else ["model"]
        if useless:
            raise ConfigError(
                Problem(
                    f"{', '.join(useless)}: no model runs in a search by k-mers",
                    Remedy("mode", "vectors"),
                    ", or leave it out",
                )
            )


def _has_heads(database: EmbeddingFile) -> bool:
    """Return whether the database's model has sparse and multi-vector heads."""
    trained = database.provenance.get("finetuned") or {}
    return (trained.get("retrieval") or {}).get("mode", "dense") in ("all", "fix_encoder")


def _check_plain_hybrid(wanted: NeighborConfig, heads: HybridOptions) -> None:
    """Raise if options are for trained heads, and there are none."""
    if wanted.metric != "cosine":
        problem = f"metric is {wanted.metric!r}, but shares of k-mers are added to cosines"
        raise ConfigError(Problem(problem, Remedy("metric", "cosine")))
    if wanted.approximate:
        problem = "approximate is for vectors, but a hybrid search without trained heads looks at every row"
        raise ConfigError(Problem(problem, Remedy("mode", "vectors"), ", or leave approximate out"))
    if heads.weights is not None and heads.weights.multi_vector:
        message = (
            "hybrid_weights has a third weight, but the database's model has no multi-vector head; set "
            "hybrid_weights to two: vectors, k-mers"
        )
        raise ConfigError(message)


def _weights(given: Sequence[float]) -> HybridWeights:
    if len(given) not in (2, 3):
        message = (
            f"hybrid_weights is {list(given)}; set hybrid_weights to two, vectors and k-mers, or for a "
            "retrieval model to three: dense, sparse, multi-vector"
        )
        raise ConfigError(message)
    dense, sparse, multi_vector = (*given, 0.0)[:3]
    return HybridWeights(dense=dense, sparse=sparse, multi_vector=multi_vector)


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundNeighbors:
    """What was found, and how."""

    neighbors: Neighbors
    vectors: str = ""
    """How vectors were compared, in words."""
    index: Path | None = None
    """The index file that was used."""
    index_built: bool = False
    """Whether it was built for this search."""
    recall: float | None = None
    """Share of the true neighbors that the index found, where it was measured."""
    unusable_queries: int = 0
    """Queries without a vector to compare (NaN, or zeros for cosines)."""


def find_neighbors(
    queries: Queries,
    database: EmbeddingFile,
    options: NeighborConfig,
    *,
    progress: Callable[[int], None] | None = None,
) -> FoundNeighbors:
    """Find the nearest rows of a file for each query."""
    layer = options.layer or database.layers[0]
    chosen = _choose_transform(queries, database, layer, options)
    source, asked = (VectorSource(matrix, chosen.transform) for matrix in (database[layer], queries.matrix))
    owners = _owners(queries.records, record_names(database)) if options.exclude_self else None
    index, path, is_new = None, None, False
    if options.approximate:
        index, path, is_new = open_index(
            source,
            Origin(
                path=Path(database.path),
                layer=layer,
                metric=options.metric,
                transform=chosen.digest,
            ),
            path=None if options.index is None else Path(options.index),
            threads=options.search_threads,
            progress=progress,
        )
    k = min(options.k, len(source))
    found = Neighbors(np.full((len(asked), k), NO_ROW, np.int64), np.full((len(asked), k), np.nan))
    unusable = 0
    for start, block in asked.blocks(_QUERY_BLOCK):
        rows = np.arange(start, start + len(block))
        unusable += len(block) - int(usable_rows(block, allow_zero=options.metric != "cosine").sum())
        own = None if owners is None else owners.of(rows)
        if index is None:
            near = exact_neighbors(block, source, k=k, metric=options.metric, owners=own)
        else:
            near = index.neighbors(
                block, source, k=k, owners=own, effort=options.effort, threads=options.search_threads
            )
        found.rows[rows], found.scores[rows] = near
    _warn_unusable(queries, unusable)
    recall = _recall(found, asked, source, options, owners) if options.measure_recall else None
    return FoundNeighbors(
        neighbors=found,
        vectors=chosen.words,
        index=path,
        index_built=is_new,
        recall=recall,
        unusable_queries=unusable,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenTransform:
    """What is done to vectors before they are compared."""

    transform: FittedTransform | None
    digest: str | None
    """What tells it from others of the same matrix."""
    words: str


def _choose_transform(
    queries: Queries, database: EmbeddingFile, layer: str, options: NeighborConfig
) -> ChosenTransform:
    """Take the transform that is given, or fit one on the database where that is the default."""
    settings = comparable_settings(database.provenance, layer)
    check_comparable(queries.settings, settings, names=(queries.name, database.path))
    widths = queries.matrix.shape[1], database[layer].shape[1]
    if widths[0] != widths[1]:
        message = (
            f"layer {layer!r}: {queries.name} and {database.path} have {widths[0]} and {widths[1]} features, "
            "expected the same; embed both with the same settings, and keep all columns"
        )
        raise ConfigError(message)
    if options.transform is not None:
        loaded = load_transform_for(database, layer, options.transform)
        return ChosenTransform(
            transform=loaded.transform, digest=loaded.digest, words=f"transformed by {options.transform}"
        )
    as_they_are = ""
    if options.center is False or (options.center is None and options.metric != "cosine"):
        as_they_are = "compared as they are"
    elif options.center is None and "finetuned" in database.provenance:
        as_they_are = "compared as they are: the model was fine-tuned"
    elif len(database) < MIN_ROWS:
        as_they_are = f"compared as they are: {len(database)} rows, fewer than {MIN_ROWS}, are not centered"
    fitted = None if as_they_are else _fit_own(database, layer)
    if fitted is None:
        if options.center:
            found = as_they_are.rpartition(": ")[2] or "the rows hardly differ"
            raise ConfigError(Problem(f"{database.path}: {found}", Remedy("center", False)))
        words = as_they_are or "compared as they are: the rows hardly differ"
        return ChosenTransform(transform=None, digest=None, words=words)
    fit, removed = fitted, fitted.components
    removing = f", {removed} leading component{'s' * (removed != 1)} removed" if removed else ""
    return ChosenTransform(
        transform=fit,
        digest=f"own-{_FIT_VERSION}-{removed}",
        words=f"centered on the database ({fit.num_rows:,} rows){removing}",
    )


def _fit_own(database: EmbeddingFile, layer: str) -> FittedTransform | None:
    """Fit a transform on the rows of the database; None where there are too few, or all are alike."""
    # chosen and ordered by a hash, so that the order of the file changes no bit of the result
    keys = [hashlib.blake2b(name.encode(), digest_size=16).digest() for name in database.ids]
    chosen = sorted(range(len(keys)), key=keys.__getitem__)[:_FITTED_ROWS]
    ascending = np.sort(np.array(chosen, dtype=np.int64))
    rows = VectorSource(database[layer]).take(ascending)[np.searchsorted(ascending, chosen)]
    rows = rows[usable_rows(rows, allow_zero=False)]
    if len(rows) < MIN_ROWS:
        return None
    most = min(MOST_COMPONENTS, len(rows) // _ROWS_PER_COMPONENT, rows.shape[1] // _FEATURES_PER_COMPONENT)
    fitted = fit_rows(rows, components=most)
    ruling = ruling_directions(fitted.variances, most=most, directions=MOST_COMPONENTS)
    fitted = replace(fitted, matrix=fitted.matrix[:, :ruling])
    if fitted.variances.sum() <= _LEAST_SPREAD * (rows * rows).sum(axis=1).mean():
        return None
    return fitted


def _find_by_kmers(
    queries: Queries, database: EmbeddingFile, options: NeighborConfig, heads: HybridOptions
) -> tuple[FoundNeighbors, dict[tuple[int, int], HybridScores]]:
    """Rank all rows by shared k-mers, or by these and cosines."""
    paths, k = heads.subject_sequences, min(options.k, len(database))
    index = KmerIndex(queries.pooled(paths), options.kmer_size)
    owners = _owners(queries.records, record_names(database)) if options.exclude_self else None
    terms, words, unusable = None, "", 0
    weights = heads.weights or PLAIN_WEIGHTS
    if options.mode == "hybrid":
        layer = options.layer or database.layers[0]
        chosen = _choose_transform(queries, database, layer, options)
        words = (
            f"{chosen.words}; score = {weights.dense:g} x cosine + {weights.sparse:g} x share of "
            f"{options.kmer_size}-mers"
        )
        source, asked = (
            VectorSource(matrix, chosen.transform) for matrix in (database[layer], queries.matrix)
        )
        mine = _unit_or_nan(asked.read(0, len(asked)))
        unusable = int(np.isnan(mine).any(axis=1).sum())
        terms = HybridTerms(
            cosines=lambda rows: _unit_or_nan(_take(source, rows)) @ mine.T,
            dense=weights.dense,
            sparse=weights.sparse,
        )
    rows = iter_row_sequences(database, paths=paths, option="subject_sequences")
    found = kmer_neighbors(index, rows, k=k, owners=owners, hybrid=terms)
    _warn_unusable(queries, unusable)
    parts = {} if terms is None else _hybrid_scores(found, weights)
    return FoundNeighbors(neighbors=found.neighbors, vectors=words, unusable_queries=unusable), parts


def _hybrid_scores(found: KmerNeighbors, weights: HybridWeights) -> dict[tuple[int, int], HybridScores]:
    return {
        (query, int(row)): HybridScores(
            dense=float(found.cosines[query, place]), sparse=float(found.shares[query, place])
        )
        for query, rows in enumerate(found.neighbors.rows)
        for place, row in enumerate(rows)
        if row != NO_ROW
    }


def _take(source: VectorSource, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Read rows in any order."""
    ascending = np.sort(rows)
    return source.take(ascending)[np.searchsorted(ascending, rows)]


def _unit_or_nan(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    unit = np.full_like(vectors, np.nan)
    is_usable = usable_rows(vectors, allow_zero=False)
    if is_usable.any():
        unit[is_usable] = unit_rows(vectors[is_usable])
    return unit


def _warn_unusable(queries: Queries, number: int) -> None:
    if number:
        logger.warning("%s: %d rows have no vector to compare, so nothing is near", queries.name, number)


def _likeness(found: Neighbors, queries: Queries, database: EmbeddingFile, paths: Sequence[str]) -> Likeness:
    """Compare the sequences of hits; where they are not at hand, say it, and leave the columns empty."""
    rows = np.unique(found.rows[found.rows != NO_ROW]).tolist()
    try:
        subjects = dict(iter_row_sequences(database, rows, paths=paths, option="subject_sequences"))
        return measure_likeness(found, queries.pooled(paths), subjects)
    except GenoembedError as error:
        logger.warning("shared_kmers and identity are empty: %s", error)
        return no_likeness(found)


def _recall(
    found: Neighbors,
    asked: VectorSource,
    source: VectorSource,
    options: NeighborConfig,
    owners: Owners | None,
) -> float:
    """Measure the recall of the index on some queries, chosen by chance."""
    number = min(options.measure_recall, len(asked))
    chosen = np.sort(np.random.default_rng(options.seed).choice(len(asked), number, replace=False))
    own = None if owners is None else owners.of(chosen)
    exact = exact_neighbors(asked.take(chosen), source, k=options.k, metric=options.metric, owners=own)
    return recall_of(Neighbors(found.rows[chosen], found.scores[chosen]), exact, metric=options.metric)


def recall_of(found: Neighbors, exact: Neighbors, *, metric: Metric) -> float:
    """Measure which share of the true neighbors was found.

    A row that is as near as the last true neighbor counts, too: of several that are equally near, none is
    truer.

    Example:
        >>> exact = Neighbors(np.array([[4, 7]]), np.array([[0.9, 0.8]]))
        >>> recall_of(Neighbors(np.array([[4, 9]]), np.array([[0.9, 0.7]])), exact, metric="cosine")
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


def _owners(queries: Sequence[str], rows: Sequence[str]) -> Owners:
    """Number the records that rows belong to; queries of records that the database has not get -1."""
    numbers: dict[str, int] = {}
    of_rows = [numbers.setdefault(name, len(numbers)) for name in rows]
    of_queries = [numbers.get(name, -1) for name in queries]
    return Owners(queries=np.array(of_queries, np.int64), rows=np.array(of_rows, np.int64))
