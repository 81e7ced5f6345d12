"""What a look at all layers costs: one pass that keeps 32 layers, against passes that keep one.

Writes two-class sequences, then runs ``extract`` with ``layers='all'``, with the last layer, and with
layer 28 (whose pass stops after it), by turns, each in a process of its own, so that each has its own peak of
memory. Seconds are those of ``extract``, without loading the model; the goal is held against CPU seconds.
Then ``probe`` runs on the file of all layers: all of them and their fusions, with baselines, without the
untrained copy (which is one more pass).

Example::

    OMP_NUM_THREADS=1 nice -n 5 python benchmarks/layer_sweep.py --threads 1 --sequences 2000 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from measuring import Figure, Sample, file_results, option_parser, ratio, spread, use_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

PASSES = {"all 32 layers": "all", "layer 31 alone": "31", "layer 28 alone": "28"}
GOAL = 1.5
_MIB = 2**20


def write_sequences(folder: Path, *, number: int, bases: int) -> None:
    """Write sequences of two kinds, which differ in how often C follows A, and their labels.

    Args:
        folder: Where ``two.fa`` and ``labels.tsv`` go.
        number: Sequences.
        bases: Of each.
    """
    random = np.random.default_rng(0)
    kinds = np.full((2, 4, 4), 0.25)
    kinds[1, 0] = (0.15, 0.55, 0.15, 0.15)
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)
    with (
        (folder / "two.fa").open("w", encoding="ascii") as fasta,
        (folder / "labels.tsv").open("w", encoding="ascii") as table,
    ):
        table.write("id\tlabel\n")
        for row in range(number):
            steps, state = kinds[row % 2].cumsum(axis=1), 0
            codes = []
            for draw in random.random(bases):
                state = min(int(np.searchsorted(steps[state], draw)), 3)
                codes.append(state)
            fasta.write(f">s{row}\n{letters[codes].tobytes().decode()}\n")
            table.write(f"s{row}\t{'ab'[row % 2]}\n")


def run_child(folder: Path, words: Sequence[object]) -> dict[str, float]:
    """Run one measurement in a process of its own.

    Args:
        folder: With the sequences.
        words: Which one.

    Returns:
        What it prints.
    """
    ran = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, words), "--folder", str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(ran.stdout.splitlines()[-1])


def measure_child(options: argparse.Namespace) -> dict[str, float]:
    """Extract or probe here, and say what it took.

    Args:
        options: ``child`` names the layers, or ``probe``.

    Returns:
        Seconds, CPU seconds and memory in MiB before and at the peak.
    """
    import genoembed

    use_threads(options.threads)
    folder = options.folder
    if options.child == "probe":
        import sklearn  # noqa: F401 - loaded before the clock starts
    else:
        model = genoembed.load_model("genoembed-mini", device="cpu", dtype="float32")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started, cpu = time.perf_counter(), time.process_time()
    if options.child == "probe":
        genoembed.probe(
            folder / "all.h5",
            labels=folder / "labels.tsv",
            output=folder / "probe",
            untrained=False,
            overwrite=True,
        )
        size = (folder / "all.h5").stat().st_size
    else:
        output = folder / f"{options.child}.h5"
        genoembed.extract(
            folder / "two.fa",
            model=model,
            layers=options.child,
            pooling="mean",
            output=output,
            overwrite=True,
        )
        size = output.stat().st_size
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "before_mib": before,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "file_mib": size / _MIB,
    }


def measure(
    options: argparse.Namespace, folder: Path
) -> tuple[list[Figure], dict[str, list[dict[str, object]]]]:
    """Run everything.

    Args:
        options: Of the command line.
        folder: To work in.

    Returns:
        Figures and tables.
    """
    write_sequences(folder, number=options.sequences, bases=options.bases)
    samples: dict[str, list[Sample]] = {name: [] for name in PASSES}
    peaks: dict[str, dict[str, float]] = {}
    names = list(PASSES)
    for number in range(options.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found = run_child(folder, [PASSES[name], "--threads", options.threads])
            samples[name].append(Sample(found["seconds"], found["cpu_seconds"], 0.0))
            peaks[name] = found
            print(name, {key: round(value, 1) for key, value in found.items()}, file=sys.stderr, flush=True)
    all_layers, last, shallow = (samples[name] for name in names)
    figures = [
        _by_cpu("all 32 layers over layer 31 alone, CPU seconds", all_layers, last, at_most=GOAL),
        _by_cpu("all 32 layers over layer 28 alone (stops early), CPU seconds", all_layers, shallow),
        ratio("all 32 layers over layer 31 alone, wall seconds", all_layers, last),
    ]
    rows = [
        {
            "pass": name,
            **{key: value for key, value in spread(samples[name]).items() if key != "others"},
            "kb/s": options.sequences * options.bases / 1000 / spread(samples[name])["seconds"],
            "peak MiB": peaks[name]["peak_mib"],
            "of it before the pass": peaks[name]["before_mib"],
            "file MiB": peaks[name]["file_mib"],
        }
        for name in PASSES
    ]
    tables: dict[str, list[dict[str, object]]] = {"One pass": rows}
    if options.probe:
        found = run_child(folder, ["probe", "--threads", options.threads])
        tables["The probe: 32 layers, four fusions, three baselines, five folds"] = [dict(found)]
    return figures, tables


def _by_cpu(
    name: str, over: Sequence[Sample], under: Sequence[Sample], *, at_most: float | None = None
) -> Figure:
    """Return the ratio of the work: on a machine that others use, wall seconds are mostly waiting."""
    work = [[Sample(one.cpu_seconds, one.cpu_seconds, 0.0) for one in side] for side in (over, under)]
    return ratio(name, *work, at_most=at_most)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and file."""
    parser = option_parser(__doc__)
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--bases", type=int, default=300, help="of each sequence")
    parser.add_argument("--probe", action=argparse.BooleanOptionalAction, default=True, help="time it too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(measure_child(options)))
        return
    if options.quick:
        options.sequences, options.bases, options.rounds = 12, 40, 1
    with tempfile.TemporaryDirectory() as folder:
        figures, tables = measure(options, Path(folder))
    for name in ("child", "folder"):
        delattr(options, name)
    file_results(
        "layer_sweep",
        "All layers in one pass",
        options,
        figures=figures,
        tables=tables,
        remarks=[
            "Each pass is a process of its own; the passes take turns. Seconds are those of extract, without "
            "loading the model; memory is the resident peak of the whole process.",
            "The probe runs on the file, without the model; the untrained copy would be one more pass.",
        ],
        packages=("scikit-learn",),
    )


if __name__ == "__main__":
    main()
