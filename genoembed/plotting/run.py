"""``plot``: a map of an embedding file, as pictures, as an interactive page and as a table.

``file -> rows with a vector -> (transform) -> plane -> colors -> outputs``. What was left out is counted,
and said on the map.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from genoembed.atomic import replacing, reporting_writes
from genoembed.config.fields import named_options
from genoembed.config.paths import check_paths
from genoembed.config.plot import MapConfig, PlotConfig
from genoembed.errors import ConfigError, LabelError, visible
from genoembed.pipeline.embedding_file import VectorSource, load_transform_for
from genoembed.plotting.colors import (
    MISSING,
    ClassColumn,
    MapContent,
    NumberColumn,
    class_column,
    date_column,
    number_column,
    text_column,
)
from genoembed.plotting.drawing import build_page, draw_map
from genoembed.plotting.layers import find_probe_report, plot_report
from genoembed.plotting.reduction import check_method, lay_out
from genoembed.pooling.transform import usable_rows
from genoembed.sequences.tables import as_text, iter_rows
from genoembed.store import check_output, open_embeddings
from genoembed.store.schema import has_failed
from genoembed.store.tables import open_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import MapMethod, Theme
    from genoembed.store import EmbeddingFile


logger = logging.getLogger(__name__)

_SUFFIXES = (".png", ".svg", ".pdf", ".html", ".tsv")
_PICTURES: dict[str, Literal["png", "svg", "pdf"]] = {".png": "png", ".svg": "svg", ".pdf": "pdf"}
MAX_POINTS = 100_000
_ALWAYS = "length"
_NO_VALUE = ("", "na", "n/a", "nan", "none")
_NOT_OFFERED = ("sha256", "description")
"""Columns of the file that differ from row to row: on the map only on request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlotReport:
    """What was drawn."""

    outputs: tuple[Path, ...]
    """The files that were written."""
    method: MapMethod | None
    """None for the report of a probe."""
    settings: str
    """How the map was computed, as text."""
    layer: str
    colors: tuple[str, ...]
    """What points can be colored by; pictures show the first."""
    num_points: int
    """Points; of a probe, layers."""
    num_in_file: int
    """Rows of the file."""
    num_failed: int
    """Rows left out because the extraction gave them no vector."""
    num_not_finite: int
    """Rows left out for NaN or infinity."""
    num_not_sampled: int
    """Rows left out by chance, since there were more than ``max_points``."""
    num_without_value: int
    """Points that the first color says nothing about."""
    num_unknown_ids: int
    """Ids of the table that the file does not have."""
    seconds: float


