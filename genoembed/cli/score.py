"""``genoembed score``: how likely a model finds sequences, or what variants change; tables out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import SPELLING, check_json_has_room, command
from genoembed.cli.outcome import promise_output
from genoembed.cli.output import (
    count,
    done_lines,
    echo_result,
    end_incomplete,
    estimate_bases,
    policy_lines,
    show_progress,
)
from genoembed.config.score import OF_SEQUENCES, OF_VARIANTS, ScoreConfig, ScoreOptions, VariantConfig

if TYPE_CHECKING:
    from genoembed import ScoreReport, VariantReport

_logger = logging.getLogger(__name__)


@command(
    "score",
    ScoreOptions,
    short_help="Log-likelihoods of sequences and variants.",
    examples="""
    genoembed score genes.fa.gz -o genes.tsv
    genoembed score genes.fa --rc mean --per-base bases.tsv -o genes.tsv
    genoembed score --vcf calls.vcf.gz --reference genome.fa --layer 28 -o effects.tsv""",
    has_json=True,
    checks_options=False,
)
def score_command(*, as_json: bool, **options: Any) -> None:
    """Compute the log-likelihood of each sequence of INPUT (any format of extract; '-' is stdin), or, with
    --vcf, the difference that each allele makes: alt - ref, in the same stretch of the reference.

    The table has sums and means of natural logarithms, perplexity and bits per base; for variants both sums,
    their difference, and with --layer how far apart the vectors are.
    """
    _check_usage(options)
    options.setdefault("output", "-")
    if options["output"] != "-":
        promise_output(options["output"])
    kind = VariantConfig if "vcf" in options else ScoreConfig
    kind.build({key: value for key, value in options.items() if key in kind.options()})
    check_json_has_room(options, as_json=as_json)
    report = _score_variants(options) if "vcf" in options else _score_sequences(options)
    if as_json:
        echo_result(report, "", as_json=True)
    end_incomplete(report.failed)


def _check_usage(options: dict[str, Any]) -> None:
    """Reject sequences and variants together, neither, and options of the one with the other."""
    context = click.get_current_context()
    if ("inputs" in options) == ("vcf" in options):
        message = "give INPUT files to score sequences, or --vcf and --reference to score variants"
        raise click.UsageError(message)
    if "vcf" in options and "reference" not in options:
        message = "--vcf needs --reference, the FASTA that it was called against"
        raise click.UsageError(message)
    for key in OF_SEQUENCES if "vcf" in options else OF_VARIANTS:
        if key in options:
            name = context.meta[SPELLING](key)
            message = (
                f"{name} is for {'sequences, not for --vcf' if 'vcf' in options else 'variants (--vcf)'}"
            )
            raise click.UsageError(message)


def _score_sequences(options: dict[str, Any]) -> ScoreReport:
    with show_progress(estimate_bases(options["inputs"])) as on_totals:
        report = genoembed.score(progress=on_totals, **options)
    for line in (*policy_lines(report.counts), *done_lines(report)):
        _logger.info("%s", line)
    _logger.info(
        "%s scored, start token %s, %.1f s: %s",
        count(report.num_rows, "record"),
        report.start_token,
        report.seconds,
        report.output,
    )
    return report


def _score_variants(options: dict[str, Any]) -> VariantReport:
    with show_progress(None) as on_totals:
        report = genoembed.score_variants(progress=on_totals, **options)
    for line in done_lines(report):
        _logger.info("%s", line)
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
    return report
