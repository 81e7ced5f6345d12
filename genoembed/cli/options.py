"""Commands whose options are the fields of a configuration: names, defaults, choices, help and files.

Nothing about an option is typed here: :mod:`genoembed.config` describes it once. An option that was not given
is not passed on, so that a file, a fine-tuned model or the default can have its say.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.shell_completion import CompletionItem

import genoembed
from genoembed.cli.output import reporting
from genoembed.config.fields import near_choice, raise_all, read_options, unknown_option
from genoembed.config.paths import check_paths
from genoembed.errors import ForeignCodeError, check_installed, foreign_code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from genoembed.config.fields import Config, Option
    from genoembed.errors import Spelling

_logger = logging.getLogger(__name__)

DEFAULT_GROUP, MESSAGES = "Options", "Messages and help"
SHORT_HELP_OPTIONS = 16
"""Commands with more options than this show only the basic ones in their short help."""
CONFIG_FILE_OPTIONS = 10
"""Commands with more options than this read them from a file, too."""
SPELLING = "genoembed.cli.options.spelling"
"""Where the context keeps how the running command spells a key."""
NOT_GIVEN = (None, ())
IMPORTED = "imported"
"""Modules to import; in Python, that is an import statement before the call."""


class PlainChoice(click.Choice[str]):
    """One of few values; a misspelled one is answered with the nearest."""

    def fail(
        self, message: str, param: click.Parameter | None = None, ctx: click.Context | None = None
    ) -> NoReturn:
        """Add the nearest value: click begins its message with the value that it rejects."""
        value = message.partition("' is not one of ")[0].removeprefix("'")
        super().fail(f"{message.removesuffix('.')}{near_choice(value, self.choices)}", param, ctx)


class GroupedOption(click.Option):
    """An option that knows its heading in the help, and whether the short help shows it."""

    def __init__(
        self, *declarations: Any, group: str = DEFAULT_GROUP, basic: bool = True, **attributes: Any
    ) -> None:
        self.group, self.basic = group, basic
        super().__init__(*declarations, **attributes)


class ConfigCommand(click.Command):
    """A command made from configurations, with a short help and a full one."""

    def __init__(
        self,
        *arguments: Any,
        described: Mapping[str, Option],
        config: type[Config] | None,
        reads: Sequence[str] = (),
        packages: Sequence[str] = (),
        checks_options: bool = True,
        **settings: Any,
    ) -> None:
        self.described, self.config, self.reads, self.packages = described, config, reads, packages
        self.checks_options = checks_options
        super().__init__(*arguments, **settings)

    def option_of(self, key: str) -> str:
        """Spell a key as this command's option; keys that are none of its options stay as they are."""
        for parameter in self.params:
            if parameter.name == key and isinstance(parameter, click.Option):
                return max(parameter.opts, key=len)
        return key

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; an unknown option is answered as everywhere else."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            names = {name.lstrip("-").replace("-", "_"): name for item in self.params for name in item.opts}
            message = unknown_option(
                error.option_name,
                {**self.described, **names},
                spelling=lambda key: names.get(key) or self.option_of(key),
            )
            if message.endswith("is not an option"):
                raise
            raise click.UsageError(message, ctx=ctx) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Merge the options of the command line and the file, and call the command's function with them."""
        ctx.meta[SPELLING] = self.option_of
        given = {key: value for key, value in ctx.params.items() if value not in NOT_GIVEN}
        if (path := given.pop("config_file", None)) is not None and self.config is not None:
            problems: list[str] = []
            given = read_options(path, self.config, problems) | given
            raise_all(problems)
        for parameter in self.params:
            described = self.described.get(parameter.name or "")
            needed = described is not None and described.required and described.shown_default is None
            if needed and parameter.name not in given:
                raise click.MissingParameter(ctx=ctx, param=parameter)
        modules = given.pop(IMPORTED, ())
        for package in self.packages:
            check_installed(package, extra=self.name or "", purpose=self.name or "")
        self._check_paths(given)
        self._check_options(given)
        if "model" in given:
            genoembed.check_model_name(given["model"])
        for module in modules:
            _import_module(module)
        ctx.params = given
        return super().invoke(ctx)

    def _check_options(self, given: Mapping[str, Any]) -> None:
        """Check values and what goes together before anything is loaded; the public call checks them, too."""
        if self.config is not None and self.checks_options:
            self.config.build({key: value for key, value in given.items() if key in self.config.options()})

    def _check_paths(self, given: Mapping[str, Any]) -> None:
        """Check what is read and written before anything is loaded; the public call checks it, too."""

        def named(keys: Iterable[str]) -> list[str]:
            values = [given[key] for key in keys if key in given]
            return [
                name for value in values for name in (value if isinstance(value, tuple | list) else (value,))
            ]

        options = self.described.values()
        check_paths(
            named([*self.reads, *(option.key for option in options if option.reads is True)]),
            [(name, option.writes) for option in options if option.writes for name in named([option.key])],
            may_read=named(option.key for option in options if option.reads == "if there"),
            places=named(option.key for option in options if option.reads == "or a place"),
            overwrite=given.get("overwrite", False),
        )

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write usage, purpose and examples, and then the options: the first screen shows how to begin."""
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        self.format_epilog(ctx, formatter)
        self.format_options(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the basic options, or all of them, heading by heading."""
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        shows_all = ctx.meta.get("shows_all") or len(options) <= SHORT_HELP_OPTIONS
        shown = [option for option in options if shows_all or getattr(option, "basic", True)]
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in shown:
            record = option.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(option, "group", MESSAGES), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)
        if len(shown) < len(options):
            formatter.write_paragraph()
            formatter.write_text(f"These are the most used options; --help-all shows all {len(options)}.")


