"""What a model folder was trained as: layers, pooling and fusion of its vectors, and how they are finished.

In: a model folder. Out: :class:`FinetunedFacts`, or None for a folder that was not fine-tuned here. What it
says fills in the options that a caller leaves out, and another choice warns. Promised: a folder of a newer
format is rejected, never half understood.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from genoembed.contracts import FINAL_FOLDER
from genoembed.errors import CheckpointError, ConfigError, PoolingMismatchWarning
from genoembed.models.registry import entry_named

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike

    from torch import Tensor

    from genoembed.config.embed import EmbeddingConfig
    from genoembed.models.genomic_model import GenomicModel

FACTS_FILE = "genoembed_finetuned.json"
HEADS_FILE = "heads.safetensors"
FACTS_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetunedFacts:
    """How a fine-tuned encoder makes vectors."""

    folder: Path
    task: str
    """What it was trained for."""
    layers: tuple[str, ...]
    """Module paths; empty for a language model, which was trained for no vector."""
    pooling: str
    skip_first: int
    """Bases at the start that pooling leaves out."""
    fusion: str
    fusion_weights: tuple[float, ...]
    """One per layer, for ``weighted``."""
    normalize: bool
    """Whether vectors have length 1."""
    pooler: str | None
    """Name of the projection after the pooling among the heads' weights."""
    values: Mapping[str, Any]
    """All that the file says."""

    def finish(self, pooled_ND: Tensor) -> Tensor:
        """Project and normalize pooled vectors, as training did."""
        if self.pooler is not None:
            weight, bias = (
                values.to(pooled_ND.device) for values in read_heads(self.folder, self.pooler).values()
            )
            pooled_ND = F.linear(pooled_ND.to(weight.dtype), weight, bias)
        return F.normalize(pooled_ND, dim=-1) if self.normalize else pooled_ND

    @property
    def finisher(self) -> Callable[[Tensor], Tensor] | None:
        """What is done to fused vectors; None if nothing is."""
        return self.finish if self.normalize or self.pooler is not None else None


def model_folder(folder: str | PathLike[str]) -> Path:
    """Return the folder of a model; the folder of a training run stands for its ``final``."""
    path = Path(folder).expanduser()
    final = path / FINAL_FOLDER
    is_run = not (path / "config.json").exists() and (final / "config.json").is_file()
    return final if is_run else path


def read_finetuned(folder: str | PathLike[str]) -> FinetunedFacts | None:
    """Read what a folder says about itself."""
    path = model_folder(folder) / FACTS_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = int(values["format"])
        facts = FinetunedFacts(
            folder=path.parent,
            task=str(values["task"]),
            layers=tuple(values["layers"]),
            pooling=str(values["pooling"]),
            skip_first=int(values["skip_first"]),
            fusion=str(values["fusion"]),
            fusion_weights=tuple(map(float, values["fusion_weights"])),
            # folders written before the American spelling say "normalise"
            normalize=bool(values["normalize"] if "normalize" in values else values["normalise"]),
            pooler=values["pooler"],
            values=values,
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        message = (
            f"it is damaged ({type(error).__name__}: {error}); fine-tune again, or fetch the folder again"
        )
        raise CheckpointError(message, path=str(path)) from error
    if found > FACTS_FORMAT:
        message = f"format {found} is newer than this genoembed reads (1-{FACTS_FORMAT}); upgrade genoembed"
        raise CheckpointError(message, path=str(path))
    return facts


def find_facts(model: str | GenomicModel) -> FinetunedFacts | None:
    """Read what a model was trained as; None where it was trained for no vector."""
    if isinstance(model, str):
        folder = None if entry_named(model) else Path(model)
    else:
        folder = model.location if model.adapter is None else model.adapter.folder
    facts = None if folder is None else read_finetuned(folder)
    return facts if facts is not None and facts.layers else None


def carried_options(facts: FinetunedFacts | None, given: Mapping[str, object]) -> dict[str, object]:
    """Add to the options that are given those of training."""
    if facts is None:
        return dict(given)
    carried = ["layers", "pooling"]
    if given.get("pooling") != "none":  # tokens are all kept
        carried.append("skip_first")
    if "fusion" not in given and "layers" not in given:
        # weights belong to their layers, and so does the way to fuse them
        carried += ["fusion", "fusion_weights"]
    return {key: getattr(facts, key) for key in carried} | dict(given)


def finisher(
    facts: FinetunedFacts | None, embedding: EmbeddingConfig, layers: tuple[str, ...]
) -> Callable[[Tensor], Tensor] | None:
    """Return what is to be done to fused vectors; warn of what differs from training."""
    if facts is None:
        return None
    asked = {"layers": layers}
    if embedding.pooling != "none":  # tokens are neither pooled nor fused
        asked |= {key: getattr(embedding, key) for key in ("pooling", "skip_first", "fusion")}
    said = "; ".join(
        f"{key} is {_said(value)}, it was trained with {_said(getattr(facts, key))}"
        for key, value in asked.items()
        if value != getattr(facts, key)
    )
    if said:
        ending = " (vectors are not projected or normalized either)" if facts.finisher else ""
        message = f"model {str(facts.folder)!r}: {said}{ending}; leave it out to take what was trained"
        warnings.warn(PoolingMismatchWarning(message), stacklevel=3)
        return None
    if embedding.pooling == "none" or facts.finisher is None:
        return None
    if embedding.rc == "concat" and embedding.fusion == "concat":
        message = f"rc is 'concat', but {facts.folder} concatenates layers; set rc to 'mean' or 'none'"
        raise ConfigError(message)
    return facts.finisher


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else repr(value)


def read_heads(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read weights of heads."""
    path = folder / HEADS_FILE
    start = f"{prefix}." if prefix else ""
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted((name for name in file.keys() if name.startswith(start)), reverse=True)
            found = {name.removeprefix(start): file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        message = f"heads cannot be read ({error}); fine-tune again, or fetch the folder again"
        raise CheckpointError(message, path=str(path)) from error
    if prefix and not found:
        message = f"no weights of {prefix!r}; fine-tune again, or fetch the folder again"
        raise CheckpointError(message, path=str(path))
    return found
