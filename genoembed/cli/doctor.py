"""``genoembed doctor``: known-answer tests of this installation."""

from __future__ import annotations

from typing import Protocol

import click

import genoembed
from genoembed.cli.options import GroupedCommand
from genoembed.cli.reporting import reporting_options
from genoembed.cli.text import count


class Check(Protocol):
    """What a check found."""

    @property
    def name(self) -> str:
        """What was checked."""

    @property
    def passed(self) -> bool:
        """Whether it is as it should be."""

    @property
    def detail(self) -> str:
        """The numbers, or what to do."""

    @property
    def seconds(self) -> float:
        """How long it took."""


def show(check: Check) -> None:
    """Print a check as soon as it is done."""
    verdict = "ok    " if check.passed else "FAILED"
    click.echo(f"{verdict}  {check.name}: {check.detail} ({check.seconds:.1f} s)")


@click.command(
    "doctor",
    cls=GroupedCommand,
    short_help="Test this installation against known answers.",
    epilog="""\b
    Example:
      genoembed doctor""",
)
@reporting_options
@click.pass_context
def command(ctx: click.Context) -> None:
    """Test this installation against known answers, in about ten seconds; exit code 1 if a test fails."""
    checks = genoembed.run_doctor(on_check=show)
    failed = sum(not check.passed for check in checks)
    click.echo(f"{count(len(checks), 'check')}, {failed} failed")
    if failed:
        ctx.exit(1)
