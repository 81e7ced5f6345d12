"""Whether the hub answers: every kind of silence, and every kind of answer, within seconds."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import threading
import time
from contextlib import contextmanager
from urllib.error import URLError

import pytest
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig

from genoembed.errors import CheckpointError, ModelNotFoundError
from genoembed.models import hub, locate, pretrained
from genoembed.models.describe import describe_layers
from genoembed.models.hub import hub_answers
from genoembed.models.load import load_model
from genoembed.models.locate import silence_reason
from tests.tiny_models import build_tiny


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    monkeypatch.setattr(locate.constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def server(answer: bytes | None):
    """Listen on this machine; answer each connection with these bytes, or never."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        stop = threading.Event()

        def serve() -> None:
            listening.settimeout(0.05)
            while not stop.is_set():
                try:
                    connection, _ = listening.accept()
                except TimeoutError:
                    continue
                with connection:
                    if answer is None:
                        stop.wait(10)
                    else:
                        connection.recv(4096)
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            stop.set()
            thread.join()


def test_revision_reaches_all_that_transformers_fetches(tmp_path, monkeypatch):
    folder = build_tiny("llama", tmp_path / "llama")
    values = json.loads((folder / "config.json").read_text())
    asked = []

    def watch(kind):
        original = kind.from_pretrained.__func__

        def from_pretrained(cls, name, *args, revision=None, **kwargs):
            if name != str(folder):  # what transformers calls itself then
                asked.append((kind.__name__, name, revision))
            return original(cls, str(folder), *args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(from_pretrained))

    def get_config_dict(name, revision=None, **others):
        if name != str(folder):
            asked.append(("config.json", name, revision))
        return dict(values), others

    for kind in (AutoConfig, AutoModel, AutoTokenizer):
        watch(kind)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", get_config_dict)
    monkeypatch.setattr(pretrained, "cached_file", lambda *args, **kwargs: None)

    def download(repository, name, revision=None):
        raise OSError(name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    load_model("some/model", device="cpu", dtype="float32", revision="abc")
    assert {kind for kind, _, _ in asked} == {"config.json", "AutoConfig", "AutoModel", "AutoTokenizer"}
    assert {(name, revision) for _, name, revision in asked} == {("some/model", "abc")}


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "401 Unauthorized"])
def test_any_answer_counts(status, monkeypatch):
    with server(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()) as address:
        monkeypatch.setattr(locate.constants, "ENDPOINT", address)
        assert hub_answers()


def test_closed_port_is_no_answer(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    monkeypatch.setattr(locate.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert not hub_answers()
    assert silence_reason() == f"http://127.0.0.1:{port} does not answer"


def test_silence_is_waited_for_once_and_briefly(monkeypatch):
    monkeypatch.setattr(hub, "_ANSWER_TIMEOUT_S", 0.3)
    with server(None) as address:
        monkeypatch.setattr(locate.constants, "ENDPOINT", address)
        begin = time.monotonic()
        assert not hub_answers()
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("reason", "expected"), [(ssl.SSLError("certificate"), True), (OSError("no route"), False)]
)
def test_certificates_are_left_to_the_hubs_client(reason, expected, monkeypatch):
    def refuse(*_, **__):
        raise URLError(reason)

    monkeypatch.setattr(hub, "urlopen", refuse)
    assert hub_answers() is expected


def test_offline_mode_asks_nobody(monkeypatch):
    monkeypatch.setattr(locate.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "urlopen", lambda *_, **__: pytest.fail("asked"))
    assert not hub_answers()
    assert "HF_HUB_OFFLINE" in silence_reason()


@pytest.mark.parametrize("use", [load_model, describe_layers])
def test_hub_id_without_a_network_asks_the_cache_only(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    with pytest.raises(
        ModelNotFoundError, match=r"'some/thing': .* not in the Hugging Face cache .*, and .*answer"
    ):
        use("some/thing")


@pytest.mark.parametrize("family", ["bert", "llama", "custom_conv"])
def test_cached_hub_id_loads_without_a_network(family, tiny_folder, tmp_path, monkeypatch):
    repository = tmp_path / "models--some--thing"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(tiny_folder(family), repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr(locate.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    trusted = family == "custom_conv"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    model = load_model("some/thing", device="cpu", trust_remote_code=trusted)
    assert (model.name, model.provenance["revision"]) == ("some/thing", "a" * 40)
    assert describe_layers("some/thing", trust_remote_code=trusted).layers == model.layers
    (repository / "snapshots" / ("a" * 40) / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"snapshots/a+: no weights were found .*; fetch the model while"
    ):
        load_model("some/thing", device="cpu", trust_remote_code=trusted)