@named_options(PlotConfig)
def plot(
    path: str | PathLike[str],
    output: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
    *,
    color: str | Sequence[str] = (),
    values: str | PathLike[str] | None = None,
    classes: str | Sequence[str] = (),
    layer: str | None = None,
    transform: str | PathLike[str] | None = None,
    max_points: int | None = MAX_POINTS,
    title: str | None = None,
    theme: Theme = "light",
    overwrite: bool = False,
    **options: Any,
) -> PlotReport:
    """Draw a map of the records of an embedding file, or the scores of a probe by layer.

    Rows without a vector (NaN, or flagged as failed) are left out and counted.

    Args:
        path: A pooled file that genoembed wrote; or ``probe.json`` of a probe, or the folder with it, which
            takes pictures as ``output``, ``title``, ``theme`` and ``overwrite`` alone.
        output: Files to write: ``.png``, ``.svg``, ``.pdf``, ``.html`` (interactive, self-contained) or
            ``.tsv`` (the points); None is ``.png`` and ``.html`` next to the file.
        color: Columns of the file or of ``values``; the first one colors the pictures, the page switches
            between all of them and the file's other columns. Empty takes the first one of ``values``, or
            the ``source`` where there are several, or the ``length``.
        values: A table of values with ids in the first column: TSV, CSV, JSON lines or Parquet.
        classes: Columns whose numbers are classes, such as numbers of clusters.
        layer: Which matrix of the file; None is the first.
        transform: A file of ``fit_transform``, applied before the map is made.
        max_points: Where there are more rows, a random sample of this many is drawn; None draws all.
        title: None is the name of the file.
        theme: Background of the pictures, ``light`` or ``dark``; the page follows the browser's settings.
        overwrite: Replace existing files.
        **options: Fields of :class:`~genoembed.config.plot.MapConfig`: ``method`` (``pca``, ``umap``
            or ``tsne``), ``components``, ``neighbors``, ``min_dist``, ``perplexity`` and ``seed``. None
            stands for the default.

    Returns:
        What was drawn.

    Raises:
        ConfigError: If options are wrong, a column is not there, or fewer than three rows have a vector.
        LabelError: If the table of values belongs to other records.
        LayerError: If the file has no such matrix.
        MissingExtraError: If a package that is needed is not installed.
        StoreError: If a file cannot be read or written; no output is there then, or all is as it was.
    """
    started = time.perf_counter()
    wanted = _map_options(options, max_points)
    PlotConfig.build({"theme": theme})
    if (report := find_probe_report(Path(path))) is not None:
        of_maps = {"color": color, "values": values, "classes": classes, "layer": layer}
        of_maps |= {"transform": transform, **options}
        useless = [name for name, value in of_maps.items() if value is not None and value not in ((), [])]
        return _plot_probe(report, path, output, useless, title, theme, overwrite=overwrite, started=started)
    targets = _targets(path, output, overwrite=overwrite)
    reads = [path, *(name for name in (values, transform) if name is not None)]
    check_paths(reads, [(target, "picture") for target in targets], overwrite=overwrite)
    check_method(wanted.method)
    with open_embeddings(path) as file:
        points = read_points(file, layer=layer, transform=transform, max_points=max_points, seed=wanted.seed)
        columns, num_unknown = _columns(file, points.rows, _listed(color), values, _listed(classes))
        ids = [visible(file.ids[row]) for row in points.rows]
        descriptions = tuple(visible(str(text)) for text in file.obs["description"][points.rows])
        lengths = file.obs["length"][points.rows]
    logger.info("%s: %d points, %s", fspath(path), len(ids), wanted.method)
    plane = lay_out(points.vectors, wanted)
    content = MapContent(
        plane=plane,
        ids=tuple(ids),
        descriptions=descriptions,
        lengths=lengths,
        columns=columns,
        title=visible(Path(path).name if title is None else title),
        notes=tuple(map(visible, _notes(points, plane.settings, transform, wanted.seed))),
        keeps_scale=wanted.method != "pca",
        seed=wanted.seed,
    )
    bodies = [_body(content, Path(target).suffix.lower(), theme) for target in targets]
    for target, body in zip(targets, bodies, strict=True):  # once nothing but the disk can fail
        _write(content, target, body, overwrite=overwrite)
    return PlotReport(
        outputs=tuple(map(Path, targets)),
        method=wanted.method,
        settings=plane.settings,
        layer=points.layer,
        colors=tuple(column.name for column in columns),
        num_points=len(ids),
        num_in_file=points.num_in_file,
        num_failed=points.num_failed,
        num_not_finite=points.num_not_finite,
        num_not_sampled=points.num_not_sampled,
        num_without_value=columns[0].num_missing,
        num_unknown_ids=num_unknown,
        seconds=time.perf_counter() - started,
    )


def _plot_probe(
    report: Path,
    path: str | PathLike[str],
    output: str | PathLike[str] | Sequence[str | PathLike[str]] | None,
    useless: Sequence[str],
    title: str | None,
    theme: Theme,
    *,
    overwrite: bool,
    started: float,
) -> PlotReport:
    """Draw the report of a probe."""
    if useless:
        message = (
            f"{', '.join(useless)}: for a map, but {fspath(path)} is the report of a probe; leave it out"
        )
        raise ConfigError(message)
    folder = report.absolute().parent
    # beside the folder: a probe writes into no folder that holds files of others
    beside = folder.with_name(f"{folder.name}.png") if output is None else output
    targets = _targets(path, beside, overwrite=overwrite)
    if wrong := [name for name in targets if Path(name).suffix.lower() not in _PICTURES]:
        message = f"output is {wrong[0]!r}, but a probe is drawn as {', '.join(_PICTURES)}; set output to one"
        raise ConfigError(message)
    check_paths([report], [(target, "picture") for target in targets], overwrite=overwrite)
    shown = plot_report(report, title=title)
    for target in targets:
        body = shown.draw(_PICTURES[Path(target).suffix.lower()], theme=theme)
        with replacing(target, overwrite=overwrite) as part, reporting_writes(target):
            part.write_bytes(body)
    return PlotReport(
        outputs=tuple(map(Path, targets)),
        method=None,
        settings="score by layer",
        layer=shown.chosen,
        colors=(),
        num_points=len(shown.layers),
        num_in_file=len(shown.layers),
        num_failed=0,
        num_not_finite=0,
        num_not_sampled=0,
        num_without_value=0,
        num_unknown_ids=0,
        seconds=time.perf_counter() - started,
    )


def _map_options(options: Mapping[str, Any], max_points: int | None) -> MapConfig:
    if max_points is not None and max_points < 3:
        message = f"max_points is {max_points}; set max_points to 3 or more, or leave it out"
        raise ConfigError(message)
    return MapConfig.build(options)


