"""Approximate nearest neighbors with a graph index (HNSW) that is stored next to the embedding file.

The index is usearch's own file. A small JSON file next to it says what it was built from (digests of the
embedding file and of the index, matrix, metric, transform, settings): one that differs is built again, and
one that fits is mapped into memory, not read. It holds the vectors in float32, so scores come from it alone,
to about 1e-6.

Dot products have no neighborhood of their own; each row gets one more feature that makes all rows equally
long (Bachrach et al. 2014), after which the largest dot product is the largest cosine.

Q queries, N rows, D features, k neighbors.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from genoembed.atomic import check_output, replacing, reporting_writes, write_text
from genoembed.errors import MissingExtraError, StoreError
from genoembed.pooling.transform import unit_rows, usable_rows
from genoembed.searching.neighbors import (
    NO_ROW,
    Neighbors,
    Owners,
    check_widths,
    keys_to_scores,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from genoembed.config.choices import Metric
    from genoembed.pipeline.embedding_file import VectorSource


logger = logging.getLogger(__name__)

CONNECTIVITY, BUILD_EFFORT, SEARCH_EFFORT = 16, 128, 128
"""Neighbors of a node; candidates that are looked at while a row is added, and while a query is answered."""
_FORMAT = 3
_SHORT = 12
_USEARCH_METRICS: dict[Metric, str] = {"cosine": "ip", "dot": "ip", "euclidean": "l2sq"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What an index is built from."""

    path: Path
    """The embedding file."""
    layer: str
    metric: Metric
    transform: str | None
    """Digest of the transform."""

    def index_path(self) -> Path:
        """Return the index file's path, next to the embedding file: one per matrix, metric and transform."""
        key = json.dumps([self.layer, self.transform]).encode()
        return self.path.with_name(
            f"{self.path.name}.{self.metric}-{hashlib.sha256(key).hexdigest()[:_SHORT]}.index"
        )


