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
from click.core import ParameterSource

import genoembed
from genoembed.cli.options import GroupedCommand, GroupedOption, config_option
from genoembed.cli.outcome import INCOMPLETE, promise_output
from genoembed.cli.output import (
    aligned,
    count,
    details,
    failure_line,
    headline,
    json_option,
    magnitude,
    policy_lines,
    reporting_options,
)
from genoembed.cli.output import as_json as report_as_json
from genoembed.cli.progress import estimate_bases, show_progress
from genoembed.config.embed import embed_config

if TYPE_CHECKING:
    from genoembed import RunPlan


_logger = logging.getLogger(__name__)

MODEL = "Model"
VECTORS = "What is taken"
WINDOWS = "Long sequences"
INPUT = "Input"
OUTPUT = "Output"
RUN = "The run"
CARRIED = ("layers", "pooling", "skip_first", "fusion", "fusion_weights")
"""What a fine-tuned model knows by itself."""


def _numbers(ctx: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> tuple[float, ...]:
    """Read numbers that are given one by one, or with commas between them."""
    try:
        return tuple(float(part) for text in texts for part in text.split(","))
    except ValueError as error:
        message = f"{', '.join(texts)!r} is no list of numbers such as 0.2,0.8"
        raise click.BadParameter(message, ctx=ctx, param=option) from error


def _is_left_out(key: str) -> bool:
    """Tell whether an option was not given: a fine-tuned model then has a say in it."""
    return click.get_current_context().get_parameter_source(key) is ParameterSource.DEFAULT


@click.command(
    "extract",
    cls=GroupedCommand,
    short_help="Embed sequences: FASTA in, HDF5 out.",
    epilog="""\b
    Examples:
      genoembed extract genome.fa.gz
      zcat *.fa.gz | genoembed extract - --model evo2_7b --layer 28 --pool mean -o genomes.h5""",
)
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@config_option(
    "-o",
    key="output",
    group=OUTPUT,
    metavar="FILE",
    help="The HDF5 file to write; without it, the first INPUT's name with .h5 (embeddings.h5 for '-').",
)
@config_option(
    key="overwrite",
    group=OUTPUT,
    help="Replace FILE, once the new one is complete; finished units of another run are dropped.",
)
@config_option(
    key="resume",
    group=OUTPUT,
    help="If FILE is complete and this very run made it, leave it and be done. A run that was cut off goes "
    "on where it was in any case.",
)
@config_option(
    key="out_dtype", group=OUTPUT, help="Type of the stored values; float16 loses small differences."
)
@config_option(
    key="model",
    group=MODEL,
    metavar="NAME",
    help="One of 'genoembed models', a local folder, an Evo 2 checkpoint file, or a Hugging Face id.",
)
@config_option(key="revision", group=MODEL, metavar="REV", help="Branch, tag or commit of a Hugging Face id.")
@config_option(
    key="trust_remote_code", group=MODEL, help="Run the Python code that a model brings. Read it first."
)
@config_option(
    key="dtype",
    group=MODEL,
    help="Type of weights and activations; auto is bfloat16 where the device multiplies matrices in it "
    "(CUDA from Ampere on, CPUs with AMX), float32 elsewhere. The file says which it was.",
)
@config_option(
    key="device",
    group=MODEL,
    metavar="DEVICE",
    help="cpu, cuda, cuda:1 ..., or auto to spread a large model over all GPUs; without it, CUDA if there is "
    "one.",
)
@config_option(
    key="batch_tokens",
    group=MODEL,
    metavar="N",
    help="Tokens of one forward pass; fewer need less memory. Without it, what is fast on the device.",
)
@config_option(
    key="threads",
    group=MODEL,
    metavar="N",
    help="CPU threads of the model; without it, torch decides. Reading and writing have one more each.",
)
@config_option(
    key="layers",
    group=VECTORS,
    metavar="SPEC",
    help="Which layer; repeat it for several. An integer means blocks.N.mlp.l3 (the MLP's output) in "
    "StripedHyena 2 models, Evo 2 among them, and the output of block N in all others; blocks count from 0, "
    "or from the end with -1. Also: a module path, a glob such as 'blocks.*.mlp.l3', final (after the last "
    "norm) or all. 'genoembed layers MODEL' lists them; the file and the log say what was resolved.",
)
@config_option(
    key="pooling", group=VECTORS, help="How tokens become one vector; none keeps a vector a token."
)
@config_option(
    key="skip_first",
    group=VECTORS,
    metavar="BASES",
    help="Leave the first bases that the model sees out of pooling.",
)
@config_option(
    key="fusion", group=VECTORS, help="How several layers become one matrix; none keeps each its own."
)
@config_option(
    key="fusion_weights",
    group=VECTORS,
    metavar="W,W...",
    type=str,
    callback=_numbers,
    help="One weight a layer, for --fuse weighted; with commas, or repeated.",
)
@config_option(key="rc", group=VECTORS, help="Embed the reverse complement too, and take the mean or both.")
@config_option(
    key="window",
    group=WINDOWS,
    metavar="BASES",
    help="Bases of a window; without it, what the context holds.",
)
@config_option(
    key="stride", group=WINDOWS, metavar="BASES", help="From window to window; without it, 3/4 of a window."
)
@config_option(key="per_window", group=WINDOWS, help="A row a window instead of a row a record.")
@config_option(
    key="regions",
    group=INPUT,
    metavar="PLACE",
    help="A BED or GFF3 file, or a place such as chr1:1001-2000; repeatable. Needs one FASTA file.",
)
@config_option(
    key="flank",
    group=INPUT,
    metavar="BASES",
    help="Bases beside each region that the model sees, pooling not.",
)
@config_option(
    key="invalid", group=INPUT, help="Letters outside IUPAC DNA: stop, skip the record, or mask to N."
)
@config_option(key="duplicates", group=INPUT, help="An id seen before: stop, or append _2, _3 ...")
@config_option(key="empty", group=INPUT, help="A record without bases: stop, or skip it.")
@config_option(key="gaps", group=INPUT, help="Gap letters (- . *): stop, or take them out.")
@config_option(key="keep_case", group=INPUT, help="Leave soft-masked bases in lower case.")
@config_option(
    key="on_error",
    group=RUN,
    help="A record that fails (values that are not finite, no memory, nothing to pool): stop, or leave its "
    "vector NaN, flag it, and exit with 3 at the end.",
)
@config_option(
    key="unit_bases",
    group=RUN,
    metavar="BASES",
    help="Bases of a work unit: what is saved at a time, and lost at most when a run is cut off.",
)
@config_option(
    key="certificate",
    group=RUN,
    metavar="N",
    help="Embed N records of the first unit alone, too; the file then says how far vectors depend on their "
    "batch.",
)
@config_option(
    key="shard",
    group=RUN,
    metavar="I/N",
    help="Do every Nth unit only, beginning with the Ith, as one of N jobs; 'genoembed merge FILE' joins "
    "them.",
)
@config_option(
    key="engine",
    group=RUN,
    help="Who does the work: this process, or workers of a Ray cluster (pip install 'genoembed[ray]').",
)
@config_option(
    key="workers", group=RUN, metavar="N", help="Workers of Ray; without it, one a GPU, or a single one."
)
@config_option(
    key="ray_address",
    group=RUN,
    metavar="HOST:PORT",
    help="Ray cluster to connect to, or auto; without it, RAY_ADDRESS, or one that is started here.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    cls=GroupedOption,
    group=RUN,
    help="Write nothing: read INPUT once, run three batches, and say what the run would do and need: units, "
    "tokens, memory, disk, hours.",
)
@json_option
@reporting_options
def extract_command(*, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Embed the sequences of INPUT files (FASTA, FASTQ, GenBank, EMBL; compressed or not; '-' is stdin).

    Writes one HDF5 file that h5py, anndata and genoembed.open_embeddings read. Standard output gets one line:
    the file, its shape and its layers. Everything else goes to standard error.
    """
    config = embed_config(options)
    options |= dict.fromkeys(filter(_is_left_out, CARRIED))
    if dry_run:
        say_plan(genoembed.plan(**options), as_json=as_json)
        return
    promise_output(config.output.output)
    expected = None if config.input.regions else estimate_bases(config.input.inputs)
    with show_progress(expected) as on_totals:
        report = genoembed.extract(**options, progress=on_totals)
    for line in details(report):
        _logger.info("%s", line)
    click.echo(json.dumps(report_as_json(report)) if as_json else headline(report))
    if report.failed:
        raise click.exceptions.Exit(INCOMPLETE)


@click.command(
    "merge",
    cls=GroupedCommand,
    short_help="Join what the jobs of 'extract --shard I/N' embedded.",
    epilog="""\b
    Example:
      genoembed extract genome.fa.gz -o genome.h5 --shard 1/2
      genoembed extract genome.fa.gz -o genome.h5 --shard 2/2
      genoembed merge genome.h5""",
)
@click.argument("output", metavar="FILE")
@config_option(key="overwrite", group="Output", help="Replace FILE, once the new one is complete.")
@json_option
@reporting_options
def merge_command(output: str, *, overwrite: bool, as_json: bool) -> None:
    """Write FILE from the finished units in its .parts folder, rows in the order of the input.

    Nothing is computed again. If units are missing, it says which jobs are to be run again. Standard output
    gets one line: the file and its shape.
    """
    promise_output(output)
    merged = genoembed.merge(output, overwrite=overwrite)
    if merged.failed:
        _logger.info("%s", failure_line(merged.failed))
    as_line = f"{output}: {count(merged.num_rows, 'row')} x {merged.width:,}, {', '.join(merged.layers)}"
    click.echo(json.dumps({"output": output, **dataclasses.asdict(merged)}) if as_json else as_line)
    if merged.failed:
        raise click.exceptions.Exit(INCOMPLETE)


_HOUR_S = 3600.0
_DAY_H = 48.0


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
    free = "" if plan.free_bytes is None else f", {_gigabytes(plan.free_bytes)} free"
    return [
        ("input", f"{count(counts.records, 'record')}, {count(counts.bases, 'base')}"),
        ("work", f"{count(plan.units, 'unit')}{share}{finished}, {count(plan.windows, 'window')}"),
        (
            "model",
            f"{count(plan.tokens, 'token')} in {count(plan.batches, 'forward pass', 'forward passes')}, "
            f"{plan.padding_share:.1%} padding",
        ),
        ("output", _output(plan)),
        ("disk", f"{_gigabytes(plan.disk_bytes)} until the units are joined{free}"),
        ("memory", _memory(plan)),
        ("time", _time(plan)),
    ]


def _output(plan: RunPlan) -> str:
    widths = ", ".join(f"{name} x {width:,}" for name, width in plan.widths.items())
    return f"{plan.output}: {_gigabytes(plan.output_bytes)}, {count(plan.rows, 'row')}: {widths or '-'}"


def _memory(plan: RunPlan) -> str:
    process = "not known" if plan.memory_bytes is None else f"about {_gigabytes(plan.memory_bytes)}"
    device = "" if plan.device_bytes is None else f", {_gigabytes(plan.device_bytes)} on {plan.device}"
    return process + device


def _time(plan: RunPlan) -> str:
    if plan.seconds is None or plan.tokens_per_s is None:
        return "nothing to measure"
    hours = plan.seconds / _HOUR_S
    about = f"{hours / 24:,.1f} days" if hours > _DAY_H else f"{hours:.3g} hours"
    workers = f", {plan.workers} workers" if plan.workers > 1 else ""
    return (
        f"about {about} ({plan.tokens_per_s:,.0f} tokens/s on {plan.device}{workers}, "
        f"measured on {count(plan.measured_batches, 'batch', 'batches')})"
    )


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:,.3f} GB"
