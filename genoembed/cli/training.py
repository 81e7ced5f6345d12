"""What ``pretrain`` and ``finetune`` share: options of the run, and how an interrupted one ends.

``genoembed pretrain``: sequence files become a trained causal model.
``genoembed finetune``: labelled sequences or pairs become a better encoder and its heads.
``genoembed predict``: a fine-tuned model's labels or numbers for sequences, as a table.
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import (
    BASES,
    COUNT,
    FILES,
    FLAG,
    NAME,
    NUMBER,
    SHARE,
    GroupedCommand,
    choice,
    file_option,
    policy_options,
)
from genoembed.cli.outcome import INTERRUPTED, promise_output
from genoembed.cli.output import reporting_options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


RUN = "Run"


def run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare the options that say what becomes of a run that is in DIR already, and ``--threads``."""
    options = (
        file_option("--resume", group=RUN, default=False, help="Go on from DIR's newest checkpoint.", **FLAG),
        file_option(
            "--overwrite", group=RUN, default=False, help="Start again; drop the run in DIR.", **FLAG
        ),
        file_option("--threads", group=RUN, help="CPU threads; without it, torch decides.", **COUNT),
    )
    for option in reversed(options):
        function = option(function)
    return function


def without_empty(options: Mapping[str, Any]) -> dict[str, Any]:
    """Take repeatable options that were not given for None, so that a configuration file can say them.

    Example:
        >>> without_empty({"layers": (), "seed": 0})
        {'layers': None, 'seed': 0}
    """
    return {key: None if value == () else value for key, value in options.items()}


@contextmanager
def resumable() -> Iterator[None]:
    """Let an interruption that saved a checkpoint say which option goes on from it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not str(stop):
            raise
        click.echo(f"Interrupted: {stop} (--resume)", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None


def echo_once(result: str) -> None:
    """Write a result to standard output, from one of the processes that torchrun started."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(result)


_logger = logging.getLogger(__name__)

START = "Where it starts"
DATA = "Data"
RECIPE = "Recipe"


