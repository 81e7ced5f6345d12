"""Resolve a model's name; fetch, verify and convert what the registry knows.

Names resolve in this order: bundled, registry, local folder or checkpoint file, short name of a published
model (`genoembed.models.geneb`), Hugging Face id. The folder of a training run stands for the model in it.
Promised: without a network the answer comes within seconds, and no file that differs from what the registry
records is handed on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants

from genoembed.contracts import FINAL_FOLDER, RUN_FILE
from genoembed.errors import CheckpointError, ModelError, ModelNotFoundError
from genoembed.models.names import (
    BUNDLED_NAME,
    CHECKPOINT_SUFFIXES,
    check_model_name,
    model_folder,
    suggestion,
)
from genoembed.models.provenance import folder_content
from genoembed.models.registry import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BUNDLED_FOLDER,
    Adapter,
    KnownModel,
    ModelSource,
    entry_named,
    read_adapter,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_LOG = logging.getLogger(__name__)

_CONVERTIBLE = (".pt", ".safetensors")
_TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"),
)


def find_source(name_or_path: str, *, revision: str | None = None, with_weights: bool = True) -> ModelSource:
    """Find what a name stands for, as near as it is: `locate_model` and `reachable_source` in one.

    An adapter stands for the model that it changes, and is named with it.
    """
    source = locate_model(name_or_path, with_weights=with_weights)
    revision = source.revision_for(revision)
    source = dataclasses.replace(reachable_source(source, revision=revision), revision=revision)
    folder = Path(source.location) if source.is_local else _fetched_adapter(source)
    adapter = None if folder is None else read_adapter(folder)
    return source if adapter is None else _on_base(source, adapter, with_weights=with_weights)


def say_inner_folder(source: ModelSource) -> None:
    """Say which folder stands for the one that was named, such as that of a training run."""
    named = Path(source.name).expanduser()
    if source.is_local and source.entry is None and source.adapter is None and named.is_dir():
        if named != Path(source.location):
            _LOG.info("model %r: the model in it, %s", source.name, source.location)


def fetched(source: ModelSource, name: str) -> Path | None:
    """Fetch a file of a model; None where there is none, or where loading the model will say why."""
    if source.is_local:
        path = Path(source.location) / name
        return path if path.is_file() else None
    from genoembed.models.hub import download

    try:
        return download(source.location, name, revision=source.revision)
    except (OSError, ValueError):
        return None


def _fetched_adapter(source: ModelSource) -> Path | None:
    """Fetch a repository that holds an adapter and no model of its own."""
    if fetched(source, "config.json") is not None:
        return None
    found = fetched(source, ADAPTER_CONFIG)
    for name in (*ADAPTER_WEIGHTS, *_TOKENIZER_FILES) if found is not None else ():
        fetched(source, name)
    return None if found is None else found.parent


def _on_base(source: ModelSource, adapter: Adapter, *, with_weights: bool) -> ModelSource:
    """Find the model that an adapter changes: by the name that it gives, or as a folder beside it."""
    beside = [adapter.folder / adapter.base, adapter.folder.parent / Path(adapter.base).name]
    near = next((str(path) for path in beside if (path / "config.json").is_file()), None)
    name = adapter.base if near is None or Path(adapter.base).expanduser().exists() else near
    try:
        base = find_source(name, revision=adapter.base_revision, with_weights=with_weights)
    except ModelNotFoundError as error:
        message = (
            f"model {source.name!r}: it is an adapter of {adapter.base!r}, which is not found ({error}); put "
            f"that model's folder beside it, or write where it is as base_model_name_or_path into its "
            f"{ADAPTER_CONFIG}"
        )
        raise ModelNotFoundError(message) from error
    if base.adapter is not None:
        message = (
            f"model {source.name!r}: it is an adapter of {adapter.base!r}, which is an adapter itself; merge "
            "that one into its model first"
        )
        raise ModelError(message)
    _LOG.info("model %r: an adapter of %s", source.name, base.location)
    return dataclasses.replace(base, name=source.name, entry=None, published=None, adapter=adapter)


def locate_model(name_or_path: str, *, with_weights: bool = True) -> ModelSource:
    """Find what a name stands for; a registry checkpoint is fetched and converted if need be."""
    entry = entry_named(name_or_path)
    path = model_folder(name_or_path)
    if entry is not None:
        path = converted_folder(entry) if with_weights else _folder_of(entry)
    elif path.is_file():
        path = _converted_file(path)
    elif path.exists():
        _check_folder(path)
    else:
        check_model_name(name_or_path)
    if entry is None:
        return _published(name_or_path, path)
    return ModelSource(name=name_or_path, location=str(path), is_local=True, entry=entry)


def _published(name: str, path: Path) -> ModelSource:
    """Tell a folder or file from the short name of a published model and from a Hugging Face id."""
    from genoembed.models.geneb import published_in, published_named, repository_of

    short = published_named(name)
    if path.exists():
        if short is not None:
            message = "model %r: taken from the file or folder of that name, not from %s"
            _LOG.warning(message, name, short.repo_id)
        return ModelSource(name=name, location=str(path), is_local=True)
    location = name if short is None else repository_of(short)
    return ModelSource(name=name, location=location, is_local=False, published=short or published_in(name))


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
    if source.is_local:
        return source
    from genoembed.models.hub import cached_file, hub_answers

    if hub_answers():
        return source
    names = ("config.json", ADAPTER_CONFIG)
    found = (cached_file(source.location, name, revision=revision) for name in names)
    config_path = next(filter(None, found), None)
    if config_path is None:
        what, remedy = "no such model here, it", suggestion(source.name)
        if source.published is not None:
            what = source.location
            remedy = f"download {what} where there is a network, and set model to that folder"
        message = (
            f"model {source.name!r}: {what} is not in the Hugging Face cache "
            f"{constants.HF_HUB_CACHE}, and {silence_reason()}; {remedy}"
        )
        raise ModelNotFoundError(message)
    return dataclasses.replace(source, location=str(config_path.parent), is_local=True)


def model_content(name_or_path: str, *, revision: str | None = None) -> dict[str, str]:
    """Identify what a name stands for by its content, before it is loaded.

    Equal for a folder under any name; of a Hugging Face repository, the commit.
    """
    source = find_source(name_or_path, revision=revision)
    content = _source_content(source)
    return content if source.adapter is None else source.adapter.content(content)


def _source_content(source: ModelSource) -> dict[str, str]:
    folder = Path(source.location)
    if not source.is_local:
        from genoembed.models.hub import download

        try:
            folder = download(source.location, "config.json", revision=source.revision).parent
        except (OSError, ValueError):  # loading it says why
            return {"commit": f"{source.location} {source.revision}"}
    if folder.parent.name == "snapshots":
        return {"commit": folder.name}  # its files are fetched one by one, as they are needed
    return folder_content(folder, more=[path.name for path in folder.glob("*.py")])


def cache_folder() -> Path:
    """Return the folder that converted checkpoints are kept in."""
    return Path(constants.HF_HOME) / "genoembed"


def converted_folder(entry: KnownModel) -> Path:
    """Return the converted folder of a registry checkpoint; fetch and convert it the first time."""
    folder = _folder_of(entry)
    if (folder / "config.json").is_file():
        return folder
    if entry.name == BUNDLED_NAME:
        message = f"model {entry.name!r}: {folder} holds no config.json; install genoembed again"
        raise ModelNotFoundError(message)
    from genoembed.models.striped_hyena2.convert import convert_checkpoint

    # the original package leaves the merged file next to the hub's cache
    source = Path(constants.HF_HUB_CACHE).parent / f"{entry.name}.pt"
    if source.is_file():
        verify_checkpoint(entry, [source])
    else:
        source = fetch_checkpoint(entry, converted=folder)[0]
    _LOG.info("converting %s once, into %s", source, folder)
    return convert_checkpoint(source, folder, name=entry.name)


def _folder_of(entry: KnownModel) -> Path:
    return BUNDLED_FOLDER if entry.name == BUNDLED_NAME else cache_folder() / entry.name


def _converted_file(path: Path) -> Path:
    """Return the folder of a converted checkpoint file; its contents name it: none stands for another."""
    if not path.name.endswith(_CONVERTIBLE) and ".part" not in path.suffix:
        message = (
            f"model {str(path)!r}: a file that is not a checkpoint, expected one that ends in .pt, .pt.part0 "
            "... or .safetensors, or a folder written by save_pretrained; name one of these"
        )
        raise ModelError(message)
    from genoembed.models.striped_hyena2.convert import checkpoint_files, convert_checkpoint

    digest = _joined_digest(checkpoint_files(path))
    folder = cache_folder() / f"{path.name.partition('.')[0]}-{digest[:16]}"
    if not (folder / "config.json").is_file():
        _LOG.info("converting %s once, into %s", path, folder)
        convert_checkpoint(path, folder)
    return folder


def _joined_digest(files: Iterable[Path]) -> str:
    """Compute the SHA-256 of files laid end to end."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)  # goes on with the digest of the files before
    return digest.hexdigest()


