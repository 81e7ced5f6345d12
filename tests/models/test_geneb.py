"""The 40 models of the GENEB benchmark: the table is whole and true, and its short names resolve."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from genoembed.errors import ModelError, ModelNotFoundError
from genoembed.models import hub, locate
from genoembed.models.geneb import known_answers, published_in, published_models, published_named
from genoembed.models.load import load_model
from genoembed.models.locate import locate_model, model_content
from genoembed.models.names import suggestion
from genoembed.models.registry import known_models

FAMILIES = Path(__file__).parents[1] / "golden" / "families"
MODELS = published_models()


def test_table_has_the_forty_models_once_each():
    assert len(MODELS) == 40
    for values in ([m.name for m in MODELS], [m.title for m in MODELS]):
        assert len(set(values)) == 40
    repositories = [m.repo_id for m in MODELS if m.repo_id]
    assert len(set(repositories)) == len(repositories) == 34
    assert not {m.name for m in MODELS} & {m.name for m in known_models()}
    assert [m.num_parameters for m in MODELS] == sorted((m.num_parameters for m in MODELS), reverse=True)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_row_runs_or_says_why_not(model):
    assert model.is_run != bool(model.reason)
    assert model.tested
    assert model.width > 0
    if not model.is_run:
        assert not model.golden
        assert not model.has_golden_layout
        return
    assert model.repo_id
    assert model.revision
    assert len(model.revision) == 40
    assert model.state == "final"
    assert model.pooling in ("mean", "cls")
    assert model.golden or not model.has_golden_layout
    if model.class_name != "ours":
        assert hasattr(transformers, model.class_name)
    if model.golden:
        module = load_model(str(FAMILIES / model.golden)).module
        is_native = type(module).__module__.startswith("transformers.")
        assert (type(module).__name__ if is_native else "ours") == model.class_name


def test_known_answers_belong_to_rows_and_have_their_width():
    path = Path(locate.__file__).parent / "geneb" / "known_answers.jsonl"
    titles = [json.loads(line)["paper_name"] for line in path.read_text().splitlines()]
    assert set(titles) <= {model.title for model in MODELS}
    assert len(set(titles)) == 20
    assert len(titles) == 26
    for model in MODELS:
        answers = known_answers(model.title)
        assert len(answers) == titles.count(model.title)
        for answer in answers:
            assert len(answer.values) == model.width
            assert model.repo_id is None or answer.revision == model.revision


@pytest.mark.parametrize("name", ["nt-v2-50m", "NT-v2-50M-MS", "dnabert-2", "caduceus-ps-131k"])
def test_short_name_stands_for_its_repository(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    source = locate_model(name)
    assert (source.location, source.is_local) == (published_named(name).repo_id, False)
    assert source.published == published_in(source.location)
    assert source.revision_for("abc") == "abc"


def test_short_name_may_stand_for_a_branch_that_the_repository_alone_does_not():
    short, repository = locate_model("evo-1-131k"), locate_model("togethercomputer/evo-1-131k-base")
    assert (short.revision_for(None), repository.revision_for(None)) == ("1.1_fix", None)
    assert short.published is repository.published is published_named("evo-1-131k")


def test_local_folder_of_a_short_name_is_taken_with_a_word(tmp_path, monkeypatch, caplog):
    shutil.copytree(FAMILIES / "nt_v1", tmp_path / "dnabert-2")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        source = locate_model("dnabert-2")
    assert (source.is_local, source.published) == (True, None)
    assert "taken from the file or folder of that name, not from zhihan1996/DNABERT-2-117M" in caplog.text
    assert set(model_content("dnabert-2")) == set(model_content(str(FAMILIES / "nt_v1")))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("enformer", r"one-hot .*name EleutherAI/enformer-official-rough itself .*trust_remote_code"),
        ("janusdna-72-w", r"Harvard Dataverse\); choose another of genoembed models"),
    ],
)
def test_short_name_of_a_model_that_is_not_run_says_why(name, remedy):
    with pytest.raises(
        ModelError, match=rf"model '{name}': \S+ is not run here \(own architecture .*{remedy}"
    ):
        locate_model(name)


def test_near_misses_are_suggested():
    assert suggestion("dnabert2") == "did you mean 'dnabert-2' or 'dnabert-s'?"
    assert "'nt-v2-50m'" in suggestion("nt_v2_50m")
    assert "'hyenadna-large-1m'" in suggestion("hyenadna-large")
    assert "'evo2_7b'" in suggestion("evo2-7b")


def test_short_name_out_of_reach_says_what_to_download(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    monkeypatch.setattr(hub, "cached_file", lambda *_, **__: None)
    with pytest.raises(
        ModelNotFoundError, match=r"'dnabert-2': zhihan1996/DNABERT-2-117M is not in .*download"
    ):
        load_model("dnabert-2")
    with pytest.raises(ModelNotFoundError, match=r"'dnabert2': not found: .*did you mean 'dnabert-2'"):
        load_model("dnabert2")


def test_file_states_the_model_that_a_short_name_stands_for(monkeypatch):
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    monkeypatch.setattr(hub, "cached_file", lambda *_, **__: FAMILIES / "nt_v1" / "config.json")
    made = load_model("nt-2.5b").provenance
    assert (made["id"], made["license"]) == ("nt-2.5b", "CC-BY-NC-SA-4.0")
    assert made["published"]["repository"] == "InstaDeepAI/nucleotide-transformer-2.5b-multi-species"
    assert made["published"]["geneb"] == {
        "special_tokens": True,
        "prefix": "",
        "trim_to_multiple": 0,
        "state": "final",
        "pooling": "mean",
        "pools_special_tokens": True,
    }
    assert "published" not in load_model(str(FAMILIES / "nt_v1")).provenance


def test_table_is_read_without_torch():
    code = "import genoembed, sys; genoembed.published_models(); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "False\n"
