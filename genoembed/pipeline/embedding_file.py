"""An embedding file as input of a command: how it was made, its vectors in blocks, its sequences again.

In: an open embedding file. Out: :class:`FileSettings` (here alone provenance is read back), a
:class:`VectorSource` (rows as float64, transformed where a transform is given), and the records again.

N rows, D features.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genoembed.errors import ConfigError, StoreFormatError
from genoembed.models.registry import name_earlier_weights
from genoembed.pooling.transform import FittedTransform
from genoembed.sequences import read_sequences
from genoembed.sequences.compression import InputDigests
from genoembed.sequences.records import contig_places
from genoembed.store.transform_file import read_transform

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from os import PathLike

    from numpy.typing import NDArray

    from genoembed.config.choices import ComputeDtype, Fp8Choice
    from genoembed.contracts import SequenceRecord
    from genoembed.store import EmbeddingFile
    from genoembed.store.schema import LazyMatrix


_LOG = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------- how a file was made

_READING = (
    *("invalid", "duplicates", "empty", "gaps", "keep_case", "flank"),
    *("feature", "name_attribute", "join_by", "bad_regions"),
)
_POOLED = ("pooling", "skip_first", "fusion", "rc")
_COMPARED = (*_POOLED, "fusion_weights")
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSettings:
    """How the vectors of a file were made, in the words of ``extract``."""

    model: str
    revision: str | None
    dtype: ComputeDtype
    """Number type that the model computed in."""
    fp8: Fp8Choice
    weights_sha256: str | None
    content: Mapping[str, str]
    """Digest of each file of the model; empty for files of vectors from before these were recorded."""
    requested_layers: tuple[str, ...]
    """As the user wrote them."""
    layers: tuple[str, ...]
    """Module paths."""
    pooling: str
    skip_first: int
    fusion: str
    fusion_weights: tuple[float, ...]
    rc: str
    window: int | None
    stride: int | None
    per_window: bool
    carry_state: bool
    is_finetuned: bool
    """Whether the model had been fine-tuned for such vectors: they may have been projected or normalized."""
    inputs: tuple[str, ...]
    regions: tuple[str, ...]
    reading: Mapping[str, Any]
    """Policies for the input."""

    def embedding_options(self, layer: str | None = None) -> dict[str, Any]:
        """List the options of ``embed`` and ``extract`` that give such vectors: of one layer if not fused."""
        takes_all = layer is None or self.fusion != "none" or self.is_finetuned
        options = {
            "layers": self.layers if takes_all else (layer,),
            "pooling": self.pooling,
            "fusion": self.fusion if takes_all else "none",
            "fusion_weights": self.fusion_weights or None,
            "skip_first": self.skip_first,
            "rc": self.rc,
            "window": self.window,
            "stride": self.stride,
            "carry_state": self.carry_state or None,
        }
        return {name: value for name, value in options.items() if value is not None}


def find_file_settings(file: EmbeddingFile) -> FileSettings | None:
    """Read how a file was made; None where it does not say, as after a conversion by other software."""
    provenance = file.provenance
    config, made = _section(provenance, "config"), _section(provenance, "model")
    model, embedding, windows, read = (
        _section(config, name) for name in ("model", "embedding", "windows", "input")
    )
    # what differed between files that AnnData joined is gone, key by key: without these, none is made again
    needed = ((made, ("dtype",)), (model, ("model",)), (embedding, _POOLED))
    if not (windows and read) or any(name not in section for section, names in needed for name in names):
        return None
    return FileSettings(
        model=model["model"],
        revision=model.get("revision"),
        dtype=made["dtype"],
        # files from before the option was there were made without FP8
        fp8=model.get("fp8", "off"),
        weights_sha256=made.get("weights_sha256"),
        content=_section(made, "content"),
        # AnnData drops what was None, too
        requested_layers=tuple(embedding.get("layers", ())),
        layers=tuple(provenance.get("layers", file.layers)),
        **{name: embedding[name] for name in _POOLED},
        fusion_weights=tuple(embedding.get("fusion_weights", ())),
        window=windows.get("window"),
        stride=windows.get("stride"),
        per_window=bool(windows.get("per_window")),
        carry_state=bool(windows.get("carry_state")),
        is_finetuned="finetuned" in provenance,
        inputs=tuple(read.get("inputs") or ()),
        regions=tuple(read.get("regions") or ()),
        reading={name: read[name] for name in _READING if name in read},
    )


def read_file_settings(file: EmbeddingFile, *, remedy: str) -> FileSettings:
    """Read how a file was made; one that does not say is an error that ends with the remedy."""
    settings = find_file_settings(file)
    if settings is None:
        message = (
            f"{file.path}: it does not say how its vectors were made (model, layer, pooling), so none can be "
            f"made like them; {remedy}"
        )
        raise ConfigError(message)
    return settings


def comparable_settings(provenance: Mapping[str, Any], layer: str) -> dict[str, Any]:
    """Collect what two sets of vectors must have in common to be compared.

    Windows, batch sizes, inputs and number types are not among it: a short query may be compared with windows
    of a genome. What was not recorded is left out, so that every file has some.

    Example:
        >>> made = {"model": {"weights_sha256": "ab"}, "config": {"embedding": {"rc": "none"}}}
        >>> comparable_settings(made, "blocks.1")
        {'layer': 'blocks.1', 'model': 'ab', 'fp8': 'off', 'rc': 'none'}
    """
    model, config = _section(provenance, "model"), _section(provenance, "config")
    embedding, trained = _section(config, "embedding"), _section(provenance, "finetuned")
    settings: dict[str, Any] = {"layer": layer}
    if digest := model.get("weights_sha256") or model.get("id"):
        settings["model"] = digest
    if isinstance(content := model.get("content"), Mapping):
        # weights are compared above; of files that are older than this key, nothing more is known
        settings["model files"] = {name: value for name, value in content.items() if name != "weights"}
    if "weights_sha256" in model:  # files from before FP8 could be on say nothing about it
        settings["fp8"] = "off" if model.get("fp8") in (None, "off") else "on"
    settings |= {name: embedding[name] for name in _COMPARED if name in embedding}
    if layer in (picked := _section(provenance, "columns")):  # another program took some, or reordered them
        settings["columns"] = f"a selection ({picked[layer][:8]})"
    if embedding.get("fusion", "none") != "none" and "layers" in provenance:
        settings["layers"] = list(provenance["layers"])
    if "keep_case" in (read := _section(config, "input")):
        settings["keep_case"] = read["keep_case"]
    return settings | {name: trained[name] for name in ("normalize", "pooler") if name in trained}


def joinable_settings(provenance: Mapping[str, Any], layer: str) -> dict[str, Any]:
    """Collect what the rows of one file must have in common: windows and flanks change vectors, too."""
    config = _section(provenance, "config")
    windows = _section(config, "windows")
    return {
        **comparable_settings(provenance, layer),
        **{name: windows.get(name) or None for name in ("window", "stride", "per_window", "carry_state")},
        "flank": _section(config, "input").get("flank", 0),
    }


def reading_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return why the records of two files, by their provenance, cannot be read again in one go."""
    reads = [_section(_section(provenance, "config"), "input") for provenance in (first, second)]
    found = setting_differences(
        *({name: read[name] for name in _READING if read.get(name)} for read in reads)
    )
    inputs, places = ([list(read.get(name) or ()) for read in reads] for name in ("inputs", "regions"))
    if any(reads) and not all(inputs):
        found.append("inputs: one does not say them")
    elif any(places) and (not all(places) or inputs[0] != inputs[1]):
        found.append("regions: of other inputs")
    return found


