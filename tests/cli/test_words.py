"""What commands say to people: one style of help over all of them, plain words, and no Python in messages."""

from __future__ import annotations

import re

import click
import pytest

from genoembed.cli import COMMANDS, SECTIONS, main
from genoembed.errors import _install_command


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({}, "python -m pip install 'genoembed[analysis]'"),
        ({"url": "file:///gone", "dir_info": {}}, "python -m pip install 'genoembed[analysis]'"),
        (
            {"url": "https://host.org/a.git", "vcs_info": {"vcs": "git", "commit_id": "1a2b"}},
            "python -m pip install 'genoembed[analysis] @ git+https://host.org/a.git@1a2b'",
        ),
        (
            {"url": "https://host.org/genoembed-1-py3-none-any.whl", "archive_info": {}},
            "python -m pip install 'genoembed[analysis] @ https://host.org/genoembed-1-py3-none-any.whl'",
        ),
    ],
)
def test_missing_extra_is_installed_from_where_the_package_came(record, expected, tmp_path):
    assert _install_command("analysis", record, imported_from=tmp_path) == expected


def test_missing_extra_is_installed_from_the_clone(tmp_path):
    clone = tmp_path / "my clone"
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    record = {"url": clone.as_uri(), "dir_info": {"editable": False}}
    assert _install_command("search", record, imported_from=tmp_path) == (
        f"python -m pip install '{clone}[search]'"
    )
    (clone / "constraints.txt").touch()
    assert _install_command("search", {}, imported_from=clone) == (
        f"python -m pip install -c '{clone}/constraints.txt' -e '{clone}[search]'"
    )


def commands() -> dict[str, click.Command]:
    context = click.Context(main)
    found = {name: main.get_command(context, name) for name in COMMANDS}
    return {name: command for name, command in found.items() if command is not None}


def options() -> dict[str, list[tuple[str, click.Option]]]:
    """All options by their long name, each with the commands that have it."""
    found: dict[str, list[tuple[str, click.Option]]] = {}
    for name, command in commands().items():
        for option in command.params:
            if isinstance(option, click.Option):
                found.setdefault(max(option.opts, key=len), []).append((name, option))
    return found


def sentence(option: click.Option) -> str:
    """The first sentence of an option's help, without the case that it is for."""
    text = re.sub(r"^(For|With) [^:]*: ", "", (option.help or "").partition("  [")[0])
    return re.split(r"\. |: |; |\.$", text)[0].removesuffix(".").lower()


OTHER_SENTENCE = {
    "--both-strands": "pretraining draws a strand, fine-tuning compares both",
    "--components": "of a transform, or of a map",
    "--contrast": "how pairs are formed, or the weight of a loss in pretraining",
    "--dtype": "of matrix products in training; of weights alone in a folder",
    "--feature": "which features are embedded, or changed",
    "--flank": "of a region, or of a change",
    "--layer": "of a model, or of a file",
    "--method": "of a transform, or of a map",
    "--metric": "of a search, or of training",
    "--mode": "of retrieval heads, or of a search",
    "--model": "a name to load, the model of a file, a run that goes on, or what is tested",
    "--on-error": "records, queries and prompts fail for other reasons",
    "--output": "what is written differs",
    "--overwrite": "of a file, a folder or a run",
    "--rc": "scores are no vectors: they are not concatenated",
    "--regions": "which bases are embedded or changed; or where the files are now",
    "--resume": "a run of training continues only if told to",
    "--split": "how rows are divided, or a table that says it",
    "--split-column": "two or three splits",
    "--task": "of training, or of labels",
    "--temperature": "of a loss, or of sampling",
    "--window": "tokens of a row, or bases of a window",
}
"""Options whose first sentence differs between commands, and why."""

OTHER_VALUE = {
    "--contrast": "how pairs are formed, or the weight of a loss in pretraining",
    "--invalid": "a server does not skip",
    "--normalize": "training has a third choice: as the model was trained",
    "--keep-case": "predict has a third choice: as in training",
    "--layer": "a matrix of a file has a name; layers of a model are also numbers and patterns",
    "--method": "of a transform, or of a map",
    "--metric": "of a search, or of training",
    "--mode": "of retrieval heads, or of a search",
    "--output": "a file, or a folder",
    "--pool": "training and scores need one vector; scores have no pooling of their own",
    "--rc": "scores are no vectors: they are not concatenated",
    "--regions": "places in the input, or the files that hold them",
    "--split": "how rows are divided, or a table that says it",
    "--task": "of training, or of labels",
    "--window": "tokens, or bases",
}
"""Options whose values differ between commands, and why."""


