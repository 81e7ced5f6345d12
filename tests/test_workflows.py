"""Workflow files and recipes name commands, options and requirements that there are."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
import yaml

from genoembed import __version__
from genoembed.cli import main

ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / "examples" / "workflows"
PACKAGING = ROOT / "examples" / "packaging"


def shell_lines(path: Path) -> list[str]:
    """Return the genoembed calls of a workflow file, with something in each placeholder."""
    text = re.sub(r'"\s*\n\s*"', "", path.read_text())  # strings that go on in the next line
    lines = re.findall(r"genoembed (?:extract|merge) [^\n]*", text)
    lines = [re.sub(r"\$?\{[^}]*\}", "1", line.partition('"')[0].partition(">")[0]) for line in lines]
    return [line for line in lines if not line.startswith("#")]


@pytest.mark.parametrize(
    ("path", "number"),
    [(WORKFLOWS / "Snakefile", 2), (WORKFLOWS / "nextflow" / "genoembed" / "extract" / "main.nf", 1)],
    ids=lambda value: getattr(value, "name", value),
)
def test_workflow_calls_commands_as_they_are(path, number):
    lines = shell_lines(path)
    assert len(lines) == number
    for line in lines:
        _, name, *arguments = shlex.split(line)
        command = main.get_command(click.Context(main), name)
        assert command is not None
        assert command.make_context(
            name, arguments, parent=click.Context(main, **main.context_settings)
        ).params


def test_conda_recipe_asks_for_what_the_package_needs():
    text = (PACKAGING / "meta.yaml").read_text()
    assert f'version = "{__version__}"' in text
    recipe = yaml.safe_load(re.sub(r"\{\{.*?\}\}", "x", re.sub(r"\{%.*?%\}", "", text)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {name.replace("torch>", "pytorch>") for name in project["dependencies"]}
    found = {name.replace(" ", "") for name in recipe["requirements"]["run"]}
    assert found == needed | {f"python{project['requires-python']}"}


def test_nextflow_descriptions_are_readable():
    for name in ("meta.yml", "environment.yml"):
        assert yaml.safe_load((WORKFLOWS / "nextflow" / "genoembed" / "extract" / name).read_text())
