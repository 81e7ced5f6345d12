"""The ASGI application: routes, limits, counters, and what a client that goes away leaves behind.

``POST /v1/embeddings``, ``GET /v1/models``, ``GET /healthz``, ``GET /metrics``. Promised: a request is
admitted or refused before it is read; what is read is bounded; each error has OpenAI's form; a client that
disconnects takes its request out of the queue, and one that does not read its reply gives up its place.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import json
import logging
import math
import re
import time
from collections import Counter
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from genoembed.config.embed import DEFAULT_MODEL
from genoembed.config.fields import named_options
from genoembed.config.serve import ServeConfig
from genoembed.errors import GenoembedError, MissingExtraError
from genoembed.sequences.records import Policies
from genoembed.serving.service import EmbeddingService
from genoembed.serving.wire import (
    NOT_FOUND,
    TOO_LARGE,
    UNAVAILABLE,
    Limits,
    RequestError,
    embeddings_reply,
    read_embedding_request,
)

try:
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route
except ImportError as _error:
    raise MissingExtraError(package="starlette", extra="serve", purpose="serve") from _error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from concurrent.futures import Future

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from genoembed.models.genomic_model import GenomicModel
    from genoembed.serving.service import RequestVectors

logger = logging.getLogger(__name__)

EMBEDDINGS = "/v1/embeddings"
READING_S = 60.0
"""How long a client may take to send a request."""
WRITING_S = 60.0
"""How long it may take to read each piece of a reply."""
_LARGE_BYTES, _LARGE_VALUES = 1 << 18, 1 << 16
"""Requests and replies from this size on are read and written in a thread, so that others are answered."""
_PIECE_BYTES = 1 << 18
_CLIENT_GONE = 499
"""Under which status requests of clients that went away are counted."""
_LONGEST_WAIT_S = 60
"""OpenAI's client waits no longer than that."""
_REASONS = {
    "unread": (400, "the model's tokenizer cannot read most of its bases; take a model for such sequences"),
    "too long": (400, "it does not fit the model's context; cut it, or start the server with --window"),
    "nothing to pool": (
        400,
        "no token is left to pool: it is too short, or the model cannot read its letters",
    ),
    "not finite": (500, "the model gives values that are not finite; start the server with --dtype float32"),
    "no memory": (
        500,
        "the device has no memory for it; send it in pieces, or start the server with --window",
    ),
}
"""For each reason why a record has no vector: status, and what to do."""
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Upper bounds of the histogram of seconds."""


class _Totals:
    """What was answered so far."""

    def __init__(self) -> None:
        self.active = 0
        self.by_status: Counter[int] = Counter()
        self.sequences = self.bases = self.tokens = 0
        self.seconds = 0.0
        self.buckets = [0] * len(_BUCKETS)

    def answered(self, status: int, seconds: float) -> None:
        """Count a request."""
        self.by_status[status] += 1
        self.seconds += seconds
        for place, bound in enumerate(_BUCKETS):
            self.buckets[place] += seconds <= bound


class EmbeddingServer:
    """Answers requests with a service.

    Args:
        service: Started, or to be started with the application.
        config: Limits and policies.
    """

    def __init__(self, service: EmbeddingService, config: ServeConfig) -> None:
        self.service, self.totals = service, _Totals()
        self._config = config.requests
        self._created = int(time.time())
        self._names = itertools.count(1)
        policies = service.config.input
        self._policies = Policies(invalid=policies.invalid, gaps=policies.gaps, keep_case=policies.keep_case)

    @property
    def limits(self) -> Limits:
        """What a request may ask for."""
        return Limits(
            model=self.service.name,
            width=self.service.width,
            policies=self._policies,
            max_bases=self._config.max_bases,
            max_inputs=self._config.max_inputs,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request for vectors; as an ASGI application, so that it counts until its reply is sent."""
        started, refused = time.perf_counter(), None
        try:
            with self._admitted():
                response = await self._reply(Request(scope, receive))
                self.totals.answered(response.status_code, time.perf_counter() - started)
                await _send_reply(response, scope, receive, send)
        except RequestError as error:  # not admitted
            refused = _error_response(error)
        except Exception:
            self.totals.answered(500, time.perf_counter() - started)
            raise
        if refused is not None:
            self.totals.answered(refused.status_code, time.perf_counter() - started)
            await refused(scope, receive, send)

    async def _reply(self, request: Request) -> Response:
        try:
            return await self._embed(request)
        except RequestError as error:
            return _error_response(error)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """Count a request in, or refuse it: what is not read takes no memory."""
        if self.totals.active >= self._config.max_queue:
            seconds = min(max(1, math.ceil(self.service.seconds_of_queue)), _LONGEST_WAIT_S)
            message = f"{self.totals.active} requests are in the queue already; try again in {seconds} s"
            raise RequestError(message, status=UNAVAILABLE, code="queue_full", retry_after_s=seconds)
        self.totals.active += 1
        try:
            yield
        finally:
            self.totals.active -= 1

    async def _embed(self, request: Request) -> Response:
        _check_content_type(request)
        body = await _read_body(request, self._config.max_body)
        read = partial(read_embedding_request, body, self.limits, name=f"request {next(self._names)}")
        wanted = await _maybe_in_thread(read, len(body) >= _LARGE_BYTES)
        del body, read
        try:
            future = self.service.submit(wanted.records)
        except RuntimeError:
            message = "the server is stopping; send the request again to the next one"
            raise RequestError(message, status=UNAVAILABLE, code="stopping", retry_after_s=1) from None
        answer = await _await(future, request)
        if answer.failed:
            index, reason = next(iter(answer.failed.items()))
            status, words = _REASONS[reason]
            message = f"input{'' if wanted.is_single else f'[{index}]'}: {words}"
            raise RequestError(message, status=status, param="input", code="no_vector")
        write = partial(
            embeddings_reply,
            answer.vectors_ND,
            model=self.service.name,
            num_tokens=answer.num_tokens,
            is_base64=wanted.is_base64,
        )
        content = await _maybe_in_thread(write, answer.vectors_ND.size >= _LARGE_VALUES)
        self.totals.sequences += len(wanted.records)
        self.totals.bases += sum(len(record.sequence) for record in wanted.records)
        self.totals.tokens += answer.num_tokens
        return _json(content)

    async def models(self, _request: Request) -> Response:
        """List the model."""
        return _json(json.dumps({"object": "list", "data": [self._model()]}).encode())

    async def model(self, request: Request) -> Response:
        """Describe the model."""
        name = request.path_params["name"]
        if name != self.service.name:
            message = f"model {name[:80]!r} is not served here; there is {self.service.name!r}"
            return _error_response(
                RequestError(message, status=NOT_FOUND, param="model", code="model_not_found")
            )
        return _json(json.dumps(self._model()).encode())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.service.name,
            "object": "model",
            "created": self._created,
            "owned_by": "genoembed",
            "layers": list(self.service.layers),
            "dimensions": self.service.width,
            "max_bases": self._config.max_bases,
            "max_inputs": self._config.max_inputs,
        }

    async def health(self, _request: Request) -> Response:
        """Say that the model is loaded: nobody listens before."""
        return _json(b'{"status":"ready"}')

    async def metrics(self, _request: Request) -> Response:
        """Write counters in Prometheus' text format."""
        return Response(
            "".join(f"{line}\n" for line in self._metric_lines()),
            media_type="text/plain; version=0.0.4; charset=utf-8",
        )

    def _metric_lines(self) -> Iterator[str]:
        totals, stats = self.totals, self.service.stats
        yield from _metric("requests_total", "counter", "Requests for embeddings that were answered.")
        for status, number in sorted(totals.by_status.items()):
            yield f'genoembed_requests_total{{status="{status}"}} {number}'
        yield from _metric(
            "request_seconds", "histogram", "Seconds from a request's first byte to its reply."
        )
        num_requests = totals.by_status.total()
        for bound, number in zip((*_BUCKETS, "+Inf"), (*totals.buckets, num_requests), strict=True):
            yield f'genoembed_request_seconds_bucket{{le="{bound}"}} {number}'
        yield f"genoembed_request_seconds_sum {totals.seconds}"
        yield f"genoembed_request_seconds_count {num_requests}"
        singles = (
            ("sequences_total", "counter", "Sequences with a vector.", totals.sequences),
            ("bases_total", "counter", "Their bases.", totals.bases),
            ("tokens_total", "counter", "Their tokens.", totals.tokens),
            ("queue_requests", "gauge", "Requests that are read, wait or run.", totals.active),
            ("queue_bases", "gauge", "Bases that wait for the model.", self.service.waiting_bases),
            ("forward_passes_total", "counter", "Forward passes.", stats.batches),
            ("forward_seconds_total", "counter", "Seconds in forward passes.", stats.forward_s),
            ("forward_slots_total", "counter", "Tokens of forward passes, padding included.", stats.slots),
            ("forward_halvings_total", "counter", "Passes that memory did not hold.", stats.halvings),
        )
        for name, kind, meaning, value in singles:
            yield from _metric(name, kind, meaning)
            yield f"genoembed_{name} {value}"


