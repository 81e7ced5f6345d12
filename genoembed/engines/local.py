"""Run work units in this process, with reading and writing in threads beside the forward passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from genoembed.engines.overlap import read_ahead

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from genoembed.engines.embedder import EmbeddedUnit, UnitEmbedder
    from genoembed.engines.units import WorkUnit

_SLABS_AHEAD = 1


def run_units(units: Iterable[WorkUnit], embedder: UnitEmbedder) -> Generator[EmbeddedUnit, None, None]:
    """Embed each unit; reading, cutting and tokenizing the next batches happen in a thread meanwhile.

    Args:
        units: In input order; iterated in the thread.
        embedder: Lays them out in the thread, and runs the model in the caller's.

    Yields:
        Units in input order, as they are done. Closing this generator ends the thread.
    """
    with read_ahead(embedder.lay_out(units), depth=_SLABS_AHEAD) as slabs:
        yield from embedder.run(slabs)
