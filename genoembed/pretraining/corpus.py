"""Streaming corpora: many sequence files as one shuffled stream of documents, in bounded memory.

In: files and a :class:`~genoembed.config.pretrain.CorpusConfig`, or a stored state. Out: documents, counts of
what was done to them, and where the stream stands.
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import asdict, dataclass, field
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genoembed.config.pretrain import CorpusConfig
from genoembed.errors import ConfigError
from genoembed.sequences import InputCounts, read_sequences, reverse_complement
from genoembed.sequences.compression import STDIN, check_readable
from genoembed.sequences.records import Counts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from genoembed.config.pretrain import DataConfig
    from genoembed.contracts import SequenceRecord
    from genoembed.sequences.reading import PathInput


logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class CorpusCounts(Counts):
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
        """Return the state as plain values, for JSON."""
        return {**asdict(self), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> CorpusState:
        """Make a state of what ``to_dict`` gave."""
        try:
            config = CorpusConfig(**values["config"])  # type: ignore[arg-type]
            return cls(**{**values, "config": config})  # type: ignore[arg-type]
        except (ConfigError, KeyError, TypeError) as error:
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
    """Return where a state's config differs from the requested one."""
    return [
        f"{name}: {getattr(expected, name)!r}, but {getattr(found, name)!r} in the state; "
        f"set {name} to the state's value, or start again"
        for name in CorpusConfig.own_options()
        if getattr(found, name) != getattr(expected, name)
    ]


# What the generators of an epoch decide about; each has one of its own, so that no choice moves another.
_FILE_ORDER, _STRANDS, _SHUFFLE = range(3)


class _Document(NamedTuple):
    """A document as its file has it, and the strand to give."""

    bases: bytes
    is_reversed: bool