@named_options(ServeConfig)
def create_app(model: str | PathLike[str] | GenomicModel = DEFAULT_MODEL, **options: Any) -> Starlette:
    """Load a model and build the ASGI application of ``serve``, for an ASGI server of your own.

    The thread that runs the model starts with the application, so that servers may fork before. Each process
    loads the model: run one process per GPU.

    Args:
        model: As for ``extract``.
        **options: Those of ``serve``; ``host``, ``port`` and ``dry_run`` are the ASGI server's business.

    Returns:
        The application.

    Raises:
        ConfigError: If options are wrong, alone or together.
        GenoembedError: If the model cannot be loaded.
    """
    given = {key: value for key, value in options.items() if value is not None}
    name = fspath(model) if isinstance(model, str | PathLike) else model.name
    config = ServeConfig.build({**given, "model": name})
    return build_app(open_server(model, config, given))


def open_server(
    model: str | PathLike[str] | GenomicModel, config: ServeConfig, given: Mapping[str, Any]
) -> EmbeddingServer:
    """Load the model of a server.

    Args:
        model: Its name, or the model.
        config: All options.
        given: Those that were given: others are as a fine-tuned model says.
    """
    return EmbeddingServer(EmbeddingService(model, **given), config)


def build_app(server: EmbeddingServer, *, own_name: str | None = None) -> Starlette:
    """Build the application around a server; it starts and closes the server's service.

    Args:
        server: With a service that may have started.
        own_name: If given, only requests are answered that were sent to ``localhost``, to a number, or to
            this name.
    """

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(server.service.start)
        yield
        server.service.close(timeout_s=0)

    return Starlette(
        routes=[
            Route(EMBEDDINGS, server, methods=["POST"]),
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.model),
            Route("/healthz", server.health),
            Route("/metrics", server.metrics),
        ],
        middleware=[] if own_name is None else [Middleware(_KnownHost, own_name=own_name)],
        exception_handlers={HTTPException: _http_error, Exception: _bug},
        lifespan=lifespan,
    )


