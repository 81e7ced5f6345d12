"""``genoembed pretrain``: sequence files become a trained causal model."""

from __future__ import annotations

import logging
from typing import Any

import click

import genoembed
from genoembed.cli.options import (
    BASES,
    COUNT,
    FILES,
    FLAG,
    NAME,
    NUMBER,
    SHARE,
    GroupedCommand,
    choice,
    file_option,
    policy_options,
)
from genoembed.cli.reporting import reporting_options
from genoembed.cli.training import RUN, echo_once, resumable, run_options, without_empty

_logger = logging.getLogger(__name__)

START = "Where it starts"
DATA = "Data"
RECIPE = "Recipe"


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
@file_option(
    "--config", group=START, metavar="FILE", help="TOML or JSON with any of these keys; options win."
)
@file_option("--model", group=START, **NAME, help="Go on from this causal model: name, folder or id.")
@file_option("--revision", group=START, metavar="REV", help="Branch, tag or commit of a Hugging Face id.")
@file_option("--trust-remote-code", group=START, **FLAG, help="Run Python code that the model brings.")
@file_option("--like", group=START, **NAME, help="From scratch, in the shape of one of 'genoembed models'.")
@file_option("--hidden-size", group=START, **COUNT, help="Shrink that shape to this width.")
@file_option("--layers", group=START, **COUNT, help="Shrink that shape to its first N blocks.")
@file_option("--heldout", group=DATA, **FILES, help="Sequences to measure on; repeatable.")
@file_option("--heldout-fraction", group=DATA, **SHARE, help="Or: this share of whole records.")
@file_option("--heldout-rows", group=DATA, **COUNT, help="Rows measured each time.  [128]")
@file_option(
    "--packing",
    group=DATA,
    **choice("stream", "bins"),
    help="Cut documents and pad nothing, or keep whole what fits a window.  [stream]",
)
@file_option("--window", group=DATA, type=int, metavar="TOKENS", help="Tokens of a row.  [1024]")
@file_option("--isolate", group=DATA, **FLAG, help="Keep packed neighbours from seeing each other.")
@file_option("--one-strand", group=DATA, **FLAG, help="No reverse complements.")
@file_option("--n-run-bp", group=DATA, **BASES, help="Leave out runs of N this long.  [10]")
@file_option("--max-document-bp", group=DATA, **BASES, help="Cut longer records.  [8 windows]")
@file_option("--shuffle-documents", group=DATA, **COUNT, help="Documents to draw the next from.  [32768]")
@policy_options("--invalid", "--empty", "--gaps", group=DATA)
@file_option("--max-steps", group=RECIPE, **COUNT, help="Optimizer steps. Required, here or in FILE.")
@file_option("--rows-per-device", group=RECIPE, **COUNT, help="Rows of a forward pass.  [4]")
@file_option("--accumulation-steps", group=RECIPE, **COUNT, help="Forward passes a step.  [1]")
@file_option(
    "--learning-rate",
    group=RECIPE,
    type=float,
    metavar="RATE",
    help="Peak rate. Without it, 2e-3 x sqrt(128 / width), and a tenth of that to go on from a model.",
)
@file_option("--pole-rate-scale", group=RECIPE, **NUMBER, help="Poles move this much slower.  [0.1]")
@file_option("--warmup-steps", group=RECIPE, **COUNT, help="Before the cosine.  [5 %, 200 at most]")
@file_option("--weight-decay", group=RECIPE, **NUMBER, help="On matrices.  [0.1]")
@file_option("--max-grad-norm", group=RECIPE, **NUMBER, help="Clip gradients to this norm.  [1]")
@file_option(
    "--dtype",
    group=RECIPE,
    **choice("auto", "float32", "bfloat16"),
    help="Of matrix products; auto is bfloat16 where the hardware has it.  [auto]",
)
@file_option("--compile-blocks", group=RECIPE, **FLAG, help="torch.compile each block; no gain on CPUs.")
@file_option("--gradient-checkpointing", group=RECIPE, **FLAG, help="Less memory for a third more time.")
@file_option("--seed", group=RECIPE, **COUNT, help="Initial weights, order, strands.  [0]")
@file_option("--save-steps", group=RUN, **COUNT, help="Steps between checkpoints.  [200]")
@file_option("--eval-steps", group=RUN, **COUNT, help="Steps between measurements.  [200]")
@file_option("--logging-steps", group=RUN, **COUNT, help="Steps between lines.  [10]")
@run_options
@reporting_options
def command(corpus: tuple[str, ...], output_dir: str, **options: Any) -> None:
    """Train on CORPUS files (FASTA, FASTQ, GenBank, EMBL; compressed or not), from scratch or from a model.

    Documents are packed into rows of one length. DIR gets checkpoints, metrics.jsonl and, at the end, the
    folder 'final', which --model takes everywhere. Standard output gets that folder's name; standard error a
    line every few steps. Ctrl-C saves a checkpoint. For several GPUs: torchrun -m genoembed pretrain ...
    """
    with resumable():
        report = genoembed.pretrain(corpus or None, output_dir, **without_empty(options))
    _logger.info("%d steps, held-out %.4f bits per base", report.steps, report.bits_per_base)
    _logger.info("use it with: genoembed extract INPUT --model %s", report.output)
    echo_once(report.output)
