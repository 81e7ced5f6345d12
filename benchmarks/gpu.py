"""Check and measure everything on one GPU, in under eight minutes, and write one page and one JSON file.

Numbers first (goldens, ported families, batches, packing, FP8, gradients, a real lack of memory), then speed
(``extract``, random weights of Evo 2 7B's shape, training, compiled blocks, operators, kernels). Each part
has a budget of seconds. What cannot run is skipped with a reason; a part that fails, hangs or takes its
process with it does not stop the others; the files are written anew after each part::

    python benchmarks/gpu.py --note "idle machine"
    python benchmarks/gpu.py --parts goldens fp8
    python benchmarks/gpu.py --tiny

``--tiny`` runs the same code on a CPU at small shapes, which shows whether the script works and nothing else.
Exit status: 1 if a part failed or a check of numbers is not met, with the names at the end. The parts are in
``gpu_numbers.py`` and ``gpu_speed.py``; they run in a worker process, and after a failure in a new one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from measuring import RESULTS, Figure, SkippedError, as_markdown, write_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

NAME = "gpu"
TOTAL_S = 460.0
"""Of all parts together, the start of their process included."""
START_S = 180.0
"""Within which the worker must be ready."""
LEAST_S = 5.0
"""A part is not begun with less time than this."""


class Part(NamedTuple):
    """Something that is checked or measured."""

    title: str
    budget_s: float


PARTS = {
    "peak": Part("Limits of the device", 20),
    "goldens": Part("StripedHyena 2 against stored activations of the reference implementation", 40),
    "families": Part("Ported families against outputs of their official code", 60),
    "invariance": Part("Vectors in any batch, order and padding, and in blocks", 40),
    "packing": Part("Packed neighbors kept apart", 30),
    "fp8": Part("FP8: emulation, integers, hardware", 45),
    "gradients": Part("Gradients against those of a CPU", 40),
    "memory": Part("A lack of memory", 40),
    "evo2_7b": Part("Random weights of Evo 2 7B's shape, layer 28", 120),
    "kernels": Part("Kernels of a pass at Evo 2 7B's shape", 40),
    "operators": Part("Operators at Evo 2 7B's shape", 40),
    "extract": Part("The bundled model", 60),
    "compiled": Part("Compiled blocks against eager ones", 90),
    "training": Part("Steps of pretraining and of fine-tuning with LoRA", 90),
    "compiled_training": Part("Steps of pretraining with compiled blocks", 100),
    "vortex": Part("StripedHyena 2 against Vortex", 40),
}


@dataclass(kw_only=True)
class Outcome:
    """How a part ended."""

    part: str
    status: str
    """``done``, ``skipped``, ``failed``, or ``off`` where a check of numbers is not met."""
    seconds: float = 0.0
    reason: str = ""
    report: dict[str, Any] | None = None
    """Of the parts that ended by themselves: ``figures``, ``tables``, ``remarks``, ``problems``."""
    trace: str = ""


class NoDeviceError(Exception):
    """Raised where there is nothing to run on."""


class Worker:
    """A process that runs one part after the other, as it is told on its standard input.

    Args:
        words: Its command line.
        start_s: Within which it must be ready.
    """

    def __init__(self, words: Sequence[str], *, start_s: float) -> None:
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            self.machine: dict[str, Any] = self._answer(start_s)
            if "error" in self.machine:
                raise NoDeviceError(self.machine["error"])
        except BaseException:
            self.kill()
            raise

    def run(self, part: str, *, budget_s: float) -> dict[str, Any]:
        """Let it run a part; raises `RuntimeError` where it does not answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is noticed below
            self._process.stdin.write(part + "\n")
            self._process.stdin.flush()
        return self._answer(budget_s)

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _listen(self) -> None:
        for line in self._process.stdout or ():
            self._answers.put(line)
        self._answers.put(None)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            message = f"it did not end within {timeout_s:.3g} s"
            raise RuntimeError(message) from None
        if line is None:
            code = self._process.wait()
            by = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            message = f"its process ended ({by})"
            raise RuntimeError(message)
        answer: dict[str, Any] = json.loads(line)
        return answer


def run_parts(
    names: Sequence[str], words: Sequence[str], *, parts: Mapping[str, Part], total_s: float = TOTAL_S
) -> Iterator[tuple[Outcome, dict[str, Any]]]:
    """Run parts in a worker, and a new worker after each that failed.

    Args:
        names: Of the parts, in order.
        words: Command line of the worker.
        parts: Their budgets.
        total_s: Of all together.

    Yields:
        How each part ended, and what the worker says of the machine (empty where none got ready).
    """
    deadline = time.monotonic() + total_s
    worker, machine = None, {}
    try:
        for name in names:
            began = time.monotonic()
            if deadline - began < min(LEAST_S, parts[name].budget_s):
                yield Outcome(part=name, status="skipped", reason="no time is left for it"), machine
                continue
            try:
                if worker is None:
                    worker = Worker(words, start_s=min(START_S, deadline - began))
                    machine = worker.machine
                budget_s = min(parts[name].budget_s, deadline - time.monotonic())
                outcome = Outcome(part=name, **worker.run(name, budget_s=budget_s))
            except (RuntimeError, OSError, ValueError) as error:
                outcome = Outcome(part=name, status="failed", reason=str(error))
            outcome.seconds = time.monotonic() - began
            if outcome.status == "failed" and worker is not None:
                # after an error of CUDA nothing runs in its process any more, and its memory may be full
                worker.kill()
                worker = None
            yield outcome, machine
    finally:
        if worker is not None:
            worker.kill()


