"""``genoembed predict``: a fine-tuned model's labels or numbers for sequences, as a table."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import GroupedCommand, GroupedOption
from genoembed.cli.outcome import promise_output
from genoembed.cli.reporting import reporting_options

if TYPE_CHECKING:
    from collections.abc import Callable

_logger = logging.getLogger(__name__)

INPUT, OUTPUT, RUN = "Input", "Output", "Run"


def _option(
    *names: str, group: str, help: str, **attributes: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    settings = {"default": None} | attributes
    return click.option(*names, cls=GroupedOption, group=group, help=help, **settings)


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
@_option(
    "-o",
    "--output",
    group=OUTPUT,
    default="-",
    metavar="FILE",
    help="The table; without it, standard output.",
)
@_option(
    "--format",
    group=OUTPUT,
    default="auto",
    type=click.Choice(("auto", "tsv", "parquet")),
    help="auto goes by the name.  [auto]",
)
@_option("--overwrite", group=OUTPUT, is_flag=True, default=False, help="Replace FILE, once complete.")
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
@_option("--keep-case", group=INPUT, is_flag=True, help="Without it, as in training.")
@_option(
    "--batch-rows", group=RUN, default=16, type=int, metavar="N", help="Windows of a forward pass.  [16]"
)
@_option("--device", group=RUN, metavar="DEVICE", help="cpu, cuda ...; without it, CUDA if present.")
@_option("--threads", group=RUN, type=int, metavar="N", help="CPU threads; without it, torch decides.")
@_option(
    "--trust-remote-code",
    group=RUN,
    is_flag=True,
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