@click.command(
    "pretrain",
    cls=GroupedCommand,
    short_help="Train a causal model on packed sequences.",
    epilog="""\b
    Examples:
      genoembed pretrain genomes/*.fa.gz --like evo2_7b --hidden-size 128 --heldout-fraction 0.02 \\
          --max-steps 4000 -o runs/mini
      genoembed pretrain phages.fa --model genoembed-mini --heldout other.fa --max-steps 500 -o runs/phage
      genoembed pretrain --config run.toml -o runs/mine --resume""",
)
@click.argument("corpus", metavar="CORPUS...", nargs=-1)
@click.option("-o", "--output", "output_dir", required=True, metavar="DIR", help="The folder to write.")
@file_option(
    "--config", group=START, metavar="FILE", help="TOML or JSON with any of these keys; options win."
)
@file_option("--model", group=START, **NAME, help="Go on from this causal model: name, folder or id.")
@file_option("--revision", group=START, metavar="REV", help="Branch, tag or commit of a Hugging Face id.")
@file_option("--trust-remote-code", group=START, **FLAG, help="Run Python code that the model brings.")
@file_option("--like", group=START, **NAME, help="From scratch, in the shape of one of 'genoembed models'.")
@file_option("--hidden-size", group=START, **COUNT, help="Shrink that shape to this width.")
@file_option("--layers", group=START, **COUNT, help="Shrink that shape to its first N blocks.")
@file_option("--heldout", group=DATA, **FILES, help="Sequences to measure on; repeatable.")
@file_option("--heldout-fraction", group=DATA, **SHARE, help="Or: this share of whole records.")
@file_option("--heldout-rows", group=DATA, **COUNT, help="Rows measured each time.  [128]")
@file_option(
    "--packing",
    group=DATA,
    **choice("stream", "bins"),
    help="Cut documents and pad nothing, or keep whole what fits a window.  [stream]",
)
@file_option("--window", group=DATA, type=int, metavar="TOKENS", help="Tokens of a row.  [1024]")
@file_option("--isolate", group=DATA, **FLAG, help="Keep packed neighbours from seeing each other.")
@file_option("--one-strand", group=DATA, **FLAG, help="No reverse complements.")
@file_option("--n-run-bp", group=DATA, **BASES, help="Leave out runs of N this long.  [10]")
@file_option("--max-document-bp", group=DATA, **BASES, help="Cut longer records.  [8 windows]")
@file_option("--shuffle-documents", group=DATA, **COUNT, help="Documents to draw the next from.  [32768]")
@policy_options("--invalid", "--empty", "--gaps", group=DATA)
@file_option("--max-steps", group=RECIPE, **COUNT, help="Optimizer steps. Required, here or in FILE.")
@file_option("--rows-per-device", group=RECIPE, **COUNT, help="Rows of a forward pass.  [4]")
@file_option("--accumulation-steps", group=RECIPE, **COUNT, help="Forward passes a step.  [1]")
@file_option(
    "--learning-rate",
    group=RECIPE,
    type=float,
    metavar="RATE",
    help="Peak rate. Without it, 2e-3 x sqrt(128 / width), and a tenth of that to go on from a model.",
)
@file_option("--pole-rate-scale", group=RECIPE, **NUMBER, help="Poles move this much slower.  [0.1]")
@file_option("--warmup-steps", group=RECIPE, **COUNT, help="Before the cosine.  [5 %, 200 at most]")
@file_option("--weight-decay", group=RECIPE, **NUMBER, help="On matrices.  [0.1]")
@file_option("--max-grad-norm", group=RECIPE, **NUMBER, help="Clip gradients to this norm.  [1]")
@file_option(
    "--dtype",
    group=RECIPE,
    **choice("auto", "float32", "bfloat16"),
    help="Of matrix products; auto is bfloat16 where the hardware has it.  [auto]",
)
@file_option("--compile-blocks", group=RECIPE, **FLAG, help="torch.compile each block; no gain on CPUs.")
@file_option("--gradient-checkpointing", group=RECIPE, **FLAG, help="Less memory for a third more time.")
@file_option("--seed", group=RECIPE, **COUNT, help="Initial weights, order, strands.  [0]")
@file_option("--save-steps", group=RUN, **COUNT, help="Steps between checkpoints.  [200]")
@file_option("--eval-steps", group=RUN, **COUNT, help="Steps between measurements.  [200]")
@file_option("--logging-steps", group=RUN, **COUNT, help="Steps between lines.  [10]")
@run_options
@reporting_options
def pretrain_command(corpus: tuple[str, ...], output_dir: str, **options: Any) -> None:
    """Train on CORPUS files (FASTA, FASTQ, GenBank, EMBL; compressed or not), from scratch or from a model.

    Documents are packed into rows of one length. DIR gets checkpoints, metrics.jsonl and, at the end, the
    folder 'final', which --model takes everywhere. Standard output gets that folder's name; standard error a
    line every few steps. Ctrl-C saves a checkpoint. For several GPUs: torchrun -m genoembed pretrain ...
    """
    with resumable():
        report = genoembed.pretrain(corpus or None, output_dir, **without_empty(options))
    _logger.info("%d steps, held-out %.4f bits per base", report.steps, report.bits_per_base)
    _logger.info("use it with: genoembed extract INPUT --model %s", report.output)
    echo_once(report.output)


TASK, DATA, SPLIT = "Task", "Data", "Split"
ENCODER, AUGMENT, CONTRAST = "Encoder", "Augmentation", "Contrastive tasks"
TASKS = ("classification", "multilabel", "regression", "token", "lm", "contrastive", "triplet", "retrieval")
FINDING = ("keep", "drop", "error")


def _decorated(function: Callable[..., Any], *options: Any) -> Callable[..., Any]:
    for option in reversed(options):
        function = option(function)
    return function


def _task_options(function: Callable[..., Any]) -> Callable[..., Any]:
    return _decorated(
        function,
        file_option("--task", group=TASK, help="What to learn. Required, here or in FILE.", **choice(*TASKS)),
        file_option(
            "--config", group=TASK, metavar="FILE", help="TOML or JSON with any of these keys; options win."
        ),
        file_option(
            "--class-weights",
            group=TASK,
            help="Weigh classes alike, or by rarity.  [none]",
            **choice("none", "balanced"),
        ),
        file_option("--dropout", group=TASK, help="Of the head's input.  [0.1]", **SHARE),
        file_option("--label-smoothing", group=TASK, help="Share spread over all classes.  [0]", **SHARE),
    )


