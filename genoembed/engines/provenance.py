"""What a file says about the run that made it: model, settings, counts, digests of its input, versions."""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from genoembed.config import EmbedConfig
    from genoembed.engines.embedder import UnitEmbedder
    from genoembed.sequences import InputCounts

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def describe_run(config: EmbedConfig, embedder: UnitEmbedder, counts: InputCounts) -> dict[str, Any]:
    """Collect what is needed to say, and to repeat, how a file was made; all but genoembed's own version.

    Args:
        config: What was asked for.
        embedder: What did it.
        counts: What was read.

    Returns:
        Texts, finite numbers, lists and dicts: what JSON holds.
    """
    return {
        "command": shlex.join(sys.argv),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": dict(embedder.model.provenance),
        "tokenizer": type(embedder.model.tokenizer).__name__,
        "layers": list(embedder.layers),
        "config": config.to_dict(),
        "counts": asdict(counts),
        "inputs": [_file_facts(name) for name in config.input.inputs],
        "regions": [_file_facts(name) for name in config.input.regions],
        "stats": asdict(embedder.stats),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "numpy")},
        },
        "threads": torch.get_num_threads(),
        "batch_tokens": embedder.batch_tokens,
        "peak_memory_mb": peak_memory_mb(),
    }


def peak_memory_mb() -> int | None:
    """Give the largest resident memory of this process so far.

    Returns:
        Mebibytes; None where the platform does not say.
    """
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)


def _file_facts(name: str) -> dict[str, str | int | None]:
    path = Path(name)
    if name == "-" or not path.is_file():
        return {"name": name, "bytes": None, "sha256": None}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": name, "bytes": path.stat().st_size, "sha256": digest}
