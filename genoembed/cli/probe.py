"""``genoembed probe``: which layer carries a label, and is it worth a model?"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import command
from genoembed.cli.output import INCOMPLETE, aligned, count, echo_result, estimate_bases, show_progress, wrote
from genoembed.config.probe import PROBE_KEYS, ProbeOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from genoembed import ProbeReport

_logger = logging.getLogger(__name__)


@command(
    "probe",
    ProbeOptions,
    short_help="Measure which layer predicts a label.",
    examples="""
    genoembed probe promoters.tsv
    genoembed probe promoters.fa --labels promoters.tsv
    genoembed probe genes.fa --labels genes.tsv --cv homology --model evo2_7b -o genes.probe
    genoembed probe genes.probe/embeddings.h5 --labels other.tsv --label-column host -o host.probe""",
    keys=PROBE_KEYS,
    has_json=True,
)
def probe_command(inputs: tuple[str, ...], *, as_json: bool, **options: Any) -> None:
    """Measure which layer of a model predicts a label.

    INPUT: sequence files, a table of sequences and labels, or one embedding file. One run of the model
    reads all layers. Each layer, and combinations of layers, are scored by the same cross-validated linear
    probe. Standard output gets the scores, the command that extracts the layer to use, and whether k-mers or
    a model with random weights do as well. DIR gets probe.json, a plot, and the vectors, which a later run
    uses again.
    """
    with show_progress(estimate_bases(inputs)) as on_totals:
        report = genoembed.probe(list(inputs), **options, progress=on_totals)
    for line in _details(report):
        _logger.info("%s", line)
    wrote(report.output)
    echo_result(report.to_dict(), "\n".join(_lines(report)), as_json=as_json)
    if report.counts["rows without a vector"]:
        raise click.exceptions.Exit(INCOMPLETE)


def _lines(report: ProbeReport) -> list[str]:
    """Format what standard output gets."""
    lines = [_table(report), ""]
    if report.shots:
        lines += [_shot_table(report), ""]
    if report.command:
        lines.append(report.command)
    return [*lines, report.recommendation, report.verdict, *report.notes]


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
    left_out = ", ".join(f"{number:,} {why}" for why, number in report.counts.items() if number)
    groups = "" if report.num_groups is None else f" of {count(report.num_groups, 'group')}"
    origin = "written" if report.was_extracted else "was there"
    return [
        f"{count(report.num_rows, 'row')} in {report.num_folds} {report.cv} folds{groups} ({left_out})",
        f"{report.embeddings} {origin}; results in {report.output}",
        ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items()),
    ]
