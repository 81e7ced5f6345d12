"""Identify the weights of a model: digest of the files, revision, license.

Everything here reads files that are already on the machine; nothing is fetched.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

import torch
import yaml

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
_HUB_BLOB = re.compile(r"[0-9a-f]{64}")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """List the files that a model folder's weights come from."""
    for pattern in _WEIGHT_PATTERNS:
        found = tuple(sorted(folder.glob(pattern)))
        if found:
            return found
    return ()


def file_digest(path: Path) -> str:
    """Compute a file's SHA-256."""
    resolved = path.resolve()
    if path.is_symlink() and _HUB_BLOB.fullmatch(resolved.name):
        return resolved.name  # the hub names a blob of its cache by its SHA-256
    with resolved.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def parameters_digest(module: nn.Module) -> str:
    """Compute one SHA-256 for the weights of a model in memory, for one that came from no folder."""
    digest = hashlib.sha256()
    for name, values in sorted(module.state_dict().items()):
        if isinstance(values, torch.Tensor):
            digest.update(f"{name} {values.dtype} {tuple(values.shape)};".encode())
            digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_digest(folder: Path) -> str:
    """Compute one SHA-256 for all weights of a folder."""
    files = weight_files(folder)
    if not files:
        return ""
    if len(files) == 1:
        return file_digest(files[0])
    lines = "".join(f"{file_digest(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def read_license(folder: Path) -> str:
    """Read the license from a folder's model card."""
    for name in ("README.md", "MODEL_CARD.md"):
        card = folder / name
        if card.is_file():
            stated = _card_header(card.read_text(encoding="utf-8", errors="replace")).get("license")
            if isinstance(stated, str) and stated:
                return stated
    return "unknown"


def _card_header(text: str) -> dict[str, Any]:
    """Parse the YAML block that a model card starts with."""
    parts = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, flags=re.DOTALL)
    if parts is None:
        return {}
    try:
        header = yaml.safe_load(parts.group(1))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):  # a date of 30 February, say
        return {}
    return header if isinstance(header, dict) else {}
