"""What to do with input that is not clean, and the counts of what was done.

In: the option values of :func:`genoembed.sequences.read_sequences`. Out: a checked :class:`Policies`, and
:class:`InputCounts`, which the reader adds to, the command line prints and the file stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from genoembed.errors import ConfigError

InvalidPolicy: TypeAlias = Literal["error", "skip", "mask"]
DuplicatePolicy: TypeAlias = Literal["error", "suffix"]
EmptyPolicy: TypeAlias = Literal["error", "skip"]
GapPolicy: TypeAlias = Literal["error", "strip"]

_CHOICES = {
    "invalid": ("error", "skip", "mask"),
    "duplicates": ("error", "suffix"),
    "empty": ("error", "skip"),
    "gaps": ("error", "strip"),
}


@dataclass(kw_only=True, slots=True)
class InputCounts:
    """How much was read, and how often each policy acted. The reader adds to it record by record."""

    files: int = 0
    """Input files opened."""
    records: int = 0
    """Records handed on."""
    bases: int = 0
    """Bases handed on, flanks included."""
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
