"""What an extraction did, in plain words or as JSON."""

from __future__ import annotations

import dataclasses
import shlex
from itertools import islice
from typing import TYPE_CHECKING, Any

from genoembed.cli.text import count, duration

if TYPE_CHECKING:
    from collections.abc import Mapping

    from genoembed import ExtractionReport, InputCounts

_LAYERS_SHOWN = 4
_FAILED_SHOWN = 5
POLICY_WORDS = {
    "upper_cased": ("soft-masked base", "upper-cased"),
    "rna_to_dna": ("RNA letter", "read as DNA (U as T)"),
    "masked_bases": ("invalid letter", "masked to N"),
    "masked_records": ("record", "with masked letters"),
    "gaps_stripped": ("gap letter", "taken out"),
    "skipped_invalid": ("record", "skipped for invalid letters"),
    "skipped_empty": ("record", "without bases skipped"),
    "renamed": ("record", "renamed (id seen before)"),
}
"""For each count of an input policy: of what, and what was done to it."""


def headline(report: ExtractionReport) -> str:
    """Say in one line what was written."""
    if report.num_rows is None or report.width is None:
        units = count(report.stats.units + report.stats.units_kept, "unit")
        return f"{report.output}: share {report.shard} is done, {units}"
    shown = ", ".join(report.layers[:_LAYERS_SHOWN])
    rest = len(report.layers) - _LAYERS_SHOWN
    layers = f"{shown} and {rest} more" if rest > 0 else shown
    return f"{report.output}: {count(report.num_rows, 'row')} x {report.width:,}, {layers}"


def details(report: ExtractionReport) -> list[str]:
    """Say what was read, what the policies did, and what it cost."""
    counts, stats = report.counts, report.stats
    took = f"{report.seconds:.1f} s" if report.seconds < 60 else duration(report.seconds)
    repeats = f", {count(stats.repeats, 'repeat')} not run again" if stats.repeats else ""
    return [
        f"read {count(counts.records, 'record')}, {count(counts.bases, 'base')} "
        f"from {count(counts.files, 'file')}, cut into {count(stats.windows, 'window')}{repeats}",
        *policy_lines(counts),
        f"{count(stats.batches, 'forward pass', 'forward passes')}, {stats.padding_share:.1%} padding, "
        f"{tokens_per_s(report):,.0f} tokens/s, {took}",
        *kept_lines(report),
        *([failure_line(report.failed)] if report.failed else []),
    ]


def kept_lines(report: ExtractionReport) -> list[str]:
    """Say what an earlier run had finished, and what is left to do."""
    stats = report.stats
    lines = []
    if stats.units_kept:
        before = f"{count(stats.units_kept, 'unit')} ({count(stats.records_kept, 'record')})"
        lines.append(f"{before} had been finished before and were not run again")
    if report.num_rows is None:
        lines.append(f"when all shares are done: genoembed merge {shlex.quote(str(report.output))}")
    return lines


def failure_line(failed: Mapping[str, str]) -> str:
    """Name the records without a vector."""
    named = ", ".join(f"{name} ({why})" for name, why in islice(failed.items(), _FAILED_SHOWN))
    rest = len(failed) - _FAILED_SHOWN
    more = f" and {rest} more" if rest > 0 else ""
    return f"{count(len(failed), 'record')} failed, without a vector: {named}{more}"


def policy_lines(counts: InputCounts) -> list[str]:
    """Say what the input policies did, in plain words."""
    acted = [(name, getattr(counts, name)) for name in POLICY_WORDS]
    return [
        f"{count(number, POLICY_WORDS[name][0])} {POLICY_WORDS[name][1]}" for name, number in acted if number
    ]


def tokens_per_s(report: ExtractionReport) -> float:
    """Give the speed of the whole run."""
    return report.stats.real_tokens / report.seconds if report.seconds else 0.0


def as_json(report: ExtractionReport) -> dict[str, Any]:
    """Give the report as values that JSON holds."""
    fields = dataclasses.asdict(report)
    fields["output"] = str(report.output)
    fields["stats"]["padding_share"] = report.stats.padding_share
    return {**fields, "tokens_per_s": tokens_per_s(report)}
