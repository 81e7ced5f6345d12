"""Threads during the forward pass: a source that runs ahead of its consumer, a sink that runs behind.

In: an iterable, or a function to feed. Promised: items keep their order; no more than ``depth`` of them wait;
what ends the thread is raised where its items are used; leaving the ``with`` ends the thread, whatever it is
left by. Torch does its work in the caller's thread only, so interruptions find it there; they are held back
until the forward pass in hand is done.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, Queue
from typing import TYPE_CHECKING, Generic, TypeVar

from genoembed.errors import STOP_SIGNALS, Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType


Item = TypeVar("Item")

_WAKE_S = 0.2
"""Waiting is cut into pieces: on some systems a lock that is waited for keeps Ctrl-C out."""
_PATIENCE_S = 1.0
"""How long a source is waited for that may hang in a read that nothing ends, of standard input say."""


@dataclass(frozen=True, slots=True)
class _End:
    """Last item of a source, with what ended it."""

    error: BaseException | None


class Ahead(Generic[Item]):
    """Iterates over what a thread makes."""

    def __init__(self, waiting: Queue[Item | _End]) -> None:
        self._waiting = waiting
        self.has_ended = False
        """Whether the end was taken."""

    @property
    def is_ready(self) -> bool:
        """Whether the next item, or the end, is there already."""
        return self.has_ended or not self._waiting.empty()

    def __iter__(self) -> Ahead[Item]:
        return self

    def __next__(self) -> Item:
        while not self.has_ended:
            try:
                item = self._waiting.get(timeout=_WAKE_S)
            except Empty:
                continue
            if not isinstance(item, _End):
                return item
            self.has_ended = True
            if item.error is not None:
                raise item.error
        raise StopIteration


@contextmanager
def read_ahead(source: Iterable[Item], *, depth: int) -> Iterator[Ahead[Item]]:
    """Run an iterable in a thread, a few items ahead of who uses it.

    Example:
        >>> with read_ahead("abc", depth=2) as letters:
        ...     list(letters)
        ['a', 'b', 'c']
    """
    waiting: Queue[Item | _End] = Queue(maxsize=depth)
    stopped = threading.Event()
    # a daemon: a read of standard input that never returns must not keep the process
    thread = threading.Thread(
        target=_fill, args=(source, waiting, stopped), name="genoembed-reading", daemon=True
    )
    thread.start()
    try:
        yield Ahead(waiting)
    finally:
        stopped.set()
        end = time.monotonic() + _PATIENCE_S
        while thread.is_alive() and time.monotonic() < end:
            _clear(waiting)  # a thread that waits for room goes on, and sees that it is over
            thread.join(timeout=0.01)


@contextmanager
def write_behind(consume: Callable[[Item], object], *, depth: int) -> Iterator[Callable[[Item], None]]:
    """Call a function in a thread, item by item.

    Leaving the ``with`` waits for the items that were passed in, also after an error.

    Example:
        >>> seen = []
        >>> with write_behind(seen.append, depth=1) as put:
        ...     put("a"), put("b")  # waits until "a" is consumed
        (None, None)
        >>> seen
        ['a', 'b']
    """
    sink = _Sink(consume, depth)
    sink.thread.start()
    try:
        yield sink.put
    finally:
        sink.close()
    sink.check()


class _Sink(Generic[Item]):
    """The thread of ``write_behind`` and what it shares with the caller's."""

    def __init__(self, consume: Callable[[Item], object], depth: int) -> None:
        self.error: BaseException | None = None
        self._consume = consume
        self._room = threading.Semaphore(depth)
        self._waiting: Queue[Item | _End] = Queue()
        self.thread = threading.Thread(target=self._work, name="genoembed-writing", daemon=True)

    def put(self, item: Item) -> None:
        """Wait for room; it comes, as the thread takes items to the end even when it has failed."""
        while not self._room.acquire(timeout=_WAKE_S):
            continue
        self.check()
        self._waiting.put(item)

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self._waiting.put(_End(None))
        self.thread.join()

    def _work(self) -> None:
        while not isinstance(item := self._waiting.get(), _End):
            if self.error is None:
                try:
                    self._consume(item)
                except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
                    self.error = error
            del item  # it may be large, and the next one may be long in coming
            self._room.release()


def _fill(source: Iterable[Item], waiting: Queue[Item | _End], stopped: threading.Event) -> None:
    # While this frame lives, standard input is not closed. Python would do that as it exits, ask for the lock
    # that a hanging read holds, and abort.
    stdin = sys.stdin
    error: BaseException | None = None
    try:
        for item in source:
            if stopped.is_set():
                break
            waiting.put(item)
            del item  # not held while the next one is made
    except BaseException as caught:  # noqa: BLE001 - raised where the items are used
        error = caught
    if not stopped.is_set():
        waiting.put(_End(error))
    del stdin


def _clear(waiting: Queue[Item]) -> None:
    while True:
        try:
            waiting.get_nowait()
        except Empty:
            return


class Interruption:
    """Holds back an interruption while a forward pass runs.

    Example:
        >>> interruption = Interruption()
        >>> with interruption.watched(), interruption.held():
        ...     pass
    """

    def __init__(self) -> None:
        self._is_held = False
        self._requested: int | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take over the signals, where Python allows that: in the main thread, from handlers of Python."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        taken = {number: handler for number, handler in before.items() if callable(handler)}
        for number in taken:
            signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number, handler in taken.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Delay the signal until the code inside has ended."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._requested is not None:
            raise Interrupted(self._requested)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if not self._is_held or self._requested is not None:
            raise Interrupted(number)
        self._requested = number
