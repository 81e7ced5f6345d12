"""``genoembed finetune``: labelled sequences or pairs become a better encoder and its heads."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import click

import genoembed
from genoembed.cli.options import GroupedCommand, GroupedOption
from genoembed.cli.outcome import INTERRUPTED
from genoembed.cli.reporting import reporting_options

if TYPE_CHECKING:
    from collections.abc import Callable

_logger = logging.getLogger(__name__)

TASK, DATA, SPLIT = "Task", "Data", "Split"
ENCODER, AUGMENT, CONTRAST = "Encoder", "Augmentation", "Contrastive tasks"
RECIPE, RUN = "Recipe", "Run"
TASKS = ("classification", "multilabel", "regression", "token", "lm", "contrastive", "triplet", "retrieval")
FINDING = ("keep", "drop", "error")


def _option(
    *names: str, group: str, help: str, **attributes: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare an option that is None where it was not given, so that a configuration file can say it."""
    settings = {"default": None} | attributes
    return click.option(*names, cls=GroupedOption, group=group, help=help, **settings)


def _choice(*names: str) -> dict[str, Any]:
    return {"type": click.Choice(names)}


_COUNT = {"type": int, "metavar": "N"}
_SHARE = {"type": float, "metavar": "SHARE"}
_NUMBER = {"type": float, "metavar": "X"}
_NAME = {"metavar": "NAME"}
_FILES = {"multiple": True, "metavar": "FILE"}
_FLAG = {"is_flag": True}


def _decorated(function: Callable[..., Any], *options: Any) -> Callable[..., Any]:
    for option in reversed(options):
        function = option(function)
    return function


def _task_options(function: Callable[..., Any]) -> Callable[..., Any]:
    return _decorated(
        function,
        _option("--task", group=TASK, help="What to learn. Required, here or in FILE.", **_choice(*TASKS)),
        _option(
            "--config", group=TASK, metavar="FILE", help="TOML or JSON with any of these keys; options win."
        ),
        _option(
            "--class-weights",
            group=TASK,
            help="Weigh classes alike, or by rarity.  [none]",
            **_choice("none", "balanced"),
        ),
        _option("--dropout", group=TASK, help="Of the head's input.  [0.1]", **_SHARE),
        _option("--label-smoothing", group=TASK, help="Share spread over all classes.  [0]", **_SHARE),
    )


def _data_options(function: Callable[..., Any]) -> Callable[..., Any]:
    return _decorated(
        function,
        _option("--labels", group=DATA, metavar="FILE", help="Table from id to label, for sequence files."),
        _option("--sequence-column", group=DATA, help="Column of the sequences.  [sequence]", **_NAME),
        _option(
            "--label-column",
            "label_columns",
            group=DATA,
            multiple=True,
            metavar="NAME",
            help="Column of the labels, repeatable.  [label]",
        ),
        _option("--label-delimiter", group=DATA, metavar="TEXT", help="Separates several names in a cell."),
        _option("--ignore-label", group=DATA, help="Stands for a base without label.", **_NAME),
        _option("--id-column", group=DATA, help="Column of the ids.", **_NAME),
        _option("--unlabelled", group=DATA, help="An id without label.  [error]", **_choice("error", "skip")),
        _option(
            "--several-bases",
            group=DATA,
            help="Labels of bases where a token has several.  [error]",
            **_choice("error", "first"),
        ),
        _option(
            "--invalid",
            group=DATA,
            help="Letters outside IUPAC DNA.  [error]",
            **_choice("error", "skip", "mask"),
        ),
        _option(
            "--duplicates", group=DATA, help="Ids that appear twice.  [error]", **_choice("error", "suffix")
        ),
        _option("--empty", group=DATA, help="A record without bases.  [error]", **_choice("error", "skip")),
        _option("--gaps", group=DATA, help="Gap letters (- . *).  [error]", **_choice("error", "strip")),
        _option("--keep-case", group=DATA, help="Leave soft-masked bases in lower case.", **_FLAG),
        _option("--repeats", group=DATA, help="Equal sequences, one label.  [keep]", **_choice(*FINDING)),
        _option(
            "--conflicts", group=DATA, help="Equal sequences, other labels.  [keep]", **_choice(*FINDING)
        ),
        _option("--one-strand", group=DATA, help="A reverse complement is no copy.", **_FLAG),
        _option(
            "--false-negatives",
            group=DATA,
            help="A negative that is its own query or positive.  [error]",
            **_choice("error", "drop", "keep"),
        ),
    )


