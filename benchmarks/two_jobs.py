"""Two ``genoembed extract`` at once on the same cores, against two in a row, by how OpenMP's threads wait.

Each job is a process of its own with two threads (``--threads``), as a user starts it: variables of OpenMP in
this shell are left out. Ways of waiting: what the command line sets by itself, OpenMP's default, asleep at
once, and numbers of turns that are given. Every round runs, by each way, one job alone and two at once.

Example::

    python benchmarks/two_jobs.py --rounds 5
    python benchmarks/two_jobs.py --quick
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from measuring import Sample, busy_seconds, file_results, option_parser, ratio, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

OURS, BEFORE = "the command line's own", "OpenMP's default"
WAYS: dict[str, dict[str, str]] = {
    OURS: {},
    BEFORE: {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"},
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
}
LEFT_OUT = ("OMP_", "GOMP_", "KMP_", "MKL_NUM")
TOGETHER, ALONE = 1.1, 1.05
"""Goals: two at once over two in a row, and alone over alone with OpenMP's default."""


def environment(way: Mapping[str, str]) -> dict[str, str]:
    """Return this shell's variables but for those of OpenMP, and those of a way of waiting."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_OUT)}
    return {**kept, **way}


def write_input(path: Path, *, records: int, bases: int) -> None:
    """Write random records of one length."""
    draw = random.Random(0)
    lines = [f">r{number}\n{''.join(draw.choices('ACGT', k=bases))}\n" for number in range(records)]
    path.write_text("".join(lines), encoding="ascii")


def run_jobs(number: int, folder: Path, way: Mapping[str, str], *, threads: int, dtype: str) -> Sample:
    """Run some jobs at once, and take the time until the last one has ended."""
    before, busy, start = resource.getrusage(resource.RUSAGE_CHILDREN), busy_seconds(), time.perf_counter()
    words = [
        sys.executable,
        "-m",
        "genoembed",
        "extract",
        str(folder / "in.fa"),
        "--overwrite",
        "--dtype",
        dtype,
    ]
    jobs = [
        subprocess.Popen(
            [*words, "--threads", str(threads), "-o", str(folder / f"out{job}.h5")],
            env=environment(way),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for job in range(number)
    ]
    if any([job.wait() for job in jobs]):
        message = f"'{' '.join(words)}' failed"
        raise RuntimeError(message)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    others = max(0.0, busy_seconds() - busy - cpu_seconds) / seconds if busy else 0.0
    return Sample(seconds, cpu_seconds, others)


def measure(actions: Mapping[str, Callable[[], Sample]], *, rounds: int) -> dict[str, list[Sample]]:
    """Take turns; whoever goes first changes from round to round."""
    samples: dict[str, list[Sample]] = {name: [] for name in actions}
    names = list(actions)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(actions[name]())
            print(f"{name}: {samples[name][-1].seconds:.1f} s", file=sys.stderr)
    return samples


def main() -> None:
    """Measure, print, and write the results."""
    parser = option_parser(__doc__)
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--bases", type=int, default=1000, help="of a record")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--spins", type=int, nargs="*", default=[], help="more ways: turns before sleep")
    parser.set_defaults(threads=2)
    options = parser.parse_args()
    ways = WAYS | {f"{turns} turns": {"GOMP_SPINCOUNT": str(turns)} for turns in options.spins}
    if options.quick:
        ways, options.rounds, options.records, options.bases = {OURS: {}, BEFORE: WAYS[BEFORE]}, 1, 2, 60
    with tempfile.TemporaryDirectory() as name:
        write_input(Path(name, "in.fa"), records=options.records, bases=options.bases)
        run = partial(run_jobs, folder=Path(name), threads=options.threads, dtype=options.dtype)
        if not options.quick:
            run(1, way={})  # compiles modules, and measures products in bfloat16
        actions = {
            f"{way}, {'alone' if number == 1 else 'two at once'}": partial(run, number, way=variables)
            for way, variables in ways.items()
            for number in (1, 2)
        }
        samples = measure(actions, rounds=options.rounds)
    figures = []
    for way in ways:
        alone, both = samples[f"{way}, alone"], samples[f"{way}, two at once"]
        in_a_row = [Sample(2 * one.seconds, 2 * one.cpu_seconds, one.others) for one in alone]
        is_ours = way == OURS
        goal = TOGETHER if is_ours else None
        figures.append(ratio(f"{way}: two at once over two in a row", both, in_a_row, at_most=goal))
        if way != BEFORE:
            before = samples[f"{BEFORE}, alone"]
            goal = ALONE if is_ours else None
            figures.append(ratio(f"{way}: alone over alone with {BEFORE}", alone, before, at_most=goal))
    rows = [{"jobs": name} | spread(found) for name, found in samples.items()]
    file_results("two_jobs", "Two jobs at once", options, figures=figures, tables={"seconds": rows})


if __name__ == "__main__":
    main()
