"""Promises 6, 10, 11 and 14 of a server that listens: it has no output, but requests that are under way."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import threading
import time

import pytest

from tests.promises.test_runs import BROKEN, NO_MEMORY, SPOILED

SLOW = (
    "import time, torch.nn as nn; _run = nn.Embedding.forward\n"
    "def slow(self, *a, **k):\n"
    "    time.sleep(0.4)\n"
    "    return _run(self, *a, **k)\n"
    "nn.Embedding.forward = slow"
)
NAMES = pytest.mark.parametrize("name", ["serve"])


class Server:
    """A server of its own process."""

    def __init__(self, warm, world, *more: str, patch: str = "") -> None:
        words = ["serve", "--model", "model", "--layer", "1", "--port", "0", "--threads", "1", *more]
        self.running = warm.start(*words, "--json", cwd=world, **({"patch": patch} if patch else {}))
        end = time.monotonic() + 60
        while not (self.running.out.exists() and self.running.out.read_text().endswith("\n")):
            assert not self.running.has_ended, self.running.wait().err
            assert time.monotonic() < end
            time.sleep(0.01)
        self.said = json.loads(self.running.out.read_text())
        self.port = int(self.said["url"].rpartition(":")[2].partition("/")[0])

    def post(self, *sequences: str) -> tuple[int, dict]:
        """Ask for vectors."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = json.dumps({"input": sequences})
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        found = json.loads(reply.read())
        connection.close()
        return reply.status, found

    def stop(self):
        """End it as a service manager does."""
        self.running.signal(signal.SIGTERM)
        return self.running.wait(timeout_s=30)


def vectors(reply: dict) -> list[list[float]]:
    return [item["embedding"] for item in reply["data"]]


@pytest.mark.promise(6)
@NAMES
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_lets_requests_under_way_finish(name, number, warm, world):
    server = Server(warm, world, patch=SLOW)
    replies = []
    asking = threading.Thread(target=lambda: replies.append(server.post("ACGTACGTACGT")))
    asking.start()
    time.sleep(0.2)
    server.running.signal(number)
    ran = server.running.wait(timeout_s=30)
    asking.join(timeout=10)
    assert [status for status, _ in replies] == [200]
    assert ran.code == 0, ran.err
    assert ran.lines[-1].startswith(f"stopped by {number.name} after ")
    assert "1 request," in ran.lines[-1]
    with pytest.raises(ConnectionError):
        server.post("ACGT")


@pytest.mark.promise(6)
@NAMES
def test_second_signal_ends_at_once(name, warm, world):
    server = Server(warm, world, patch=SLOW.replace("0.4", "0.4 if a[0].shape[1] < 70 else 20"))

    def ask() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            server.post("ACGT" * 30)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.3)
    started = time.monotonic()
    server.running.signal(signal.SIGTERM)
    time.sleep(0.3)
    server.running.signal(signal.SIGTERM)
    ran = server.running.wait(timeout_s=15)
    asking.join(timeout=10)
    assert time.monotonic() - started < 8
    assert ran.code == 143, ran.err
    assert "Traceback" not in ran.err
    assert ran.lines[-1] == "Interrupted: requests that were under way have no answer"


@pytest.mark.promise(10)
@NAMES
def test_short_memory_gives_the_same_vectors(name, warm, world):
    sequences = ["ACGTACGTTGCA", "GGCATTACGATTAC", "TTTTGACA"]
    found = []
    for patch in ("", NO_MEMORY):
        server = Server(warm, world, patch=patch)
        status, reply = server.post(*sequences)
        assert (status, server.stop().code) == (200, 0)
        found.append([value for vector in vectors(reply) for value in vector])
    assert found[1] == pytest.approx(found[0], rel=2e-4, abs=1e-5)


@pytest.mark.promise(11)
@NAMES
def test_record_that_fails_is_named_and_fails_its_own_request_only(name, warm, world):
    server = Server(warm, world, patch=SPOILED)
    status, reply = server.post("ACGTACGT", "ACGTNNNNNNNNACGT")
    assert status == 500
    assert reply["error"]["message"].startswith("input[1]: the model gives values that are not finite")
    assert server.post("ACGTACGT")[0] == 200
    assert server.stop().code == 0


@pytest.mark.promise(14)
@NAMES
def test_failure_of_foreign_code_is_one_line_of_the_log_and_the_server_goes_on(name, warm, world):
    broken = BROKEN.replace("raise", "if ids.shape[1] < 60: raise") + "\n"
    broken = broken.replace("foreign model')", "foreign model')\n    return _run(self, ids)")
    server = Server(warm, world, patch=broken)
    status, reply = server.post("ACGTACGT")
    assert (status, reply["error"]["code"]) == (500, "model_failed")
    assert "boom" not in reply["error"]["message"]
    assert server.post("ACGT" * 20)[0] == 200
    ran = server.stop()
    assert ran.code == 0
    assert "Traceback" not in ran.err
    said = [line for line in ran.lines if "boom in a foreign model" in line]
    assert len(said) == 1
    assert "request 1 failed: " in said[0]
