"""Join the finished units of a run to its output, rows in input order; nothing is computed again.

In: the parts of a run. Out: one embedding file. Promised: memory holds one unit; the output appears whole or
not at all; a merge that was cut off starts over from the same parts, which go when the output is there.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from genoembed.atomic import check_space
from genoembed.contracts import EmbeddingBlock, ObsRow, TokenBlock
from genoembed.errors import GenoembedError, StoreError
from genoembed.store.parts import identity_differences
from genoembed.store.reader import open_embeddings
from genoembed.store.schema import NOT_KNOWN, OBS_COLUMNS
from genoembed.store.writer import EmbeddingWriter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike

    from genoembed.store.parts import InputFacts, Manifest, Parts, UnitRecord
    from genoembed.store.reader import EmbeddingFile
    from genoembed.store.schema import JSON

_SHOWN = 5
_COUNTED = ("windows", "repeats", "unread", "batches", "real_tokens", "slots")


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """What a merge wrote."""

    num_rows: int
    width: int
    """Features of the primary matrix (of a token, in per-token files)."""
    layers: tuple[str, ...]
    """Stored matrices."""
    failed: Mapping[str, str]
    """Records without a vector, by id: why."""
    num_windows: int
    """Windows that the records were cut into."""
    num_unread: int
    """Bases that the model's tokenizer has no words for."""


def merge_parts(parts: Parts, *, overwrite: bool = False) -> Merged:
    """Write the output of a run whose units are all finished, and remove the parts."""
    with parts.lock("merge"):
        facts, records = _complete(parts)
        parts.remove_temporary()
        needed = sum(parts.shard(record.number).stat().st_size for record in records)
        check_space(parts.folder, needed, what="the merged file")
        merged = _write(parts, facts, records, overwrite=overwrite)
        # only now: until the output has its name, the parts are all there is
        parts.remove()
    return merged


def is_output_of(parts: Parts) -> bool:
    """Return whether the existing output is the merged one of these parts."""
    with suppress(GenoembedError, OSError), open_embeddings(parts.output) as file:
        found, began = file.provenance, parts.manifest.provenance.get("created")
        is_same = found.get("run") == parts.manifest.digest and found.get("created") == began
        is_same = is_same and not _was_changed(file)
        # an output that was there before may say the same of another input: it is older than the manifest
        return is_same and file.path.stat().st_mtime_ns >= parts.began_ns()
    return False


def finish_removal(parts: Parts) -> Merged:
    """Remove what is left of the parts of a run whose output is there."""
    with open_embeddings(parts.output) as file:
        merged = _summary(file)
    parts.remove()
    return merged


def find_merged(output: str | PathLike[str]) -> Merged | None:
    """Return what is in an output whose parts are gone, since it was merged; None if it is something else."""
    with suppress(GenoembedError, OSError), open_embeddings(output) as file:
        if "run" in file.provenance and not _was_changed(file):
            return _summary(file)
    return None


_ACTED = {
    "invalid": ("masked_bases", "masked_records", "skipped_invalid"),
    "duplicates": ("renamed",),
    "empty": ("skipped_empty",),
    "gaps": ("gaps_stripped",),
    "on_error": ("failed",),
}
"""Counts of each policy: where they are 0 it changed nothing, and another choice makes the same file."""


def differences_from(
    output: str,
    manifest: Manifest,
    inputs: Sequence[Mapping[str, JSON]],
    regions: Sequence[Mapping[str, JSON]] = (),
) -> tuple[Merged | None, list[str]]:
    """Read what a complete output holds, if such a run made it; else say what is not as it was."""
    with open_embeddings(output) as file:
        made = file.provenance
        files = [_content(item) for item in inputs]
        places = [_content(item) or item.get("name") for item in regions]
        found = identity_differences(made.get("identity", {}), manifest.identity)
        before, counts = made.get("policies", {}), made.get("counts", {})
        acted = [name for name in before if any(counts.get(count) for count in _ACTED.get(name, ()))]
        found += identity_differences(
            {name: before[name] for name in acted}, {name: manifest.policies.get(name) for name in acted}
        )
        if _was_changed(file):
            found.append("it was changed since, so that it need not hold all rows")
        if None in files:
            found.append("the content of standard input is not known any more")
        if [_content(item) for item in made.get("inputs", [])] != files:
            found.append("the input has other content")
        if [_content(item) or item.get("name") for item in made.get("regions", [])] != places:
            found.append("the regions have other content")
        return (None, found) if found else (_summary(file), found)


def _was_changed(file: EmbeddingFile) -> bool:
    """Return whether the file is no longer what its run wrote: rows may be missing, values may be others."""
    return bool(file.changes) or "history" in file.provenance


