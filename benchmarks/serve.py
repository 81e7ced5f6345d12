"""Load a server of this machine: errors, latency, throughput against ``extract``, memory.

Requests of one sequence each go over a number of connections, each of which sends the next when it has its
answer. Rounds alternate between the server and ``extract`` on the same sequences; CPU seconds are those of
the process that has the model (server or ``extract``), not of the clients. Only the loopback address is
used, and the number of requests is fixed.

Example::

    python benchmarks/serve.py --threads 1 --note "idle machine"
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from measuring import Figure, Sample, file_results, option_parser, ratio, spread, take, use_threads

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

GOAL = 0.7
MOST_GROWTH = 1.1
MOST_DIFFERENCE = 1e-2
"""Of bfloat16; docs/CONCEPTS.md. With ``--dtype float32`` the goal is 1e-5."""
HEADERS = {"Content-Type": "application/json"}


@dataclass(kw_only=True)
class Load:
    """What clients saw."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    vectors: dict[int, np.ndarray] = field(default_factory=dict)


def main(words: Sequence[str] | None = None) -> None:
    """Measure and file."""
    parser = option_parser(__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="of one sequence each")
    parser.add_argument("--connections", type=int, default=50, help="that send at the same time")
    parser.add_argument("--shortest", type=int, default=50, help="bases of a sequence, at least")
    parser.add_argument("--longest", type=int, default=150, help="bases of a sequence, at most")
    parser.add_argument("--layer", default="28")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args(words)
    if options.quick:
        options.requests, options.connections, options.rounds, options.layer = 24, 4, 2, "2"
    measure(options)


def measure(options: argparse.Namespace) -> None:
    """Start a server, and let it and ``extract`` take turns."""
    import genoembed

    use_threads(options.threads)
    model = genoembed.load_model("genoembed-mini", dtype=options.dtype)
    draw = random.Random(0)
    sequences = [
        "".join(draw.choices("ACGT", k=draw.randint(options.shortest, options.longest)))
        for _ in range(options.requests)
    ]
    rounds = np.array_split(np.arange(len(sequences)), options.rounds)
    load, samples = Load(), {"serve": [], "extract": []}
    memory, expected = [], []
    with tempfile.TemporaryDirectory() as folder, ServerProcess(options) as server:
        warm_up = Load()
        send(server.port, sequences[: options.connections], range(options.connections), warm_up, options)
        for number, chosen in enumerate(rounds):
            fasta, output = Path(folder, "round.fa"), Path(folder, "round.h5")
            fasta.write_text("".join(f">{index}\n{sequences[index]}\n" for index in chosen))
            extraction = partial(
                genoembed.extract, fasta, model=model, layers=options.layer, output=output, overwrite=True
            )
            memory.append(server.facts() | {"requests": len(load.seconds)})
            for name in ("serve", "extract") if number % 2 else ("extract", "serve"):
                if name == "serve":
                    samples[name].append(server.take([sequences[i] for i in chosen], chosen, load, options))
                else:
                    samples[name].append(take(extraction))
            with genoembed.open_embeddings(output) as file:
                expected.append(file.X[:])
        memory.append(server.facts() | {"requests": len(load.seconds)})
        metrics = server.metrics()
        code, last = server.stop()
    report(options, load, samples, memory, np.concatenate(expected), metrics, (code, last))


