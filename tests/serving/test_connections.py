"""Clients as they are: many at once, slow, gone, too large, sending before they have an answer."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time

import pytest

from genoembed.serving import app
from tests.serving.conftest import JSON, serving

HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: gpubox\r\nContent-Type: application/json\r\n"


def request(sequence: str) -> bytes:
    """Write a whole request."""
    body = json.dumps({"input": sequence}).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def read_all(connection: socket.socket, until: int) -> bytes:
    """Read until some number of replies is there, or the server closes."""
    found = b""
    while found.count(b"HTTP/1.1 ") < until or not found.endswith(b"}"):
        if not (chunk := connection.recv(65536)):
            break
        found += chunk
    return found


def settled(condition) -> bool:
    """Wait until something is so."""
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def held(served, monkeypatch):
    """Let the model wait for a gate, so that requests pile up."""
    gate, service = threading.Event(), served.server.service
    rows = service._embedder.rows

    def wait(records):
        assert gate.wait(30)
        return rows(records)

    monkeypatch.setattr(service._embedder, "rows", wait)
    yield gate
    gate.set()
    assert settled(lambda: served.server.totals.active == 0)


def test_pipelined_requests_are_answered_in_order(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall(request("ACGTA") + request("ACJT") + request("ACGTACG"))
        found = read_all(connection, 3)
    assert [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", found)] == [200, 400, 200]
    assert re.findall(rb'"prompt_tokens":(\d)', found) == [b"5", b"7"]


def test_connection_is_kept_between_requests_and_after_errors(served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    for body, status in (('{"input": "ACGT"}', 200), ("{", 400), ('{"input": "ACGT"}', 200)):
        connection.request("POST", "/v1/embeddings", body, JSON)
        reply = connection.getresponse()
        assert (reply.status, bool(reply.read())) == (status, True)
        assert not reply.will_close
    connection.close()


def test_request_in_chunks_without_a_length_is_read(served):
    def chunks():
        yield b'{"input": '
        yield b'"ACGT"}'

    status, _, body = served.ask("POST", "/v1/embeddings", chunks(), JSON)
    assert (status, len(json.loads(body)["data"])) == (200, 1)


def test_body_over_the_limit_is_refused_with_and_without_a_stated_length(served):
    large = json.dumps({"input": "A" * 200_000})
    assert "is larger than 100000 bytes" in served.refused(large, 413)["message"]
    halves = (large[:150_000].encode(), large[150_000:].encode())
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"%x\r\n%s\r\n" % (len(halves[0]), halves[0]))
        assert b"HTTP/1.1 413" in read_all(connection, 1)
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        # nothing of it is read
        connection.sendall(HEAD + b"Content-Length: 99999999999\r\n\r\n")
        assert b"HTTP/1.1 413" in read_all(connection, 1)


def test_ten_megabytes_are_read_where_the_server_takes_them():
    with serving(max_body=20_000_000, max_bases=20_000_000) as served:
        error = served.refused({"input": "A" * 5_000_000 + "J" + "A" * 5_000_000})
        assert "'J' at position 5000001" in error["message"]
        assert served.ask("GET", "/healthz")[0] == 200


def test_slow_client_is_given_up(served, monkeypatch):
    monkeypatch.setattr(app, "READING_S", 0.2)
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n" + b'{"input": ')
        found = read_all(connection, 1)
        assert b"HTTP/1.1 408" in found
        assert b"connection: close" in found.lower()
    assert len(served.embed("ACGT")["data"]) == 1


def test_client_that_sends_half_a_request_and_goes_leaves_nothing(served):
    before = served.server.totals.by_status[499]
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n" + b'{"input": ')
        assert settled(lambda: served.server.totals.active == 1)
    assert settled(lambda: served.server.totals.active == 0)
    assert served.server.totals.by_status[499] == before + 1


def test_client_that_goes_takes_its_request_out_of_the_queue(served, held):
    service = served.server.service
    first = threading.Thread(target=served.embed, args=("ACGT",))
    first.start()
    assert settled(lambda: served.server.totals.active == 1 and not service.waiting_bases)
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=30)
    connection.sendall(request("ACGTACGTACGTACGTA" * 5))
    assert settled(lambda: service.waiting_bases == 85)
    bases = service.stats.bases
    connection.close()
    assert settled(lambda: served.server.totals.active == 1)
    held.set()
    first.join(30)
    assert settled(lambda: service.waiting_bases == 0)
    assert len(served.embed("ACG")["data"]) == 1
    assert service.stats.bases - bases == 4 + 3


def test_large_request_does_not_hold_up_a_small_one(served, held):
    """Records are taken by turns: a unit has four passes of 256 tokens here."""
    ended = []

    def ask(name, sequences) -> None:
        served.embed(sequences)
        ended.append(name)

    first = threading.Thread(target=ask, args=("first", "ACGT"))
    first.start()
    assert settled(lambda: served.server.totals.active == 1)
    large = threading.Thread(target=ask, args=("large", ["ACGTA" * 90 + "C" * n for n in range(1, 20)]))
    large.start()
    assert settled(lambda: served.server.totals.active == 2)
    small = threading.Thread(target=ask, args=("small", ["ACGTT"]))
    small.start()
    assert settled(lambda: served.server.totals.active == 3)
    held.set()
    for thread in (first, large, small):
        thread.join(60)
    assert ended == ["first", "small", "large"]


def test_full_queue_is_503_with_a_time_to_wait(monkeypatch):
    with serving(max_queue=2) as served:
        gate, rows = threading.Event(), served.server.service._embedder.rows
        monkeypatch.setattr(
            served.server.service._embedder, "rows", lambda records: gate.wait(30) and rows(records)
        )
        threads = [threading.Thread(target=served.embed, args=("ACGT",)) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert settled(lambda: served.server.totals.active == 2)
        status, headers, body = served.ask("POST", "/v1/embeddings", '{"input": "ACGT"}')
        assert (status, json.loads(body)["error"]["code"]) == (503, "queue_full")
        assert 1 <= int(headers["retry-after"]) <= 60
        assert served.ask("GET", "/healthz")[0] == 200
        gate.set()
        for thread in threads:
            thread.join(30)
        assert len(served.embed("ACGT")["data"]) == 1


def test_reply_counts_until_it_is_sent():
    """So that clients that do not read what they asked for cannot fill the memory."""
    with serving(max_inputs=20_000, max_queue=1) as served:
        body = json.dumps({"input": ["ACGT"] * 6000}).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(30)
            connection.connect(("127.0.0.1", served.port))
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert settled(lambda: served.server.totals.by_status[200] == 1)
            assert served.refused({"input": "ACGT"}, 503)["code"] == "queue_full"
        assert settled(lambda: served.server.totals.active == 0)
        assert len(served.embed("ACGT")["data"]) == 1


def test_client_that_does_not_read_gives_up_its_place(monkeypatch, caplog):
    monkeypatch.setattr(app, "WRITING_S", 0.2)
    with serving(max_inputs=20_000, max_queue=1) as served:
        body = json.dumps({"input": ["ACGT"] * 6000}).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(30)
            connection.connect(("127.0.0.1", served.port))
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert settled(lambda: served.server.totals.by_status[200] == 1)
            assert settled(lambda: served.server.totals.active == 0)
            assert len(served.embed("ACGT")["data"]) == 1
        assert not served.server.totals.by_status[500]
        assert "read nothing of its reply" in caplog.text
        assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.example"]
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/embeddings"), ("GET", "/metrics")])
def test_other_names_are_not_answered(host, method, path, served):
    """Their owner could let them point here after a browser has loaded a page from them."""
    status, _, body = served.ask(method, path, '{"input": "ACGT"}', JSON | {"Host": host})
    assert (status, json.loads(body)["error"]["code"]) == (421, "unknown_host")
    assert (
        f"does not answer for '{host}'; send the request to localhost" in json.loads(body)["error"]["message"]
    )


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:8000", "127.0.0.1:1", "[::1]", "[::1]:80", "gpubox:8000"]
)
def test_own_names_are_answered(host, served):
    assert served.ask("POST", "/v1/embeddings", '{"input": "ACGT"}', JSON | {"Host": host})[0] == 200


def test_metrics_count_what_was_answered(served):
    def read() -> dict[str, float]:
        status, headers, body = served.ask("GET", "/metrics")
        assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        lines = [line for line in body.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    served.embed("ACGT")
    served.refused({"input": "J"})
    before = read()
    served.embed(["ACGTACGT", "ACG"])
    served.refused({"input": "J"})
    after = read()
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert grown['genoembed_requests_total{status="200"}'] == 1
    assert grown['genoembed_requests_total{status="400"}'] == 1
    assert grown["genoembed_sequences_total"] == 2
    assert grown["genoembed_tokens_total"] == grown["genoembed_bases_total"] == 11
    assert (
        grown["genoembed_request_seconds_count"] == grown['genoembed_request_seconds_bucket{le="+Inf"}'] == 2
    )
    assert grown["genoembed_forward_passes_total"] == 1
    assert after["genoembed_queue_requests"] == after["genoembed_queue_bases"] == 0


def test_bug_of_ours_is_an_error_in_the_same_form_and_in_the_log(served, monkeypatch, caplog):
    def fail(records):
        raise ZeroDivisionError

    before = served.server.totals.by_status[500]
    with monkeypatch.context() as patched:
        patched.setattr(served.server.service._embedder, "rows", fail)
        error = served.refused({"input": "ACGT"}, 500)
    assert error["message"] == "the server failed on this request; its log says why"
    assert "ZeroDivisionError" in caplog.text
    assert served.server.totals.by_status[500] > before
    assert len(served.embed("ACGT")["data"]) == 1


def test_request_that_fails_does_not_fail_those_beside_it(served, held, monkeypatch, caplog):
    rows = served.server.service._embedder.rows

    def fail(records):
        assert held.wait(30)  # all four are there
        if any(b"TTTTT" in record.sequence for record in records):
            message = "boom"
            raise ZeroDivisionError(message)
        return rows(records)

    monkeypatch.setattr(served.server.service._embedder, "rows", fail)
    found = {}
    threads = [
        threading.Thread(
            target=lambda text=text: found.update(
                {text: served.ask("POST", "/v1/embeddings", json.dumps({"input": text}))[0]}
            )
        )
        for text in ("ACGT", "TTTTT", "GGGG", "CCCC")
    ]
    for thread in threads:
        thread.start()
    assert settled(lambda: served.server.totals.active == 4)
    held.set()
    for thread in threads:
        thread.join(30)
    assert found == {"ACGT": 200, "TTTTT": 500, "GGGG": 200, "CCCC": 200}
