"""Read a StripedHyena 2 folder into the plain network, without transformers.

In: a folder as transformers saves it. Out: its shape, or the network with its weights; None where anything in
the folder is out of the ordinary, so that transformers' loader, which knows many forms, reads it or says what
is wrong. Promised: the weights are those that transformers would load, in the same types.
"""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from genoembed.contracts import ByteTokens
from genoembed.errors import ConfigError
from genoembed.models.striped_hyena2.network import PlainStripedHyena2
from genoembed.models.striped_hyena2.shape import StripedHyena2Fields, StripedHyena2Shape

if TYPE_CHECKING:
    from pathlib import Path

_OTHER_KEYS = {
    *("architectures", "checkpoint_name", "dtype", "model_type", "transformers_version", "use_cache"),
    *("tie_word_embeddings", "pad_token_id", "eos_token_id", "bos_token_id"),
}
_TYPES = (None, "float32", "bfloat16", "float16")
_FLOAT32_PARTS = ("log_poles", "residues", "inv_freq", "fp8_scales")
"""Tensors that stay float32 whatever type the model has; transformers' class names the same ones."""
_MOST_LAYERS, _WIDEST = 10_000, 1 << 24
_KINDS: dict[str, set[type]] = {"int": {int}, "float": {int, float}, "bool": {bool}}
_TOKENIZER = {
    "tokenizer_class": "CharTokenizer",
    "eos_token": chr(ByteTokens.eos_token_id),
    "pad_token": chr(ByteTokens.pad_token_id),
}
_TOKENIZER_OPTIONS = {"backend", "clean_up_tokenization_spaces", "model_max_length", "is_local"}
_MORE_TOKENS = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "tokenizer.model", "spiece.model"),
)


def read_shape(folder: Path) -> StripedHyena2Shape | None:
    """Read ``config.json``."""
    values = _read_json(folder / "config.json")
    fields = inspect.signature(StripedHyena2Fields).parameters
    if values.get("model_type") != "striped_hyena2" or values.keys() - fields.keys() - _OTHER_KEYS:
        return None
    if values.get("dtype") not in _TYPES:
        return None
    kinds = {name: _KINDS.get(fields[name].annotation) for name in values.keys() & fields.keys()}
    if any(kind is not None and type(values[name]) not in kind for name, kind in kinds.items()):
        return None
    if any(kind == {int} and values[name] > _WIDEST for name, kind in kinds.items()):
        return None
    try:
        shape = StripedHyena2Shape(**values)
    except (ConfigError, TypeError, ValueError):
        return None
    return shape if shape.num_hidden_layers <= _MOST_LAYERS else None


def has_byte_tokens(folder: Path) -> bool:
    """Check whether the folder's tokenizer is the byte tokenizer without any option of its own."""
    if any((folder / name).exists() for name in _MORE_TOKENS):
        return False
    if not (folder / "tokenizer_config.json").exists():
        return True
    values = _read_json(folder / "tokenizer_config.json")
    added = values.pop("added_tokens_decoder", {})
    are_plain = isinstance(added, dict) and added.keys() <= {
        str(index) for index in ByteTokens.all_special_ids
    }
    kept = {key: value for key, value in values.items() if key not in _TOKENIZER_OPTIONS}
    return are_plain and not kept.pop("add_eos", False) and kept == _TOKENIZER


def read_network(folder: Path, *, dtype: torch.dtype) -> PlainStripedHyena2 | None:
    """Read configuration and weights; the weights stay on the CPU, mapped from their files if they can be."""
    shape = read_shape(folder)
    files = None if shape is None else _weight_files(folder)
    if shape is None or files is None or not has_byte_tokens(folder):
        return None
    try:
        tensors = {
            name: stored.get_tensor(name)
            for stored in (safe_open(path, framework="pt") for path in files)
            for name in stored.keys()
        }
    except (SafetensorError, OSError):
        return None
    if shape.num_hidden_layers > len(tensors) or not all(t.is_floating_point() for t in tensors.values()):
        return None
    with torch.device("meta"):
        network = PlainStripedHyena2(shape)
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if expected != {name: tensor.shape for name, tensor in tensors.items()}:
        return None
    network.load_state_dict(
        {
            name: tensor.to(torch.float32 if name.endswith(_FLOAT32_PARTS) else dtype)
            for name, tensor in tensors.items()
        },
        assign=True,
    )
    return network.eval()


def _weight_files(folder: Path) -> list[Path] | None:
    """Find the files, as transformers would choose them."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    places = _read_json(folder / "model.safetensors.index.json").get("weight_map")
    names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    is_inside = names and all(
        "/" not in name and "\\" not in name and name.endswith(".safetensors") for name in names
    )
    return [folder / name for name in names] if is_inside else None


def _read_json(path: Path) -> dict[str, Any]:
    """Read an object; an empty one where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
