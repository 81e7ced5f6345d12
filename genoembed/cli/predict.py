"""``genoembed predict``: a fine-tuned model's labels or numbers for sequences, as a table."""

from __future__ import annotations

import logging
from typing import Any

import click

import genoembed
from genoembed.cli.options import COUNT, FLAG, GroupedCommand, choice, file_option, policy_options
from genoembed.cli.outcome import promise_output
from genoembed.cli.reporting import reporting_options

_logger = logging.getLogger(__name__)

INPUT, OUTPUT, RUN = "Input", "Output", "Run"


@click.command(
    "predict",
    cls=GroupedCommand,
    short_help="Apply a fine-tuned head to sequences.",
    epilog="""\b
    Examples:
      genoembed predict runs/promoters/final genome.fa.gz -o promoters.tsv
      zcat reads.fa.gz | genoembed predict runs/promoters/final - | cut -f 1,2
      genoembed predict runs/sites/final genome.fa -o sites.parquet""",
)
@click.argument("model", metavar="DIR")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@file_option(
    "-o",
    "--output",
    group=OUTPUT,
    default="-",
    metavar="FILE",
    help="The table; without it, standard output.",
)
@file_option(
    "--format",
    group=OUTPUT,
    default="auto",
    **choice("auto", "tsv", "parquet"),
    help="auto goes by the name.  [auto]",
)
@file_option("--overwrite", group=OUTPUT, **FLAG, default=False, help="Replace FILE, once complete.")
@policy_options("--invalid", "--duplicates", "--empty", "--gaps", group=INPUT)
@file_option("--keep-case", group=INPUT, **FLAG, help="Without it, as in training.")
@file_option("--batch-rows", group=RUN, default=16, **COUNT, help="Windows of a forward pass.  [16]")
@file_option("--device", group=RUN, metavar="DEVICE", help="cpu, cuda ...; without it, CUDA if present.")
@file_option("--threads", group=RUN, **COUNT, help="CPU threads; without it, torch decides.")
@file_option(
    "--trust-remote-code",
    group=RUN,
    **FLAG,
    default=False,
    help="Run Python code that DIR brings.",
)
@reporting_options
def command(model: str, inputs: tuple[str, ...], **options: Any) -> None:
    """Predict with the model in DIR, the folder 'final' of a fine-tuning run, for the sequences of INPUT
    (any format of extract; '-' is standard input).

    The table has id, label and a probability a class; one column a target for numbers; a row a token for
    labels of bases.
    """
    if options["output"] != "-":
        promise_output(options["output"])
    report = genoembed.predict(model, inputs, **options)
    _logger.info(
        "%d records, %d rows, %.1f s: %s", report.num_records, report.num_rows, report.seconds, report.output
    )