def serve(parts: Mapping[str, Callable[[], Any]], machine: Mapping[str, Any], answers: IO[str]) -> None:
    """Run parts as they are named on standard input, and answer with a line each: the worker's side.

    Args:
        parts: What to run; returns a `gpu_bench.Report`.
        machine: The first answer.
        answers: Where to answer.
    """
    orders: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_take_orders, args=(orders,), daemon=True).start()
    _say(answers, dict(machine))
    while True:
        try:
            report = parts[orders.get()]()
            status = "off" if report.problems else "done"
            answer = {"status": status, "reason": "; ".join(report.problems), "report": report.to_dict()}
        except SkippedError as reason:
            answer = {"status": "skipped", "reason": str(reason)}
        except Exception as error:  # noqa: BLE001 - whatever it is, the others run
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            answer = {"status": "failed", "reason": reason, "trace": traceback.format_exc()[-8000:]}
        _say(answers, answer)


def _take_orders(orders: queue.Queue[str]) -> None:
    """Pass orders on; end the process where nobody is left to give them, for a part may hang."""
    for line in sys.stdin:
        orders.put(line.strip())
    os._exit(1)


def load_parts() -> dict[str, Callable[..., Any]]:
    """Import the code of all parts, and with it torch."""
    numbers, speed = (importlib.import_module(name) for name in ("gpu_numbers", "gpu_speed"))
    return {**numbers.PARTS, **speed.PARTS}


def worker_words(options: argparse.Namespace) -> list[str]:
    """Write the command line of the worker."""
    return [sys.executable, __file__, "--worker", "--device", options.device, *["--tiny"] * options.tiny]


def _say(answers: IO[str], answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer, default=str) + "\n")
    answers.flush()


def own_answers() -> IO[str]:
    """Keep standard output for the answers, and let everything else that is printed go to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def write_results(
    folder: Path, outcomes: Sequence[Outcome], machine: Mapping[str, Any], options: argparse.Namespace
) -> str:
    """Write what is known so far.

    Args:
        folder: Where to.
        outcomes: Of the parts that ran.
        machine: What the worker said.
        options: Of the command line.

    Returns:
        The page.
    """
    figures, tables, remarks = [], {}, []
    rows = [
        {
            "part": outcome.part,
            "what": PARTS[outcome.part].title if outcome.part in PARTS else "",
            "result": outcome.status,
            "s": round(outcome.seconds, 1),
            "why": outcome.reason.replace("|", "/"),
        }
        for outcome in outcomes
    ]
    tables["Parts"] = rows
    for outcome in outcomes:
        report = outcome.report or {}
        figures += [Figure(**figure) for figure in report.get("figures", ())]
        tables |= report.get("tables", {})
        remarks += report.get("remarks", ())
    if options.tiny:
        remarks.insert(0, "No GPU was at hand: this is the tiny mode, on a CPU, and its times mean nothing.")
    remarks.append(
        "Parts: `off` is a check of numbers that is not met; a goal of speed that is missed is no failure."
    )
    settings = {
        key: value for key, value in vars(options).items() if key not in ("results", "note", "worker")
    }
    page = as_markdown(
        "Checks and measurements on a GPU", machine, options.note, settings, figures, tables, remarks
    )
    stored = {
        "machine": machine,
        "note": options.note,
        "settings": settings,
        "parts": [vars(outcome) for outcome in outcomes],
    }
    write_files(folder, NAME, page, stored)
    return page


def names_of(outcomes: Sequence[Outcome], *status: str) -> list[str]:
    """List the parts that ended so."""
    return [outcome.part for outcome in outcomes if outcome.status in status]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes the process's own.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes, on the CPU: does the script work?")
    parser.add_argument("--device", help="default: cuda, with --tiny cpu")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--total-s", type=float, default=TOTAL_S, help="seconds of all parts together")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.device = options.device or ("cpu" if options.tiny else "cuda")
    if options.worker:
        answers = own_answers()
        # not at the top: the process that watches the parts needs none of their packages
        bench_module = importlib.import_module("gpu_bench")
        bench = bench_module.Bench(options.device, is_tiny=options.tiny)
        serve({name: partial(bench.run, part) for name, part in load_parts().items()}, bench.machine, answers)
        return 0
    words = worker_words(options)
    outcomes: list[Outcome] = []
    page = ""
    try:
        for outcome, machine in run_parts(options.parts, words, parts=PARTS, total_s=options.total_s):
            outcomes.append(outcome)
            print(f"{outcome.part}: {outcome.status} {outcome.reason} ({outcome.seconds:.1f} s)", flush=True)
            page = write_results(options.results, outcomes, machine, options)
    except NoDeviceError as reason:
        print(f"{reason}; --tiny runs small shapes on the CPU", file=sys.stderr)
        return 2
    print(f"\n{page}")
    failed = names_of(outcomes, "failed", "off")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
