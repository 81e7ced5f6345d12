"""``compare``: how far two embedding files agree, record by record.

In: two files of one kind. Out: a cosine and the largest difference for each record of both, against a
tolerance that follows from how their numbers were computed and stored. Records are matched by id.

D features, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import fspath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from genoembed.errors import ConfigError, StoreError
from genoembed.pipeline.file_recipe import differences, recipe_of
from genoembed.pipeline.file_vectors import block_rows
from genoembed.store import check_output, open_embeddings
from genoembed.store.atomic import write_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from os import PathLike
    from pathlib import Path

    from numpy.typing import NDArray

    from genoembed.store import EmbeddingFile


TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}
"""Largest relative difference by the type of numbers that a model computed in."""
STORED_TOLERANCES = {"float32": 0.0, "float16": 1e-3}
"""The same by the type that a file stores: float16 keeps eleven bits."""


class Difference(NamedTuple):
    """How far two vectors of a record agree; in per-token files, the worst of its tokens."""

    cosine: float
    """1 where both are zero, or neither record has a vector; NaN where they cannot be compared."""
    absolute: float
    """Largest difference of a value."""
    relative: float
    """The same, divided by the largest value of either vector."""


SAME = Difference(1.0, 0.0, 0.0)
INCOMPARABLE = Difference(float("nan"), float("inf"), float("inf"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerComparison:
    """How far two matrices agree."""

    layer: str
    num_compared: int
    num_outside: int
    """Records that differ by more than the tolerance."""
    min_cosine: float
    """NaN where nothing was compared."""
    mean_cosine: float
    max_absolute: float
    max_relative: float
    worst: tuple[tuple[str, Difference], ...]
    """Up to ten records that differ most, the worst first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareReport:
    """How far two files agree."""

    layers: tuple[LayerComparison, ...]
    tolerance: float
    """Largest relative difference that counts as equal."""
    only_in_first: tuple[str, ...]
    """Ids."""
    only_in_second: tuple[str, ...]
    other_sequence: tuple[str, ...]
    """Ids of records that both have, of different sequences."""
    is_reordered: bool
    """Whether the records of both come in another order, which is no difference."""
    recipe_differences: tuple[str, ...]
    """In what the files say that they were made differently."""
    output: str | None
    """The table that was written."""

    @property
    def is_within(self) -> bool:
        """Whether both have the same records, with vectors that are equal within the tolerance."""
        strangers = self.only_in_first or self.only_in_second or self.other_sequence
        return not strangers and not any(layer.num_outside for layer in self.layers)