def command(
    name: str,
    config: type[Config] | None = None,
    *,
    short_help: str,
    examples: str,
    keys: Sequence[str] | None = None,
    reads: Sequence[str] = (),
    packages: Sequence[str] = (),
    has_json: bool = False,
    checks_options: bool = True,
) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a command whose options are the fields of a configuration.

    Args:
        name: Of the command.
        config: Describes the options; other arguments are declared with ``click.argument``.
        short_help: What the list of commands says of it.
        examples: One or several lines.
        keys: The options that it has; None is all.
        reads: Arguments, declared with ``click.argument``, that name files to read.
        packages: What it imports of the extra that is called as it is.
        has_json: Whether it has ``--json``, passed as ``as_json``.
        checks_options: Whether the options make a whole configuration; others are checked by what is called.
    """
    described = {} if config is None else config.options()
    if keys is not None:
        described = {key: described[key] for key in keys}

    def decorate(function: Callable[..., Any]) -> click.Command:
        params = [*getattr(function, "__click_params__", ())][::-1]
        params += [_argument(option) for option in described.values() if option.argument]
        params += [
            _option(option) for option in described.values() if not (option.argument or option.in_files_only)
        ]
        if "trust_remote_code" in described:  # it loads models
            params.append(_import_option(group=described["trust_remote_code"].group))
        params += _shared_options(with_file=len(described) > CONFIG_FILE_OPTIONS, with_json=has_json)
        return ConfigCommand(
            name,
            callback=_reported(function, has_json=has_json, loads_models="trust_remote_code" in described),
            params=params,
            help=function.__doc__,
            short_help=short_help,
            epilog=f"\b\nExamples:\n{_indented(examples)}",
            described=described,
            config=config,
            reads=reads,
            packages=packages,
            checks_options=checks_options,
        )

    return decorate


def _indented(examples: str) -> str:
    return "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())


def _argument(described: Option) -> click.Argument:
    metavar = f"{described.metavar}..." if described.several else described.metavar
    nargs = -1 if described.several else 1
    settings: dict[str, Any] = {"shell_complete": _complete_model} if described.key == "model" else {}
    return click.Argument([described.key], metavar=metavar, required=False, nargs=nargs, **settings)


def _complete_model(
    _ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the names of models; files and folders where no name begins so."""
    named = [CompletionItem(name) for name in genoembed.model_names() if name.startswith(incomplete)]
    return named or [CompletionItem(incomplete, type="file")]


def _option(described: Option) -> click.Option:
    """Declare an option as its description says; without a default, so that what is not given stays open."""
    names = [described.name] if described.short is None else [described.short, described.name]
    settings: dict[str, Any] = {"type": described.kind, "metavar": described.metavar}
    if described.choices:
        settings = {"type": PlainChoice(described.choices)}
    elif described.kind is bool:
        settings = {"is_flag": True}
        if described.default is True or described.optional:
            names[-1] = f"{described.name}/--no-{described.name.removeprefix('--')}"
    if described.several:
        settings["multiple"] = True
    if described.key == "model":
        settings["shell_complete"] = _complete_model
    if described.several and described.kind is float:
        settings |= {"type": str, "callback": _numbers}
    return GroupedOption(
        [*names, described.key],
        group=described.group,
        basic=described.basic,
        default=None,
        help=f"{described.help}{default_note(described)}",
        **settings,
    )


def default_note(described: Option) -> str:
    """Return the text of the default, if it is worth showing."""
    default = described.default
    shown = described.shown_default or (
        ", ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in default)
        if isinstance(default, tuple)
        else "on"
        if default is True
        else f"{default:g}"
        if isinstance(default, float)
        else str(default)
    )
    if described.required and described.shown_default is None:
        return "  [required]"
    is_off = described.shown_default is None and default in (None, False, ())
    return "" if is_off and not (default == 0 and default is not False) else f"  [default: {shown}]"


def _numbers(ctx: click.Context, option: click.Parameter, texts: tuple[str, ...] | None) -> tuple[float, ...]:
    """Read numbers that are given one by one, or with commas between them."""
    try:
        return tuple(float(part) for text in texts or () for part in text.split(","))
    except ValueError as error:
        message = f"{', '.join(texts or ())!r} is not a list of numbers such as 0.2,0.8"
        raise click.BadParameter(message, ctx=ctx, param=option) from error


