"""Finished units of a table that is under way, in ``NAME.parts`` next to it: a run that was cut off goes on.

The same folder, manifest and checks as for embedding files (:mod:`genoembed.store.parts`). Promised: what a
unit gave is taken over only if the same model and settings made it of the same records; units go when the
table is there.
"""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from genoembed._version import __version__
from genoembed.pipeline.request import begun_dtype
from genoembed.store import Manifest, Parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from genoembed.config.choices import ComputeDtype
    from genoembed.pipeline.units import RunStats, WorkUnit

logger = logging.getLogger(__name__)


class TableParts:
    """What units gave; keeps nothing where the table is no file."""

    def __init__(self, output: str | None) -> None:
        self.failed: dict[str, str] = {}
        """Records of all units that failed, by id: why."""
        self._output = None if output == "-" else output
        self.parts: Parts | None = None
        """None before the run begins, and where nothing is kept."""

    def dtype(self, requested: ComputeDtype | None) -> ComputeDtype | None:
        """Return the type to load the model in: where it is left to the machine, as the run began."""
        parts = None if self._output is None else Parts.find(self._output)
        found: ComputeDtype | None = begun_dtype(
            requested, None if parts is None else parts.manifest.identity
        )
        return found

    def begin(
        self,
        identity: Callable[[], Mapping[str, Any]],
        *,
        policies: Mapping[str, Any],
        stats: RunStats,
        drop_other: bool,
    ) -> None:
        """Go on with what a run of the same model and settings has finished, or begin.

        Args:
            identity: Gives what decides the values of a record; it may take a look at all weights, so it is
                called only where something is kept.
            policies: What is done about bad records: another choice may go on with units that it leaves as
                they are.
            stats: Totals that kept units are counted in.
            drop_other: Whether what another run has finished is removed, and not refused.
        """
        self.stats = stats
        if self._output is not None:
            plain = json.loads(json.dumps([{"genoembed": __version__, **identity()}, policies]))
            manifest = Manifest(
                identity=plain[0], policies=plain[1], provenance={}, out_dtype=None, num_shares=1
            )
            self.parts = Parts.begin(self._output, manifest, drop_other=drop_other)

    def take(self, unit: WorkUnit, make: Callable[[], list[Any]]) -> list[Any]:
        """Return what a unit gave: as an earlier run saved it, or made and saved now.

        Args:
            unit: Records in the order of the input.
            make: Gives a value per record, of what JSON holds; text says why a record failed.
        """
        record = None if self.parts is None else self.parts.finished(unit.number, unit.content)
        if self.parts is not None and record is not None:
            values: list[Any] = self.parts.read_values(unit.number)
            self.stats.units_kept += 1
            self.stats.records_kept += len(unit.records)
            self.stats.bases_kept += unit.num_bases
        else:
            values = make()
        named = zip(unit.records, values, strict=True)
        failed = {item.id: value for item, value in named if isinstance(value, str)}
        self.failed |= failed
        if self.parts is not None and record is None:
            done = unit.record(num_rows=len(values), stats={}, failed=failed)
            self.parts.save_values(done, values)
        return values


@contextmanager
def keeping_units(output: str | None) -> Iterator[TableParts]:
    """Keep finished units until the table is complete; open the table inside, so that it is closed before."""
    kept = TableParts(output)
    try:
        yield kept
    except BaseException as error:
        if kept.parts is not None:
            kept.parts.note_kept(error)
        raise
    if kept.parts is not None:
        kept.parts.remove()
