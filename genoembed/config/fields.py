"""How options are described, checked and read: each one once, as a field of a frozen pydantic model.

In: fields declared with :func:`option`, and values by key from Python, the command line or a file. Out:
frozen configurations. Promised: wrong values, unknown keys and options that do not apply come in one
:class:`ConfigError` with all problems, in the same words wherever they were typed.
"""

from __future__ import annotations

import difflib
import functools
import json
import tomllib
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from genoembed.errors import ConfigError, InputFileError, Problem, Remedy, python_spelling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from pydantic.fields import FieldInfo

    from genoembed.config.paths import FileKind
    from genoembed.errors import Spelling

T = TypeVar("T", bound="Config")
Function = TypeVar("Function", bound="Callable[..., Any]")

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
_BOUNDS = ("ge", "gt", "le", "lt")


def option(  # noqa: PLR0913 - all that is known about an option
    default: Any = ...,
    *,
    help: str,
    group: str = "Options",
    unit: str = "",
    metavar: str | None = None,
    flag: str | None = None,
    short: str | None = None,
    basic: bool = False,
    argument: bool = False,
    in_files_only: bool = False,
    shown_default: str | None = None,
    reads: bool | Literal["if there", "or a place"] = False,
    writes: FileKind | None = None,
    **bounds: float,
) -> Any:
    """Describe an option: everything that is known about it, in one place.

    Args:
        default: Value where none is given; none makes the option required.
        help: One or two plain sentences.
        group: Heading of the help.
        unit: Of numbers, as messages say it, such as ``bases``.
        metavar: What stands for the value in the help; None goes by the type.
        flag: Option of the command line, where it is not the key with dashes.
        short: Option of one letter.
        basic: Show it in the short help.
        argument: Given by position on the command line.
        in_files_only: Has no place on the command line.
        shown_default: What the help says of a default that depends on other things.
        reads: It names files that are read; ``if there`` where it may name other things.
        writes: It names a file to write, of this kind.
        **bounds: ``ge``, ``gt``, ``le``, ``lt``, as pydantic takes them.

    Returns:
        The field.
    """
    facts = {
        "group": group,
        "unit": unit,
        "metavar": metavar,
        "flag": flag,
        "short": short,
        "basic": basic,
        "argument": argument,
        "in_files_only": in_files_only,
        "shown_default": shown_default,
        "reads": reads,
        "writes": writes,
    }
    field: Any = Field  # its overloads know no mapping of bounds
    return field(default, description=help, json_schema_extra={"option": facts}, **bounds)


def same_option(config: type[Config], key: str, *default: object, **changes: object) -> Any:
    """Describe an option as another configuration does, but for its default and what else is given.

    Example:
        >>> class Read(Config):
        ...     threads: int = option(4, ge=1, metavar="N", help="CPU threads.")
        >>> class Write(Config):
        ...     threads: int | None = same_option(Read, "threads", None, shown_default="all")
        >>> found = Write.options()["threads"]
        >>> found.default, found.help, found.metavar, dict(found.bounds)
        (None, 'CPU threads.', 'N', {'ge': 1})
    """
    field = config.model_fields[key]
    extra: Any = field.json_schema_extra
    facts = extra["option"] | _bounds(field) | {"help": field.description} | changes
    return option(*(default or (... if field.is_required() else field.default,)), **facts)


