"""What a file says about the run that made it: model, settings, counts, digests of its input, versions."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from genoembed.config.embed import EmbedConfig
    from genoembed.pipeline.embedder import UnitEmbedder


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
