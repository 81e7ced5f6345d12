"""``genoembed verify``: a file against its own recipe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.compare import FAILED, as_facts, layer_lines, named
from genoembed.cli.options import COUNT, GroupedCommand, file_option
from genoembed.cli.reporting import json_option, reporting_options
from genoembed.cli.text import count

if TYPE_CHECKING:
    from genoembed import VerifyReport

CHECKED, RUN = "What is checked", "How it runs"


@click.command(
    "verify",
    cls=GroupedCommand,
    short_help="Embed a sample of a file again, and compare.",
    epilog="""\b
    Examples:
      genoembed verify genes.h5
      genoembed verify genes.h5 moved/genes.fa.gz --sample 100 --certify --json""",
)
@click.argument("file", metavar="FILE.h5")
@click.argument("inputs", metavar="[INPUT...]", nargs=-1)
@file_option("--sample", group=CHECKED, default=32, help="Records to embed again, by chance.  [32]", **COUNT)
@file_option("--seed", group=CHECKED, default=0, help="Of the choice.  [0]", **COUNT)
@file_option(
    "--tolerance",
    group=CHECKED,
    type=float,
    metavar="X",
    help="Largest difference, relative to a vector's largest value; without it, as for compare.",
)
@file_option(
    "--certify",
    "certificate",
    group=CHECKED,
    is_flag=True,
    default=False,
    help="Also embed each record alone: does a vector depend on its batch?",
)
@file_option(
    "--regions", group=CHECKED, multiple=True, metavar="FILE", help="Where the region files are now."
)
@file_option(
    "--model", group=RUN, metavar="NAME", help="Where the model is now; without it, as the file says."
)
@file_option("--trust-remote-code", group=RUN, is_flag=True, help="Run Python code that the model brings.")
@file_option("--dtype", group=RUN, metavar="TYPE", help="Of the model; without it, as the file says.")
@file_option("--device", group=RUN, metavar="DEVICE", help="cpu, cuda ...; without it, CUDA if present.")
@file_option("--threads", group=RUN, help="CPU threads of the model.", **COUNT)
@file_option("--batch-tokens", group=RUN, help="Slots of a forward pass.", **COUNT)
@json_option
@reporting_options
def command(file: str, inputs: tuple[str, ...], *, as_json: bool, **options: Any) -> None:
    """Embed a sample of the records of FILE.h5 again, by the recipe in the file, and compare.

    Their sequences come from the files that FILE.h5 names, or from INPUT; each must have the SHA-256 that was
    recorded. Exit code 1 if a record is missing, has another sequence, or differs by more than the tolerance.
    """
    options["regions"] = options["regions"] or None
    options["trust_remote_code"] = options["trust_remote_code"] or None
    report = genoembed.verify(file, inputs or None, **options)
    click.echo(json.dumps(as_facts(report)) if as_json else "\n".join(_lines(report)))
    if not report.is_within:
        raise click.exceptions.Exit(FAILED)


def _lines(report: VerifyReport) -> list[str]:
    lines = layer_lines(report.layers, report.tolerance)
    strangers = (("not in the input", report.missing), ("of another sequence", report.other_sequence))
    lines += [f"{count(len(ids), 'record')} {what}: {named(ids)}" for what, ids in strangers if ids]
    if report.same_weights is False:
        lines.append("the model has other weights than the file says")
    if (proof := report.certificate) is not None:
        lines.append(
            f"alone against batches of {proof.batch_tokens:,} tokens: {count(proof.num_records, 'record')}, "
            f"largest difference {proof.max_absolute:.3g}, relative {proof.max_relative:.3g} "
            f"(tolerance {proof.tolerance:g}, {proof.dtype} on {proof.device})"
        )
    sampled = count(report.num_sampled, "record")
    return [*lines, f"verified: {sampled}" if report.is_within else f"not verified: {sampled}"]
