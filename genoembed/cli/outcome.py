"""How a command ends: errors of ours as one line, interruptions, readers that went away.

Anything else keeps its traceback: it is a bug, and the traceback is what a report of it needs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import click

from genoembed.cli.options import SPELLING, in_command_line_words
from genoembed.errors import GenoembedError, python_spelling

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

INTERRUPTED = 130
INCOMPLETE = 3
"""Done, but some records failed and have no vector."""
_PROMISED = "genoembed.cli.outcome.promised"


class _Promised(NamedTuple):
    path: str
    before: tuple[int, int] | None
    """What identified the path's content before the run; None where there was nothing."""


def promise_output(path: str) -> None:
    """Note which file or folder the command is about to write, so that an interruption can speak of it."""
    click.get_current_context().meta[_PROMISED] = _Promised(path, _identity(path))


@contextmanager
def exit_codes(ctx: click.Context) -> Iterator[None]:
    """Turn what ends a command into an exit code and at most one line on standard error."""
    with _termination_interrupts():
        try:
            yield
        except GenoembedError as error:
            raise click.ClickException(_one_line(error, ctx)) from error
        except KeyboardInterrupt as interruption:
            notes = getattr(interruption, "__notes__", ())
            click.echo(_interruption(ctx.meta.get(_PROMISED), notes), err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            _write_to_nobody()
            raise click.exceptions.Exit(0) from None


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Make SIGTERM end a command as Ctrl-C does; handlers can be set in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _one_line(error: GenoembedError, ctx: click.Context) -> str:
    """Print what is wrong and what to do, spelled as the options of the command that ran."""
    spelling = ctx.meta.get(SPELLING, python_spelling)
    text = " ".join(error.spelled(spelling).splitlines())
    command = getattr(spelling, "__self__", None)
    return text if command is None else in_command_line_words(text, command, spelling)


def _interruption(promised: _Promised | None, notes: Sequence[str]) -> str:
    if promised is None:
        return "Interrupted."
    path, before = promised
    if _identity(path) != before:
        return f"Interrupted: {path} had been written already and is complete."
    kept = f"nothing was written to {path}" if before is None else f"{path} is as it was, nothing was written"
    return f"Interrupted: {kept}; {'; '.join(notes) or 'run the command again to start over'}."


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - a path as the user gave it
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _write_to_nobody() -> None:
    """Point standard output nowhere, so that flushing it at exit does not fail once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stdout.fileno())
    except OSError:  # a standard output that is no file
        pass
    finally:
        os.close(nowhere)
