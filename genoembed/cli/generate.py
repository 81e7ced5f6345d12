"""``genoembed generate``: continue sequences with a causal model; FASTA in, FASTA out."""

from __future__ import annotations

import logging
from typing import Any

import genoembed
from genoembed.cli.options import check_json_has_room, command
from genoembed.cli.outcome import promise_output
from genoembed.cli.output import (
    count,
    destination,
    done_lines,
    echo_result,
    end_incomplete,
    policy_lines,
    show_progress,
)
from genoembed.config.generate import GenerateConfig

_logger = logging.getLogger(__name__)


@command(
    "generate",
    GenerateConfig,
    short_help="Continue sequences with a causal model.",
    examples="""
    genoembed generate prompts.fa -n 4 --length 500 -o generated.fa
    genoembed generate prompts.fa --temperature 0.7 --top-k 4 --seed 1 -o generated.fa
    zcat genes.fa.gz | genoembed generate - --length 60 | genoembed score - -o scores.tsv""",
    has_json=True,
)
def generate_command(inputs: tuple[str, ...], *, as_json: bool, **options: Any) -> None:
    """Continue each sequence in PROMPTS with a causal language model.

    PROMPTS: sequence files in any format of extract; '-' is standard input. The output is FASTA. Each
    header says how the sequence was made and how likely the model considers it.
    """
    options.setdefault("output", "-")
    if options["output"] != "-":
        promise_output(options["output"])
    check_json_has_room(options, as_json=as_json)
    with show_progress(None) as on_totals:
        report = genoembed.generate(inputs, progress=on_totals, **options)
    for line in (*policy_lines(report.counts), *done_lines(report)):
        _logger.info("%s", line)
    ended = report.ended.get("eod", 0)
    _logger.info(
        "%s for %s, %s, mean log-likelihood %.4f per base%s, %.1f s: %s",
        count(report.num_sequences, "sequence"),
        count(report.num_prompts, "prompt"),
        count(report.num_bases, "base"),
        report.mean_log_likelihood,
        f", {ended:,} ended by the model" if ended else "",
        report.seconds,
        destination(report.output),
    )
    if as_json:
        echo_result(report, "", as_json=True)
    end_incomplete(report.failed)
