"""The tables of options in ``docs/CLI.md``, made from the descriptions; the prose around them is kept.

``python -m genoembed.cli.reference docs/CLI.md`` writes them again; a test says when that is due.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from genoembed.cli import COMMANDS, main
from genoembed.cli.options import GroupedOption

if TYPE_CHECKING:
    from collections.abc import Iterator

TABLE_HEADER = "| option | key in Python | what it does |\n| --- | --- | --- |\n"
_SECTION = r"(?ms)^## {name}\n.*?(?=^## |\Z)"
_TABLE = r"(?m)^\| option \|.*\n(?:\|.*\n)+"


def with_tables(page: str) -> str:
    """Write the table of each command into its section of a page."""
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        found = re.search(_SECTION.format(name=name), page)
        if found is None:
            page += f"\n## {name}\n\n{option_table(command)}"
            continue
        section = found.group()
        old = re.search(_TABLE, section)
        new = section.rstrip("\n") + f"\n\n{option_table(command)}\n"
        if old is not None:
            new = section[: old.start()] + option_table(command) + section[old.end() :]
        page = page[: found.start()] + new + page[found.end() :]
    return page


def option_table(command: click.Command) -> str:
    """Describe the arguments and options of a command, one per line."""
    return TABLE_HEADER + "".join(f"| {' | '.join(cells)} |\n" for cells in _rows(command))


def _rows(command: click.Command) -> Iterator[tuple[str, str, str]]:
    described = getattr(command, "described", {})
    for parameter in command.params:
        key = parameter.name or ""
        if isinstance(parameter, click.Argument):
            meaning = described[key].help if key in described else "see above"
            yield f"`{parameter.make_metavar(click.Context(command))}`", f"`{key}`", _cell(meaning)
        elif isinstance(parameter, GroupedOption):
            names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
            value = "" if parameter.is_flag else f" `{parameter.make_metavar(click.Context(command))}`"
            # what only the command line has is not a keyword in Python
            yield (
                names + value.replace("|", "\\|"),
                f"`{key}`" if key in described else "",
                _cell(parameter.help),
            )


def _cell(text: str | None) -> str:
    return re.sub(r"  \[(.*)\]$", r" (\1)", text or "").replace("|", "\\|")


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
