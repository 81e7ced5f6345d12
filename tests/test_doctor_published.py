"""The doctor on a published model: each known vector is met or missed, and other revisions are named.

The vectors here are made up: computed from a golden folder with plain transformers.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoTokenizer, EsmModel

from genoembed.cli import main
from genoembed.doctor import checks, run
from genoembed.doctor.run import run_doctor
from genoembed.errors import ConfigError, ModelError
from genoembed.models.geneb import KnownAnswer, known_answers, published_models, published_named

FOLDER = Path(__file__).parent / "golden" / "families" / "nt_v1"
SEQUENCES = ("ACGTNACGTNACGTN", "TTGACGATACCAGGCATCGATTACAT")
COMMIT, OTHER = "a" * 40, "b" * 40


def hidden_states(sequence):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = EsmModel.from_pretrained(FOLDER, add_pooling_layer=False).eval()
    with torch.inference_mode():
        return model(**tokenizer(sequence, return_tensors="pt")).last_hidden_state[0]


def answers(change=0.0, num_tokens=None):
    found = []
    for sequence in SEQUENCES:
        vector = hidden_states(sequence).mean(0)
        vector[3] += change * vector.abs().max()
        found.append(
            KnownAnswer(
                sequence=sequence, revision=COMMIT, num_tokens=num_tokens, values=tuple(vector.tolist())
            )
        )
    return tuple(found)


@pytest.fixture
def known(monkeypatch):
    def know(*given):
        for module in (run, checks):
            monkeypatch.setattr(module, "known_answers", lambda _title: given)

    return know


def fetched(tmp_path, commit):
    """Lay the folder out as the hub's cache has it."""
    return shutil.copytree(FOLDER, tmp_path / "models--x--y" / "snapshots" / commit)


def test_published_vectors_are_met(known):
    known(*answers())
    reported = []
    checks = run_doctor(model=str(FOLDER), known_as="nt-2.5b", on_check=reported.append)
    assert checks == reported
    assert [check.sequence for check in checks] == list(SEQUENCES)
    for check in checks:
        assert (check.passed, check.verdict, check.tolerance) == (True, "met", 1e-4)
        assert check.relative <= 1e-5
        assert check.cosine == pytest.approx(1)
        assert (check.revision, check.known_revision, check.is_known_revision) == (None, COMMIT, None)
        assert check.detail.startswith("met within ")
        assert check.detail.endswith("the folder names no revision, the vector is of aaaaaaaaaaaa")
    assert checks[0].name == "NT-2.5B-MS, ACGTNACGTNACGTN (15 bases)"
    assert checks[1].name == "NT-2.5B-MS, TTGACGATACCAGGC... (26 bases)"


def test_published_vectors_are_missed_with_the_difference(known):
    known(*answers(change=0.01))
    for check in run_doctor(model=str(FOLDER), known_as="nt-2.5b"):
        assert (check.passed, check.verdict) == (False, "missed")
        assert check.relative == pytest.approx(0.01, rel=0.02)
        assert check.detail.startswith(f"missed: the largest difference is {check.absolute:.1e} (relative ")
    assert all(c.passed for c in run_doctor(model=str(FOLDER), known_as="nt-2.5b", tolerance=0.02))


@pytest.mark.parametrize(("change", "verdict"), [(0.0, "met"), (0.5, "missed")])
def test_other_revision_is_named_and_compared_anyway(change, verdict, known, tmp_path):
    known(*answers(change))
    for check in run_doctor(model=str(fetched(tmp_path, OTHER)), known_as="nt-2.5b"):
        assert (check.verdict, check.passed, check.is_known_revision) == (verdict, verdict == "met", False)
        assert check.detail.startswith(verdict)
        assert check.detail.endswith(
            "other revision: the weights are of bbbbbbbbbbbb, the vector is of aaaaaaaaaaaa"
        )


def test_recorded_revision_is_recognized_in_the_cache_and_in_a_folder_of_ones_choice(known, tmp_path):
    known(*answers())
    chosen = shutil.copytree(FOLDER, tmp_path / "chosen")
    note = chosen / ".cache" / "huggingface" / "download" / "config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{COMMIT}\netag\n1700000000.0\n")
    for folder in (fetched(tmp_path, COMMIT), chosen):
        for check in run_doctor(model=str(folder), known_as="nt-2.5b"):
            assert (check.verdict, check.is_known_revision, check.revision) == ("met", True, COMMIT)
            assert check.detail.endswith("; revision aaaaaaaaaaaa as recorded")


