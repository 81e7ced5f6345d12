"""``genoembed score``: how likely a model finds sequences, or what variants change; tables out."""

from __future__ import annotations

import logging
from typing import Any

import click
from click.core import ParameterSource

import genoembed
from genoembed.cli.options import (
    COUNT,
    FLAG,
    GroupedCommand,
    choice,
    config_option,
    file_option,
    policy_options,
)
from genoembed.cli.outcome import promise_output
from genoembed.cli.output import count, policy_lines, reporting_options
from genoembed.cli.progress import estimate_bases, show_progress

_logger = logging.getLogger(__name__)

WHAT, SEQUENCES, VARIANTS = "What is scored", "Sequences", "Variants"
OUTPUT, MODEL = "Output", "Model"
OF_SEQUENCES = ("per_base", "window", "stride", "invalid", "duplicates", "empty", "gaps", "keep_case")
OF_VARIANTS = ("reference", "flank", "unsupported", "layer", "pooling", "vectors")


@click.command(
    "score",
    cls=GroupedCommand,
    short_help="Log-likelihoods of sequences and variants.",
    epilog="""\b
    Examples:
      genoembed score genes.fa.gz -o genes.tsv
      genoembed score genes.fa --rc mean --per-base bases.tsv -o genes.tsv
      genoembed score --vcf calls.vcf.gz --reference genome.fa --layer 28 -o effects.tsv""",
)
@click.argument("inputs", metavar="[INPUT...]", nargs=-1)
@file_option("--vcf", group=WHAT, metavar="VCF", help="Score these variants; '-' is stdin.")
@file_option("--reference", group=WHAT, metavar="FASTA", help="What VCF was called against; needed with it.")
@file_option(
    "-o",
    "--output",
    group=OUTPUT,
    default="-",
    metavar="FILE",
    help="The table; without it, standard output.",
)
@file_option("--overwrite", group=OUTPUT, **FLAG, default=False, help="Replace files, once complete.")
@file_option(
    "--rc", group=WHAT, **choice("none", "mean"), help="mean: both strands, each counting half.  [none]"
)
@file_option(
    "--start-token",
    group=WHAT,
    **choice("auto", "none"),
    help="auto: the token that stands before a sequence in training (BOS, or the end of the document "
    "before); none: the first base has no prediction.  [auto]",
)
@file_option("--per-base", group=SEQUENCES, metavar="FILE", help="A second table, a row a base.")
@file_option("--window", group=SEQUENCES, **COUNT, help="Bases seen at once; without it, the context.")
@file_option("--stride", group=SEQUENCES, **COUNT, help="From window to window; without it, 3/4 of one.")
@policy_options("--invalid", "--duplicates", "--empty", "--gaps", group=SEQUENCES)
@file_option("--keep-case", group=SEQUENCES, **FLAG, help="Leave soft-masked bases in lower case.")
@file_option("--flank", group=VARIANTS, **COUNT, help="Bases seen on either side of a change.  [512]")
@file_option(
    "--unsupported",
    group=VARIANTS,
    **choice("skip", "error"),
    help="Alleles without a sequence (symbolic, breakends, *).  [skip]",
)
@file_option("--layer", group=VARIANTS, metavar="SPEC", help="Compare vectors of this layer, too.")
@file_option(
    "--pool",
    "pooling",
    group=VARIANTS,
    **choice("mean", "max", "last"),
    help="How tokens become one vector.  [mean]",
)
@file_option("--vectors", group=VARIANTS, metavar="FILE", help="HDF5 file for the differences of vectors.")
@config_option(key="model", group=MODEL, metavar="NAME", help="A causal model: name, folder or id.")
@config_option(key="revision", group=MODEL, metavar="REV", help="Branch, tag or commit of a Hugging Face id.")
@config_option(key="trust_remote_code", group=MODEL, help="Run the Python code that a model brings.")
@file_option(
    "--dtype",
    group=MODEL,
    **choice("auto", "float32", "bfloat16", "float16"),
    help="Of weights and activations; half precision rounds small differences.  [float32]",
)
@config_option(
    key="device", group=MODEL, metavar="DEVICE", help="cpu, cuda ...; without it, CUDA if present."
)
@config_option(key="batch_tokens", group=MODEL, metavar="N", help="Tokens of one forward pass.")
@config_option(key="threads", group=MODEL, metavar="N", help="CPU threads; without it, torch decides.")
@reporting_options
def score_command(inputs: tuple[str, ...], vcf: str | None, **options: Any) -> None:
    """Give the log-likelihood of each sequence of INPUT (any format of extract; '-' is stdin), or, with
    --vcf, the difference that each allele makes: alt - ref, in the same stretch of the reference.

    The table has sums and means of natural logarithms, perplexity and bits per base; for variants both sums,
    their difference, and with --layer how far apart the vectors are.
    """
    _check_usage(inputs, vcf, options)
    if options["output"] != "-":
        promise_output(options["output"])
    others = OF_VARIANTS if vcf is None else OF_SEQUENCES
    chosen = {key: value for key, value in options.items() if key not in others and value is not None}
    if vcf is None:
        _score_sequences(inputs, chosen)
    else:
        _score_variants(vcf, chosen)


def _check_usage(inputs: tuple[str, ...], vcf: str | None, options: dict[str, Any]) -> None:
    """Refuse sequences and variants together, neither, and options of the one with the other."""
    if bool(inputs) == (vcf is not None):
        message = "give INPUT files to score sequences, or --vcf and --reference to score variants"
        raise click.UsageError(message)
    if vcf is not None and options["reference"] is None:
        message = "--vcf needs --reference, the FASTA that it was called against"
        raise click.UsageError(message)
    context = click.get_current_context()
    for key in OF_VARIANTS if vcf is None else OF_SEQUENCES:
        if context.get_parameter_source(key) is not ParameterSource.DEFAULT:
            name = "--pool" if key == "pooling" else f"--{key.replace('_', '-')}"
            message = f"{name} is for {'variants (--vcf)' if vcf is None else 'sequences, not for --vcf'}"
            raise click.UsageError(message)


def _score_sequences(inputs: tuple[str, ...], options: dict[str, Any]) -> None:
    with show_progress(estimate_bases(inputs)) as on_totals:
        report = genoembed.score(inputs, progress=on_totals, **options)
    for line in policy_lines(report.counts):
        _logger.info("%s", line)
    _logger.info(
        "%s scored, start token %s, %.1f s: %s",
        count(report.num_rows, "record"),
        report.start_token,
        report.seconds,
        report.output,
    )


def _score_variants(vcf: str, options: dict[str, Any]) -> None:
    with show_progress(None) as on_totals:
        report = genoembed.score_variants(vcf, progress=on_totals, **options)
    layer = "" if report.layer is None else f", vectors of {report.layer}"
    _logger.info(
        "%s of %s scored, %d left-aligned or trimmed, start token %s%s, %.1f s: %s",
        count(report.num_rows, "allele"),
        count(report.counts.rows, "row"),
        report.counts.normalized,
        report.start_token,
        layer,
        report.seconds,
        report.output,
    )
