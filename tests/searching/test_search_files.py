"""Search between files: which vectors may be compared, and what comes out."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from genoembed import fit_transform, open_embeddings, search
from genoembed.config.search import NeighborConfig
from genoembed.contracts import EmbeddingBlock
from genoembed.errors import ConfigError, LayerError, StoreError
from genoembed.pipeline.embedding_file import VectorSource, comparable_settings, setting_differences
from genoembed.searching.neighbors import exact_neighbors
from genoembed.searching.run import find_neighbors, queries_of
from tests.store.blocks import obs_row, token_block, write_file

MADE = {
    "model": {"id": "tiny", "weights_sha256": "ab", "dtype": "float32"},
    "layers": ["blocks.1"],
    "config": {
        "input": {"keep_case": False},
        "embedding": {
            "pooling": "mean",
            "skip_first": 0,
            "fusion": "none",
            "fusion_weights": [],
            "rc": "none",
        },
        "windows": {"per_window": False, "window": None, "stride": None},
    },
}


def vectors(count, *, seed=0, width=5):
    return (np.random.default_rng(seed).normal(size=(count, width)) + 3).astype(np.float32)


def made(**changes):
    """The provenance with ``section__key`` values changed."""
    found = copy.deepcopy(MADE)
    for name, value in changes.items():
        *path, key = name.split("__")
        part = found
        for step in path:
            part = part[step]
        part[key] = value
    return found


def write(path, matrix, *, prefix="r", provenance=MADE, layers=("blocks.1",), **fields):
    rows = tuple(
        obs_row(f"{prefix}{n}", **{key: value[n] for key, value in fields.items()})
        for n in range(len(matrix))
    )
    matrices = {layer: matrix + index for index, layer in enumerate(layers)}
    return write_file(path, EmbeddingBlock(rows=rows, matrices=matrices), provenance=provenance)


@pytest.fixture
def files(tmp_path):
    queries, rows = vectors(4, seed=1), vectors(30)
    return write(tmp_path / "q.h5", queries, prefix="q"), write(tmp_path / "d.h5", rows), queries, rows


def test_search_gives_the_neighbors_with_their_places(files):
    queries, database, asked, rows = files
    report = search(queries, database, k=3, center=False)
    exact = exact_neighbors(asked, VectorSource(rows), k=3)
    hits = list(report.hits)
    assert len(hits) == len(report.hits) == 12
    assert [hit.subject for hit in hits] == [f"r{row}" for row in exact.rows.ravel()]
    assert [hit.score for hit in hits] == exact.scores.ravel().tolist()
    assert [hit.rank for hit in hits] == [1, 2, 3] * 4
    assert [hit.query for hit in hits] == [f"q{n}" for n in range(4) for _ in range(3)]
    first = hits[0]
    assert (first.subject_start, first.subject_end, first.subject_strand) == (3, 15, "+")
    assert first.subject_description == f"about {first.subject}"
    assert (report.num_queries, report.num_subjects, report.layer) == (4, 30, "blocks.1")
    assert report.hits.columns()["subject"] == [hit.subject for hit in hits]


def test_search_writes_a_table_whose_first_line_names_the_columns(files, tmp_path):
    queries, database, _, _ = files
    report = search(queries, database, k=2, output=tmp_path / "t.tsv")
    header, *lines = (tmp_path / "t.tsv").read_text().splitlines()
    assert header.split("\t")[:4] == ["#query", "subject", "score", "rank"]
    assert len(lines) == 8
    for line, hit in zip(lines, report.hits, strict=True):
        cells = line.split("\t")
        assert len(cells) == len(header.split("\t"))
        assert cells[:2] == [hit.query, hit.subject]
        assert float(cells[2]) == pytest.approx(hit.score, rel=1e-6)
    with pytest.raises(StoreError, match="exists already"):
        search(queries, database, output=tmp_path / "t.tsv")


def test_search_of_a_file_against_itself_leaves_the_record_out(files):
    _, database, _, _ = files
    assert all(hit.query == hit.subject for hit in search(database, database, k=1).hits)
    found = list(search(database, database, k=29, exclude_self=True).hits)
    assert len(found) == 30 * 29
    assert all(hit.query != hit.subject for hit in found)


def test_search_leaves_out_all_windows_of_the_record(tmp_path):
    starts = [0, 10, 20] * 4
    rows = tuple(
        obs_row(f"c{n // 3}:{start + 1}-{start + 10}", start=start, end=start + 10)
        for n, start in enumerate(starts)
    )
    block = EmbeddingBlock(rows=rows, matrices={"blocks.1": vectors(12)})
    path = write_file(tmp_path / "w.h5", block, provenance=made(config__windows__per_window=True))
    hits = list(search(path, path, k=12, exclude_self=True).hits)
    assert len(hits) == 12 * 9
    assert all(hit.query.split(":")[0] != hit.subject.split(":")[0] for hit in hits)


def test_search_takes_the_layer_that_is_asked_for(tmp_path):
    queries, rows = vectors(3, seed=1), vectors(20)
    layers = ("blocks.1", "blocks.2")
    pair = [write(tmp_path / f"{n}.h5", m, layers=layers) for n, m in enumerate((queries, rows))]
    found = search(*pair, layer="blocks.2", k=4, metric="dot")
    exact = exact_neighbors(queries + 1, VectorSource(rows + 1), k=4, metric="dot")
    np.testing.assert_array_equal(found.hits.neighbors.rows, exact.rows)
    with pytest.raises(LayerError, match=r"did you mean 'blocks\.2'"):
        search(*pair, layer="blocks.22")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model__weights_sha256": "cd"}, "model: 'cd' against 'ab'"),
        ({"config__embedding__pooling": "max"}, "pooling: 'max' against 'mean'"),
        ({"config__embedding__rc": "mean"}, "rc: 'mean' against 'none'"),
        ({"config__embedding__skip_first": 9}, "skip_first: 9 against 0"),
        ({"config__input__keep_case": True}, "keep_case: True against False"),
        (
            {"config__embedding__fusion": "concat"},
            "fusion: 'concat' against 'none'; layers: ['blocks.1'] against nothing recorded",
        ),
    ],
)
def test_search_refuses_vectors_of_another_kind_and_says_in_what(files, tmp_path, change, said):
    _, database, _, _ = files
    other = write(tmp_path / "o.h5", vectors(3), provenance=made(**change))
    with pytest.raises(ConfigError) as caught:
        search(other, database)
    assert said in str(caught.value)
    assert "embed one of them again" in str(caught.value)


def test_search_compares_what_differs_in_windows_and_number_types_only(files, tmp_path):
    _, database, _, _ = files
    changes = {"config__windows__window": 64, "model__dtype": "bfloat16"}
    other = write(tmp_path / "o.h5", vectors(3), provenance=made(**changes))
    assert len(search(other, database, k=1).hits) == 3


def test_settings_of_files_that_record_nothing_are_alike():
    assert comparable_settings({}, "a") == {"layer": "a"}
    assert setting_differences(
        comparable_settings({}, "a"), comparable_settings({"model": {"id": "m"}}, "a")
    ) == ["model: nothing recorded against 'm'"]


@pytest.mark.parametrize("approximate", [False, True])
def test_search_applies_a_transform_to_both_sides(files, tmp_path, approximate):
    queries, database, asked, rows = files
    fitted = fit_transform(database, output=tmp_path / "t.h5", method="remove-top", components=2)
    found = search(queries, database, k=3, transform=fitted.output, approximate=approximate)
    wide = rows.astype(np.float64)
    centered = wide - wide.mean(axis=0)
    top = np.linalg.svd(centered, full_matrices=False)[2][:2]
    clean = [values - values @ top.T @ top for values in (asked - wide.mean(axis=0), centered)]
    wanted = exact_neighbors(clean[0], VectorSource(clean[1]), k=3)
    np.testing.assert_array_equal(found.hits.neighbors.rows, wanted.rows)
    np.testing.assert_allclose(found.hits.neighbors.scores, wanted.scores, atol=1e-5)


def test_search_refuses_a_transform_of_another_layer_or_model(files, tmp_path):
    queries, database, _, _ = files
    for number, (provenance, layers, said) in enumerate(
        [
            (MADE, ("blocks.2",), "layer: 'blocks.2'"),
            (made(model__weights_sha256="x"), ("blocks.1",), "model: 'x'"),
        ]
    ):
        source = write(tmp_path / f"b{number}.h5", vectors(9), provenance=provenance, layers=layers)
        fit_transform(source, output=tmp_path / f"t{number}.h5")
        with pytest.raises(ConfigError, match=said):
            search(queries, database, transform=tmp_path / f"t{number}.h5")


def test_approximate_search_measures_its_recall(files):
    queries, database, _, _ = files
    report = search(queries, database, k=3, approximate=True, measure_recall=4)
    assert report.recall == 1
    assert report.index_built
    assert report.index.is_file()
    again = search(queries, database, k=3, approximate=True)
    assert (again.index_built, again.recall, again.index) == (False, None, report.index)
    exact = search(queries, database, k=3)
    np.testing.assert_array_equal(again.hits.neighbors.rows, exact.hits.neighbors.rows)


def test_search_of_queries_without_a_vector_finds_nothing_and_says_so(files, tmp_path, caplog):
    _, database, _, _ = files
    matrix = vectors(2)
    matrix[0] = 0
    queries = write(tmp_path / "z.h5", matrix)
    with open_embeddings(queries) as asked, open_embeddings(database) as rows:
        found = find_neighbors(queries_of(asked, "blocks.1"), rows, NeighborConfig(k=2, center=False))
    assert found.unusable_queries == 1
    assert (found.neighbors.rows[0] == -1).all()
    assert "1 rows have no vector to compare" in caplog.text


def test_search_refuses_files_of_token_vectors(files, tmp_path):
    _, database, _, _ = files
    tokens = write_file(tmp_path / "tokens.h5", token_block([3, 4]))
    with pytest.raises(StoreError, match="holds a vector for every token"):
        search(tokens, database)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 0}, "k is 0; set k to 1 or more"),
        ({"metric": "l1"}, "metric is 'l1'; set metric to one of cosine, dot, euclidean"),
        ({"measure_recall": 5}, "measure_recall is for an approximate search"),
        ({"index": "x"}, "index is for an approximate search"),
        ({"nearest": 5}, "'nearest' is not an option"),
        ({"invalid": "mask"}, "invalid: the queries are embedded already"),
        ({"mode": "hybrid", "metric": "euclidean"}, "set metric='cosine'"),
        ({"mode": "hybrid", "metric": "dot"}, "set metric='cosine'"),
        ({"mode": "hybrid", "approximate": True}, "looks at every row; set mode='vectors'"),
        ({"mode": "hybrid", "hybrid_weights": (1, 1, 1)}, "has no multi-vector head"),
        ({"mode": "kmer", "center": True}, "center is for vectors, but mode is 'kmer'"),
        ({"mode": "kmer", "model": "genoembed-mini"}, "model: no model runs in a search by k-mers"),
        ({"mode": "words"}, "set mode to one of vectors, kmer, hybrid"),
        ({"hybrid": True}, "here that is 'mode'"),
        ({"kmer_size": 9}, "kmer_size is for a search by k-mers"),
        ({"center": True, "transform": "t.h5"}, "center and transform"),
        ({"hybrid_weights": (1.0,)}, "set hybrid_weights to two"),
        ({"hybrid_weights": (1.0, 1.0, 1.0)}, "hybrid_weights is for a hybrid search"),
        ({"subject_sequences": ["a.fa"], "compare_sequences": False}, "no sequences are read here"),
        ({"depth": 0}, "depth is 0"),
    ],
)
def test_search_refuses_options_that_are_wrong(files, options, said):
    queries, database, _, _ = files
    with pytest.raises(ConfigError, match=said):
        search(queries, database, **options)


def test_search_refuses_several_embedding_files(files):
    queries, database, _, _ = files
    with pytest.raises(ConfigError, match="2 files, expected one embedding file, or sequence files"):
        search([queries, queries], database)
