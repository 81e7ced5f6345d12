"""``verify``: embed a sample of the records of a file again, as the file says; and ``certify``.

``file -> sample of its records -> their sequences -> vectors -> differences``. The input is named in the
file, or given; each sequence must have the SHA-256 that the file recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genoembed.config.fields import named_options
from genoembed.config.files import VerifyConfig
from genoembed.embedding import RecordEmbedder
from genoembed.errors import ConfigError, EmptyRecordError, StoreError
from genoembed.models.provenance import WEIGHTS
from genoembed.models.registry import name_earlier_weights
from genoembed.pipeline.agreement import (
    FP8,
    Difference,
    LayerComparison,
    difference,
    summarize,
    tolerance_of,
    worst,
)
from genoembed.pipeline.embedding_file import (
    UNREADABLE,
    read_again,
    read_file_settings,
    record_names,
    runs_fp8,
)
from genoembed.pipeline.request import use_threads
from genoembed.sequences import read_sequences
from genoembed.sequences.reading import file_names
from genoembed.store import open_embeddings
from genoembed.store.schema import has_failed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from genoembed.contracts import SequenceRecord
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.pipeline.embedding_file import FileSettings
    from genoembed.store import EmbeddingFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """How little a record's vector depends on what shares its batch."""

    num_records: int
    """Records of the sample, each embedded alone and together with the others."""
    max_absolute: float
    """Largest difference of a value."""
    max_relative: float
    """The same, divided by the largest value of the record's vector."""
    min_cosine: float
    tolerance: float
    """Largest relative difference that counts as none."""
    is_within: bool
    model: str
    weights_sha256: str
    dtype: str
    device: str
    batch_tokens: int
    """Slots of a batch, padding included, in which they were together."""
    layers: tuple[str, ...]
    torch: str
    """Its version."""
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """Whether a file holds what its settings give."""

    path: Path
    layers: tuple[LayerComparison, ...]
    """Of the records that were embedded again."""
    tolerance: float
    num_sampled: int
    """Records that were looked for in the input."""
    missing: tuple[str, ...]
    """Those that the input does not have."""
    other_sequence: tuple[str, ...]
    """Those whose sequence is another than the file says."""
    same_weights: bool | None
    """Whether the model has the weights that the file names; None where one of the two names none."""
    other_model_files: tuple[str, ...]
    """Files of the model, other than weights, with other content than those that made the file."""
    certificate: Certificate | None
    """Of the same sample, if it was requested."""

    @property
    def is_within(self) -> bool:
        """Whether all of the sample were found, with vectors that are equal within the tolerance."""
        is_other_model = self.same_weights is False or self.other_model_files
        strangers = self.missing or self.other_sequence or is_other_model
        differs = any(layer.num_outside for layer in self.layers)
        return not strangers and not differs and (self.certificate is None or self.certificate.is_within)


@named_options(VerifyConfig)
def verify(
    path: str | PathLike[str],
    inputs: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
    *,
    sample: int = 32,
    seed: int = 0,
    tolerance: float | None = None,
    certificate: bool = False,
    model: str | PathLike[str] | GenomicModel | None = None,
    regions: Sequence[str | PathLike[str]] | None = None,
    threads: int | None = None,
    **options: Any,
) -> VerifyReport:
    """Embed a sample of a file's records again, and compare.

    Args:
        path: A file that genoembed wrote.
        inputs: The sequence files that it was made of; None takes those that it names.
        sample: Records to embed again, chosen by chance; all where there are fewer. Those that failed are not
            among them.
        seed: Of the choice.
        tolerance: Largest relative difference that counts as equal, as for ``compare``; None follows from the
            types of numbers of the file and of this run.
        certificate: Also embed each of them alone, and say how far that differs.
        model: Instead of the one that the file names: where it is on this machine.
        regions: Instead of the region files that the file names.
        threads: CPU threads of the model; None leaves torch's choice.
        **options: ``device``, ``dtype``, ``fp8``, ``batch_tokens`` and ``trust_remote_code`` of this run.
            None takes what the file says, and the device that there is.

    Returns:
        What was found.

    Raises:
        ConfigError: If options are wrong, or the file does not say how it was made, or not of what files.
        StoreError: If the file cannot be read.
        GenoembedError: If input or model fail.
    """
    _check(sample=sample, tolerance=tolerance)
    with use_threads(threads), open_embeddings(path) as file:
        settings = read_file_settings(file, remedy="extract the sequences again")
        _check_columns(file)
        wanted = _sample_ids(file, sample, seed)
        records = _find(wanted, _records(file, settings, inputs, regions))
        is_named = model is None or isinstance(model, str | PathLike)
        # a model that is loaded has its revision and its type of numbers already
        embedder = RecordEmbedder(
            settings.model if model is None else model,
            **settings.embedding_options(),
            per_window=settings.per_window,
            **(
                {"revision": settings.revision, "dtype": settings.dtype, "fp8": settings.fp8}
                if is_named
                else {}
            )
            | {name: value for name, value in options.items() if value is not None},
        )
        _check_weights(file, settings, embedder.model)
        compared, others, stored = _compare(file, wanted, records, embedder)
        computed = [settings.dtype, str(embedder.model.provenance["dtype"])]
        if runs_fp8(file) and embedder.model.fp8_numbers == "on":
            computed.append(FP8)
        limit = tolerance_of(computed, stored) if tolerance is None else tolerance
        proof = _certify(embedder, [*records.values()], None, seed) if certificate and records else None
        return VerifyReport(
            path=Path(path),
            layers=tuple(summarize(name, found, tolerance=limit) for name, found in compared.items()),
            tolerance=limit,
            num_sampled=len(wanted),
            missing=tuple(name for name in wanted if name not in records),
            other_sequence=tuple(others),
            other_model_files=_other_files(settings.content, embedder.model.content),
            same_weights=_same(settings.weights_sha256, embedder.model.provenance["weights_sha256"]),
            certificate=proof,
        )


