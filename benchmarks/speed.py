"""All claims about speed and growth, in one command: runs the parts and prints every ratio beside its goal.

Each part is a script of its own (``speed_NAME.py``, which takes more options) and runs in a process of its
own, one after the other; within a part, whatever is compared alternates. Figures of parts that were not asked
for are taken from the results that are there::

    python benchmarks/speed.py --before-src ../before --note "idle machine"
    python benchmarks/speed.py --quick
    python benchmarks/speed.py --parts limit extract
    python benchmarks/speed.py --parts limit extract two_jobs --instructions AVX512_CORE AVX2

With ``--instructions`` the parts about forward passes run again for each name, with oneDNN kept to these
instructions (``ONEDNN_MAX_CPU_ISA``), and their results lie in a folder of that name.

A full run takes about two hours on two cores. Evo 2 7B's geometry needs 14 GB of disk: name a folder with
``--evo2-7b``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from describe_machine import describe_machine
from measuring import RESULTS, Figure, figure_table, option_parser

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

HERE = Path(__file__).parent
PARTS = {
    "vortex": "StripedHyena 2 against Vortex",
    "limit": "Forward passes against their own matrix products",
    "extract": "extract against the usual ways, and its time outside the forward",
    "growth": "Growth of time and memory with the input",
    "training": "Training steps, and packed against padded",
    "two_jobs": "Two jobs at once",
}
SCRIPTS = {part: f"speed_{part}" for part in PARTS} | {"two_jobs": "two_jobs"}
"""Names of a part's script and of its results."""
OF_INSTRUCTIONS = ("limit", "extract")
"""What oneDNN's instructions change most."""


def part_command(part: str, options: argparse.Namespace, results: Path) -> list[str]:
    """Write the command line of a part.

    Args:
        part: Key of ``PARTS``.
        options: Of this command.
        results: Folder to write to.

    Returns:
        Words.
    """
    words = [sys.executable, str(HERE / f"{SCRIPTS[part]}.py"), "--results", str(results)]
    if part != "two_jobs":  # two threads each, or it would say nothing
        words += ["--threads", str(options.threads)]
    words += ["--rounds", str(options.rounds), "--note", options.note]
    words += ["--quick"] * options.quick
    if part == "training" and options.before_src is not None:
        words += ["--before-src", str(options.before_src)]
    return words


def run_part(words: Sequence[str], *, instructions: str | None = None) -> float:
    """Run a part to its end; what it prints is shown.

    Args:
        words: Its command line.
        instructions: The most that oneDNN may use; None leaves it alone.

    Returns:
        Seconds.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    started = time.perf_counter()
    chosen = {} if instructions is None else {"ONEDNN_MAX_CPU_ISA": instructions}
    subprocess.run(words, check=True, env=os.environ | chosen)
    return time.perf_counter() - started


def stored_figures(results: Path, part: str) -> list[Figure]:
    """Read what a part found.

    Args:
        results: Folder of the results.
        part: Key of ``PARTS``.

    Returns:
        Its figures; none where it never ran.
    """
    path = results / f"{SCRIPTS[part]}.json"
    if not path.is_file():
        return []
    figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return [Figure(**{key: value for key, value in row.items() if key != "is_met"}) for row in figures]


def summary(results: Path, facts: dict[str, object], *, instructions: Sequence[str] = ()) -> str:
    """Format all figures for people.

    Args:
        results: Folder of the parts' results.
        facts: Machine, note, parts that ran or failed.
        instructions: Names of the folders in it with results of fewer instructions.

    Returns:
        The text of a Markdown file.
    """
    lines = ["# Speed and growth", "", *(f"- {key}: {value}" for key, value in facts.items())]
    missed = 0
    places = [(part, results, title) for part, title in PARTS.items()]
    places += [
        (part, results / name.lower(), f"{PARTS[part]}, at most {name}")
        for name in instructions
        for part in OF_INSTRUCTIONS
    ]
    for part, folder, title in places:
        figures = stored_figures(folder, part)
        missed += sum(figure.is_met is False for figure in figures)
        if figures:
            page = (folder / f"{SCRIPTS[part]}.md").relative_to(results)
            lines += ["", f"## {title}", "", *figure_table(figures)]
            lines += ["", f"Settings, times and remarks: `{page}`."]
    lines += ["", f"Goals missed: {missed}.", ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes the process's own.

    Returns:
        Exit status: 1 where a part failed.
    """
    parser = option_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--instructions", nargs="+", default=[], help="for oneDNN, such as AVX2; see above")
    parser.add_argument("--before-src", type=Path, help="checkout of an older version, for the training step")
    parser.add_argument("--evo2-7b", type=Path, help="folder for 13 GB of weights: runs that geometry too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        results = (options.results or (Path(scratch) if options.quick else RESULTS)).resolve()
        commands = {part: part_command(part, options, results) for part in options.parts}
        chosen: dict[str, str] = {}
        for name in options.instructions:
            for part in (part for part in OF_INSTRUCTIONS if part in options.parts):
                (results / name.lower()).mkdir(parents=True, exist_ok=True)
                commands[f"{part} ({name})"] = part_command(part, options, results / name.lower())
                chosen[f"{part} ({name})"] = name
        if options.evo2_7b is not None:
            words = [sys.executable, str(HERE / "evo2_7b_geometry.py"), str(options.evo2_7b)]
            words += ["--note", options.note, "--json", str(results / "evo2_7b_geometry.json")]
            commands["evo2_7b"] = words + (["--threads", str(options.threads)] if options.threads else [])
        took, failed = {}, []
        for part, words in commands.items():
            print(f"== {part}", flush=True)
            try:
                took[part] = round(run_part(words, instructions=chosen.get(part)))
            except subprocess.CalledProcessError as error:
                failed.append(f"{part} (exit status {error.returncode})")
        facts = {**describe_machine(), "note": options.note or "none", "seconds of the parts": took}
        if failed:
            facts["failed"] = ", ".join(failed)
        page = summary(results, facts, instructions=options.instructions)
        if not options.quick or options.results:
            (results / "speed.md").write_text(page, encoding="utf-8")
            figures = {
                part: json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["figures"]
                for part, name in SCRIPTS.items()
                if (results / f"{name}.json").is_file()
            }
            stored = {**facts, "figures": figures}
            (results / "speed.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print(f"\n{page}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
