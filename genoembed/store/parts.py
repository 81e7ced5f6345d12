"""The finished units of a run that is under way, in a folder beside the output.

``OUTPUT.parts/`` holds ``manifest.json`` (what the run is), for each finished unit ``unit-000123.h5`` (its
rows) and ``unit-000123.json`` (what it was made from, and the digest of its file), and ``input.json`` once
the input was read to its end. Promised: each of them appears whole or not at all and lasts through a power
cut; a unit counts as finished only if its input, its settings and the bytes of its file are what they say;
two processes never work on the same share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from genoembed.contracts import EmbeddingBlock
from genoembed.errors import GenoembedError, StoreError, StoreFormatError
from genoembed.store.atomic import check_space, free_bytes, write_text
from genoembed.store.manifest import (
    MANIFEST,
    InputFacts,
    Manifest,
    UnitRecord,
    UnitRows,
    is_same_input,
    known_fields,
    manifest_text,
    read_json,
    read_manifest,
)
from genoembed.store.schema import STORAGE_DTYPES
from genoembed.store.writer import EmbeddingWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from genoembed.store.schema import JSON

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

INPUT, CERTIFICATE = "input.json", "certificate.json"
_PARTS = re.compile(r"unit-\d{6,}\.(h5|json)|input\.json|certificate\.json|\..*\.tmp")
_OURS = re.compile(rf"{_PARTS.pattern}|.*\.lock")
_SUFFIXES = {".h5", ".hdf5", ".h5ad"}
_SHOWN = 8
_UNIT_OVERHEAD = 1 << 20
"""Bytes of a unit's file beside its vectors, about."""


