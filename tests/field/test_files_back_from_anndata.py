"""Embedding files that AnnData or scanpy wrote again, and AnnData files from elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from click.testing import CliRunner

from genoembed import compare, export, extract, fit_transform, open_embeddings, plot, search, verify
from genoembed.cli import main
from genoembed.errors import ConfigError, LayerError, StoreError, StoreFormatError
from genoembed.store import seal

FIELD = Path(__file__).parent / "14-anndata-roundtrip"
LAYERS = ["blocks.0.mlp.l3", "blocks.1.mlp.l3"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Embeddings of 40 records, with one layer and with two."""
    folder = tmp_path_factory.mktemp("anndata")
    extract(FIELD / "in.fa", layers=0, output=folder / "many.h5")
    extract(FIELD / "in.fa", layers=(0, 1), output=folder / "two.h5")
    (folder / "query.fa").write_text("".join((FIELD / "in.fa").read_text().splitlines(keepends=True)[:4]))
    return folder


@pytest.fixture(autouse=True)
def _no_trial(monkeypatch, request):
    """Leave out the child process that tries files without a seal, a second each; tests/store tests it."""
    if "with_trial" not in request.fixturenames:
        monkeypatch.setattr(seal, "check_in_child", lambda path: None)


@pytest.fixture
def with_trial() -> None:
    """For one test that runs as users do."""


def read(path) -> anndata.AnnData:
    return anndata.read_h5ad(path)


def test_subset_that_anndata_wrote_is_searched_as_filed(world, tmp_path, with_trial):
    read(world / "many.h5")[:20].copy().write_h5ad(tmp_path / "subset.h5ad")
    words = [
        "search",
        str(tmp_path / "subset.h5ad"),
        "--against",
        str(world / "many.h5"),
        "-k",
        "1",
        "--json",
    ]
    ran = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "hits.tsv")])
    assert ran.exit_code == 0, ran.stderr
    assert ran.stderr.count("Warning") == 1
    assert "subset.h5ad: another program wrote it again" in ran.stderr
    hits = [line.split("\t")[:2] for line in (tmp_path / "hits.tsv").read_text().splitlines()[1:]]
    assert hits == [[f"s{row}/x", f"s{row}/x"] for row in range(20)]


def subset(a):
    return a[:20].copy()


def reordered(a):
    return a[[7, 3, 30, 1, 9, 22, 12, 13]].copy()


def annotated(a):
    """Everything that scanpy and its users add."""
    b, draw = a[:12].copy(), np.random.default_rng(0)
    b.obs["kind"] = pd.Categorical(["x", None, *["y"] * 10])
    b.obs["score"] = draw.normal(size=12)
    b.obs["count"] = pd.array([1, None, *[3] * 10], dtype="Int64")
    b.obs["coding"] = pd.array([True, None, *[False] * 10], dtype="boolean")
    b.layers["sparse"] = scipy.sparse.random(12, b.n_vars, 0.1, format="csc")
    b.obsm["X_pca"] = draw.normal(size=(12, 3))
    b.obsm["table"] = pd.DataFrame({"u": ["t"] * 12}, index=b.obs_names)
    b.obsp["distances"] = scipy.sparse.eye(12, format="csr")
    b.uns["kind_colors"] = np.array(["#112233", "#445566"])
    b.raw = b
    return b


def concatenated(a):
    return anndata.concat([a[:15].copy(), a[15:].copy()], uns_merge="same")


def of_the_first(a):
    return anndata.concat([a[:15].copy(), a[15:].copy()], uns_merge="first")


@pytest.mark.parametrize("change", [subset, reordered, annotated, concatenated, of_the_first])
def test_file_that_comes_back_has_its_vectors_and_settings(world, tmp_path, change):
    made = change(read(world / "many.h5"))
    path = tmp_path / "back.h5ad"
    made.write_h5ad(path)
    with open_embeddings(path) as file:
        assert (file.ids, file.layers) == (list(made.obs_names), LAYERS[:1])
        np.testing.assert_array_equal(file.X, made.X)
        assert file.provenance["model"]["id"] == "genoembed-mini"
        assert file.changes
    found = search(world / "query.fa", path, k=1).hits.columns()
    assert [subject for subject in found["subject"] if subject in found["query"]] == [
        name for name in found["query"] if name in made.obs_names
    ]
    assert verify(path, FIELD / "in.fa", sample=2).is_within


