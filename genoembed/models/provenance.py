"""Identify a model by its content: digests of all that its outputs depend on, and its license.

Everything here reads files that are already on the machine; nothing is fetched.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from collections.abc import Iterable


_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
# as transformers looks for them, which leaves other tensors in the folder alone
_BACKBONE_PATTERNS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors")
_HUB_BLOB = re.compile(r"[0-9a-f]{64}")
WEIGHTS, CONFIG = "weights", "config.json"
"""Names of two parts of a model's content; the others have names of files."""
_NO_MATTER = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
"""Keys of a configuration that change no output, or that the type of the activations already says."""
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("adapter_config.json", "modules.json", "1_Pooling/config.json", "genoembed_finetuned.json"),
)
_REMOTE_CODE = "transformers_modules."
"""Package that transformers imports the code of model folders into."""


def weight_files(folder: Path) -> tuple[Path, ...]:
    """List the files that a model folder's weights come from, those of heads of ours among them."""
    return _first_found(folder, _WEIGHT_PATTERNS)


def backbone_files(folder: Path) -> tuple[Path, ...]:
    """List the files that transformers reads the model itself from."""
    return _first_found(folder, _BACKBONE_PATTERNS)


def _first_found(folder: Path, patterns: tuple[str, ...]) -> tuple[Path, ...]:
    for pattern in patterns:
        found = tuple(sorted(folder.glob(pattern)))
        if found:
            return found
    return ()


class WeightSizes(NamedTuple):
    """How much a folder's weights can be of."""

    num_tensors: int | None
    """None where only reading all of a file would tell."""
    num_values: int
    """At most."""


def weight_sizes(folder: Path | None) -> WeightSizes | None:
    """Measure the weights of a folder by their headers; None where none are here."""
    files = () if folder is None else weight_files(folder)
    if not files:
        return None
    num_bytes = sum(path.stat().st_size for path in files)  # a value takes a byte at least
    num_tensors = 0
    for path in files:
        if path.suffix != ".safetensors":
            return WeightSizes(None, num_bytes)
        try:
            with safe_open(path, framework="numpy") as weights:
                num_tensors += len(weights.keys())
        except (SafetensorError, OSError):  # said where they are loaded
            return WeightSizes(None, num_bytes)
    return WeightSizes(num_tensors, num_bytes)


def file_digest(path: Path) -> str:
    """Compute a file's SHA-256."""
    resolved = path.resolve()
    if path.is_symlink() and _HUB_BLOB.fullmatch(resolved.name):
        return resolved.name  # the hub names a blob of its cache by its SHA-256
    with resolved.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_digest(folder: Path) -> str:
    """Compute one SHA-256 for all weights of a folder."""
    files = weight_files(folder)
    if not files:
        return ""
    if len(files) == 1:
        return file_digest(files[0])
    lines = "".join(f"{file_digest(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def folder_content(folder: Path, *, more: Iterable[str] = ()) -> dict[str, str]:
    """Compute a digest of each part of a model folder that outputs depend on, by name of the file.

    Weights count as one part. What transformers adds to a configuration as it saves it does not count.
    """
    found = {WEIGHTS: weights_digest(folder)}
    if (folder / CONFIG).is_file():
        found[CONFIG] = config_digest(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    projections = [f"{path.parent.name}/{path.name}" for path in folder.glob("*_Dense/model.safetensors")]
    names = sorted({*_FILES, *projections, *more})
    return found | {name: file_digest(folder / name) for name in names if (folder / name).is_file()}


def code_content(*objects: object) -> dict[str, str]:
    """Compute a digest of each file of other people's code that objects are made by, wherever it comes from.

    That is remote code, and packages that register kinds of models with transformers.
    """
    names = {type(thing).__module__ for thing in objects}
    packages = {name.rpartition(".")[0] or name for name in names if _is_foreign(name)}
    return {
        Path(file).name: file_digest(Path(file))
        for name, module in sorted(sys.modules.items())
        if (name in packages or name.rpartition(".")[0] in packages)
        and (file := getattr(module, "__file__", None))
    }


def code_statement(thing: object) -> dict[str, str | None] | None:
    """State which installed package an object's class is of; None for those of transformers and ours."""
    name = type(thing).__module__
    if not _is_foreign(name) or name.startswith(_REMOTE_CODE):
        return None
    package = name.partition(".")[0]
    found = packages_distributions().get(package, [package])[0]
    try:
        return {"module": name, "package": found, "version": version(found)}
    except PackageNotFoundError:  # a folder on the path
        return {"module": name, "package": package, "version": None}


def _is_foreign(module: str) -> bool:
    return module.partition(".")[0] not in ("transformers", "genoembed", "tokenizers")


def config_digest(values: dict[str, Any]) -> str:
    """Compute one SHA-256 for the settings of a model."""
    kept = {key: value for key, value in values.items() if key not in _NO_MATTER}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def content_digest(parts: dict[str, str]) -> str:
    """Compute one SHA-256 for all parts of a model's content."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_revision(folder: Path) -> str | None:
    """Find the commit of a repository that a folder was fetched at; None where nothing says so."""
    if folder.parent.name == "snapshots":
        return folder.name
    # what the hub's client leaves in a folder of the user's choice: commit, digest and time, one per line
    note = folder / ".cache" / "huggingface" / "download" / f"{CONFIG}.metadata"
    try:
        commit = note.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, ValueError):
        return None
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else None


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
