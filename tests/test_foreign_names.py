"""Words of other toolkits: each stands for an option that there is, and is answered wherever it is typed."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from genoembed.cli import COMMANDS, main
from genoembed.config.finetune import FinetuneOptions, finetune_config
from genoembed.config.foreign import FOREIGN, NOT_OPTIONS, TABLES
from genoembed.config.pretrain import PretrainOptions
from genoembed.errors import ConfigError


def option_keys() -> set[str]:
    """Keys of all commands, and of their public calls."""
    found = set()
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        found |= {parameter.name for parameter in command.params}
        found |= {word.lstrip("-").replace("-", "_") for p in command.params for word in p.opts}
    return found


def test_every_word_of_other_toolkits_stands_for_an_option_there_is_and_a_value_it_takes():
    keys = option_keys()
    described = FinetuneOptions.options() | PretrainOptions.options()
    assert len(FOREIGN) > 120
    for word, answers in FOREIGN.items():
        for answer in answers:
            assert answer.key in keys, (word, answer)
            if answer.value:
                option = described[answer.key]
                assert answer.value in (option.choices or ("False",)), (word, answer)
    assert sum(map(len, TABLES.values())) == len(FOREIGN), "a word stands in two tables"
    assert not set(NOT_OPTIONS) & (set(FOREIGN) | set(FinetuneOptions.options()))


ASKED = {
    "transformers": "per_device_train_batch_size num_train_epochs gradient_accumulation_steps fp16 bf16 "
    "lr_scheduler_type warmup_ratio save_steps evaluation_strategy metric_for_best_model deepspeed",
    "FlagEmbedding": "query_max_len passage_max_len negatives_cross_device sentence_pooling_method "
    "normlized normalize_embeddings fix_encoder use_self_distill sub_batch_size knowledge_distillation",
    "BCEmbedding": "pooler normalize_to_unit use_fp16",
}


@pytest.mark.parametrize("source", ASKED)
def test_words_that_people_type_are_answered_on_the_command_line_and_in_files(source, tmp_path):
    """None of them by the nearest spelling, which may be something else."""
    for word in ASKED[source].split():
        result = CliRunner().invoke(main, ["finetune", "a.tsv", f"--{word.replace('_', '-')}", "1"])
        assert result.exit_code == 2
        (said,) = [line for line in result.stderr.splitlines() if "is not an option" in line]
        assert "did you mean" not in said
        in_words = word in NOT_OPTIONS
        assert in_words != ("here that is '--" in said), said
        file = tmp_path / "run.toml"
        file.write_text(f"[recipe]\n{word} = 1\n")
        result = CliRunner().invoke(
            main, ["finetune", "a.tsv", "--config", str(file), "-o", str(tmp_path / "o")]
        )
        assert f"run.toml: '{word}' is not an option; " in result.stderr
        assert "did you mean" not in result.stderr


def test_docs_name_the_words_that_are_answered():
    text = (Path(__file__).parents[1] / "docs" / "FINETUNING.md").read_text()
    section = text.partition("## Coming from other toolkits")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:4] for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) > 20
    for words, here, source in rows:
        for word in re.findall(r"`(\w+)`", words):
            answer = FOREIGN[word][0] if word in FOREIGN else None
            named = re.findall(r"`([^`]+)`", here)
            assert answer is None or any(a.key == named[0].partition("=")[0] for a in FOREIGN[word]), word
            assert answer is not None or word in NOT_OPTIONS, word
            assert answer is None or answer.source in source, word


def test_a_key_in_the_wrong_section_is_told_its_own(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("recipe:\n  pooling: max\ndata:\n  train: [a.tsv]\n  num_train_epochs: 3\n")
    with pytest.raises(ConfigError) as caught:
        finetune_config({"task": "regression"}, file=file)
    assert caught.value.problems == (
        f"{file}: 'pooling' is not an option of 'recipe'; move it to 'encoder'",
        f"{file}: 'num_train_epochs' is not an option; here that is 'max_epochs'",
    )


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "train: [a.tsv\n", r"a\.yaml: not YAML \(.*line 2"),
        ("a.toml", "train = [\n", r"a\.toml: not TOML \("),
        ("a.yaml", "- train\n", r"a\.yaml: list, expected keys and values; write an object"),
        ("a.yaml", "recipe: 3\n", r"a\.yaml: 'recipe' is a section, expected keys and values in it, found 3"),
        ("a.yaml", "patience: {a: 1}\n", r"patience is \{'a': 1\}; set patience to a whole number"),
    ],
)
def test_files_that_cannot_be_read_are_named_with_what_is_wrong(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        finetune_config({"task": "regression", "train": "a.tsv"}, file=tmp_path / name)
