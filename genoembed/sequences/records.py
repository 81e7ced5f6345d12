"""Records between parsing and cleaning: as the file has them, the policies for them, counts, unique ids."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

from genoembed.errors import ConfigError, DuplicateIdError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from genoembed.config.choices import DuplicatePolicy, EmptyPolicy, GapPolicy, InvalidPolicy
    from genoembed.contracts import Strand


class Span(NamedTuple):
    """The part of a contig that a record was fetched from."""

    contig: str
    start: int
    """First base of the region, 0-based."""
    end: int
    """One past its last base."""
    strand: Strand
    fetch_start: int
    """First base fetched: ``start`` less the left flank."""


class RawRecord(NamedTuple):
    """A record as parsed."""

    id: str
    description: str
    path: str
    """File that errors name."""
    source: str
    """File that the finished record names."""
    line: int | None
    """1-based line of the header."""
    body: Iterator[tuple[bytes, int | None]]
    """Pieces of the sequence, in order, white space and all, each with the line it starts on (None where
    lines cannot be distinguished); can be read once. A record with a ``span`` has exactly three: left flank,
    region, right flank, as on the forward strand."""
    span: Span | None = None
    """Where a region came from."""


_CHOICES = {
    "invalid": ("error", "skip", "mask"),
    "duplicates": ("error", "suffix"),
    "empty": ("error", "skip"),
    "gaps": ("error", "strip"),
}


class Counts:
    """Numbers that print as words, without those that are 0: ``12 records, 3 skipped empty``."""

    __slots__ = ()

    def __str__(self) -> str:
        return ", ".join(self._words()) or "nothing"

    def _words(self) -> Iterator[str]:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Counts):
                yield from value._words()
            elif value:
                yield f"{value} {field.name.replace('_', ' ')}"


@dataclass(kw_only=True, slots=True)
class InputCounts(Counts):
    """How much was read, and how often each policy acted. The reader adds to it record by record."""

    files: int = 0
    """Input files opened."""
    records: int = 0
    """Records yielded."""
    bases: int = 0
    """Bases yielded, flanks included."""
    upper_cased: int = 0
    """Soft-masked bases that were upper-cased."""
    rna_to_dna: int = 0
    """Letters ``U`` read as ``T``."""
    masked_bases: int = 0
    """Invalid letters replaced by ``N``."""
    masked_records: int = 0
    """Records with at least one of them."""
    gaps_stripped: int = 0
    """Gap letters taken out."""
    skipped_invalid: int = 0
    """Records left out for invalid letters."""
    skipped_empty: int = 0
    """Records left out because they had no bases."""
    renamed: int = 0
    """Records whose id was taken and got a suffix."""
    windows: int = 0
    """Windows cut; extraction fills it in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policies:
    """The choices of one reading, checked together when it is made."""

    invalid: InvalidPolicy = "error"
    """Letters outside the alphabet: stop, leave the record out, or replace each by ``N``."""
    duplicates: DuplicatePolicy = "error"
    """An id seen before: stop, or append ``_2``, ``_3`` ..."""
    empty: EmptyPolicy = "error"
    """A record without bases: stop, or leave it out."""
    gaps: GapPolicy = "error"
    """Gap letters ``-``, ``.`` and ``*``: stop, or take them out."""
    keep_case: bool = False
    """True leaves soft-masked (lower-case) bases as they are."""

    def __post_init__(self) -> None:
        problems = []
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                problems.append(f"{name} is {value!r}; set {name} to one of {', '.join(choices)}")
        if not isinstance(self.keep_case, bool):
            problems.append(f"keep_case is {self.keep_case!r}; set keep_case to True or False")
        if problems:
            raise ConfigError(*problems)


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
