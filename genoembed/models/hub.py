"""What is asked of the Hugging Face hub and its cache.

A module of its own because the hub's client takes a moment to import, and local folders need none of it.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

_ANSWER_TIMEOUT_S = 5.0
# what the hub's client raises when a connection breaks; its HTTP library is not ours to name
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


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


def cached_file(repo_id: str, file_name: str, *, revision: str | None = None) -> Path | None:
    """Find a file in the hub's cache, without asking the hub."""
    try:
        found = try_to_load_from_cache(repo_id, file_name, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def download(repo_id: str, file_name: str, *, revision: str | None = None) -> Path:
    """Return a file's place in the cache; fetch it the first time."""
    return Path(hf_hub_download(repo_id, file_name, revision=revision))