def setting_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ.

    Example:
        >>> setting_differences({"pooling": "mean", "rc": "none"}, {"pooling": "max", "rc": "none"})
        ["pooling: 'mean' against 'max'"]
    """
    files = [settings.get("model files", {}) for settings in (first, second)]
    first, second = (
        {name: value for name, value in settings.items() if name != "model files"}
        for settings in (first, second)
    )
    if all(files):
        # each file of the model is a setting; vectors from before these were recorded still compare
        first, second = (
            settings | {name: digest[:12] for name, digest in digests.items()}
            for settings, digests in zip((first, second), files, strict=True)
        )
    one, other = (
        {name: _shown_setting(name, value) for name, value in settings.items()}
        for settings in (first, second)
    )
    return [
        f"{name}: {one.get(name, 'nothing recorded')} against {other.get(name, 'nothing recorded')}"
        for name in {**one, **other}
        if one.get(name) != other.get(name)
    ]


def _shown_setting(name: str, value: object) -> str:
    """Write a setting; of weights, also whose they were if others took their place."""
    if name == "model" and isinstance(value, str) and (whose := name_earlier_weights(value)):
        return f"{value!r} ({whose})"
    return repr(list(value) if isinstance(value, tuple) else value)  # tuples come back from JSON as lists


def check_comparable(
    first: Mapping[str, Any], second: Mapping[str, Any], *, names: tuple[object, object]
) -> None:
    """Raise if vectors were not made in the same way, as far as their files say.

    A file that says nothing of its model, such as one that AnnData joined without ``uns``, is compared by its
    layer alone, with a warning.
    """
    known = [{"layer", "columns"} < {"columns", *settings} for settings in (first, second)]
    if known[0] != known[1]:
        first, second = (
            {name: settings[name] for name in ("layer", "columns") if name in settings}
            for settings in (first, second)
        )
    found = setting_differences(first, second)
    if known[0] != known[1] and not found:
        silent, other = names if known[1] else names[::-1]
        _LOG.warning(
            "%s does not say which model made its vectors; they are taken to be like those of %s",
            silent,
            other,
        )
    if found:
        message = (
            f"{names[0]} and {names[1]} hold vectors of another kind ({'; '.join(found)}), expected the same "
            "model, layer, pooling, fusion and rc; embed one of them again with the other's options"
        )
        raise ConfigError(message)


def computed_dtype(file: EmbeddingFile) -> str | None:
    """Return the number type that the model computed in, if the file says it."""
    dtype = _section(file.provenance, "model").get("dtype")
    return None if dtype is None else str(dtype)


def runs_fp8(file: EmbeddingFile) -> bool:
    """Check whether the model's input projections ran in FP8."""
    return _section(file.provenance, "model").get("fp8") not in (None, "off")


