"""``SequenceEmbedder`` as scikit-learn sees it: checks, pipelines, searches, clones."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import SkipTestWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator
from sklearn.utils.validation import validate_data

from genoembed import embed
from genoembed.errors import AlphabetError, ConfigError
from genoembed.sklearn import SequenceEmbedder, clear_models
from tests.tiny_models import build_tiny

AT_RICH = ["AATTATATAC" * n for n in range(1, 9)]
GC_RICH = ["GGCCGCGCTC" * n for n in range(1, 9)]
SEQUENCES, LABELS = AT_RICH + GC_RICH, ["at"] * 8 + ["gc"] * 8


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(build_tiny("bert", tmp_path_factory.mktemp("sklearn") / "bert"))


class RowEmbedder(SequenceEmbedder):
    """Spells rows of numbers as sequences, so that scikit-learn's checks have something to give it."""

    def fit(self, X, y=None):
        return super().fit(spelled(validate_data(self, X)))

    def transform(self, X):
        return super().transform(spelled(validate_data(self, X, reset=False)))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.one_d_array, tags.input_tags.two_d_array = False, False, True
        return tags


def spelled(rows):
    return ["".join("ACGT"[byte % 4] for byte in np.asarray(row, np.float32).tobytes()) for row in rows]


CHECKS = list(estimator_checks_generator(RowEmbedder()))


def name_of(check):
    return getattr(check, "func", check).__name__


@pytest.mark.parametrize("check", [check for _, check in CHECKS], ids=name_of)
def test_scikit_learn_check(check, bert):
    check(RowEmbedder(bert, layer=1, dtype="float32"))


def test_scikit_learn_checks_were_many():
    assert len(CHECKS) > 30


def test_scikit_learn_checks_for_estimators_of_text(bert):
    with pytest.warns(SkipTestWarning, match="requires input"):
        checks = list(estimator_checks_generator(SequenceEmbedder(bert, layer=1)))
    assert checks
    for embedder, check in checks:
        check(embedder)


def test_vectors_are_those_of_embed_for_every_kind_of_input(bert):
    expected = embed(SEQUENCES, model=bert, layers=1, pooling="max", rc="mean").X
    embedder = SequenceEmbedder(bert, layer=1, pool="max", rc="mean")
    series = pd.Series(SEQUENCES, index=range(100, 116))
    kinds = (SEQUENCES, tuple(SEQUENCES), np.array(SEQUENCES), np.array(SEQUENCES, dtype=object), series)
    for sequences in kinds:
        found = embedder.fit(sequences).transform(sequences)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def test_feature_names_and_set_output(bert):
    embedder = SequenceEmbedder(bert, layer=[0, 2], batch_tokens=64).set_output(transform="pandas")
    table = embedder.fit_transform(pd.Series(SEQUENCES[:3], index=["x", "y", "z"]))
    assert list(table.index) == ["x", "y", "z"]
    assert list(table.columns) == list(embedder.get_feature_names_out())
    assert (embedder.n_features_out_, table.shape) == (32, (3, 32))
    assert table.columns[0] == "encoder.layer.0:0"
    assert table.columns[31] == "encoder.layer.2:15"


def test_search_over_layers_and_pools_in_a_pipeline(bert):
    pipeline = make_pipeline(SequenceEmbedder(bert), StandardScaler(), LogisticRegression())
    grid = {"sequenceembedder__layer": [0, 1, [0, 2]], "sequenceembedder__pool": ["mean", "max"]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(SEQUENCES, LABELS)
    assert len(search.cv_results_["params"]) == 6
    assert search.best_score_ == 1
    assert search.predict(["TATATATATATT", "GCGCGCGCGGGC"]).tolist() == ["at", "gc"]


def test_model_is_loaded_once_and_again_when_its_folder_changes(bert, tmp_path, monkeypatch):
    import genoembed.sklearn as module

    clear_models()
    loaded = []
    load = module.load_for_embedding
    monkeypatch.setattr(
        module, "load_for_embedding", lambda name, **options: loaded.append(name) or load(name, **options)
    )
    folder = build_tiny("bert", tmp_path / "bert")
    for layer in (0, 1):
        clone(SequenceEmbedder(str(folder), layer=layer)).fit(SEQUENCES).transform(SEQUENCES[:2])
    assert len(loaded) == 1
    (folder / "notes.txt").write_text("trained on")
    SequenceEmbedder(str(folder)).fit(SEQUENCES)
    assert len(loaded) == 2
    clear_models()


def test_clone_and_pickle_are_small_and_equal(bert):
    fitted = SequenceEmbedder(bert, layer=1).fit(SEQUENCES)
    stored = pickle.dumps(fitted)
    assert len(stored) < 10_000
    np.testing.assert_array_equal(pickle.loads(stored).transform(SEQUENCES), fitted.transform(SEQUENCES))
    assert clone(fitted).get_params() == fitted.get_params()
    assert not hasattr(clone(fitted), "layers_")


@pytest.mark.parametrize(
    ("X", "options", "error", "problem"),
    [
        ("ACGT", {}, ConfigError, "X is one sequence, expected a list"),
        ([], {}, ConfigError, "X is empty"),
        (3, {}, ConfigError, "X is int, expected a list of sequences"),
        ([["ACGT"]], {}, ConfigError, r"sequences\[0\] is list"),
        (np.array([["ACGT"]]), {}, ConfigError, r"X has shape \(1, 1\), expected \(N,\)"),
        (["AJ"], {}, AlphabetError, "record '0': 'J' at position 2"),
        (["AC"], {"layer": [0, 1], "fuse": "none"}, ConfigError, "means 2 layers; set fuse to 'concat'"),
        (["AC"], {"pool": "none"}, ConfigError, "several vectors a sequence"),
        (["AC"], {"pool": "men"}, ConfigError, "pooling is 'men'"),
        (["AC"], {"model": 3}, ConfigError, "model is int, expected a name"),
    ],
)
def test_wrong_input_and_parameters_are_refused_at_fit(X, options, error, problem, bert):
    with pytest.raises(error, match=problem):
        SequenceEmbedder(**{"model": bert} | options).fit(X)