def parts_folder(output: str | os.PathLike[str]) -> Path:
    """Name the folder of the parts of an output.

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
        self._digest = manifest.digest
        self._saved_bytes = 0
        self._has_warned = False
        self._drops_other = False

    @classmethod
    def begin(cls, output: str | os.PathLike[str], manifest: Manifest, *, drop_other: bool = False) -> Parts:
        """Go on with the parts of a run, or begin them."""
        parts = cls(output, manifest)
        with _reporting(parts.folder):
            parts.folder.mkdir(exist_ok=True)
        with parts.lock("begin", wait=True):
            found = read_manifest(parts.folder)
            if found is not None and found.digest != parts._digest:
                problem = parts._difference(found)
                if not drop_other:
                    raise StoreError(problem, path=str(parts.folder))
                parts._refuse_busy()
                logger.warning("%s: dropped, since it %s", parts.folder, problem.partition(";")[0])
                parts._drop(_PARTS)
                found = None
            if found is None:
                parts._refuse_foreign()
                with _reporting(parts.folder):
                    write_text(parts.folder / MANIFEST, manifest_text(manifest))
                return parts
        parts = cls(output, found)
        parts._drops_other = drop_other
        return parts

    @classmethod
    def find(cls, output: str | os.PathLike[str]) -> Parts | None:
        """Look for the parts of an output."""
        manifest = read_manifest(parts_folder(output))
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
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                problem = (
                    f"another process is at work here ({name}); wait for it, stop it, or set output to "
                    "another file"
                )
                raise StoreError(problem, path=str(self.folder)) from error
            except OSError as error:  # a file system without locks
                logger.debug("%s: no locks here (%s)", self.folder, error)
            yield

    def finished(self, number: int, content: str | None = None) -> UnitRecord | None:
        """Tell whether a unit is finished."""
        record = self._read_record(number)
        if record is None:
            return None
        if content is not None and record.content != content:
            if self._drops_other:
                logger.warning("%s: of other sequences, unit %d is made again", self.shard(number), number)
                return None
            problem = (
                f"unit {number} was made from other sequences ({record.num_records} records, "
                f"{record.first!r} to {record.last!r}) than the input has there now; give the input as it "
                "was (names of files included), set overwrite to true to start over, or set output to "
                "another file"
            )
            raise StoreError(problem, path=str(self.folder))
        if _file_digest(self.shard(number)) != record.shard_sha256:
            logger.warning("%s: damaged, unit %d is made again", self.shard(number), number)
            return None
        return record

    def save(self, unit: UnitRows) -> None:
        """Save a finished unit."""
        number = unit.record.number
        self._check_space(unit)
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
        facts = asdict(unit.record) | {"shard_sha256": _file_digest(self.shard(number)), "run": self._digest}
        with _reporting(self.folder):
            write_text(self.shard(number).with_suffix(".json"), json.dumps(facts))

    def _check_space(self, unit: UnitRows) -> None:
        matrices = unit.block.matrices if isinstance(unit.block, EmbeddingBlock) else unit.block.values
        itemsize = STORAGE_DTYPES[self.manifest.out_dtype].itemsize
        needed = sum(matrix.size for matrix in matrices.values()) * itemsize + _UNIT_OVERHEAD
        check_space(self.folder, needed, what=f"unit {unit.record.number}")
        self._saved_bytes += needed
        free = free_bytes(self.folder)
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
        if before is not None and not is_same_input(before, facts):
            problem = (
                f"another share was made from another input ({before.num_units} units, here "
                f"{facts.num_units}); give all shares the same files, and run those again that had others "
                "(with overwrite)"
            )
            if not self._drops_other:
                raise StoreError(problem, path=str(self.folder))
            logger.warning("%s: %s", self.folder, problem)
        with _reporting(self.folder):
            write_text(self.folder / INPUT, json.dumps(asdict(facts) | {"run": self._digest}))

    def save_certificate(self, found: Mapping[str, JSON]) -> None:
        """Note how far vectors depend on their batch."""
        with _reporting(self.folder):
            write_text(self.folder / CERTIFICATE, json.dumps({**found, "run": self._digest}))

    def certificate(self) -> dict[str, JSON] | None:
        """Read how far vectors depend on their batch."""
        found = read_json(self.folder / CERTIFICATE)
        return None if found is None or found.pop("run", None) != self._digest else found

    def input_facts(self) -> InputFacts | None:
        """Read what the input held."""
        found = read_json(self.folder / INPUT)
        if found is None or found.pop("run", None) != self._digest:
            return None
        return InputFacts(**known_fields(InputFacts, found))

    def began_ns(self) -> int:
        """Tell when the run began."""
        return (self.folder / MANIFEST).stat().st_mtime_ns

    def num_saved(self) -> int:
        """Count the units that were saved, intact or not."""
        return len(self.saved_numbers())

    def saved_numbers(self) -> list[int]:
        """Name the units that were saved, intact or not."""
        return sorted(int(path.stem.removeprefix("unit-")) for path in self.folder.glob("unit-*[0-9].json"))

    def remove(self) -> None:
        """Remove the parts, the manifest last; what is not ours stays, and so does the folder then."""
        self._drop(_OURS)
        with suppress(OSError):
            self.folder.rmdir()

    def _drop(self, pattern: re.Pattern[str]) -> None:
        with _reporting(self.folder):
            names = sorted(path.name for path in self.folder.iterdir())
            for name in (*filter(pattern.fullmatch, names), MANIFEST):
                (self.folder / name).unlink(missing_ok=True)

    def remove_temporary(self) -> None:
        """Remove what processes left that were cut off while they wrote; no process may be at work."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def _refuse_busy(self) -> None:
        """Refuse to drop units that another process is making."""
        for path in self.folder.glob("*.lock"):
            if path.stem != "begin":
                with self.lock(path.stem):
                    pass

    def _refuse_foreign(self) -> None:
        """Refuse a folder with things in it that no run of ours puts there."""
        foreign = [path.name for path in self.folder.iterdir() if not _OURS.fullmatch(path.name)]
        if foreign:
            problem = f"holds {foreign[0]!r}, which no run put there; set output to another file, or move it"
            raise StoreError(problem, path=str(self.folder))

    def _difference(self, found: Manifest) -> str:
        num_units = self.num_saved()
        before, now = dict(found.identity), dict(self.manifest.identity)
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        shown = ", ".join(
            f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed[:_SHOWN]
        )
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        return (
            f"holds {num_units} finished units of another run: {shown}{more}; set these as they were to go "
            "on, set overwrite to true to start over, or set output to another file"
        )

    def shard(self, number: int) -> Path:
        """Name the file with the rows of a unit."""
        return self.folder / f"unit-{number:06}.h5"

    def _read_record(self, number: int) -> UnitRecord | None:
        path = self.shard(number).with_suffix(".json")
        try:
            found = read_json(path)
            if found is None or found.pop("run", None) != self._digest:
                return None
            record = UnitRecord(**known_fields(UnitRecord, found))
        except (StoreFormatError, TypeError) as error:
            logger.warning("%s: damaged (%s), unit %d is made again", path, error, number)
            return None
        return record if record.number == number else None


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
            f"could not be written ({error.strerror or error}), finished units are kept; look at the free "
            f"space, quota and rights of {str(folder.parent)!r}, then run the same command again"
        )
        raise StoreError(problem, path=str(folder)) from error
