"""Take timings in interleaved rounds, turn them into ratios, and file them.

Machines are shared and their speed drifts: two things are compared only by runs that alternate within one
process, and the ratio is the median of the ratios of each round. Beside seconds stand CPU seconds, which
other processes disturb less, and how many cores other processes used meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from describe_machine import describe_machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

RESULTS = Path(__file__).parent / "results"
GIB = 2**30


class SkippedError(Exception):
    """Raised by a part of a benchmark that cannot run here; says why."""


class Sample(NamedTuple):
    """One timing."""

    seconds: float
    cpu_seconds: float
    """Of this process, all threads."""
    others: float
    """Cores that other processes kept busy meanwhile; 0 where the system does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A number that a claim rests on, and the goal it is held against."""

    name: str
    value: float
    low: float | None = None
    """Smallest of the rounds."""
    high: float | None = None
    """Largest of the rounds."""
    cpu: float | None = None
    """The same by CPU seconds."""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    @property
    def goal(self) -> str:
        """The goal in words, empty without one."""
        words = [
            f"{word} {limit:g}"
            for word, limit in (("at least", self.at_least), ("at most", self.at_most))
            if limit is not None
        ]
        return " and ".join(words)


def take(action: Callable[[], object]) -> Sample:
    """Time one call.

    Args:
        action: What to run.

    Returns:
        The timing.
    """
    busy, cpu, start = busy_seconds(), time.process_time(), time.perf_counter()
    action()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    others = max(0.0, busy_seconds() - busy - cpu_seconds) / seconds if busy else 0.0
    return Sample(seconds, cpu_seconds, others)


def busy_seconds() -> float:
    """Seconds that all cores together were busy since the system started; 0 where it does not say."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _waiting, *rest = map(int, words)
    return (user + nice + system + sum(rest[:2])) / os.sysconf("SC_CLK_TCK")


def interleave(
    actions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    budget_s: float = float("inf"),
    min_rounds: int = 2,
    warm_up: bool = True,
) -> dict[str, list[Sample]]:
    """Run several things by turns; whoever goes first changes from round to round.

    Args:
        actions: What to run, by name.
        rounds: Most rounds.
        budget_s: After ``min_rounds`` no round starts that would likely end later than this.
        min_rounds: Fewest rounds.
        warm_up: Run a round before that does not count.

    Returns:
        Timings by name, one a round.

    Example:
        >>> found = interleave({"a": lambda: None, "b": lambda: None}, rounds=3)
        >>> [len(samples) for samples in found.values()]
        [3, 3]
    """
    samples: dict[str, list[Sample]] = {name: [] for name in actions}
    started = time.perf_counter()
    names = list(actions)
    for number in range(-int(warm_up), rounds):
        round_started = time.perf_counter()
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            sample = take(actions[name])
            if number >= 0:
                samples[name].append(sample)
        now = time.perf_counter()
        if number + 1 >= min_rounds and now - started + (now - round_started) > budget_s:
            break
    return samples


def ratio(
    name: str,
    over: Sequence[Sample],
    under: Sequence[Sample],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Figure:
    """Return the median of the rounds' ratios.

    Args:
        name: What the ratio says.
        over: Numerators.
        under: Denominators, from the same rounds.
        at_least: The goal.
        at_most: The goal.

    Returns:
        The figure, with its range over the rounds.

    Example:
        >>> slow, fast = [Sample(4, 4, 0), Sample(6, 6, 0)], [Sample(2, 2, 0), Sample(2, 2, 0)]
        >>> ratio("slow over fast", slow, fast, at_least=3).value
        2.5
    """
    seconds = [a.seconds / b.seconds for a, b in zip(over, under, strict=True)]
    cpu = [a.cpu_seconds / b.cpu_seconds for a, b in zip(over, under, strict=True) if b.cpu_seconds]
    return Figure(
        name=name,
        value=median(seconds),
        low=min(seconds),
        high=max(seconds),
        cpu=median(cpu) if cpu else None,
        at_least=at_least,
        at_most=at_most,
    )


def spread(samples: Sequence[Sample]) -> dict[str, float]:
    """Summarize timings.

    Args:
        samples: Of one thing.

    Returns:
        Median, smallest and largest seconds, median CPU seconds and the mean of the others' cores.
    """
    seconds = [sample.seconds for sample in samples]
    return {
        "seconds": median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "cpu_seconds": median(sample.cpu_seconds for sample in samples),
        "others": sum(sample.others for sample in samples) / len(samples),
        "rounds": len(samples),
    }


def available_bytes() -> int:
    """Return how much memory is available without swapping.

    Returns:
        Bytes; a very large number where the system does not say.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 2**62
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def random_dna(batch: int, length: int) -> Tensor:
    """Draw token ids of DNA letters, the same for the same shape.

    Args:
        batch: Rows.
        length: Tokens of a row.

    Returns:
        int64, shape ``(B, L)``.
    """
    import torch

    generator = torch.Generator().manual_seed(batch * length)
    return torch.tensor(list(b"ACGT"))[torch.randint(4, (batch, length), generator=generator)]


def rms(x: Tensor) -> float:
    """Root mean square in float64.

    Args:
        x: Any shape.

    Returns:
        The value.
    """
    return float(x.double().square().mean().sqrt())


def option_parser(description: str) -> argparse.ArgumentParser:
    """Start a command line with the options that every part has.

    Args:
        description: The script's docstring.

    Returns:
        A parser with ``--quick``, ``--threads``, ``--rounds``, ``--note`` and ``--results``.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smallest sizes: does the script work?")
    parser.add_argument("--threads", type=int, default=0, help="of matrix products; 0 leaves torch's choice")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds a comparison")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--results", type=Path, help="folder to write to (default: results, none if --quick)")
    return parser


