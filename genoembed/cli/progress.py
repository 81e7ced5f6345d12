"""How far an extraction is: a bar where standard error is a terminal, else a line every few seconds."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from genoembed.cli.output import count, duration, magnitude

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

LINE_INTERVAL_S = 10.0
_logger = logging.getLogger("genoembed.cli")


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

    def __str__(self) -> str:
        clock = (
            f"{duration(self.elapsed_s)} elapsed" if self.left_s is None else f"{duration(self.left_s)} left"
        )
        return (
            f"{count(self.records, 'record')}, {magnitude(self.bases, 'b')}, "
            f"{magnitude(self.bases_per_s, 'b/s')}, {self.padding_share:.1%} padding, {clock}"
        )


class Meter:
    """Turns running totals into speed and time left."""

    def __init__(self, expected_bases: int | None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.expected_bases = expected_bases
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
        )


@contextmanager
def show_progress(expected_bases: int | None) -> Iterator[Callable[[RunTotals], None] | None]:
    """Show how far a run is, unless messages are switched off."""
    meter = Meter(expected_bases)
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
        if clock() - last >= LINE_INTERVAL_S:
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
