"""Configurations of several stages, given as flat keys: by Python, by a file, or by the command line.

In: values by key, and a TOML or JSON file for what they leave out. Out: one dataclass a stage. Promised: an
unknown key is an error that names the nearest one, and all problems come in one message.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from genoembed.errors import ConfigError, InputFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from os import PathLike


class FlatKeys:
    """The keys of some stages, and how configurations are made of them."""

    def __init__(
        self, purpose: str, *, plain: Callable[[str, object], object] | None = None, **stages: type[Any]
    ) -> None:
        self._purpose, self._plain, self._stages = purpose, plain, stages
        self.stage_of = {item.name: stage for stage, cls in stages.items() for item in fields(cls)}
        """The stage that each flat key belongs to."""
        hints = {name: hint for cls in stages.values() for name, hint in get_type_hints(cls).items()}
        self._tuples = {name for name, hint in hints.items() if get_origin(hint) is tuple}

    def read(
        self, options: Mapping[str, object], *, file: str | PathLike[str] | None
    ) -> tuple[dict[str, object], list[str]]:
        """Join options and a file."""
        in_file = {} if file is None else read_config_file(Path(file))
        problems = [f"{file}: {self._unknown(key)}" for key in in_file if key not in self.stage_of]
        problems += [self._unknown(key) for key in options if key not in self.stage_of]
        given = {key: value for key, value in options.items() if value is not None}
        joined = (in_file | given).items()
        return {key: self._fitted(key, value) for key, value in joined if key in self.stage_of}, problems

    def build(
        self,
        values: Mapping[str, object],
        problems: list[str],
        *,
        needed: Mapping[str, Mapping[str, object]],
    ) -> dict[str, Any]:
        """Build every stage."""
        parts, found = {}, list(problems)
        for stage, cls in self._stages.items():
            of_stage = {key: value for key, value in values.items() if self.stage_of[key] == stage}
            try:
                parts[stage] = cls(**{**needed.get(stage, {}), **of_stage})
            except ConfigError as error:
                found += error.problems
        raise_all(found)
        return parts

    def _fitted(self, key: str, value: object) -> object:
        value = value if self._plain is None else self._plain(key, value)
        return tuple(value) if key in self._tuples and isinstance(value, list | tuple) else value

    def _unknown(self, key: str) -> str:
        near = difflib.get_close_matches(key, self.stage_of, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(sorted(self.stage_of))}"
        return f"{key!r} is no option of {self._purpose}; {remedy}"


def read_config_file(path: Path) -> dict[str, object]:
    """Read flat keys and values."""
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"cannot be read ({error.strerror}); name a TOML or JSON file"
        raise InputFileError(message, path=str(path)) from error
    try:
        text = content.decode()
        values = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
        message = f"{path}: not {kind} ({error}); mend the file"
        raise ConfigError(message) from error
    if not isinstance(values, dict):
        message = f"{path}: {type(values).__name__}, expected keys and values; write an object"
        raise ConfigError(message)
    return values


def differences(found: Mapping[str, object], expected: Mapping[str, object], *, where: str) -> list[str]:
    """Say where a stored run is not the one that is asked for.

    Example:
        >>> differences({"data": {"window": 32}}, {"data": {"window": 64}}, where="run")
        ['window: 64, but 32 in run; set window to 32, or overwrite to start again']
    """
    old, new = dict(_leaves(found)), dict(_leaves(expected))
    return [
        f"{key}: {new.get(key)!r}, but {old.get(key)!r} in {where}; "
        f"set {key} to {old.get(key)!r}, or overwrite to start again"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _leaves(values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict) and key != "shape":
            yield from _leaves(value)
        else:
            yield key, list(value) if isinstance(value, tuple) else value


def raise_all(problems: Iterable[str]) -> None:
    """Raise all problems as one error."""
    found = tuple(problems)
    if found:
        raise ConfigError(*found)
