"""``search``: from sequences or vectors to what is near them in an embedding file.

``embed the queries as the database was embedded -> neighbours -> (heads) -> hits``. Sequences are embedded by
the recipe that the database's file holds; vectors that were made in another way are refused.
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
from typing import TYPE_CHECKING, Any

from genoembed.analysis.hits import Hits, Places
from genoembed.analysis.hybrid import HybridWeights
from genoembed.analysis.search import SearchOptions, find_neighbours
from genoembed.errors import ConfigError, StoreError
from genoembed.extraction import extract
from genoembed.hybrid_search import HybridOptions, rescore
from genoembed.store import EmbeddingFile, check_output, open_embeddings
from genoembed.store.atomic import AtomicFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from genoembed.analysis.hits import HybridScores
    from genoembed.models.genomic_model import GenomicModel

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
        **options: Fields of :class:`~genoembed.analysis.search.SearchOptions`: ``k``, ``metric``, ``layer``,
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
