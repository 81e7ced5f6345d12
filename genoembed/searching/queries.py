"""What a search looks for: rows of an embedding file, or sequences, which are embedded as the database was.

Sequences are read once, so that they may come through a pipe, and embedded in memory with the settings that
the database records; vectors that were made in another way are an error.

Q queries, D features.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np

from genoembed.embedding import RecordEmbedder
from genoembed.errors import EmptyRecordError
from genoembed.pipeline.embedding_file import (
    check_comparable,
    comparable_settings,
    iter_row_sequences,
    read_file_records,
    read_file_settings,
    record_names,
)
from genoembed.pipeline.request import use_threads
from genoembed.searching.hits import Places
from genoembed.searching.hybrid import check_whole_records
from genoembed.sequences import begin_reading, read_sequences
from genoembed.store.schema import FAILED, has_failed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.contracts import ObsRow, SequenceRecord
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.store import EmbeddingFile
    from genoembed.store.schema import LazyMatrix

READING_OPTIONS = ("invalid", "duplicates", "empty", "gaps")
_MODEL_OPTIONS = ("on_error", "batch_tokens", "dtype", "fp8", "device", "trust_remote_code")
QUERY_OPTIONS = (*READING_OPTIONS, *_MODEL_OPTIONS, "threads")
_GIVE_FASTA = "give queries as sequences"


@dataclass(frozen=True, kw_only=True, slots=True)
class Queries:
    """What is searched for."""

    name: str
    """For messages."""
    places: Places
    matrix: LazyMatrix | NDArray[np.floating]
    """Their vectors, ``(Q, D)``; D is 0 where they were not embedded."""
    settings: Mapping[str, Any]
    """How the vectors were made, as ``comparable_settings`` collects it."""
    records: Sequence[str]
    """The record that each query is, or is a window of."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Those that have no vector, by id: why."""
    given: Sequence[bytes] | None = None
    """Their sequences; None where they are rows of a file."""
    file: EmbeddingFile | None = None
    """The file that they are rows of."""

    def seen(self) -> Sequence[bytes]:
        """Return the sequences as the model saw them, with flanks."""
        if self.file is None:
            return self.given or ()
        check_whole_records(self.file)
        return [record.sequence for record in read_file_records(self.file, range(len(self.file)))]

    def pooled(self, paths: Sequence[str]) -> Sequence[bytes]:
        """Return the sequences that were pooled; from these files where those that were read are gone."""
        if self.file is None:
            return self.given or ()
        option = "subject_sequences"
        inputs = read_file_settings(self.file, remedy=_GIVE_FASTA).inputs
        is_there = bool(inputs) and all(map(os.path.isfile, inputs))
        found = dict(iter_row_sequences(self.file, paths=() if is_there else paths, option=option))
        return [found[row] for row in range(len(self.file))]


def queries_of(file: EmbeddingFile, layer: str) -> Queries:
    """Take the rows of an embedding file as queries."""
    _ = file.X  # as for the database
    return Queries(
        name=str(file.path),
        places=Places.of(file),
        matrix=file[layer],
        settings=comparable_settings(file.provenance, layer),
        records=record_names(file),
        file=file,
    )


def read_queries(names: Sequence[str | PathLike[str]], options: Mapping[str, Any]) -> Queries:
    """Read sequences as queries that need no vectors."""
    records = list(read_sequences(names, **{key: options[key] for key in READING_OPTIONS if key in options}))
    _check_any(records, names)
    return Queries(
        name="queries",
        places=_places(records),
        matrix=np.zeros((len(records), 0), np.float32),
        settings={},
        records=[record.id for record in records],
        given=[record.sequence for record in records],
    )


def embed_queries(
    names: Sequence[str | PathLike[str]],
    database: EmbeddingFile,
    layer: str,
    *,
    model: str | PathLike[str] | GenomicModel | None = None,
    options: Mapping[str, Any],
) -> Queries:
    """Embed sequences as the database was.

    The input is read once, so that it may be a pipe, and embedded one work unit at a time; what stays is the
    sequence and one float32 vector per record.
    """
    settings = read_file_settings(database, remedy="give queries as an embedding file, too")
    loading: dict[str, Any] = {}
    if model is None or isinstance(model, str | PathLike):
        loading |= {"dtype": settings.dtype, "fp8": settings.fp8}
    if model is None:
        loading["revision"] = settings.revision
    loading |= {name: options[name] for name in _MODEL_OPTIONS if name in options}
    keep_case = bool(settings.reading.get("keep_case"))
    reading = {name: options[name] for name in READING_OPTIONS if name in options}
    read = begin_reading(read_sequences(names, keep_case=keep_case, **reading))
    with use_threads(options.get("threads")):
        embedder = RecordEmbedder(
            settings.model if model is None else model, **settings.embedding_options(layer), **loading
        )
        made = comparable_settings(embedder.provenance, layer) | {"keep_case": keep_case}
        check_comparable(
            made, comparable_settings(database.provenance, layer), names=("queries", database.path)
        )
        sequences: list[bytes] = []
        records = _noting(read, sequences)
        rows, vectors, failed = [], [], {}
        for row, found in embedder.rows(records):
            rows.append(row)
            if has_failed(row.flags):
                failed[row.id] = row.flags.rpartition(f"{FAILED}:")[2]
            vectors.append(np.asarray(found[layer], np.float32))
    _check_any(rows, names)
    places = _places(rows)
    return Queries(
        name="queries",
        places=places,
        matrix=np.stack(vectors),
        settings=made,
        records=places.ids,
        failed=failed,
        given=sequences,
    )


def _check_any(rows: Sequence[object], names: Sequence[str | PathLike[str]]) -> None:
    if not rows:
        problem = "no record is left to search for; check the input, or set invalid='mask'"
        raise EmptyRecordError(problem, path=", ".join(fspath(name) for name in names))


def _places(rows: Sequence[ObsRow] | Sequence[SequenceRecord]) -> Places:
    return Places(
        ids=[row.id for row in rows],
        starts=np.array([row.start for row in rows], np.int64),
        ends=np.array([row.end for row in rows], np.int64),
        strands=[row.strand for row in rows],
        descriptions=[row.description for row in rows],
    )


def _noting(records: Iterable[SequenceRecord], sequences: list[bytes]) -> Iterator[SequenceRecord]:
    for record in records:
        sequences.append(record.sequence)
        yield record
