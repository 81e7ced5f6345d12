"""``genoembed finetune``: labelled sequences or pairs become a better encoder and its heads."""

from __future__ import annotations

import logging
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
from genoembed.cli.reporting import reporting_options
from genoembed.cli.training import echo_once, resumable, run_options, without_empty

if TYPE_CHECKING:
    from collections.abc import Callable

_logger = logging.getLogger(__name__)

TASK, DATA, SPLIT = "Task", "Data", "Split"
ENCODER, AUGMENT, CONTRAST = "Encoder", "Augmentation", "Contrastive tasks"
RECIPE = "Recipe"
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
def command(train: tuple[str, ...], output_dir: str, **options: Any) -> None:
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
