"""Rules of the whole test suite: no network, fixed seeds where CI runs, few threads."""

from __future__ import annotations

import logging
import os
import socket
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.promises.warm import WarmStarter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Before anything imports transformers: hub and datasets must not be asked for anything.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # each has one core, which threads that wait would take
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI", "").lower() in ("1", "true") else "dev")

MAX_THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
LOOPBACK = ("127.", "::1", "localhost")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: compressed, they hold the time, and workers must collect the same."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a test that tries to connect to another machine fail with a message."""

    def guarded(name: str):
        original = getattr(socket.socket, name)

        def connect(self: socket.socket, address: object) -> object:
            host = address[0] if isinstance(address, tuple) else ""
            if self.family in (socket.AF_INET, socket.AF_INET6) and not str(host).startswith(LOOPBACK):
                pytest.fail(f"a test tried to reach {host!r}; tests need no network", pytrace=True)
            return original(self, address)

        return connect

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(name))


@pytest.fixture(autouse=True)
def _log_levels_stay() -> Iterator[None]:
    """What a script sets for its own process is not the next test's."""
    ours = logging.getLogger("genoembed")
    before, disabled = ours.level, logging.root.manager.disable
    yield
    ours.setLevel(before)
    logging.disable(disabled)


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    """Tiny models lose more to threads than they gain; torch is left alone where no test has imported it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() > MAX_THREADS:
        torch.set_num_threads(MAX_THREADS)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Every device there is; the cuda leg skips itself on a machine without one."""
    if request.param == "cuda":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmStarter]:
    """Start commands, scripts and code as real processes, quickly."""
    starter = WarmStarter()
    yield starter
    starter.close()


@pytest.fixture(scope="session")
def run_example(warm: WarmStarter, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run a script, or without one a command, and return what it prints."""
    folder = tmp_path_factory.mktemp("examples") / "here"
    folder.mkdir()

    def run(script: Path | None, *words: object) -> str:
        program = {} if script is None else {"script": script}
        ran = warm.run(*words, cwd=folder, timeout_s=300, env={"MPLBACKEND": "agg"}, **program)
        assert ran.code == 0, ran.err
        return ran.out

    return run