def _split_options(function: Callable[..., Any]) -> Callable[..., Any]:
    return _decorated(
        function,
        _option("--validation", group=SPLIT, help="Files that choose the best step; repeatable.", **_FILES),
        _option("--test", group=SPLIT, help="Files that judge at the end; repeatable.", **_FILES),
        _option(
            "--split",
            group=SPLIT,
            help="How rows are parted without such files.  [stratified]",
            **_choice("random", "stratified", "homology", "column"),
        ),
        _option("--split-column", group=SPLIT, help="Column for 'column'.", **_NAME),
        _option("--group-column", group=SPLIT, help="Groups for 'homology', instead of kin.", **_NAME),
        _option("--validation-fraction", group=SPLIT, help="Share of the rows.  [0.1]", **_SHARE),
        _option("--test-fraction", group=SPLIT, help="Share of the rows.  [0.1]", **_SHARE),
        _option(
            "--homologs",
            group=SPLIT,
            help="Look for kin across the split.  [ignore]",
            **_choice("ignore", *FINDING),
        ),
        _option("--kin-identity", group=SPLIT, help="What kin share.  [0.8]", **_SHARE),
    )


def _encoder_options(function: Callable[..., Any]) -> Callable[..., Any]:
    return _decorated(
        function,
        _option("--model", group=ENCODER, help="Name, folder or Hugging Face id.  [genoembed-mini]", **_NAME),
        _option("--revision", group=ENCODER, metavar="REV", help="Branch, tag or commit."),
        _option("--trust-remote-code", group=ENCODER, help="Run Python code that it brings.", **_FLAG),
        _option(
            "--layer",
            "layers",
            group=ENCODER,
            multiple=True,
            metavar="SPEC",
            help="Cut here; repeatable.  [final]",
        ),
        _option(
            "--pool",
            "pooling",
            group=ENCODER,
            help="How tokens become one vector.  [mean]",
            **_choice("mean", "max", "first", "last", "cls", "weighted_mean"),
        ),
        _option("--skip-first", group=ENCODER, type=int, metavar="BASES", help="Left out of pooling.  [0]"),
        _option(
            "--fuse",
            "fusion",
            group=ENCODER,
            help="Several layers as one vector.  [none]",
            **_choice("none", "concat", "mean", "max", "weighted"),
        ),
        _option("--add-pooler", group=ENCODER, help="A linear projection after the pooling.", **_FLAG),
        _option(
            "--tuning",
            group=ENCODER,
            help="What learns.  [full]",
            **_choice("full", "frozen", "last_n", "lora"),
        ),
        _option("--last-n", group=ENCODER, help="Blocks, for 'last_n'.  [2]", **_COUNT),
        _option("--lora-rank", group=ENCODER, help="Of adapters.  [8]", **_COUNT),
        _option("--lora-alpha", group=ENCODER, help="Their scale, over the rank.  [16]", **_NUMBER),
        _option("--lora-dropout", group=ENCODER, help="Of their input.  [0]", **_SHARE),
        _option(
            "--lora-target",
            "lora_targets",
            group=ENCODER,
            multiple=True,
            metavar="NAME",
            help="Linear layers by the end of their path, repeatable; without it, all in the blocks.",
        ),
        _option("--reverse-complement", group=AUGMENT, help="Chance of the other strand.  [0]", **_SHARE),
        _option("--crop-fraction", group=AUGMENT, help="Shortest crop.  [1]", **_SHARE),
        _option("--max-crop-bp", group=AUGMENT, type=int, metavar="BASES", help="Crop longer sequences."),
        _option("--mutation-rate", group=AUGMENT, help="Bases replaced.  [0]", **_SHARE),
    )


def _contrast_options(function: Callable[..., Any]) -> Callable[..., Any]:
    return _decorated(
        function,
        _option(
            "--contrast",
            group=CONTRAST,
            help="Pairs from query/pos/neg rows, class labels, or two views of a sequence.  [auto]",
            **_choice("auto", "examples", "labels", "views"),
        ),
        _option(
            "--temperature",
            group=CONTRAST,
            help="Scores are divided by it.  [0.05; labels 0.1; retrieval 0.02]",
            **_NUMBER,
        ),
        _option(
            "--scope",
            group=CONTRAST,
            help="What queries are compared with.  [auto]",
            **_choice("auto", "one_way", "symmetric", "full"),
        ),
        _option("--margin", group=CONTRAST, help="Of triplets: 1, or 0.3 for cosine.", **_NUMBER),
        _option(
            "--distance",
            group=CONTRAST,
            help="Of triplets.  [euclidean]",
            **_choice("euclidean", "cosine"),
        ),
        _option("--train-group-size", group=CONTRAST, help="1 positive and negatives.  [8]", **_COUNT),
        _option("--own-negatives-only", group=CONTRAST, help="None of other queries.", **_FLAG),
        _option("--across-devices", group=CONTRAST, help="Negatives of other devices, too.", **_FLAG),
        _option("--view-mutation-rate", group=CONTRAST, help="Of the second view.  [0.05]", **_SHARE),
        _option("--view-crop-fraction", group=CONTRAST, help="Of the second view.  [0.8]", **_SHARE),
        _option("--view-reverse-complement", group=CONTRAST, help="Of the second view.  [0.5]", **_SHARE),
        _option(
            "--mode",
            group=CONTRAST,
            help="Retrieval heads that learn.  [all]",
            **_choice("all", "fix_encoder", "dense"),
        ),
        _option(
            "--self-distillation-start",
            group=CONTRAST,
            help="Passes before the ensemble teaches the heads; -1 at once; without it, never.",
            **_COUNT,
        ),
        _option(
            "--distillation", group=CONTRAST, help="What teacher scores do.  [m3]", **_choice("m3", "kl")
        ),
        _option("--term-bases", group=CONTRAST, help="Of a k-mer of the sparse head.  [9]", **_COUNT),
        _option("--vector-width", group=CONTRAST, help="Of multi-vector vectors.", **_COUNT),
        _option("--vector-window", group=CONTRAST, help="Tokens a vector.  [8]", **_COUNT),
    )


