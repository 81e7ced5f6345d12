"""Resolve a model's name, and fetch and convert what the registry knows.

Names resolve in this order: bundled, registry, local folder or checkpoint file, Hugging Face id. The folder
of a training run stands for the model in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path

from huggingface_hub import constants

from genoembed.errors import ModelError, ModelNotFoundError
from genoembed.models.hub import (
    cached_file,
    fetch_checkpoint,
    hub_answers,
    silence_reason,
    verify_checkpoint,
)
from genoembed.models.registry import (
    BUNDLED_FOLDER,
    BUNDLED_NAME,
    KnownModel,
    ModelSource,
    known_models,
    suggestion,
)
from genoembed.models.striped_hyena2.convert import checkpoint_files, convert_checkpoint
from genoembed.models.trained_folder import model_folder

_LOG = logging.getLogger(__name__)

_CONVERTIBLE = (".pt", ".safetensors")
_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def locate_model(name_or_path: str, *, with_weights: bool = True) -> ModelSource:
    """Find what a name stands for; a registry checkpoint is fetched and converted if need be."""
    entry = next((model for model in known_models() if model.name == name_or_path), None)
    if entry is not None:
        if not with_weights:
            folder = _folder_of(entry)
            return ModelSource(name=name_or_path, location=str(folder), is_local=True, entry=entry)
        folder = _folder_of(entry) if entry.name == BUNDLED_NAME else converted_folder(entry)
        if not (folder / "config.json").is_file():
            message = f"model {name_or_path!r}: {folder} holds no config.json; install genoembed again"
            raise ModelNotFoundError(message)
        return ModelSource(name=name_or_path, location=str(folder), is_local=True, entry=entry)
    path = model_folder(name_or_path)
    if path.is_file():
        return ModelSource(name=name_or_path, location=str(_converted_file(path)), is_local=True)
    if path.exists():
        _check_folder(path)
        return ModelSource(name=name_or_path, location=str(path), is_local=True)
    if _looks_like_path(name_or_path):
        message = f"model {name_or_path!r}: no such file or folder; {suggestion(path.name)}"
        raise ModelNotFoundError(message)
    return ModelSource(name=name_or_path, location=name_or_path, is_local=False)


def reachable_source(source: ModelSource, *, revision: str | None) -> ModelSource:
    """Point a Hugging Face id to its snapshot in the cache where the hub does not answer.

    Several of transformers' loaders ask the hub again and again in that case, for half a minute each time.
    """
    if source.is_local and revision is not None:
        message = (
            f"model {source.name!r}: revision is {revision!r}, but only a Hugging Face id has revisions; "
            "leave revision out"
        )
        raise ModelError(message)
    if source.is_local or hub_answers():
        return source
    config_path = cached_file(source.location, "config.json", revision=revision)
    if config_path is None:
        message = (
            f"model {source.name!r}: no such model here, it is not in the Hugging Face cache "
            f"{constants.HF_HUB_CACHE}, and {silence_reason()}; {suggestion(source.name)}"
        )
        raise ModelNotFoundError(message)
    return dataclasses.replace(source, location=str(config_path.parent), is_local=True)


def cache_folder() -> Path:
    """Return the folder that converted checkpoints are kept in."""
    return Path(constants.HF_HOME) / "genoembed"


def converted_folder(entry: KnownModel) -> Path:
    """Return the converted folder of a registry checkpoint; fetch and convert it the first time."""
    folder = _folder_of(entry)
    if (folder / "config.json").is_file():
        return folder
    source = _merged_file(entry) or fetch_checkpoint(entry, converted=folder)[0]
    _LOG.info("converting %s once, into %s", source, folder)
    return convert_checkpoint(source, folder, name=entry.name)


def _folder_of(entry: KnownModel) -> Path:
    return BUNDLED_FOLDER if entry.name == BUNDLED_NAME else cache_folder() / entry.name


def _merged_file(entry: KnownModel) -> Path | None:
    """Find the merged file that the original package leaves beside the hub cache, and verify it."""
    path = Path(constants.HF_HUB_CACHE).parent / f"{entry.name}.pt"
    if not path.is_file():
        return None
    verify_checkpoint(entry, [path])
    return path


def _converted_file(path: Path) -> Path:
    """Return the folder of a converted checkpoint file; its contents name it: none stands for another."""
    if not path.name.endswith(_CONVERTIBLE) and ".part" not in path.suffix:
        message = (
            f"model {str(path)!r}: a file that is no checkpoint, expected one that ends in .pt, .pt.part0 "
            "... or .safetensors, or a folder written by save_pretrained; name one of these"
        )
        raise ModelError(message)
    digest = hashlib.sha256()
    for part in checkpoint_files(path):
        with part.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)  # goes on with the digest of the parts before
    folder = cache_folder() / f"{path.name.partition('.')[0]}-{digest.hexdigest()[:16]}"
    if not (folder / "config.json").is_file():
        _LOG.info("converting %s once, into %s", path, folder)
        convert_checkpoint(path, folder)
    return folder


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        checkpoints = sorted(p.name for p in path.iterdir() if p.suffix in _CHECKPOINT_SUFFIXES)
        hint = (
            f"convert {checkpoints[0]} first" if checkpoints else "name a folder written by save_pretrained"
        )
        message = f"model {str(path)!r}: a folder without config.json; {hint}"
        raise ModelError(message)


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith(("/", ".", "~"))
        or name.count("/") > 1
        or "\\" in name
        or name.endswith(_CHECKPOINT_SUFFIXES)
    )
