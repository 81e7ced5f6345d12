"""The guards of ``tests/conftest.py`` guard."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import settings


def test_network_guard_refuses_other_machines():
    with (
        socket.socket() as connection,
        pytest.raises(pytest.fail.Exception, match="tests need no network"),
    ):
        connection.connect(("192.0.2.1", 80))


def test_network_guard_lets_loopback_through():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as connection:
        assert connection.connect_ex(server.getsockname()) == 0


def test_hub_is_offline():
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"


def test_hypothesis_has_no_deadline_and_fixed_seeds_in_ci():
    assert settings().deadline is None
    assert settings().derandomize is (os.environ.get("CI", "").lower() in ("1", "true"))


def test_change_notes_are_named_by_kind():
    kinds = ("added", "changed", "deprecated", "removed", "fixed", "security")
    notes = [path for path in (Path(__file__).parents[1] / "changes").iterdir() if path.name != "README.md"]
    assert [
        path.name for path in notes if path.name.split(".")[1:] not in [[kind, "md"] for kind in kinds]
    ] == []
    assert all(path.read_text().strip() for path in notes)
