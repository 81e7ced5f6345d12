"""From what a caller says to a checked configuration, a loaded model, and the records of the input."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from genoembed.config.choices import ComputeDtype
from genoembed.config.embed import embed_config
from genoembed.errors import ConfigError
from genoembed.models.load import load_model
from genoembed.models.trained_folder import carried_options, find_facts
from genoembed.sequences import begin_reading, read_sequences

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from genoembed.config.choices import Fusion, Pooling
    from genoembed.config.embed import EmbedConfig, ModelConfig
    from genoembed.contracts import SequenceRecord
    from genoembed.models.genomic_model import GenomicModel
    from genoembed.models.trained_folder import FinetunedFacts
    from genoembed.sequences import InputCounts
    from genoembed.sequences.compression import InputDigests


_LOG = logging.getLogger(__name__)

LOADING_OPTIONS = ("revision", "trust_remote_code", "dtype", "fp8", "device")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A checked request."""

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
    trained = find_facts(model, revision=options.get("revision"))
    given = plain_options(options | {"layers": layers, "pooling": pooling, "fusion": fusion})
    name = model if isinstance(model, str) else model.name
    carried = carried_options(trained, given, model=name)
    config = embed_config(
        {
            "inputs": _as_strings(inputs),
            "model": name,
            "output": None if output is None else fspath(output),
            **carried,
        }
    )
    if trained is None and (added := {key: value for key, value in carried.items() if key not in given}):
        chosen = "; ".join(f"{key} {', '.join(_as_strings(value))}" for key, value in added.items())
        _LOG.info("%s: no layer is named, so its own default is taken: %s", name, chosen)
    if not isinstance(model, str):
        _check_loaded(config, options)
    return Request(config=config, model=model, trained=trained)


def read_records(
    config: EmbedConfig, counts: InputCounts, *, digests: InputDigests | None = None
) -> Iterator[SequenceRecord]:
    """Read the input; the first record at once."""
    records = read_sequences(
        config.input.inputs,
        invalid=config.input.invalid,
        duplicates=config.input.duplicates,
        empty=config.input.empty,
        gaps=config.input.gaps,
        keep_case=config.input.keep_case,
        regions=config.input.regions or None,
        flank=config.input.flank,
        feature=config.input.feature,
        name_attribute=config.input.name_attribute,
        join_by=config.input.join_by,
        bad_regions=config.input.bad_regions,
        counts=counts,
        digests=digests,
    )
    return begin_reading(records)


def _check_loaded(config: EmbedConfig, options: Mapping[str, object]) -> None:
    """Raise if options are set that a loaded model has already decided."""
    problems = loading_problems(options)
    if config.run.engine == "ray":
        problems.append(
            "engine is 'ray', whose workers load the model themselves, but the model is loaded already; give "
            "the model by name"
        )
    if problems:
        raise ConfigError(*problems)


def loading_problems(options: Mapping[str, object]) -> list[str]:
    """Say which options a loaded model has already decided."""
    given = [name for name in LOADING_OPTIONS if options.get(name) is not None]
    if not given:
        return []
    return [f"{', '.join(given)}: the model is loaded already; leave it out, or give the model by name"]


def plain_options(options: Mapping[str, object]) -> dict[str, object]:
    """Take the options that are given, as a configuration keeps them: tuples, and no values of NumPy's."""
    return {name: _frozen(name, value) for name, value in options.items() if value is not None}


def _as_strings(value: object) -> tuple[str, ...]:
    """Return one item, or several, as texts."""
    if isinstance(value, str | int | np.integer | PathLike):
        return (_as_string(value),)
    return tuple(_as_string(item) for item in value)  # type: ignore[attr-defined]


def _as_string(value: object) -> str:
    return fspath(value) if isinstance(value, PathLike) else str(value)


def _frozen(name: str, value: object) -> object:
    if name in ("layers", "regions", "feature"):
        return _as_strings(value)
    if isinstance(value, list | tuple | np.ndarray):
        return tuple(_frozen("", item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def load_configured(config: ModelConfig) -> GenomicModel:
    """Load a model."""
    return load_model(
        config.model,
        device=config.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        fp8=config.fp8,
    )


def begun_dtype(dtype: Any, identity: Mapping[str, Any] | None) -> Any:
    """Return the type to load a model in: ``auto`` is what a run that goes on began in, on whatever machine.

    Example:
        >>> begun_dtype("auto", {"dtype": "float32"}), begun_dtype("auto", None)
        ('float32', 'auto')
        >>> begun_dtype("bfloat16", {"dtype": "float32"})
        'bfloat16'
    """
    begun = None if identity is None else str(identity.get("dtype")).removeprefix("torch.")
    return begun if dtype == "auto" and begun in get_args(ComputeDtype) else dtype


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
