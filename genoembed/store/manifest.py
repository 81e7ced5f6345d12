"""What a run's parts say about themselves, and how that is read back.

In: JSON files of a folder of parts. Out: checked dataclasses. Promised: what cannot be read is one error that
names the file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from genoembed.errors import StoreError, StoreFormatError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from genoembed.config.choices import StorageDtype
    from genoembed.contracts import EmbeddingBlock, TokenBlock
    from genoembed.store.schema import JSON

FORMAT = "genoembed-parts"
VERSION = 1
MANIFEST = "manifest.json"


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
    """Of the primary matrix; None for a vector a token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a run is."""

    identity: Mapping[str, JSON]
    """Everything that decides what the vectors are, by name: two runs with the same are the same run."""
    provenance: Mapping[str, JSON]
    """What the output says about the run that made it, as far as that is known at its start."""
    out_dtype: StorageDtype
    num_shares: int
    """Into how many shares the units were divided, by the process that began."""

    @property
    def digest(self) -> str:
        """SHA-256 of the identity."""
        text = json.dumps(self.identity, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFacts:
    """What is known when the input was read to its end."""

    num_units: int
    counts: Mapping[str, int]
    """What was read, and what the input policies did."""
    inputs: Sequence[Mapping[str, JSON]]
    """Files with their digests."""
    regions: Sequence[Mapping[str, JSON]]


def is_same_input(first: InputFacts, second: InputFacts) -> bool:
    """Tell whether two processes have read the same."""

    def content(facts: InputFacts) -> list[object]:
        return [facts.num_units, [item.get("sha256") for item in facts.inputs]]

    return content(first) == content(second)


def manifest_text(manifest: Manifest) -> str:
    """Write a manifest down."""
    return json.dumps({"format": FORMAT, "version": VERSION, **asdict(manifest)}, indent=1, allow_nan=False)


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a folder of parts."""
    path = folder / MANIFEST
    found = read_json(path)
    if found is None:
        return None
    if found.get("format") != FORMAT or not isinstance(found.get("identity"), dict):
        problem = "is no manifest of a run; move it, or set output to another file"
        raise StoreFormatError(problem, path=str(path))
    if found.get("version") != VERSION:
        problem = (
            f"is of version {found.get('version')!r}, this genoembed knows {VERSION}; finish the run with "
            "the genoembed that began it, or set overwrite to true to start over"
        )
        raise StoreFormatError(problem, path=str(path))
    return Manifest(**known_fields(Manifest, found))


def known_fields(cls: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Pick what a dataclass has fields for."""
    return {key.name: found[key.name] for key in fields(cls) if key.name in found}


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        problem = f"{str(path.parent)!r} is no folder; move it, or set output to another file"
        raise StoreError(problem, path=str(path)) from error
    except (OSError, ValueError, RecursionError) as error:
        problem = f"cannot be read ({error}); remove its folder to start over"
        raise StoreFormatError(problem, path=str(path)) from error
    if not isinstance(found, dict):
        problem = "is no JSON object; remove its folder to start over"
        raise StoreFormatError(problem, path=str(path))
    return found
