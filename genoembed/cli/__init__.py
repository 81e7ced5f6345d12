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
from genoembed.config.cores import set_openmp_defaults
from genoembed.config.fields import near_choice

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
    "subset",
    "join",
    "annotate",
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
    "subset": "rows",
    "join": "rows",
    "annotate": "rows",
}
"""The module of a command that shares it with others of its family; any other has one of its own name."""
SECTIONS = {
    "Embed, search and draw": ("extract", "merge", "search", "fit-transform", "probe", "plot"),
    "Embedding files": ("info", "subset", "join", "annotate", "compare", "verify", "export"),
    "Score and generate": ("score", "generate"),
    "Train": ("pretrain", "finetune", "predict"),
    "Models": ("models", "layers", "convert", "export-model"),
    "Server and installation": ("serve", "doctor"),
}
"""The commands under the headings of the help."""


class CommandGroup(click.Group):
    """A group that imports a command's module when the command is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(COMMANDS)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write examples before the commands, as each command does."""
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        self.format_epilog(ctx, formatter)
        self.format_options(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, heading by heading."""
        found = {name: self.get_command(ctx, name) for name in COMMANDS}
        limit = formatter.width - 6 - max(map(len, COMMANDS))
        for heading, names in SECTIONS.items():
            commands = [(name, command) for name in names if (command := found.get(name)) is not None]
            rows = [(name, command.get_short_help_str(limit)) for name, command in commands]
            with formatter.section(heading):
                formatter.write_dl(rows, col_max=20, col_spacing=2)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"genoembed.cli.{_MODULES.get(cmd_name, cmd_name)}")
        return cast("click.Command", getattr(module, f"{cmd_name.replace('-', '_')}_command"))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the requested command; a misspelled one is answered with the nearest."""
        if (near := near_choice(args[0], COMMANDS)) and args[0] not in COMMANDS:
            message = f"No such command {args[0]!r}{near}"
            raise click.UsageError(message, ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the requested command; turn how it ends into an exit code."""
        set_openmp_defaults()  # before any command loads torch
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
    """Embeddings from any layer of any genomic language model: FASTA in, HDF5 out.

    'genoembed COMMAND --help' describes a command, with examples and its most used options.
    """
