"""Engines: what each of them promises, and the one that embeds work units in this process.

Reading and writing run in threads during the forward passes.
"""

from __future__ import annotations

from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Protocol

from genoembed.pipeline.embedder import UnitEmbedder
from genoembed.pipeline.provenance import run_facts
from genoembed.pipeline.request import load_configured, use_threads
from genoembed.pipeline.threads import read_ahead, write_behind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from genoembed.config.embed import EmbedConfig
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.trained_folder import FinetunedFacts
    from genoembed.pipeline.forward import UnitResults
    from genoembed.pipeline.provenance import RunFacts
    from genoembed.pipeline.threads import Interruption
    from genoembed.pipeline.units import RunStats, WorkUnit
    from genoembed.store import UnitRows


class UnitEngine(Protocol):
    """Embeds work units, here or elsewhere; the model is loaded when there is an engine."""

    @property
    def facts(self) -> RunFacts:
        """What the run is, as far as the model decides it."""

    @property
    def stats(self) -> RunStats:
        """The running totals; those of units that were kept are the caller's to count."""

    def run(self, units: Iterable[WorkUnit], save: Callable[[UnitRows], None]) -> None:
        """Embed units and save them."""


_SLABS_AHEAD = 1


class LocalEngine:
    """Embeds work units in this process."""

    def __init__(self, embedder: UnitEmbedder) -> None:
        self.facts = run_facts(embedder.config, embedder)
        self.stats = embedder.stats
        self._embedder = embedder

    def run(self, units: Iterable[WorkUnit], save: Callable[[UnitRows], None]) -> None:
        """Embed units and save them, in order."""
        run_units(units, self._embedder, save)


@contextmanager
def local_engine(
    config: EmbedConfig,
    model: str | GenomicModel,
    *,
    trained: FinetunedFacts | None,
    on_batch: Callable[[RunStats], None] | None = None,
    interruption: Interruption | None = None,
) -> Iterator[LocalEngine]:
    """Load the model, unless it is loaded already, and get ready."""
    with use_threads(config.model.threads):
        loaded = load_configured(config.model) if isinstance(model, str) else model
        yield LocalEngine(
            UnitEmbedder(loaded, config, on_batch=on_batch, facts=trained, interruption=interruption)
        )


def run_units(units: Iterable[WorkUnit], embedder: UnitEmbedder, save: Callable[[UnitRows], None]) -> None:
    """Embed each unit and save it; the next batches are read, cut and tokenized in a thread meanwhile."""

    def build_and_save(embedded: UnitResults) -> None:
        save(embedder.rows(embedded))

    with (
        read_ahead(embedder.runner.lay_out(units), depth=_SLABS_AHEAD) as slabs,
        closing(embedder.runner.run(slabs)) as done,
        write_behind(build_and_save, depth=1) as put,
    ):
        for embedded in done:
            put(embedded)
            del embedded  # a unit may be large, and the next one long in coming
