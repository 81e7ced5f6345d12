"""What a fine-tuned folder says about itself: which layers, pooling and fusion its vectors were trained for.

In: a model folder. Out: :class:`FinetunedFacts`, or None for a folder that was not fine-tuned here. Promised:
a folder of a newer format is refused, never half understood.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from genoembed.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike

    from torch import Tensor


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
    """One a layer, for ``weighted``."""
    normalise: bool
    """Whether vectors have length 1."""
    pooler: str | None
    """Name of the projection after the pooling among the heads' weights."""
    values: Mapping[str, Any]
    """All that the file says."""

    def finish(self, pooled_ND: Tensor) -> Tensor:
        """Project and normalise pooled vectors, as training did."""
        if self.pooler is not None:
            weight, bias = (
                values.to(pooled_ND.device) for values in read_heads(self.folder, self.pooler).values()
            )
            pooled_ND = F.linear(pooled_ND.to(weight.dtype), weight, bias)
        return F.normalize(pooled_ND, dim=-1) if self.normalise else pooled_ND

    @property
    def finisher(self) -> Callable[[Tensor], Tensor] | None:
        """What is done to fused vectors; None if nothing is."""
        return self.finish if self.normalise or self.pooler is not None else None


def read_finetuned(folder: str | PathLike[str]) -> FinetunedFacts | None:
    """Read what a folder says about itself."""
    path = Path(folder).expanduser() / FACTS_FILE
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
            normalise=bool(values["normalise"]),
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