class _KnownHost:
    """Refuses requests to other names.

    The owner of a name can let it point to 127.0.0.1 once a browser has loaded a page from there; the
    browser then takes this server for the page's own site, and asks no question before it sends anything.
    """

    def __init__(self, app: ASGIApp, *, own_name: str) -> None:
        self._app, self._own_name = app, own_name.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "localhost")  # browsers always say it
            name = re.sub(r":\d*$", "", host.lower())
            if name not in ("localhost", self._own_name) and not _is_address(name):
                message = (
                    f"this server does not answer for {host[:80]!r}; send the request to localhost, or let "
                    "the proxy set the header Host to localhost"
                )
                app = _error_response(RequestError(message, status=421, code="unknown_host"))
        await app(scope, receive, send)


def _is_address(name: str) -> bool:
    """Whether a host is a number: no name, so nobody can let it point elsewhere."""
    try:
        ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return False
    return True


def _metric(name: str, kind: str, meaning: str) -> tuple[str, str]:
    return f"# HELP genoembed_{name} {meaning}", f"# TYPE genoembed_{name} {kind}"


def _check_content_type(request: Request) -> None:
    """Refuse what a page of another site can send from a browser unasked: forms and plain text."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = "set the header Content-Type to application/json"
        raise RequestError(message, status=415, code="unsupported_media_type")


async def _read_body(request: Request, limit: int) -> bytes:
    message = f"the request is larger than {limit} bytes; send fewer sequences at a time"
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise RequestError(message, status=TOO_LARGE, code="body_too_large")
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(READING_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise RequestError(message, status=TOO_LARGE, code="body_too_large")
                chunks.append(chunk)
    except TimeoutError:
        message = f"the request was not there within {READING_S:.0f} s; send it again"
        raise RequestError(message, status=408, code="timeout") from None
    return b"".join(chunks)


async def _send_reply(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Send a reply; give up, which closes the connection, if the client reads nothing of it."""

    async def send_in_time(message: Message) -> None:
        async with asyncio.timeout(WRITING_S):
            await send(message)

    try:
        await response(scope, receive, send_in_time)
    except (TimeoutError, ClientDisconnect):  # starlette makes the second of the first
        logger.warning("a client went away, or read nothing of its reply for %.0f s", WRITING_S)


