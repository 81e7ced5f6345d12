"""Fetch the checkpoints of the registry, and verify them.

In: a registry entry. Out: its files in the Hugging Face cache, or an error that says where to get them.
Promised: without a network the answer comes within seconds, and no file that differs from what the registry
records is handed on.
"""

from __future__ import annotations

import hashlib
import logging
import ssl
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from genoembed.errors import CheckpointError, ModelNotFoundError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from genoembed.models.registry import KnownModel

_LOG = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 5.0
_CHUNK_BYTES = 1 << 22
# what the hub's client raises when a connection breaks; its HTTP library is not ours to name
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


def hub_answers() -> bool:
    """Check once, briefly, that the hub answers: its own client retries for half a minute."""
    if constants.is_offline_mode():
        return False
    request = Request(constants.ENDPOINT, method="HEAD")
    try:
        with urlopen(request, timeout=_ANSWER_TIMEOUT_S):
            return True
    except HTTPError:
        return True
    except URLError as error:
        # certificates may be set up for the hub's client only
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False


def silence_reason() -> str:
    """Return why the hub does not answer."""
    if constants.is_offline_mode():
        return "offline mode (HF_HUB_OFFLINE) is set"
    return f"{constants.ENDPOINT} does not answer"


def fetch_checkpoint(entry: KnownModel, *, converted: Path) -> tuple[Path, ...]:
    """Return a registry checkpoint's files, from the hub's cache or else the hub, and verify them."""
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


def cached_file(repo_id: str, file_name: str, *, revision: str | None = None) -> Path | None:
    """Find a file in the hub's cache, without asking the hub."""
    try:
        found = try_to_load_from_cache(repo_id, file_name, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _download(entry: KnownModel, file_name: str, converted: Path) -> Path:
    assert entry.repo_id is not None
    try:
        return Path(hf_hub_download(entry.repo_id, file_name))
    except (OSError, _HTTP_ERROR) as error:
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
    whole = hashlib.sha256()
    for path, digest in zip(paths, digests, strict=True):
        found_digest = _digest(path, whole if entry.merged_sha256 else None)
        if digest not in (None, found_digest):
            raise _mismatch(entry, path, f"SHA-256 {found_digest}, expected {digest}")
    if entry.merged_sha256 not in (None, whole.hexdigest()):
        found_text = f"SHA-256 {whole.hexdigest()} of all pieces together, expected {entry.merged_sha256}"
        raise _mismatch(entry, paths[0], found_text)


def _digest(path: Path, whole: hashlib._Hash | None) -> str:
    """Compute a file's SHA-256 from its bytes, and feed them to that of the merged file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            if whole is not None:
                whole.update(chunk)
    return digest.hexdigest()


def _mismatch(entry: KnownModel, path: Path, difference: str) -> CheckpointError:
    message = (
        f"{difference} as recorded for {entry.name}; delete the file so that it is fetched again, or, if you "
        "know that it is right, turn it into a folder with genoembed convert and set model to that folder"
    )
    return CheckpointError(message, path=str(path))
