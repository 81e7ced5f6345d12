"""Before a server listens: options, packages, addresses. And the pieces around it."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import socket
import subprocess
import sys

import pytest
from click.testing import CliRunner

import genoembed
from genoembed.cli import main
from genoembed.errors import ConfigError, MissingExtraError
from genoembed.serving import run
from tests.serving.conftest import MODEL, WIDTH


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_port_that_is_taken_is_said_before_the_model_is_loaded(taken, monkeypatch):
    monkeypatch.setitem(sys.modules, "genoembed.serving.app", None)  # which loads torch
    with pytest.raises(ConfigError, match=f"port is {taken}, which another process has taken on 127.0.0.1"):
        genoembed.serve(port=taken)


def test_port_that_is_taken_while_the_model_loads_is_said_as_well(monkeypatch):
    """A socket that is bound but does not listen yet keeps no one out."""

    def listen(served) -> None:
        raise AssertionError(served)

    port = free_port()
    bind, others = run._bind, []

    def bind_and_be_late(host, number):
        ours = bind(host, number)
        others.append(bind(host, number))
        others[0].listen()
        return ours

    monkeypatch.setattr(run, "_bind", bind_and_be_late)
    with pytest.raises(ConfigError, match=f"port is {port}, which"):
        genoembed.serve(port=port, on_ready=listen, **MODEL)
    others[0].close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize("host", ["300.1.1.1", "192.0.2.1", "no such host", "\u00fc" * 80])
def test_host_that_is_not_of_this_machine_is_said(host):
    with pytest.raises(ConfigError, match=r"which is no address of this machine; set host to 127\.0"):
        genoembed.serve(host=host, port=0)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MissingExtraError, match=r"serve needs uvicorn; .*\[serve\]'"):
        genoembed.serve(port=0)
    ended = CliRunner().invoke(main, ["serve", "--port", "0"])
    assert ended.stderr.startswith("Error: serve needs uvicorn; ")  # nothing was said to be loaded before


def test_application_without_starlette_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    monkeypatch.delitem(sys.modules, "genoembed.serving.app")
    with pytest.raises(MissingExtraError, match="needs starlette"):
        importlib.import_module("genoembed.serving.app")


def test_help_imports_neither_torch_nor_the_extra():
    code = """
import sys
from genoembed.cli import main
try:
    main(["serve", "--help-all"])
finally:
    print(sorted({"torch", "transformers", "starlette", "uvicorn"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--max-queue" in done.stdout


def test_unknown_option_is_answered_as_everywhere():
    with pytest.raises(ConfigError, match=r"'windw' .* did you mean 'window'"):
        genoembed.serve(windw=5)
    with pytest.raises(ConfigError, match="did you mean 'max_queue'"):
        genoembed.create_app(max_queu=5)


@pytest.mark.parametrize(("host", "warns"), [("127.0.0.1", False), ("::1", False), ("0.0.0.0", True)])
def test_address_that_others_reach_is_warned_of(host, warns, caplog):
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        listener = run._bind(host, 0)
    except ConfigError:
        pytest.skip("no such interface here")
    with listener, caplog.at_level(logging.WARNING):
        run._warn_of_strangers(listener)
        assert run._is_loopback(listener) is not warns  # so names are checked where nothing is warned of
        url = run._url(listener)
    assert ("asks for no password" in caplog.text) is warns
    assert url.startswith(f"http://{'[::1]' if host == '::1' else host}:")


def test_dry_run_says_what_would_be_served():
    said = []
    report = genoembed.serve(port=0, dry_run=True, on_ready=said.append, **MODEL)
    assert said == [report.served]
    assert (report.served.model, report.served.width, report.signal) == ("genoembed-mini", WIDTH, None)
    assert report.requests == 0


def test_application_answers_under_any_asgi_server():
    """Lifespan and one request, as a server would send them."""

    async def go() -> tuple[dict, bytes]:
        sent, told = [], asyncio.Queue()
        application = genoembed.create_app(max_bases=10, **MODEL)
        life = asyncio.Queue()
        life.put_nowait({"type": "lifespan.startup"})

        async def tell(message):
            await told.put(message)

        living = asyncio.create_task(application({"type": "lifespan"}, life.get, tell))
        assert (await told.get())["type"] == "lifespan.startup.complete"
        body = asyncio.Queue()
        body.put_nowait({"type": "http.request", "body": b'{"input": "ACGT"}', "more_body": False})

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/embeddings",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        await application(scope, body.get, send)
        life.put_nowait({"type": "lifespan.shutdown"})
        await living
        return sent[0], sent[1]["body"]

    start, body = asyncio.run(go())
    assert start["status"] == 200
    assert json.loads(body)["usage"]["total_tokens"] == 4
