"""``genoembed layers``: what can be captured in a model, and what a layer number means."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import GroupedCommand, config_option
from genoembed.cli.reporting import json_option, reporting_options
from genoembed.cli.text import aligned
from genoembed.config import DEFAULT_MODEL
from genoembed.errors import LayerError

if TYPE_CHECKING:
    from genoembed import GenomicModel

MODEL = "Model"


def layer_table(model: GenomicModel) -> list[dict[str, Any]]:
    """Describe every layer of a model.

    Args:
        model: The model.

    Returns:
        Path, block number and width of each, and whether the block's number (``is_number``) or ``final``
        (``is_final``) means it.
    """
    numbers, final = _paths(model, "all"), _paths(model, "final")
    return [
        {
            "path": layer.path,
            "index": layer.index,
            "width": layer.width,
            "is_number": layer.path in numbers,
            "is_final": layer.path in final,
        }
        for layer in model.layers
    ]


def _paths(model: GenomicModel, spec: str) -> set[str]:
    """Resolve a spec; a model without such layers has none."""
    try:
        return {layer.path for layer in model.resolve(spec)}
    except LayerError:
        return set()


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    names = [str(row["index"])] if row["is_number"] else []
    names += ["final"] if row["is_final"] else []
    block, width = ("-" if row[key] is None else str(row[key]) for key in ("index", "width"))
    return (" or ".join(names) or "-", row["path"], block, width)


@click.command(
    "layers",
    cls=GroupedCommand,
    short_help="List a model's layers, and what a layer number means.",
    epilog="""\b
    Example:
      genoembed layers genoembed-mini""",
)
@click.argument("model", default=DEFAULT_MODEL)
@click.option(
    "--all",
    "show_all",
    is_flag=True,
    help="Every module that can be captured, not only those with short names.",
)
@config_option(key="revision", group=MODEL, metavar="REV", help="Branch, tag or commit of a Hugging Face id.")
@config_option(
    key="trust_remote_code", group=MODEL, help="Run the Python code that a model brings. Read it first."
)
@json_option
@reporting_options
def command(
    model: str, *, show_all: bool, as_json: bool, revision: str | None, trust_remote_code: bool
) -> None:
    """List the layers of MODEL (genoembed-mini unless named): what --layer takes, module path, block, width.

    An integer means blocks.N.mlp.l3 in StripedHyena 2 models, Evo 2 among them, and the output of block N in
    all others. A width of - is known only when the model runs.
    """
    loaded = genoembed.load_model(model, revision=revision, trust_remote_code=trust_remote_code)
    table = layer_table(loaded)
    if as_json:
        click.echo(json.dumps({"model": loaded.name, "layers": table}))
        return
    shown = [row for row in table if show_all or row["is_number"] or row["is_final"]]
    click.echo(aligned(map(_line, shown), header=("--layer", "module path", "block", "width")))
    if len(shown) < len(table):
        click.echo(f"{len(table)} modules can be named by path; --all lists them.")
