"""``genoembed export``: an embedding file for another tool.

``genoembed export-model``: a model as a folder for sentence-transformers.
``genoembed convert``: an original Evo 2 checkpoint becomes a safetensors folder.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

import genoembed
from genoembed.cli.options import command
from genoembed.cli.outcome import promise_output
from genoembed.cli.output import count, echo_result, magnitude, wrote
from genoembed.config.files import ConvertConfig, ExportConfig, ModelExportConfig
from genoembed.config.paths import check_paths

_logger = logging.getLogger(__name__)


@command(
    "export",
    ExportConfig,
    reads=("file",),
    short_help="Convert embeddings to h5ad, npz, parquet, csv, ...",
    examples="""
    genoembed export genes.h5 --to parquet
    genoembed export genes.h5 --to csv --layer blocks.28.mlp.l3 -o vectors.csv""",
    has_json=True,
    checks_options=False,
)
@click.argument("file", metavar="FILE.h5")
def export_command(file: str, *, as_json: bool, to: Any, **options: Any) -> None:
    """Convert the embeddings of FILE.h5 to another format. Standard output gets the name of the new file."""
    if "output" in options:
        promise_output(options["output"])
    report = genoembed.export(file, to, **options)
    _logger.info(
        "%s of %s, %s",
        count(report.num_records, "record"),
        ", ".join(report.layers),
        magnitude(report.num_bytes, "B"),
    )
    wrote(report.output)
    echo_result(report, str(report.output), as_json=as_json)


@command(
    "export-model",
    ModelExportConfig,
    short_help="Write a model for sentence-transformers.",
    examples="genoembed export-model zhihan1996/DNABERT-2-117M -o dnabert2-sentence",
    has_json=True,
    checks_options=False,
)
@click.argument("model")
def export_model_command(model: str, *, output: str, as_json: bool, **options: Any) -> None:
    """Write MODEL as a folder that SentenceTransformer(DIR) loads.

    Its encode method returns the mean of the last layer, as 'extract --layer final' does. Standard output
    gets the name of the folder.
    """
    promise_output(output)
    report = genoembed.export_model(model, output, **options)
    _logger.info("the mean of %s, %d features", report.layer, report.width)
    if report.needs_genoembed:
        _logger.info("import genoembed before you load the folder: it provides the architecture")
    wrote(report.output)
    echo_result(report, str(report.output), as_json=as_json)


@command(
    "convert",
    ConvertConfig,
    short_help="Convert an Evo 2 checkpoint to a model folder.",
    examples="genoembed convert evo2_7b.pt -o evo2_7b",
    has_json=True,
    checks_options=False,
)
@click.argument("checkpoint", metavar="CKPT")
def convert_command(checkpoint: str, *, output: str, as_json: bool, **options: Any) -> None:
    """Convert CKPT, an original Evo 2 checkpoint, to a model folder.

    CKPT: a .pt file, one of its parts (.pt.part0, ...), or a .safetensors file with the original names. The
    folder is used as --model DIR, or by AutoModelForCausalLM.from_pretrained after 'import genoembed'. Code
    in the checkpoint is never run. Standard output gets the name of the folder.
    """
    promise_output(output)
    source = Path(checkpoint)
    if not list(source.parent.glob(f"{source.name}.part*")):
        check_paths([source])
    folder = genoembed.convert_checkpoint(checkpoint, output, **options)
    _logger.info("use it with: genoembed extract INPUT --model %s", folder)
    echo_result({"output": folder}, str(folder), as_json=as_json)
