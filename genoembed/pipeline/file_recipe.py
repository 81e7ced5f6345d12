"""What made the vectors of a file, as far as vectors of two files must agree in it to be compared.

In: the provenance of a file. Out: a :data:`Recipe`, and the differences between two. Windows, batch sizes,
inputs and number types are not part of it: a short query may be compared with windows of a genome.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from genoembed.errors import ConfigError

Recipe: TypeAlias = "Mapping[str, Any]"
"""What was recorded, by name; what was not recorded is not in it."""

_EMBEDDING = ("pooling", "skip_first", "fusion", "fusion_weights", "rc")


def recipe_of(provenance: Mapping[str, Any], layer: str) -> dict[str, Any]:
    """Collect what vectors must have in common.

    Example:
        >>> made = {"model": {"weights_sha256": "ab"}, "config": {"embedding": {"rc": "none"}}}
        >>> recipe_of(made, "blocks.1")
        {'layer': 'blocks.1', 'model': 'ab', 'rc': 'none'}
    """
    model, config = _part(provenance, "model"), _part(provenance, "config")
    embedding = _part(config, "embedding")
    recipe: dict[str, Any] = {"layer": layer}
    digest = model.get("weights_sha256") or model.get("id")
    if digest:
        recipe["model"] = digest
    recipe |= {name: embedding[name] for name in _EMBEDDING if name in embedding}
    if embedding.get("fusion", "none") != "none" and "layers" in provenance:
        recipe["layers"] = list(provenance["layers"])
    if "keep_case" in _part(config, "input"):
        recipe["keep_case"] = config["input"]["keep_case"]
    trained = _part(provenance, "finetuned")
    recipe |= {name: trained[name] for name in ("normalise", "pooler") if name in trained}
    return recipe


def differences(first: Recipe, second: Recipe) -> list[str]:
    """Say in what two recipes differ.

    Example:
        >>> differences({"pooling": "mean", "rc": "none"}, {"pooling": "max", "rc": "none"})
        ["pooling: 'mean' against 'max'"]
    """
    names = [*first, *(name for name in second if name not in first)]
    return [
        f"{name}: {_said(first, name)} against {_said(second, name)}"
        for name in names
        if _plain(first.get(name)) != _plain(second.get(name)) or (name in first) != (name in second)
    ]


def check_comparable(first: Recipe, second: Recipe, *, names: tuple[str, str]) -> None:
    """Refuse vectors that were not made in the same way."""
    found = differences(first, second)
    if found:
        message = (
            f"{names[0]} and {names[1]} hold vectors of another kind ({'; '.join(found)}), expected the same "
            "model, layer, pooling, fusion and rc; embed one of them again with the other's options"
        )
        raise ConfigError(message)


def _part(mapping: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = mapping.get(name)
    return part if isinstance(part, Mapping) else {}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _said(recipe: Recipe, name: str) -> str:
    return repr(_plain(recipe[name])) if name in recipe else "nothing recorded"
