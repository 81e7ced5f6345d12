"""How a streaming corpus is made into documents, what was counted, and where a stream stands.

In: option values, or the plain values of a stored state. Out: frozen, checked dataclasses, and the counts
that :class:`~genoembed.training.corpus.DocumentStream` adds to.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING

from genoembed.errors import ConfigError
from genoembed.sequences import InputCounts, Policies, reverse_complement

if TYPE_CHECKING:
    from collections.abc import Mapping

    from genoembed.sequences.policies import EmptyPolicy, GapPolicy, InvalidPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """What becomes of the records of a corpus."""

    seed: int = 0
    """Decides about the order of files and documents, and about strands; with the epoch. 0 or more."""
    both_strands: bool = True
    """Replace a document by its reverse complement with probability one half."""
    n_run_bp: int | None = 10
    """Runs of at least this many ``N`` are left out and end a document, bases. None keeps them."""
    max_document_bp: int | None = None
    """Cut longer documents every so many bases; each piece is a document of its own. None cuts nothing.
    Without it, the documents of one chromosome stay together however large the buffer."""
    shuffle_documents: int = 32768
    """Documents among which the next one is drawn; 1 keeps the order of the files."""
    shuffle_bp: int = 2**28
    """Bases that wait in the shuffle at most (one document more, at times)."""
    shard: int = 0
    """Which part of the documents to give, from 0: with several data workers, ``rank * workers + worker``."""
    num_shards: int = 1
    """Parts in all: ranks times workers. Each reads all files, and gives every ``num_shards``-th document."""
    heldout_fraction: float = 0.0
    """Share of the records that is set aside to measure on, 0 to below 1; see ``is_heldout``."""
    heldout: bool = False
    """Give the records that are set aside, and not the others."""
    invalid: InvalidPolicy = "error"
    """Letters outside IUPAC DNA: ``error``, ``skip`` the record, or ``mask`` each to ``N``."""
    gaps: GapPolicy = "error"
    """Gap letters ``-``, ``.`` and ``*``: ``error``, or ``strip``."""
    empty: EmptyPolicy = "error"
    """A record without bases: ``error`` or ``skip``."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}: {value!r}, expected a whole number from {least}; set {name} to {least} or more"
            for name, least in _LEAST.items()
            if not _is_whole_number(value := getattr(self, name), least)
            and not (value is None and name in _OPTIONAL)
        ]
        if not problems and self.shard >= self.num_shards:
            problems.append(f"shard: {self.shard} of {self.num_shards}; set shard to 0 to num_shards - 1")
        problems += [
            f"{name} is {getattr(self, name)!r}; set {name} to True or False"
            for name in ("both_strands", "heldout")
            if not isinstance(getattr(self, name), bool)
        ]
        if not 0 <= self.heldout_fraction < 1:
            problems.append(f"heldout_fraction is {self.heldout_fraction}; set it to 0 or more, and below 1")
        try:
            Policies(invalid=self.invalid, gaps=self.gaps, empty=self.empty)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(*problems)


_LEAST = {
    "seed": 0,
    "n_run_bp": 1,
    "max_document_bp": 1,
    "shuffle_documents": 1,
    "shuffle_bp": 1,
    "shard": 0,
    "num_shards": 1,
}
_OPTIONAL = ("n_run_bp", "max_document_bp")


def _is_whole_number(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(kw_only=True, slots=True)
class CorpusCounts:
    """What a stream did since its epoch began; a resumed stream counts what it skips, too."""

    documents: int = 0
    """Documents given."""
    bases: int = 0
    """Bases of these."""
    reversed_documents: int = 0
    """Of the documents given, those on the other strand."""
    n_runs: int = 0
    """Runs of N split out; summed over all shards, each run counts once."""
    n_bases: int = 0
    """Bases of these runs."""
    cut_documents: int = 0
    """Documents over ``max_document_bp`` that were cut; summed over all shards, each counts once."""
    other_side_records: int = 0
    """Records left out because they are on the other side of the split by ``heldout_fraction``."""
    read: InputCounts = field(default_factory=InputCounts)
    """Records and what the policies did to them; each shard reads, and counts, all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusState:
    """A position in a stream, small and safe to store as JSON."""

    epoch: int
    """Pass over the corpus, from 0."""
    documents: int
    """Documents given since the epoch began."""
    files_sha256: str
    """Digest of names (without folders) and sizes of the files, in order."""
    config: CorpusConfig
    """The config of the stream."""

    def to_dict(self) -> dict[str, object]:
        """Give the state as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> CorpusState:
        """Make a state of what ``to_dict`` gave."""
        try:
            config = CorpusConfig(**values["config"])  # type: ignore[arg-type]
            return cls(**{**values, "config": config})  # type: ignore[arg-type]
        except (KeyError, TypeError) as error:
            message = f"corpus state: {error}; the state is damaged or from another version: start again"
            raise ConfigError(message) from error


def is_heldout(sequence: bytes, fraction: float) -> bool:
    """Decide by the bases alone whether a record is set aside to measure on.

    The same sequence is on the same side in every run and on both strands, whatever its id or file.
    """
    if not fraction:
        return False
    canonical = min(sequence, reverse_complement(sequence))
    drawn = int.from_bytes(hashlib.sha256(canonical).digest()[:8], "big")
    return drawn < fraction * 2**64


def config_differences(found: CorpusConfig, expected: CorpusConfig) -> list[str]:
    """Say where a state's config is not the one that is asked for."""
    return [
        f"{name}: {getattr(expected, name)!r}, but {getattr(found, name)!r} in the state; "
        f"set {name} to the state's value, or start again"
        for name in (entry.name for entry in fields(CorpusConfig))
        if getattr(found, name) != getattr(expected, name)
    ]
