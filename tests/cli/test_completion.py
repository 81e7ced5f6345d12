"""Completion in a shell, by click's own protocol."""

from __future__ import annotations

import pytest

from genoembed.cli import main


@pytest.fixture
def complete(monkeypatch, capsys):
    """Return what bash is offered behind some words."""

    def run(*words: str) -> list[str]:
        monkeypatch.setenv("_GENOEMBED_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", " ".join(("genoembed", *words)))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        with pytest.raises(SystemExit) as end:
            main(prog_name="genoembed")
        assert end.value.code == 0
        return capsys.readouterr().out.split()

    return run


def test_commands_and_options_are_completed(complete):
    assert complete("mod") == ["plain,models"]
    assert complete("extract", "--mod") == ["plain,--model"]


@pytest.mark.parametrize("words", [("extract", "--model"), ("doctor", "--model"), ("layers",)])
def test_names_of_models_are_completed(words, complete):
    assert complete(*words, "evo2_7b_") == [
        "plain,evo2_7b_base",
        "plain,evo2_7b_262k",
        "plain,evo2_7b_microviridae",
    ]
    assert complete(*words, "dnab") == ["plain,dnabert-s", "plain,dnabert-2"]
    assert "plain,genoembed-mini" in complete(*words, "")


def test_what_is_no_name_is_completed_as_a_path(complete):
    assert complete("extract", "--model", "./mine") == ["file,./mine"]
