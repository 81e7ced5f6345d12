"""``genoembed plot``: a map of an embedding file."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import COUNT, GroupedCommand, choice, file_option
from genoembed.cli.outcome import promise_output
from genoembed.cli.output import count, json_option, reporting_options

if TYPE_CHECKING:
    from genoembed import PlotReport

_logger = logging.getLogger(__name__)

MAP, COLORS, OUTPUT = "The map", "Colors", "Output"
_COLUMN: dict[str, Any] = {"multiple": True, "default": (), "metavar": "COLUMN"}


@click.command(
    "plot",
    cls=GroupedCommand,
    short_help="Draw a map: picture and interactive page.",
    epilog="""\b
    Examples:
      genoembed plot genes.h5 --color length
      genoembed plot genes.h5 --values classes.tsv --method umap -o map.html -o map.svg
      genoembed plot genes.h5 --values clusters.tsv --classes leiden --transform centered.h5 -o map.png""",
)
@click.argument("file", metavar="FILE.h5")
@file_option(
    "-o",
    "--output",
    group=OUTPUT,
    multiple=True,
    metavar="FILE",
    help="Ends in .png, .svg, .html or .tsv; repeatable.  [FILE.png and FILE.html]",
)
@file_option("--overwrite", group=OUTPUT, is_flag=True, default=False, help="Replace existing files.")
@file_option("--title", group=OUTPUT, metavar="TEXT", help="Heading.  [the file's name]")
@file_option(
    "--color",
    group=COLORS,
    help="Column of FILE.h5 or of the values; repeatable. Pictures show the first, the page all.",
    **_COLUMN,
)
@file_option("--values", group=COLORS, metavar="TSV", help="A table: ids in its first column, then values.")
@file_option(
    "--classes", group=COLORS, help="Numbers there are classes, as of clusters; repeatable.", **_COLUMN
)
@file_option(
    "--method", group=MAP, default="pca", help="How it is laid out.  [pca]", **choice("pca", "umap", "tsne")
)
@file_option("--layer", group=MAP, metavar="NAME", help="Which matrix; without it, the file's first.")
@file_option("--transform", group=MAP, metavar="FILE.h5", help="Of fit-transform; applied first.")
@file_option(
    "--components", group=MAP, help="umap and tsne: principal components they start from.  [50]", **COUNT
)
@file_option("--neighbors", group=MAP, help="umap: neighbors of a point.  [15]", **COUNT)
@file_option("--min-dist", group=MAP, type=float, metavar="X", help="umap: how close points may lie.  [0.1]")
@file_option("--perplexity", group=MAP, type=float, metavar="X", help="tsne: about how many neighbors.  [30]")
@file_option(
    "--max-points", group=MAP, default=100_000, help="Of more rows, draw a sample of N.  [100000]", **COUNT
)
@file_option("--seed", group=MAP, help="Of the map and of the sample.  [0]", **COUNT)
@json_option
@reporting_options
def plot_command(file: str, *, output: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Draw a map of the records in FILE.h5: as a picture, and as one HTML page that works without a network,
    with search, colors to switch, and a lasso that downloads what it holds as a table.

    Rows without a vector are left out, and counted. Standard output gets the names of the files.
    """
    for name in output:
        promise_output(name)
    report = genoembed.plot(file, output or None, **options)
    for line in _details(report):
        _logger.info("%s", line)
    click.echo(json.dumps(_as_json(report)) if as_json else "\n".join(map(str, report.outputs)))


def _details(report: PlotReport) -> list[str]:
    lines = [
        f"{count(report.num_points, 'point')} of {report.layer}; {report.settings}; {report.seconds:.1f} s"
    ]
    if report.num_not_sampled:
        lines.append(f"{count(report.num_not_sampled, 'record')} not shown: a random sample was drawn")
    if report.num_failed or report.num_not_finite:
        left_out = report.num_failed + report.num_not_finite
        lines.append(f"{count(left_out, 'record')} left out: no vector")
    if report.num_without_value:
        lines.append(f"{count(report.num_without_value, 'point')} without a value of {report.colors[0]!r}")
    if report.num_unknown_ids:
        lines.append(f"{count(report.num_unknown_ids, 'id')} of the values not in the file")
    return lines


def _as_json(report: PlotReport) -> dict[str, Any]:
    return {**dataclasses.asdict(report), "outputs": [str(path) for path in report.outputs]}
