"""``genoembed models``: the models that have short names.

``genoembed layers``: what can be captured in a model, and what a layer number means.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import command
from genoembed.cli.output import aligned, magnitude
from genoembed.config.embed import DEFAULT_MODEL
from genoembed.config.files import LayersConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from genoembed import ModelLayers, PublishedModel


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
    """Return how large the weights are; two bytes per parameter if the size of the file is not known."""
    if not model["repo_id"]:
        return "nothing, it is in the package"
    return f"{magnitude(model['num_bytes'] or 2 * model['num_parameters'], 'B')} of disk and memory"


def _notes(models: Iterable[Mapping[str, Any]]) -> list[str]:
    notes = {model["needs_fp8"]: model["precision_note"] for model in models if model["repo_id"]}
    return [f"FP8 {'yes' if needed else 'no'}: {note}." for needed, note in notes.items()]


PUBLISHED_HEADER = ("name", "family", "context", "parameters", "license", "repository", "tested here")


def _published_line(model: PublishedModel) -> tuple[object, ...]:
    return (
        model.name,
        model.family,
        "-" if model.context is None else f"{model.context:,}",
        magnitude(model.num_parameters, "").strip(),
        model.license,
        model.repo_id or "-",
        model.tested,
    )


def _published_facts(model: PublishedModel) -> dict[str, Any]:
    """Describe a published model, with the keys of the others where they mean the same."""
    return {
        "name": model.name,
        "summary": f"{model.title} ({model.family})",
        "width": model.width,
        "context": model.context,
        "num_parameters": model.num_parameters,
        "license": model.license,
        "repo_id": model.repo_id,
        "revision": model.revision,
        "family": model.family,
        "is_run": model.is_run,
        "tested": model.tested,
        "geneb": model.rules,
    }


@command(
    "models",
    short_help="List the models that have short names.",
    examples="genoembed models",
    has_json=True,
)
def models_command(*, as_json: bool) -> None:
    """List the models that have a short name: the bundled model, Evo 2, and the 40 of the GENEB benchmark.

    A short name of the second table stands for a Hugging Face repository. Any other model is given as a
    local folder or a Hugging Face id. docs/MODELS.md describes the families.
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
    published = genoembed.published_models()
    if as_json:
        click.echo(json.dumps([*models, *map(_published_facts, published)]))
        return
    click.echo(aligned(map(_line, models), header=HEADER))
    click.echo("\n".join(["", *_notes(models), ""]))
    click.echo(aligned(map(_published_line, published), header=PUBLISHED_HEADER))
    click.echo("\nContext in tokens. docs/MODELS.md says more: bases per token, layers, differences.")


def layer_table(described: ModelLayers) -> list[dict[str, Any]]:
    """Describe every layer of a model."""
    numbered = set(described.numbered)
    return [
        {
            "path": layer.path,
            "index": layer.index,
            "width": layer.width,
            "is_number": layer.path in numbered,
            "is_final": layer.path == described.final,
        }
        for layer in described.layers
    ]


def _meaning(described: ModelLayers) -> str:
    """Return what an integer layer means, and its range."""
    if described.template is None:
        return "Integers mean nothing here, because the blocks share one module: name a module path."
    path, last = described.template.format(index="N"), described.num_blocks - 1
    return f"--layer N means {path}, N from 0 to {last}, or from -{last + 1} to -1 counted from the end."


def _line_of_layers(row: dict[str, Any]) -> tuple[str, ...]:
    names = [str(row["index"])] if row["is_number"] else []
    names += ["final"] if row["is_final"] else []
    block, width = ("-" if row[key] is None else str(row[key]) for key in ("index", "width"))
    return (" or ".join(names) or "-", row["path"], block, width)


@command(
    "layers",
    LayersConfig,
    short_help="List the layers of a model.",
    examples="genoembed layers genoembed-mini",
    has_json=True,
    checks_options=False,
)
def layers_command(
    *, as_json: bool, model: str = DEFAULT_MODEL, show_all: bool = False, **options: Any
) -> None:
    """List the layers of MODEL (default: genoembed-mini): value of --layer, module path, block, width.

    A layer number N means the output of block N; in StripedHyena 2 models such as Evo 2 it means
    blocks.N.mlp.l3. Weights are not read and not downloaded; of a Hugging Face repository, only config.json
    is. A width of '-' is not known before the model runs.
    """
    described = genoembed.describe_layers(model, **options)
    table = layer_table(described)
    if as_json:
        facts = {"template": described.template, "num_blocks": described.num_blocks, "final": described.final}
        click.echo(json.dumps({"model": described.name, **facts, "layers": table}))
        return
    shown = [row for row in table if show_all or row["is_number"] or row["is_final"]]
    click.echo(aligned(map(_line_of_layers, shown), header=("--layer", "module path", "block", "width")))
    click.echo(_meaning(described))
    if described.final is None:
        click.echo("What final means is known only when the model runs with its weights.")
    if len(shown) < len(table):
        click.echo(f"{len(table)} modules can be named by path; --all lists them.")