def _bounds(field: FieldInfo) -> dict[str, float]:
    return {
        name: found
        for name in _BOUNDS
        for item in field.metadata
        if (found := getattr(item, name, None)) is not None
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One option as the help, the command line and messages need it."""

    key: str
    kind: Any
    """``str``, ``int``, ``float``, ``bool``, ``dict`` or a ``Literal``; of each item where there are
    several."""
    several: bool
    optional: bool
    """None is a value of its own: the default depends on other things."""
    default: Any
    required: bool
    help: str
    bounds: Mapping[str, float]
    group: str
    unit: str
    metavar: str | None
    flag: str | None
    short: str | None
    basic: bool
    argument: bool
    in_files_only: bool
    shown_default: str | None
    reads: bool | Literal["if there", "or a place"]
    writes: FileKind | None

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it takes, where they are few."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def name(self) -> str:
        """Its name on the command line.

        Example:
            >>> from genoembed.config.embed import EmbedConfig
            >>> [EmbedConfig.options()[key].name for key in ("pooling", "skip_first")]
            ['--pool', '--skip-first']
        """
        return self.flag or f"--{self.key.replace('_', '-')}"

    @property
    def expected(self) -> str:
        """What it takes, in words."""
        words = f"one of {', '.join(self.choices)}" if self.choices else self._range or self._kind
        if self.several:
            words = f"one or several, each {words}"
        return f"{words}, or leave it out" if self.optional else words

    @property
    def _kind(self) -> str:
        return "a table of names and values" if get_origin(self.kind) is dict else _KINDS[self.kind]

    @property
    def _range(self) -> str:
        least, above, most, below = (self.bounds.get(name) for name in _BOUNDS)
        unit = f" {self.unit}" if self.unit else ""
        if least is not None and most is None and below is None:
            return f"{least} or more{unit}"
        start = f"from {least}" if least is not None else "" if above is None else f"above {above}"
        end = f"at most {most}" if above is not None else f"to {most}"
        end = end if most is not None else ""
        if below is not None:
            end = f"below {below}" if above is not None else f"to below {below}"
        joint = ", " if above is not None and end else " "
        return f"{start}{joint}{end}".strip() + unit if start or end else ""

    def problem(self, value: object, *, is_bound: bool) -> Problem:
        """Describe a wrong value, and which values are allowed."""
        if is_bound and not self.several:
            words = self._range or "a finite number"
        elif self.choices or self.several:
            words = self.expected
        else:
            words = "a text that is not empty" if value == "" else self._kind
            words += ", or leave it out" if self.optional else ""
        return Problem(
            f"{self.key} is {value!r}", Remedy(self.key, words=words), near_choice(value, self.choices)
        )


def near_choice(value: object, choices: Iterable[str]) -> str:
    """Return the question whether a choice of nearly the same letters was meant, or nothing.

    Example:
        >>> near_choice("centre", ("center", "whiten")), near_choice(3, ("center",))
        ("; did you mean 'center'?", '')
    """
    if not isinstance(value, str):
        return ""
    # of one first letter: float16 is no misspelled bfloat16
    near = difflib.get_close_matches(value, [choice for choice in choices if choice[:1] == value[:1]], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class Config(BaseModel):
    """Options of one stage, or several such stages; checked when made, and frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        str_min_length=1,
        allow_inf_nan=False,
        defer_build=True,
        protected_namespaces=(),
    )

    def __init__(self, **values: Any) -> None:
        known = type(self).own_options()
        plain = {key: _plain(known[key], value) if key in known else value for key, value in values.items()}
        try:
            super().__init__(**plain)
        except ValidationError as error:
            raise ConfigError(*_in_our_words(error, known, plain)) from None
        raise_all(self._problems())

    def _problems(self) -> Iterable[str]:
        """Return what is wrong with the combination of options; each of them is valid by itself."""
        return ()

    @classmethod
    @functools.cache
    def sections(cls) -> dict[str, type[Config]]:
        """Return the stages that are configurations of their own."""
        return {
            name: field.annotation
            for name, field in cls.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, Config)
        }

    @classmethod
    @functools.cache
    def own_options(cls) -> dict[str, Option]:
        """Describe the options that are not of a section."""
        return {
            name: _described(name, field)
            for name, field in cls.model_fields.items()
            if name not in cls.sections()
        }

    @classmethod
    @functools.cache
    def options(cls) -> dict[str, Option]:
        """Describe all options, those of sections included, by their flat keys."""
        nested = [section.options() for section in cls.sections().values()]
        return {key: found for part in (*nested, cls.own_options()) for key, found in part.items()}

    @classmethod
    def build(cls: type[T], values: Mapping[str, object], *, file: str | PathLike[str] | None = None) -> T:
        """Make a configuration of flat keys, and of a file for what they leave out; None is the default."""
        problems: list[str] = []
        in_file = {} if file is None else read_options(file, cls, problems)
        given = in_file | {key: value for key, value in values.items() if value is not None}
        known = cls.options()
        problems += [unknown_option(key, known) for key in given if key not in known]
        made = cls._made({key: value for key, value in given.items() if key in known}, problems)
        raise_all(problems)
        assert made is not None
        return made

    @classmethod
    def _made(cls: type[T], values: Mapping[str, object], problems: list[str]) -> T | None:
        """Make it, or note what is wrong."""
        before = len(problems)
        parts: dict[str, Any] = {
            name: section._made({k: v for k, v in values.items() if k in section.options()}, problems)
            for name, section in cls.sections().items()
        }
        own = {key: value for key, value in values.items() if key in cls.own_options()}
        if any(part is None for part in parts.values()):
            return None
        try:
            return cls(**parts, **own)
        except ConfigError as error:
            problems += error.problems
        assert len(problems) > before
        return None

    def changed(self: T, **values: Any) -> T:
        """Make a copy with other values, checked like the first."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | values)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values, one dict per section."""
        return self.model_dump()

    def to_flat(self) -> dict[str, object]:
        """Return the configuration as a file holds it: flat keys, without those that are None."""
        flat: dict[str, object] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            flat |= value.to_flat() if isinstance(value, Config) else {} if value is None else {name: value}
        return flat


