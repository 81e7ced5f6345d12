"""``genoembed export-model``: a model as a folder for sentence-transformers."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import click

import genoembed
from genoembed.cli.options import GroupedCommand, file_option
from genoembed.cli.outcome import promise_output
from genoembed.cli.reporting import json_option, reporting_options

_logger = logging.getLogger(__name__)

MODEL, OUTPUT = "Model", "Output"


@click.command(
    "export-model",
    cls=GroupedCommand,
    short_help="Write a model for sentence-transformers.",
    epilog="""\b
    Example:
      genoembed export-model zhihan1996/DNABERT-2-117M --trust-remote-code -o dnabert2-sentence""",
)
@click.argument("model")
@file_option("-o", "--output", group=OUTPUT, required=True, metavar="DIR", help="The folder to write.")
@file_option("--overwrite", group=OUTPUT, is_flag=True, default=False, help="Replace DIR, once complete.")
@file_option("--dtype", group=MODEL, default="float32", metavar="TYPE", help="Of the weights.  [float32]")
@file_option("--revision", group=MODEL, metavar="REV", help="Branch, tag or commit of a Hugging Face id.")
@file_option(
    "--trust-remote-code",
    group=MODEL,
    is_flag=True,
    default=False,
    help="Run Python code that the model brings.",
)
@json_option
@reporting_options
def command(model: str, *, output: str, as_json: bool, **options: Any) -> None:
    """Write MODEL as a folder that SentenceTransformer(DIR) loads, and whose encode gives the mean of the
    last layer, as 'extract --layer final' does.

    Standard output gets the folder.
    """
    promise_output(output)
    report = genoembed.export_model(model, output, **options)
    _logger.info("the mean of %s, %d features", report.layer, report.width)
    if report.needs_genoembed:
        _logger.info("import genoembed before you load the folder: the architecture is its")
    facts = {**dataclasses.asdict(report), "output": str(report.output)}
    click.echo(json.dumps(facts) if as_json else str(report.output))
