"""What ``pretrain`` and ``finetune`` share: options of the run, and how an interrupted one ends.

``genoembed pretrain``: sequence files become a trained causal model.
``genoembed finetune``: labeled sequences or pairs become a better encoder and its heads.
``genoembed predict``: a fine-tuned model's labels or numbers for sequences, as a table.
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import check_json_has_room, command
from genoembed.cli.outcome import promise_output
from genoembed.cli.output import destination, done_lines, echo_result, end_incomplete, policy_lines
from genoembed.config.files import PredictConfig
from genoembed.config.finetune import FinetuneOptions
from genoembed.config.pretrain import PretrainOptions
from genoembed.errors import Interrupted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from genoembed import FinetuneReport, PretrainReport


@contextmanager
def resumable() -> Iterator[None]:
    """Add to an interruption that saved a checkpoint which option resumes from it."""
    try:
        yield
    except Interrupted as stop:
        if not str(stop):
            raise
        raise Interrupted(stop.number, f"{stop} (--resume)") from None


def echo_once(report: PretrainReport | FinetuneReport, *, as_json: bool) -> None:
    """Print the result from one of the processes that torchrun started."""
    if os.environ.get("RANK", "0") == "0":
        echo_result(report, str(report.output), as_json=as_json)


_logger = logging.getLogger(__name__)


@command(
    "pretrain",
    PretrainOptions,
    short_help="Train a causal language model.",
    examples="""
    genoembed pretrain genomes/*.fa.gz --like evo2_7b --heldout-fraction 0.02 --max-steps 400 -o run
    genoembed pretrain phages.fa --model genoembed-mini --heldout other.fa --max-steps 500 -o runs/phage
    genoembed pretrain --config run.toml -o runs/mine --resume""",
    has_json=True,
    checks_options=False,
)
def pretrain_command(*, as_json: bool, **options: Any) -> None:
    """Train a causal language model on the sequences in CORPUS, from scratch or from another model.

    CORPUS: FASTA, FASTQ, GenBank or EMBL files, compressed or not. Records are packed into rows of one
    length. DIR gets checkpoints, metrics.jsonl and, at the end, the folder 'final', which --model takes
    everywhere. Standard output gets the name of that folder; standard error gets a line every few steps.
    Ctrl-C saves a checkpoint. To use several GPUs: torchrun -m genoembed pretrain ...
    """
    with resumable():
        report = genoembed.pretrain(**options)
    _logger.info("%d steps, held-out %.4f bits per base", report.steps, report.bits_per_base)
    _logger.info("use it with: genoembed extract INPUT --model %s", report.output)
    echo_once(report, as_json=as_json)


@command(
    "finetune",
    FinetuneOptions,
    short_help="Fine-tune a model on labels, pairs or views.",
    examples="""
    genoembed finetune promoters.tsv --task classification -o runs/promoters
    genoembed finetune genes.fa --labels classes.csv --task classification --tuning lora -o runs/genes
    genoembed finetune genomes.fa --task contrastive -o runs/views
    genoembed finetune pairs.jsonl --task retrieval --split random -o runs/search""",
    has_json=True,
    checks_options=False,
)
def finetune_command(*, as_json: bool, **options: Any) -> None:
    """Fine-tune a model on the examples in TRAIN.

    TRAIN: tables with sequences and labels (TSV, CSV, JSON lines, Parquet); sequence files with a table of
    labels; sequence files alone; or JSON lines with query, pos and neg. DIR gets checkpoints,
    metrics.jsonl, finetune.json and, at the end, the folder 'final', which extract and predict take.
    Standard output gets the name of that folder; standard error gets a line every few steps, and the
    metrics. Ctrl-C saves a checkpoint.
    """
    with resumable():
        report = genoembed.finetune(**options)
    for side, metrics in (("validation", report.validation), ("test", report.test)):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name not in _NOT_SHOWN)
        if shown:
            _logger.info("%s: %s", side, shown)
    _logger.info("%d steps, weights of step %d: %s", report.steps, report.best_step, report.output)
    echo_once(report, as_json=as_json)


_NOT_SHOWN = ("epoch", "step", "ranked_queries")


@command(
    "predict",
    PredictConfig,
    reads=("model",),
    short_help="Predict with a fine-tuned model.",
    examples="""
    genoembed predict runs/promoters/final genome.fa.gz -o promoters.tsv
    zcat reads.fa.gz | genoembed predict runs/promoters/final - | cut -f 1,2
    genoembed predict runs/sites/final genome.fa -o sites.parquet""",
    has_json=True,
)
@click.argument("model", metavar="DIR")
def predict_command(model: str, inputs: tuple[str, ...], *, as_json: bool, **options: Any) -> None:
    """Predict labels or numbers for the sequences in INPUT with a fine-tuned model.

    DIR: folder of a fine-tuning run. INPUT: sequence files in any format of extract; '-' is standard input.
    The table has columns id, label and one probability per class; for regression, one column per target;
    for token labels, one row per token.
    """
    if options.get("output", "-") != "-":
        promise_output(options["output"])
    check_json_has_room(options, as_json=as_json)
    report = genoembed.predict(model, inputs, **options)
    for line in (*policy_lines(report.counts), *done_lines(report)):
        _logger.info("%s", line)
    _logger.info(
        "%d records, %d rows, %.1f s: %s",
        report.num_records,
        report.num_rows,
        report.seconds,
        destination(report.output),
    )
    if as_json:
        echo_result(report, "", as_json=True)
    end_incomplete(report.failed)
