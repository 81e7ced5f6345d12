"""From what a caller says to a checked configuration, a loaded model, and the records of the input.

Also what a fine-tuned model brings along: layers, pooling, fusion and length of the vectors of its training.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genoembed.config.embed import embed_config
from genoembed.errors import ConfigError, PoolingMismatchWarning
from genoembed.models.load import load_model
from genoembed.models.registry import known_models
from genoembed.models.trained_folder import read_finetuned
from genoembed.sequences import read_sequences

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from genoembed.config.choices import Fusion, Pooling
    from genoembed.config.embed import EmbedConfig, EmbeddingConfig, ModelConfig
    from genoembed.contracts import SequenceRecord
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.trained_folder import FinetunedFacts
    from genoembed.sequences import InputCounts


_LOADING_OPTIONS = ("revision", "trust_remote_code", "dtype", "device")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked for."""

    config: EmbedConfig
    model: str | GenomicModel
    """The name, or the model where it is loaded already."""
    trained: FinetunedFacts | None
    """What a fine-tuned model says about its vectors."""


def read_request(
    inputs: str | PathLike[str] | Iterable[str | PathLike[str]],
    *,
    model: str | PathLike[str] | GenomicModel,
    layers: int | str | Sequence[int | str] | None = None,
    pooling: Pooling | None = None,
    fusion: Fusion | None = None,
    output: str | PathLike[str] | None = None,
    **options: Any,
) -> Request:
    """Check what a caller says, and fill in what a fine-tuned model was trained with."""
    if isinstance(model, PathLike):
        model = fspath(model)
    trained = find_facts(model)
    given = options | {
        "layers": None if layers is None else _as_strings(layers),
        "pooling": pooling,
        "fusion": fusion,
    }
    given = {name: _frozen(name, value) for name, value in given.items() if value is not None}
    config = embed_config(
        {
            "inputs": _as_strings(inputs),
            "model": model if isinstance(model, str) else model.name,
            "output": None if output is None else fspath(output),
            **given,
            **carried_options(trained, {name: given[name] for name in CARRIED if name in given}),
        }
    )
    if not isinstance(model, str):
        _check_loaded(config, options)
    return Request(config=config, model=model, trained=trained)


def read_records(config: EmbedConfig, counts: InputCounts) -> Iterator[SequenceRecord]:
    """Read the input."""
    return read_sequences(
        config.input.inputs,
        invalid=config.input.invalid,
        duplicates=config.input.duplicates,
        empty=config.input.empty,
        gaps=config.input.gaps,
        keep_case=config.input.keep_case,
        regions=config.input.regions or None,
        flank=config.input.flank,
        counts=counts,
    )


def _check_loaded(config: EmbedConfig, options: Mapping[str, object]) -> None:
    """Refuse what a model that is loaded already has decided."""
    problems = []
    given = [name for name in _LOADING_OPTIONS if options.get(name) is not None]
    if given:
        problems.append(
            f"{', '.join(given)}: the model is loaded already; leave it out, or give the model by name"
        )
    if config.run.engine == "ray":
        problems.append(
            "engine is 'ray', whose workers load the model themselves, but the model is loaded already; give "
            "the model by name"
        )
    if problems:
        raise ConfigError(*problems)


def _as_strings(value: object) -> tuple[str, ...]:
    """Give one item, or several, as texts."""
    if isinstance(value, str | int | np.integer | PathLike):
        return (_as_string(value),)
    return tuple(_as_string(item) for item in value)  # type: ignore[attr-defined]


def _as_string(value: object) -> str:
    return fspath(value) if isinstance(value, PathLike) else str(value)


def _frozen(name: str, value: object) -> object:
    """Give an option the form that a configuration keeps: tuples, and plain values instead of NumPy's."""
    if name == "regions":
        return _as_strings(value)
    if isinstance(value, list | np.ndarray):
        return tuple(_frozen("", item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


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


def load_configured(config: ModelConfig) -> GenomicModel:
    """Load a model."""
    return load_model(
        config.model,
        device=config.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
    )


@contextmanager
def use_threads(wanted: int | None) -> Iterator[None]:
    """Set torch's number of threads, and set it back."""
    if wanted is not None and wanted < 1:
        message = f"threads is {wanted}; set threads to 1 or more"
        raise ConfigError(message)
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        if wanted is not None:
            torch.set_num_threads(before)
