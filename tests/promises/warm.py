"""Run commands, scripts and code as real processes that start warm.

A process of its own takes seconds to import torch; a matrix of commands would take minutes. So one process
imports everything once, and each run is a fork of it: a real process with its own signals, limits, files and
exit status. What depends on the order of imports needs a fresh interpreter instead.

Run as a script, this file is that process: a JSON request a line in, a JSON answer a line out.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

READY = "ready"
PYTHON_OBJECT = re.compile(r"\b[A-Z]\w*\(\w+=|<\w+(\.\w+)* object at|\b0\.000\d* hours|\bto to\b")
"""What messages of no command may hold: objects as Python prints them, and words that nobody reads."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A run that has ended."""

    code: int
    """Exit status; minus the signal where one ended it."""
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Lines of standard error."""
        return self.err.splitlines()


class WarmStarter:
    """Starts commands as forks of a process that has imported everything."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert self._server.stdout.readline().strip() == READY

    def close(self) -> None:
        """End the process."""
        self._server.stdin.close()
        self._server.wait(timeout=30)
        self._server.stdout.close()

    def start(self, *words: object, cwd: Path, **request: Any) -> Running:
        """Start a command.

        ``stdin``, ``stdout``: names of files; ``max_file_bytes``: no file may grow larger, as on a full disk;
        ``patch``: a Python statement that runs first, in the new process; ``env``: variables to set;
        ``script``: a Python file to run with the words, ``code``: a program to run, instead of a command.
        """
        scratch = cwd.parent / f".{cwd.name}-{os.urandom(4).hex()}"
        request = {
            "words": [str(word) for word in words],
            "cwd": str(cwd),
            "stdin": os.devnull,
            "stdout": f"{scratch}.out",
            "stderr": f"{scratch}.err",
            **{key: str(value) if isinstance(value, Path) else value for key, value in request.items()},
        }
        pid = self._ask({"start": request})["pid"]
        return Running(self, pid, Path(request["stdout"]), Path(request["stderr"]))

    def run(self, *words: object, cwd: Path, timeout_s: float = 120, **request: Any) -> Ran:
        """Run a command to its end."""
        return self.start(*words, cwd=cwd, **request).wait(timeout_s=timeout_s)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


@dataclass(frozen=True)
class Running:
    """A command that runs."""

    starter: WarmStarter
    pid: int
    out: Path
    err: Path

    def wait(self, *, timeout_s: float = 120) -> Ran:
        """Wait for its end."""
        code = self.starter._ask({"wait": self.pid, "timeout_s": timeout_s})["code"]
        time.sleep(0.02)  # for what is still in a pipe
        # killed at once, it has not opened them yet
        out, err = (
            path.read_text(errors="replace") if path.is_file() else "" for path in (self.out, self.err)
        )
        assert code is not None, f"still running after {timeout_s} s: {err[-2000:]}"
        assert not PYTHON_OBJECT.search(err), err
        return Ran(code=code, out=out, err=err)

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self.starter._ask({"wait": self.pid, "timeout_s": 0})["code"] is not None


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.chdir(request["cwd"])
        os.dup2(os.open(request["stdin"], os.O_RDONLY), 0)
        for number, name in ((1, request["stdout"]), (2, request["stderr"])):
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            # a limit on the size of files counts for these two as well, unless another process writes them
            os.dup2(_copied_to(file) if "max_file_bytes" in request else file, number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
        os.environ.update(request.get("env", {}))
        sys.argv = [request.get("script", "genoembed"), *request["words"]]
        if "patch" in request:  # from a file, as the code of a model is
            place = Path(request["stderr"]).with_suffix(".py")
            place.write_text(request["patch"])
            exec(compile(request["patch"], str(place), "exec"), {})
        if "max_file_bytes" in request:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            limit = request["max_file_bytes"]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        status = _main(_program(request))
    finally:
        os._exit(status)


def _copied_to(file: int) -> int:
    """Make a pipe that a further process copies to a file."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        while chunk := os.read(reading, 65536):
            os.write(file, chunk)
        os._exit(0)
    os.close(reading)
    return writing


def _program(request: dict[str, Any]) -> Callable[[], object]:
    """Return what is run: a file, code, or a command of genoembed."""
    import runpy

    from genoembed.__main__ import run

    if "script" in request:
        sys.path.insert(0, str(Path(request["script"]).parent))
        return lambda: runpy.run_path(request["script"], run_name="__main__")
    if "code" in request:
        sys.path.insert(0, "")
        return lambda: exec(compile(request["code"], "<code>", "exec"), {"__name__": "__main__"})
    return run


def _main(run: Callable[[], object]) -> int:
    """Do what the interpreter does around a program, exit status included."""
    import traceback

    status = 0
    try:
        run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        status = 1
    try:
        sys.stdout.flush()
    except OSError:
        print("Exception ignored while flushing sys.stdout", file=sys.stderr)
        status = 120
    return status


def _serve() -> None:
    import importlib
    import pkgutil

    import torch

    torch.set_num_threads(1)
    import genoembed

    for module in pkgutil.walk_packages(genoembed.__path__, "genoembed."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    import h5py  # noqa: F401
    import peft  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import transformers.trainer  # noqa: F401

    ended: dict[int, int] = {}
    print(READY, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: dict[str, Any] = {"pid": _fork(request["start"])}
        else:
            answer = {"code": _wait(request["wait"], request["timeout_s"], ended)}
        print(json.dumps(answer), flush=True)


def _wait(pid: int, timeout_s: float, ended: dict[int, int]) -> int | None:
    end = time.monotonic() + timeout_s
    while pid not in ended:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() >= end:
            return None
        else:
            time.sleep(0.01)
    return ended[pid]


if __name__ == "__main__":
    _serve()
