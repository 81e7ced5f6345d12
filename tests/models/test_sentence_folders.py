"""Folders of sentence-transformers: their own pooling and normalization, unless a caller chooses."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import genoembed
from genoembed.cli import main
from genoembed.errors import CheckpointError, ModelError, PoolingMismatchWarning
from genoembed.models import hub, locate
from genoembed.models.load import load_model
from genoembed.models.trained_folder import find_facts
from genoembed.store.reader import open_embeddings

SEQUENCES = ["ACGTTGCAAC", "GGCATTA", "TTGACCAGTACGAT"]
TRANSFORMER = ("", "sentence_transformers.models.Transformer")


def vectors(sequences, **options):
    return genoembed.embed(sequences, **options).X


@pytest.fixture
def sentence_folder(tmp_path, tiny_folder):
    """Return a maker of folders, in the words of releases since 2020 or of today's."""

    def make(*modules, family="bert", name="x", inner="", **files):
        folder = tmp_path / name
        shutil.copytree(tiny_folder(family), folder / inner)
        listed = [(inner, TRANSFORMER[1])]
        for number, (kind, settings) in enumerate(modules, start=1):
            short = kind.rpartition(".")[2]
            path = folder / f"{number}_{short}"
            path.mkdir()
            if settings is not None:
                (path / "config.json").write_text(json.dumps(settings))
            kind = kind if "." in kind else f"sentence_transformers.models.{kind}"
            listed.append((path.name, kind))
        rows = [{"idx": i, "name": str(i), "path": p, "type": t} for i, (p, t) in enumerate(listed)]
        (folder / "modules.json").write_text(json.dumps(rows))
        for file, values in files.items():
            (folder / f"{file}.json").write_text(json.dumps(values))
        return str(folder)

    return make


def old(mode):
    names = (
        "cls_token",
        "mean_tokens",
        "max_tokens",
        "mean_sqrt_len_tokens",
        "weightedmean_tokens",
        "lasttoken",
    )
    return {"word_embedding_dimension": 16, **{f"pooling_mode_{name}": name == mode for name in names}}


def new(mode):
    return {"embedding_dimension": 16, "pooling_mode": mode, "include_prompt": True}


def normalized(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        (old("cls_token"), "cls"),
        (old("mean_tokens"), "mean"),
        (old("max_tokens"), "max"),
        (new("cls"), "cls"),
        (new("mean"), "mean"),
        (new(["max"]), "max"),
        ({}, "mean"),
    ],
)
@pytest.mark.parametrize("has_length_one", [False, True])
def test_own_pooling_and_length_are_the_default(
    settings, pooling, has_length_one, sentence_folder, tiny_folder
):
    modules = [("Pooling", settings), *([("Normalize", None)] if has_length_one else [])]
    folder = sentence_folder(*modules)
    plain = vectors(SEQUENCES, model=str(tiny_folder("bert")), layers="final", pooling=pooling)
    expected = normalized(plain) if has_length_one else plain
    np.testing.assert_allclose(vectors(SEQUENCES, model=folder), expected, rtol=0, atol=1e-5)
    found = vectors(SEQUENCES, model=load_model(folder))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_causal_models_take_the_last_or_weigh_by_position(sentence_folder, tiny_folder):
    for number, (mode, pooling) in enumerate((("lasttoken", "last"), ("weightedmean", "weighted_mean"))):
        folder = sentence_folder(("Pooling", new(mode)), family="llama", name=f"x{number}")
        plain = vectors(SEQUENCES, model=str(tiny_folder("llama")), layers="final", pooling=pooling)
        np.testing.assert_array_equal(vectors(SEQUENCES, model=folder), plain)


def test_root_of_the_length_is_no_matter_where_vectors_have_length_one(sentence_folder):
    folder = sentence_folder(("Pooling", old("mean_sqrt_len_tokens")), ("Normalize", None))
    assert find_facts(folder).pooling == "mean"
    other = sentence_folder(("Pooling", old("mean_sqrt_len_tokens")), name="y")
    with pytest.raises(ModelError, match="its pooling 'mean_sqrt_len_tokens'"):
        vectors(SEQUENCES, model=other)


