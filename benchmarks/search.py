"""Search: recall@10 of the approximate index against exact search, speed of both, build time and memory.

Clustered vectors (each a center and noise; queries are new members of the clusters) and, on fewer rows,
uniform noise, where no index can do well: the nearest row is hardly nearer than any other. CPU seconds count,
since they depend less on who else uses the machine::

    OMP_NUM_THREADS=1 python benchmarks/search.py --output benchmarks/results/search.json
    OMP_NUM_THREADS=1 python benchmarks/search.py --rows 20000 --noise-rows 5000
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from describe_machine import describe_machine

from genoembed.pipeline.embedding_file import VectorSource
from genoembed.searching.index import BUILD_EFFORT, CONNECTIVITY, Origin, open_index
from genoembed.searching.neighbors import exact_neighbors
from genoembed.searching.run import recall_of
from genoembed.store.schema import LazyMatrix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WIDTH, K = 128, 10
EFFORTS = (32, 64, 128, 256, 512)
_BLOCK = 10_000
_CHUNK = (512, WIDTH)


@dataclass(frozen=True)
class Vectors:
    """How rows are drawn."""

    clusters: int
    """0 is uniform noise."""
    spread: float
    """Deviation of a member from its center, relative to that of the centers."""
    seed: int = 0

    def draw(self, count: int, *, part: int) -> np.ndarray:
        """Draw rows, the same for the same part."""
        noise = np.random.default_rng([self.seed, 1, part])
        rows = noise.standard_normal((count, WIDTH), dtype=np.float32)
        if self.clusters:
            centers = np.random.default_rng([self.seed, 0])
            table = centers.standard_normal((self.clusters, WIDTH), dtype=np.float32)
            rows = table[noise.integers(0, self.clusters, count)] + self.spread * rows
        return rows


def measure(kind: Vectors, num_rows: int, *, queries: int, exact_queries: int) -> dict[str, Any]:
    """Write vectors to a file, search it both ways, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vectors.h5")
        with h5py.File(path, "w") as file:
            data = file.create_dataset("X", (num_rows, WIDTH), "f4", chunks=_CHUNK)
            for number, start in enumerate(range(0, num_rows, _BLOCK)):
                stop = min(start + _BLOCK, num_rows)
                data[start:stop] = kind.draw(stop - start, part=number)
        with h5py.File(path, "r") as file:
            source = VectorSource(LazyMatrix(file["X"], str(path)))
            asked = kind.draw(queries, part=1_000_000)
            return _compare(source, path, asked, asked[:exact_queries])


def _compare(source: VectorSource, path: Path, asked: np.ndarray, sample: np.ndarray) -> dict[str, Any]:
    exact, exact_cost = timed(lambda: exact_neighbors(sample, source, k=K))
    one, one_cost = timed(lambda: exact_neighbors(sample[:1], source, k=K))
    assert (one.rows == exact.rows[:1]).all()
    before = peak_mib()
    origin = Origin(path=path, layer="X", metric="cosine", transform=None)
    (_, where, is_new), build_cost = timed(lambda: open_index(source, origin))
    assert is_new
    after = peak_mib()
    (index, _, is_new), load_cost = timed(lambda: open_index(source, origin))
    assert not is_new
    index.neighbors(asked, source, k=K)  # brings the mapped pages in
    rows = []
    for effort in EFFORTS:
        found, cost = timed(lambda e=effort: index.neighbors(asked, source, k=K, effort=e))
        part = type(found)(found.rows[: len(sample)], found.scores[: len(sample)])
        recall = recall_of(part, exact, metric="cosine")
        rows.append({"effort": effort, "recall": recall, **rates(len(asked), cost)})
    return {
        "rows": len(source),
        "queries": len(asked),
        "exact_queries": len(sample),
        "vectors_mib": len(source) * WIDTH * 4 / 2**20,
        "index_mib": where.stat().st_size / 2**20,
        "exact": rates(len(sample), exact_cost),
        "exact_single": rates(1, one_cost),
        "build": build_cost,
        "open": load_cost,
        "peak_mib_before_build": before,
        "peak_mib_after_build": after,
        "approximate": rows,
    }