def _data_options(function: Callable[..., Any]) -> Callable[..., Any]:
    return _decorated(
        function,
        file_option(
            "--labels", group=DATA, metavar="FILE", help="Table from id to label, for sequence files."
        ),
        file_option("--sequence-column", group=DATA, help="Column of the sequences.  [sequence]", **NAME),
        file_option(
            "--label-column",
            "label_columns",
            group=DATA,
            multiple=True,
            metavar="NAME",
            help="Column of the labels, repeatable.  [label]",
        ),
        file_option(
            "--label-delimiter", group=DATA, metavar="TEXT", help="Separates several names in a cell."
        ),
        file_option("--ignore-label", group=DATA, help="Stands for a base without label.", **NAME),
        file_option("--id-column", group=DATA, help="Column of the ids.", **NAME),
        file_option(
            "--unlabelled", group=DATA, help="An id without label.  [error]", **choice("error", "skip")
        ),
        file_option(
            "--several-bases",
            group=DATA,
            help="Labels of bases where a token has several.  [error]",
            **choice("error", "first"),
        ),
        policy_options("--invalid", "--duplicates", "--empty", "--gaps", group=DATA),
        file_option("--keep-case", group=DATA, help="Leave soft-masked bases in lower case.", **FLAG),
        file_option("--repeats", group=DATA, help="Equal sequences, one label.  [keep]", **choice(*FINDING)),
        file_option(
            "--conflicts", group=DATA, help="Equal sequences, other labels.  [keep]", **choice(*FINDING)
        ),
        file_option("--one-strand", group=DATA, help="A reverse complement is no copy.", **FLAG),
        file_option(
            "--false-negatives",
            group=DATA,
            help="A negative that is its own query or positive.  [error]",
            **choice("error", "drop", "keep"),
        ),
    )


def _split_options(function: Callable[..., Any]) -> Callable[..., Any]:
    return _decorated(
        function,
        file_option(
            "--validation", group=SPLIT, help="Files that choose the best step; repeatable.", **FILES
        ),
        file_option("--test", group=SPLIT, help="Files that judge at the end; repeatable.", **FILES),
        file_option(
            "--split",
            group=SPLIT,
            help="How rows are parted without such files.  [stratified]",
            **choice("random", "stratified", "homology", "column"),
        ),
        file_option("--split-column", group=SPLIT, help="Column for 'column'.", **NAME),
        file_option("--group-column", group=SPLIT, help="Groups for 'homology', instead of kin.", **NAME),
        file_option("--validation-fraction", group=SPLIT, help="Share of the rows.  [0.1]", **SHARE),
        file_option("--test-fraction", group=SPLIT, help="Share of the rows.  [0.1]", **SHARE),
        file_option(
            "--homologs",
            group=SPLIT,
            help="Look for kin across the split.  [ignore]",
            **choice("ignore", *FINDING),
        ),
        file_option("--kin-identity", group=SPLIT, help="What kin share.  [0.8]", **SHARE),
    )


def _encoder_options(function: Callable[..., Any]) -> Callable[..., Any]:
    return _decorated(
        function,
        file_option(
            "--model", group=ENCODER, help="Name, folder or Hugging Face id.  [genoembed-mini]", **NAME
        ),
        file_option("--revision", group=ENCODER, metavar="REV", help="Branch, tag or commit."),
        file_option("--trust-remote-code", group=ENCODER, help="Run Python code that it brings.", **FLAG),
        file_option(
            "--layer",
            "layers",
            group=ENCODER,
            multiple=True,
            metavar="SPEC",
            help="Cut here; repeatable.  [final]",
        ),
        file_option(
            "--pool",
            "pooling",
            group=ENCODER,
            help="How tokens become one vector.  [mean]",
            **choice("mean", "max", "first", "last", "cls", "weighted_mean"),
        ),
        file_option("--skip-first", group=ENCODER, **BASES, help="Left out of pooling.  [0]"),
        file_option(
            "--fuse",
            "fusion",
            group=ENCODER,
            help="Several layers as one vector.  [none]",
            **choice("none", "concat", "mean", "max", "weighted"),
        ),
        file_option("--add-pooler", group=ENCODER, help="A linear projection after the pooling.", **FLAG),
        file_option(
            "--tuning",
            group=ENCODER,
            help="What learns.  [full]",
            **choice("full", "frozen", "last_n", "lora"),
        ),
        file_option("--last-n", group=ENCODER, help="Blocks, for 'last_n'.  [2]", **COUNT),
        file_option("--lora-rank", group=ENCODER, help="Of adapters.  [8]", **COUNT),
        file_option("--lora-alpha", group=ENCODER, help="Their scale, over the rank.  [16]", **NUMBER),
        file_option("--lora-dropout", group=ENCODER, help="Of their input.  [0]", **SHARE),
        file_option(
            "--lora-target",
            "lora_targets",
            group=ENCODER,
            multiple=True,
            metavar="NAME",
            help="Linear layers by the end of their path, repeatable; without it, all in the blocks.",
        ),
        file_option("--reverse-complement", group=AUGMENT, help="Chance of the other strand.  [0]", **SHARE),
        file_option("--crop-fraction", group=AUGMENT, help="Shortest crop.  [1]", **SHARE),
        file_option("--max-crop-bp", group=AUGMENT, **BASES, help="Crop longer sequences."),
        file_option("--mutation-rate", group=AUGMENT, help="Bases replaced.  [0]", **SHARE),
    )


