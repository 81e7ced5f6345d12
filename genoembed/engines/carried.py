"""What a fine-tuned model brings along: layers, pooling, fusion and length of the vectors it was trained for.

In: the model's name, and what the user asked for. Out: options for what was not asked for, and what is to be
done to fused vectors. Promised: where the two differ, a warning says so, since such vectors are not those
that were trained.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from genoembed.errors import ConfigError, PoolingMismatchWarning
from genoembed.models.finetuned import read_finetuned
from genoembed.models.registry import known_models

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from genoembed.config import EmbeddingConfig
    from genoembed.models.finetuned import FinetunedFacts
    from genoembed.models.genomic_model import GenomicModel

CARRIED = ("layers", "pooling", "skip_first", "fusion", "fusion_weights")
"""Keys that a fine-tuned model has values for."""


def find_facts(model: str | GenomicModel) -> FinetunedFacts | None:
    """Read what a model says about the vectors it was trained for."""
    if isinstance(model, str):
        is_known = any(entry.name == model for entry in known_models())
        folder = None if is_known else Path(model)
    else:
        folder = model.location
    facts = None if folder is None else read_finetuned(folder)
    return facts if facts is not None and facts.layers else None


def carried_options(facts: FinetunedFacts | None, given: Mapping[str, object]) -> dict[str, object]:
    """Fill in what was not asked for."""
    if facts is None:
        return dict(given)
    values: dict[str, object] = {
        "layers": facts.layers,
        "pooling": facts.pooling,
        "skip_first": facts.skip_first,
        "fusion": facts.fusion,
        "fusion_weights": facts.fusion_weights,
    }
    if "fusion" in given or "layers" in given:
        # weights belong to their layers, and so does the way to fuse them
        values = {key: value for key, value in values.items() if not key.startswith("fusion")}
    if given.get("pooling") == "none":
        del values["skip_first"]
    return values | dict(given)


def finisher(
    facts: FinetunedFacts | None, embedding: EmbeddingConfig, layers: tuple[str, ...]
) -> Callable[[Tensor], Tensor] | None:
    """Say what is to be done to fused vectors; warn of what differs from training."""
    if facts is None:
        return None
    pairs = (
        ("layers", layers, facts.layers),
        ("pooling", embedding.pooling, facts.pooling),
        ("skip_first", embedding.skip_first, facts.skip_first),
        ("fusion", embedding.fusion, facts.fusion),
    )
    other = [(key, asked, trained) for key, asked, trained in pairs if asked != trained]
    if embedding.pooling == "none":
        other = [item for item in other if item[0] == "layers"]
    if other:
        said = "; ".join(
            f"{key} is {_said(asked)}, it was trained with {_said(old)}" for key, asked, old in other
        )
        ending = " (vectors are not projected or normalised either)" if facts.finisher else ""
        message = f"model {str(facts.folder)!r}: {said}{ending}; leave it out to take what was trained"
        warnings.warn(PoolingMismatchWarning(message), stacklevel=3)
        return None
    if embedding.pooling == "none" or facts.finisher is None:
        return None
    if embedding.rc == "concat" and embedding.fusion == "concat":
        message = f"rc is 'concat', but {facts.folder} lays layers side by side; set rc to 'mean' or 'none'"
        raise ConfigError(message)
    return facts.finisher


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else repr(value)
