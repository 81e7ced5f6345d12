"""How a command ends: errors of ours as one line, interruptions, readers that went away.

Anything else keeps its traceback: it is a bug, and the traceback is what a report of it needs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import click

from genoembed.cli.options import SPELLING, in_command_line_words
from genoembed.errors import (
    STOP_SIGNALS,
    GenoembedError,
    Interrupted,
    MissingOptionError,
    is_ignored,
    python_spelling,
    visible,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

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
    signals = _StopSignals()
    with signals.taken():
        try:
            yield
            sys.stdout.flush()  # here, where a full disk is one line, and not as the interpreter exits
        except MissingOptionError as error:
            missing = ctx.meta.get(SPELLING, python_spelling)(error.key)
            message = f"Missing option {missing!r}: {_one_line(error, ctx)}"
            raise click.UsageError(message) from error
        except GenoembedError as error:
            _raise_if_interrupted(ctx, signals)
            raise click.ClickException(_one_line(error, ctx)) from error
        except KeyboardInterrupt as interruption:
            _end_interrupted(ctx, interruption)
        except BrokenPipeError:
            _write_to_nobody()
            raise click.exceptions.Exit(0) from None
        except OSError as error:
            _raise_if_interrupted(ctx, signals)
            if error.errno is None:
                raise  # of a library that says more than the system
            _write_to_nobody()
            place = "standard output" if error.filename is None else error.filename
            message = (
                f"{visible(str(place))}: {error.strerror}; free space, or check the name and its permissions"
            )
            raise click.ClickException(message) from error
        except Exception:
            _raise_if_interrupted(ctx, signals)
            raise


_AGAIN_S = 0.01


class _StopSignals:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, and remember what was received.

    A library that is being imported may turn the interruption into an error of its own: what was received
    tells the two apart.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Handle the signals; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [number for number in STOP_SIGNALS if not is_ignored(number)]
        before = {number: signal.signal(number, self._interrupt) for number in handled}
        unraisable = sys.unraisablehook

        def interrupt_again(lost: sys.UnraisableHookArgs) -> None:
            # callbacks of weak references and finalizers swallow what a signal raises in them: once more
            if isinstance(lost.exc_value, Interrupted):
                threading.Timer(_AGAIN_S, os.kill, (os.getpid(), lost.exc_value.number)).start()
            else:
                unraisable(lost)

        sys.unraisablehook = interrupt_again
        try:
            yield
        finally:
            sys.unraisablehook = unraisable
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _interrupt(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        raise Interrupted(number)


def _raise_if_interrupted(ctx: click.Context, signals: _StopSignals) -> None:
    """End as an interruption does, where a signal was received: an error is what libraries made of it."""
    if signals.received is not None:
        _end_interrupted(ctx, Interrupted(signals.received))


def _end_interrupted(ctx: click.Context, interruption: KeyboardInterrupt) -> NoReturn:
    notes = getattr(interruption, "__notes__", ())
    kept = str(interruption)
    told = f"Interrupted: {kept}" if kept else _interruption(ctx.meta.get(_PROMISED), notes)
    click.echo(visible(told), err=True)
    number = getattr(interruption, "number", signal.SIGINT)
    raise click.exceptions.Exit(128 + number) from None


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