def record_names(file: EmbeddingFile) -> list[str]:
    """Return the record of each row: its id, without the place that a row per window adds."""
    if not _has_windows(file):
        return file.ids
    return [
        name.removesuffix(f":{start + 1}-{end}")
        for name, start, end in zip(file.ids, file.obs["start"], file.obs["end"], strict=True)
    ]


def _has_windows(file: EmbeddingFile) -> bool:
    """Return whether the file has one row per window."""
    return bool(_section(_section(file.provenance, "config"), "windows").get("per_window"))


def find_embedding_file(inputs: Sequence[str | PathLike[str]], *, what: str) -> Path | None:
    """Return the path if the input is one embedding file, by content; None for sequence files."""
    are_files = [_is_hdf5(name) for name in inputs]
    if not inputs or (any(are_files) and len(inputs) > 1):
        message = f"{what}: {len(inputs)} files, expected one embedding file, or sequence files; name those"
        raise ConfigError(message)
    return Path(inputs[0]) if are_files[0] else None


def _is_hdf5(name: str | PathLike[str]) -> bool:
    path = Path(name)
    if fspath(name) == "-" or not path.is_file():  # a pipe must not lose its first bytes
        return False
    with path.open("rb") as file:
        return file.read(len(_HDF5_SIGNATURE)) == _HDF5_SIGNATURE