def certify(
    inputs: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    sample: int = 32,
    seed: int = 0,
    tolerance: float | None = None,
    invalid: str = "error",
    **options: Any,
) -> Certificate:
    """Measure how far vectors depend on what shares their batch: each record alone, against all together.

    Args:
        inputs: Sequence files.
        sample: Records to measure on, chosen by chance; all where there are fewer.
        seed: Of the choice.
        tolerance: Largest relative difference that counts as none; None follows from the type of numbers.
        invalid: Letters outside IUPAC DNA: ``error``, ``skip`` the record, or ``mask``.
        **options: What :func:`genoembed.embed` takes: ``model``, ``layers``, ``pooling``, ``rc``, ``window``,
            ``batch_tokens``, ``dtype``, ``device`` ...

    Returns:
        The measurement; ``dataclasses.asdict`` gives what JSON holds.

    Raises:
        ConfigError: If options are wrong.
        EmptyRecordError: If the input has no record.
        GenoembedError: If input or model fail.
    """
    _check(sample=sample, tolerance=tolerance)
    names = file_names(inputs)
    records = _reservoir(read_sequences(names, invalid=invalid), sample, seed)  # type: ignore[arg-type]
    if not records:
        problem = "no record to measure on; check the input"
        raise EmptyRecordError(problem, path=", ".join(names))
    return _certify(RecordEmbedder(**options), records, tolerance, seed)


def _certify(
    embedder: RecordEmbedder, records: Sequence[SequenceRecord], tolerance: float | None, seed: int
) -> Certificate:
    together = embedder.rows(records)
    found: list[Difference] = []
    # one alone may have several rows: windows
    alone = (row for record in records for row in embedder.rows([record]))
    for (_, mine), (_, theirs) in zip(alone, together, strict=True):
        found += [difference(mine[name], theirs[name]) for name in mine]
    facts = embedder.model.provenance
    computed = [str(facts["dtype"]), *([FP8] if embedder.model.fp8_numbers == "on" else [])]
    limit = tolerance_of(computed) if tolerance is None else tolerance
    largest = worst(found)
    return Certificate(
        num_records=len(records),
        max_absolute=largest.absolute,
        max_relative=largest.relative,
        min_cosine=largest.cosine,
        tolerance=limit,
        is_within=largest.is_within(limit),
        model=str(facts["id"]),
        weights_sha256=str(facts["weights_sha256"]),
        dtype=str(facts["dtype"]),
        device=str(facts["device"]),
        batch_tokens=embedder.batch_tokens,
        layers=embedder.layers,
        torch=str(torch.__version__),
        seed=seed,
    )


def _check(*, sample: int, tolerance: float | None) -> None:
    problems = []
    if sample < 1:
        problems.append(f"sample is {sample}; set sample to 1 or more")
    if tolerance is not None and not tolerance >= 0:  # NaN as well
        problems.append(f"tolerance is {tolerance}; set tolerance to 0 or more")
    if problems:
        raise ConfigError(*problems)


def _check_columns(file: EmbeddingFile) -> None:
    """Raise if columns of the vectors were taken out or reordered: the model gives all of them."""
    if picked := [*file.provenance.get("columns", {})]:
        message = (
            f"{file.path}: columns of {', '.join(picked)} were left out or reordered by another program, so "
            "its vectors are not those that the model gives; verify the file that it was made from"
        )
        raise ConfigError(message)