def _recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    return _decorated(
        function,
        _option("--max-epochs", group=RECIPE, help="Without it, 20, 10 or 3, by the data.", **_COUNT),
        _option("--max-steps", group=RECIPE, help="Optimizer steps, whatever the epochs.", **_COUNT),
        _option("--rows-per-device", group=RECIPE, help="Rows of a batch.  [16]", **_COUNT),
        _option("--accumulation-steps", group=RECIPE, help="Batches a step.  [1]", **_COUNT),
        _option(
            "--micro-batch",
            group=RECIPE,
            help="Contrastive: rows encoded at a time, the gradient that of the batch.",
            **_COUNT,
        ),
        _option("--learning-rate", group=RECIPE, help="Without it, by tuning and width.", **_NUMBER),
        _option("--head-learning-rate", group=RECIPE, help="Without it, 1e-3 at least.", **_NUMBER),
        _option(
            "--schedule",
            group=RECIPE,
            help="After the warm-up.  [cosine]",
            **_choice("cosine", "linear", "constant", "plateau"),
        ),
        _option("--warmup-fraction", group=RECIPE, help="Share of the steps.  [0.1]", **_SHARE),
        _option("--weight-decay", group=RECIPE, help="On matrices.  [0.01]", **_NUMBER),
        _option("--max-grad-norm", group=RECIPE, help="Clip gradients to this norm.  [1]", **_NUMBER),
        _option("--metric", group=RECIPE, help="What stops training; without it, the task's.", **_NAME),
        _option("--patience", group=RECIPE, help="Evaluations without a better one.  [3]", **_COUNT),
        _option("--min-epochs", group=RECIPE, help="Not before these.  [1]", **_COUNT),
        _option("--eval-steps", group=RECIPE, help="Without it, an epoch.", **_COUNT),
        _option("--logging-steps", group=RECIPE, help="Steps between lines.  [10]", **_COUNT),
        _option("--pad-to-multiple-of", group=RECIPE, help="Padded lengths.  [1]", **_COUNT),
        _option("--mixed-lengths", group=RECIPE, help="Random rows in a batch.", **_FLAG),
        _option(
            "--dtype",
            group=RECIPE,
            help="Of matrix products.  [auto]",
            **_choice("auto", "float32", "bfloat16"),
        ),
        _option("--seed", group=RECIPE, help="Decides about all chance.  [0]", **_COUNT),
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
@_option("--resume", group=RUN, is_flag=True, default=False, help="Go on from DIR's newest checkpoint.")
@_option("--overwrite", group=RUN, is_flag=True, default=False, help="Start again; drop the run in DIR.")
@_option("--threads", group=RUN, help="CPU threads; without it, torch decides.", **_COUNT)
@reporting_options
def command(train: tuple[str, ...], output_dir: str, **options: Any) -> None:
    """Fine-tune a model on TRAIN: tables with sequences and labels (TSV, CSV, JSON lines, Parquet), sequence
    files with a table of labels, sequence files alone, or JSON lines with query, pos and neg.

    DIR gets checkpoints, metrics.jsonl, finetune.json and, at the end, the folder 'final', which extract and
    predict take. Standard output gets that folder's name; standard error a line every few steps and the
    metrics. Ctrl-C saves a checkpoint.
    """
    given: dict[str, Any] = {key: None if value == () else value for key, value in options.items()}
    try:
        report = genoembed.finetune(train or None, output_dir, **given)
    except KeyboardInterrupt as stop:
        if not str(stop):
            raise
        click.echo(f"Interrupted: {stop} (--resume)", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    for side, metrics in (("validation", report.validation), ("test", report.test)):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name not in _NOT_SHOWN)
        if shown:
            _logger.info("%s: %s", side, shown)
    _logger.info("%d steps, weights of step %d", report.steps, report.best_step)
    click.echo(report.output)


_NOT_SHOWN = ("epoch", "step", "ranked_queries")