def test_other_tokens_and_widths_are_missed(known):
    right = answers()[0]
    known(
        dataclasses.replace(right, num_tokens=99),
        dataclasses.replace(right, values=right.values[:-1]),
    )
    tokens, width = run_doctor(model=str(FOLDER), known_as="nt-2.5b")
    assert tokens.detail.startswith("missed: the tokenizer gives 16 tokens, expected 99 (")
    num_values = len(right.values)
    assert width.detail.startswith(f"missed: the vector has {num_values} values, expected {num_values - 1} (")


def test_pooling_and_special_tokens_are_those_of_the_published_vector(known, monkeypatch):
    states = hidden_states(SEQUENCES[1])
    rules = dataclasses.replace(published_named("nt-2.5b"), pooling="cls")
    monkeypatch.setattr(run, "published_named", lambda _name: rules)
    first = KnownAnswer(
        sequence=SEQUENCES[1], revision=COMMIT, num_tokens=None, values=tuple(states[0].tolist())
    )
    known(first)
    assert [check.verdict for check in run_doctor(model=str(FOLDER), known_as="nt-2.5b")] == ["met"]
    rules = dataclasses.replace(rules, adds_special_tokens=False)
    assert [check.verdict for check in run_doctor(model=str(FOLDER), known_as="nt-2.5b")] == ["missed"]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("nt_v2", "nt-v2-50m"),
        ("dnabert2", "dnabert-2"),
        ("dnabert2", "dnabert-s"),
        ("hyenadna", "hyenadna-large-1m"),
    ],
)
def test_vectors_of_the_official_code_are_met_by_the_rules_of_the_table(family, name, known):
    folder = FOLDER.with_name(family)
    states = load_file(folder / "outputs.safetensors")
    inputs = json.loads((folder / "inputs.json").read_text())
    model, given = published_named(name), []
    for key in ("len7", "len37", "with_n"):
        final_LD = states[f"{key}.final"]
        if not model.adds_special_tokens:  # the last of them, which no token before it sees
            final_LD = final_LD[:-1]
        vector = final_LD[0] if model.pooling == "cls" else final_LD.mean(0)
        values, num_tokens = tuple(vector.tolist()), len(final_LD)
        given.append(KnownAnswer(sequence=inputs[key], revision=COMMIT, num_tokens=num_tokens, values=values))
    known(*given)
    assert [check.verdict for check in run_doctor(model=str(folder), known_as=name)] == ["met"] * 3


def test_command_says_met_and_missed_and_its_exit_code_follows(known):
    right, wrong = answers()[0], answers(change=0.1)[1]
    words = ["doctor", "--model", str(FOLDER), "--as", "nt-2.5b"]
    known(right)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("ok      NT-2.5B-MS, ACGTNACGTNACGTN (15 bases): met within ")
    known(right, wrong)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "FAILED  NT-2.5B-MS, TTGACGATACCAGGC... (26 bases): missed: " in result.stdout
    result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)["checks"]
    assert [check["verdict"] for check in found] == ["met", "missed"]
    assert {"absolute", "relative", "cosine", "tolerance", "revision", "known_revision"} <= set(found[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": str(FOLDER)},
            "nothing says which published model this folder holds; set known_as to one of ",
        ),
        (
            {"model": str(FOLDER), "known_as": "dnabert2"},
            "known_as is 'dnabert2', .* did you mean 'dnabert-2'",
        ),
        ({"model": "dnabert2"}, "model is 'dnabert2', .* did you mean 'dnabert-2'"),
        ({"known_as": "dnabert-2"}, "known_as is 'dnabert-2', but no model is named; set model to"),
        ({"tolerance": 0.1}, "tolerance is 0.1, but it is for published vectors; set model to one"),
        ({"model": str(FOLDER), "known_as": "nt-2.5b", "tolerance": -1.0}, "tolerance is -1"),
    ],
)
def test_what_cannot_be_tested_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        run_doctor(**options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("enformer", r"'enformer': Enformer is not run here \(own architecture"),
        ("nt-2.5b", r"no vectors of NT-2.5B-MS are known; they are of .*dnabert-2"),
    ],
)
def test_models_without_known_vectors_are_refused(name, message):
    with pytest.raises(ModelError, match=message):
        run_doctor(model=str(FOLDER), known_as=name)


def test_rules_of_every_published_vector_can_be_followed():
    """Those of a model that runs: nothing in front, a state and a pooling that the doctor knows."""
    with_vectors = [model for model in published_models() if model.is_run and known_answers(model.title)]
    assert len(with_vectors) == 15
    for model in with_vectors:
        assert (model.state, model.prefix, model.trim) == ("final", "", 0)
        assert model.pooling in ("mean", "cls")
        assert model.pools_special_tokens or not model.adds_special_tokens