class NearestIndex:
    """An index that answers queries."""

    def __init__(self, index: Any, *, metric: Metric, scale: float) -> None:
        self._index = index
        self._metric = metric
        self.scale = scale
        """Length that all rows have, for ``dot``."""

    def save(self, path: Path) -> None:
        """Write the index as usearch does; it appears whole or not at all."""
        with replacing(path, overwrite=True) as part:
            try:
                self._index.save(str(part))
            except RuntimeError as error:
                problem = f"cannot be written ({error}); free space, or search without it"
                raise StoreError(problem, path=str(path)) from error
            # usearch does not look at what closing the file says, and on a full disk leaves part of it
            if part.stat().st_size != self._index.serialized_length:
                problem = "cannot be written completely; free space, or search without it"
                raise StoreError(problem, path=str(path))

    def neighbors(
        self,
        queries: NDArray[np.floating],
        source: VectorSource,
        *,
        k: int,
        owners: Owners | None = None,
        effort: int = SEARCH_EFFORT,
        threads: int = 1,
    ) -> Neighbors:
        """Find near rows of each query, most of the nearest ones among them."""
        check_widths(queries, source)
        wide = np.asarray(queries, dtype=np.float64)
        k = min(k, len(source))
        rows = np.full((len(queries), k), NO_ROW, dtype=np.int64)
        keys = np.full((len(queries), k), -np.inf)
        self._index.expansion_search = max(effort, k)
        left = np.flatnonzero(usable_rows(wide, allow_zero=self._metric != "cosine"))
        asked = k if owners is None else 2 * k + 8
        while len(left) and k:
            asked = min(asked, len(self._index))
            found, their_keys = self._ask(wide[left], asked, threads)
            if owners is not None:
                is_own = owners.rows[found] == owners.queries[left][:, None]
                found, their_keys = _without(found, their_keys, is_own | (found == NO_ROW), k)
            rows[left, : found.shape[1]] = found[:, :k]
            keys[left, : found.shape[1]] = their_keys[:, :k]
            is_short = (rows[left] == NO_ROW).any(axis=1)
            left = left[is_short] if asked < len(self._index) else left[:0]
            asked *= 4
        scores = np.where(rows == NO_ROW, np.nan, keys_to_scores(keys, self._metric))
        return Neighbors(rows, scores)

    def _ask(
        self, queries: NDArray[np.float64], count: int, threads: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return rows and keys (higher is closer), ``(Q, count)``, equal keys in the order of the rows."""
        if not count:
            return np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0))
        lengths = np.linalg.norm(queries, axis=1)
        asked = queries if self._metric == "euclidean" else unit_rows_or_zero(queries)
        if self._metric == "dot":
            asked = np.pad(asked, ((0, 0), (0, 1)))
        matches = self._index.search(np.ascontiguousarray(asked, np.float32), count, threads=threads)
        counts = np.atleast_1d(getattr(matches, "counts", len(matches)))  # one query gives a list of its own
        found, distances = (
            _widened(values, count) for values in (matches.keys.astype(np.int64), matches.distances)
        )
        is_there = np.arange(count) < counts[:, None]
        keys = (
            -distances.astype(np.float64) if self._metric == "euclidean" else 1 - distances.astype(np.float64)
        )
        if self._metric == "dot":
            keys = keys * lengths[:, None] * self.scale
        found, keys = np.where(is_there, found, NO_ROW), np.where(is_there, keys, -np.inf)
        order = np.lexsort((np.where(is_there, found, np.iinfo(np.int64).max), -keys), axis=1)
        return np.take_along_axis(found, order, axis=1), np.take_along_axis(keys, order, axis=1)


def _widened(values: NDArray[np.generic], count: int) -> NDArray[Any]:
    """Pad to rows of ``count`` values."""
    values = np.atleast_2d(values)
    return np.pad(values, ((0, 0), (0, count - values.shape[1])))


def _without(
    found: NDArray[np.int64], keys: NDArray[np.float64], is_out: NDArray[np.bool_], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Leave pairs out and close the gaps."""
    order = np.argsort(is_out, axis=1, kind="stable")[:, :k]
    found, keys = np.where(is_out, NO_ROW, found), np.where(is_out, -np.inf, keys)
    return np.take_along_axis(found, order, axis=1), np.take_along_axis(keys, order, axis=1)


def unit_rows_or_zero(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale each row to length 1; rows of zeros stay.

    Example:
        >>> unit_rows_or_zero(np.array([[0.0, 2.0], [0.0, 0.0]])).tolist()
        [[0.0, 1.0], [0.0, 0.0]]
    """
    unit = np.zeros_like(vectors)
    has_length = (vectors != 0).any(axis=1)
    if has_length.any():
        unit[has_length] = unit_rows(vectors[has_length])
    return unit


def build_index(
    source: VectorSource,
    *,
    metric: Metric,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> NearestIndex:
    """Build an index."""
    scale = _longest(source) if metric == "dot" else 1.0
    index = _new_index(source.width + (metric == "dot"), metric)
    for start, block in source.blocks():
        usable = usable_rows(block, allow_zero=metric != "cosine")
        rows = np.ascontiguousarray(_indexed(block[usable], metric, scale), np.float32)
        if len(rows):
            index.add(start + np.flatnonzero(usable), rows, threads=threads)
        if progress is not None:
            progress(start + len(block))
    return NearestIndex(index, metric=metric, scale=scale)


def _longest(source: VectorSource) -> float:
    longest = 0.0
    for _, block in source.blocks():
        usable = block[usable_rows(block, allow_zero=True)]
        if len(usable):
            longest = max(longest, float(np.linalg.norm(usable, axis=1).max()))
    return longest or 1.0


def _indexed(block: NDArray[np.float64], metric: Metric, scale: float) -> NDArray[np.float64]:
    if metric == "cosine":
        return unit_rows(block) if len(block) else block
    if metric == "euclidean":
        return block
    scaled = block / scale
    rest = np.sqrt(np.maximum(1 - (scaled * scaled).sum(axis=1, keepdims=True), 0))
    return np.concatenate([scaled, rest], axis=1)


def _new_index(width: int, metric: Metric) -> Any:
    return _usearch().Index(
        ndim=width,
        metric=_USEARCH_METRICS[metric],
        dtype="f32",
        connectivity=CONNECTIVITY,
        expansion_add=BUILD_EFFORT,
        expansion_search=SEARCH_EFFORT,
    )


def _usearch() -> Any:
    try:
        import usearch.index
    except ImportError as error:
        raise MissingExtraError(package="usearch", extra="search", purpose="approximate search") from error
    return usearch.index


def open_index(
    source: VectorSource,
    origin: Origin,
    *,
    path: Path | None = None,
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> tuple[NearestIndex, Path | None, bool]:
    """Load the index that is next to a file, or build and save it there."""
    path = path or origin.index_path()
    identity = _identity(source, origin)
    stored = _read_facts(path)
    why = _mismatch(stored, identity, path, origin.path)
    if not why:
        index = _new_index(source.width + (origin.metric == "dot"), origin.metric)
        index.view(str(path))
        return NearestIndex(index, metric=origin.metric, scale=float(stored["scale"])), path, False
    logger.info("%s: building an index of %d rows (%s)", path, len(source), why)
    built = build_index(source, metric=origin.metric, threads=threads, progress=progress)
    try:
        check_output(path, overwrite=True)
    except StoreError as error:
        logger.warning("%s; the index is not kept", error)
        return built, None, True
    built.save(path)
    facts = {**identity, "scale": built.scale, "source": _file_facts(origin.path), "index": _file_facts(path)}
    with reporting_writes(path):
        write_text(_facts_path(path), json.dumps({**facts, "facts": _digest(facts)}))
    return built, path, True


def _identity(source: VectorSource, origin: Origin) -> dict[str, Any]:
    _usearch()  # says which extra brings it
    return {
        "format": _FORMAT,
        "usearch": version("usearch").split(".")[0],  # its files are read by all of a major version
        "layer": origin.layer,
        "metric": origin.metric,
        "transform": origin.transform,
        "rows": len(source),
        "width": source.width,
        "settings": [CONNECTIVITY, BUILD_EFFORT],
    }


def _facts_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_facts(path: Path) -> dict[str, Any]:
    """Read what is recorded about an index; nothing where there is none, or it is not what was written."""
    try:
        facts = json.loads(_facts_path(path).read_bytes())
        digest = facts.pop("facts")
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return {}
    return facts if digest == _digest(facts) else {}


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _mismatch(facts: Mapping[str, Any], identity: Mapping[str, Any], path: Path, embeddings: Path) -> str:
    """Return why an index must be built again; empty if it fits."""
    if not facts or not path.is_file():
        return "there is none yet"
    if changed := [name for name, value in identity.items() if facts.get(name) != value]:
        return f"it was built with another {', '.join(changed)}"
    for name, file in (("source", embeddings), ("index", path)):
        if not _is_same_file(facts.get(name), file):
            return f"{file.name} has changed since it was built"
    return ""


def _is_same_file(facts: object, path: Path) -> bool:
    """Return whether a file is unchanged: by size, times and inode, which needs no reading, or by digest.

    The time of the last change of the inode is one that no program sets back.
    """
    if not isinstance(facts, dict):
        return False
    found = path.stat()
    if (found.st_size, found.st_ctime_ns, found.st_ino) == tuple(
        map(facts.get, ("bytes", "ctime_ns", "inode"))
    ):
        return True
    return bool(found.st_size == facts.get("bytes") and _file_facts(path)["sha256"] == facts.get("sha256"))


def _file_facts(path: Path) -> dict[str, Any]:
    found = path.stat()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": found.st_size, "ctime_ns": found.st_ctime_ns, "inode": found.st_ino}
