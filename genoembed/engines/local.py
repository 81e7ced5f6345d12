"""Run work units in this process, with reading and writing in threads beside the forward passes."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from genoembed.engines.overlap import read_ahead, write_behind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from genoembed.engines.embedder import EmbeddedUnit, UnitEmbedder
    from genoembed.engines.units import WorkUnit
    from genoembed.store import UnitRows

_SLABS_AHEAD = 1


def run_units(units: Iterable[WorkUnit], embedder: UnitEmbedder, save: Callable[[UnitRows], None]) -> None:
    """Embed each unit and save it; the next batches are read, cut and tokenized in a thread meanwhile.

    Args:
        units: In input order; iterated in a thread.
        embedder: Lays them out in that thread, and runs the model in the caller's.
        save: Called with each unit's rows, in order, in another thread. All are saved when this returns; when
            it raises, what was being saved is.

    Raises:
        GenoembedError: If input, model or output fail.
    """

    def build_and_save(embedded: EmbeddedUnit) -> None:
        save(embedder.rows(embedded))

    with (
        read_ahead(embedder.lay_out(units), depth=_SLABS_AHEAD) as slabs,
        closing(embedder.run(slabs)) as done,
        write_behind(build_and_save, depth=1) as put,
    ):
        for embedded in done:
            put(embedded)
            del embedded  # a unit may be large, and the next one long in coming
