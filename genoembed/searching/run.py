"""``search``: from sequences or vectors to what is near them in an embedding file.

``queries (embedded as the database was) -> neighbors -> (scores of the heads) -> hits``. Sequences are read
once and embedded in memory with the settings that the database records; vectors that were made in another way
are an error.

Q queries, N rows of the database, D features, k neighbors.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genoembed.config.fields import named_options
from genoembed.config.paths import check_paths
from genoembed.config.search import NeighborConfig, SearchConfig
from genoembed.embedding import RecordEmbedder
from genoembed.errors import ConfigError, EmptyRecordError, Problem, Remedy
from genoembed.pipeline.embedding_file import (
    VectorSource,
    check_comparable,
    comparable_settings,
    find_embedding_file,
    load_transform_for,
    read_file_records,
    read_file_settings,
    record_names,
)
from genoembed.pipeline.request import use_threads
from genoembed.pooling.transform import usable_rows
from genoembed.retrieval.weights import HybridWeights
from genoembed.searching.hits import Hits, Places
from genoembed.searching.hybrid import HybridOptions, check_whole_records, rescore
from genoembed.searching.index import Origin, open_index
from genoembed.searching.neighbors import NO_ROW, Neighbors, Owners, exact_neighbors
from genoembed.sequences import read_sequences
from genoembed.store import check_output, open_embeddings
from genoembed.store.schema import FAILED, has_failed
from genoembed.store.tables import STDOUT, open_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import Metric
    from genoembed.contracts import SequenceRecord
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.searching.hits import HybridScores
    from genoembed.store import EmbeddingFile
    from genoembed.store.schema import LazyMatrix


logger = logging.getLogger(__name__)

_READING_OPTIONS = ("invalid", "duplicates", "empty", "gaps")
_MODEL_OPTIONS = ("on_error", "batch_tokens", "dtype", "fp8", "device", "trust_remote_code")
_QUERY_OPTIONS = (*_READING_OPTIONS, *_MODEL_OPTIONS, "threads")
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
    metric: str
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
    hybrid: bool = False,
    hybrid_weights: Sequence[float] | None = None,
    depth: int = 100,
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
        hybrid: Score the nearest rows again with the sparse and multi-vector heads of a retrieval model.
        hybrid_weights: Of dense, sparse and multi-vector scores; None takes those that the model's training
            chose by validation queries, or 1, 0.3 and 1 where it had none.
        depth: Rows per query that ``hybrid`` scores again.
        subject_sequences: Where ``hybrid`` finds the database's sequences; empty takes the files that it
            names.
        progress: Called while an index is built, with the number of rows.
        **options: Fields of :class:`~genoembed.config.search.NeighborConfig`: ``k``, ``metric``, ``layer``,
            ``exclude_self``, ``transform``, ``approximate``, ``index``, ``effort``, ``measure_recall``,
            ``search_threads``, ``seed``. For sequences also ``invalid``, ``duplicates``, ``empty``, ``gaps``,
            ``on_error``, ``device``, ``threads``, ``batch_tokens``, ``dtype`` and ``trust_remote_code``, as
            for ``extract``; a query that failed has one row, without a subject. None stands for the default.

    Returns:
        What was found.

    Raises:
        ConfigError: If options are wrong, or queries and database were made in different ways.
        GenoembedError: If input, model, index or output fail; the output is then as it was before.
    """
    given = {name: value for name, value in options.items() if value is not None}
    embedding = {name: given.pop(name) for name in _QUERY_OPTIONS if name in given}
    wanted = NeighborConfig.build(given)
    heads = HybridOptions(
        weights=None if hybrid_weights is None else _weights(hybrid_weights),
        depth=depth,
        subject_sequences=tuple(fspath(path) for path in subject_sequences),
    )
    if not hybrid and (hybrid_weights is not None or heads.subject_sequences):
        unused = "subject_sequences" if hybrid_weights is None else "hybrid_weights"
        raise ConfigError(
            Problem(f"{unused} is for a hybrid search", Remedy("hybrid", True), f", or leave {unused} out")
        )
    if hybrid and wanted.metric == "euclidean":
        message = (
            "metric is 'euclidean', but hybrid adds scores that grow with likeness; set metric to 'cosine'"
        )
        raise ConfigError(message)
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
    if output is not None and fspath(output) != STDOUT:
        check_output(output, overwrite=overwrite)
    with ExitStack() as stack:
        database = stack.enter_context(open_embeddings(against))
        _ = database.X  # a per-token file says here that it has no row per record
        layer = wanted.layer or database.layers[0]
        path = find_embedding_file(names, what="queries")
        if path is None:
            asked = embed_queries(names, database, layer, model=model, options=embedding, hybrid=hybrid)
        else:
            useless = [name for name in embedding if not (hybrid and name in _HEAD_OPTIONS)]
            if useless:
                message = f"{', '.join(useless)}: the queries are embedded already; leave it out"
                raise ConfigError(message)
            asked = queries_of(stack.enter_context(open_embeddings(path)), layer, hybrid=hybrid)
        started = time.perf_counter()
        first = wanted.changed(k=max(wanted.k, depth)) if hybrid else wanted
        found = find_neighbors(asked, database, first, progress=progress)
        neighbors = found.neighbors
        scores: Mapping[tuple[int, int], HybridScores] = {}
        if hybrid:
            neighbors, scores = rescore(
                asked.sequences,
                database,
                neighbors,
                heads,
                k=wanted.k,
                folder=model if isinstance(model, str | PathLike) else None,
                **{name: embedding.get(name) for name in _HEAD_OPTIONS},
            )
        hits = Hits(neighbors=neighbors, queries=asked.places, subjects=Places.of(database), hybrid=scores)
        report = SearchReport(
            hits=hits,
            output=None if output is None else fspath(output),
            num_queries=len(asked.places.ids),
            failed=asked.failed,
            num_subjects=len(database),
            layer=layer,
            metric=wanted.metric,
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


def _weights(given: Sequence[float]) -> HybridWeights:
    if len(given) != 3:
        message = f"hybrid_weights is {list(given)}; set hybrid_weights to three: dense, sparse, multi-vector"
        raise ConfigError(message)
    dense, sparse, multi_vector = given
    return HybridWeights(dense=dense, sparse=sparse, multi_vector=multi_vector)


@dataclass(frozen=True, kw_only=True, slots=True)
class Queries:
    """What is searched for."""

    name: str
    """For messages."""
    places: Places
    matrix: LazyMatrix | NDArray[np.floating]
    """Their vectors, ``(Q, D)``."""
    settings: Mapping[str, Any]
    """How the vectors were made, as ``comparable_settings`` collects it."""
    records: Sequence[str]
    """The record that each query is, or is a window of."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Those that have no vector, by id: why."""
    sequences: Sequence[bytes] = ()
    """As the model saw them; there for hybrid scores only."""


def queries_of(file: EmbeddingFile, layer: str, *, hybrid: bool = False) -> Queries:
    """Take the rows of an embedding file as queries."""
    _ = file.X  # as for the database
    settings = comparable_settings(file.provenance, layer)
    sequences: list[bytes] = []
    if hybrid:
        check_whole_records(file)
        sequences = [record.sequence for record in read_file_records(file, range(len(file)))]
    return Queries(
        name=str(file.path),
        places=Places.of(file),
        matrix=file[layer],
        settings=settings,
        records=record_names(file),
        sequences=sequences,
    )


def embed_queries(
    names: Sequence[str | PathLike[str]],
    database: EmbeddingFile,
    layer: str,
    *,
    model: str | PathLike[str] | GenomicModel | None = None,
    options: Mapping[str, Any],
    hybrid: bool = False,
) -> Queries:
    """Embed sequences as the database was.

    The input is read once, so that it may be a pipe, and embedded one work unit at a time; what stays is one
    float32 vector per record, and for hybrid scores the sequence.
    """
    settings = read_file_settings(database, remedy="give queries as an embedding file, too")
    loading: dict[str, Any] = {}
    if model is None or isinstance(model, str | PathLike):
        loading |= {"dtype": settings.dtype, "fp8": settings.fp8}
    if model is None:
        loading["revision"] = settings.revision
    loading |= {name: options[name] for name in _MODEL_OPTIONS if name in options}
    keep_case = bool(settings.reading.get("keep_case"))
    reading = {name: options[name] for name in _READING_OPTIONS if name in options}
    with use_threads(options.get("threads")):
        embedder = RecordEmbedder(
            settings.model if model is None else model, **settings.embedding_options(layer), **loading
        )
        made = comparable_settings(embedder.provenance, layer) | {"keep_case": keep_case}
        check_comparable(
            made, comparable_settings(database.provenance, layer), names=("queries", database.path)
        )
        sequences: list[bytes] = []
        records = _noting(
            read_sequences(names, keep_case=keep_case, **reading), sequences if hybrid else None
        )
        rows, vectors, failed = [], [], {}
        for row, found in embedder.rows(records):
            rows.append(row)
            if has_failed(row.flags):
                failed[row.id] = row.flags.rpartition(f"{FAILED}:")[2]
            vectors.append(np.asarray(found[layer], np.float32))
    if not rows:
        problem = "no record is left to search for; check the input, or set invalid='mask'"
        raise EmptyRecordError(problem, path=", ".join(fspath(name) for name in names))
    places = Places(
        ids=[row.id for row in rows],
        starts=np.array([row.start for row in rows], np.int64),
        ends=np.array([row.end for row in rows], np.int64),
        strands=[row.strand for row in rows],
        descriptions=[row.description for row in rows],
    )
    return Queries(
        name="queries",
        places=places,
        matrix=np.stack(vectors),
        settings=made,
        records=places.ids,
        failed=failed,
        sequences=sequences,
    )


def _noting(records: Iterable[SequenceRecord], sequences: list[bytes] | None) -> Iterator[SequenceRecord]:
    for record in records:
        if sequences is not None:
            sequences.append(record.sequence)
        yield record


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundNeighbors:
    """What was found, and how."""

    neighbors: Neighbors
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
    settings = comparable_settings(database.provenance, layer)
    check_comparable(queries.settings, settings, names=(queries.name, database.path))
    widths = queries.matrix.shape[1], database[layer].shape[1]
    if widths[0] != widths[1]:
        message = (
            f"layer {layer!r}: {queries.name} and {database.path} have {widths[0]} and {widths[1]} features, "
            "expected the same; embed both with the same settings, and keep all columns"
        )
        raise ConfigError(message)
    loaded = None if options.transform is None else load_transform_for(database, layer, options.transform)
    transform = None if loaded is None else loaded.transform
    source, asked = VectorSource(database[layer], transform), VectorSource(queries.matrix, transform)
    owners = _owners(queries.records, record_names(database)) if options.exclude_self else None
    index, path, is_new = None, None, False
    if options.approximate:
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
    if unusable:
        logger.warning("%s: %d rows have no vector to compare, so nothing is near", queries.name, unusable)
    recall = _recall(found, asked, source, options, owners) if options.measure_recall else None
    return FoundNeighbors(
        neighbors=found, index=path, index_built=is_new, recall=recall, unusable_queries=unusable
    )


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
