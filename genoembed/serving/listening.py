"""Run an ASGI application with uvicorn on a socket, until a signal comes."""

from __future__ import annotations

import logging
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from genoembed.errors import STOP_SIGNALS, Interrupted, is_ignored

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterator
    from types import FrameType

GRACE_S = 60
"""How long requests that are under way may take when the server is told to stop."""
_KEEP_ALIVE_S = 75
"""How long a connection may be idle: longer than proxies keep it, which would meet a closed one."""


class SignalServer(uvicorn.Server):
    """Stops in good order at the first signal and at once at the second; the process is its caller's to end.

    Args:
        app: The ASGI application.
        on_ready: Called when the server listens.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], *, on_ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            lifespan="on",
            ws="none",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=GRACE_S,
        )
        super().__init__(config)
        self.received: int | None = None
        """The signal that stopped it."""
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take over the signals; only the main thread can."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            numbers = [number for number in STOP_SIGNALS if not is_ignored(number)]
            before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, in good order if this is the first signal."""
        if self.received is not None:
            # uvicorn would log each request that is cut off with a traceback
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            raise Interrupted(sig, "requests that were under way have no answer")
        self.received, self.should_exit = sig, True
