"""``genoembed search``: what is near each query, as a table.

``genoembed fit-transform``: take out what all vectors share.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import GroupedCommand, GroupedOption
from genoembed.cli.outcome import promise_output
from genoembed.cli.output import count, json_option, reporting_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from genoembed import SearchReport, TransformReport


_logger = logging.getLogger(__name__)

NEAR, SPEED, HEADS, INPUT, OUTPUT = "What is near", "Approximate search", "Hybrid search", "Queries", "Output"


def _option(
    *names: str, group: str, help: str, **attributes: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    settings = ({} if attributes.get("required") else {"default": None}) | attributes
    return click.option(*names, cls=GroupedOption, group=group, help=help, **settings)


def _weights(ctx: click.Context, option: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        message = f"{text!r} is no list of numbers such as 1,0.3,1"
        raise click.BadParameter(message, ctx=ctx, param=option) from error


@click.command(
    "search",
    cls=GroupedCommand,
    short_help="Find what is near in an embedding file.",
    epilog="""\b
    Examples:
      genoembed search genes.fa --against genomes.h5 -k 5
      genoembed search genomes.h5 --against genomes.h5 --exclude-self --approximate -o near.tsv
      genoembed search genes.h5 --against genomes.h5 --transform centered.h5 | cut -f 1-3""",
)
@click.argument("queries", metavar="QUERY...", nargs=-1, required=True)
@_option("--against", group=NEAR, required=True, metavar="FILE.h5", help="The embeddings to search.")
@_option("-k", "--neighbors", "k", group=NEAR, type=int, metavar="N", help="Hits of a query.  [10]")
@_option(
    "--metric",
    group=NEAR,
    type=click.Choice(("cosine", "dot", "euclidean")),
    help="Higher is closer, except for euclidean.  [cosine]",
)
@_option("--layer", group=NEAR, metavar="NAME", help="Which matrix; without it, the file's first.")
@_option("--exclude-self", group=NEAR, is_flag=True, help="Leave out rows of the query's own record.")
@_option("--transform", group=NEAR, metavar="FILE.h5", help="Of fit-transform; applied to both sides.")
@_option("--approximate", group=SPEED, is_flag=True, help="Use an index beside the file; built if need be.")
@_option("--index", group=SPEED, metavar="FILE", help="Keep the index there.")
@_option("--effort", group=SPEED, type=int, metavar="N", help="Candidates a query; more find more.  [128]")
@_option(
    "--measure-recall", group=SPEED, type=int, metavar="N", help="Answer N queries exactly, too, and compare."
)
@_option("--search-threads", group=SPEED, type=int, metavar="N", help="Threads of the index.  [1]")
@_option("--hybrid", group=HEADS, is_flag=True, help="Score hits again with a retrieval model's heads.")
@_option(
    "--hybrid-weights",
    group=HEADS,
    default="1,0.3,1",
    callback=_weights,
    metavar="W,W,W",
    help="Of dense, sparse and multi-vector.  [1,0.3,1]",
)
@_option("--depth", group=HEADS, default=100, type=int, metavar="N", help="Rows scored again a query.  [100]")
@_option(
    "--subject-sequences",
    group=HEADS,
    multiple=True,
    default=(),
    metavar="FILE",
    help="Sequences of the file; repeatable. Without it, where it says they are.",
)
@_option("--model", group=INPUT, metavar="NAME", help="Embeds sequences; without it, as the file says.")
@_option("--trust-remote-code", group=INPUT, is_flag=True, help="Run Python code that the model brings.")
@_option(
    "--invalid",
    group=INPUT,
    type=click.Choice(("error", "skip", "mask")),
    help="Letters outside IUPAC DNA.  [error]",
)
@_option(
    "--duplicates",
    group=INPUT,
    type=click.Choice(("error", "suffix")),
    help="Ids that appear twice.  [error]",
)
@_option("--empty", group=INPUT, type=click.Choice(("error", "skip")), help="No bases.  [error]")
@_option("--gaps", group=INPUT, type=click.Choice(("error", "strip")), help="Gap letters.  [error]")
@_option("--dtype", group=INPUT, metavar="TYPE", help="Of the model; without it, as the file says.")
@_option("--device", group=INPUT, metavar="DEVICE", help="cpu, cuda ...; without it, CUDA if present.")
@_option("--threads", group=INPUT, type=int, metavar="N", help="CPU threads of the model.")
@_option(
    "-o",
    "--output",
    group=OUTPUT,
    default="-",
    metavar="FILE",
    help="The table; without it, standard output.",
)
@_option("--overwrite", group=OUTPUT, is_flag=True, default=False, help="Replace FILE, once complete.")
@reporting_options
def search_command(queries: tuple[str, ...], **options: Any) -> None:
    """Find the rows of an embedding file that are near each QUERY: sequence files, which are embedded as the
    file was ('-' is standard input), or one embedding file.

    Writes one line per hit, the nearest first: query, subject, score, rank, and where both lie.
    """
    if options["output"] != "-":
        promise_output(options["output"])
    flags = ("exclude_self", "approximate", "trust_remote_code")
    given: dict[str, Any] = {
        name: value or None if name in flags else value for name, value in options.items()
    }
    report = genoembed.search(queries, **given)
    for line in _details(report):
        _logger.info("%s", line)


def _details(report: SearchReport) -> list[str]:
    queries, rows = count(report.num_queries, "query", "queries"), count(report.num_subjects, "row")
    lines = [
        f"{count(len(report.hits), 'hit')} for {queries} among {rows} of {report.layer} by {report.metric}, "
        f"{report.seconds:.2f} s"
    ]
    if report.index is not None:
        lines.append(f"index {report.index}{' built' if report.index_built else ''}")
    if report.recall is not None:
        lines.append(f"recall of the index: {report.recall:.4f}")
    return lines


FIT, OUTPUT = "What is fitted", "Output"


@click.command(
    "fit-transform",
    cls=GroupedCommand,
    short_help="Center or whiten vectors, fitted on a background.",
    epilog="""\b
    Examples:
      genoembed fit-transform genomes.h5 -o centered.h5
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
    help="Remove the mean; scale all directions to variance 1; or remove mean and strongest directions.  "
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
def fit_transform_command(background: str, *, as_json: bool, **options: Any) -> None:
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
