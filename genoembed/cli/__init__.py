"""The command line: one file per command, loaded when it is needed.

A command parses, builds a configuration, makes one public call and prints what came of it. Results go to
standard output, messages and progress to standard error. Exit codes: 0 done, 1 failed with one line that says
why, 2 wrong usage, 3 done but for records that failed, 130 interrupted.
"""

from __future__ import annotations

import importlib
from typing import cast

import click

from genoembed._version import __version__
from genoembed.cli.outcome import exit_codes

COMMANDS = (
    "extract",
    "merge",
    "layers",
    "models",
    "info",
    "convert",
    "pretrain",
    "finetune",
    "predict",
    "search",
    "fit-transform",
    "probe",
    "plot",
    "compare",
    "verify",
    "export",
    "export-model",
    "score",
    "generate",
    "serve",
    "doctor",
)
"""Every command, in the order of the help; each is ``NAME_command`` in its module."""
_MODULES = {
    "merge": "extract",
    "layers": "models",
    "doctor": "info",
    "convert": "export",
    "export-model": "export",
    "pretrain": "training",
    "finetune": "training",
    "predict": "training",
    "fit-transform": "search",
    "verify": "compare",
}
"""The module of a command that shares it with others of its family; any other has one of its own name."""


class CommandGroup(click.Group):
    """A group that imports a command's module when the command is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"genoembed.cli.{_MODULES.get(cmd_name, cmd_name)}")
        return cast("click.Command", getattr(module, f"{cmd_name.replace('-', '_')}_command"))

    def invoke(self, ctx: click.Context) -> object:
        """Run the requested command; turn how it ends into an exit code."""
        with exit_codes(ctx):
            return super().invoke(ctx)


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
    Examples:
      genoembed extract genome.fa.gz
      genoembed extract genome.fa.gz --model evo2_7b --layer 28 -o genome.h5
      genoembed info genome.h5""",
)
@click.version_option(__version__, prog_name="genoembed", message="%(prog)s %(version)s")
def main() -> None:
    """genoembed: embeddings from any layer of any genomic language model; FASTA in, HDF5 out."""
