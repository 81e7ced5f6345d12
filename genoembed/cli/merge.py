"""``genoembed merge``: the units that several jobs embedded become one file."""

from __future__ import annotations

import dataclasses
import json
import logging

import click

import genoembed
from genoembed.cli.options import GroupedCommand, config_option
from genoembed.cli.outcome import INCOMPLETE, promise_output
from genoembed.cli.reporting import json_option, reporting_options
from genoembed.cli.summary import failure_line
from genoembed.cli.text import count

_logger = logging.getLogger(__name__)


@click.command(
    "merge",
    cls=GroupedCommand,
    short_help="Join what the jobs of 'extract --shard I/N' embedded.",
    epilog="""\b
    Example:
      genoembed extract genome.fa.gz -o genome.h5 --shard 1/2
      genoembed extract genome.fa.gz -o genome.h5 --shard 2/2
      genoembed merge genome.h5""",
)
@click.argument("output", metavar="FILE")
@config_option(key="overwrite", group="Output", help="Replace FILE, once the new one is complete.")
@json_option
@reporting_options
def command(output: str, *, overwrite: bool, as_json: bool) -> None:
    """Write FILE from the finished units in its .parts folder, rows in the order of the input.

    Nothing is computed again. If units are missing, it says which jobs are to be run again. Standard output
    gets one line: the file and its shape.
    """
    promise_output(output)
    merged = genoembed.merge(output, overwrite=overwrite)
    if merged.failed:
        _logger.info("%s", failure_line(merged.failed))
    as_line = f"{output}: {count(merged.num_rows, 'row')} x {merged.width:,}, {', '.join(merged.layers)}"
    click.echo(json.dumps({"output": output, **dataclasses.asdict(merged)}) if as_json else as_line)
    if merged.failed:
        raise click.exceptions.Exit(INCOMPLETE)
