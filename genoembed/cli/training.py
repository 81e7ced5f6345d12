"""What ``pretrain`` and ``finetune`` share: options of the run, and how an interrupted one ends."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from genoembed.cli.options import COUNT, FLAG, file_option
from genoembed.cli.outcome import INTERRUPTED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

RUN = "Run"


def run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare the options that say what becomes of a run that is in DIR already, and ``--threads``."""
    options = (
        file_option("--resume", group=RUN, default=False, help="Go on from DIR's newest checkpoint.", **FLAG),
        file_option(
            "--overwrite", group=RUN, default=False, help="Start again; drop the run in DIR.", **FLAG
        ),
        file_option("--threads", group=RUN, help="CPU threads; without it, torch decides.", **COUNT),
    )
    for option in reversed(options):
        function = option(function)
    return function


def without_empty(options: Mapping[str, Any]) -> dict[str, Any]:
    """Take repeatable options that were not given for None, so that a configuration file can say them.

    Example:
        >>> without_empty({"layers": (), "seed": 0})
        {'layers': None, 'seed': 0}
    """
    return {key: None if value == () else value for key, value in options.items()}


@contextmanager
def resumable() -> Iterator[None]:
    """Let an interruption that saved a checkpoint say which option goes on from it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not str(stop):
            raise
        click.echo(f"Interrupted: {stop} (--resume)", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None


def echo_once(result: str) -> None:
    """Write a result to standard output, from one of the processes that torchrun started."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(result)