def _targets(
    path: str | PathLike[str],
    output: str | PathLike[str] | Sequence[str | PathLike[str]] | None,
    *,
    overwrite: bool,
) -> list[str]:
    names = [Path(path).with_suffix(suffix) for suffix in (".png", ".html")] if output is None else output
    targets = [fspath(name) for name in ([names] if isinstance(names, str | PathLike) else names)]
    wrong = [name for name in targets if Path(name).suffix.lower() not in _SUFFIXES]
    if wrong or not targets:
        found = ", ".join(map(repr, wrong)) or "empty"
        message = f"output is {found}; set output to names that end in {', '.join(_SUFFIXES)}"
        raise ConfigError(message)
    for name in targets:
        check_output(name, overwrite=overwrite)
    return targets


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _columns(
    file: EmbeddingFile,
    rows: NDArray[np.int64],
    wanted: Sequence[str],
    values: str | PathLike[str] | None,
    classes: Sequence[str],
) -> tuple[tuple[ClassColumn | NumberColumn, ...], int]:
    """Collect what points can be colored by, what was requested first."""
    tabled, num_unknown = ({}, 0) if values is None else read_values(values, file.ids)
    # an AnnData file from elsewhere need not have any column, and a map must have one
    names = list(dict.fromkeys([*tabled, *file.obs, _ALWAYS]))
    unknown = [name for name in (*wanted, *classes) if name not in names]
    if unknown:
        message = (
            f"color is {unknown[0]!r}, which is not a column of {file.path} or of the values; "
            f"set color to one of {', '.join(names)}"
        )
        raise ConfigError(message)
    made: dict[str, ClassColumn | NumberColumn] = {}
    for name in names:
        if name in _NOT_OFFERED and name not in wanted and name not in tabled:
            continue
        is_class = name in classes
        if name in tabled:
            made[name] = text_column(name, [tabled[name][row] for row in rows], as_classes=is_class)
        else:
            made[name] = _file_column(name, file.obs[name][rows], is_class=is_class)
    varied = [name for name in made if name == _ALWAYS or name in tabled or _varies(made[name])]
    first = (
        list(wanted)
        or list(tabled)
        or [name for name in ("source", _ALWAYS) if name in varied and name in file.obs]
    )
    shown = list(dict.fromkeys([*first, *tabled, *varied]))
    return tuple(made[name] for name in shown), num_unknown


def read_values(
    path: str | PathLike[str], ids: Sequence[str]
) -> tuple[dict[str, tuple[str | None, ...]], int]:
    """Read values by column, a text per id; also count the ids of the table that are not among these."""
    name, known = fspath(path), set(ids)
    rows: dict[str, list[str]] = {}
    columns: list[str] = []
    for row in iter_rows(name, ids=known):
        record_id, *cells = map(as_text, row.values.values())
        columns = columns or list(row.values)
        if record_id in rows:
            problem = "has a row already; leave one"
            raise LabelError(problem, path=name, line=row.line, record_id=record_id)
        rows[record_id] = cells
    if len(columns) < 2:
        problem = (
            "has no column of values, expected ids in the first column and values in others; check the file"
        )
        raise LabelError(problem, path=name)
    if not known & rows.keys():
        shown = ", ".join(map(repr, [*rows][:3]))
        problem = f"none of its ids ({shown} ...) is in the embedding file ({ids[0]!r} ...); use the same ids"
        raise LabelError(problem, path=name)
    names = _value_names(columns, Path(path).stem)
    absent = [""] * len(names)
    values = zip(*(rows.get(record_id, absent) for record_id in ids), strict=True)
    found = {
        column: tuple(None if text.lower() in _NO_VALUE else text for text in texts)
        for column, texts in zip(names, values, strict=True)
    }
    return found, len(rows.keys() - known)


def _value_names(columns: Sequence[str], stem: str) -> list[str]:
    """Return the column names; columns without one are named after the file."""
    if columns[0] != "column_1":  # as a table without header names it
        return [name or f"{stem}_{place}" for place, name in enumerate(columns[1:], start=1)]
    return [stem] if len(columns) == 2 else [f"{stem}_{place}" for place in range(1, len(columns))]


def _file_column(name: str, values: NDArray[Any], *, is_class: bool) -> ClassColumn | NumberColumn:
    if values.dtype.kind in "iuf" and not is_class:
        is_known = values >= 0 if name == _ALWAYS else np.ones(len(values), np.bool_)
        return number_column(name, np.where(is_known, values.astype(float), np.nan))
    texts = [str(value) or None for value in values]
    return (None if is_class else date_column(name, texts)) or class_column(name, texts)


def _varies(column: ClassColumn | NumberColumn) -> bool:
    values = column.values
    return any(value != values[0] for value in values)


