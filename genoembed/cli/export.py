"""``genoembed export``: an embedding file for another tool.

``genoembed export-model``: a model as a folder for sentence-transformers.
``genoembed convert``: an original Evo 2 checkpoint becomes a safetensors folder.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import click

import genoembed
from genoembed.cli.options import GroupedCommand, choice, file_option
from genoembed.cli.outcome import promise_output
from genoembed.cli.output import count, json_option, magnitude, reporting_options

_logger = logging.getLogger(__name__)

TAKEN, OUTPUT = "What is taken", "Output"


@click.command(
    "export",
    cls=GroupedCommand,
    short_help="Write embeddings as h5ad, npz, parquet, csv, ...",
    epilog="""\b
    Examples:
      genoembed export genes.h5 --to parquet
      genoembed export genes.h5 --to csv --layer blocks.28.mlp.l3 -o vectors.csv""",
)
@click.argument("file", metavar="FILE.h5")
@file_option(
    "--to",
    group=OUTPUT,
    required=True,
    help="The kind of file; uniprot-h5 has one dataset a record.",
    **choice("h5ad", "npz", "parquet", "csv", "uniprot-h5"),
)
@file_option(
    "-o", "--output", group=OUTPUT, metavar="FILE", help="The file to write.  [FILE's name and ending]"
)
@file_option("--overwrite", group=OUTPUT, is_flag=True, default=False, help="Replace it, once complete.")
@file_option("--layer", group=TAKEN, metavar="NAME", help="Which matrix alone; csv and uniprot-h5 hold one.")
@json_option
@reporting_options
def export_command(file: str, *, to: Any, as_json: bool, **options: Any) -> None:
    """Write the embeddings of FILE.h5 as another kind of file. Standard output gets its name."""
    if options["output"]:
        promise_output(options["output"])
    report = genoembed.export(file, to, **options)
    _logger.info(
        "%s of %s, %s",
        count(report.num_records, "record"),
        ", ".join(report.layers),
        magnitude(report.num_bytes, "B"),
    )
    facts = {**dataclasses.asdict(report), "output": str(report.output)}
    click.echo(json.dumps(facts) if as_json else str(report.output))


MODEL, OUTPUT = "Model", "Output"


@click.command(
    "export-model",
    cls=GroupedCommand,
    short_help="Write a model for sentence-transformers.",
    epilog="""\b
    Example:
      genoembed export-model zhihan1996/DNABERT-2-117M --trust-remote-code -o dnabert2-sentence""",
)
@click.argument("model")
@file_option("-o", "--output", group=OUTPUT, required=True, metavar="DIR", help="The folder to write.")
@file_option("--overwrite", group=OUTPUT, is_flag=True, default=False, help="Replace DIR, once complete.")
@file_option("--dtype", group=MODEL, default="float32", metavar="TYPE", help="Of the weights.  [float32]")
@file_option("--revision", group=MODEL, metavar="REV", help="Branch, tag or commit of a Hugging Face id.")
@file_option(
    "--trust-remote-code",
    group=MODEL,
    is_flag=True,
    default=False,
    help="Run Python code that the model brings.",
)
@json_option
@reporting_options
def export_model_command(model: str, *, output: str, as_json: bool, **options: Any) -> None:
    """Write MODEL as a folder that SentenceTransformer(DIR) loads, and whose encode gives the mean of the
    last layer, as 'extract --layer final' does.

    Standard output gets the folder.
    """
    promise_output(output)
    report = genoembed.export_model(model, output, **options)
    _logger.info("the mean of %s, %d features", report.layer, report.width)
    if report.needs_genoembed:
        _logger.info("import genoembed before you load the folder: the architecture is its")
    facts = {**dataclasses.asdict(report), "output": str(report.output)}
    click.echo(json.dumps(facts) if as_json else str(report.output))


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
def convert_command(
    checkpoint: str, *, output: str, name: str | None, config: str | None, overwrite: bool
) -> None:
    """Turn CKPT (.pt, any of its .pt.part*, or .safetensors with the original names) into a model folder.

    The folder opens with --model DIR, and with AutoModelForCausalLM.from_pretrained after 'import genoembed'.
    No code of the checkpoint runs. Standard output gets the folder's name.
    """
    promise_output(output)
    folder = genoembed.convert_checkpoint(checkpoint, output, name=name, config=config, overwrite=overwrite)
    _logger.info("use it with: genoembed extract INPUT --model %s", folder)
    click.echo(folder)
