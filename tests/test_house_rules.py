"""The guards of ``tests/conftest.py`` guard."""

from __future__ import annotations

import os
import socket

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
