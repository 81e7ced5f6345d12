"""What runs in a worker process: the model, loaded once, and unit after unit; what it says goes back."""

from __future__ import annotations

import logging
import warnings
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from genoembed.engines.carried import find_facts
from genoembed.engines.embedder import UnitEmbedder
from genoembed.engines.loading import load_configured
from genoembed.engines.overlap import read_ahead
from genoembed.engines.provenance import RunFacts, run_facts
from genoembed.engines.stats import RunStats
from genoembed.errors import GenoembedWarning

if TYPE_CHECKING:
    from genoembed.config import EmbedConfig
    from genoembed.engines.units import WorkUnit
    from genoembed.store import UnitRows


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """What a worker says when it has loaded the model."""

    facts: RunFacts
    warned: tuple[GenoembedWarning, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """What a worker sends back for a unit."""

    rows: UnitRows
    stats: RunStats
    """Its totals."""
    logged: tuple[tuple[int, str], ...]
    """Warnings: level and text."""


class UnitWorker:
    """Lives in a worker process and is called from the one that was started."""

    def __init__(self, config: EmbedConfig) -> None:
        self._config = config
        self._embedder: UnitEmbedder | None = None
        self._heard = _Heard()

    def start(self) -> Started:
        """Load the model."""
        config = self._config
        if config.model.threads is not None:
            torch.set_num_threads(config.model.threads)
        logging.getLogger("genoembed").addHandler(self._heard)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", GenoembedWarning)
            model = load_configured(config.model)
            self._embedder = UnitEmbedder(model, config, facts=find_facts(config.model.model))
            facts = run_facts(config, self._embedder)
        ours = tuple(item.message for item in caught if isinstance(item.message, GenoembedWarning))
        return Started(facts=facts, warned=ours)

    def embed(self, unit: WorkUnit) -> Finished:
        """Embed a unit; the next batches are laid out in a thread meanwhile."""
        assert self._embedder is not None, "it was started"
        with read_ahead(self._embedder.lay_out([unit]), depth=1) as slabs:
            (embedded,) = self._embedder.run(slabs)
        rows = self._embedder.rows(embedded)
        return Finished(rows=rows, stats=replace(self._embedder.stats), logged=self._heard.take())

    def look(self) -> RunStats:
        """Give the totals so far; may be called while a unit is embedded."""
        return RunStats() if self._embedder is None else replace(self._embedder.stats)


class _Heard(logging.Handler):
    """Keeps warnings until they are sent on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._records: deque[tuple[int, str]] = deque(maxlen=100)

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append((record.levelno, record.getMessage()))

    def take(self) -> tuple[tuple[int, str], ...]:
        taken = tuple(self._records)
        self._records.clear()
        return taken
