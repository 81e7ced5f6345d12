"""What a run says: log lines and progress on standard error; results as plain text or JSON.

Lines go through ``logging``, so that a reader who went away (``2>&1 | head``) cannot stop a run. Progress is
a bar where standard error is a terminal, else a line every few seconds. Numbers and tables are plain text
that people read and ``grep`` and ``awk`` take.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import click

from genoembed.errors import GenoembedWarning, visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from genoembed import (
        ExtractionReport,
        GenerationReport,
        InputCounts,
        MutationReport,
        PredictionReport,
        ScoreReport,
        VariantReport,
    )


INCOMPLETE = 3
"""Exit status: done, but some records failed."""
_LIBRARY_LEVELS = ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY")
_SUMMED_UP = ("genoembed.sequences", "genoembed.store")
_SHOWN_AT_ONCE = ("genoembed.sequences.annotation",)
"""Of these, modules whose lines the summary does not repeat."""
_logger = logging.getLogger("genoembed")


class LineHandler(logging.Handler):
    """Writes each record as one line to what is standard error at that moment."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Leave out what the summary says in other words, unless everything is requested."""
        is_summed_up = record.name.startswith(_SUMMED_UP) and record.name not in _SHOWN_AT_ONCE
        told_later = is_summed_up and record.levelno <= logging.INFO
        return bool(super().filter(record)) and (not told_later or _logger.isEnabledFor(logging.DEBUG))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        if sys.stderr is None:  # closed by the caller
            return
        mark = "Warning: " if record.levelno >= logging.WARNING else ""
        try:
            sys.stderr.write(mark + visible(" ".join(record.getMessage().splitlines())) + "\n")
            sys.stderr.flush()
        except OSError:  # nobody reads it any more, which is no reason to stop
            pass


