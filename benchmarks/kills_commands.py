"""``kill -9`` at random moments of every command that writes: is anything lost, half-written or left over?

Each command runs as the promise matrix runs it (``tests/promises/columns.py``): tiny input and model, forked
from a process that has imported everything, so that the moments fall into the run and not into imports. After
each kill the output must be the old one or the new one; then the same command is run again, to its end: its
result must be that of an undisturbed run, and nothing may lie beside it. Every second kill hits a run that
replaces an output (``--overwrite``)::

    python benchmarks/kills_commands.py --note "shared machine"
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import h5py
from measuring import Figure, file_results, option_parser

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.promises.columns import COLUMNS, VARIANTS, Column, build_world
from tests.promises.warm import WarmStarter

COMMANDS: dict[str, Column] = {
    "extract": replace(COLUMNS["extract"], words=(*COLUMNS["extract"].words, "--unit-bases", "100")),
    "merge": COLUMNS["merge"],
    "score": replace(COLUMNS["score"], words=("seqs.fa", *COLUMNS["score"].words[1:])),
    "score --vcf": VARIANTS,
    "predict": replace(COLUMNS["predict"], words=("tuned/final", "seqs.fa", "--threads", "1")),
    "probe": COLUMNS["probe"],
    "finetune": COLUMNS["finetune"],
    "pretrain": COLUMNS["pretrain"],
    "search --index": replace(
        COLUMNS["search"], words=(*COLUMNS["search"].words, "--approximate", "--index", "near.index")
    ),
    "convert": COLUMNS["convert"],
    "generate": replace(
        COLUMNS["generate"], words=("seqs.fa", *COLUMNS["generate"].words[1:3], "-n", "40", "--length", "8")
    ),
}
MAY_STAY = ("near.index", "near.index.json")
"""Written beside the output on purpose."""
UNSTABLE = ("seconds", "created", "output", "embeddings", "plots", "was_extracted")
"""Facts of a summary that differ from run to run."""


def content(target: Path) -> str | None:
    """Digest what an output says; None where it is not there, or is a run that is not over."""
    if target.suffix == ".h5" and target.is_file():
        with h5py.File(target) as file:
            return _digest(file["X"][:].tobytes(), *file["obs"][file["obs"].attrs["_index"]][:])
    if target.is_file():
        return _digest(target.read_bytes())
    weights = [path for path in (target / "final" / "model.safetensors", target / "model.safetensors")]
    for path in weights:
        if path.is_file():
            return _digest(path.read_bytes())
    if (target / "probe.json").is_file():
        summary = json.loads((target / "probe.json").read_text())
        stable = {key: value for key, value in summary.items() if key not in UNSTABLE}
        return _digest(json.dumps(stable, sort_keys=True).encode())
    return None


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def measure_command(
    name: str, column: Column, made: Path, scratch: Path, starter: WarmStarter, *, kills: int, seed: int
) -> Counter[str]:
    """Kill a command, over and over.

    Args:
        name: The command, and what tells it from others of the same.
        column: How it is run.
        made: Folder with what it reads; copied for each kill.
        scratch: For the copies.
        starter: Starts the processes.
        kills: How many must hit a run.
        seed: Of the moments.

    Returns:
        Counts: kills, and what went wrong.
    """
    words = column.call(name.split()[0])
    output = column.output[1]
    world = shutil.copytree(made, scratch / "world")
    before = {path.name for path in world.iterdir()}
    began = time.monotonic()
    ran = starter.run(*words, cwd=world)
    usual_s = time.monotonic() - began
    if ran.code != 0:
        raise RuntimeError(f"{name}: {ran.err}")
    new = content(world / output)
    finished = scratch / "finished"
    world.rename(finished)
    draw, found = random.Random(seed), Counter(kills=0)
    while found["kills"] < kills:
        replaces = found["kills"] % 2 == 1 and column.output[0] != ""
        world = shutil.copytree(finished if replaces else made, scratch / "world")
        more = ["--overwrite"] if replaces else []
        running = starter.start(*words, *more, cwd=world)
        time.sleep(draw.uniform(0, usual_s))
        if running.has_ended:
            shutil.rmtree(world)
            continue
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        found["kills"] += 1
        there = content(world / output)
        found["half-written"] += there not in (None, new)
        found["old output lost"] += replaces and there != new
        found["left beside it by the kill"] += bool(
            {path.name for path in world.iterdir()} - before - {output}
        )
        again = starter.run(
            *words, *more, *(column.resume if (world / output).exists() and not replaces else ()), cwd=world
        )
        if again.code != 0 and (world / output).exists() and not replaces:
            again = starter.run(*words, "--overwrite", cwd=world)
        found["reruns that failed"] += again.code != 0
        if again.code != 0:
            print(f"{name}: {again.err}", flush=True)
        found["results that differ"] += content(world / output) != new
        rest = {path.name for path in world.iterdir()} - before - {output, *MAY_STAY}
        if rest:
            print(f"{name}: {sorted(rest)}", flush=True)
        found["leftovers after the rerun"] += bool(rest)
        shutil.rmtree(world)
    shutil.rmtree(finished)
    return found


def main() -> None:
    """Measure what the command line asks for."""
    parser = option_parser(__doc__)
    parser.add_argument("--kills", type=int, default=25, help="of each command")
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    options = parser.parse_args()
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    starter = WarmStarter()
    rows, total = [], Counter()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        made = Path(folder) / "made"
        made.mkdir()
        build_world(made, starter.run)
        for number, name in enumerate(options.commands):
            scratch = Path(folder) / str(number)
            scratch.mkdir()
            kills = 3 if options.quick else options.kills
            found = measure_command(name, COMMANDS[name], made, scratch, starter, kills=kills, seed=number)
            rows.append({"command": name, **found})
            total += found
            print(rows[-1], flush=True)
    starter.close()
    wrong = ("half-written", "old output lost", "reruns that failed", "results that differ")
    file_results(
        "kills_commands",
        "Killed runs of every command that writes",
        options,
        figures=[
            Figure(name="kills that hit", value=total["kills"], at_least=len(options.commands) * 25),
            *(
                Figure(name=what, value=total[what], at_most=0)
                for what in (*wrong, "leftovers after the rerun")
            ),
        ],
        tables={"commands": rows},
        remarks=["'Left beside it by the kill' is unfinished work, which the rerun goes on with or removes."],
    )


if __name__ == "__main__":
    main()