def compare(
    first: str | PathLike[str],
    second: str | PathLike[str],
    *,
    layer: str | None = None,
    tolerance: float | None = None,
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> CompareReport:
    """Compare two embedding files, record by record; blocks of rows are in memory, not files.

    A record without a vector (NaN) equals another without one.

    Args:
        first: A file that genoembed wrote.
        second: Another, of the same kind.
        layer: Which matrix; None compares all that both have.
        tolerance: Largest relative difference that counts as equal: of a value, against the largest value of
            the record's vector. None follows from the types of numbers: 1e-5 for float32, 1e-2 where the
            model ran in bfloat16 or float16, at least 1e-3 where a file stores float16.
        output: A table to write, a line a record and layer; None writes none.
        overwrite: Replace an existing table.

    Returns:
        What was found.

    Raises:
        ConfigError: If the tolerance is negative, the files are of different kinds or have no layer in
            common, or a layer has another width.
        LayerError: If a file lacks the layer asked for.
        StoreError: If a file cannot be read or written.
    """
    if tolerance is not None and not tolerance >= 0:
        message = f"tolerance is {tolerance}; set tolerance to 0 or more"
        raise ConfigError(message)
    target = None if output is None else check_output(output, overwrite=overwrite)
    with open_embeddings(first) as one, open_embeddings(second) as other:
        names = _common_layers(one, other, layer)
        wanted = _tolerance(one, other, names) if tolerance is None else tolerance
        pairs = _Pairs.of(one, other)
        lines = ["id\tlayer\tcosine\tmax_absolute\tmax_relative\twithin"]
        summaries = []
        for name in names:
            found = list(_differences(one, other, name, pairs))
            ids = [one.ids[row] for row in pairs.first]
            summaries.append(summarize(name, zip(ids, found, strict=True), tolerance=wanted))
            if target is not None:
                lines += [_line(key, name, item, wanted) for key, item in zip(ids, found, strict=True)]
        report = CompareReport(
            layers=tuple(summaries),
            tolerance=wanted,
            only_in_first=pairs.only_in_first,
            only_in_second=pairs.only_in_second,
            other_sequence=_other_sequences(one, other, pairs),
            is_reordered=bool((np.diff(pairs.second) < 0).any()),
            recipe_differences=tuple(_recipe_differences(one, other, names)),
            output=None if output is None else fspath(output),
        )
    if target is not None:
        _write(target, lines)
    return report


def difference(first: NDArray[np.floating], second: NDArray[np.floating]) -> Difference:
    """Measure how far two vectors, or the vectors of two runs of tokens, agree.

    Example:
        >>> difference(np.array([3.0, 4.0]), np.array([3.0, 4.5])).relative
        0.1111111111111111
    """
    if first.shape != second.shape:
        return INCOMPARABLE
    a, b = (np.atleast_2d(np.asarray(each, dtype=np.float64)) for each in (first, second))
    if not a.size or (np.isnan(a).all() and np.isnan(b).all()):
        return SAME
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return INCOMPARABLE
    absolute = np.abs(a - b).max(axis=1)
    largest = np.maximum(np.abs(a).max(axis=1), np.abs(b).max(axis=1))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    is_zero = lengths == 0
    cosine = np.where(absolute == 0, 1.0, np.einsum("td,td->t", a, b) / np.where(is_zero, 1.0, lengths))
    relative = absolute / np.where(largest == 0, 1.0, largest)
    return Difference(float(cosine.min()), float(absolute.max()), float(relative.max()))


def summarize(
    layer: str, found: Iterable[tuple[str, Difference]], *, tolerance: float, num_worst: int = 10
) -> LayerComparison:
    """Sum differences up.

    Example:
        >>> summary = summarize("x", [("a", SAME), ("b", Difference(0.9, 0.5, 0.1))], tolerance=0.01)
        >>> summary.num_outside, summary.worst[0][0], summary.mean_cosine
        (1, 'b', 0.95)
    """
    pairs = list(found)
    ranked = sorted((pair for pair in pairs if pair[1].relative > 0), key=lambda pair: -pair[1].relative)
    cosines = np.array([pair[1].cosine for pair in pairs])
    comparable = cosines[~np.isnan(cosines)]
    return LayerComparison(
        layer=layer,
        num_compared=len(pairs),
        num_outside=sum(not pair[1].relative <= tolerance for pair in pairs),
        min_cosine=float(comparable.min()) if len(comparable) else float("nan"),
        mean_cosine=float(comparable.mean()) if len(comparable) else float("nan"),
        max_absolute=max((pair[1].absolute for pair in pairs), default=0.0),
        max_relative=max((pair[1].relative for pair in pairs), default=0.0),
        worst=tuple(ranked[:num_worst]),
    )


def tolerance_of(computed: Iterable[str], stored: Iterable[str] = ()) -> float:
    """Choose a tolerance.

    Example:
        >>> tolerance_of(["float32"]), tolerance_of(["float32"], ["float16"]), tolerance_of(["bfloat16"])
        (1e-05, 0.001, 0.01)
    """
    coarsest = max(TOLERANCES.values())
    limits = [TOLERANCES.get(name, coarsest) for name in computed]
    return max([*limits, *(STORED_TOLERANCES.get(name, coarsest) for name in stored)])


class _Pairs(NamedTuple):
    """Rows of two files with the same id."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]

    @classmethod
    def of(cls, one: EmbeddingFile, other: EmbeddingFile) -> _Pairs:
        places = {record_id: row for row, record_id in enumerate(other.ids)}
        shared = [(row, places[key]) for row, key in enumerate(one.ids) if key in places]
        known = set(one.ids)
        rows = np.array(shared, dtype=np.int64).reshape(-1, 2)
        return cls(
            first=rows[:, 0],
            second=rows[:, 1],
            only_in_first=tuple(key for key in one.ids if key not in places),
            only_in_second=tuple(key for key in other.ids if key not in known),
        )


def _common_layers(one: EmbeddingFile, other: EmbeddingFile, layer: str | None) -> list[str]:
    if one.kind != other.kind:
        message = (
            f"{one.path} is of kind {one.kind}, {other.path} of kind {other.kind}, expected the same; "
            "extract one of them again with the other's pooling"
        )
        raise ConfigError(message)
    names = [layer] if layer is not None else [name for name in one.layers if name in other.layers]
    if not names:
        message = (
            f"{one.path} has {', '.join(one.layers)}, {other.path} has {', '.join(other.layers)}, expected a "
            "layer in common; extract one of them again with the other's layers"
        )
        raise ConfigError(message)
    for name in names:
        widths = one[name].shape[1], other[name].shape[1]
        if widths[0] != widths[1]:
            message = (
                f"layer {name!r} has {widths[0]} features in {one.path} and {widths[1]} in {other.path}, "
                "expected the same; they are of different models, or another rc"
            )
            raise ConfigError(message)
    return names


def _tolerance(one: EmbeddingFile, other: EmbeddingFile, names: list[str]) -> float:
    computed = []
    for file in (one, other):
        made = file.provenance.get("model")
        computed.append(str(made.get("dtype", "float32")) if isinstance(made, dict) else "float32")
    return tolerance_of(computed, [file[name].dtype.name for file in (one, other) for name in names])


def _differences(one: EmbeddingFile, other: EmbeddingFile, layer: str, pairs: _Pairs) -> Iterator[Difference]:
    if one.kind == "tokens":
        for row, mate in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
            yield difference(one.vectors(row, layer), other.vectors(mate, layer))
        return
    step = block_rows(one[layer].shape[1])
    for start in range(0, len(pairs.first), step):
        span = slice(start, start + step)
        mine, theirs = one[layer][pairs.first[span]], other[layer][pairs.second[span]]
        yield from map(difference, mine, theirs)


def _other_sequences(one: EmbeddingFile, other: EmbeddingFile, pairs: _Pairs) -> tuple[str, ...]:
    mine, theirs = one.obs["sha256"][pairs.first], other.obs["sha256"][pairs.second]
    differs = [bool(a and b and a != b) for a, b in zip(mine, theirs, strict=True)]
    return tuple(one.ids[row] for row, is_other in zip(pairs.first, differs, strict=True) if is_other)


def _recipe_differences(one: EmbeddingFile, other: EmbeddingFile, names: list[str]) -> list[str]:
    found = differences(recipe_of(one.provenance, names[0]), recipe_of(other.provenance, names[0]))
    types = [_computed(file.provenance) for file in (one, other)]
    return found + ([f"dtype: {types[0]!r} against {types[1]!r}"] if types[0] != types[1] else [])


def _computed(provenance: Mapping[str, Any]) -> str | None:
    made = provenance.get("model")
    return str(made["dtype"]) if isinstance(made, dict) and "dtype" in made else None


def _line(record_id: str, layer: str, found: Difference, tolerance: float) -> str:
    within = "yes" if found.relative <= tolerance else "no"
    numbers = f"{found.cosine:.9g}\t{found.absolute:.6g}\t{found.relative:.6g}"
    return f"{record_id}\t{layer}\t{numbers}\t{within}"


def _write(target: Path, lines: list[str]) -> None:
    try:
        write_text(target, "\n".join(lines) + "\n")
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error}); free space, or set output to another name"
        raise StoreError(problem, path=str(target)) from error
