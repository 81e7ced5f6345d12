"""``genoembed export``: an embedding file for another tool."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import click

import genoembed
from genoembed.cli.options import GroupedCommand, choice, file_option
from genoembed.cli.outcome import promise_output
from genoembed.cli.reporting import json_option, reporting_options
from genoembed.cli.text import count, magnitude

_logger = logging.getLogger(__name__)

TAKEN, OUTPUT = "What is taken", "Output"


@click.command(
    "export",
    cls=GroupedCommand,
    short_help="Write embeddings as h5ad, npz, parquet, csv, ...",
    epilog="""\b
    Examples:
      genoembed export genes.h5 --to parquet
      genoembed export genes.h5 --to csv --layer blocks.28.mlp.l3 -o vectors.csv""",
)
@click.argument("file", metavar="FILE.h5")
@file_option(
    "--to",
    group=OUTPUT,
    required=True,
    help="The kind of file; uniprot-h5 has one dataset a record.",
    **choice("h5ad", "npz", "parquet", "csv", "uniprot-h5"),
)
@file_option(
    "-o", "--output", group=OUTPUT, metavar="FILE", help="The file to write.  [FILE's name and ending]"
)
@file_option("--overwrite", group=OUTPUT, is_flag=True, default=False, help="Replace it, once complete.")
@file_option("--layer", group=TAKEN, metavar="NAME", help="Which matrix alone; csv and uniprot-h5 hold one.")
@json_option
@reporting_options
def command(file: str, *, to: Any, as_json: bool, **options: Any) -> None:
    """Write the embeddings of FILE.h5 as another kind of file. Standard output gets its name."""
    if options["output"]:
        promise_output(options["output"])
    report = genoembed.export(file, to, **options)
    _logger.info(
        "%s of %s, %s",
        count(report.num_records, "record"),
        ", ".join(report.layers),
        magnitude(report.num_bytes, "B"),
    )
    facts = {**dataclasses.asdict(report), "output": str(report.output)}
    click.echo(json.dumps(facts) if as_json else str(report.output))
