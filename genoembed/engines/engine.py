"""What every engine is: it knows the run's facts, and embeds the units that it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from genoembed.engines.provenance import RunFacts
    from genoembed.engines.stats import RunStats
    from genoembed.engines.units import WorkUnit
    from genoembed.store import UnitRows


class Engine(Protocol):
    """Embeds work units, here or elsewhere; the model is loaded when there is an engine."""

    @property
    def facts(self) -> RunFacts:
        """What the run is, as far as the model decides it."""

    @property
    def stats(self) -> RunStats:
        """The running totals; those of units that were kept are the caller's to count."""

    def run(self, units: Iterable[WorkUnit], save: Callable[[UnitRows], None]) -> None:
        """Embed units and save them."""
