"""``genoembed fit-transform``: take out what all vectors share."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import GroupedCommand, GroupedOption
from genoembed.cli.outcome import promise_output
from genoembed.cli.reporting import json_option, reporting_options
from genoembed.cli.text import count

if TYPE_CHECKING:
    from collections.abc import Callable

    from genoembed import TransformReport

_logger = logging.getLogger(__name__)

FIT, OUTPUT = "What is fitted", "Output"


def _option(
    *names: str, group: str, help: str, **attributes: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    settings = ({} if attributes.get("required") else {"default": None}) | attributes
    return click.option(*names, cls=GroupedOption, group=group, help=help, **settings)


@click.command(
    "fit-transform",
    cls=GroupedCommand,
    short_help="Centre or whiten vectors, fitted on a background.",
    epilog="""\b
    Examples:
      genoembed fit-transform genomes.h5 -o centred.h5
      genoembed fit-transform genomes.h5 --method remove-top --components 3 -o top3.h5
      genoembed search genes.fa --against genomes.h5 --transform top3.h5""",
)
@click.argument("background", metavar="FILE.h5")
@_option("-o", "--output", group=OUTPUT, required=True, metavar="OUT.h5", help="The file to write.")
@_option("--overwrite", group=OUTPUT, is_flag=True, default=False, help="Replace OUT.h5, once complete.")
@_option(
    "--method",
    group=FIT,
    default="center",
    type=click.Choice(("center", "whiten", "remove-top")),
    help="Take out the mean; give all directions variance 1; or take out mean and strongest directions.  "
    "[center]",
)
@_option(
    "--components",
    group=FIT,
    type=int,
    metavar="N",
    help="Directions that remove-top takes out (without it, one a hundred features) or whiten keeps (all).",
)
@_option("--layer", group=FIT, metavar="NAME", help="Which matrix; without it, the file's first.")
@_option(
    "--axes",
    group=FIT,
    default="pca",
    type=click.Choice(("pca", "zca")),
    help="Of whiten: principal components, or the old axes.  [pca]",
)
@_option("--shrinkage", group=FIT, default=0.0, type=float, metavar="SHARE", help="Of whiten, 0 to 1.  [0]")
@_option("--seed", group=FIT, default=0, type=int, metavar="N", help="Of the sample of the report.  [0]")
@json_option
@reporting_options
def command(background: str, *, as_json: bool, **options: Any) -> None:
    """Fit a transform on the vectors of FILE.h5, the background, and write it to OUT.h5.

    Vectors of a language model share a large part, so that all cosines are near 1. Standard output gets the
    mean cosine of random pairs, and the length of the mean direction, before and after.
    """
    promise_output(options["output"])
    report = genoembed.fit_transform(background, **options)
    if report.num_unusable:
        _logger.info("%s without a vector left out", count(report.num_unusable, "row"))
    click.echo(json.dumps(_as_json(report)) if as_json else _headline(report))


def _headline(report: TransformReport) -> str:
    before, after = report.before, report.after
    return (
        f"{report.output}: {report.method} of {report.layer}, {count(report.num_rows, 'row')} x "
        f"{report.width:,} to {report.output_width:,}; mean cosine {before.mean_cosine:.4f} to "
        f"{after.mean_cosine:.4f}, mean resultant {before.resultant:.4f} to {after.resultant:.4f}"
    )


def _as_json(report: TransformReport) -> dict[str, Any]:
    return {
        **dataclasses.asdict(report),
        "output": str(report.output),
        "before": report.before._asdict(),
        "after": report.after._asdict(),
    }
