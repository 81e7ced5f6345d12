"""Where the vectors of a probe come from: a file that is there, one pass that makes it, or an untrained copy.

The pass keeps every layer that is asked for, pooled; the file stays, and a rerun finds it again.
"""

from __future__ import annotations

import logging
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from genoembed.errors import ConfigError
from genoembed.extraction import extract
from genoembed.models.genomic_model import GenomicModel
from genoembed.models.load import load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from genoembed.config import ComputeDtype
    from genoembed.engines.stats import RunStats
    from genoembed.extraction import ExtractionReport
    from genoembed.store import EmbeddingFile

logger = logging.getLogger(__name__)

EMBEDDINGS, UNTRAINED = "embeddings.h5", "untrained.h5"
_HDF5 = b"\x89HDF\r\n\x1a\n"
_RUNNING = ("batch_tokens", "device", "threads", "trust_remote_code", "unit_bases")
"""Options that change no vector: the user's for the untrained copy too."""


def find_embedding_file(inputs: Sequence[str]) -> Path | None:
    """Tell an embedding file from sequence files, by content."""
    are_files = [_is_hdf5(name) for name in inputs]
    if not inputs or (any(are_files) and len(inputs) > 1):
        message = (
            f"inputs: {len(inputs)} files, expected one embedding file, or sequence files; name one of these"
        )
        raise ConfigError(message)
    return Path(inputs[0]) if are_files[0] else None


def embed_layers(
    inputs: Sequence[str],
    output: Path,
    *,
    model: str | PathLike[str] | GenomicModel,
    overwrite: bool,
    progress: Callable[[RunStats], None] | None,
    **options: Any,
) -> ExtractionReport:
    """Take all layers in one pass, unless an earlier run with the same settings did."""
    return extract(
        inputs,
        model=model,
        output=output,
        fusion="none",
        resume=True,
        overwrite=overwrite,
        progress=progress,
        **{"on_error": "skip", **options},
    )


def embed_untrained(
    file: EmbeddingFile,
    output: Path,
    *,
    model: str | PathLike[str] | GenomicModel | None,
    seed: int,
    overwrite: bool,
    sequences: Sequence[str],
    progress: Callable[[RunStats], None] | None,
    options: dict[str, Any],
) -> Path | str:
    """Embed the records of a file again, with a model of the same configuration and fresh weights."""
    config, made = file.provenance.get("config"), file.provenance.get("model")
    if not isinstance(config, dict) or not isinstance(made, dict):
        return "the file does not say how it was made"
    embedding, read = config["embedding"], config["input"]
    if embedding["fusion"] != "none" or "finetuned" in file.provenance:
        return "the layers were fused, or the model fine-tuned"
    inputs = list(sequences or read["inputs"])
    if lost := [name for name in inputs if not Path(name).is_file()]:
        return f"{', '.join(lost)} is no file here (set sequences to where they are)"
    running = {name: options[name] for name in _RUNNING if name in options}
    device = running.pop("device", None)
    trust = running.pop("trust_remote_code", False)
    fresh = untrained_copy(
        config["model"]["model"] if model is None else model,
        seed=seed,
        device=device,
        dtype=made["dtype"],
        revision=config["model"]["revision"],
        trust_remote_code=trust,
    )
    embed_layers(
        inputs,
        output,
        model=fresh,
        overwrite=overwrite,
        progress=progress,
        layers=file.layers,
        pooling=embedding["pooling"],
        **{name: embedding[name] for name in ("skip_first", "rc")},
        **{name: config["windows"][name] for name in ("window", "stride")},
        **{name: value for name, value in read.items() if name != "inputs"},
        **running,
    )
    return output


def untrained_copy(
    model: str | PathLike[str] | GenomicModel,
    *,
    seed: int,
    device: str | None = None,
    dtype: ComputeDtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> GenomicModel:
    """Make a model of the same configuration that has learnt nothing: its own random initialization."""
    loaded = (
        model
        if isinstance(model, GenomicModel)
        else load_model(
            fspath(model), device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
        )
    )
    module, tokenizer = loaded.module, loaded.tokenizer
    name = f"untrained copy of {loaded.name} (seed {seed})"
    places = {key: (tensor.device, tensor.dtype) for key, tensor in _tensors(module)}
    kind, config = type(module), module.config
    del loaded, module  # two models at a time may be one too many for a device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = kind(config)
    for key, tensor in _tensors(fresh):
        where, what = places.get(key, (tensor.device, tensor.dtype))
        tensor.data = tensor.data.to(where, what)
    return GenomicModel(fresh, tokenizer, name=name)


def _tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _is_hdf5(name: str) -> bool:
    path = Path(name)
    if name == "-" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_HDF5)) == _HDF5
