"""A server of a tiny model, on a free port of this machine."""

from __future__ import annotations

import http.client
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from genoembed.config.serve import ServeConfig
from genoembed.models.registry import find_model
from genoembed.serving.app import EmbeddingServer, build_app, open_server
from genoembed.serving.listening import SignalServer
from genoembed.serving.run import _bind

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = {"model": "genoembed-mini", "layers": 2, "dtype": "float32", "batch_tokens": 256}
WIDTH = find_model("genoembed-mini").config["hidden_size"]
"""Of the model's vectors."""
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Served:
    """A server that runs in a thread."""

    server: EmbeddingServer
    port: int

    def ask(
        self, method: str, path: str, body: bytes | str | None = None, headers: dict[str, str] = JSON
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()
        finally:
            connection.close()

    def embed(self, sequences: Any, **keys: Any) -> dict[str, Any]:
        """Ask for vectors that are expected to be there."""
        status, _, body = self.ask("POST", "/v1/embeddings", json.dumps({"input": sequences, **keys}))
        assert status == 200, body
        return json.loads(body)

    def refused(self, body: Any, status: int = 400) -> dict[str, Any]:
        """Ask for what is expected to be refused."""
        text = body if isinstance(body, bytes | str) else json.dumps(body)
        found, headers, reply = self.ask("POST", "/v1/embeddings", text)
        assert (found, headers["content-type"]) == (status, "application/json"), reply
        error = json.loads(reply)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
        return error


@contextmanager
def serving(**options: Any) -> Iterator[Served]:
    """Run a server in a thread."""
    given = {**MODEL, **options}
    config = ServeConfig.build(given)
    model = given.pop("model")
    server = open_server(model, config, given)
    listener = _bind("127.0.0.1", 0)
    ready = threading.Event()
    listening = SignalServer(build_app(server, own_name="gpubox"), on_ready=ready.set)
    thread = threading.Thread(target=lambda: listening.run(sockets=[listener]))
    thread.start()
    try:
        assert ready.wait(60)
        yield Served(server, listener.getsockname()[1])
    finally:
        listening.should_exit = True
        thread.join(timeout=30)
        server.service.close(timeout_s=5)
        listener.close()
    assert not thread.is_alive()


@pytest.fixture(scope="package")
def served() -> Iterator[Served]:
    with serving(max_bases=500, max_inputs=20, max_body=100_000, window=64, stride=48) as running:
        yield running
