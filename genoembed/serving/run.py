"""``serve``: check, listen, load, answer until a signal comes, and finish what is under way.

Options, packages and the address are checked before torch is imported. The port is taken then, but nobody is
let in before the model has embedded a sequence.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import signal
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from genoembed.config.embed import DEFAULT_MODEL
from genoembed.config.fields import named_options
from genoembed.config.serve import PACKAGES, ServeConfig
from genoembed.errors import ConfigError, Problem, Remedy, check_installed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from os import PathLike

    from genoembed.config.choices import Fusion, TokenPooling
    from genoembed.models.genomic_model import GenomicModel

logger = logging.getLogger(__name__)

_PATIENCE_S = 1.0
"""How long the model's thread is waited for that may be in a pass of a request that nobody waits for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """What is served, and where."""

    url: str
    """What OpenAI's client takes as ``base_url``."""
    model: str
    """What requests call it."""
    layers: tuple[str, ...]
    width: int
    """Numbers of a vector."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeReport:
    """What a server did until it was stopped."""

    served: ServedModel
    signal: str | None
    """What stopped it; None for a dry run."""
    requests: int
    """Requests for embeddings that were answered, errors included."""
    errors: int
    """Those among them that were answered with an error."""
    sequences: int
    """Sequences with a vector."""
    tokens: int
    """Their tokens."""
    seconds: float


@named_options(ServeConfig)
def serve(
    *,
    model: str | PathLike[str] | GenomicModel = DEFAULT_MODEL,
    layers: int | str | Sequence[int | str] | None = None,
    pooling: TokenPooling | None = None,
    fusion: Fusion | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    dry_run: bool = False,
    on_ready: Callable[[ServedModel], None] | None = None,
    **options: Any,
) -> ServeReport:
    """Serve embeddings over HTTP in the form of OpenAI's API, until SIGINT, SIGTERM or SIGHUP.

    Requests under way are finished then, and no others are taken. A second signal ends at once.

    Args:
        model: As for ``extract``.
        layers: As for ``extract``.
        pooling: As for ``extract``, but not ``none``.
        fusion: As for ``extract``; needed with several layers.
        host: Address to listen on. Whoever reaches it can use the server.
        port: Port to listen on; 0 takes a free one.
        dry_run: Load the model, embed one sequence, and stop.
        on_ready: Called when the server listens.
        **options: Other options of ``extract`` about models, vectors and windows; ``normalize``,
            ``transform``, ``invalid`` (``error`` or ``mask``), ``gaps``, ``keep_case``, ``max_bases``,
            ``max_inputs``, ``max_body``, ``max_queue``. None is the default.

    Returns:
        What was served.

    Raises:
        ConfigError: If options are wrong, alone or together, or the address cannot be taken.
        MissingExtraError: If a package of the extra ``serve`` is missing.
        GenoembedError: If the model cannot be loaded or fails.
        Interrupted: If a signal comes before the model is loaded, or a second one later.
    """
    options |= {"layers": layers, "pooling": pooling, "fusion": fusion}
    given = {key: value for key, value in options.items() if value is not None}
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else model.name
    config = ServeConfig.build({**given, "model": name, "host": host, "port": port})
    for package in PACKAGES:
        check_installed(package, extra="serve", purpose="serve")
    listener = _bind(host, port)
    try:
        # nobody is let in before the model is there: the port is taken, but connections are refused
        from genoembed.serving.app import build_app, open_server
        from genoembed.serving.listening import SignalServer

        started = time.perf_counter()
        server = open_server(model, config, given)
        service = server.service
        try:
            service.start()
            served = ServedModel(
                url=_url(listener), model=service.name, layers=service.layers, width=service.width
            )
            number = None
            if dry_run:
                _tell(on_ready, served)
            else:
                _warn_of_strangers(listener)
                own_name = host if _is_loopback(listener) else None
                listening = SignalServer(
                    build_app(server, own_name=own_name), on_ready=lambda: _tell(on_ready, served)
                )
                listening.run(sockets=[listener])
                number = listening.received
        finally:
            service.close(timeout_s=_PATIENCE_S)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise _in_use(host, port) from error
    finally:
        listener.close()
    totals = server.totals
    return ServeReport(
        served=served,
        signal=None if number is None else signal.Signals(number).name,
        requests=totals.by_status.total(),
        errors=sum(count for status, count in totals.by_status.items() if status >= 400),
        sequences=totals.sequences,
        tokens=totals.tokens,
        seconds=time.perf_counter() - started,
    )


def _tell(on_ready: Callable[[ServedModel], None] | None, served: ServedModel) -> None:
    if on_ready is not None:
        on_ready(served)


def _bind(host: str, port: int) -> socket.socket:
    """Take the address without listening on it yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise _no_address(host) from error
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it lets two processes have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise _in_use(host, port) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            problem = Problem(
                f"port is {port}, which this user may not listen on", Remedy("port", words="1024 or more")
            )
            raise ConfigError(problem) from error
        raise _no_address(host) from error
    return listener


def _in_use(host: str, port: int) -> ConfigError:
    remedy = Remedy("port", words="another, or to 0 for a free one")
    return ConfigError(Problem(f"port is {port}, which another process has taken on {host}", remedy))


def _no_address(host: str) -> ConfigError:
    remedy = Remedy("host", words="127.0.0.1 for this machine only, or to 0.0.0.0 for all networks")
    return ConfigError(Problem(f"host is {host!r}, which is no address of this machine", remedy))


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(_address(listener)).is_loopback


def _address(listener: socket.socket) -> str:
    return str(listener.getsockname()[0]).partition("%")[0]


def _warn_of_strangers(listener: socket.socket) -> None:
    if not _is_loopback(listener):
        logger.warning(
            "host %s: every machine that reaches this address can use the server; it asks for no password "
            "and encrypts nothing",
            _address(listener),
        )
