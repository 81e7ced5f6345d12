"""Layers of an embedding file as a mapping: some rows of one layer at a time, kept where there is room.

Where the vectors of a probe come from: a file that is there, one pass that makes it, or an untrained copy.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genoembed.errors import ConfigError
from genoembed.extraction import extract
from genoembed.models.genomic_model import GenomicModel
from genoembed.models.load import load_model
from genoembed.pipeline.embedding_file import (
    check_comparable,
    comparable_settings,
    find_file_settings,
    load_transform,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from genoembed.config.choices import ComputeDtype
    from genoembed.extraction import ExtractionReport
    from genoembed.pipeline.units import RunStats
    from genoembed.pooling.transform import FittedTransform
    from genoembed.store import EmbeddingFile


ROOM_BYTES = 1 << 29
"""Layers are kept in memory if all of them need no more than this; else each is read when it is needed."""


class RowsOfLayers(Mapping[str, "NDArray[np.floating]"]):
    """Some rows of each layer of a file."""

    def __init__(
        self,
        file: EmbeddingFile,
        layers: Sequence[str],
        rows: NDArray[np.int64],
        *,
        transforms: Mapping[str, FittedTransform] | None = None,
        room_bytes: int = ROOM_BYTES,
    ) -> None:
        self._matrices = {name: file[name] for name in layers}
        self._rows = rows
        self._file, self._room_bytes = file, room_bytes
        self._transforms = transforms or {}
        needed = sum(
            len(rows) * matrix.shape[1] * matrix.dtype.itemsize for matrix in self._matrices.values()
        )
        self._kept: dict[str, NDArray[np.floating]] | None = {} if needed <= room_bytes else None

    def __getitem__(self, name: str) -> NDArray[np.floating]:
        if self._kept is None:
            return self._read(name)
        if name not in self._kept:
            self._kept[name] = self._read(name)
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)

    def of(self, is_kept: NDArray[np.bool_]) -> RowsOfLayers:
        """Take fewer rows."""
        return RowsOfLayers(
            self._file,
            list(self),
            self._rows[is_kept],
            transforms=self._transforms,
            room_bytes=self._room_bytes,
        )

    def _read(self, name: str) -> NDArray[np.floating]:
        rows = np.asarray(self._matrices[name])[self._rows]
        return self._transforms[name].apply(rows) if name in self._transforms else rows


def load_transforms(
    file: EmbeddingFile, layers: Sequence[str], paths: Sequence[str]
) -> dict[str, FittedTransform]:
    """Read fitted transforms, and make sure that they are for vectors as the file has them."""
    found: dict[str, FittedTransform] = {}
    for path in paths:
        loaded = load_transform(path)
        layer = str(loaded.settings.get("layer"))
        if layer not in layers:
            message = (
                f"transform {path}: fitted on layer {layer!r}, which is not among those probed; leave it out"
            )
            raise ConfigError(message)
        if layer in found:
            message = f"transform {path}: a second one for layer {layer!r}; give one a layer"
            raise ConfigError(message)
        check_comparable(
            loaded.settings, comparable_settings(file.provenance, layer), names=(path, str(file.path))
        )
        found[layer] = loaded.transform
    return found


logger = logging.getLogger(__name__)

_RUNNING = ("batch_tokens", "device", "threads", "trust_remote_code", "unit_bases")
"""Options that change no vector: the user's for the untrained copy too."""


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
        resume=True,
        overwrite=overwrite,
        progress=progress,
        **{"fusion": "none", **options},
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
    settings = find_file_settings(file)
    if settings is None:
        return "the file does not say how it was made"
    if settings.fusion != "none" or settings.is_finetuned:
        return "the layers were fused, or the model fine-tuned"
    inputs = list(sequences or settings.inputs)
    if not inputs:
        return "the file does not say in which files its sequences are (set sequences to them)"
    if not inputs:
        return "the file does not say of which files it was made (set sequences to them)"
    if lost := [name for name in inputs if not Path(name).is_file()]:
        return f"{', '.join(lost)} is not a file here (set sequences to where they are)"
    running = {name: options[name] for name in _RUNNING if name in options}
    device = running.pop("device", None)
    trust = running.pop("trust_remote_code", False)
    fresh = untrained_copy(
        settings.model if model is None else model,
        seed=seed,
        device=device,
        dtype=settings.dtype,
        revision=settings.revision,
        trust_remote_code=trust,
    )
    embed_layers(
        inputs,
        output,
        model=fresh,
        overwrite=overwrite,
        progress=progress,
        **{**settings.embedding_options(), "layers": file.layers},
        **settings.reading,
        regions=settings.regions or None,
        on_error="skip",
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
    """Make a model of the same configuration that has learned nothing: its own random initialization."""
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
    if hasattr(fresh, "set_fp8"):
        fresh.set_fp8("off")  # the scales of FP8 projections are the trained weights'
    for key, tensor in _tensors(fresh):
        where, what = places.get(key, (tensor.device, tensor.dtype))
        tensor.data = tensor.data.to(where, what)
    return GenomicModel(fresh, tokenizer, name=name)


def _tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
