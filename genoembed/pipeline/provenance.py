"""What a file says about the run that made it: model, settings, counts, digests of its input, versions.

Also what it may say about batches: how far the vectors of some records are from those of each record alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import shlex
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genoembed.contracts import EmbeddingBlock
from genoembed.pipeline.agreement import difference, tolerance_of, worst
from genoembed.pipeline.units import WorkUnit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from genoembed.config.embed import EmbedConfig
    from genoembed.contracts import SequenceRecord, TokenBlock
    from genoembed.pipeline.embedder import UnitEmbedder
    from genoembed.pipeline.local import Engine
    from genoembed.store import UnitRows


try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


_PLACES = (
    "inputs",
    "regions",
    "output",
    "overwrite",
    "resume",
    "certificate",
    "shard",
    "engine",
    "workers",
    "ray_address",
)
"""Settings that say where things are and who does the work: they change no vector."""
_POLICIES = ("invalid", "duplicates", "empty", "gaps", "on_error")
"""What is done about bad records. Units say what was made of theirs, so these are compared there."""
_MACHINE = ("revision", "trust_remote_code", "device", "threads", "batch_tokens", "model")
"""Settings that a run may go on with on another machine; what they lead to is compared instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What a run must know of its model before it begins: plain values, so that a worker can send them."""

    identity: Mapping[str, Any]
    """Everything but the input that decides what the vectors are. Two runs of which it is equal may share
    their work units."""
    policies: Mapping[str, Any]
    """What is done about bad records; work units that come out the same whatever it is stay."""
    told: Mapping[str, Any]
    """What the file is to say about the model and the machine that it runs on."""
    layers: tuple[str, ...]
    """Module paths."""
    unit_bases: int
    """Bases of a work unit."""
    unit_records: int
    """Records of a work unit at most."""


def run_facts(config: EmbedConfig, embedder: UnitEmbedder) -> RunFacts:
    """Collect what a run must know of its model."""
    trained = {} if embedder.facts is None else {"finetuned": dict(embedder.facts.values)}
    return RunFacts(
        identity=_plain(_identity(config, embedder)),
        policies={name: value for name, value in _flat(config).items() if name in _POLICIES},
        told={
            "model": dict(embedder.model.provenance),
            "tokenizer": type(embedder.model.tokenizer).__name__,
            "layers": list(embedder.layers),
            "versions": {
                "python": platform.python_version(),
                **{package: version(package) for package in ("torch", "transformers", "numpy")},
            },
            "threads": torch.get_num_threads(),
            "batch_tokens": embedder.batch_tokens,
            **trained,
        },
        layers=embedder.layers,
        unit_bases=embedder.unit_bases,
        unit_records=embedder.unit_records,
    )


def _identity(config: EmbedConfig, embedder: UnitEmbedder) -> dict[str, Any]:
    model = embedder.model.provenance
    left_out = (*_PLACES, *_MACHINE, *_POLICIES)
    kept = {key: value for key, value in _flat(config).items() if key not in left_out}
    return {
        **kept,
        "model": model["class"],
        **model["content"],
        "dtype": model["dtype"],
        "max_length": model["max_length"],
        "tokenizer": type(embedder.model.tokenizer).__name__,
        "layers": list(embedder.layers),
        "unit_bases": embedder.unit_bases,
        "unit_records": embedder.unit_records,
        "trained": None if embedder.facts is None else dict(embedder.facts.values),
    }


def _flat(config: EmbedConfig) -> dict[str, Any]:
    stages = [values for values in config.to_dict().values() if isinstance(values, dict)]
    return {key: value for values in stages for key, value in values.items()}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Convert values to what will be read back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def describe_run(config: EmbedConfig, facts: RunFacts) -> dict[str, Any]:
    """Collect what is needed to repeat a run, as far as it is known when the run begins."""
    settings = config.to_dict()
    settings["run"] = {"unit_bases": config.run.unit_bases, "on_error": config.run.on_error}
    return {
        "command": shlex.join(sys.argv),
        "created": _now().isoformat(timespec="seconds"),
        "config": settings,
        **facts.told,
    }


def _now() -> datetime:
    """The time that files are marked with; reproducible-builds.org says what the variable means."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(fixed), UTC) if fixed.isdecimal() else datetime.now(UTC)


def peak_memory_mb() -> int | None:
    """Return the largest resident memory of this process so far."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)


def file_facts(name: str) -> dict[str, str | int | None]:
    """Return what identifies an input file."""
    path = Path(name)
    if name == "-" or not path.is_file():
        return {"name": name, "bytes": None, "sha256": None}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": name, "bytes": path.stat().st_size, "sha256": digest}


logger = logging.getLogger(__name__)


def certify_rows(
    engine: Engine, records: Sequence[SequenceRecord], block: EmbeddingBlock | TokenBlock, *, dtype: str
) -> dict[str, float | int | bool | None]:
    """Embed records one at a time, and compare with the rows that they have in a file."""
    before = replace(engine.stats)
    alone: dict[int, UnitRows] = {}
    units = [WorkUnit(number=number, records=(record,)) for number, record in enumerate(records)]
    engine.run(units, lambda rows: alone.update({rows.record.number: rows}))
    for name in before.__dataclass_fields__:
        setattr(engine.stats, name, getattr(before, name))
    in_file = dict(_vectors(block))
    found = worst(
        difference(vectors, in_file[key]) for rows in alone.values() for key, vectors in _vectors(rows.block)
    )
    tolerance = tolerance_of([dtype])
    is_within = found.is_within(tolerance)
    if not is_within:
        logger.warning(
            "vectors depend on what shares their batch: of %d records, the largest difference is %.2g of the "
            "largest value, over %.0e; set batch_tokens to 1 to embed each alone, and report the model",
            len(records),
            found.relative,
            tolerance,
        )
    is_comparable = math.isfinite(found.relative)  # JSON has no word for infinity
    return {
        "records": len(records),
        "max_absolute": found.absolute if is_comparable else None,
        "max_relative": found.relative if is_comparable else None,
        "min_cosine": found.cosine if is_comparable else None,
        "tolerance": tolerance,
        "is_within": is_within,
    }


def _vectors(
    block: EmbeddingBlock | TokenBlock,
) -> Iterator[tuple[tuple[str, str], NDArray[np.floating]]]:
    """Return the vectors of each row, by layer and id."""
    if isinstance(block, EmbeddingBlock):
        parts = {name: list(matrix) for name, matrix in block.matrices.items()}
    else:
        cuts = np.cumsum(block.lengths)[:-1]
        parts = {name: np.split(values, cuts) for name, values in block.values.items()}
    for name, vectors in parts.items():
        for row, mine in zip(block.rows, vectors, strict=True):
            yield (name, row.id), mine
