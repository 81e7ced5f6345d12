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
    destination,
    done_lines,
    echo_result,
    end_incomplete,
    estimate_bases,
    policy_lines,
    show_progress,
)
from genoembed.config.score import SCORE_TASKS, ScoreOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from genoembed import MutationReport, ScoreReport, VariantReport

_logger = logging.getLogger(__name__)


@command(
    "score",
    ScoreOptions,
    short_help="Compute log-likelihoods of sequences, variants.",
    examples="""
    genoembed score genes.fa.gz -o genes.tsv
    genoembed score genes.fa --rc mean --per-base bases.tsv -o genes.tsv
    genoembed score --vcf calls.vcf.gz --reference genome.fa --layer 28 -o effects.tsv
    genoembed score --mutagenesis genome.fa --regions chr1:1001-1300 --heat-map map.png -o changes.tsv""",
    has_json=True,
    checks_options=False,
)
def score_command(*, as_json: bool, **options: Any) -> None:
    """Compute log-likelihoods of sequences, of the variants in a VCF file, or of all single-base changes.

    By default, each sequence in INPUT is scored (any format of extract; '-' is standard input). With --vcf,
    each allele is scored against the reference: the log-likelihood with the allele minus that with the
    reference bases. With --mutagenesis, every single-base change of INPUT is scored in this way. The table
    has sums and means of natural logarithms, perplexity and bits per base; for variants and changes both
    sums and their difference, and with --layer the distance between the two vectors.
    """
    task = _task(options)
    options.pop("mutagenesis", None)
    options.setdefault("output", "-")
    if options["output"] != "-":
        promise_output(options["output"])
    config = SCORE_TASKS[task].config
    config.build({key: value for key, value in options.items() if key in config.options()})
    check_json_has_room(options, as_json=as_json)
    report = _SCORE[task](options)
    if as_json:
        echo_result(report, "", as_json=True)
    end_incomplete(report.failed)


def _task(options: dict[str, Any]) -> str:
    """Choose what is scored; reject two of them together, none, and options of the one with another."""
    context = click.get_current_context()
    if options.get("mutagenesis") and ("inputs" not in options or "vcf" in options):
        message = "--mutagenesis makes all changes of INPUT by itself: give INPUT files, and no --vcf"
        raise click.UsageError(message)
    if ("inputs" in options) == ("vcf" in options):
        message = "give INPUT files to score sequences, or --vcf and --reference to score variants"
        raise click.UsageError(message)
    if "vcf" in options and "reference" not in options:
        message = "--vcf needs --reference, the FASTA that it was called against"
        raise click.UsageError(message)
    task = "variants" if "vcf" in options else "mutations" if options.get("mutagenesis") else "sequences"
    for key in options:
        takers = [name for name, other in SCORE_TASKS.items() if key in other.keys]
        if takers and task not in takers and options[key] is not False:
            words = " and ".join(SCORE_TASKS[name].words for name in takers)
            message = f"{context.meta[SPELLING](key)} is for {words}, not for {SCORE_TASKS[task].words}"
            raise click.UsageError(message)
    return task


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
        destination(report.output),
    )
    return report


def _score_variants(options: dict[str, Any]) -> VariantReport:
    with show_progress(None, noun="allele") as on_totals:
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
        destination(report.output),
    )
    return report


def _score_mutations(options: dict[str, Any]) -> MutationReport:
    with show_progress(None, noun="change") as on_totals:
        report = genoembed.score_mutations(progress=on_totals, **options)
    for line in (*policy_lines(report.counts), *done_lines(report)):
        _logger.info("%s", line)
    methods = ", ".join(f"{number:,} by {name}" for name, number in report.methods.items())
    _logger.info(
        "%s of %s in %s scored%s, start token %s, %.1f s: %s",
        count(report.num_rows, "change"),
        count(report.num_positions, "position"),
        count(report.num_records, "record"),
        f" ({methods})" if methods else "",
        report.start_token,
        report.seconds,
        destination(report.output, report.matrix, report.heat_map),
    )
    return report


_SCORE: dict[str, Callable[[dict[str, Any]], ScoreReport | VariantReport | MutationReport]] = {
    "sequences": _score_sequences,
    "variants": _score_variants,
    "mutations": _score_mutations,
}
