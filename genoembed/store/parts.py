"""The finished units of a run that is under way, in a folder next to the output.

``OUTPUT.parts/`` holds ``manifest.json`` (what the run is), for each finished unit ``unit-000123.h5`` (its
rows; ``.rows`` for those of a table) and ``unit-000123.json`` (what it was made from, and the digest of its
file), and ``input.json`` once the input was read to its end. Promised: each of them appears whole or not at
all and lasts through a power cut; a unit counts as finished only if its input, its settings and the bytes of
its file are what they say; two processes never work on the same share; what cannot be read is one error that
names the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genoembed.atomic import check_space, free_bytes, write_text
from genoembed.contracts import EmbeddingBlock
from genoembed.errors import GenoembedError, StoreError, StoreFormatError
from genoembed.store.schema import STORAGE_DTYPES
from genoembed.store.writer import EmbeddingWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import BinaryIO

    from genoembed.config.choices import StorageDtype
    from genoembed.contracts import TokenBlock
    from genoembed.store.schema import JSON

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

MANIFEST, INPUT, CERTIFICATE = "manifest.json", "input.json", "certificate.json"
_FORMAT = "genoembed-parts"
_LONGEST_WAIT_S = 10.0
"""For another process that begins with the same parts, which takes it a moment."""
_VERSION = 1
_PARTS = re.compile(r"unit-\d{6,}\.(h5|rows|json)|input\.json|certificate\.json|\..*\.(tmp|partial)")
_OURS = re.compile(rf"{_PARTS.pattern}|.*\.lock")
_SUFFIXES = {".h5", ".hdf5", ".h5ad"}
_SHOWN = 8
_UNIT_OVERHEAD = 1 << 20
"""Bytes of a unit's file in addition to its vectors, about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitRecord:
    """What is known about a finished unit."""

    number: int
    """Position in the run, from 0."""
    content: str
    """SHA-256 of the records it was made from."""
    first: str
    """Id of its first record."""
    last: str
    """Id of its last record."""
    num_records: int
    num_bases: int
    num_rows: int
    stats: Mapping[str, float]
    """What its forward passes cost."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Records without a vector, by id: why."""
    shard_sha256: str = ""
    """Of the file with its rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitRows:
    """A unit that was embedded, and is to be saved."""

    record: UnitRecord
    block: EmbeddingBlock | TokenBlock
    feature_names: Sequence[str] | None
    """Of the primary matrix; None for one vector per token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a run is."""

    identity: Mapping[str, JSON]
    """Everything that decides what the vectors of a record are, by name."""
    provenance: Mapping[str, JSON]
    """What the output says about the run that made it, as far as that is known at its start."""
    out_dtype: StorageDtype | None
    """Number type of the vectors; None where units hold rows of a table."""
    num_shares: int
    """Into how many shares the units were divided, by the process that began."""
    policies: Mapping[str, JSON] = field(default_factory=dict)
    """What is done about bad records. Units record what became of theirs, so that another choice may go on
    with those that it leaves as they are."""

    @property
    def digest(self) -> str:
        """SHA-256 of identity and policies: two runs with the same are the same run."""
        return _json_digest([self.identity, self.policies])

    @property
    def unit_digest(self) -> str:
        """SHA-256 of the identity: two runs with the same may share units."""
        return _json_digest(self.identity)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFacts:
    """What is known when the input was read to its end."""

    num_units: int
    counts: Mapping[str, int]
    """What was read, and what the input policies did."""
    inputs: Sequence[Mapping[str, JSON]]
    """Files with their digests."""
    regions: Sequence[Mapping[str, JSON]]

    @property
    def content(self) -> list[object]:
        """What two processes that have read the same in the same way agree in."""
        # windows are counted as units are merged, not as the input is read
        read = {name: number for name, number in self.counts.items() if name != "windows"}
        return [self.num_units, [item.get("sha256") for item in self.inputs], read]


def _json_digest(values: object) -> str:
    text = json.dumps(values, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def parts_folder(output: str | os.PathLike[str]) -> Path:
    """Return the folder of the parts of an output.

    Example:
        >>> parts_folder("phage.h5").name, parts_folder("phage.v2").name
        ('phage.parts', 'phage.v2.parts')
    """
    target = Path(os.path.realpath(output))
    stem = target.stem if target.suffix.lower() in _SUFFIXES else target.name
    return target.with_name(f"{stem}.parts")


class Parts:
    """The parts of one run; ``begin`` and ``find`` make it."""

    def __init__(self, output: str | os.PathLike[str], manifest: Manifest) -> None:
        self.output = str(output)
        self.folder = parts_folder(output)
        self.manifest = manifest
        self._digest = manifest.unit_digest
        self._saved_bytes = 0
        self._has_warned = False
        self._drops_other = False
        self._changed_policies: list[str] = []

    @classmethod
    def begin(cls, output: str | os.PathLike[str], manifest: Manifest, *, drop_other: bool = False) -> Parts:
        """Go on with the parts of a run, or begin them."""
        parts = cls(output, manifest)
        with _reporting(parts.folder):
            parts.folder.mkdir(exist_ok=True)
        # waiting, where other locks refuse: jobs of an array begin at the same moment, and this takes no time
        with parts.lock("begin", wait=True):
            found = _read_manifest(parts.folder)
            if found is not None and found.unit_digest != parts._digest:
                problem = parts._difference(found)
                if not drop_other:
                    raise StoreError(problem, path=str(parts.folder))
                # of units that are to be dropped, none may be in work
                for path in parts.folder.glob("*.lock"):
                    if path.stem != "begin":
                        with parts.lock(path.stem):
                            pass
                logger.warning("%s: dropped, since it %s", parts.folder, problem.partition(";")[0])
                parts._drop(_PARTS)
                found = None
            if found is None:
                # the folder goes when the run is merged: it must hold nothing that is not ours
                foreign = [path.name for path in parts.folder.iterdir() if not _OURS.fullmatch(path.name)]
                if foreign:
                    found_there = f"holds {foreign[0]!r}, which no run put there"
                    problem = f"{found_there}; set output to another file, or move it"
                    raise StoreError(problem, path=str(parts.folder))
                parts._write(MANIFEST, {"format": _FORMAT, "version": _VERSION, **asdict(manifest)})
                return parts
            if found.policies != manifest.policies:
                parts._change_policies(found, drop_other=drop_other)
            else:
                parts = cls(output, found)
        parts._drops_other = drop_other
        return parts

    def _change_policies(self, found: Manifest, *, drop_other: bool) -> None:
        """Go on under other policies for bad records; units that they change are refused one by one."""
        self._changed_policies = identity_differences(found.policies, self.manifest.policies)
        if self.manifest.num_shares > 1 and not drop_other and self._read(INPUT) is not None:
            problem = (
                f"another share was made with other policies: {'; '.join(self._changed_policies)}; give all "
                "shares the same, or set overwrite to true to make this one again"
            )
            raise StoreError(problem, path=str(self.folder))
        logger.info("%s: goes on with %s", self.folder, "; ".join(self._changed_policies))
        self._write(MANIFEST, {"format": _FORMAT, "version": _VERSION, **asdict(self.manifest)})

    @classmethod
    def find(cls, output: str | os.PathLike[str]) -> Parts | None:
        """Look for the parts of an output."""
        manifest = _read_manifest(parts_folder(output))
        return None if manifest is None else cls(output, manifest)

    @contextmanager
    def lock(self, name: str, *, wait: bool = False) -> Iterator[None]:
        """Keep other processes from the same work; ends with the process, whatever ends that."""
        if fcntl is None:
            yield
            return
        with _reporting(self.folder):
            file = (self.folder / f"{name}.lock").open("ab")
        with file:
            # not for ever: whoever has it may have been stopped, or may be on a machine that is gone
            end = time.monotonic() + (_LONGEST_WAIT_S if wait else 0)
            while not _has_locked(file):
                if time.monotonic() >= end:
                    problem = f"another process is at work here ({name}); wait for it, or stop it"
                    raise StoreError(problem, path=str(self.folder))
                time.sleep(0.02)
            yield

    def finished(self, number: int, content: str | None = None) -> UnitRecord | None:
        """Return whether a unit is finished."""
        record = self._read_record(number)
        if record is None:
            return None
        stops_at_errors = self.manifest.policies.get("on_error") == "stop"
        if content is not None and record.failed and stops_at_errors:
            name, why = next(iter(record.failed.items()))
            logger.warning("unit %d is made again: record %r failed (%s)", number, name, why)
            return None
        if content is not None and record.content != content:
            if self._drops_other:
                logger.warning("%s: of other sequences, unit %d is made again", self.shard(number), number)
                return None
            as_it_was = "the input as it was (names of files included)"
            if self._changed_policies:
                as_it_was += f" and the same policies ({'; '.join(self._changed_policies)})"
            problem = (
                f"unit {number} was made from other sequences ({record.num_records} records, "
                f"{record.first!r} to {record.last!r}) than the input has there now; give {as_it_was}, set "
                "overwrite to true to start over, or set output to another file"
            )
            raise StoreError(problem, path=str(self.folder))
        if _file_digest(self.shard(number)) != record.shard_sha256:
            logger.warning("%s: damaged, unit %d is made again", self.shard(number), number)
            return None
        return record

    def save(self, unit: UnitRows) -> None:
        """Save a finished unit."""
        number = unit.record.number
        assert self.manifest.out_dtype is not None, "a run of vectors"
        self._check_space(unit, itemsize=STORAGE_DTYPES[self.manifest.out_dtype].itemsize)
        is_pooled = unit.feature_names is not None
        with EmbeddingWriter(
            self.shard(number),
            kind="pooled" if is_pooled else "tokens",
            dtype=self.manifest.out_dtype,
            feature_names=unit.feature_names,
            overwrite=True,
        ) as writer:
            writer.append(unit.block)
            writer.finish({"unit": number, "run": self._digest})
        self._save_record(unit.record)

    def save_values(self, record: UnitRecord, values: object) -> None:
        """Save what a finished unit of a table gave; what JSON holds, NaN included."""
        with _reporting(self.folder):
            write_text(self.shard(record.number), json.dumps(values))
        self._save_record(record)

    def read_values(self, number: int) -> Any:
        """Read what a finished unit of a table gave."""
        return json.loads(self.shard(number).read_text(encoding="utf-8"))

    def _save_record(self, record: UnitRecord) -> None:
        # it comes after the rows: where it is, they are whole
        shard = self.shard(record.number)
        facts = asdict(record) | {"shard_sha256": _file_digest(shard), "run": self._digest}
        self._write(shard.with_suffix(".json").name, facts)

    def _check_space(self, unit: UnitRows, *, itemsize: int) -> None:
        matrices = unit.block.matrices if isinstance(unit.block, EmbeddingBlock) else unit.block.values
        needed = sum(matrix.size for matrix in matrices.values()) * itemsize + _UNIT_OVERHEAD
        check_space(self.folder, needed, what=f"unit {unit.record.number}")
        self._saved_bytes += needed
        free = free_bytes(self.folder)
        # the merged file is as large as all units so far, which stay until it is there
        if free is not None and free - needed < self._saved_bytes and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: %.1f MB are free, fewer than the merged file will need; free some space before the run "
                "ends, or run the same command again afterwards",
                self.folder,
                free / 1e6,
            )

    def close_input(self, facts: InputFacts) -> None:
        """Note that the input was read to its end."""
        before = self.input_facts() if self.manifest.num_shares > 1 else None
        if before is not None and before.content != facts.content:
            problem = (
                f"another share was made from another input ({before.num_units} units, here "
                f"{facts.num_units}); give all shares the same files, and run those again that had others "
                "(with overwrite)"
            )
            if not self._drops_other:
                raise StoreError(problem, path=str(self.folder))
            logger.warning("%s: %s", self.folder, problem)
        self._write(INPUT, asdict(facts) | {"run": self._digest})

    def save_certificate(self, found: Mapping[str, JSON]) -> None:
        """Note how far vectors depend on their batch."""
        self._write(CERTIFICATE, {**found, "run": self._digest})

    def certificate(self) -> dict[str, JSON] | None:
        """Read how far vectors depend on their batch."""
        return self._read(CERTIFICATE)

    def input_facts(self) -> InputFacts | None:
        """Read what the input held."""
        found = self._read(INPUT)
        return None if found is None else InputFacts(**_known_fields(InputFacts, found))

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        with _reporting(self.folder):
            write_text(self.folder / name, json.dumps(values))

    def _read(self, name: str) -> dict[str, Any] | None:
        """Read a file of this run; what another run left under that name counts as missing."""
        found = _read_json(self.folder / name)
        return None if found is None or found.pop("run", None) != self._digest else found

    def began_ns(self) -> int:
        """Return when the run began."""
        return (self.folder / MANIFEST).stat().st_mtime_ns

    def saved_numbers(self) -> list[int]:
        """Return the units that were saved, intact or not."""
        return sorted(int(path.stem.removeprefix("unit-")) for path in self.folder.glob("unit-*[0-9].json"))

    def note_kept(self, error: BaseException, *, alone: bool = True) -> None:
        """Say at a failure which units are kept; if there are none, nothing is left behind."""
        num_units = len(self.saved_numbers())
        if num_units:
            units = "1 finished unit is" if num_units == 1 else f"{num_units} finished units are"
            error.add_note(f"{units} kept in {self.folder}: run the same command again to go on")
        elif alone:
            self.remove()

    def remove(self) -> None:
        """Remove the parts, the manifest last; what is not ours stays, and so does the folder then."""
        self._drop(_OURS)
        with suppress(OSError):
            self.folder.rmdir()

    def _drop(self, pattern: re.Pattern[str]) -> None:
        with _reporting(self.folder):
            names = sorted(path.name for path in self.folder.iterdir())
            # the manifest last: while it is there, a removal that was cut off is known to be one
            for name in (*filter(pattern.fullmatch, names), MANIFEST):
                (self.folder / name).unlink(missing_ok=True)

    def remove_temporary(self) -> None:
        """Remove what processes left that were cut off while they wrote; no process may be at work."""
        for path in (*self.folder.glob(".*.tmp"), *self.folder.glob(".*.partial")):
            path.unlink(missing_ok=True)

    def _difference(self, found: Manifest) -> str:
        num_units = len(self.saved_numbers())
        changed = identity_differences(found.identity, self.manifest.identity)
        shown = ", ".join(changed[:_SHOWN])
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        return (
            f"holds {num_units} finished units of another run: {shown}{more}; set these as they were to go "
            "on, set overwrite to true to start over, or set output to another file"
        )

    def shard(self, number: int) -> Path:
        """Return the path of the file with the rows of a unit."""
        return self.folder / f"unit-{number:06}.{'rows' if self.manifest.out_dtype is None else 'h5'}"

    def _read_record(self, number: int) -> UnitRecord | None:
        path = self.shard(number).with_suffix(".json")
        try:
            found = self._read(path.name)
            record = None if found is None else UnitRecord(**_known_fields(UnitRecord, found))
        except (StoreFormatError, TypeError) as error:
            logger.warning("%s: damaged (%s), unit %d is made again", path, error, number)
            return None
        return record if record is not None and record.number == number else None


def identity_differences(before: Mapping[str, JSON], now: Mapping[str, JSON]) -> list[str]:
    """Say what is not as it was, name by name; of digests, only that they differ.

    Example:
        >>> before = {"rc": "none", "config.json": "ab" * 32}
        >>> identity_differences(before, {"rc": "mean", "config.json": "cd" * 32})
        ["rc was 'none' and is 'mean'", 'config.json has other content']
    """
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [
        f"{name} has other content"
        if _is_digest(before.get(name)) and _is_digest(now.get(name))
        else f"{name} was {_shortened(before.get(name))} and is {_shortened(now.get(name))}"
        for name in names
    ]


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _shortened(value: object) -> str:
    return f"the file {value[:8]}..." if isinstance(value, str) and _is_digest(value) else repr(value)


def _file_digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


@contextmanager
def _reporting(folder: Path) -> Iterator[None]:
    try:
        yield
    except GenoembedError:
        raise
    except OSError as error:
        problem = (
            f"could not be written ({error.strerror or error}), finished units are kept; check the free "
            f"space, quota and permissions of {str(folder.parent)!r}, then run the same command again"
        )
        raise StoreError(problem, path=str(folder)) from error


def _has_locked(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.debug("%s: no locks on this file system (%s)", file.name, error)
    return True


def _read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a folder of parts."""
    path = folder / MANIFEST
    found = _read_json(path)
    if found is None:
        return None
    if found.get("format") != _FORMAT or not isinstance(found.get("identity"), dict):
        problem = "is not the manifest of a run; move it, or set output to another file"
        raise StoreFormatError(problem, path=str(path))
    if found.get("version") != _VERSION:
        problem = (
            f"is of version {found.get('version')!r}, this genoembed knows {_VERSION}; finish the run with "
            "the genoembed that began it, or set overwrite to true to start over"
        )
        raise StoreFormatError(problem, path=str(path))
    return Manifest(**_known_fields(Manifest, found))


def _known_fields(cls: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Pick what a dataclass has fields for; a later release may have written more."""
    return {key.name: found[key.name] for key in fields(cls) if key.name in found}


def _read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        problem = f"{str(path.parent)!r} is not a folder; move it, or set output to another file"
        raise StoreError(problem, path=str(path)) from error
    except (OSError, ValueError, RecursionError) as error:
        problem = f"cannot be read ({error}); remove its folder to start over"
        raise StoreFormatError(problem, path=str(path)) from error
    if not isinstance(found, dict):
        problem = "is not a JSON object; remove its folder to start over"
        raise StoreFormatError(problem, path=str(path))
    return found