def _notes(points: PointRows, settings: str, transform: str | PathLike[str] | None, seed: int) -> list[str]:
    notes = [f"{len(points.rows):,} of {points.num_in_file:,} records", points.layer, settings]
    if transform is not None:
        notes.append(f"transformed by {Path(transform).name}")
    if points.num_not_sampled:
        notes.append(f"a random sample (seed {seed}): {points.num_not_sampled:,} records are not shown")
    left_out = points.num_failed + points.num_not_finite
    if left_out:
        notes.append(f"{left_out:,} without a vector left out")
    return notes


def _body(content: MapContent, suffix: str, theme: Theme) -> bytes | None:
    if suffix == ".tsv":
        return None
    if suffix == ".html":
        return build_page(content).encode()
    return draw_map(content, _PICTURES[suffix], theme=theme)


def _write(content: MapContent, name: str, body: bytes | None, *, overwrite: bool) -> None:
    """Write a picture or page, or without a body the map as a table."""
    if body is not None:
        with replacing(name, overwrite=overwrite) as part, reporting_writes(name):
            part.write_bytes(body)
        return
    columns = [column for column in content.columns if column.name != _ALWAYS]
    texts = [_cells(column) for column in columns]
    header = ("id", "x", "y", "description", _ALWAYS, *(column.name for column in columns))
    with open_table(name, header, overwrite=overwrite) as table:
        for record_id, point, description, length, *cells in zip(
            content.ids, content.plane.points, content.descriptions, content.lengths, *texts, strict=True
        ):
            table.write((record_id, *point, description, length, *cells))


def _cells(column: ClassColumn | NumberColumn) -> list[object]:
    if isinstance(column, ClassColumn):
        return [
            value if code != MISSING else None
            for value, code in zip(column.values, column.codes, strict=True)
        ]
    return (
        [column.text(row) or None for row in range(len(column.values))]
        if column.is_date
        else list(column.values)
    )


_FEWEST = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class PointRows:
    """The rows that a map shows."""

    rows: NDArray[np.int64]
    """Their numbers in the file, rising, ``(N,)``."""
    vectors: NDArray[np.float32]
    """``(N, D)``."""
    layer: str
    """Which matrix they are of."""
    num_in_file: int
    """Rows of the file."""
    num_failed: int
    """Left out: the extraction gave them no vector and says so in their flags."""
    num_not_finite: int
    """Left out: among the rows that were looked at, those with NaN or infinity."""
    num_not_sampled: int
    """Left out by chance, because there were more than the map may show."""


def read_points(
    file: EmbeddingFile,
    *,
    layer: str | None = None,
    transform: str | PathLike[str] | None = None,
    max_points: int | None = None,
    seed: int = 0,
) -> PointRows:
    """Read the vectors that a map shows."""
    _ = file.X  # a per-token file says here that it has no row a record
    name = layer or file.layers[0]
    fitted = None if transform is None else load_transform_for(file, name, transform).transform
    source = VectorSource(file[name], fitted)
    is_spoiled = np.array([has_failed(str(flags)) for flags in file.obs["flags"]], dtype=bool)
    candidates = np.flatnonzero(~is_spoiled)
    num_failed, num_left = len(file) - len(candidates), len(candidates)
    if max_points is not None and num_left > max_points:
        candidates = np.sort(np.random.default_rng(seed).choice(candidates, max_points, replace=False))
    rows, vectors = _finite(source, candidates)
    if len(rows) < _FEWEST:
        message = (
            f"{file.path}: {len(rows)} of {len(file)} rows have a vector ({num_failed} failed), but a map "
            f"needs {_FEWEST} or more; see the flags of the records"
        )
        raise ConfigError(message)
    return PointRows(
        rows=rows,
        vectors=vectors,
        layer=name,
        num_in_file=len(file),
        num_failed=num_failed,
        num_not_finite=len(candidates) - len(rows),
        num_not_sampled=num_left - len(candidates),
    )


def _finite(
    source: VectorSource, candidates: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Keep the candidates without NaN or infinity; the file is read once, a block at a time."""
    vectors = np.empty((len(candidates), source.width), dtype=np.float32)
    rows = np.empty(len(candidates), dtype=np.int64)
    filled = 0
    for start, block in source.blocks():
        first, last = np.searchsorted(candidates, (start, start + len(block)))
        mine = candidates[first:last]
        taken = block[mine - start]
        is_finite = usable_rows(taken, allow_zero=True)
        end = filled + int(is_finite.sum())
        vectors[filled:end], rows[filled:end] = taken[is_finite], mine[is_finite]
        filled = end
    return rows[:filled], vectors[:filled]
