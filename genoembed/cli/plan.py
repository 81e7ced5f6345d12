"""What a run would do and need, in plain words or as JSON."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import TYPE_CHECKING

import click

from genoembed.cli.summary import policy_lines
from genoembed.cli.text import aligned, count, magnitude

if TYPE_CHECKING:
    from genoembed import RunPlan

_logger = logging.getLogger(__name__)
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
