"""Which options there are: a new one is a decision, written down here and in docs/CLI.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import click
import pytest

from genoembed import __version__
from genoembed.cli import COMMANDS, main
from genoembed.cli.options import CONFIG_FILE_OPTIONS, SHORT_HELP_OPTIONS
from genoembed.cli.reference import with_tables
from genoembed.config.choices import (
    ComputeDtype,
    DuplicatePolicy,
    EmptyPolicy,
    Engine,
    FailurePolicy,
    Fp8Choice,
    Fusion,
    GapPolicy,
    InvalidPolicy,
    Pooling,
    RegionPolicy,
    StorageDtype,
    Strands,
)
from genoembed.config.embed import OPTION_STAGE, EmbedConfig

DOCS = Path(__file__).parents[2] / "docs" / "CLI.md"
MESSAGES = {"-q", "--quiet", "-v", "--verbose", "--json"}
OPTIONS = {
    "extract": """
        --bad-regions --batch-tokens --carry-state --certificate --config --device --dry-run --dtype
        --duplicates --empty --engine --feature --flank --fp8 --fuse --fusion-weights --gaps --import
        --invalid --join-by --keep-case --layer --model --name-attribute -o --on-error --out-dtype --output
        --overwrite --per-window --pool --ray-address --rc --regions --resume --revision --shard
        --skip-first --stride --threads --trust-remote-code --unit-bases --window --workers""",
    "merge": """
        --overwrite""",
    "subset": """
        --ids -o --output --overwrite --where""",
    "join": """
        -o --output --overwrite""",
    "annotate": """
        -o --output --overwrite""",
    "layers": """
        --all --import --revision --trust-remote-code""",
    "models": "",
    "info": "",
    "convert": """
        --name -o --output --overwrite --vortex-config""",
    "pretrain": """
        --distributed
        --accumulation-steps --both-strands --compile-blocks --config --contrast --contrast-layer
        --contrast-rows --dtype --empty --eval-steps --gaps --kmer-codes --kmer-size
        --gradient-checkpointing --heldout --heldout-fraction --heldout-rows --hidden-size --import
        --invalid --isolate --layers --learning-rate --like --logging-steps --max-document-bp
        --max-grad-norm --max-steps --model --n-run-bp --no-both-strands -o --optim --output --overwrite
        --packing --pole-rate-scale --report-to --resume --revision --rows-per-device --save-steps --seed
        --shuffle-documents --teacher --teacher-weight --threads --trust-remote-code --warmup-steps
        --weight-decay --window""",
    "finetune": """
        --distributed
        --accumulation-steps --across-devices --add-pooler --both-strands --class-weights --config
        --conflicts --contrast --crop-fraction --distance --distillation --dropout --dtype
        --duplicate-sequences --duplicates --empty --eval-steps --false-negatives --fuse --gaps
        --gradient-checkpointing --group-column --head-learning-rate --homolog-identity --homologs
        --id-column --ignore-label --import --in-batch-negatives --invalid --keep-case --label-column
        --label-delimiter --label-smoothing --labels --last-n --layer --learning-rate --logging-steps
        --lora-alpha --lora-dropout --lora-rank --lora-target --margin --max-crop-bp --max-epochs
        --max-grad-norm --max-steps --metric --micro-batch --min-epochs --min-learning-rate
        --mixed-lengths --mode --model --mutation-rate --no-add-pooler --no-both-strands
        --no-in-batch-negatives --no-normalize --normalize -o --optim --output --overwrite
        --pad-to-multiple-of --patience --plateau-factor --plateau-patience
        --pool --report-to --resume --reverse-complement --revision --rows-per-device --schedule --scope
        --seed --self-distillation-start --sequence-column --several-bases --skip-first --split
        --split-column --task --temperature --term-bases --test --test-fraction --threads
        --train-group-size --trust-remote-code --tuning --unlabeled --validation --validation-fraction
        --vector-width --vector-window --view-crop-fraction --view-mutation-rate --view-reverse-complement
        --warmup-fraction --warmup-steps --weight-decay""",
    "predict": """
        --batch-rows --config --device --duplicates --empty --format --gaps --import --invalid --keep-case
        --no-keep-case --on-error -o --output --overwrite --threads --trust-remote-code""",
    "search": """
        --against --approximate --batch-tokens --center --compare-sequences --config --depth --device
        --dtype --duplicates --effort --empty --exclude-self --fp8 --gaps --hybrid-weights --import --index
        --invalid -k --kmer-size --layer --measure-recall --metric --mode --model --neighbors --no-center
        --no-compare-sequences --on-error -o --output --overwrite --search-threads --seed
        --subject-sequences --threads --transform --trust-remote-code""",
    "fit-transform": """
        --axes --components --layer --method -o --output --overwrite --seed --shrinkage""",
    "probe": """
        --bad-regions --baselines --batch-tokens --carry-state --config --cv --device --dtype --duplicates
        --empty --feature --flank --fp8 --gaps --group-column --homolog-identity --id-column --import
        --invalid --join-by --keep-case --label-column --labels --layer --model --name-attribute
        --no-baselines --no-plot --no-untrained --num-folds -o --on-error --output --overwrite
        --plot --pool --preset --rc --regions --revision --seed --sequences --skip-first --split
        --split-column --stride --task --threads --top --transform --trust-remote-code --unit-bases
        --unmatched --untrained --window""",
    "plot": """
        --classes --color --components --config --layer --max-points --method --min-dist
        -o --output --overwrite --perplexity --seed --theme --title --transform --umap-neighbors --values""",
    "compare": """
        --layer -o --output --overwrite --tolerance""",
    "verify": """
        --batch-tokens --certify --config --device --dtype --fp8 --import --model --regions --sample
        --seed --threads --tolerance --trust-remote-code""",
    "export": """
        --layer -o --output --overwrite --to""",
    "export-model": """
        --dtype --import -o --output --overwrite --revision --trust-remote-code""",
    "score": """
        --bad-regions --batch-tokens --carry-state --config --device --dtype --duplicates --empty --feature
        --flank --fp8 --gaps --heat-map --import --invalid --join-by --keep-case --layer --matrix
        --model --mutagenesis --name-attribute -o --on-error --output --overwrite --per-base --pool
        --rc --reference --regions --revision --start-token --stride --threads --trust-remote-code
        --unsupported --vcf --vectors --window""",
    "generate": """
        --batch-rows --batch-tokens --cache --config --device --dtype --duplicates --empty --fp8 --gaps
        --import --invalid --keep-case --length --model -n --no-cache --no-stop-at-end --num-samples -o
        --on-error --output --overwrite --revision --seed --start-token --stop-at-end --tag --temperature
        --threads --top-k --top-p --trust-remote-code --with-prompt""",
    "serve": """
        --batch-tokens --carry-state --config --device --dry-run --dtype --fp8 --fuse --fusion-weights --gaps
        --host
        --import --invalid --keep-case --layer --max-bases --max-body --max-inputs --max-queue --model
        --normalize --pool --port --rc --revision --skip-first --stride --threads --transform
        --trust-remote-code --window""",
    "doctor": """
        --as --device --model --revision --tolerance""",
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
    "bad_regions": RegionPolicy,
    "dtype": ComputeDtype,
    "fp8": Fp8Choice,
    "out_dtype": StorageDtype,
}


def command(name: str) -> click.Command:
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


def test_commands_are_these():
    assert set(COMMANDS) == set(OPTIONS)
    assert main.list_commands(click.Context(main)) == list(COMMANDS)


def options(name: str) -> list[click.Option]:
    return [parameter for parameter in command(name).params if isinstance(parameter, click.Option)]


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_these(name):
    messages = {"--help-all"} | MESSAGES
    found = {word for option in options(name) for word in (*option.opts, *option.secondary_opts)}
    assert found == set(OPTIONS[name].split()) | messages


def test_extract_has_an_option_for_every_configuration_key_and_no_other():
    parameters = {parameter.name: parameter for parameter in command("extract").params}
    extra = {"imported", "as_json", "dry_run", "quiet", "verbose", "config_file", "help_all"}
    assert set(parameters) - extra == set(OPTION_STAGE)
    described = EmbedConfig.options()
    for key in set(OPTION_STAGE) - {"inputs"}:
        assert described[key].name in parameters[key].opts


def test_extract_choices_are_those_of_the_configuration():
    found = {
        p.name: tuple(p.type.choices) for p in command("extract").params if isinstance(p.type, click.Choice)
    }
    assert found == {key: get_args(alias) for key, alias in CHOICES.items()}


def test_finetune_help_is_short_and_help_all_is_whole(cli):
    short, whole = cli("finetune", "--help").stdout, cli("finetune", "--help-all").stdout
    shown = [option for option in options("finetune") if f"{option.opts[-1]} " in short]
    assert 12 <= len(shown) <= 18
    assert "--help-all shows all" in " ".join(short.split())
    assert len(options("finetune")) > 85
    assert [option.opts for option in options("finetune") if option.opts[-1] not in whole] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_short_help_is_the_whole_help_of_commands_with_few_options(name, cli):
    short, whole = cli(name, "--help").stdout, cli(name, "--help-all").stdout
    assert (short == whole) is (len(options(name)) < SHORT_HELP_OPTIONS)
    assert (CONFIG_FILE_OPTIONS < len(command(name).described)) is ("--config " in short)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_itself_with_an_example(name, cli):
    result = cli(name, "--help")
    assert result.exit_code == 0
    assert f"  genoembed {name}" in result.stdout.partition("Example")[2]
    assert len(re.findall(r"^    (genoembed|zcat) ", result.stdout, flags=re.M)) >= (
        2 if name == "extract" else 1
    )
    assert all(option.help for option in options(name))


def test_extract_help_says_what_an_integer_means_and_groups_its_options(cli):
    text = " ".join(cli("extract", "-h").stdout.split())
    assert "A number N means the output of block N" in text
    assert "in StripedHyena 2 models such as Evo 2 it means blocks.N.mlp.l3 (the output of the MLP)" in text
    groups = ("Input:", "Model:", "Vectors:", "Long sequences:", "Output:", "Messages and help:")
    assert [group for group in groups if group not in text] == []


def test_version_is_one_line(cli):
    assert cli("--version").stdout == f"genoembed {__version__}\n"


def test_reference_page_is_up_to_date():
    page = DOCS.read_text()
    assert with_tables(page) == page, "run python -m genoembed.cli.reference docs/CLI.md"


def test_docs_name_no_option_that_is_not_there():
    words = set(re.findall(r"`(--[a-z][a-z0-9-]*)", DOCS.read_text()))
    known = {word for listed in OPTIONS.values() for word in listed.split()}
    assert words <= known | MESSAGES | {"--help", "--help-all", "--version"}
    assert len(words) > 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stride", "9", "--window", "8"), "; set --stride to the window or less"),
        (("--fusion-weights", "0.2"), "--fuse is 'none'; add --fuse weighted"),
        (("--pool", "none", "--skip-first", "2"), "but --pool is 'none'; add --skip-first 0"),
        (("--threads", "0"), "threads is 0; set --threads to 1 or more"),
    ],
)
def test_remedy_is_spelled_as_an_option_on_the_command_line(options, message, cli, fasta):
    result = cli("extract", fasta, *options)
    assert result.exit_code == 1
    assert message in result.stderr


def test_existing_output_names_the_option_that_replaces_it(cli, fasta, tmp_path):
    (tmp_path / "x.h5").write_text("mine")
    result = cli("extract", str(fasta), "-o", str(tmp_path / "x.h5"))
    assert result.exit_code == 1
    assert "--overwrite" in result.stderr