def timed(action: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Run something; give what it gives, and its seconds by the clock and by the CPU."""
    started, cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}


def rates(count: int, cost: dict[str, float]) -> dict[str, float]:
    """Return queries per second and CPU second."""
    return {**cost, "per_s": count / cost["seconds"], "per_cpu_s": count / cost["cpu_s"]}


def peak_mib() -> float:
    """Largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def as_markdown(figures: dict[str, Any], machine: dict[str, Any], note: str) -> str:
    """Write the figures for people."""
    facts = {**machine, **({"note": note} if note else {})}
    lines = [
        "# Search: approximate against exact",
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
    ]
    lines += [
        f"- settings: width {WIDTH}, cosine, k = {K}, one thread; graph with {CONNECTIVITY} neighbors a "
        f"node, built with effort {BUILD_EFFORT}",
        "- recall@10: share of the true ten neighbors (exact search, float64) that the index finds",
        "- queries/s are for each CPU second; the clock's stand in the JSON file",
    ]
    for name, found in figures.items():
        lines += [
            "",
            f"## {name}: {found['rows']:,} rows ({found['vectors_mib']:,.0f} MiB of vectors)",
            "",
            "| search | recall@10 | queries/s |",
            "| --- | ---: | ---: |",
            f"| exact, {found['exact_queries']:,} together | 1 | {found['exact']['per_cpu_s']:,.1f} |",
            f"| exact, one query | 1 | {found['exact_single']['per_cpu_s']:,.2f} |",
        ]
        lines += [
            f"| index, effort {row['effort']} | {row['recall']:.4f} | {row['per_cpu_s']:,.0f} |"
            for row in found["approximate"]
        ]
        lines += [
            "",
            f"Build: {found['build']['cpu_s']:,.0f} CPU s ({found['build']['seconds']:,.0f} s), index of "
            f"{found['index_mib']:,.0f} MiB; peak memory {found['peak_mib_before_build']:,.0f} MiB before, "
            f"{found['peak_mib_after_build']:,.0f} MiB after. Opening it again: "
            f"{found['open']['cpu_s']:.2f} CPU s.",
        ]
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(description="Recall, speed and memory of search.")
    parser.add_argument("--rows", type=int, default=1_000_000, help="clustered vectors (default 1,000,000)")
    parser.add_argument("--noise-rows", type=int, default=100_000, help="vectors of noise (default 100,000)")
    parser.add_argument("--queries", type=int, default=10_000, help="for the index (default 10,000)")
    parser.add_argument("--exact-queries", type=int, default=500, help="for both (default 500)")
    parser.add_argument("--clusters", type=int, default=10_000, help="default 10,000")
    parser.add_argument("--spread", type=float, default=0.7, help="of a cluster (default 0.7)")
    parser.add_argument("--output", type=Path, help="JSON file to write, and a .md beside it")
    parser.add_argument("--note", default="", help="state of the machine, for the results")
    options = parser.parse_args(arguments)
    counts = {"queries": options.queries, "exact_queries": options.exact_queries}
    figures: dict[str, Any] = {}
    for name, kind, rows in (
        ("uniform noise", Vectors(0, 1.0), options.noise_rows),
        ("clustered", Vectors(options.clusters, options.spread), options.rows),
    ):
        figures[name] = measure(kind, rows, **counts)
        machine = describe_machine(("genoembed", "h5py", "numpy", "usearch"))
        text = as_markdown(figures, machine, options.note)
        if options.output:
            result = {"machine": machine, "note": options.note, "figures": figures}
            options.output.write_text(json.dumps(result, indent=1) + "\n")
            options.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
