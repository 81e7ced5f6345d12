"""Options that are configuration keys: names, defaults and choices come from ``genoembed.config.embed``."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import click

from genoembed.config.choices import DuplicatePolicy, EmptyPolicy, GapPolicy, InvalidPolicy
from genoembed.config.embed import EmbedConfig

if TYPE_CHECKING:
    from collections.abc import Callable

COUNT: dict[str, Any] = {"type": int, "metavar": "N"}
BASES: dict[str, Any] = {"type": int, "metavar": "BASES"}
SHARE: dict[str, Any] = {"type": float, "metavar": "SHARE"}
NUMBER: dict[str, Any] = {"type": float, "metavar": "X"}
NAME: dict[str, Any] = {"metavar": "NAME"}
FILES: dict[str, Any] = {"multiple": True, "metavar": "FILE"}
FLAG: dict[str, Any] = {"is_flag": True}

_POLICIES = {
    "--invalid": (InvalidPolicy, "Letters outside IUPAC DNA: stop, skip the record, or mask to N.  [error]"),
    "--duplicates": (DuplicatePolicy, "Ids that appear twice: stop, or append _2, _3 ...  [error]"),
    "--empty": (EmptyPolicy, "A record without bases: stop, or skip it.  [error]"),
    "--gaps": (GapPolicy, "Gap letters (- . *): stop, or take them out.  [error]"),
}

_STAGE_TYPES = tuple(get_type_hints(EmbedConfig).values())
_FIELDS = {field.name: field for stage in _STAGE_TYPES for field in dataclasses.fields(stage)}
_TYPES = {name: hint for stage in _STAGE_TYPES for name, hint in get_type_hints(stage).items()}

DEFAULT_GROUP = "Options"
OTHER_NAMES = {"layers": "--layer", "pooling": "--pool", "fusion": "--fuse", "output_dir": "--output"}
"""Options that are not called as their key is; all others are the key with dashes."""


def option_name(key: str) -> str:
    """Give the option that sets a configuration key.

    Example:
        >>> option_name("pooling"), option_name("skip_first")
        ('--pool', '--skip-first')
    """
    return OTHER_NAMES.get(key, f"--{key.replace('_', '-')}")


def in_command_line_words(message: str) -> str:
    """Append to a message of the library which options its configuration keys are.

    Only where the option is not the key with two dashes before it, and only where the word is a key for sure:
    ``layers`` counts in ``set layers`` and ``layers='28'``, not in ``two layers``.

    Example:
        >>> in_command_line_words("set pooling to one of mean, max")
        'set pooling to one of mean, max (pooling is --pool)'
        >>> in_command_line_words("window is 9; set window to 8")
        'window is 9; set window to 8'
    """
    keys = [
        key for key in (*_FIELDS, "output_dir") if option_name(key) != f"--{key}" and _names(message, key)
    ]
    hints = ", ".join(f"{key} is {option_name(key)}" for key in keys)
    return f"{message} ({hints})" if hints else message


def _names(message: str, key: str) -> bool:
    pattern = rf"\b{key}\b" if "_" in key else rf"\b(set|with) {key}\b|\b{key}=|\b{key} is '"
    return re.search(pattern, message) is not None


class GroupedOption(click.Option):
    """An option that says under which heading of the help it belongs."""

    def __init__(self, *declarations: Any, group: str = DEFAULT_GROUP, **attributes: Any) -> None:
        self.group = group
        super().__init__(*declarations, **attributes)


class GroupedCommand(click.Command):
    """A command whose help lists its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, heading by heading, in the order in which they were declared."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", DEFAULT_GROUP), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def file_option(
    *names: str, group: str, help: str, **attributes: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare an option that is None where it was not given, so that a configuration file can say it."""
    return click.option(*names, cls=GroupedOption, group=group, help=help, **{"default": None} | attributes)


def choice(*names: str) -> dict[str, Any]:
    """Give what an option with a few values is declared with."""
    return {"type": click.Choice(names)}


def policy_options(*names: str, group: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare what is done with records that are not clean."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            policy, help = _POLICIES[name]
            function = file_option(name, group=group, help=help, **choice(*get_args(policy)))(function)
        return function

    return decorate


def config_option(
    *declarations: str, key: str, group: str, help: str, **attributes: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare the option of one configuration key, with the key's type, choices and default."""
    default = _FIELDS[key].default
    default = None if default is dataclasses.MISSING else default
    shown = default not in (None, False, (), 0)
    settings = {"default": default, "show_default": shown, **_kind(key), **attributes}
    return click.option(
        *declarations, option_name(key), key, cls=GroupedOption, group=group, help=help, **settings
    )


def _kind(key: str) -> dict[str, Any]:
    """Read an option's kind off the type of the key."""
    hint = _TYPES[key]
    if get_origin(hint) is Literal:
        return {"type": click.Choice(get_args(hint))}
    if hint is bool:
        return {"is_flag": True}
    if get_origin(hint) is tuple:
        return {"type": get_args(hint)[0], "multiple": True}
    return {"type": next(kind for kind in (get_args(hint) or (hint,)) if kind is not type(None))}