def _shared_options(*, with_file: bool, with_json: bool) -> Iterator[click.Option]:
    """Declare what has one meaning at every command."""
    make = functools.partial(GroupedOption, group=MESSAGES, basic=False, is_flag=True, default=None)
    if with_file:
        yield GroupedOption(
            ["--config", "config_file"],
            group=MESSAGES,
            metavar="FILE",
            help="Read options from a TOML, JSON or YAML file. Options on the command line override them.",
        )
    if with_json:
        yield make(["--json", "as_json"], help="Print the result as one JSON object.")
    yield make(["-q", "--quiet"], help="Print only warnings and errors to standard error.")
    yield make(["-v", "--verbose"], help="Print debug messages and the warnings of other libraries, too.")
    yield GroupedOption(
        ["--help-all"],
        group=MESSAGES,
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_show_full_help,
        help="Show all options and exit.",
    )


def _import_option(*, group: str) -> click.Option:
    return GroupedOption(
        ["--import", IMPORTED],
        group=group,
        basic=False,
        multiple=True,
        default=None,
        metavar="MODULE",
        help="Import an installed package first that registers its own kind of model with transformers. "
        "Repeatable.",
    )


def _import_module(name: str) -> None:
    """Import what the user names; its own failure is told from its absence."""
    problem = f"--import {name}"
    if not all(part.isidentifier() for part in name.split(".")):
        message = f"{problem}: expected the name of an installed package, such as my_models"
        raise click.UsageError(message)
    try:
        with foreign_code(problem):
            importlib.import_module(name)
    except ForeignCodeError as error:
        missing = getattr(error.__cause__, "name", None)
        if isinstance(error.__cause__, ModuleNotFoundError):
            message = f"{problem}: it needs {missing}, which is not installed here; install it"
            raise click.UsageError(message) from error
        raise
    except ModuleNotFoundError as error:
        message = f"{problem}: no package {error.name} is installed here; install it, or check the name"
        raise click.UsageError(message) from error


def _show_full_help(ctx: click.Context, _option: click.Parameter, is_given: bool) -> None:
    if is_given and not ctx.resilient_parsing:
        ctx.meta["shows_all"] = True
        click.echo(ctx.get_help())
        ctx.exit()


def check_json_has_room(options: Mapping[str, Any], *, as_json: bool) -> None:
    """Raise if a table and a JSON object would both go to standard output."""
    if as_json and options.get("output", "-") == "-":
        message = "--json prints a summary on standard output, where the table goes, too; add --output FILE"
        raise click.UsageError(message)


def _reported(
    function: Callable[..., Any], *, has_json: bool, loads_models: bool = False
) -> Callable[..., Any]:
    """Run a command's function under what ``--quiet`` and ``--verbose`` say."""

    @functools.wraps(function)
    def reported(*, quiet: bool = False, verbose: bool = False, **options: Any) -> Any:
        if has_json:
            options.setdefault("as_json", False)
        with reporting(quiet=quiet, verbose=verbose):
            if loads_models and "torch" not in sys.modules:  # seconds in which nothing else would be said
                _logger.info("options checked; loading PyTorch and the model")
            return function(**options)

    return reported


def in_command_line_words(message: str, command: click.Command, spelling: Spelling) -> str:
    """Spell the keys of a message as options, where it spells them for Python; what is quoted stays.

    Example:
        >>> from genoembed.cli.extract import extract_command as extract
        >>> in_command_line_words("set duplicates='suffix', or overwrite=True", extract, extract.option_of)
        'set --duplicates suffix, or --overwrite'
        >>> in_command_line_words("flank is 3, but window is 2; leave flank out", extract, extract.option_of)
        '--flank is 3, but --window is 2; leave --flank out'
    """
    keys = [parameter.name or "" for parameter in command.params if isinstance(parameter, click.Option)]
    for key in sorted(keys, key=len, reverse=True):
        option = spelling(key)
        message = re.sub(rf"\bset {key}(=| to )[Tt]rue\b", f"add {option}", message)
        message = re.sub(rf"\b{key}=True\b", option, message)
        message = re.sub(rf"\b{key}='([^' ]+)'", rf"{option} \1", message)
        # a word that is a key, too, is one where it is set; names with _ are no words of the language
        places = (
            rf"(?<=\bset ){key}\b|(?<=\bwith ){key}\b|(?<=\bcheck ){key}\b|(?<=\bleave ){key}(?= out\b)"
            rf"|(?<=\bor ){key}(?= to )|\b{key}(?= is ')|(?:^|(?<=[:;] )|(?<=, but )){key}(?= is )"
        )
        if "_" in key:
            places += rf"|(?<![\w'\"./-]){key}(?![\w'\"./=-])"
        message = re.sub(places, option, message)
    return message