def test_every_reading_command_takes_a_file_back(world, tmp_path):
    made = annotated(read(world / "many.h5"))
    path = tmp_path / "back.h5ad"
    made.write_h5ad(path, compression="gzip")
    assert compare(path, world / "many.h5").layers[0].max_absolute == 0
    assert fit_transform(path, output=tmp_path / "centered.h5").num_rows == made.n_obs
    assert plot(path, output=tmp_path / "map.tsv").num_points == made.n_obs
    assert export(path, "parquet").num_records == made.n_obs


def test_added_columns_keep_their_values(world, tmp_path):
    annotated(read(world / "two.h5")).write_h5ad(tmp_path / "a.h5ad")
    with open_embeddings(tmp_path / "a.h5ad") as file:
        assert file.obs["kind"][:3].tolist() == ["x", "", "y"]
        assert file.obs["score"].dtype.kind == "f"
        assert np.isnan(file.obs["count"][1])
        assert file.obs["coding"][:3].tolist() == [True, "", False]
        assert (file.layers, file.more_matrices) == (LAYERS, ["X_pca"])
        assert file["X_pca"].shape == (12, 3)
    assert plot(tmp_path / "a.h5ad", output=tmp_path / "m.tsv", color="kind").num_without_value == 1


def test_columns_that_are_gone_are_unknown_and_text_is_text_however_it_is_stored(world, tmp_path):
    made = read(world / "many.h5")
    made.obs = made.obs[["length", "sha256"]]
    made.obs["sha256"] = pd.Categorical(made.obs["sha256"])
    made.obs["length"] = made.obs["length"].astype(float)
    made.obs.index.name = "record"
    made.write_h5ad(tmp_path / "a.h5ad")
    with open_embeddings(tmp_path / "a.h5ad") as file, open_embeddings(world / "many.h5") as before:
        assert file.ids == before.ids
        assert file.obs["length"].dtype == np.int64
        assert file.obs["sha256"].tolist() == before.obs["sha256"].tolist()
        assert set(file.obs["start"]) == {-1}
        assert set(file.obs["strand"]) == {"."}
        assert set(file.obs["flags"]) == {""}


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
def test_file_of_an_older_anndata_is_read():
    with open_embeddings(FIELD / "anndata-0.7.8.h5ad") as file:  # its root has no encoding, its text no type
        assert len(file) == 20
        assert file.layers == ["blocks.3.mlp.l3", "norm"]
        assert file.obs["kind"][:2].tolist() == ["x", "y"]
        assert set(file.obs["flags"]) == {""}
        assert file.to_anndata().n_obs == 20