def test_options_of_one_name_have_one_sentence_in_all_helps():
    differ = {name for name, found in options().items() if len({sentence(option) for _, option in found}) > 1}
    assert differ == set(OTHER_SENTENCE)


def test_options_of_one_name_take_one_kind_of_value():
    """The same letters, flag or not, metavar and type; the choices of a type as well."""

    def value(command: click.Command, option: click.Option) -> tuple[object, ...]:
        metavar = "" if option.is_flag else option.make_metavar(click.Context(command))
        return metavar, type(option.type), option.is_flag, tuple(option.secondary_opts)

    differ = {
        name
        for name, found in options().items()
        if len({value(commands()[command], option) for command, option in found}) > 1
    }
    assert differ == set(OTHER_VALUE)
    for found in options().values():
        assert len({tuple(option.opts) for name, option in found if "--output" not in option.opts}) <= 1


RUNS_A_MODEL = {"extract", "search", "probe", "verify", "score", "generate", "predict", "serve"}
TRAINS = {"pretrain", "finetune"}
READS_OPTIONS_FROM_A_FILE = RUNS_A_MODEL | TRAINS | {"plot"}


@pytest.mark.parametrize("name", COMMANDS)
def test_shared_options_are_everywhere_they_make_sense(name):
    found = {word for parameter in commands()[name].params for word in parameter.opts}
    assert {"-q", "--quiet", "-v", "--verbose", "--json", "--help-all"} <= found
    assert ("--config" in found) is (name in READS_OPTIONS_FROM_A_FILE)
    assert ("--threads" in found) is (name in RUNS_A_MODEL | TRAINS)
    # each process of a training run takes a GPU of its own; doctor tests a device, in seconds
    assert ("--device" in found) is (name in RUNS_A_MODEL | {"doctor"})


@pytest.mark.parametrize("name", COMMANDS)
def test_first_screen_has_usage_purpose_and_examples(name, cli):
    lines = cli(name, "--help").stdout.splitlines()[:24]
    assert lines[0].startswith(f"Usage: genoembed {name} [OPTIONS]")
    assert lines[2].startswith("  ")
    assert lines[2].strip()
    examples = lines.index("  Examples:")
    assert lines[examples + 1].startswith("    ")


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("search", "q.fa", "--against", "a.h5", "--neighbours", "3"), "did you mean '--neighbors'?"),
        (("plot", "a.h5", "--colour", "length"), "did you mean '--color'?"),
        (("fit-transform", "a.h5", "-o", "b.h5", "--method", "centre"), "did you mean 'center'?"),
        (("finetune", "a.tsv", "--task", "token", "-o", "b", "--kin-identity", ".8"), "'--homolog-identity'"),
        (("finetune", "a.tsv", "--task", "token", "-o", "b", "--one-strand"), "'--no-both-strands'"),
        (("finetune", "a.tsv", "--task", "token", "-o", "b", "--device", "cpu"), "set CUDA_VISIBLE_DEVICES"),
    ],
)
def test_old_and_british_spellings_are_answered(words, answer, cli):
    result = cli(*words)
    assert result.exit_code == 2
    assert answer in result.stderr


BRITISH = r"colour|neighbour|centre|normalis|labell|initialis|optimis|behaviour|favour|licence|grey\b"
RIDDLES = r"\b(kin|kinship|mend|dear|rights|stretch|laid|wants?|refuse[sd]?)\b|what (is|are|learns|trains)\b"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_plain_american_english(name, cli):
    text = " ".join(cli(name, "--help-all").stdout.split())
    assert re.findall(BRITISH, text) == []
    assert re.findall(RIDDLES, text, flags=re.IGNORECASE) == []
    for parameter in commands()[name].params:
        if isinstance(parameter, click.Option):
            said = (parameter.help or "").partition("  [")[0]
            assert said.endswith((".", "...")), said
            assert said[0].isupper() or said.split(":")[0] in BEGINS_LOWER, said


BEGINS_LOWER = {"mean", "center", "geneb", "balanced"}
"""Values with which a help text may begin."""


def test_every_command_has_one_place_in_the_help(cli):
    named = [name for names in SECTIONS.values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) >= set(COMMANDS)
    text = cli("--help").stdout.partition("--help  Show")[2]
    assert re.findall(r"^  ([a-z-]+)  +[A-Z]", text, flags=re.M) == [n for n in named if n in COMMANDS]
    assert "..." not in text.replace("csv, ...", "")  # no line is cut
    assert "No such command 'extarct'; did you mean 'extract'?" in cli("extarct", "a.fa").stderr