def _contrast_options(function: Callable[..., Any]) -> Callable[..., Any]:
    return _decorated(
        function,
        file_option(
            "--contrast",
            group=CONTRAST,
            help="Pairs from query/pos/neg rows, class labels, or two views of a sequence.  [auto]",
            **choice("auto", "examples", "labels", "views"),
        ),
        file_option(
            "--temperature",
            group=CONTRAST,
            help="Scores are divided by it.  [0.05; labels 0.1; retrieval 0.02]",
            **NUMBER,
        ),
        file_option(
            "--scope",
            group=CONTRAST,
            help="What queries are compared with.  [auto]",
            **choice("auto", "one_way", "symmetric", "full"),
        ),
        file_option("--margin", group=CONTRAST, help="Of triplets: 1, or 0.3 for cosine.", **NUMBER),
        file_option(
            "--distance",
            group=CONTRAST,
            help="Of triplets.  [euclidean]",
            **choice("euclidean", "cosine"),
        ),
        file_option("--train-group-size", group=CONTRAST, help="1 positive and negatives.  [8]", **COUNT),
        file_option("--own-negatives-only", group=CONTRAST, help="None of other queries.", **FLAG),
        file_option("--across-devices", group=CONTRAST, help="Negatives of other devices, too.", **FLAG),
        file_option("--view-mutation-rate", group=CONTRAST, help="Of the second view.  [0.05]", **SHARE),
        file_option("--view-crop-fraction", group=CONTRAST, help="Of the second view.  [0.8]", **SHARE),
        file_option("--view-reverse-complement", group=CONTRAST, help="Of the second view.  [0.5]", **SHARE),
        file_option(
            "--mode",
            group=CONTRAST,
            help="Retrieval heads that learn.  [all]",
            **choice("all", "fix_encoder", "dense"),
        ),
        file_option(
            "--self-distillation-start",
            group=CONTRAST,
            help="Passes before the ensemble teaches the heads; -1 at once; without it, never.",
            **COUNT,
        ),
        file_option(
            "--distillation", group=CONTRAST, help="What teacher scores do.  [m3]", **choice("m3", "kl")
        ),
        file_option("--term-bases", group=CONTRAST, help="Of a k-mer of the sparse head.  [9]", **COUNT),
        file_option("--vector-width", group=CONTRAST, help="Of multi-vector vectors.", **COUNT),
        file_option("--vector-window", group=CONTRAST, help="Tokens a vector.  [8]", **COUNT),
    )


def _recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    return _decorated(
        function,
        file_option("--max-epochs", group=RECIPE, help="Without it, 20, 10 or 3, by the data.", **COUNT),
        file_option("--max-steps", group=RECIPE, help="Optimizer steps, whatever the epochs.", **COUNT),
        file_option("--rows-per-device", group=RECIPE, help="Rows of a batch.  [16]", **COUNT),
        file_option("--accumulation-steps", group=RECIPE, help="Batches a step.  [1]", **COUNT),
        file_option(
            "--micro-batch",
            group=RECIPE,
            help="Contrastive: rows encoded at a time, the gradient that of the batch.",
            **COUNT,
        ),
        file_option("--learning-rate", group=RECIPE, help="Without it, by tuning and width.", **NUMBER),
        file_option("--head-learning-rate", group=RECIPE, help="Without it, 1e-3 at least.", **NUMBER),
        file_option(
            "--schedule",
            group=RECIPE,
            help="After the warm-up.  [cosine]",
            **choice("cosine", "linear", "constant", "plateau"),
        ),
        file_option("--warmup-fraction", group=RECIPE, help="Share of the steps.  [0.1]", **SHARE),
        file_option("--weight-decay", group=RECIPE, help="On matrices.  [0.01]", **NUMBER),
        file_option("--max-grad-norm", group=RECIPE, help="Clip gradients to this norm.  [1]", **NUMBER),
        file_option("--metric", group=RECIPE, help="What stops training; without it, the task's.", **NAME),
        file_option("--patience", group=RECIPE, help="Evaluations without a better one.  [3]", **COUNT),
        file_option("--min-epochs", group=RECIPE, help="Not before these.  [1]", **COUNT),
        file_option("--eval-steps", group=RECIPE, help="Without it, an epoch.", **COUNT),
        file_option("--logging-steps", group=RECIPE, help="Steps between lines.  [10]", **COUNT),
        file_option("--pad-to-multiple-of", group=RECIPE, help="Padded lengths.  [1]", **COUNT),
        file_option("--mixed-lengths", group=RECIPE, help="Random rows in a batch.", **FLAG),
        file_option(
            "--dtype",
            group=RECIPE,
            help="Of matrix products.  [auto]",
            **choice("auto", "float32", "bfloat16"),
        ),
        file_option("--seed", group=RECIPE, help="Decides about all chance.  [0]", **COUNT),
    )