def _described(key: str, field: FieldInfo) -> Option:
    extra: Any = field.json_schema_extra
    facts: dict[str, Any] = extra["option"]
    kind: Any = field.annotation
    optional = several = False
    if get_origin(kind) in (UnionType, Union):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
        optional = True
    if get_origin(kind) is tuple:
        kind, several = get_args(kind)[0], True
    default = None if field.is_required() else field.default
    return Option(
        key=key,
        kind=kind,
        several=several,
        optional=optional,
        default=default,
        required=field.is_required(),
        help=field.description or "",
        bounds=_bounds(field),
        **facts,
    )


def _plain(described: Option, value: object) -> object:
    """Take paths, arrays and single items for what they stand for."""
    if described.several:
        items = value if isinstance(value, list | tuple) or hasattr(value, "tolist") else (value,)
        return tuple(_plain_item(described, item) for item in items)  # type: ignore[attr-defined]
    return _plain_item(described, value)


def _plain_item(described: Option, value: object) -> object:
    if hasattr(value, "dtype") and hasattr(value, "item"):
        value = value.item()  # a number of NumPy's
    if described.kind is str and isinstance(value, PathLike):
        return fspath(value)
    # block numbers: layers=28 and layers=[2, "final"] are what people type
    is_number = described.key.endswith("layers") and isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number and described.kind is str else value


def _in_our_words(
    error: ValidationError, known: Mapping[str, Option], given: Mapping[str, object]
) -> list[str]:
    """Turn what pydantic found into one sentence for each option, in the order of the fields."""
    problems: dict[str, str] = {}
    for found in error.errors(include_url=False):
        key = str(found["loc"][0])
        if found["type"] == "extra_forbidden":
            problems[key] = unknown_option(key, known)
        elif found["type"] == "missing":
            problems[key] = missing_option(known[key])
        else:
            is_bound = found["type"].startswith(("greater", "less")) or found["type"] == "finite_number"
            problems.setdefault(key, known[key].problem(given[key], is_bound=is_bound))
    return list(problems.values())


def missing_option(described: Option) -> Problem:
    """Return the message for a required option that is missing."""
    remedy = Remedy(described.key, words=described.expected)
    return Problem(f"{described.key} is missing", remedy)


_OF_TRAINING = "accumulation_steps"
"""A command with this option trains."""


