"""What ``docs/SERVE.md`` tells people to send is answered as the page says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import genoembed
from genoembed.config.serve import ServeConfig
from tests.serving.conftest import WIDTH
from tests.serving.test_vectors import decoded

if TYPE_CHECKING:
    from tests.serving.conftest import Served

PAGE = (Path(__file__).parents[2] / "docs" / "SERVE.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.M | re.S)


def block(language: str, word: str, served: Served) -> str:
    """Find the one block with a word, with the address of the server that runs here."""
    (text,) = (text for kind, text in BLOCKS if kind == language and word in text)
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{served.port}").replace("evo2_7b", "genoembed-mini")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_line_of_the_page_runs(served):
    words = ["bash", "-euc", block("sh", "curl -s", served)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert '"index":1' in done.stdout
    assert '"total_tokens":23' in done.stdout


def test_python_of_the_page_runs(served):
    words = [sys.executable, "-c", block("py", "urllib.request", served)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"2 {WIDTH}\n", done.stderr


def test_client_of_the_page_is_called_as_it_calls(served, monkeypatch):
    """A stand-in that sends what OpenAI's client sends: base64, which the caller does not see."""
    calls = []

    class OpenAI:
        def __init__(self, *, base_url: str, api_key: str) -> None:
            assert base_url == f"http://127.0.0.1:{served.port}/v1"
            self.embeddings = self

        def create(self, *, model: str, input: list[str]):
            calls.append(model)
            found = decoded(served.embed(input, model=model, encoding_format="base64"))
            return types.SimpleNamespace(data=[types.SimpleNamespace(embedding=row) for row in found])

    monkeypatch.setitem(sys.modules, "openai", types.SimpleNamespace(OpenAI=OpenAI))
    names: dict = {}
    exec(block("py", "from openai", served), names)
    assert calls == ["genoembed-mini"]
    assert [len(vector) for vector in names["vectors"]] == [WIDTH, WIDTH]


def test_messages_and_defaults_of_the_page_are_those_of_the_code(served):
    error = served.refused({"input": ["ACGT", "ACGJ"]})
    assert f'"message": "{error["message"]}"' in PAGE
    options = ServeConfig.options()
    assert f"(default {options['max_inputs'].default})" in PAGE
    assert options["max_body"].default * options["max_queue"].default == pytest.approx(8e9, rel=0.05)
    assert "8 GB" in PAGE


def test_application_of_the_page_is_built(monkeypatch):
    (text,) = (text for kind, text in BLOCKS if "create_app" in text and kind == "py")
    built = []
    monkeypatch.setattr(genoembed, "create_app", lambda *args, **keys: built.append((args, keys)))
    exec(text, {})
    assert built == [(("evo2_7b",), {"layers": 28})]
