"""``compare``: how far two embedding files agree, record by record.

In: two files of one kind. Out: a cosine and the largest difference for each record of both, against a
tolerance that follows from how their numbers were computed and stored. Records are matched by id.

D features, T tokens.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from os import fspath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genoembed.config.fields import named_options
from genoembed.config.files import CompareConfig
from genoembed.config.paths import check_paths
from genoembed.errors import ConfigError
from genoembed.pipeline.agreement import FP8, Difference, LayerComparison, difference, summarize, tolerance_of
from genoembed.pipeline.embedding_file import (
    block_rows,
    comparable_settings,
    computed_dtype,
    runs_fp8,
    setting_differences,
)
from genoembed.store import check_output, open_embeddings
from genoembed.store.tables import open_table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

    from numpy.typing import NDArray

    from genoembed.store import EmbeddingFile


_COLUMNS = ("id", "layer", "cosine", "max_absolute", "max_relative", "within")


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
    setting_differences: tuple[str, ...]
    """In what the files say that they were made differently."""
    output: str | None
    """The table that was written."""

    @property
    def is_within(self) -> bool:
        """Whether both have the same records, with vectors that are equal within the tolerance."""
        strangers = self.only_in_first or self.only_in_second or self.other_sequence
        return not strangers and not any(layer.num_outside for layer in self.layers)


@named_options(CompareConfig)
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
        output: A table to write, one line per record and layer; None writes none.
        overwrite: Replace an existing table.

    Returns:
        What was found.

    Raises:
        ConfigError: If the tolerance is negative, the files are of different kinds or have no layer in
            common, or a layer has another width.
        LayerError: If a file lacks the requested layer.
        StoreError: If a file cannot be read or written.
    """
    if tolerance is not None and not tolerance >= 0:  # NaN as well
        message = f"tolerance is {tolerance}; set tolerance to 0 or more"
        raise ConfigError(message)
    check_paths([first, second], [(output, "table")], overwrite=overwrite)
    if output is not None:
        check_output(output, overwrite=overwrite)
    with ExitStack() as stack:
        one, other = (stack.enter_context(open_embeddings(path)) for path in (first, second))
        table = (
            None if output is None else stack.enter_context(open_table(output, _COLUMNS, overwrite=overwrite))
        )
        names = _common_layers(one, other, layer)
        wanted = _tolerance(one, other, names) if tolerance is None else tolerance
        pairs = _Pairs.of(one, other)
        summaries = []
        for name in names:
            found = list(_differences(one, other, name, pairs))
            ids = [one.ids[row] for row in pairs.first]
            summaries.append(summarize(name, zip(ids, found, strict=True), tolerance=wanted))
            if table is not None:
                for record_id, item in zip(ids, found, strict=True):
                    table.write((record_id, name, *item, "yes" if item.is_within(wanted) else "no"))
        return CompareReport(
            layers=tuple(summaries),
            tolerance=wanted,
            only_in_first=pairs.only_in_first,
            only_in_second=pairs.only_in_second,
            other_sequence=_other_sequences(one, other, pairs),
            # pairs stand in the first file's order: a step back in the second file is another order
            is_reordered=bool((np.diff(pairs.second) < 0).any()),
            setting_differences=tuple(_setting_differences(one, other, names)),
            output=None if output is None else fspath(output),
        )


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
                "expected the same; they are of different models, or another rc, or columns were left out"
            )
            raise ConfigError(message)
    return names


def _tolerance(one: EmbeddingFile, other: EmbeddingFile, names: list[str]) -> float:
    computed = [computed_dtype(file) or "float32" for file in (one, other)]
    # vectors with FP8 and without are not expected to agree
    computed += [FP8] if runs_fp8(one) and runs_fp8(other) else []
    return tolerance_of(computed, [file[name].dtype.name for file in (one, other) for name in names])


def _differences(one: EmbeddingFile, other: EmbeddingFile, layer: str, pairs: _Pairs) -> Iterator[Difference]:
    if one.kind == "tokens":
        for row, mate in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
            yield difference(one.vectors(row, layer), other.vectors(mate, layer))
        return
    # some rows at a time: neither matrix need fit into memory
    step = block_rows(one[layer].shape[1])
    for start in range(0, len(pairs.first), step):
        span = slice(start, start + step)
        mine, theirs = one[layer][pairs.first[span]], other[layer][pairs.second[span]]
        yield from map(difference, mine, theirs)


def _other_sequences(one: EmbeddingFile, other: EmbeddingFile, pairs: _Pairs) -> tuple[str, ...]:
    mine, theirs = one.obs["sha256"][pairs.first], other.obs["sha256"][pairs.second]
    # a file without digests says nothing about its sequences
    differs = [bool(a and b and a != b) for a, b in zip(mine, theirs, strict=True)]
    return tuple(one.ids[row] for row, is_other in zip(pairs.first, differs, strict=True) if is_other)


def _setting_differences(one: EmbeddingFile, other: EmbeddingFile, names: list[str]) -> list[str]:
    found = setting_differences(
        comparable_settings(one.provenance, names[0]), comparable_settings(other.provenance, names[0])
    )
    types = [computed_dtype(file) for file in (one, other)]
    return found + ([f"dtype: {types[0]!r} against {types[1]!r}"] if types[0] != types[1] else [])
