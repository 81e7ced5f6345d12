"""``genoembed compare``: how far two embedding files agree.

``genoembed verify``: a file against what its own settings give.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import command
from genoembed.cli.output import count, echo_result, wrote
from genoembed.config.files import CompareConfig, VerifyConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from genoembed import CompareReport, VerifyReport


_logger = logging.getLogger(__name__)

_DIFFERENT = 1
_SHOWN = 3


@command(
    "compare",
    CompareConfig,
    reads=("first", "second"),
    short_help="Measure how far two embedding files agree.",
    examples="""
    genoembed compare before.h5 after.h5
    genoembed compare cpu.h5 gpu.h5 --tolerance 1e-4 -o differences.tsv""",
    has_json=True,
)
@click.argument("first", metavar="A.h5")
@click.argument("second", metavar="B.h5")
def compare_command(first: str, second: str, *, as_json: bool, **options: Any) -> None:
    """Compare the vectors of A.h5 and B.h5, record by record: cosine and largest difference.

    The exit code is 1 if a record differs by more than the tolerance, is in one file only, or has another
    sequence.
    """
    report = genoembed.compare(first, second, **options)
    for line in report.setting_differences:
        _logger.info("made differently: %s", line)
    if "output" in options:
        wrote(options["output"])
    echo_result(as_facts(report), "\n".join(_lines(report)), as_json=as_json)
    if not report.is_within:
        raise click.exceptions.Exit(_DIFFERENT)


def _lines(report: CompareReport) -> list[str]:
    lines = layer_lines(report.layers, report.tolerance)
    strangers = (
        ("only in the first", report.only_in_first),
        ("only in the second", report.only_in_second),
        ("of another sequence", report.other_sequence),
    )
    lines += [f"{count(len(ids), 'record')} {what}: {named(ids)}" for what, ids in strangers if ids]
    if report.is_reordered:
        lines.append("the records of both come in another order")
    return [*lines, f"equal within {report.tolerance:g}" if report.is_within else "not equal"]


def layer_lines(layers: Sequence[Any], tolerance: float) -> list[str]:
    """Return lines about how far each layer agrees."""
    lines = []
    for layer in layers:
        outside = f", {layer.num_outside:,} outside {tolerance:g}" if layer.num_outside else ""
        lines.append(
            f"{layer.layer}: {count(layer.num_compared, 'record')}{outside}; "
            f"cosine {layer.min_cosine:.8f} at least, {layer.mean_cosine:.8f} on average; "
            f"largest difference {layer.max_absolute:.3g}, relative {layer.max_relative:.3g}"
        )
        if layer.num_outside:
            lines.append(f"  most: {named([record_id for record_id, _ in layer.worst])}")
    return lines


def named(ids: Sequence[str]) -> str:
    """List some records.

    Example:
        >>> named(["a", "b", "c", "d"])
        'a, b, c ...'
    """
    return ", ".join(ids[:_SHOWN]) + (" ..." if len(ids) > _SHOWN else "")


def as_facts(report: Any) -> dict[str, Any]:
    """Turn a report into what ``--json`` prints."""
    return {**dataclasses.asdict(report), "is_within": report.is_within}


@command(
    "verify",
    VerifyConfig,
    reads=("file", "inputs"),
    short_help="Embed a sample of a file again and compare.",
    examples="""
    genoembed verify genes.h5
    genoembed verify genes.h5 moved/genes.fa.gz --sample 100 --certify --json""",
    has_json=True,
)
@click.argument("file", metavar="FILE.h5")
@click.argument("inputs", metavar="[INPUT...]", nargs=-1)
def verify_command(file: str, *, as_json: bool, inputs: tuple[str, ...] = (), **options: Any) -> None:
    """Embed a sample of the records of FILE.h5 again, as the file says it was made, and compare.

    The sequences come from the files that FILE.h5 names, or from INPUT; each sequence must have the
    recorded SHA-256. The exit code is 1 if a record is missing, has another sequence, or differs by more
    than the tolerance.
    """
    report = genoembed.verify(file, inputs or None, **options)
    echo_result(as_facts(report), "\n".join(_lines_of_verify(report)), as_json=as_json)
    if not report.is_within:
        raise click.exceptions.Exit(_DIFFERENT)


def _lines_of_verify(report: VerifyReport) -> list[str]:
    lines = layer_lines(report.layers, report.tolerance)
    strangers = (("not in the input", report.missing), ("of another sequence", report.other_sequence))
    lines += [f"{count(len(ids), 'record')} {what}: {named(ids)}" for what, ids in strangers if ids]
    if report.same_weights is False:
        lines.append("the model has other weights than the file says")
    if report.other_model_files:
        lines.append(f"of the model, {', '.join(report.other_model_files)} differ from what made the file")
    if (proof := report.certificate) is not None:
        lines.append(
            f"alone against batches of {proof.batch_tokens:,} tokens: {count(proof.num_records, 'record')}, "
            f"largest difference {proof.max_absolute:.3g}, relative {proof.max_relative:.3g} "
            f"(tolerance {proof.tolerance:g}, {proof.dtype} on {proof.device})"
        )
    sampled = count(report.num_sampled, "record")
    return [*lines, f"verified: {sampled}" if report.is_within else f"not verified: {sampled}"]
