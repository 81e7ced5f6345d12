"""``genoembed pretrain``: sequence files become a trained causal model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import GroupedCommand, GroupedOption
from genoembed.cli.outcome import INTERRUPTED
from genoembed.cli.reporting import reporting_options

if TYPE_CHECKING:
    from collections.abc import Callable

_logger = logging.getLogger(__name__)

START = "Where it starts"
DATA = "Data"
RECIPE = "Recipe"
RUN = "Run"


def _option(
    *names: str, group: str, help: str, **attributes: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare an option that is None where it was not given, so that a configuration file can say it."""
    settings = {"default": None} | attributes
    return click.option(*names, cls=GroupedOption, group=group, help=help, **settings)


@click.command(
    "pretrain",
    cls=GroupedCommand,
    short_help="Train a causal model on packed sequences.",
    epilog="""\b
    Examples:
      genoembed pretrain genomes/*.fa.gz --like evo2_7b --hidden-size 128 --heldout-fraction 0.02 \\
          --max-steps 4000 -o runs/mini
      genoembed pretrain phages.fa --model genoembed-mini --heldout other.fa --max-steps 500 -o runs/phage
      genoembed pretrain --config run.toml -o runs/mine --resume""",
)
@click.argument("corpus", metavar="CORPUS...", nargs=-1)
@click.option("-o", "--output", "output_dir", required=True, metavar="DIR", help="The folder to write.")
@_option("--config", group=START, metavar="FILE", help="TOML or JSON with any of these keys; options win.")
@_option("--model", group=START, metavar="NAME", help="Go on from this causal model: name, folder or id.")
@_option("--revision", group=START, metavar="REV", help="Branch, tag or commit of a Hugging Face id.")
@_option("--trust-remote-code", group=START, is_flag=True, help="Run Python code that the model brings.")
@_option(
    "--like", group=START, metavar="NAME", help="From scratch, in the shape of one of 'genoembed models'."
)
@_option("--hidden-size", group=START, type=int, metavar="N", help="Shrink that shape to this width.")
@_option("--layers", group=START, type=int, metavar="N", help="Shrink that shape to its first N blocks.")
@_option("--heldout", group=DATA, multiple=True, metavar="FILE", help="Sequences to measure on; repeatable.")
@_option(
    "--heldout-fraction", group=DATA, type=float, metavar="SHARE", help="Or: this share of whole records."
)
@_option("--heldout-rows", group=DATA, type=int, metavar="N", help="Rows measured each time.  [128]")
@_option(
    "--packing",
    group=DATA,
    type=click.Choice(("stream", "bins")),
    help="Cut documents and pad nothing, or keep whole what fits a window.  [stream]",
)
@_option("--window", group=DATA, type=int, metavar="TOKENS", help="Tokens of a row.  [1024]")
@_option("--isolate", group=DATA, is_flag=True, help="Keep packed neighbours from seeing each other.")
@_option("--one-strand", group=DATA, is_flag=True, help="No reverse complements.")
@_option("--n-run-bp", group=DATA, type=int, metavar="BASES", help="Leave out runs of N this long.  [10]")
@_option("--max-document-bp", group=DATA, type=int, metavar="BASES", help="Cut longer records.  [8 windows]")
@_option(
    "--shuffle-documents", group=DATA, type=int, metavar="N", help="Documents to draw the next from.  [32768]"
)
@_option(
    "--invalid",
    group=DATA,
    type=click.Choice(("error", "skip", "mask")),
    help="Letters outside IUPAC DNA: stop, skip the record, or mask to N.  [error]",
)
@_option("--empty", group=DATA, type=click.Choice(("error", "skip")), help="A record without bases.  [error]")
@_option("--gaps", group=DATA, type=click.Choice(("error", "strip")), help="Gap letters (- . *).  [error]")
@_option(
    "--max-steps", group=RECIPE, type=int, metavar="N", help="Optimizer steps. Required, here or in FILE."
)
@_option("--rows-per-device", group=RECIPE, type=int, metavar="N", help="Rows of a forward pass.  [4]")
@_option("--accumulation-steps", group=RECIPE, type=int, metavar="N", help="Forward passes a step.  [1]")
@_option(
    "--learning-rate",
    group=RECIPE,
    type=float,
    metavar="RATE",
    help="Peak rate. Without it, 2e-3 x sqrt(128 / width), and a tenth of that to go on from a model.",
)
@_option(
    "--pole-rate-scale", group=RECIPE, type=float, metavar="X", help="Poles move this much slower.  [0.1]"
)
@_option("--warmup-steps", group=RECIPE, type=int, metavar="N", help="Before the cosine.  [5 %, 200 at most]")
@_option("--weight-decay", group=RECIPE, type=float, metavar="X", help="On matrices.  [0.1]")
@_option("--max-grad-norm", group=RECIPE, type=float, metavar="X", help="Clip gradients to this norm.  [1]")
@_option(
    "--dtype",
    group=RECIPE,
    type=click.Choice(("auto", "float32", "bfloat16")),
    help="Of matrix products; auto is bfloat16 where the hardware has it.  [auto]",
)
@_option("--compile-blocks", group=RECIPE, is_flag=True, help="torch.compile each block; no gain on CPUs.")
@_option("--gradient-checkpointing", group=RECIPE, is_flag=True, help="Less memory for a third more time.")
@_option("--seed", group=RECIPE, type=int, metavar="N", help="Initial weights, order, strands.  [0]")
@_option("--save-steps", group=RUN, type=int, metavar="N", help="Steps between checkpoints.  [200]")
@_option("--eval-steps", group=RUN, type=int, metavar="N", help="Steps between measurements.  [200]")
@_option("--logging-steps", group=RUN, type=int, metavar="N", help="Steps between lines.  [10]")
@_option("--resume", group=RUN, is_flag=True, default=False, help="Go on from DIR's newest checkpoint.")
@_option("--overwrite", group=RUN, is_flag=True, default=False, help="Start again; drop the run in DIR.")
@_option("--threads", group=RUN, type=int, metavar="N", help="CPU threads; without it, torch decides.")
@reporting_options
def command(corpus: tuple[str, ...], output_dir: str, **options: Any) -> None:
    """Train on CORPUS files (FASTA, FASTQ, GenBank, EMBL; compressed or not), from scratch or from a model.

    Documents are packed into rows of one length. DIR gets checkpoints, metrics.jsonl and, at the end, the
    folder 'final', which --model takes everywhere. Standard output gets that folder's name; standard error a
    line every few steps. Ctrl-C saves a checkpoint. For several GPUs: torchrun -m genoembed pretrain ...
    """
    given: dict[str, Any] = {key: None if value == () else value for key, value in options.items()}
    try:
        report = genoembed.pretrain(corpus or None, output_dir, **given)
    except KeyboardInterrupt as stop:
        if not str(stop):
            raise
        click.echo(f"Interrupted: {stop} (--resume)", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    _logger.info("%d steps, held-out %.4f bits per base", report.steps, report.bits_per_base)
    _logger.info("use it with: genoembed extract INPUT --model %s", report.output)
    click.echo(report.output)
