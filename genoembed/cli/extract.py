"""``genoembed extract``: sequences in, one HDF5 file of embeddings out.

``genoembed merge``: the units that several jobs embedded become one file.
What a run would do and need, in plain words or as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import command
from genoembed.cli.outcome import promise_output
from genoembed.cli.output import (
    aligned,
    count,
    details,
    echo_result,
    end_incomplete,
    estimate_bases,
    failure_line,
    headline,
    magnitude,
    policy_lines,
    rough_duration,
    show_progress,
    wrote,
)
from genoembed.cli.output import as_json as report_as_json
from genoembed.config.embed import ExtractOptions, embed_config
from genoembed.config.files import MergeConfig

if TYPE_CHECKING:
    from genoembed import RunPlan


_logger = logging.getLogger(__name__)


@command(
    "extract",
    ExtractOptions,
    short_help="Embed sequences: FASTA in, HDF5 out.",
    examples="""
    genoembed extract genome.fa.gz
    genoembed extract genome.gbk --feature CDS -o genes.h5
    zcat *.fa.gz | genoembed extract - --model evo2_7b --layer 28 --pool mean -o genomes.h5""",
    has_json=True,
    checks_options=False,
)
def extract_command(*, as_json: bool, dry_run: bool = False, **options: Any) -> None:
    """Embed the sequences in INPUT and write their vectors to one HDF5 file.

    INPUT: FASTA, FASTQ, GenBank or EMBL files, compressed or not; '-' is standard input. The HDF5 file
    opens in h5py, anndata and genoembed.open_embeddings. Standard output gets one line with the file, its
    shape and its layers; messages go to standard error.
    """
    config = embed_config(options)
    if dry_run:
        say_plan(genoembed.plan(**options), as_json=as_json)
        return
    promise_output(config.output.output)
    expected = None if config.input.regions or config.input.feature else estimate_bases(config.input.inputs)
    with show_progress(expected) as on_totals:
        report = genoembed.extract(**options, progress=on_totals)
    for line in details(report):
        _logger.info("%s", line)
    wrote(report.output if report.num_rows is not None else report.output.with_suffix(".parts"))
    echo_result(report_as_json(report), headline(report), as_json=as_json)
    end_incomplete(report.failed)


@command(
    "merge",
    MergeConfig,
    short_help="Join the results of 'extract --shard I/N'.",
    examples="""
    genoembed extract genome.fa.gz -o genome.h5 --shard 1/2
    genoembed extract genome.fa.gz -o genome.h5 --shard 2/2
    genoembed merge genome.h5""",
    has_json=True,
)
@click.argument("output", metavar="FILE")
def merge_command(output: str, *, as_json: bool, **options: Any) -> None:
    """Join the finished units of several jobs into FILE.

    The units are in the folder FILE.parts; rows get the order of the input, and nothing is computed again.
    If units are missing, the error names the jobs to run again. Standard output gets one line with the file
    and its shape.
    """
    promise_output(output)
    merged = genoembed.merge(output, **options)
    if merged.failed:
        _logger.info("%s", failure_line(merged.failed))
    as_line = f"{output}: {count(merged.num_rows, 'row')} x {merged.width:,}, {', '.join(merged.layers)}"
    wrote(output)
    echo_result({"output": output, **dataclasses.asdict(merged)}, as_line, as_json=as_json)
    end_incomplete(merged.failed)


def say_plan(plan: RunPlan, *, as_json: bool) -> None:
    """Print a plan, and warn of what there is no room for."""
    for line in policy_lines(plan.counts):
        _logger.info("%s", line)
    if plan.free_bytes is not None and plan.free_bytes < plan.disk_bytes:
        _logger.warning(
            "the run needs %s of disk, and %s are free",
            magnitude(plan.disk_bytes, "B"),
            magnitude(plan.free_bytes, "B"),
        )
    if as_json:
        fields = dataclasses.asdict(plan)
        click.echo(json.dumps({**fields, "output": str(plan.output)}))
    else:
        click.echo(aligned(_rows(plan)))


def _rows(plan: RunPlan) -> list[tuple[str, str]]:
    counts = plan.counts
    share = "" if plan.shard is None else f" in share {plan.shard}"
    finished = f", {plan.units_finished:,} of them finished" if plan.units_finished else ""
    free = "" if plan.free_bytes is None else f", {magnitude(plan.free_bytes, 'B')} free"
    return [
        ("input", f"{count(counts.records, 'record')}, {count(counts.bases, 'base')}"),
        ("work", f"{count(plan.units, 'unit')}{share}{finished}, {count(plan.windows, 'window')}"),
        (
            "model",
            f"{count(plan.tokens, 'token')} in {count(plan.batches, 'forward pass', 'forward passes')}, "
            f"{plan.padding_share:.1%} padding",
        ),
        ("output", _output(plan)),
        ("disk", f"{magnitude(plan.disk_bytes, 'B')} until the units are joined{free}"),
        ("memory", _memory(plan)),
        ("time", _time(plan)),
    ]


def _output(plan: RunPlan) -> str:
    widths = ", ".join(f"{name} x {width:,}" for name, width in plan.widths.items())
    return f"{plan.output}: {magnitude(plan.output_bytes, 'B')}, {count(plan.rows, 'row')}: {widths or '-'}"


def _memory(plan: RunPlan) -> str:
    process = "not known" if plan.memory_bytes is None else f"about {magnitude(plan.memory_bytes, 'B')}"
    device = "" if plan.device_bytes is None else f", {magnitude(plan.device_bytes, 'B')} on {plan.device}"
    return process + device


def _time(plan: RunPlan) -> str:
    if plan.seconds is None or plan.tokens_per_s is None:
        return "nothing to measure"
    workers = f", {plan.workers} workers" if plan.workers > 1 else ""
    return (
        f"about {rough_duration(plan.seconds)} ({plan.tokens_per_s:,.0f} tokens/s on {plan.device}{workers}, "
        f"measured on {count(plan.measured_batches, 'batch', 'batches')})"
    )
