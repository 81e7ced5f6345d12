"""What a run says on standard error: log lines and warnings, each on one line.

Lines go through ``logging``, so that a reader who went away (``2>&1 | head``) cannot stop a run.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

from genoembed.cli.options import GroupedOption
from genoembed.errors import GenoembedWarning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MESSAGES = "Messages"
_LIBRARY_LEVELS = ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY")
_SUMMED_UP = ("genoembed.sequences", "genoembed.store")
_logger = logging.getLogger("genoembed")


class LineHandler(logging.Handler):
    """Writes each record as one line to what is standard error at that moment."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Leave out what the summary says in other words, unless everything is asked for."""
        told_later = record.name.startswith(_SUMMED_UP) and record.levelno <= logging.INFO
        return bool(super().filter(record)) and (not told_later or _logger.isEnabledFor(logging.DEBUG))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        if sys.stderr is None:  # closed by the caller
            return
        mark = "Warning: " if record.levelno >= logging.WARNING else ""
        try:
            sys.stderr.write(mark + " ".join(record.getMessage().splitlines()) + "\n")
            sys.stderr.flush()
        except OSError:  # nobody reads it any more, which is no reason to stop
            pass


@contextmanager
def reporting(*, quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """Show log lines and warnings of ours; other libraries' only where asked for."""
    handler, level = LineHandler(), _logger.level
    environment = {name: os.environ.get(name) for name in _LIBRARY_LEVELS}
    _logger.addHandler(handler)
    _logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        os.environ.update({name: os.environ.get(name) or "error" for name in _LIBRARY_LEVELS})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default" if verbose else "ignore")
            warnings.simplefilter("once", GenoembedWarning)
            warnings.showwarning = _show_warning
            yield
    finally:
        _logger.removeHandler(handler)
        _logger.setLevel(level)
        _restore(environment)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    place = "" if issubclass(category, GenoembedWarning) else f"{category.__name__}: "
    _logger.warning("%s%s", place, message)


def _restore(environment: dict[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def reporting_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--quiet`` and ``--verbose``, and run it under what they say."""

    @functools.wraps(function)
    def reported(*args: Any, quiet: bool, verbose: bool, **options: Any) -> Any:
        with reporting(quiet=quiet, verbose=verbose):
            return function(*args, **options)

    declare = functools.partial(click.option, is_flag=True, cls=GroupedOption, group=MESSAGES)
    say_less = declare("-q", "--quiet", help="On standard error, warnings and errors only.")
    say_more = declare("-v", "--verbose", help="Debug lines, and the warnings of other libraries.")
    return say_less(say_more(reported))


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--json``, passed as ``as_json``."""
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        cls=GroupedOption,
        group=MESSAGES,
        help="Print the result as one JSON object.",
    )(function)