class DocumentStream:
    """One epoch over the documents of many files, as an iterator of bytes that knows where it stands.

    Files come in an order drawn for the epoch, and documents are drawn from a buffer. Ids may repeat. Options
    and files are checked at once; sequences are read as the iterator is used.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "contigs.fa")
        ...     _ = path.write_text(">a\\nacgNNNNtt\\n>b\\nGG\\n")
        ...     stream = DocumentStream([path], config=CorpusConfig(both_strands=False, n_run_bp=4))
        ...     print(sorted(stream), stream.state.documents, stream.counts.n_bases)
        [b'ACG', b'GG', b'TT'] 3 4
    """

    def __init__(
        self, paths: Sequence[PathInput], *, config: CorpusConfig | None = None, epoch: int = 0
    ) -> None:
        self._names = [fspath(path) for path in paths]
        _check_files(self._names, epoch)
        self.config = CorpusConfig() if config is None else config
        self.epoch = epoch
        self.counts = CorpusCounts()
        self._files_sha256 = _digest_files(self._names)
        run_bp = self.config.n_run_bp
        self._n_run = None if run_bp is None else re.compile(b"N{%d,}" % run_bp)
        self._drawn = self._draw()

    @classmethod
    def resume(
        cls, paths: Sequence[PathInput], *, state: CorpusState, config: CorpusConfig | None = None
    ) -> DocumentStream:
        """Go on where another stream stood; reads again, without further work, what that one gave."""
        stream = cls(paths, config=state.config, epoch=state.epoch)
        problems = [] if config is None else config_differences(state.config, config)
        if stream._files_sha256 != state.files_sha256:
            problems.append(
                "paths: names, sizes or order of the files are not those of the state; name the same files"
            )
        if problems:
            raise ConfigError(*problems)
        for _ in range(state.documents):
            if next(stream._drawn, None) is None:
                message = (
                    f"corpus state: {state.documents} documents given, but the files have fewer; they changed"
                )
                raise ConfigError(message)
        return stream

    @property
    def state(self) -> CorpusState:
        """Where the stream stands: after the document it gave last."""
        return CorpusState(
            epoch=self.epoch,
            documents=self.counts.documents,
            files_sha256=self._files_sha256,
            config=self.config,
        )

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        document = next(self._drawn)
        return reverse_complement(document.bases) if document.is_reversed else document.bases

    def _draw(self) -> Iterator[_Document]:
        rng = self._generator(_SHUFFLE, self.config.shard)
        waiting: list[_Document] = []
        waiting_bp = 0
        for document in self._documents():
            waiting.append(document)
            waiting_bp += len(document.bases)
            while len(waiting) >= self.config.shuffle_documents or waiting_bp >= self.config.shuffle_bp:
                drawn = self._draw_one(waiting, rng)
                waiting_bp -= len(drawn.bases)
                yield drawn
        while waiting:
            yield self._draw_one(waiting, rng)
        self._finish()

    def _draw_one(self, waiting: list[_Document], rng: np.random.Generator) -> _Document:
        index = int(rng.integers(len(waiting)))
        waiting[index], waiting[-1] = waiting[-1], waiting[index]
        drawn = waiting.pop()
        self.counts.documents += 1
        self.counts.bases += len(drawn.bases)
        self.counts.reversed_documents += drawn.is_reversed
        return drawn

    def _documents(self) -> Iterator[_Document]:
        """Yield the shard's documents in file order. Strands are drawn for all, so shards do not matter."""
        config = self.config
        rng = self._generator(_STRANDS)
        number = 0
        for index, record in enumerate(self._records()):
            is_counted_here = index % config.num_shards == config.shard
            for start, end in self._spans(record.sequence, is_counted_here):
                is_reversed = bool(rng.random() < 0.5) and config.both_strands
                if number % config.num_shards == config.shard:
                    yield _Document(record.sequence[start:end], is_reversed)
                number += 1

    def _records(self) -> Iterator[SequenceRecord]:
        config = self.config
        for index in self._generator(_FILE_ORDER).permutation(len(self._names)):
            # one call per file: only its own ids are remembered
            for record in read_sequences(
                self._names[index],
                invalid=config.invalid,
                duplicates="suffix",
                empty=config.empty,
                gaps=config.gaps,
                counts=self.counts.read,
            ):
                if is_heldout(record.sequence, config.heldout_fraction) == config.heldout:
                    yield record
                else:
                    self.counts.other_side_records += 1

    def _spans(self, sequence: bytes, is_counted_here: bool) -> Iterator[tuple[int, int]]:
        for start, end in self._spans_between_runs(sequence, is_counted_here):
            step = self.config.max_document_bp or end - start
            if end - start > step and is_counted_here:
                self.counts.cut_documents += 1
            for cut in range(start, end, step):
                yield cut, min(cut + step, end)

    def _spans_between_runs(self, sequence: bytes, is_counted_here: bool) -> Iterator[tuple[int, int]]:
        start = 0
        for run in self._n_run.finditer(sequence) if self._n_run else ():
            if is_counted_here:
                self.counts.n_runs += 1
                self.counts.n_bases += run.end() - run.start()
            if run.start() > start:
                yield start, run.start()
            start = run.end()
        if start < len(sequence):
            yield start, len(sequence)

    def _generator(self, purpose: int, shard: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, self.epoch, purpose, shard])

    def _finish(self) -> None:
        if not self.counts.documents:
            message = (
                f"shard {self.config.shard} of {self.config.num_shards}: no document in "
                f"{self.counts.read.records} records; give more sequence or set fewer num_shards"
            )
            raise ConfigError(message)
        logger.info("corpus, epoch %d: %s", self.epoch, self.counts)


def check_corpus(data: DataConfig) -> None:
    """Refuse files that are missing, or whose first record is not what it should be, before anything else."""
    _check_files([*data.corpus, *data.heldout], 0)
    for name in (*data.corpus, *data.heldout):
        next(
            read_sequences(name, invalid=data.invalid, duplicates="suffix", empty=data.empty, gaps=data.gaps),
            None,
        )


def _check_files(names: list[str], epoch: int) -> None:
    problems = []
    if not names:
        problems.append("paths: no file; name at least one")
    if epoch < 0:
        problems.append(f"epoch: {epoch}, expected 0 or more; count epochs from 0")
    for name in names:
        check_readable(name)
        if name == STDIN or not Path(name).is_file():
            problems.append(f"paths: {name!r} can be read only once; save it to a file first")
    if problems:
        raise ConfigError(*problems)


def _digest_files(names: list[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{Path(name).name}\n{Path(name).stat().st_size}\n".encode())
    return digest.hexdigest()