def _check_folder(path: Path) -> None:
    if not any((path / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        if (path / RUN_FILE).is_file():
            message = (
                f"model {str(path)!r}: the folder of a training run without its {FINAL_FOLDER!r}; go on with "
                "the run until it is complete"
            )
            raise ModelError(message)
        checkpoints = sorted(p.name for p in path.iterdir() if p.suffix in CHECKPOINT_SUFFIXES)
        hint = (
            f"convert {checkpoints[0]} first" if checkpoints else "name a folder written by save_pretrained"
        )
        message = f"model {str(path)!r}: a folder without config.json; {hint}"
        raise ModelError(message)


def silence_reason() -> str:
    """Return why the hub does not answer."""
    if constants.is_offline_mode():
        return "offline mode (HF_HUB_OFFLINE) is set"
    return f"{constants.ENDPOINT} does not answer"


def fetch_checkpoint(entry: KnownModel, *, converted: Path) -> tuple[Path, ...]:
    """Return a registry checkpoint's files, from the hub's cache or else the hub, and verify them."""
    from genoembed.models.hub import cached_file, hub_answers

    assert entry.repo_id is not None
    cached = [cached_file(entry.repo_id, file.name) for file in entry.files]
    if None in cached and not hub_answers():
        raise _out_of_reach(entry, silence_reason(), converted)
    paths = []
    for path, file in zip(cached, entry.files, strict=True):
        if path is None:
            _LOG.info("fetching %s of %s (%s bytes)", file.name, entry.repo_id, file.num_bytes or "unknown")
        paths.append(path or _download(entry, file.name, converted))
    verify_checkpoint(entry, paths)
    return tuple(paths)


def _download(entry: KnownModel, file_name: str, converted: Path) -> Path:
    from genoembed.models.hub import HTTP_ERROR, download

    assert entry.repo_id is not None
    try:
        return download(entry.repo_id, file_name)
    except (OSError, HTTP_ERROR) as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        reason = f"fetching {file_name} failed ({type(error).__name__}: {reason})"
        raise _out_of_reach(entry, reason, converted) from error


def _out_of_reach(entry: KnownModel, reason: str, converted: Path) -> ModelNotFoundError:
    names = " and ".join(file.name for file in entry.files)
    size = "" if entry.num_bytes is None else f" ({entry.num_bytes / 1e9:.1f} GB)"
    page = f"{constants.ENDPOINT}/{entry.repo_id}"
    message = (
        f"model {entry.name!r}: there is neither its converted folder {converted} nor {names}{size} in the "
        f"Hugging Face cache {constants.HF_HUB_CACHE}, and {reason}; download {names} from {page} where "
        "there is a network, make a folder of it with genoembed convert, and set model to that folder"
    )
    return ModelNotFoundError(message)


def verify_checkpoint(entry: KnownModel, paths: Sequence[Path]) -> None:
    """Compare a checkpoint's files with the sizes and SHA-256 digests that the registry records."""
    is_merged = len(paths) < len(entry.files)
    sizes = (entry.num_bytes,) if is_merged else tuple(file.num_bytes for file in entry.files)
    for path, expected in zip(paths, sizes, strict=True):
        found = path.stat().st_size
        if expected not in (None, found):
            raise _mismatch(entry, path, f"{found} bytes, expected {expected}")
    digests = (None,) if is_merged else tuple(file.sha256 for file in entry.files)
    if not any((*digests, entry.merged_sha256)):
        _LOG.info("%s: no SHA-256 is recorded, sizes only are verified", entry.name)
        return
    _LOG.info("verifying the SHA-256 of %s", entry.name)
    for path, digest in zip(paths, digests, strict=True):
        if digest is not None and (computed := _joined_digest([path])) != digest:
            raise _mismatch(entry, path, f"SHA-256 {computed}, expected {digest}")
    if entry.merged_sha256 is not None and (computed := _joined_digest(paths)) != entry.merged_sha256:
        problem = f"SHA-256 {computed} of all pieces together, expected {entry.merged_sha256}"
        raise _mismatch(entry, paths[0], problem)


def _mismatch(entry: KnownModel, path: Path, difference: str) -> CheckpointError:
    message = (
        f"{difference} as recorded for {entry.name}; delete the file so that it is fetched again, or, if you "
        "know that it is right, turn it into a folder with genoembed convert and set model to that folder"
    )
    return CheckpointError(message, path=str(path))
