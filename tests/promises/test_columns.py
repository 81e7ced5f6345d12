"""Every command has a column in the matrix."""

from __future__ import annotations

import click
import pytest

from genoembed.cli import main
from tests.promises.columns import ALL, COLUMNS, PROMISES, having


def commands() -> list[str]:
    return main.list_commands(click.Context(main))


def test_every_command_has_a_column():
    assert sorted(COLUMNS) == sorted(commands()), (
        "declare how a new command is run in tests/promises/columns.py"
    )


@pytest.mark.parametrize("command", COLUMNS)
def test_column_runs_as_declared(command, warm, world):
    column = COLUMNS[command]
    ran = warm.run(*column.call(command), cwd=world)
    assert ran.code == 0, ran.err
    assert column.output is None or (world / column.output[1]).exists()


@pytest.mark.parametrize("command", COLUMNS)
def test_column_declares_what_click_knows(command):
    context = click.Context(main)
    parameters = main.get_command(context, command).params
    names = {option for parameter in parameters for option in parameter.opts}
    column = COLUMNS[command]
    assert "--json" in names
    assert ("--overwrite" in names) == (column.has_overwrite and column.output is not None)
    assert ("--resume" in names) == ("--resume" in column.resume) or command == "extract"


def test_every_cell_is_run_or_says_why_not(request):
    run = set()
    for item in request.session.items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("name")
        run |= {(mark.args[0], name) for mark in item.iter_markers("promise")}
    if {promise for promise, _ in run} != set(PROMISES):
        pytest.skip("only a part of the matrix was collected")
    cells = {(promise, name) for promise in PROMISES for name in having(promise)}
    assert not sorted(cells - run)
    reasons = [row.why_not(*column) for row in PROMISES.values() for column in ALL.items()]
    assert len(reasons) == len(PROMISES) * len(ALL) == len(cells) + sum(map(bool, reasons))