@contextmanager
def reporting(*, quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """Show log lines and warnings of ours; other libraries' only if requested."""
    handler, level = LineHandler(), _logger.level
    environment = {name: os.environ.get(name) for name in _LIBRARY_LEVELS}
    _logger.addHandler(handler)
    _logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        os.environ.update({name: os.environ.get(name) or "error" for name in _LIBRARY_LEVELS})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default" if verbose else "ignore")
            warnings.simplefilter("once", GenoembedWarning)
            warnings.showwarning = _show_warning
            yield
    finally:
        _logger.removeHandler(handler)
        _logger.setLevel(level)
        _restore(environment)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    place = "" if issubclass(category, GenoembedWarning) else f"{category.__name__}: "
    _logger.warning("%s%s", place, message)


def _restore(environment: dict[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def echo_result(facts: object, text: str, *, as_json: bool) -> None:
    """Print what came of a command: one JSON object, or lines for people."""
    click.echo(json.dumps(_plain(facts)) if as_json else visible(text))


def _plain(value: Any) -> Any:
    """Turn reports into what JSON has; NaN and infinity, which it has not, become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):  # a named tuple
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def destination(*names: str | None) -> str:
    """Say where results went.

    Example:
        >>> destination("-"), destination(None, "a.tsv", "a.h5")
        ('standard output', 'a.tsv, a.h5')
    """
    return ", ".join("standard output" if name == "-" else name for name in names if name is not None)


def wrote(*names: object) -> None:
    """Name what was written, as the last line of standard error."""
    logging.getLogger("genoembed.cli").info("wrote %s", ", ".join(map(str, names)))


_STEP = 1000
_PREFIXES = ("", "k", "M", "G", "T")


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a count with its noun.

    Example:
        >>> count(1, "record"), count(1200, "gap letter")
        ('1 record', '1,200 gap letters')
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def magnitude(number: float, unit: str) -> str:
    """Shorten a number to three digits and a prefix.

    Example:
        >>> magnitude(512, "b"), magnitude(4_641_652, "b"), magnitude(13_766_621_200, "B")
        ('512 b', '4.64 Mb', '13.8 GB')
    """
    scale = 0
    while round(number) >= _STEP and scale < len(_PREFIXES) - 1:
        number, scale = number / _STEP, scale + 1
    return f"{number:.3g} {_PREFIXES[scale]}{unit}" if scale else f"{number:.0f} {unit}"


def duration(seconds: float) -> str:
    """Write a time as a clock would.

    Example:
        >>> duration(75), duration(3675)
        ('1:15', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


_UNITS = ((2 * 86_400, 86_400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"), (0, 1, "s"))
"""From how many seconds on a time is told in a unit, the seconds of that unit, and its name."""


def rough_duration(seconds: float) -> str:
    """Write a time that was estimated.

    Example:
        >>> [rough_duration(seconds) for seconds in (2.21, 600, 40_000, 5_000_000)]
        ['2.2 s', '10 minutes', '11 hours', '58 days']
    """
    number, unit = next((seconds / size, name) for least, size, name in _UNITS if seconds >= least)
    return f"{number:,.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


def aligned(rows: Iterable[Sequence[object]], *, header: Sequence[str] | None = None) -> str:
    """Align rows in columns, two spaces apart.

    Example:
        >>> print(aligned([("a", 5), ("bc", 10)], header=("name", "size")))
        name  size
        a        5
        bc      10
    """
    body = [tuple(row) for row in rows]
    lines: list[Sequence[object]] = [header, *body] if header is not None else [*body]
    if not lines:
        return ""
    is_number = [all(isinstance(cell, int | float) for cell in column) for column in zip(*body, strict=True)]
    texts = [[_cell(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    shapes = list(zip(widths, is_number or [False] * len(widths), strict=True))
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, (width, right) in zip(line, shapes, strict=True)
        ).rstrip()
        for line in texts
    )


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else visible(str(value))


_LAYERS_SHOWN = 4
_FAILED_SHOWN = 5
POLICY_WORDS = {
    "upper_cased": ("soft-masked base", "upper-cased"),
    "rna_to_dna": ("RNA letter", "read as DNA (U as T)"),
    "masked_bases": ("invalid letter", "masked to N"),
    "masked_records": ("record", "with masked letters"),
    "gaps_stripped": ("gap letter", "taken out"),
    "skipped_invalid": ("record", "skipped for invalid letters"),
    "skipped_empty": ("record", "without bases skipped"),
    "skipped_regions": ("region", "skipped that cannot be read"),
    "renamed": ("record", "renamed (id seen before)"),
}
"""For each count of an input policy: of what, and what was done to it."""


def headline(report: ExtractionReport) -> str:
    """Return one line about what was written."""
    if report.num_rows is None or report.width is None:
        units = count(report.stats.units + report.stats.units_kept, "unit")
        return f"{report.output}: share {report.shard} is done, {units}"
    shown = ", ".join(report.layers[:_LAYERS_SHOWN])
    rest = len(report.layers) - _LAYERS_SHOWN
    layers = f"{shown} and {rest} more" if rest > 0 else shown
    return f"{report.output}: {count(report.num_rows, 'row')} x {report.width:,}, {layers}"


def details(report: ExtractionReport) -> list[str]:
    """Return lines about what was read, what the policies did, and what it cost."""
    counts, stats = report.counts, report.stats
    took = f"{report.seconds:.1f} s" if report.seconds < 60 else duration(report.seconds)
    repeats = f", {count(stats.repeats, 'repeat')} not run again" if stats.repeats else ""
    return [
        f"read {count(counts.records, 'record')}, {count(counts.bases, 'base')} "
        f"from {count(counts.files, 'file')}, cut into {count(stats.windows, 'window')}{repeats}",
        *policy_lines(counts),
        f"{count(stats.batches, 'forward pass', 'forward passes')}, {stats.padding_share:.1%} padding, "
        f"{tokens_per_s(report):,.0f} tokens/s, {took}",
        *done_lines(report),
        *(
            [f"when all shares are done: genoembed merge {shlex.quote(str(report.output))}"]
            if report.num_rows is None
            else []
        ),
    ]


def done_lines(
    report: ExtractionReport
    | GenerationReport
    | MutationReport
    | PredictionReport
    | ScoreReport
    | VariantReport,
) -> list[str]:
    """Return lines about what an earlier run had finished, and what failed."""
    stats, failed = report.stats, report.failed
    before = f"{count(stats.units_kept, 'unit')} ({count(stats.records_kept, 'record')})"
    return [
        *([f"finished by an earlier run: {before}"] if stats.units_kept else []),
        *([unread_line(stats.unread)] if stats.unread else []),
        *([failure_line(failed)] if failed else []),
    ]


def unread_line(unread: int) -> str:
    """Return the line about bases that the model cannot read."""
    return f"{count(unread, 'base')} could not be read: the model's tokenizer has no words for them"


def end_incomplete(failed: Mapping[str, str]) -> None:
    """End a command with a status of its own, if records failed; the last thing it does."""
    if failed:
        raise click.exceptions.Exit(INCOMPLETE)


def failure_line(failed: Mapping[str, str]) -> str:
    """Return the line that lists records without a vector."""
    named = ", ".join(f"{name} ({why})" for name, why in islice(failed.items(), _FAILED_SHOWN))
    rest = len(failed) - _FAILED_SHOWN
    more = f" and {rest} more" if rest > 0 else ""
    return f"{count(len(failed), 'record')} failed and have no values: {named}{more}"


def policy_lines(counts: InputCounts) -> list[str]:
    """Return one line per input policy that acted."""
    acted = [(name, getattr(counts, name)) for name in POLICY_WORDS]
    return [
        f"{count(number, POLICY_WORDS[name][0])} {POLICY_WORDS[name][1]}" for name, number in acted if number
    ]


def tokens_per_s(report: ExtractionReport) -> float:
    """Return the speed of the whole run."""
    return report.stats.real_tokens / report.seconds if report.seconds else 0.0


def as_json(report: ExtractionReport) -> dict[str, Any]:
    """Return the report as values that JSON holds."""
    fields = dataclasses.asdict(report)
    fields["output"] = str(report.output)
    fields["stats"]["padding_share"] = report.stats.padding_share
    return {**fields, "tokens_per_s": tokens_per_s(report)}


LINE_INTERVAL_S = 10.0


class RunTotals(Protocol):
    """What an extraction reports after each forward pass."""

    @property
    def records(self) -> int:
        """Records that are done."""

    @property
    def bases(self) -> int:
        """Their bases."""

    @property
    def bases_under_way(self) -> int:
        """Bases of other records that are done; grows batch by batch."""

    @property
    def bases_kept(self) -> int:
        """Bases that an earlier run had finished."""

    @property
    def records_kept(self) -> int:
        """Records that an earlier run had finished."""

    @property
    def padding_share(self) -> float:
        """Share of the model's slots that held padding."""

    @property
    def forward_s(self) -> float:
        """Seconds in the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Where a run stands, what an earlier run had finished included."""

    records: int
    bases: int
    """Bases that are done; overlap of windows and the second strand count once."""
    bases_per_s: float
    padding_share: float
    elapsed_s: float
    left_s: float | None
    """None where the size of the input is not known."""
    noun: str = "record"
    """What is counted."""

    @property
    def has_begun(self) -> bool:
        """Whether anything is done."""
        return self.records > 0 or self.bases > 0

    def __str__(self) -> str:
        clock = (
            f"{duration(self.elapsed_s)} elapsed" if self.left_s is None else f"{duration(self.left_s)} left"
        )
        # batches of a long record finish before it does: a count of 0 would say that nothing is done
        done = f"{count(self.records, self.noun)}, " if self.records else ""
        return (
            f"{done}{magnitude(self.bases, 'b')}, "
            f"{magnitude(self.bases_per_s, 'b/s')}, {self.padding_share:.1%} padding, {clock}"
        )


class Meter:
    """Turns running totals into speed and time left."""

    def __init__(
        self,
        expected_bases: int | None,
        *,
        noun: str = "record",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.expected_bases = expected_bases
        self._noun = noun
        self._clock = clock
        self._started: float | None = None

    def read(self, totals: RunTotals) -> Reading:
        """Take the totals in."""
        now = self._clock()
        if self._started is None:
            self._started = now - totals.forward_s
        here = totals.bases + totals.bases_under_way
        bases = here + totals.bases_kept
        elapsed = max(now - self._started, 1e-9)
        rate = here / elapsed
        left = None
        if self.expected_bases is not None and rate > 0:
            left = max(self.expected_bases - bases, 0) / rate
        return Reading(
            records=totals.records + totals.records_kept,
            bases=bases,
            bases_per_s=rate,
            padding_share=totals.padding_share,
            elapsed_s=elapsed,
            left_s=left,
            noun=self._noun,
        )


@contextmanager
def show_progress(
    expected_bases: int | None, *, noun: str = "record"
) -> Iterator[Callable[[RunTotals], None] | None]:
    """Show how far a run is, unless messages are switched off."""
    meter = Meter(expected_bases, noun=noun)
    if not _logger.isEnabledFor(logging.INFO):
        yield None
    elif sys.stderr is not None and sys.stderr.isatty():
        with _bar(meter) as on_totals:
            yield on_totals
    else:
        yield _lines(meter)


def _lines(meter: Meter, *, clock: Callable[[], float] = time.perf_counter) -> Callable[[RunTotals], None]:
    last = clock()

    def on_totals(totals: RunTotals) -> None:
        nonlocal last
        reading = meter.read(totals)
        # loading a model takes time as well: a line that counts nothing would only look like a run that hangs
        if reading.has_begun and clock() - last >= LINE_INTERVAL_S:
            last = clock()
            _logger.info("%s", reading)

    return on_totals


@contextmanager
def _bar(meter: Meter) -> Iterator[Callable[[RunTotals], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading the model", total=meter.expected_bases)

        def on_totals(totals: RunTotals) -> None:
            reading = meter.read(totals)
            progress.update(task, description=str(reading), completed=reading.bases)

        yield on_totals


def estimate_bases(inputs: Iterable[str]) -> int | None:
    """Guess how many bases the files hold, from their sizes."""
    sizes = [_plain_fasta_bytes(name) for name in inputs]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def _plain_fasta_bytes(name: str) -> int | None:
    path = Path(name)
    try:
        if name == "-" or not path.is_file():
            return None
        with path.open("rb") as file:
            return path.stat().st_size if file.read(1) == b">" else None
    except OSError:  # reading the file for good says what is wrong with it
        return None