@pytest.mark.parametrize("has_length_one", [False, True])
def test_a_linear_projection_is_that_of_add_pooler(sentence_folder, tiny_folder, has_length_one):
    settings = {"in_features": 16, "out_features": 16, "bias": True}
    identity = {"activation_function": "torch.nn.modules.linear.Identity"}
    folder = sentence_folder(
        ("Pooling", new("mean")),
        ("Dense", settings | identity),
        *([("Normalize", None)] if has_length_one else []),
    )
    rng = np.random.default_rng(0)
    weight, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 16), (16,)))
    tensors = {"linear.weight": weight, "linear.bias": bias}
    path = Path(folder) / "2_Dense" / "model.safetensors"
    save_file(tensors, path)
    plain = vectors(SEQUENCES, model=str(tiny_folder("bert")), layers="final", pooling="mean")
    expected = plain @ weight.T + bias
    expected = normalized(expected) if has_length_one else expected
    np.testing.assert_allclose(vectors(SEQUENCES, model=folder), expected, rtol=1e-5, atol=1e-5)
    path.unlink()
    with pytest.raises(ModelError, match="its module Dense; set layers and pooling"):
        vectors(SEQUENCES, model=folder)


def test_another_choice_warns(sentence_folder, tiny_folder):
    folder = sentence_folder(("Pooling", new("cls")), ("Normalize", None))
    words = r"pooling is 'mean', it was trained with 'cls' \(vectors are not projected or normalized either\)"
    with pytest.warns(PoolingMismatchWarning, match=words):
        found = vectors(SEQUENCES, model=folder, pooling="mean")
    plain = vectors(SEQUENCES, model=str(tiny_folder("bert")), layers="final", pooling="mean")
    np.testing.assert_array_equal(found, plain)
    with pytest.warns(PoolingMismatchWarning, match=r"layers is encoder\.layer\.0, it was trained with"):
        vectors(SEQUENCES, model=folder, layers=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vectors(SEQUENCES, model=folder, layers="final", pooling="cls")


@pytest.mark.parametrize(
    ("modules", "files", "words"),
    [
        ([("Pooling", new("mean")), ("Dense", {"in_features": 16})], {}, "its module Dense"),
        ([("Pooling", new(["cls", "mean"]))], {}, r"its pooling 'cls\+mean'"),
        ([("Pooling", new("mean")), ("their_code.Squash", None)], {}, r"its module their_code\.Squash"),
        ([("WordWeights", {"word_weights": {"A": 0.5}}), ("Pooling", {})], {}, "its module WordWeights"),
        (
            [("Pooling", {})],
            {"sentence_bert_config": {"do_lower_case": True}},
            r"lower-casing \(do_lower_case\)",
        ),
        (
            [("Pooling", {})],
            {"config_sentence_transformers": {"prompts": {"q": "ask: "}, "default_prompt_name": "q"}},
            "its prompt 'ask: '",
        ),
    ],
)
def test_modules_that_are_not_run_are_named_with_the_way_out(modules, files, words, sentence_folder):
    folder = sentence_folder(*modules, **files)
    with pytest.raises(ModelError, match=rf"{words}; set layers and pooling .* or use sentence-transformers"):
        vectors(SEQUENCES, model=folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vectors(SEQUENCES, model=folder, layers="final", pooling="mean").shape == (3, 16)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "it cannot be read"),
        ('{"a": 1}', "it is not a list of modules"),
        (
            '[{"type": "sentence_transformers.models.Pooling", "path": "../../x"}]',
            "expected folders beside it",
        ),
        ('[{"type": "sentence_transformers.models.Pooling", "path": "/etc"}]', "expected folders beside it"),
    ],
)
def test_damaged_lists_are_named(text, words, sentence_folder, tmp_path):
    folder = sentence_folder(("Pooling", {}))
    (tmp_path / "x" / "modules.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        vectors(SEQUENCES, model=folder)


def test_model_in_a_folder_of_its_own_is_found(sentence_folder, tiny_folder):
    folder = sentence_folder(("Pooling", old("cls_token")), inner="0_Transformer")
    plain = vectors(SEQUENCES, model=str(tiny_folder("bert")), layers="final", pooling="cls")
    np.testing.assert_array_equal(vectors(SEQUENCES, model=folder), plain)


def test_tokens_that_would_count_otherwise_are_said(sentence_folder, caplog):
    for number, (modules, is_said) in enumerate(
        (
            ([("Pooling", new("mean"))], True),
            ([("Pooling", new("cls"))], False),
            (
                [
                    ("WordWeights", {"word_weights": {"<cls>": 0.0}, "unknown_word_weight": 1.0}),
                    ("Pooling", new("mean")),
                ],
                False,
            ),
        )
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            vectors(SEQUENCES, model=sentence_folder(*modules, name=f"x{number}"))
        assert ("counts every token once, special ones too" in caplog.text) is is_said


def test_extract_states_it_in_the_file_and_verify_agrees(sentence_folder, tmp_path):
    folder = sentence_folder(("Pooling", new("cls")), ("Normalize", None))
    fasta = tmp_path / "in.fa"
    fasta.write_text("".join(f">r{i}\n{sequence}\n" for i, sequence in enumerate(SEQUENCES)))
    output = tmp_path / "a.h5"
    for words in (("extract", fasta, "--model", folder, "-o", output), ("verify", output, fasta)):
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == 0, result.output
    with open_embeddings(output) as embeddings:
        made = embeddings.provenance
        np.testing.assert_allclose(np.linalg.norm(embeddings.X[:], axis=1), 1, atol=1e-6)
    assert made["finetuned"]["task"] == "sentence-transformers"
    assert made["config"]["embedding"]["pooling"] == "cls"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_folder_gives_the_vectors_of_the_model_and_of_sentence_transformers(tiny_folder, tmp_path):
    sentence = pytest.importorskip("sentence_transformers")
    genoembed.export_model(str(tiny_folder("bert")), output=str(tmp_path / "x"))
    theirs = sentence.SentenceTransformer(str(tmp_path / "x"), device="cpu").encode(SEQUENCES)
    found = vectors(SEQUENCES, model=str(tmp_path / "x"), dtype="float32")
    np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("mode", ["cls", "mean"])
def test_folder_of_sentence_transformers_itself_is_read(mode, tiny_folder, tmp_path):
    sentence = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")
    modules = [
        models.Transformer(str(tiny_folder("bert"))),
        models.Pooling(16, pooling_mode=mode),
        models.Normalize(),
    ]
    theirs = sentence.SentenceTransformer(modules=modules, device="cpu")
    theirs.save_pretrained(str(tmp_path / "x"), create_model_card=False)
    facts = find_facts(str(tmp_path / "x"))
    assert (facts.pooling, facts.normalize, facts.unsupported) == (mode, True, None)
    if mode == "cls":
        found = vectors(SEQUENCES, model=str(tmp_path / "x"), dtype="float32")
        np.testing.assert_allclose(found, theirs.encode(SEQUENCES), rtol=0, atol=1e-5)


def test_cached_repository_is_read_without_a_network(sentence_folder, tmp_path, monkeypatch):
    folder = sentence_folder(("Pooling", new("cls")), ("Normalize", None))
    expected = vectors(SEQUENCES, model=folder)
    repository = tmp_path / "hub" / "models--some--thing"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr(locate.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    np.testing.assert_array_equal(vectors(SEQUENCES, model="some/thing"), expected)


def test_files_of_a_repository_are_fetched_before_the_model_is(sentence_folder, monkeypatch):
    folder = Path(sentence_folder(("Pooling", new("cls")), ("Normalize", None)))
    asked = []

    def download(repository, name, revision=None):
        asked.append((repository, name, revision))
        if not (folder / name).is_file():
            raise OSError(name)
        return str(folder / name)

    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    facts = find_facts("some/thing", revision="abc")
    assert (facts.pooling, facts.normalize) == ("cls", True)
    assert ("some/thing", "1_Pooling/config.json", "abc") in asked
    assert not any(name.endswith("safetensors") for _, name, _ in asked)