def _check_weights(file: EmbeddingFile, settings: FileSettings, model: GenomicModel) -> None:
    """Raise if the file was made with weights whose model has others now."""
    whose = name_earlier_weights(settings.weights_sha256)
    if whose is not None and settings.weights_sha256 != model.provenance["weights_sha256"]:
        message = (
            f"{file.path}: made with {whose}, so that its vectors cannot be made again; "
            "extract the sequences again, or set model to a folder with those weights"
        )
        raise ConfigError(message)


def _sample_ids(file: EmbeddingFile, sample: int, seed: int) -> list[str]:
    """Choose records that have a vector, in the order of the file."""
    names = record_names(file)
    has_vector = [not has_failed(str(flags)) for flags in file.obs["flags"]]
    # once each: with windows, a record has several rows
    usable = list(dict.fromkeys(name for name, is_there in zip(names, has_vector, strict=True) if is_there))
    if not usable:
        problem = "no record has a vector, so there is nothing to verify; extract them again"
        raise StoreError(problem, path=str(file.path))
    if len(usable) <= sample:
        return usable
    chosen = np.random.default_rng(seed).choice(len(usable), sample, replace=False)
    return [usable[index] for index in sorted(chosen.tolist())]


def _records(
    file: EmbeddingFile,
    settings: FileSettings,
    inputs: str | PathLike[str] | Sequence[str | PathLike[str]] | None,
    regions: Sequence[str | PathLike[str]] | None,
) -> Iterator[SequenceRecord]:
    names = settings.inputs if inputs is None else file_names(inputs)
    if not names or (inputs is None and "-" in names):
        what = "was made of standard input" if names else UNREADABLE
        message = f"{file.path}: it {what}; set inputs to the file with these sequences"
        raise ConfigError(message)
    places = settings.regions if regions is None else file_names(regions)
    return read_again(file, names, places, settings.reading)


def _find(wanted: Sequence[str], records: Iterable[SequenceRecord]) -> dict[str, SequenceRecord]:
    """Take the requested records; reading ends with the last of them."""
    missing = set(wanted)
    found = {}
    for record in records:
        if record.id in missing:
            found[record.id] = record
            missing.remove(record.id)
            if not missing:
                break
    return found


def _compare(
    file: EmbeddingFile,
    wanted: Sequence[str],
    records: Mapping[str, SequenceRecord],
    embedder: RecordEmbedder,
) -> tuple[dict[str, list[tuple[str, Difference]]], list[str], set[str]]:
    """Return the differences by layer, the ids of other sequences, and the types of numbers stored."""
    compared: dict[str, list[tuple[str, Difference]]] = {name: [] for name in file.layers}
    others: list[str] = []
    # ids of rows, which with windows are not those of records
    places = {name: index for index, name in enumerate(file.ids)}
    there = [records[name] for name in wanted if name in records]
    for row, vectors in embedder.rows(there) if there else ():
        index = places.get(row.id)
        # files that say nothing of their sequences are taken at their word
        if index is None or _same(str(file.obs["sha256"][index]), row.sha256) is False:
            others.append(row.id)
            continue
        for name, found in compared.items():
            stored, computed = file.vectors(index, name), vectors[name]
            if stored.shape != computed.shape:
                message = (
                    f"{file.path}: layer {name!r} of {row.id!r} has shape {stored.shape}, the model gives "
                    f"{computed.shape}; it is another model than made the file, so set model to that one"
                )
                raise ConfigError(message)
            found.append((row.id, difference(stored, computed)))
    return compared, others, {file[name].dtype.name for name in file.layers}


def _other_files(recorded: Mapping[str, str], found: Mapping[str, str]) -> tuple[str, ...]:
    """Name what differs of a model besides its weights; nothing where a file does not say it."""
    names = sorted({*recorded, *found} - {WEIGHTS}) if recorded else ()
    return tuple(name for name in names if recorded.get(name) != found.get(name))


def _same(recorded: object, found: object) -> bool | None:
    """Compare two texts; None where one of them says nothing."""
    return recorded == found if recorded and found else None


def _reservoir(records: Iterable[SequenceRecord], number: int, seed: int) -> list[SequenceRecord]:
    """Choose records by chance in one pass, each with equal odds; in the order of the input."""
    # Algorithm R (Vitter 1985): each later record takes the place of one of the kept with odds number / seen
    generator = np.random.default_rng(seed)
    kept: list[tuple[int, SequenceRecord]] = []
    for index, record in enumerate(records):
        if len(kept) < number:
            kept.append((index, record))
        elif (place := int(generator.integers(index + 1))) < number:
            kept[place] = (index, record)
    return [record for _, record in sorted(kept, key=lambda pair: pair[0])]