def _section(mapping: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = mapping.get(name)
    return section if isinstance(section, Mapping) else {}


# ---------------------------------------------------------------------------------- the sequences of a file


def read_file_records(
    file: EmbeddingFile, rows: Iterable[int], *, paths: Sequence[str] = (), option: str = "sequences"
) -> list[SequenceRecord]:
    """Read the records of some rows again, as the model saw them: each must have its SHA-256."""
    wanted = list(rows)
    found = dict(_iter_file_records(file, wanted, paths=paths, option=option))
    return [found[row] for row in wanted]


def iter_row_sequences(
    file: EmbeddingFile, rows: Iterable[int] | None = None, *, paths: Sequence[str] = (), option: str
) -> Iterator[tuple[int, bytes]]:
    """Read what was pooled of some rows (None is all) again, without flanks, in the order of the sources.

    Raises:
        ConfigError: If sources are not there, or do not hold all of the rows as they were embedded; of rows
            that are windows, only after the last sequence.
    """
    wanted = range(len(file)) if rows is None else rows
    if not _has_windows(file):
        for row, record in _iter_file_records(file, wanted, paths=paths, option=option):
            yield row, record.sequence[record.core_start : record.core_end]
        return
    obs, names = file.obs, record_names(file)
    windows_of: dict[str, list[int]] = {}
    for row in wanted:
        windows_of.setdefault(names[row], []).append(row)
    settings, sources, digests = *_sources(file, paths, option), InputDigests()
    starts, ends = obs["start"], obs["end"]
    for record in read_again(file, sources, settings.regions, settings.reading, digests):
        for row in windows_of.pop(record.id, ()):
            first = _first_base(record, int(starts[row]), int(ends[row]))
            yield row, record.sequence[first : first + int(obs["length"][row])]
    # a window's own digest is that of what the model saw around it, too: the digests of the files say more
    recorded = {facts.get("sha256") for facts in file.provenance.get("inputs", ())}
    read = {digests.facts(name)["sha256"] for name in sources}
    if windows_of or (recorded - {None} and not read <= recorded):
        names_shown = ", ".join(map(repr, [*windows_of][:3])) or "they have changed"
        message = (
            f"{file.path}: its sequences ({names_shown}) are not in {', '.join(sources)} as they were "
            f"embedded; set {option} to their files"
        )
        raise ConfigError(message)


def _first_base(record: SequenceRecord, start: int, end: int) -> int:
    """Return where the window with these places on the contig begins in the sequence of its record."""
    if not record.stretches:
        before = record.end - end if record.strand == "-" else start - record.start
        return record.core_start + before
    places = contig_places(record).places[record.core_start : record.core_end]
    if len(wrapped := places[places < record.start]):  # over the origin, places go on counting
        places = np.where(places < record.start, places + record.end - 1 - wrapped.max(), places)
    return record.core_start + int(np.argmax((places >= start) & (places < end)))


def _iter_file_records(
    file: EmbeddingFile, rows: Iterable[int], *, paths: Sequence[str], option: str
) -> Iterator[tuple[int, SequenceRecord]]:
    settings, sources = _sources(file, paths, option)
    wanted = {file.ids[row]: row for row in rows}
    digests = file.obs["sha256"]
    for record in read_again(file, sources, settings.regions, settings.reading):
        row = wanted.get(record.id)
        if row is not None and record.sha256 == digests[row]:
            del wanted[record.id]
            yield row, record
            if not wanted:
                return
    if wanted:
        message = (
            f"{file.path}: {len(wanted)} of its sequences ({', '.join(map(repr, [*wanted][:3]))} ...) are "
            f"not in {', '.join(sources)} as they were embedded; set {option} to their files"
        )
        raise ConfigError(message)


def _sources(file: EmbeddingFile, paths: Sequence[str], option: str) -> tuple[FileSettings, list[str]]:
    """Find the files of a file's sequences."""
    settings = read_file_settings(file, remedy="embed the sequences again")
    sources = [*(paths or settings.inputs)]
    if not sources:
        message = f"{file.path}: it {UNREADABLE}; use the files it was joined from, or set {option}"
        raise ConfigError(message)
    if not sources:
        message = (
            f"{file.path}: the sequences of its records are needed, and it does not say in which files they "
            f"are; set {option} to these"
        )
        raise ConfigError(message)
    if lost := [name for name in sources if not Path(name).is_file()]:
        message = (
            f"{file.path}: the sequences of its records are needed, and {', '.join(map(repr, lost))} is no "
            f"file; set {option} to where they are now"
        )
        raise ConfigError(message)
    return settings, sources


UNREADABLE = (
    "does not say of which files it was made (joined rows that were read in different ways have none)"
)


def read_again(
    file: EmbeddingFile,
    sources: Sequence[str],
    regions: Sequence[str],
    reading: Mapping[str, Any],
    digests: InputDigests | None = None,
) -> Iterator[SequenceRecord]:
    """Read the sources of a file again.

    Those of joined rows may share ids, of which the file has one: the record with its digest is read.
    """
    is_joined = any(step.get("command") == "join" for step in file.provenance.get("history", ()))
    if not is_joined or regions or _has_windows(file) or reading.get("duplicates", "error") != "error":
        return read_sequences(sources, regions=regions or None, digests=digests, **reading)
    known = dict(zip(file.ids, file.obs["sha256"], strict=True)) if "sha256" in file.obs else {}
    records = (record for name in sources for record in read_sequences(name, digests=digests, **reading))
    return (record for record in records if known.get(record.id) in (None, "", record.sha256))


# ------------------------------------------------------------------------------------ the vectors of a file

_BLOCK_VALUES = 1 << 21
_MIN_ROWS, _MAX_ROWS = 256, 16384


class VectorSource:
    """Rows of a matrix as float64, a block at a time.

    What is stored as float32 or float16 comes out exactly; transformed vectors are rounded to float32 first,
    so that rows that are equal stay equal wherever a block begins.

    Example:
        >>> VectorSource(np.eye(3, dtype=np.float32)).read(1, 3).tolist()
        [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """

    def __init__(
        self, matrix: LazyMatrix | NDArray[np.floating], transform: FittedTransform | None = None
    ) -> None:
        self._matrix = matrix
        self._transform = transform
        self.width: int = matrix.shape[1] if transform is None else transform.output_width
        """Features of a row."""

    def __len__(self) -> int:
        return len(self._matrix)

    def read(self, start: int, stop: int) -> NDArray[np.float64]:
        """Read consecutive rows."""
        return self._finished(self._matrix[start:stop])

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Read some rows."""
        return self._finished(self._matrix[rows])

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Read everything, a block at a time."""
        step = rows or block_rows(max(self.width, self._matrix.shape[1]))
        for start in range(0, len(self), step):
            yield start, self.read(start, min(start + step, len(self)))

    def _finished(self, block: NDArray[np.floating]) -> NDArray[np.float64]:
        if self._transform is not None:
            block = self._transform.apply(block)
        return np.ascontiguousarray(block, dtype=np.float64)


def block_rows(width: int) -> int:
    """Choose how many rows are read at a time.

    Example:
        >>> block_rows(128), block_rows(1 << 20)
        (16384, 256)
    """
    return min(_MAX_ROWS, max(_MIN_ROWS, _BLOCK_VALUES // width))


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedTransform:
    """A transform from a file."""

    transform: FittedTransform
    settings: Mapping[str, Any]
    """How the vectors that it was fitted on were made, as :func:`comparable_settings` says it."""
    digest: str
    """Of its values."""


def load_transform(path: str | PathLike[str]) -> LoadedTransform:
    """Load what ``fit_transform`` wrote."""
    stored = read_transform(path)
    facts = stored.facts
    try:
        transform = FittedTransform(
            method=facts["method"],
            axes=facts["axes"],
            **{name: stored.arrays[name] for name in ("mean", "matrix", "variances")},
            num_rows=int(facts["num_rows"]),
        )
        settings = dict(facts["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        problem = f"a part of the transform is missing ({error}); fit it again"
        raise StoreFormatError(problem, path=fspath(path)) from error
    return LoadedTransform(transform=transform, settings=settings, digest=stored.digest)


def load_transform_for(file: EmbeddingFile, layer: str, path: str | PathLike[str]) -> LoadedTransform:
    """Load a transform, and raise if it was fitted on vectors of another kind than those of the file."""
    loaded = load_transform(path)
    check_comparable(loaded.settings, comparable_settings(file.provenance, layer), names=(path, file.path))
    return loaded