def unknown_option(key: str, known: Iterable[str], *, spelling: Spelling = python_spelling) -> str:
    """Return the message for an unknown option, with the nearest name.

    Example:
        >>> unknown_option("windw", ["window", "stride"])
        "'windw' is not an option; did you mean 'window'?"
        >>> unknown_option("num_train_epochs", ["max_epochs", "max_steps"])
        "'num_train_epochs' is not an option; here that is 'max_epochs'"
    """
    from genoembed.config.foreign import NOT_OPTIONS, known_elsewhere

    names = tuple(known)
    plain = key.lstrip("-").replace("-", "_")
    answer = known_elsewhere(plain, names)
    if answer is not None and answer.source != "genoembed":
        value = f" {answer.value}" if answer.value else ""
        return f"{key!r} is not an option; here that is {spelling(answer.key) + value!r}"
    if plain in NOT_OPTIONS and _OF_TRAINING in names:
        return f"{key!r} is not an option; {NOT_OPTIONS[plain]}"
    near = [answer.key] if answer is not None else difflib.get_close_matches(plain, names, n=1)
    if not near:
        return f"{key!r} is not an option"
    name = spelling(near[0])
    if answer is not None and answer.value == "False":  # the old name meant the opposite
        name = f"--no-{name.removeprefix('--')}" if name.startswith("--") else f"{name}=False"
    return f"{key!r} is not an option; did you mean {name!r}?"


def named_options(config: type[Config] | None = None) -> Callable[[Function], Function]:
    """Make a public call report an unknown keyword as every other entry does, instead of with a TypeError."""
    import inspect

    def decorate(function: Function) -> Function:
        taken = inspect.signature(function).parameters
        known = {*taken} | ({*config.options()} if config else set())

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            raise_all(unknown_option(key, known - {"options"}) for key in options if key not in known)
            return function(*args, **options)

        return call  # type: ignore[return-value]

    return decorate


def read_options(path: str | PathLike[str], config: type[Config], problems: list[str]) -> dict[str, object]:
    """Read options from a TOML, JSON or YAML file: flat keys, or sections named like those of the config."""
    values: dict[str, object] = {}
    known = config.options()
    for key, value in read_config_file(Path(path)).items():
        section = config.sections().get(key)
        if section is not None and isinstance(value, dict):
            stray = [inner for inner in value if inner not in section.options()]
            problems += [f"{fspath(path)}: {_stray(inner, key, config)}" for inner in stray]
            values |= {inner: item for inner, item in value.items() if inner not in stray}
        elif section is not None and key not in known:
            found = f"{key!r} is a section, expected keys and values in it, found {value!r}"
            problems.append(f"{fspath(path)}: {found}")
        elif key not in known:
            problems.append(f"{fspath(path)}: {unknown_option(key, known)}")
        else:
            values[key] = value
    return values


def _stray(key: str, section: str, config: type[Config]) -> str:
    """Return the message for a key in a section that is not its own, or that is none at all."""
    own = next((name for name, found in config.sections().items() if key in found.options()), None)
    if own is not None:
        return f"{key!r} is not an option of {section!r}; move it to {own!r}"
    return unknown_option(key, config.options())


def read_config_file(path: Path) -> dict[str, object]:
    """Read keys and values; the ending says which of the three formats it is."""
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"cannot be read ({error.strerror}); name a TOML, JSON or YAML file"
        raise InputFileError(message, path=str(path)) from error
    ending = path.suffix.lower()
    kind = {".json": "JSON", ".yaml": "YAML", ".yml": "YAML"}.get(ending, "TOML")
    try:
        text = content.decode()
        readers: dict[str, Callable[[str], Any]] = {
            "JSON": json.loads,
            "YAML": yaml.safe_load,
            "TOML": tomllib.loads,
        }
        values = readers[kind](text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        message = f"{path}: not {kind} ({' '.join(str(error).split())}); fix the file"
        raise ConfigError(message) from error
    if not isinstance(values, dict):
        message = f"{path}: {type(values).__name__}, expected keys and values; write an object"
        raise ConfigError(message)
    return values


def differences(found: Mapping[str, object], expected: Mapping[str, object], *, where: str) -> list[str]:
    """Return where a stored run differs from the requested one.

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
