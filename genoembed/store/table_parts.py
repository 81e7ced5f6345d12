"""Finished rows of a table that is under way, in ``NAME.parts`` beside it: a run that was cut off goes on.

The same folder, manifest and checks as for embedding files (:mod:`genoembed.store.parts`). Promised: rows are
taken again only if the same settings and model made them of the same records; they go when the table is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from genoembed._version import __version__
from genoembed.store.parts import Manifest, Parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from genoembed.store.schema import JSON

logger = logging.getLogger(__name__)


class TableParts:
    """What some records gave, by unit; keeps nothing where the table is no file."""

    def __init__(self, output: str | None) -> None:
        self._output = None if output == "-" else output
        self._parts: Parts | None = None
        self.num_kept = 0
        """Units that an earlier run had finished."""

    def begin(self, identity: Mapping[str, JSON], *, drop_other: bool) -> None:
        """Go on with the rows of a run of the same settings and model, or begin."""
        if self._output is not None:
            plain = json.loads(json.dumps({"genoembed": __version__, **identity}))
            manifest = Manifest(identity=plain, provenance={}, out_dtype="float32", num_shares=1)
            self._parts = Parts.begin(self._output, manifest, drop_other=drop_other)

    def take(self, number: int, content: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what the records of a unit gave: as an earlier run saved it, or made and saved now.

        Args:
            number: Position of the unit in the run, from 0.
            content: Digest of what it is made from.
            make: Gives what JSON holds; NaN is allowed.
        """
        if self._parts is None:
            return make()
        found = self._parts.read_rows(number)
        if found is not None and found["content"] == content and found["sha256"] == _digest(found["rows"]):
            self.num_kept += 1
            kept: dict[str, Any] = found["rows"]
            return kept
        rows = make()
        self._parts.save_rows(number, {"content": content, "rows": rows, "sha256": _digest(rows)})
        return rows

    def remove(self) -> None:
        """Remove the rows: the table is there, or there are none."""
        if self._parts is not None:
            self._parts.remove()

    def note(self, error: BaseException) -> None:
        """Say at a failure what is kept; where nothing is, nothing is left behind."""
        if self._parts is None:
            return
        if number := self._parts.num_rows_saved():
            units = "1 finished part is" if number == 1 else f"{number} finished parts are"
            error.add_note(f"{units} kept in {self._parts.folder}: run the same command again to go on")
        else:
            self._parts.remove()


def _digest(rows: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@contextmanager
def keeping_rows(output: str | None) -> Iterator[TableParts]:
    """Keep finished rows until the table is complete; open the table inside, so that it is closed before."""
    kept = TableParts(output)
    try:
        yield kept
    except BaseException as error:
        kept.note(error)
        raise
    if kept.num_kept:
        logger.info("%d parts had been finished before and were not run again", kept.num_kept)
    kept.remove()
