"""Let a run finish the forward pass in hand when it is told to stop.

A first Ctrl-C or SIGTERM takes effect after the pass, a second one at once; outside a pass either does so.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Holds back an interruption while a forward pass runs.

    Example:
        >>> interruption = Interruption()
        >>> with interruption.watched(), interruption.held():
        ...     pass
    """

    def __init__(self) -> None:
        self._is_held = False
        self._is_asked = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take over both signals, where Python allows that: in the main thread, from handlers of Python."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in _SIGNALS}
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
        """Let what runs inside end first."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._is_asked:
            raise KeyboardInterrupt

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        if not self._is_held or self._is_asked:
            raise KeyboardInterrupt
        self._is_asked = True
