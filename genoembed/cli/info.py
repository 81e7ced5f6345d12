"""``genoembed info``: what is in an embedding file, and how it was made.

``genoembed doctor``: known-answer tests of this installation.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

import click

import genoembed
from genoembed.cli.options import command
from genoembed.cli.output import aligned, count, echo_result
from genoembed.config.files import DoctorConfig
from genoembed.errors import visible

if TYPE_CHECKING:
    from genoembed import EmbeddingFile


IDS_SHOWN = 5


def describe(embeddings: EmbeddingFile) -> dict[str, Any]:
    """Describe an open file."""
    matrices = {name: embeddings[name] for name in embeddings.layers}
    return {
        "path": str(embeddings.path),
        "kind": embeddings.kind,
        "schema_version": embeddings.schema_version,
        "changes": list(embeddings.changes),
        "num_rows": len(embeddings),
        "matrices": [
            {"name": name, "shape": list(matrix.shape), "dtype": matrix.dtype.name}
            for name, matrix in matrices.items()
        ],
        "more_matrices": embeddings.more_matrices,
        "columns": list(embeddings.obs),
        "first_ids": embeddings.ids[:IDS_SHOWN],
        "provenance": embeddings.provenance,
    }


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    rest = facts["num_rows"] - len(facts["first_ids"])
    lines = [
        ("file", facts["path"]),
        ("kind", f"{facts['kind']}, schema {facts['schema_version']}"),
        *(("changed", change) for change in facts["changes"]),
        ("rows", f"{facts['num_rows']:,}"),
        ("first ids", ", ".join(facts["first_ids"]) + (f" and {rest:,} more" if rest else "")),
    ]
    for matrix in facts["matrices"]:
        rows, width = matrix["shape"]
        lines.append(("matrix", f"{matrix['name']}: {rows:,} x {width:,} {matrix['dtype']}"))
    if facts["more_matrices"]:
        lines.append(("more matrices", ", ".join(facts["more_matrices"])))
    lines.append(("columns", ", ".join(facts["columns"])))
    for key, value in facts["provenance"].items():
        lines += _provenance_lines(key, value)
    return lines


def _provenance_lines(key: str, value: object) -> list[tuple[str, str]]:
    """Format one part of the provenance; nested parts get one line each."""
    label = key.replace("_", " ")
    if isinstance(value, dict) and any(isinstance(part, dict) for part in value.values()):
        return [(f"{label}: {name}", _words(part)) for name, part in value.items()]
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return [(label, _words(part)) for part in value]
    return [(label, _words(value))]


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_words(part)}" for name, part in value.items())
    if isinstance(value, list):
        return " ".join(map(_words, value)) or "none"
    return "none" if value is None else str(value)


@command(
    "info",
    reads=("file",),
    short_help="Show the contents of a file and how it was made.",
    examples="genoembed info genome.h5",
    has_json=True,
)
@click.argument("file")
def info_command(file: str, *, as_json: bool) -> None:
    """Show the contents of FILE and how it was made: rows, matrices, model, layers, pooling, inputs."""
    with genoembed.open_embeddings(file) as embeddings:
        facts = describe(embeddings)
    click.echo(json.dumps(facts) if as_json else aligned(_lines(facts)))


class Check(Protocol):
    """What a check found."""

    @property
    def name(self) -> str:
        """What was checked."""

    @property
    def passed(self) -> bool:
        """Whether it is as it should be."""

    @property
    def detail(self) -> str:
        """The numbers, or what to do."""

    @property
    def seconds(self) -> float:
        """How long it took."""


def show(check: Check) -> None:
    """Print a check as soon as it is done."""
    verdict = "ok    " if check.passed else "FAILED"
    click.echo(visible(f"{verdict}  {check.name}: {check.detail} ({check.seconds:.1f} s)"))


@command(
    "doctor",
    DoctorConfig,
    short_help="Test the installation against known answers.",
    examples="""
    genoembed doctor
    genoembed doctor --model dnabert-2
    genoembed doctor --model ./downloaded --as nt-v2-50m""",
    has_json=True,
)
@click.pass_context
def doctor_command(ctx: click.Context, /, *, as_json: bool, **options: Any) -> None:
    """Test this installation against known answers, in about ten seconds.

    With --model, the command runs the weights of a published model on the inputs whose vectors are
    published, and compares each vector with the published one. The exit code is 1 if a test fails.
    """
    checks = genoembed.run_doctor(**options, on_check=None if as_json else show)
    failed = sum(not check.passed for check in checks)
    echo_result({"checks": checks}, f"{count(len(checks), 'check')}, {failed} failed", as_json=as_json)
    if failed:
        ctx.exit(1)