def use_threads(threads: int) -> int:
    """Set torch's number of threads.

    Args:
        threads: 0 leaves it.

    Returns:
        The number in use.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def file_results(
    name: str,
    title: str,
    options: argparse.Namespace,
    *,
    figures: Sequence[Figure],
    tables: Mapping[str, Sequence[Mapping[str, object]]],
    remarks: Sequence[str] = (),
    packages: tuple[str, ...] = (),
) -> None:
    """Print a page and write it, with the same as JSON beside it.

    Args:
        name: Stem of the files.
        title: Heading of the page.
        options: Of the command line.
        figures: Ratios and shares, with their goals.
        tables: Rows by caption.
        remarks: Sentences: what was left out and why, what a figure means.
        packages: Further distributions whose versions count.
    """
    machine = describe_machine(("genoembed", "h5py", "numpy", "torch", "transformers", *packages))
    machine["threads"] = use_threads(0)
    settings = {key: value for key, value in vars(options).items() if key not in ("results", "note")}
    page = as_markdown(title, machine, options.note, settings, figures, tables, remarks)
    print(page)
    folder = options.results or (None if options.quick else RESULTS)
    if folder is None:
        return
    stored = {
        "machine": machine,
        "note": options.note,
        "settings": {
            key: str(value) if isinstance(value, Path) else value for key, value in settings.items()
        },
        "figures": [asdict(figure) | {"is_met": figure.is_met} for figure in figures],
        "tables": tables,
        "remarks": list(remarks),
    }
    write_files(folder, name, page, stored)


def write_files(folder: Path, name: str, page: str, stored: Mapping[str, object]) -> None:
    """Write a page and its JSON file, each at once: who is killed leaves the old one or the new one.

    Args:
        folder: Made if absent.
        name: Stem of the files.
        page: Markdown.
        stored: What goes into the JSON file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {".json": json.dumps(stored, indent=1, default=str) + "\n", ".md": page}
    for suffix, text in texts.items():
        staged = folder / f".{name}{suffix}.new"
        staged.write_text(text, encoding="utf-8")
        staged.replace(folder / f"{name}{suffix}")


def as_markdown(
    title: str,
    machine: Mapping[str, object],
    note: str,
    settings: Mapping[str, object],
    figures: Sequence[Figure],
    tables: Mapping[str, Sequence[Mapping[str, object]]],
    remarks: Sequence[str],
) -> str:
    """Format everything for people.

    Args:
        title: Heading.
        machine: Of ``describe_machine``.
        note: What else the machine was doing.
        settings: Of the command line.
        figures: Ratios and shares.
        tables: Rows by caption.
        remarks: Sentences.

    Returns:
        The text of a Markdown file.
    """
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in machine.items())]
    lines += [f"- settings: {', '.join(f'{key}={value}' for key, value in settings.items())}"]
    lines += [f"- note: {note or 'none'}", "", *figure_table(figures)]
    for caption, rows in tables.items():
        lines += ["", f"## {caption}", "", *row_table(rows)]
    lines += ["", *(f"- {remark}" for remark in remarks), ""] if remarks else [""]
    return "\n".join(lines)


def figure_table(figures: Iterable[Figure]) -> list[str]:
    """Format figures as lines of a Markdown table.

    Args:
        figures: Ratios and shares.

    Returns:
        Lines.
    """
    lines = [
        "| figure | value | range | by CPU time | goal | met |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    for figure in figures:
        extent = "" if figure.low is None or figure.high is None else f"{figure.low:.3g}-{figure.high:.3g}"
        cpu = "" if figure.cpu is None else f"{figure.cpu:.3g}"
        met = {None: "", True: "yes", False: "no"}[figure.is_met]
        lines.append(f"| {figure.name} | {figure.value:.3g} | {extent} | {cpu} | {figure.goal} | {met} |")
    return lines


def row_table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Format rows as lines of a Markdown table.

    Args:
        rows: Columns are those of all rows, in order of appearance.

    Returns:
        Lines; none for no rows.
    """
    if not rows:
        return ["(nothing)"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        lines.append("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return lines