def report(options, load, samples, memory, expected, metrics, ending) -> None:
    """Turn what was seen into figures."""
    found = np.stack([load.vectors[index] for index in range(len(expected))]) if not load.errors else None
    difference = np.inf if found is None else float(np.abs(found - expected).max() / np.abs(expected).max())
    limit = 1e-5 if options.dtype == "float32" else MOST_DIFFERENCE
    growth = memory[-1]["rss_mb"] / memory[1]["rss_mb"]
    p50, p95, p99 = np.percentile(load.seconds, [50, 95, 99])
    figures = [
        Figure(name="requests that failed", value=len(load.errors), at_most=0),
        ratio("throughput of serve over extract", samples["extract"], samples["serve"], at_least=GOAL),
        Figure(name="largest difference to extract, over the largest value", value=difference, at_most=limit),
        Figure(name="memory after the last over after the first round", value=growth, at_most=MOST_GROWTH),
        Figure(
            name="more open files after the last than after the first round",
            value=memory[-1]["open_files"] - memory[1]["open_files"],
            at_most=0,
        ),
        Figure(name="exit status after SIGTERM", value=ending[0], at_most=0),
        Figure(name="median latency, s", value=float(p50)),
        Figure(name="95th percentile, s", value=float(p95)),
        Figure(name="99th percentile, s", value=float(p99)),
    ]
    runs = [{"way": name, **spread(taken)} for name, taken in samples.items()]
    num_bases = metrics["genoembed_bases_total"]
    remarks = [
        f"{len(load.seconds)} requests of one sequence of {options.shortest} to {options.longest} bases over "
        f"{options.connections} connections; the server's own count is {num_bases:.0f} bases, in "
        f"{metrics['genoembed_forward_passes_total']:.0f} forward passes with "
        f"{1 - metrics['genoembed_tokens_total'] / metrics['genoembed_forward_slots_total']:.1%} padding.",
        "The clients run beside the server on the same cores: seconds count them, CPU seconds do not.",
        "What a request costs beside the model is the same at every layer, so the ratio is that of a small "
        "model where the layer is an early one.",
        "Latency is that of a full queue: each connection sends again as soon as it is answered.",
        f"The server's last line: {ending[1]}",
        *([f"first error: {load.errors[0]}"] if load.errors else []),
    ]
    file_results(
        f"serve_layer_{options.layer}",
        f"serve under load, against extract: layer {options.layer}",
        options,
        figures=figures,
        tables={"Rounds": runs, "Server process": memory},
        remarks=remarks,
        packages=("starlette", "uvicorn"),
    )


class ServerProcess:
    """``genoembed serve`` in a process of its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        words = ["--layer", options.layer, "--dtype", options.dtype, "--port", "0", "--json"]
        words += ["--threads", str(options.threads)] if options.threads else []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "genoembed", "serve", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        said = self._process.stdout.readline()
        if not said:
            raise RuntimeError(self._process.stderr.read())
        self.port = int(json.loads(said)["url"].rpartition(":")[2].partition("/")[0])

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._process.stderr.close()

    def take(self, sequences, indices, load: Load, options: argparse.Namespace) -> Sample:
        """Time requests; the CPU seconds are the server's."""
        before = self._cpu_seconds()
        sample = take(lambda: send(self.port, sequences, indices, load, options))
        return sample._replace(cpu_seconds=self._cpu_seconds() - before)

    def _cpu_seconds(self) -> float:
        words = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def facts(self) -> dict[str, int]:
        """Say what the process holds."""
        place = Path(f"/proc/{self._process.pid}")
        lines = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
        return {
            "rss_mb": int(lines["VmRSS"].split()[0]) // 1024,
            "threads": int(lines["Threads"]),
            "open_files": len(list((place / "fd").iterdir())),
        }

    def metrics(self) -> dict[str, float]:
        """Read the server's counters."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def stop(self) -> tuple[int, str]:
        """Stop it as a service manager does."""
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(timeout=90)
        return code, (self._process.stderr.read().splitlines() or [""])[-1]


def send(port: int, sequences, indices, load: Load, options: argparse.Namespace) -> None:
    """Send each sequence in a request of its own, over several connections."""
    waiting = list(zip(indices, sequences, strict=True))[::-1]
    threads = [threading.Thread(target=_send, args=(port, waiting, load)) for _ in range(options.connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _send(port: int, waiting: list, load: Load) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    while waiting:
        try:
            index, sequence = waiting.pop()
        except IndexError:  # another connection took the last one
            break
        body = json.dumps({"input": sequence, "encoding_format": "base64"})
        started = time.perf_counter()
        try:
            connection.request("POST", "/v1/embeddings", body, HEADERS)
            reply = connection.getresponse()
            text = reply.read()
        except (OSError, http.client.HTTPException) as error:
            load.errors.append(f"{type(error).__name__}: {error}")
            connection.close()
            continue
        load.seconds.append(time.perf_counter() - started)
        if reply.status != 200:
            load.errors.append(f"{reply.status}: {text[:200].decode(errors='replace')}")
            continue
        (item,) = json.loads(text)["data"]
        load.vectors[int(index)] = np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
    connection.close()


if __name__ == "__main__":
    main()
