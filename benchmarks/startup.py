"""CPU time until a command answers, as ratios to a bare ``import torch``, and the wait for its first line.

Each command runs in a fresh interpreter, all of them in turn, several rounds; the least CPU time (user and
system) of each counts. Modules are compiled before the first round, as they are in an installed package.

Example::

    python benchmarks/startup.py --rounds 7 --output benchmarks/results/startup.md
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from describe_machine import describe_machine

IMPORT_TORCH = "import torch"
GOALS = {
    "extract one record": "1.4 x import torch",
    "extract a missing file": "0.5 s",
    "models": "0.3 s",
    "info": "0.3 s",
    "--help": "0.3 s",
    "extract --help": "0.3 s",
    "finetune --help": "0.3 s",
}


def commands(folder: Path) -> dict[str, list[str]]:
    """Name the commands; inputs and outputs are in the folder."""
    genoembed = ["-m", "genoembed"]
    record, file = folder / "one.fa", folder / "one.h5"
    record.write_text(">one\n" + "ACGTTGCATG" * 10 + "\n")
    return {
        IMPORT_TORCH: ["-c", IMPORT_TORCH],
        "import transformers' model class": ["-c", "from transformers import PreTrainedModel"],
        "extract one record": [*genoembed, "extract", str(record), "-o", str(file), "--overwrite"],
        "score one record": [*genoembed, "score", str(record)],
        "extract a missing file": [*genoembed, "extract", str(folder / "nothere.fa")],
        "models": [*genoembed, "models"],
        "layers": [*genoembed, "layers"],
        "info": [*genoembed, "info", str(file)],
        "--help": [*genoembed, "--help"],
        "extract --help": [*genoembed, "extract", "--help"],
        "finetune --help": [*genoembed, "finetune", "--help"],
    }


def cpu_seconds(words: list[str], environment: dict[str, str]) -> float:
    """Run Python and measure the CPU time of the process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], env=environment, capture_output=True, check=False, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_line_seconds(words: list[str], environment: dict[str, str]) -> float:
    """Measure the wall time until a command's first line on standard error."""
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()
        waited = time.perf_counter() - begin
        process.stderr.read()
    return waited


def measure(folder: Path, *, rounds: int, names: list[str] | None = None) -> dict[str, float]:
    """Return the least CPU seconds of each command, and the least wait for the first line of ``extract``."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPYCACHEPREFIX": str(folder / "compiled"), "OMP_NUM_THREADS": "1"}
    chosen = {name: words for name, words in commands(folder).items() if names is None or name in names}
    least: dict[str, float] = {}
    for _ in range(rounds + 1):  # the first one compiles
        for name, words in chosen.items():
            seconds = cpu_seconds(words, environment)
            least[name] = min(least.get(name, seconds), seconds)
    if "extract one record" in chosen:
        waits = [first_line_seconds(chosen["extract one record"], environment) for _ in range(rounds)]
        least["wait for the first line of extract (wall)"] = min(waits)
    return least


def table(seconds: dict[str, float]) -> str:
    """Lay the figures out for people."""
    torch_s = seconds[IMPORT_TORCH]
    lines = ["| what | CPU s | x import torch | goal |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {value:.2f} | {value / torch_s:.2f} | {GOALS.get(name, '')} |"
        for name, value in seconds.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder), rounds=options.rounds)
    print(table(seconds))
    if options.output is not None:
        machine = describe_machine()
        said = ", ".join(f"{key} {value}" for key, value in machine.items())
        heading = f"# Start-up\n\nLeast of {options.rounds} interleaved rounds, one thread. {said}.\n\n"
        options.output.write_text(f"{heading}{table(seconds)}\n")
        figures = {"machine": machine, "rounds": options.rounds, "seconds": seconds}
        options.output.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
