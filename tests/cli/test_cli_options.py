"""Which options there are: a new one is a decision, written down here and in docs/CLI.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import click
import pytest

from genoembed import __version__
from genoembed.cli import COMMANDS, main
from genoembed.cli.options import in_command_line_words, option_name
from genoembed.config.choices import (
    ComputeDtype,
    DuplicatePolicy,
    EmptyPolicy,
    Engine,
    FailurePolicy,
    Fusion,
    GapPolicy,
    InvalidPolicy,
    Pooling,
    StorageDtype,
    Strands,
)
from genoembed.config.embed import OPTION_STAGE

DOCS = Path(__file__).parents[2] / "docs" / "CLI.md"
MESSAGES = {"-q", "--quiet", "-v", "--verbose"}
OPTIONS = {
    "extract": {
        *("-o", "--output", "--overwrite", "--resume", "--out-dtype"),
        *("--on-error", "--unit-bases", "--certificate", "--shard", "--engine", "--workers", "--ray-address"),
        *(
            "--model",
            "--revision",
            "--trust-remote-code",
            "--dtype",
            "--device",
            "--batch-tokens",
            "--threads",
        ),
        *("--layer", "--pool", "--skip-first", "--fuse", "--fusion-weights", "--rc"),
        *("--window", "--stride", "--per-window"),
        *("--regions", "--flank", "--invalid", "--duplicates", "--empty", "--gaps", "--keep-case"),
        *("--dry-run", "--json", *MESSAGES),
    },
    "merge": {"--overwrite", "--json", *MESSAGES},
    "layers": {"--all", "--revision", "--trust-remote-code", "--json", *MESSAGES},
    "models": {"--json"},
    "info": {"--json"},
    "convert": {"-o", "--output", "--name", "--config", "--overwrite", *MESSAGES},
    "pretrain": {
        *("-o", "--output", "--config", "--resume", "--overwrite", "--threads"),
        *("--model", "--revision", "--trust-remote-code", "--like", "--hidden-size", "--layers"),
        *("--heldout", "--heldout-fraction", "--heldout-rows", "--packing", "--window", "--isolate"),
        *("--one-strand", "--n-run-bp", "--max-document-bp", "--shuffle-documents"),
        *("--invalid", "--empty", "--gaps"),
        *("--max-steps", "--rows-per-device", "--accumulation-steps", "--learning-rate"),
        *("--pole-rate-scale", "--warmup-steps", "--weight-decay", "--max-grad-norm", "--dtype"),
        *("--compile-blocks", "--gradient-checkpointing", "--seed"),
        *("--save-steps", "--eval-steps", "--logging-steps", *MESSAGES),
    },
    "finetune": {
        *("-o", "--output", "--resume", "--overwrite", "--threads", "--task", "--config", *MESSAGES),
        *("--class-weights", "--dropout", "--label-smoothing", "--labels", "--sequence-column"),
        *("--label-column", "--label-delimiter", "--ignore-label", "--id-column", "--unlabelled"),
        *("--several-bases", "--invalid", "--duplicates", "--empty", "--gaps", "--keep-case", "--repeats"),
        *("--conflicts", "--one-strand", "--false-negatives", "--validation", "--test", "--split"),
        *("--split-column", "--group-column", "--validation-fraction", "--test-fraction", "--homologs"),
        *("--kin-identity", "--model", "--revision", "--trust-remote-code", "--layer", "--pool"),
        *("--skip-first", "--fuse", "--add-pooler", "--tuning", "--last-n", "--lora-rank", "--lora-alpha"),
        *("--lora-dropout", "--lora-target", "--reverse-complement", "--crop-fraction", "--max-crop-bp"),
        *("--mutation-rate", "--contrast", "--temperature", "--scope", "--margin", "--distance"),
        *("--train-group-size", "--own-negatives-only", "--across-devices", "--view-mutation-rate"),
        *("--view-crop-fraction", "--view-reverse-complement", "--mode", "--self-distillation-start"),
        *("--distillation", "--term-bases", "--vector-width", "--vector-window", "--max-epochs"),
        *("--max-steps", "--rows-per-device", "--accumulation-steps", "--micro-batch", "--learning-rate"),
        *("--head-learning-rate", "--schedule", "--warmup-fraction", "--weight-decay", "--max-grad-norm"),
        *("--metric", "--patience", "--min-epochs", "--eval-steps", "--logging-steps"),
        *("--pad-to-multiple-of", "--mixed-lengths", "--dtype", "--seed"),
    },
    "predict": {
        *("-o", "--output", "--format", "--overwrite", "--batch-rows", "--device", "--threads"),
        *("--trust-remote-code", "--invalid", "--duplicates", "--empty", "--gaps", "--keep-case"),
        *MESSAGES,
    },
    "search": {
        *("--against", "-k", "--neighbors", "--metric", "--layer", "--exclude-self", "--transform"),
        *("--approximate", "--index", "--effort", "--measure-recall", "--search-threads"),
        *("--hybrid", "--hybrid-weights", "--depth", "--subject-sequences", "--model"),
        *("--trust-remote-code", "--invalid", "--duplicates", "--empty", "--gaps", "--dtype", "--device"),
        *("--threads", "-o", "--output", "--overwrite", *MESSAGES),
    },
    "fit-transform": {
        *("-o", "--output", "--overwrite", "--method", "--components", "--layer", "--axes", "--shrinkage"),
        *("--seed", "--json", *MESSAGES),
    },
    "probe": {
        *("--labels", "--task", "--id-column", "--label-column", "--unmatched", "--preset", "--split"),
        *("--split-column", "--cv", "--num-folds", "--group-column", "--kin-identity", "--seed"),
        *("--no-baselines", "--no-untrained", "--top", "--sequences", "--transform", "--model", "--revision"),
        *("--trust-remote-code", "--dtype", "--device", "--batch-tokens", "--threads", "--layer", "--pool"),
        *("--skip-first", "--rc", "--window", "--stride", "--regions", "--flank", "--invalid"),
        *("--duplicates", "--empty", "--gaps", "--keep-case", "--unit-bases", "-o", "--output"),
        *("--overwrite", "--no-plot", "--json", *MESSAGES),
    },
    "score": {
        *("--vcf", "--reference", "--rc", "--start-token", "-o", "--output", "--overwrite"),
        *("--per-base", "--window", "--stride", "--invalid", "--duplicates", "--empty", "--gaps"),
        *("--keep-case", "--flank", "--unsupported", "--layer", "--pool", "--vectors", "--model"),
        *("--revision", "--trust-remote-code", "--dtype", "--device", "--batch-tokens", "--threads"),
        *MESSAGES,
    },
    "plot": {
        *("-o", "--output", "--overwrite", "--title", "--color", "--values", "--classes", "--method"),
        *("--layer", "--transform", "--components", "--neighbors", "--min-dist", "--perplexity"),
        *("--max-points", "--seed", "--json", *MESSAGES),
    },
    "compare": {"--layer", "--tolerance", "-o", "--output", "--overwrite", "--json", *MESSAGES},
    "verify": {
        *("--sample", "--seed", "--tolerance", "--certify", "--regions", "--model"),
        *("--trust-remote-code", "--dtype", "--device", "--threads", "--batch-tokens", "--json", *MESSAGES),
    },
    "export": {"--to", "-o", "--output", "--overwrite", "--layer", "--json", *MESSAGES},
    "export-model": {
        *("-o", "--output", "--overwrite", "--dtype", "--revision", "--trust-remote-code"),
        *("--json", *MESSAGES),
    },
    "doctor": MESSAGES,
}
CHOICES = {
    "on_error": FailurePolicy,
    "engine": Engine,
    "pooling": Pooling,
    "fusion": Fusion,
    "rc": Strands,
    "invalid": InvalidPolicy,
    "duplicates": DuplicatePolicy,
    "empty": EmptyPolicy,
    "gaps": GapPolicy,
    "dtype": ComputeDtype,
    "out_dtype": StorageDtype,
}


def command(name: str) -> click.Command:
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


def test_commands_are_these():
    assert set(COMMANDS) == set(OPTIONS)
    assert main.list_commands(click.Context(main)) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_these(name):
    parameters = [parameter for parameter in command(name).params if isinstance(parameter, click.Option)]
    assert {word for parameter in parameters for word in parameter.opts} == OPTIONS[name]
    assert not any(parameter.secondary_opts for parameter in parameters)


def test_extract_has_an_option_for_every_configuration_key_and_no_other():
    parameters = {parameter.name: parameter for parameter in command("extract").params}
    assert set(parameters) - {"as_json", "dry_run", "quiet", "verbose"} == set(OPTION_STAGE)
    for key in set(OPTION_STAGE) - {"inputs"}:
        assert option_name(key) in parameters[key].opts


def test_extract_choices_are_those_of_the_configuration():
    found = {
        p.name: tuple(p.type.choices) for p in command("extract").params if isinstance(p.type, click.Choice)
    }
    assert found == {key: get_args(alias) for key, alias in CHOICES.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_itself_with_an_example(name, cli):
    result = cli(name, "--help")
    assert result.exit_code == 0
    assert f"  genoembed {name}" in result.stdout.partition("Example")[2]
    assert len(re.findall(r"^    (genoembed|zcat) ", result.stdout, flags=re.M)) >= (
        2 if name == "extract" else 1
    )
    for parameter in command(name).params:
        assert not isinstance(parameter, click.Option) or parameter.help


def test_extract_help_says_what_an_integer_means_and_groups_its_options(cli):
    text = " ".join(cli("extract", "-h").stdout.split())
    assert "An integer means blocks.N.mlp.l3 (the MLP's output) in StripedHyena 2 models" in text
    assert "the output of block N in all others" in text
    groups = ("Input:", "Model:", "What is taken:", "Long sequences:", "Output:", "Messages:")
    assert [group for group in groups if group not in text] == []


def test_version_is_one_line(cli):
    assert cli("--version").stdout == f"genoembed {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_docs_name_every_option(name):
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", DOCS.read_text(), flags=re.M | re.S)
    assert section is not None
    words = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", section.group(1)))
    assert OPTIONS[name] <= words
    assert f"genoembed {name}" in section.group(1)


def test_docs_name_no_option_that_is_not_there():
    words = set(re.findall(r"`(--[a-z][a-z-]*)", DOCS.read_text()))
    assert words <= set().union(*OPTIONS.values()) | {"--help", "--version"}
    assert len(words) > 30


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("pooling is 'men'; set pooling to one of mean", "pooling is --pool"),
        ("set skip_first to 0", "skip_first is --skip-first"),
        ("fusion_weights has 2 numbers for 3 layers; give one a layer", "fusion_weights is --fusion-weights"),
        ("read the code, then set trust_remote_code=True", "trust_remote_code is --trust-remote-code"),
        ("set overwrite or choose another output_dir", "output_dir is --output"),
    ],
)
def test_hint_names_the_option_of_a_key(message, hint):
    assert in_command_line_words(message) == f"{message} ({hint})"


@pytest.mark.parametrize(
    "message",
    [
        "window is 9, but the context is 8; set window to 8",
        "model 'x' has 3 layers",
        "no fusion of pooling here",
    ],
)
def test_hint_is_left_out_where_the_option_is_the_key_or_the_word_is_just_a_word(message):
    assert in_command_line_words(message) == message