def test_columns_of_x_that_were_taken_or_reordered_are_never_compared_with_whole_vectors(world, tmp_path):
    made = read(world / "many.h5")
    for name, columns in (("half", slice(None, None, 2)), ("back", slice(None, None, -1))):
        made[:, columns].copy().write_h5ad(tmp_path / f"{name}.h5ad")
        with pytest.raises(ConfigError, match="columns: nothing recorded against 'a selection"):
            search(world / "query.fa", tmp_path / f"{name}.h5ad")
        with pytest.raises(ConfigError, match="left out or reordered by another program"):
            verify(tmp_path / f"{name}.h5ad", FIELD / "in.fa")
        assert len(search(tmp_path / f"{name}.h5ad", tmp_path / f"{name}.h5ad", k=1).hits) == 40
    made[:, :64].copy().write_h5ad(tmp_path / "first.h5ad")
    with pytest.raises(ConfigError, match=r"and .*first\.h5ad have 128 and 64 features"):
        search(world / "query.fa", tmp_path / "first.h5ad")
    read(world / "two.h5")[:, :64].copy().write_h5ad(tmp_path / "copy.h5ad")
    assert verify(tmp_path / "copy.h5ad", FIELD / "in.fa", sample=2).is_within  # obsm has the whole layer


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": "mean_std"},
        {"rc": "concat"},
        {"pooling": "mean_std", "rc": "concat"},
        {"layers": (0, 1), "fusion": "concat"},
        {"layers": (0,), "fusion": "concat"},
    ],
    ids=["mean_std", "rc", "both", "concat", "one layer"],
)
def test_columns_with_two_parts_of_a_name_are_known_in_any_order(world, tmp_path, options):
    whole = tmp_path / "whole.h5"
    extract(world / "query.fa", **{"layers": 0} | options, output=whole)
    made = read(whole)
    made.copy().write_h5ad(tmp_path / "same.h5ad")
    assert len(search(tmp_path / "same.h5ad", whole, k=1).hits) == 2
    half = made.n_vars // 2
    swapped = [*range(half, made.n_vars), *range(half)]
    for columns in (slice(half, None), slice(None, None, -1), swapped):
        made[:, columns].copy().write_h5ad(tmp_path / "some.h5ad")
        with open_embeddings(tmp_path / "some.h5ad") as file:
            assert "left out or reordered" in " ".join(file.changes)
    with pytest.raises(ConfigError, match="columns: nothing recorded against 'a selection"):
        search(whole, tmp_path / "some.h5ad")


def test_values_that_were_changed_are_not_verified(world, tmp_path):
    made = read(world / "many.h5")
    made.X = made.X * 2
    made.write_h5ad(tmp_path / "a.h5ad")
    assert not verify(tmp_path / "a.h5ad", FIELD / "in.fa", sample=2).is_within


def test_files_joined_with_other_settings_or_inputs_say_what_is_gone(world, tmp_path):
    one = read(world / "many.h5")[:2].copy()
    extract(world / "query.fa", layers=0, pooling="max", output=tmp_path / "max.h5")
    extract(world / "query.fa", layers=0, output=tmp_path / "mean.h5")
    for name in ("max", "mean"):
        other = read(tmp_path / f"{name}.h5")
        other.obs_names = ["other0", "other1"]
        anndata.concat([one, other], uns_merge="same").write_h5ad(tmp_path / f"{name}.h5ad")
    joined = tmp_path / "max.h5ad"
    for use in (lambda: search(world / "query.fa", joined), lambda: verify(joined, FIELD / "in.fa")):
        with pytest.raises(ConfigError, match=r"max\.h5ad: it does not say how its vectors were made"):
            use()
    assert len(search(joined, joined, k=1).hits) == 4
    joined = tmp_path / "mean.h5ad"
    with pytest.raises(
        ConfigError, match=r"does not say of which files it was made .*, or set subject_sequences"
    ):
        search(joined, joined, mode="kmer")


def test_file_changed_in_place_says_so(world, tmp_path, caplog):
    shutil.copy(world / "many.h5", tmp_path / "a.h5")
    backed = anndata.read_h5ad(tmp_path / "a.h5", backed="r+")
    backed.obs["mine"] = range(40)
    backed.write()
    backed.file.close()
    with open_embeddings(tmp_path / "a.h5") as file:
        assert file.obs["mine"][3] == 3
    assert "a.h5: has no seal, so another program changed or wrote it" in caplog.text


def test_rows_that_the_account_does_not_tell_of_are_named(world, tmp_path, caplog):
    made = read(world / "many.h5")
    strange = anndata.AnnData(np.ones((3, made.n_vars), np.float32), var=made.var)
    strange.obs_names = ["z0", "z1", "z2"]
    other = made[:5].copy()
    other.obs["source"] = "other.fa"
    other.obs_names = [f"o{row}" for row in range(5)]
    joined = anndata.concat([made, strange, other], join="outer", uns_merge="first")
    joined.write_h5ad(tmp_path / "a.h5ad")
    with open_embeddings(tmp_path / "a.h5ad") as file:
        assert len(file) == 48
    assert "its account is of 40 rows, and it has 48" in caplog.text
    assert "rows without a SHA-256 of their sequence were added" in caplog.text
    assert "does not name other.fa, which rows of it are from" in caplog.text


