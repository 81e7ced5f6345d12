"""``search``: from sequences or vectors to what is near them in an embedding file.

``embed the queries as the database was embedded -> neighbours -> (heads) -> hits``. Sequences are embedded by
the recipe that the database's file holds; vectors that were made in another way are refused.

Nearest neighbours between two embedding files: which rows of one are near those of the other.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from genoembed.config.choices import Metric
from genoembed.errors import ConfigError, StoreError
from genoembed.extraction import extract
from genoembed.pipeline.file_recipe import check_comparable, recipe_of
from genoembed.pipeline.file_vectors import VectorSource, usable_rows
from genoembed.searching.hits import Hits, Places
from genoembed.searching.hybrid import HybridOptions, HybridWeights, rescore
from genoembed.searching.index import SEARCH_EFFORT, Origin, open_index
from genoembed.searching.neighbors import NO_ROW, Neighbours, Owners, exact_neighbours
from genoembed.store import EmbeddingFile, check_output, open_embeddings
from genoembed.store.atomic import AtomicFile
from genoembed.transforms import load_transform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.models.genomic_model import GenomicModel
    from genoembed.searching.hits import HybridScores


logger = logging.getLogger(__name__)

_HDF5 = b"\x89HDF\r\n\x1a\n"
_QUERY_OPTIONS = (
    *("invalid", "duplicates", "empty", "gaps", "threads", "batch_tokens", "dtype"),
    *("device", "trust_remote_code"),
)
_HEAD_OPTIONS = ("device", "trust_remote_code")


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchReport:
    """What was found, and how."""

    hits: Hits
    """Iterate over it, or take ``columns()``."""
    output: str | None
    """The table that was written; ``-`` is standard output, None is none."""
    num_queries: int
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
    """Share of the true neighbours that the index found, where ``measure_recall`` asked for it."""
    seconds: float
    """Wall time of the search, without embedding the queries."""


def search(
    queries: str | PathLike[str] | Sequence[str | PathLike[str]],
    against: str | PathLike[str],
    *,
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
    model: str | PathLike[str] | GenomicModel | None = None,
    hybrid: bool = False,
    hybrid_weights: Sequence[float] = (1.0, 0.3, 1.0),
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
        model: To embed sequences with, if it is not where the database's recipe says. Its weights must be the
            same.
        hybrid: Score the nearest rows again with the sparse and multi-vector heads of a retrieval model.
        hybrid_weights: Of dense, sparse and multi-vector scores.
        depth: Rows a query that ``hybrid`` scores again.
        subject_sequences: Where ``hybrid`` finds the database's sequences; empty takes the files that its
            recipe names.
        progress: Called while an index is built, with the number of rows.
        **options: Fields of :class:`~genoembed.searching.run.SearchOptions`: ``k``, ``metric``, ``layer``,
            ``exclude_self``, ``transform``, ``approximate``, ``index``, ``effort``, ``measure_recall``,
            ``search_threads``, ``seed``. For sequences also ``invalid``, ``duplicates``, ``empty``, ``gaps``,
            ``device``, ``threads``, ``batch_tokens``, ``dtype`` and ``trust_remote_code``, as for
            ``extract``. None stands for the default.

    Returns:
        What was found.

    Raises:
        ConfigError: If options are wrong, or queries and database were made in different ways.
        GenoembedError: If input, model, index or output fail; the output is then as it was before.
    """
    given = {name: value for name, value in options.items() if value is not None}
    embedding = {name: given.pop(name) for name in _QUERY_OPTIONS if name in given}
    unknown = [name for name in given if name not in SearchOptions.__dataclass_fields__]
    if unknown:
        message = f"{', '.join(map(repr, unknown))}: no option of search"
        raise ConfigError(message)
    wanted = SearchOptions(**given)
    heads = HybridOptions(
        weights=_weights(hybrid_weights),
        depth=depth,
        subject_sequences=tuple(fspath(path) for path in subject_sequences),
    )
    if output is not None and fspath(output) != "-":
        check_output(output, overwrite=overwrite)
    names = [queries] if isinstance(queries, str | PathLike) else list(queries)
    if hybrid:
        _check_hybrid(names, wanted)
    with (
        open_embeddings(against) as database,
        _open_queries(names, database, wanted.layer, model, embedding, hybrid=hybrid) as asked,
    ):
        started = time.perf_counter()
        first = replace(wanted, k=max(wanted.k, depth)) if hybrid else wanted
        found = find_neighbours(asked, database, first, progress=progress)
        neighbours = found.neighbours
        scores: Mapping[tuple[int, int], HybridScores] = {}
        if hybrid:
            loading = {name: embedding.get(name) for name in _HEAD_OPTIONS}
            folder = model if isinstance(model, str | PathLike) else None
            neighbours, scores = rescore(
                asked, database, neighbours, heads, k=wanted.k, folder=folder, **loading
            )
        hits = Hits(
            neighbours=neighbours, queries=Places.of(asked), subjects=Places.of(database), hybrid=scores
        )
        report = SearchReport(
            hits=hits,
            output=None if output is None else fspath(output),
            num_queries=len(asked),
            num_subjects=len(database),
            layer=found.layer,
            metric=wanted.metric,
            index=found.index,
            index_built=found.index_built,
            recall=found.recall,
            seconds=time.perf_counter() - started,
        )
    if output is not None:
        _write(hits.lines(), fspath(output), overwrite=overwrite)
    return report