async def _await(future: Future[RequestVectors], request: Request) -> RequestVectors:
    """Wait for an answer; a client that goes away meanwhile takes its request out of the queue."""
    answer = asyncio.wrap_future(future)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        if answer.cancelled():
            message = "the server is stopping; send the request again to the next one"
            raise RequestError(message, status=UNAVAILABLE, code="stopping", retry_after_s=1)
        return answer.result()
    except GenoembedError:
        message = "the model failed on this request; the server's log says why"
        raise RequestError(message, status=500, code="model_failed") from None
    finally:
        gone.cancel()
        if not answer.done():
            answer.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _maybe_in_thread(call: Callable[[], Any], is_large: bool) -> Any:
    return await asyncio.to_thread(call) if is_large else call()


def _json(content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    if len(content) <= _PIECE_BYTES:
        return Response(content, status_code=status, media_type="application/json", headers=headers)
    length = {"Content-Length": str(len(content))}
    return StreamingResponse(_pieces(content), media_type="application/json", headers=length)


async def _pieces(content: bytes) -> AsyncIterator[bytes]:
    """Send a reply piece by piece: a server waits for its client before it takes the next one."""
    for start in range(0, len(content), _PIECE_BYTES):
        yield content[start : start + _PIECE_BYTES]


def _error_response(error: RequestError) -> Response:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.status in (408, TOO_LARGE):
        headers["Connection"] = "close"  # what is still to come would be read for nothing
    return _json(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer a wrong path or method."""
    status = getattr(error, "status_code", NOT_FOUND)
    there = f"POST {EMBEDDINGS}, GET /v1/models, GET /healthz, GET /metrics"
    message = f"{request.method} {request.url.path[:80]} is not here; there are {there}"
    response = _error_response(RequestError(message, status=status, code="not_found"))
    response.headers.update(getattr(error, "headers", None) or {})
    return response


async def _bug(_request: Request, _error: Exception) -> Response:
    """Answer a bug of ours; who runs the server logs it with its traceback."""
    message = "the server failed on this request; its log says why"
    return _error_response(RequestError(message, status=500, code="internal_error"))