def test_account_that_was_dropped_leaves_vectors_to_compare(world, tmp_path, caplog):
    made = read(world / "many.h5")
    anndata.concat([made[:15].copy(), made[15:].copy()]).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(
        ConfigError, match=r"does not say how its vectors were made \(model, layer, pooling\)"
    ):
        search(world / "query.fa", tmp_path / "a.h5ad")
    found = search(tmp_path / "a.h5ad", world / "many.h5", k=1).hits.columns()
    assert found["query"] == found["subject"]
    assert (
        "a.h5ad does not say which model made its vectors; they are taken to be like those of" in caplog.text
    )


def test_vectors_from_elsewhere_are_searched_and_drawn_among_themselves(world, tmp_path):
    vectors = np.random.default_rng(1).normal(size=(9, 5)).astype(np.float32)
    made = anndata.AnnData(vectors)
    made.write_h5ad(tmp_path / "theirs.h5ad")
    with open_embeddings(tmp_path / "theirs.h5ad") as file:
        assert (file.layers, file.provenance) == (["X"], {})
    hits = search(tmp_path / "theirs.h5ad", tmp_path / "theirs.h5ad", k=2, exclude_self=True).hits
    assert hits.columns()["subject_start"] == [None] * 18
    assert plot(tmp_path / "theirs.h5ad", output=tmp_path / "map.tsv").num_points == 9
    with pytest.raises(ConfigError, match="does not say how its vectors were made"):
        search(world / "query.fa", tmp_path / "theirs.h5ad")
    with pytest.raises((ConfigError, LayerError), match="'X'"):
        search(world / "many.h5", tmp_path / "theirs.h5ad")
    counts = anndata.AnnData(scipy.sparse.csr_matrix(np.ones((9, 4))), obsm={"X_emb": vectors})
    counts.write_h5ad(tmp_path / "counts.h5ad")
    with open_embeddings(tmp_path / "counts.h5ad") as file:
        np.testing.assert_array_equal(file.X, vectors)
    del counts.obsm["X_emb"]
    counts.write_h5ad(tmp_path / "counts.h5ad")
    with pytest.raises(StoreFormatError, match=r"has no vectors: /X is stored as csr_matrix.*toarray"):
        open_embeddings(tmp_path / "counts.h5ad")


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_what_cannot_be_told_apart_or_read_is_refused_with_the_way_out(world, tmp_path):
    made = read(world / "many.h5")
    anndata.concat([made[:3].copy(), made[2:5].copy()]).write_h5ad(tmp_path / "twice.h5ad")
    with pytest.raises(StoreFormatError, match=r"id 's2/x' names 2 rows.*obs_names_make_unique"):
        open_embeddings(tmp_path / "twice.h5ad")
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "zarr.json").write_text("{}")
    with pytest.raises(StoreError, match=r"it is a Zarr store.*save it with write_h5ad"):
        open_embeddings(tmp_path / "a.zarr")
    with h5py.File(tmp_path / "old.h5ad", "w") as hdf5:  # AnnData 0.6
        hdf5["X"] = np.ones((2, 2), np.float32)
        hdf5["obs"] = np.array([(b"a", 1.0), (b"b", 2.0)], dtype=[("index", "S1"), ("n", "f4")])
    with pytest.raises(StoreFormatError, match=r"/obs in the format of AnnData before 0\.7"):
        open_embeddings(tmp_path / "old.h5ad")


def test_output_that_anndata_cut_is_not_taken_for_the_finished_run(world, tmp_path):
    read(world / "many.h5")[:20].copy().write_h5ad(tmp_path / "out.h5")
    with pytest.raises(StoreError, match="it was changed since"):
        extract(FIELD / "in.fa", layers=0, output=tmp_path / "out.h5", resume=True)
