"""``genoembed plot``: a map of an embedding file."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import command
from genoembed.cli.outcome import promise_output
from genoembed.cli.output import count, echo_result, wrote
from genoembed.config.plot import PlotConfig

if TYPE_CHECKING:
    from genoembed import PlotReport

_logger = logging.getLogger(__name__)


@command(
    "plot",
    PlotConfig,
    reads=("file",),
    short_help="Draw a map of vectors, or the layers of a probe.",
    examples="""
    genoembed plot genes.h5 --color length
    genoembed plot genes.h5 --values classes.tsv --method umap -o map.html -o map.svg
    genoembed plot genes.h5 --values clusters.tsv --classes leiden --transform centered.h5 -o map.png
    genoembed plot promoters.probe -o layers.pdf --theme dark""",
    has_json=True,
)
@click.argument("file", metavar="FILE")
def plot_command(file: str, *, as_json: bool, output: tuple[str, ...] = (), **options: Any) -> None:
    """Draw a map of the records in an embedding file, as a picture and as an HTML page.

    The page works without a network. It has a search field, colors to choose, and a lasso whose selection
    can be saved as a table. Rows without a vector are left out and counted. FILE may also be probe.json of a
    probe, or its folder: the picture shows the score of each layer. Standard output gets the names of the
    files.
    """
    for name in output:
        promise_output(name)
    report = genoembed.plot(file, output or None, **options)
    for line in _details(report):
        _logger.info("%s", line)
    wrote(*report.outputs)
    echo_result(_as_json(report), "\n".join(map(str, report.outputs)), as_json=as_json)


def _details(report: PlotReport) -> list[str]:
    if report.method is None:
        shown = count(report.num_points, "layer")
        return [f"{shown} of a probe, {report.layer} recommended; {report.seconds:.1f} s"]
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
