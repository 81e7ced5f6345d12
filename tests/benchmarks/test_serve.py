"""The load test at its smallest sizes, on a server in this process."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import serve

from tests.serving.conftest import serving


class InThread(serve.ServerProcess):
    """Stands for the process."""

    def __init__(self, options) -> None:
        self._process = SimpleNamespace(pid=os.getpid())
        self._running = serving(layers=options.layer, dtype=options.dtype, batch_tokens=None)
        self.port = self._running.__enter__().port

    def __exit__(self, *_: object) -> None:
        self._running.__exit__(None, None, None)

    def stop(self) -> tuple[int, str]:
        return 0, "stopped"


def figures_of(tmp_path) -> dict[str, dict]:
    found = json.loads((tmp_path / "serve_layer_2.json").read_text())
    return {figure["name"]: figure for figure in found["figures"]}


def test_every_request_is_answered_with_the_vector_of_extract(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "ServerProcess", InThread)
    serve.main(["--quick", "--dtype", "float32", "--results", str(tmp_path)])
    figures = figures_of(tmp_path)
    assert figures["requests that failed"]["is_met"]
    assert figures["largest difference to extract, over the largest value"]["is_met"]
    assert figures["throughput of serve over extract"]["value"] > 0
    assert 0 < figures["median latency, s"]["value"] <= figures["95th percentile, s"]["value"]
    assert "24 requests of one sequence" in (tmp_path / "serve_layer_2.md").read_text()


def test_errors_are_counted(monkeypatch):
    options = SimpleNamespace(layer="2", dtype="float32", connections=2)
    monkeypatch.setattr(serve, "HEADERS", {"Content-Type": "text/plain"})
    load = serve.Load()
    with InThread(options) as server:
        serve.send(server.port, ["ACGT"] * 5, range(5), load, options)
    assert (len(load.errors), load.vectors) == (5, {})
    assert load.errors[0].startswith("415: ")
