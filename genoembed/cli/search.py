"""``genoembed search``: what is near each query, as a table.

``genoembed fit-transform``: take out what all vectors share.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import check_json_has_room, command
from genoembed.cli.outcome import promise_output
from genoembed.cli.output import count, echo_result, end_incomplete, failure_line, wrote
from genoembed.config.search import SearchConfig, TransformConfig

if TYPE_CHECKING:
    from genoembed import SearchReport, TransformReport


_logger = logging.getLogger(__name__)


@command(
    "search",
    SearchConfig,
    short_help="Find the closest rows of an embedding file.",
    examples="""
    genoembed search genes.fa --against genomes.h5 -k 5
    genoembed search genomes.h5 --against genomes.h5 --exclude-self --approximate -o near.tsv
    genoembed search genes.fa --against genomes.h5 --mode kmer | cut -f 1-6""",
    has_json=True,
)
def search_command(*, as_json: bool, **options: Any) -> None:
    """Find the rows of an embedding file that are most similar to each QUERY.

    QUERY: sequence files, which are embedded with the settings of the file ('-' is standard input), or one
    embedding file. Vectors of a language model are all similar, so they are centered on FILE.h5 before they
    are compared; --no-center compares them unchanged. The table has one line per hit, the nearest first:
    query, subject, score, rank, the fraction of shared k-mers, the sequence identity estimated from it, and
    the positions of both. Where the fraction is 0, no shared sequence was found; where it is NA, the
    sequences were not compared.
    """
    options.setdefault("output", "-")
    if options["output"] != "-":
        promise_output(options["output"])
    check_json_has_room(options, as_json=as_json)
    if "layer" in options and options.get("mode") != "kmer":
        with genoembed.open_embeddings(options["against"]) as database:
            _ = database[options["layer"]]  # here, before a model is loaded for the queries
    report = genoembed.search(**options)
    for line in ([failure_line(report.failed)] if report.failed else []) + _details(report):
        _logger.info("%s", line)
    if options["output"] != "-":
        wrote(options["output"])
    if as_json:
        facts = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
        echo_result({key: value for key, value in facts.items() if key != "hits"}, "", as_json=True)
    end_incomplete(report.failed)


def _details(report: SearchReport) -> list[str]:
    queries, rows = count(report.num_queries, "query", "queries"), count(report.num_subjects, "row")
    by = {"vectors": report.metric, "kmer": "shared k-mers", "hybrid": f"{report.metric} and shared k-mers"}
    lines = [
        f"{count(len(report.hits), 'hit')} for {queries} among {rows} of {report.layer} by "
        f"{by[report.mode]}, {report.seconds:.2f} s"
    ]
    if report.vectors:
        lines.append(f"vectors {report.vectors}")
    if report.index is not None:
        lines.append(f"index {report.index}{' built' if report.index_built else ''}")
    if report.recall is not None:
        lines.append(f"recall of the index: {report.recall:.4f}")
    return lines


@command(
    "fit-transform",
    TransformConfig,
    reads=("background",),
    short_help="Fit a transform: center or whiten vectors.",
    examples="""
    genoembed fit-transform genomes.h5 -o centered.h5
    genoembed fit-transform genomes.h5 --method remove-top --components 3 -o top3.h5
    genoembed search genes.fa --against genomes.h5 --transform top3.h5""",
    has_json=True,
)
@click.argument("background", metavar="FILE.h5")
def fit_transform_command(background: str, *, as_json: bool, **options: Any) -> None:
    """Fit a transform on the vectors of FILE.h5, the background, and write it to OUT.h5.

    Vectors of a language model share a large part, so that all cosines are near 1. Standard output gets the
    mean cosine of random pairs, and the length of the mean direction, before and after.
    """
    promise_output(options["output"])
    report = genoembed.fit_transform(background, **options)
    if report.num_unusable:
        _logger.info("%s without a vector left out", count(report.num_unusable, "row"))
    wrote(options["output"])
    echo_result(_as_json(report), _headline(report), as_json=as_json)


def _headline(report: TransformReport) -> str:
    before, after = report.before, report.after
    return (
        f"{report.output}: {report.method} of {report.layer}, {count(report.num_rows, 'row')} x "
        f"{report.width:,} to {report.output_width:,}; mean cosine {before.mean_cosine:.4f} to "
        f"{after.mean_cosine:.4f}, mean resultant length {before.resultant:.4f} to {after.resultant:.4f}"
    )


def _as_json(report: TransformReport) -> dict[str, Any]:
    return {
        **dataclasses.asdict(report),
        "output": str(report.output),
        "before": report.before._asdict(),
        "after": report.after._asdict(),
    }