@click.command(
    "finetune",
    cls=GroupedCommand,
    short_help="Teach a model a task, or better embeddings.",
    epilog="""\b
    Examples:
      genoembed finetune promoters.tsv --task classification -o runs/promoters
      genoembed finetune genes.fa --labels classes.csv --task classification --tuning lora -o runs/genes
      genoembed finetune genomes.fa --task contrastive -o runs/views
      genoembed finetune pairs.jsonl --task retrieval --split random -o runs/search""",
)
@click.argument("train", metavar="TRAIN...", nargs=-1)
@click.option("-o", "--output", "output_dir", required=True, metavar="DIR", help="The folder to write.")
@_task_options
@_data_options
@_split_options
@_encoder_options
@_contrast_options
@_recipe_options
@run_options
@reporting_options
def finetune_command(train: tuple[str, ...], output_dir: str, **options: Any) -> None:
    """Fine-tune a model on TRAIN: tables with sequences and labels (TSV, CSV, JSON lines, Parquet), sequence
    files with a table of labels, sequence files alone, or JSON lines with query, pos and neg.

    DIR gets checkpoints, metrics.jsonl, finetune.json and, at the end, the folder 'final', which extract and
    predict take. Standard output gets that folder's name; standard error a line every few steps and the
    metrics. Ctrl-C saves a checkpoint.
    """
    with resumable():
        report = genoembed.finetune(train or None, output_dir, **without_empty(options))
    for side, metrics in (("validation", report.validation), ("test", report.test)):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name not in _NOT_SHOWN)
        if shown:
            _logger.info("%s: %s", side, shown)
    _logger.info("%d steps, weights of step %d", report.steps, report.best_step)
    echo_once(report.output)


_NOT_SHOWN = ("epoch", "step", "ranked_queries")


INPUT, OUTPUT, RUN = "Input", "Output", "Run"


@click.command(
    "predict",
    cls=GroupedCommand,
    short_help="Apply a fine-tuned head to sequences.",
    epilog="""\b
    Examples:
      genoembed predict runs/promoters/final genome.fa.gz -o promoters.tsv
      zcat reads.fa.gz | genoembed predict runs/promoters/final - | cut -f 1,2
      genoembed predict runs/sites/final genome.fa -o sites.parquet""",
)
@click.argument("model", metavar="DIR")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@file_option(
    "-o",
    "--output",
    group=OUTPUT,
    default="-",
    metavar="FILE",
    help="The table; without it, standard output.",
)
@file_option(
    "--format",
    group=OUTPUT,
    default="auto",
    **choice("auto", "tsv", "csv", "parquet"),
    help="auto goes by the name.  [auto]",
)
@file_option("--overwrite", group=OUTPUT, **FLAG, default=False, help="Replace FILE, once complete.")
@policy_options("--invalid", "--duplicates", "--empty", "--gaps", group=INPUT)
@file_option("--keep-case", group=INPUT, **FLAG, help="Without it, as in training.")
@file_option("--batch-rows", group=RUN, default=16, **COUNT, help="Windows of a forward pass.  [16]")
@file_option("--device", group=RUN, metavar="DEVICE", help="cpu, cuda ...; without it, CUDA if present.")
@file_option("--threads", group=RUN, **COUNT, help="CPU threads; without it, torch decides.")
@file_option(
    "--trust-remote-code",
    group=RUN,
    **FLAG,
    default=False,
    help="Run Python code that DIR brings.",
)
@reporting_options
def predict_command(model: str, inputs: tuple[str, ...], **options: Any) -> None:
    """Predict with the model in DIR, the folder 'final' of a fine-tuning run, for the sequences of INPUT
    (any format of extract; '-' is standard input).

    The table has id, label and a probability a class; one column a target for numbers; a row a token for
    labels of bases.
    """
    if options["output"] != "-":
        promise_output(options["output"])
    report = genoembed.predict(model, inputs, **options)
    _logger.info(
        "%d records, %d rows, %.1f s: %s", report.num_records, report.num_rows, report.seconds, report.output
    )
