"""``genoembed models``: the models with names of their own."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import GroupedCommand
from genoembed.cli.reporting import json_option
from genoembed.cli.text import aligned, magnitude

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

HEADER = ("name", "layers", "width", "context", "parameters", "license", "needs", "FP8", "what it is")


def _line(model: Mapping[str, Any]) -> tuple[object, ...]:
    return (
        model["name"],
        str(model["layers"]),
        str(model["width"]),
        model["context"],
        magnitude(model["num_parameters"], "").strip(),
        model["license"],
        _needs(model),
        "yes" if model["needs_fp8"] else "no",
        model["summary"],
    )


def _needs(model: Mapping[str, Any]) -> str:
    """Say how large the weights are; two bytes a parameter where the size of the file is not known."""
    if not model["repo_id"]:
        return "nothing more"
    return f"{magnitude(model['num_bytes'] or 2 * model['num_parameters'], 'B')} of disk and memory"


def _notes(models: Iterable[Mapping[str, Any]]) -> list[str]:
    notes = {model["needs_fp8"]: model["precision_note"] for model in models if model["repo_id"]}
    return [f"FP8 {'yes' if needed else 'no'}: {note}." for needed, note in notes.items()]


@click.command(
    "models",
    cls=GroupedCommand,
    short_help="List the models with names of their own.",
    epilog="""\b
    Example:
      genoembed models""",
)
@json_option
def command(*, as_json: bool) -> None:
    """List the models that have a name here, the bundled one first.

    Any other model is named by its local folder or its Hugging Face id.
    """
    models = [
        {
            "name": model.name,
            "summary": model.summary,
            "layers": model.config["num_hidden_layers"],
            "width": model.config["hidden_size"],
            "context": model.context,
            "num_parameters": model.num_parameters,
            "license": model.license,
            "repo_id": model.repo_id,
            "merged_sha256": model.merged_sha256,
            "files": [dataclasses.asdict(file) for file in model.files],
            "num_bytes": model.num_bytes,
            "needs_fp8": model.needs_fp8,
            "precision_note": model.precision_note,
        }
        for model in genoembed.known_models()
    ]
    if as_json:
        click.echo(json.dumps(models))
        return
    click.echo(aligned(map(_line, models), header=HEADER))
    click.echo("\n".join(["", *_notes(models)]))
