"""Ids that are unique within a run.

In: ids in input order, from any number of files. Out: the ids to use. The only state of the reader that grows
with the number of records: one dictionary entry each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from genoembed.errors import DuplicateIdError

if TYPE_CHECKING:
    from genoembed.sequences.policies import DuplicatePolicy

# File number and line share one integer: a tuple for each of a million ids would cost 60 bytes more apiece.
_LINE_BITS = 40


class IdRegistry:
    """Remembers where each id was first seen."""

    def __init__(self, policy: DuplicatePolicy) -> None:
        self._policy = policy
        self._places: dict[str, int] = {}
        self._paths: list[str] = []
        self._next_suffix: dict[str, int] = {}

    def admit(self, record_id: str, *, path: str, line: int | None) -> str:
        """Take an id in, under another name if it is taken.

        A new name is ``id_2``, ``id_3`` ..., the first that nothing before has. A later record that was given
        such a name by its file is a duplicate like any other, so no two records ever share an id.

        Example:
            >>> ids = IdRegistry("suffix")
            >>> [ids.admit(name, path="a.fa", line=1) for name in ("x", "x", "x_2", "x")]
            ['x', 'x_2', 'x_2_2', 'x_3']
        """
        if not self._paths or self._paths[-1] != path:
            self._paths.append(path)
        name = record_id
        if record_id in self._places:
            if self._policy == "error":
                raise self._duplicate(record_id, path, line)
            name = self._free_name(record_id)
        self._places[name] = (len(self._paths) - 1) << _LINE_BITS | (line or 0)
        return name

    def _free_name(self, record_id: str) -> str:
        number = self._next_suffix.get(record_id, 2)
        while f"{record_id}_{number}" in self._places:
            number += 1
        self._next_suffix[record_id] = number + 1
        return f"{record_id}_{number}"

    def _duplicate(self, record_id: str, path: str, line: int | None) -> DuplicateIdError:
        place = self._places[record_id]
        first_path, first_line = self._paths[place >> _LINE_BITS], place & ((1 << _LINE_BITS) - 1)
        number = f"line {first_line}" if first_line else first_path
        first = number if first_path == path else f"{first_path}:{first_line}" if first_line else first_path
        problem = f"appears again (first at {first}); rename one or set duplicates='suffix'"
        return DuplicateIdError(problem, path=path, line=line, record_id=record_id)
