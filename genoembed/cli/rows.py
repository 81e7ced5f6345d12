"""``genoembed subset``, ``join`` and ``annotate``: embedding files made of embedding files."""

from __future__ import annotations

import logging
from typing import Any

import click

import genoembed
from genoembed.cli.options import command
from genoembed.cli.outcome import promise_output
from genoembed.cli.output import INCOMPLETE, count, echo_result, wrote
from genoembed.config.files import AnnotateConfig, JoinConfig, SubsetConfig

_logger = logging.getLogger(__name__)


@command(
    "subset",
    SubsetConfig,
    reads=("file",),
    short_help="Write some rows of an embedding file.",
    examples="""
    genoembed subset genes.h5 --ids wanted.txt -o wanted.h5
    genoembed subset genes.h5 --where strand=- --where source=chr1.fa -o minus.h5""",
    has_json=True,
)
@click.argument("file", metavar="FILE.h5")
def subset_command(file: str, *, output: str, as_json: bool, **options: Any) -> None:
    """Write the rows of FILE.h5 that are listed, or that meet the conditions, to a new file.

    The rows keep the order of FILE.h5, and their layers, token vectors and columns. The exit code is 3 if a
    requested id is not in FILE.h5.
    """
    promise_output(output)
    report = genoembed.subset(file, output=output, **options)
    wrote(output)
    line = f"{output}: {count(report.num_rows, 'row')} of {report.num_in_file:,}"
    echo_result(report, line, as_json=as_json)
    if report.missing:
        raise click.exceptions.Exit(INCOMPLETE)


@command(
    "join",
    JoinConfig,
    reads=("files",),
    short_help="Join embedding files of the same model and settings.",
    examples="""
    genoembed join chr1.h5 chr2.h5 -o both.h5
    genoembed join chr*.h5 -o genome.h5""",
    has_json=True,
)
@click.argument("files", metavar="A.h5 B.h5...", nargs=-1, required=True)
def join_command(files: tuple[str, ...], *, output: str, as_json: bool, **options: Any) -> None:
    """Write the rows of A.h5, B.h5 and so on to one file, in this order.

    Model, layers and settings must be the same, and each id may be in one file only. To join the jobs of
    one run ('extract --shard'), use merge.
    """
    promise_output(output)
    report = genoembed.join(files, output=output, **options)
    wrote(output)
    line = f"{output}: {count(report.num_rows, 'row')} of {len(files):,} files, {', '.join(report.layers)}"
    echo_result(report, line, as_json=as_json)


@command(
    "annotate",
    AnnotateConfig,
    reads=("file", "table"),
    short_help="Add the columns of a table to an embedding file.",
    examples="""
    genoembed annotate genes.h5 species.tsv
    genoembed annotate genes.h5 clusters.csv -o annotated.h5""",
    has_json=True,
)
@click.argument("file", metavar="FILE.h5")
@click.argument("table", metavar="TABLE")
def annotate_command(file: str, table: str, *, as_json: bool, **options: Any) -> None:
    """Add the columns of TABLE to the records of FILE.h5, by id.

    TABLE: TSV, CSV, JSON lines or Parquet, with ids in the first column and the names of the columns in the
    first row. Rows of FILE.h5 that are not in TABLE get no value, and are counted.
    """
    promise_output(options.get("output", file))
    report = genoembed.annotate(file, table, **options)
    wrote(report.output)
    line = f"{report.output}: {count(report.num_rows, 'row')}, with {', '.join(report.columns)}"
    echo_result(report, line, as_json=as_json)