def _weights(given: Sequence[float]) -> HybridWeights:
    if len(given) != 3:
        message = f"hybrid_weights is {list(given)}; set hybrid_weights to three: dense, sparse, multi-vector"
        raise ConfigError(message)
    dense, sparse, multi_vector = given
    return HybridWeights(dense=dense, sparse=sparse, multi_vector=multi_vector)


def _check_hybrid(names: Sequence[str | PathLike[str]], options: SearchOptions) -> None:
    if options.metric == "euclidean":
        message = (
            "metric is 'euclidean', but hybrid adds scores that grow with likeness; set metric to 'cosine'"
        )
        raise ConfigError(message)
    if any(fspath(name) == "-" for name in names):
        message = "queries is '-', but hybrid reads the sequences twice; write them to a file, and name that"
        raise ConfigError(message)


@contextmanager
def _open_queries(
    names: Sequence[str | PathLike[str]],
    database: EmbeddingFile,
    layer: str | None,
    model: str | PathLike[str] | GenomicModel | None,
    options: dict[str, Any],
    *,
    hybrid: bool,
) -> Iterator[EmbeddingFile]:
    """Open the queries; embed them first if they are sequences."""
    are_files = [_is_hdf5(name) for name in names]
    if not names or (any(are_files) and len(names) > 1):
        message = f"queries: {len(names)} files, expected one embedding file, or sequence files; name those"
        raise ConfigError(message)
    if are_files[0]:
        useless = [name for name in options if not (hybrid and name in _HEAD_OPTIONS)]
        if useless:
            message = f"{', '.join(useless)}: the queries are embedded already; leave it out"
            raise ConfigError(message)
        with open_embeddings(names[0]) as file:
            yield file
        return
    with tempfile.TemporaryDirectory(prefix="genoembed-") as folder:
        report = extract(
            names,
            output=Path(folder, "queries.h5"),
            **{**recorded_options(database, layer, model), **options},
        )
        with open_embeddings(report.output) as file:
            yield file


def recorded_options(
    database: EmbeddingFile,
    layer: str | None = None,
    model: str | PathLike[str] | GenomicModel | None = None,
) -> dict[str, Any]:
    """Give the options of ``extract`` that make vectors like those of a file."""
    provenance = database.provenance
    config, made = provenance.get("config"), provenance.get("model")
    if not isinstance(config, dict) or not isinstance(made, dict):
        message = (
            f"{database.path}: it does not say how its vectors were made, so sequences cannot be embedded "
            "alike; give queries as an embedding file"
        )
        raise ConfigError(message)
    embedding, windows = dict(config["embedding"]), config["windows"]
    name = layer or database.layers[0]
    takes_all = embedding["fusion"] != "none" or "finetuned" in provenance
    options = {
        "layers": tuple(provenance["layers"]) if takes_all else (name,),
        "pooling": embedding["pooling"],
        "fusion": embedding["fusion"] if takes_all else "none",
        "fusion_weights": tuple(embedding["fusion_weights"]) or None,
        "skip_first": embedding["skip_first"],
        "rc": embedding["rc"],
        "window": windows["window"],
        "stride": windows["stride"],
        "keep_case": config["input"]["keep_case"],
        "model": config["model"]["model"] if model is None else model,
    }
    if model is None or isinstance(model, str | PathLike):
        options |= {"dtype": made["dtype"]}
    if model is None:
        options |= {"revision": config["model"]["revision"]}
    return {key: value for key, value in options.items() if value is not None}


def _is_hdf5(name: str | PathLike[str]) -> bool:
    path = Path(name)
    if fspath(name) == "-" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_HDF5)) == _HDF5


def _write(lines: Iterable[str], output: str, *, overwrite: bool) -> None:
    """Write lines; a file appears when it is complete."""
    if output == "-":
        sys.stdout.writelines(f"{line}\n" for line in lines)
        return
    try:
        file = AtomicFile(check_output(output, overwrite=overwrite))
        try:
            for line in lines:
                file.write(memoryview(f"{line}\n".encode()))
            file.commit()
        finally:
            file.discard()
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error}); free space, or set output to another name"
        raise StoreError(problem, path=output) from error


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
