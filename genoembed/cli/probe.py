"""``genoembed probe``: which layer carries a label, and is it worth a model?"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import (
    COUNT,
    FLAG,
    NAME,
    GroupedCommand,
    choice,
    config_option,
    file_option,
    policy_options,
)
from genoembed.cli.outcome import INCOMPLETE
from genoembed.cli.output import aligned, count, json_option, reporting_options
from genoembed.cli.progress import estimate_bases, show_progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from genoembed import ProbeReport

_logger = logging.getLogger(__name__)

LABELS, FOLDS, BESIDE = "Labels", "Folds", "What it is held against"
VECTORS, MODEL, INPUT, OUTPUT = "What is taken (of sequences)", "Model", "Input (sequences)", "Output"
_REVERSED = {"no_baselines": "baselines", "no_untrained": "untrained", "no_plot": "plot"}
_FROM_FILE = (
    *("revision", "trust_remote_code", "dtype", "device", "batch_tokens", "threads", "layers", "pooling"),
    *("skip_first", "rc", "window", "stride", "regions", "flank", "keep_case", "unit_bases"),
)
"""Options that are configuration keys of ``extract``; what was not given is left to the library."""


@click.command(
    "probe",
    cls=GroupedCommand,
    short_help="Find the layer that carries a label.",
    epilog="""\b
    Examples:
      genoembed probe promoters.fa --labels promoters.tsv
      genoembed probe genes.fa --labels genes.tsv --cv homology --model evo2_7b -o genes.probe
      genoembed probe genes.probe/embeddings.h5 --labels other.tsv --label-column host -o host.probe""",
)
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@file_option(
    "--labels",
    group=LABELS,
    required=True,
    metavar="TSV",
    help="Table with one row per record: TSV, CSV, JSON lines or Parquet.",
)
@file_option(
    "--task",
    group=LABELS,
    help="What the labels are.  [classification]",
    **choice("classification", "regression"),
)
@file_option("--id-column", group=LABELS, help="Column of the record ids.  [id]", **NAME)
@file_option("--label-column", group=LABELS, help="Column of the labels.  [label]", **NAME)
@file_option(
    "--unmatched",
    group=LABELS,
    help="Labels whose record is not there: stop, or say how many and go on.  [error]",
    **choice("error", "warn"),
)
@file_option(
    "--preset",
    group=LABELS,
    help="geneb: also train on all, ten and one rows of each class, five seeds, and score a test split.",
    **choice("geneb"),
)
@file_option(
    "--split-column",
    group=LABELS,
    help="For the preset: column of the labels that says train or test.  [split]",
    **NAME,
)
@file_option("--split", group=LABELS, metavar="TSV", help="Or a table of ids and 'split'.")
@file_option(
    "--cv",
    group=FOLDS,
    help="Which rows share a fold: any, spread by class; those of a group; homologs by shared k-mers; those "
    "of a chromosome (the id before ':', or the file).  [stratified]",
    **choice("stratified", "grouped", "homology", "chromosome"),
)
@file_option("--num-folds", group=FOLDS, help="Test folds, at least 3.  [5]", **COUNT)
@file_option("--group-column", group=FOLDS, help="For --cv grouped.  [group]", **NAME)
@file_option(
    "--kin-identity",
    group=FOLDS,
    type=float,
    metavar="SHARE",
    help="For --cv homology: kin from here.  [0.8]",
)
@file_option("--seed", group=FOLDS, help="Of the folds and of the untrained copy.  [0]", **COUNT)
@file_option("--no-baselines", group=BESIDE, help="Leave out k-mers, GC content and one-hot letters.", **FLAG)
@file_option(
    "--no-untrained", group=BESIDE, help="Leave out the copy with fresh weights, half of the cost.", **FLAG
)
@file_option(
    "--top",
    group=BESIDE,
    type=int,
    multiple=True,
    default=(),
    metavar="K",
    help="Concatenate the best K layers; repeatable.  [2 and 4]",
)
@file_option(
    "--transform",
    group=BESIDE,
    multiple=True,
    default=(),
    metavar="FILE.h5",
    help="Of fit-transform; applied to the layer it was fitted on. Repeatable.",
)
@file_option(
    "--sequences",
    group=BESIDE,
    multiple=True,
    default=(),
    metavar="FILE",
    help="Where the sequences of an embedding file are, if not where it says.",
)
@config_option(
    key="layers", group=VECTORS, default=(), metavar="SPEC", help="Which layers, as for extract.  [all]"
)
@config_option(
    key="pooling", group=VECTORS, default=None, show_default=False, help="Tokens to one vector.  [mean]"
)
@config_option(key="skip_first", group=VECTORS, default=None, metavar="BASES", help="First bases left out.")
@config_option(
    key="rc", group=VECTORS, default=None, show_default=False, help="Both strands, as for extract."
)
@config_option(key="window", group=VECTORS, metavar="BASES", help="Bases of a window.")
@config_option(key="stride", group=VECTORS, metavar="BASES", help="From window to window.")
@config_option(
    key="model", group=MODEL, default=None, metavar="NAME", help="As for extract.  [genoembed-mini]"
)
@config_option(key="revision", group=MODEL, metavar="REV", help="Of a Hugging Face id.")
@config_option(key="trust_remote_code", group=MODEL, default=None, help="Run code that the model brings.")
@config_option(
    key="dtype", group=MODEL, default=None, show_default=False, help="Of weights and states.  [auto]"
)
@config_option(key="device", group=MODEL, metavar="DEVICE", help="cpu, cuda ...; CUDA if there is one.")
@config_option(key="batch_tokens", group=MODEL, metavar="N", help="Tokens of one forward pass.")
@config_option(key="threads", group=MODEL, metavar="N", help="CPU threads of the model.")
@config_option(key="regions", group=INPUT, metavar="PLACE", help="BED, GFF3 or chr1:1-90; repeatable.")
@config_option(key="flank", group=INPUT, default=None, metavar="BASES", help="Beside each region.")
@policy_options("--invalid", "--duplicates", "--empty", "--gaps", group=INPUT)
@config_option(key="keep_case", group=INPUT, default=None, help="Leave soft-masked bases in lower case.")
@config_option(
    key="unit_bases",
    group=INPUT,
    default=None,
    show_default=False,
    metavar="BASES",
    help="Bases saved at a time.",
)
@file_option(
    "-o", "--output", group=OUTPUT, metavar="DIR", help="Folder; without it, INPUT's name with .probe."
)
@file_option(
    "--overwrite", group=OUTPUT, help="Replace earlier results, and vectors of other settings.", **FLAG
)
@file_option("--no-plot", group=OUTPUT, help="Do not draw score by layer.", **FLAG)
@json_option
@reporting_options
def probe_command(inputs: tuple[str, ...], *, as_json: bool, **options: Any) -> None:
    """Find out which layer of a model carries a label: INPUT are sequence files, or one embedding file.

    One pass takes all layers; each, and fusions of them, get the same cross-validated linear probe. Standard
    output gets the table, the layer to use, and whether k-mers or an untrained copy do as well; DIR gets
    probe.json, a plot, and the vectors, which a rerun uses again.
    """
    given = {name: value for name, value in options.items() if value not in (None, ()) and value is not False}
    given = {
        _REVERSED.get(name, name): value if name not in _REVERSED else False for name, value in given.items()
    }
    with show_progress(estimate_bases(inputs)) as on_totals:
        report = genoembed.probe(list(inputs), **given, progress=on_totals)
    for line in _details(report):
        _logger.info("%s", line)
    click.echo(json.dumps(report.to_dict()) if as_json else "\n".join(_lines(report)))
    if report.counts["rows without a vector"]:
        raise click.exceptions.Exit(INCOMPLETE)


def _lines(report: ProbeReport) -> list[str]:
    """Lay out what standard output gets."""
    lines = [_table(report), ""]
    if report.shots:
        lines += [_shot_table(report), ""]
    lines += [report.recommendation, report.verdict]
    if report.fusion_options:
        lines.append(f"weighted mean of all layers: genoembed extract INPUT {report.fusion_options}")
    return [*lines, *report.notes]


def _table(report: ProbeReport) -> str:
    keys = [key for key in report.table()[0] if key not in ("name", "kind") and not key.endswith("_sd")]
    rows = [
        (row["name"], row["kind"], *(f"{row[key]:.3f} +- {row[f'{key}_sd']:.3f}" for key in keys))
        for row in report.table()
    ]
    return aligned(rows, header=("candidate", "kind", *report.metrics))


def _shot_table(report: ProbeReport) -> str:
    first = next(iter(report.shots.values()))
    header = [f"{regime} {metric}" for regime, scores in first.items() for metric in scores]
    rows: list[Sequence[object]] = [
        (
            name,
            *(
                f"{summary.mean:.3f} +- {summary.sd:.3f}"
                for scores in regimes.values()
                for summary in scores.values()
            ),
        )
        for name, regimes in report.shots.items()
    ]
    return aligned(rows, header=(f"test split, {report.num_test} rows", *header))


def _details(report: ProbeReport) -> list[str]:
    left_out = ", ".join(f"{number:,} {why}" for why, number in report.counts.items())
    groups = "" if report.num_groups is None else f" of {count(report.num_groups, 'group')}"
    origin = "written" if report.was_extracted else "was there"
    return [
        f"{count(report.num_rows, 'row')} in {report.num_folds} {report.cv} folds{groups} ({left_out})",
        f"{report.embeddings} {origin}; results in {report.output}",
        ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items()),
    ]
