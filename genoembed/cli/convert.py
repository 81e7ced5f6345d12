"""``genoembed convert``: an original Evo 2 checkpoint becomes a safetensors folder."""

from __future__ import annotations

import logging

import click

import genoembed
from genoembed.cli.options import GroupedCommand
from genoembed.cli.outcome import promise_output
from genoembed.cli.reporting import reporting_options

_logger = logging.getLogger(__name__)


@click.command(
    "convert",
    cls=GroupedCommand,
    short_help="Turn an Evo 2 checkpoint into a folder that AutoModel opens.",
    epilog="""\b
    Example:
      genoembed convert evo2_7b.pt -o evo2_7b""",
)
@click.argument("checkpoint", metavar="CKPT")
@click.option("-o", "--output", required=True, metavar="DIR", help="The folder to write.")
@click.option(
    "--name", metavar="NAME", help="Which of 'genoembed models' it is; without it, read off CKPT's name."
)
@click.option(
    "--config", metavar="FILE", help="YAML description (as Vortex has them) of a checkpoint of another kind."
)
@click.option("--overwrite", is_flag=True, help="Replace DIR, once the new one is complete.")
@reporting_options
def command(checkpoint: str, *, output: str, name: str | None, config: str | None, overwrite: bool) -> None:
    """Turn CKPT (.pt, any of its .pt.part*, or .safetensors with the original names) into a model folder.

    The folder opens with --model DIR, and with AutoModelForCausalLM.from_pretrained after 'import genoembed'.
    No code of the checkpoint runs. Standard output gets the folder's name.
    """
    promise_output(output)
    folder = genoembed.convert_checkpoint(checkpoint, output, name=name, config=config, overwrite=overwrite)
    _logger.info("use it with: genoembed extract INPUT --model %s", folder)
    click.echo(folder)