def _content(item: Mapping[str, JSON]) -> object:
    """What a file held; None for standard input and places."""
    return None if item.get("sha256") is None else (item.get("bytes"), item["sha256"])


def _summary(file: EmbeddingFile) -> Merged:
    return Merged(
        num_rows=len(file),
        width=len(file.feature_names),
        layers=tuple(file.layers),
        failed=dict(file.provenance.get("failed", {})),
        num_windows=int(file.provenance["counts"]["windows"]),
        num_unread=int(file.provenance["counts"].get("unread", 0)),
    )


def _complete(parts: Parts) -> tuple[InputFacts, list[UnitRecord]]:
    """Return the records of all units; raise if any is missing, with the job that makes it."""
    facts = parts.input_facts()
    if facts is None:
        problem = (
            "the input was not read to its end yet, so it is not known how many units there are; run "
            "extract again, with the settings it was begun with"
        )
        raise StoreError(problem, path=str(parts.folder))
    found = [parts.finished(number) for number in range(facts.num_units)]
    missing = [number for number, record in enumerate(found) if record is None]
    if missing:
        shares = parts.manifest.num_shares
        which = sorted({number % shares + 1 for number in missing})
        remedy = "run extract again"
        if shares > 1:
            remedy += " with shard set to " + ", ".join(f"{share}/{shares}" for share in which)
        shown = ", ".join(map(str, missing[:_SHOWN])) + (" ..." if len(missing) > _SHOWN else "")
        problem = f"{len(missing)} of {facts.num_units} units are missing or damaged ({shown}); {remedy}"
        raise StoreError(problem, path=str(parts.folder))
    return facts, [record for record in found if record is not None]


def _write(parts: Parts, facts: InputFacts, records: list[UnitRecord], *, overwrite: bool) -> Merged:
    assert parts.manifest.out_dtype is not None, "units of vectors"
    with open_embeddings(parts.shard(0)) as first:
        kind, names = first.kind, first.feature_names
        layers = tuple(first.layers)
    is_pooled = kind == "pooled"
    with EmbeddingWriter(
        parts.output,
        kind=kind,
        dtype=parts.manifest.out_dtype,
        feature_names=names if is_pooled else None,
        overwrite=overwrite,
        staging=parts.folder,  # what a killed merge left goes with the parts
    ) as writer:
        for record in records:
            with open_embeddings(parts.shard(record.number)) as shard:
                writer.append(read_block(shard))
        failed = {name: why for record in records for name, why in record.failed.items()}
        writer.finish(_provenance(parts, facts, records, failed))
        num_rows = writer.num_rows
    num_windows, num_unread = (
        sum(int(record.stats.get(name, 0)) for record in records) for name in ("windows", "unread")
    )
    return Merged(
        num_rows=num_rows,
        width=len(names),
        layers=layers,
        failed=failed,
        num_windows=num_windows,
        num_unread=num_unread,
    )


def _provenance(
    parts: Parts, facts: InputFacts, records: list[UnitRecord], failed: Mapping[str, str]
) -> dict[str, JSON]:
    certificate = parts.certificate()
    stats = {key: sum(int(record.stats.get(key, 0)) for record in records) for key in _COUNTED}
    return {
        **parts.manifest.provenance,
        "run": parts.manifest.digest,
        "identity": dict(parts.manifest.identity),
        "policies": dict(parts.manifest.policies),
        "counts": {
            **facts.counts,
            "windows": stats["windows"],
            "unread": stats["unread"],
            "failed": len(failed),
        },
        "inputs": list(facts.inputs),
        "regions": list(facts.regions),
        "stats": stats,
        "units": len(records),
        "failed": dict(failed),
        **({} if certificate is None else {"certificate": certificate}),
    }


def read_block(file: EmbeddingFile) -> EmbeddingBlock | TokenBlock:
    """Read all rows of a file."""
    # a file of an earlier schema lacks some
    unknown = np.full(len(file), NOT_KNOWN)
    columns = [list(file.obs[name] if name in file.obs else unknown) for name in OBS_COLUMNS]
    rows = tuple(
        ObsRow(id=name, **dict(zip(OBS_COLUMNS, values, strict=True)))
        for name, *values in zip(file.ids, *columns, strict=True)
    )
    matrices = {layer: file[layer][:] for layer in file.layers}
    if file.kind == "pooled":
        return EmbeddingBlock(rows=rows, matrices=matrices)
    return TokenBlock(rows=rows, lengths=file.num_tokens, values=matrices, spans=file.all_spans)
