"""``subset``, ``join`` and ``annotate``: files made of files, with all that belongs to their rows."""

from __future__ import annotations

import errno
import json
import random
import shutil
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from click.testing import CliRunner

from genoembed import annotate, compare, editing, extract, join, open_embeddings, search, subset, verify
from genoembed.atomic import AtomicFile
from genoembed.cli import main
from genoembed.errors import ConfigError, DuplicateIdError, LabelError, StoreError, StoreFormatError
from genoembed.store import EmbeddingFile, rewriting, seal
from genoembed.store.seal import check_seal
from tests.tiny_models import build_tiny

ARCHIVES = Path(__file__).parent / "data" / "archives"

LETTERS = random.Random(5)
SEQUENCES = {f"r{n}": "".join(LETTERS.choices("ACGT", k=20 + 3 * n)) for n in range(12)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, sequences in two files, and what extract makes of them."""
    folder = tmp_path_factory.mktemp("editing")
    model = str(build_tiny("bert", folder / "bert"))
    texts = [f">{name} about it\n{text}\n" for name, text in SEQUENCES.items()]
    for name, part in (("one", texts), ("first", texts[:5]), ("last", texts[5:])):
        (folder / f"{name}.fa").write_text("".join(part))
        extract(
            folder / f"{name}.fa", model=model, layers=(0, 1), dtype="float32", output=folder / f"{name}.h5"
        )
    options = {"model": model, "layers": 0, "dtype": "float32"}
    extract(folder / "one.fa", **options, pooling="none", output=folder / "tokens.h5")
    extract(folder / "one.fa", **options, pooling="max", output=folder / "max.h5")
    extract(folder / "one.fa", **options, window=16, stride=8, per_window=True, output=folder / "windows.h5")
    return folder


@pytest.fixture(autouse=True)
def _no_trial(monkeypatch):
    """Leave out the child process that tries files without a seal, a second each; tests/store tests it."""
    monkeypatch.setattr(seal, "check_in_child", lambda path: None)


def rows_of(path) -> dict:
    with open_embeddings(path) as file:
        return {
            name: [file.vectors(row, layer) for layer in file.layers] for row, name in enumerate(file.ids)
        }


def same_rows(path, other) -> bool:
    """Compare the rows of one file with those of the same ids of another."""
    mine, theirs = rows_of(path), rows_of(other)
    return all(
        np.array_equal(vector, match)
        for name, vectors in mine.items()
        for vector, match in zip(vectors, theirs[name], strict=True)
    )


@pytest.mark.parametrize("source", ["one.h5", "tokens.h5"])
def test_subset_takes_the_rows_of_a_list_in_the_order_of_the_file(world, tmp_path, source, monkeypatch):
    monkeypatch.setattr(rewriting, "SLAB_BYTES", 700)  # some rows at a time
    (tmp_path / "ids.txt").write_text("r7\n\n r2 \r\nr2\nr11\n")
    report = subset(world / source, ids=tmp_path / "ids.txt", output=tmp_path / "out.h5")
    assert (report.num_rows, report.num_in_file, report.missing) == (3, 12, ())
    with open_embeddings(tmp_path / "out.h5") as file, open_embeddings(world / source) as before:
        assert file.ids == ["r2", "r7", "r11"]
        assert file.layers == before.layers
        assert file.obs["length"].tolist() == [26, 41, 53]
        assert file.changes == ()
        if source == "tokens.h5":
            np.testing.assert_array_equal(file.token_spans("r7"), before.token_spans("r7"))
    assert same_rows(tmp_path / "out.h5", world / source)
    assert check_seal(tmp_path / "out.h5")
    assert verify(tmp_path / "out.h5").is_within


def test_subset_says_in_the_file_what_it_was_made_of(world, tmp_path):
    subset(world / "one.h5", where="length>40", output=tmp_path / "a.h5")
    subset(tmp_path / "a.h5", ids=["r9"], output=tmp_path / "b.h5")
    with open_embeddings(tmp_path / "b.h5") as file, open_embeddings(world / "one.h5") as before:
        first, second = file.provenance["history"]
        assert file.provenance["model"] == before.provenance["model"]
    assert (first["command"], first["where"], first["rows"]) == ("subset", ["length>40"], 5)
    assert first["sources"][0]["rows"] == 12
    assert len(first["sources"][0]["sha256"]) == 64
    assert (second["ids"], second["rows"]) == ("a list", 1)
    with pytest.raises(StoreError, match="it was changed since"):
        extract(
            world / "one.fa",
            model=str(world / "bert"),
            layers=(0, 1),
            dtype="float32",
            output=tmp_path / "b.h5",
            resume=True,
        )


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        (["id=r3"], [3]),
        (["length >= 47"], [9, 10, 11]),
        (["length>=47", "length!=50"], [9, 11]),
        (["length<=20"], [0]),
        (["length==23"], [1]),
        (["strand=+", "length<26"], [0, 1]),
        (["kind=a b=c"], [2]),
        (["kind!=x", "kind!="], [2]),
        (["score<0"], [1]),
        (["good=true"], [0, 2]),
    ],
)
def test_conditions_choose_rows(world, tmp_path, where, rows):
    table = pd.DataFrame({"id": ["r0", "r1", "r2"], "kind": ["x", "x", "a b=c"], "score": [0.5, -1, 2]})
    table["good"] = [True, False, True]
    table.to_parquet(tmp_path / "t.parquet")
    annotate(world / "one.h5", tmp_path / "t.parquet", output=tmp_path / "a.h5")
    subset(tmp_path / "a.h5", where=where, output=tmp_path / "b.h5")
    with open_embeddings(tmp_path / "b.h5") as file:
        assert file.ids == [f"r{row}" for row in rows]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no rows are requested; set ids to a list, or set where"),
        ({"where": "length"}, "where is 'length'; set where to COLUMN=VALUE"),
        ({"where": "size=3"}, "where is 'size=3', .* set where to one of id, description"),
        ({"where": "length=long"}, "length holds numbers; set where to a number"),
        ({"where": "strand<+"}, "strand holds text; set where with = or !="),
        ({"where": "length>999"}, "no row of 12 is left"),
        ({"ids": ["nope"]}, "no row of 12 is left"),
    ],
)
def test_what_subset_cannot_choose_is_an_error_with_the_way_out(world, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        subset(world / "one.h5", output=tmp_path / "out.h5", **options)
    assert not list(tmp_path.iterdir())


def test_id_of_a_record_stands_for_its_windows(world, tmp_path):
    subset(world / "windows.h5", ids=["r11"], output=tmp_path / "a.h5")
    with open_embeddings(tmp_path / "a.h5") as file:
        assert len(file) > 2
        assert all(name.startswith("r11:") for name in file.ids)
    (tmp_path / "t.tsv").write_text("id\tspecies\nr11\tyeast\n")
    annotate(tmp_path / "a.h5", tmp_path / "t.tsv")
    with open_embeddings(tmp_path / "a.h5") as file:
        assert set(file.obs["species"]) == {"yeast"}


def test_requested_ids_that_are_not_there_are_named_and_end_with_3(world, tmp_path):
    words = ["subset", str(world / "one.h5"), "--ids", "-", "-o", str(tmp_path / "out.h5"), "--json"]
    ran = CliRunner().invoke(main, words, input="r1\nnope\n")
    assert ran.exit_code == 3
    assert json.loads(ran.stdout)["missing"] == ["nope"]
    assert "1 of the 2 requested ids are not there (nope)" in ran.stderr


def test_what_scanpy_added_goes_with_its_rows(world, tmp_path):
    made, draw = anndata.read_h5ad(world / "one.h5"), np.random.default_rng(0)
    made.obs["kind"] = pd.Categorical(["a", "b", None] * 4, categories=["b", "a"])
    made.obs["count"] = pd.array([1, None, 3] * 4, dtype="Int64")
    made.var["mean"] = made.X.mean(0)
    made.layers["csr"] = scipy.sparse.random(12, made.n_vars, 0.3, format="csr", rng=draw)
    made.layers["csc"] = scipy.sparse.random(12, made.n_vars, 0.3, format="csc", rng=draw)
    made.obsm["X_umap"] = draw.normal(size=(12, 2))
    made.obsm["table"] = pd.DataFrame({"u": list("abcdefghijkl")}, index=made.obs_names)
    made.obsp["graph"] = scipy.sparse.random(12, 12, 0.4, format="csr", rng=draw)
    made.obsp["full"] = draw.normal(size=(12, 12))
    made.varm["PCs"] = draw.normal(size=(made.n_vars, 3))
    made.uns["kind_colors"] = np.array(["#000000", "#ffffff"])
    made.raw = made
    made.X = made.X * 2  # as scanpy scales; the layer itself is in obsm
    made.write_h5ad(tmp_path / "a.h5ad")
    keep = ["r1", "r4", "r5", "r10"]
    subset(tmp_path / "a.h5ad", ids=keep, output=tmp_path / "b.h5")
    found, expected = anndata.read_h5ad(tmp_path / "b.h5"), made[keep]
    assert same_rows(tmp_path / "b.h5", world / "one.h5")
    np.testing.assert_array_equal(found.layers["X"], expected.X)
    pd.testing.assert_frame_equal(found.obs[["kind", "count"]], made.obs.loc[keep, ["kind", "count"]])
    pd.testing.assert_frame_equal(found.var, made.var)
    for group in ("layers", "obsp"):
        for name, values in getattr(expected, group).items():
            left, right = getattr(found, group)[name], values
            dense = [part.toarray() if scipy.sparse.issparse(part) else part for part in (left, right)]
            np.testing.assert_array_equal(*dense)
    np.testing.assert_array_equal(found.obsm["X_umap"], expected.obsm["X_umap"])
    pd.testing.assert_frame_equal(found.obsm["table"], made.obsm["table"].loc[keep])
    np.testing.assert_array_equal(found.varm["PCs"], made.varm["PCs"])
    np.testing.assert_array_equal(found.raw.X, expected.raw.X)
    assert found.uns["kind_colors"].tolist() == ["#000000", "#ffffff"]


def test_x_of_other_features_than_the_first_layer_is_left_out_and_named(world, tmp_path, caplog):
    made = anndata.read_h5ad(world / "one.h5")
    made[:, :4].copy().write_h5ad(tmp_path / "a.h5ad")
    report = subset(tmp_path / "a.h5ad", ids=["r1"], output=tmp_path / "b.h5")
    assert report.dropped == ("X", "var")
    assert "a.h5ad: left out what cannot be taken along: X, var" in caplog.text
    assert same_rows(tmp_path / "b.h5", world / "one.h5")


def test_counts_of_genes_beside_vectors_are_left_out_and_named(tmp_path):
    made = anndata.AnnData(X=scipy.sparse.random(8, 30, 0.3, format="csr", dtype=np.float32))
    made.obs_names = [f"r{n}" for n in range(8)]
    made.var["symbol"] = [f"g{n}" for n in range(30)]
    made.layers["counts"] = made.X.copy()
    made.varm["loadings"] = np.zeros((30, 2))
    made.obsm["X_pca"] = np.arange(32.0).reshape(8, 4)
    made.write_h5ad(tmp_path / "a.h5ad")
    lost = ("layers/counts", "X", "var", "varm/loadings")
    parts = [tmp_path / "b.h5", tmp_path / "c.h5"]
    for where, part in zip(("id=r0", "id!=r0"), parts, strict=True):
        assert subset(tmp_path / "a.h5ad", where=where, output=part).dropped == lost
    assert anndata.read_h5ad(parts[1]).X.tolist() == made.obsm["X_pca"][1:].tolist()
    (tmp_path / "t.tsv").write_text("id\tn\nr0\t1\n")
    report = annotate(tmp_path / "a.h5ad", tmp_path / "t.tsv", output=tmp_path / "d.h5")
    assert report.dropped == lost
    assert join(parts, output=tmp_path / "e.h5").dropped == ()
    made.obs_names = [f"s{n}" for n in range(8)]
    made.write_h5ad(tmp_path / "f.h5ad")
    report = join([tmp_path / "a.h5ad", tmp_path / "f.h5ad"], output=tmp_path / "g.h5")
    assert set(report.dropped) == set(lost)


def test_tables_of_features_are_written_as_the_schema_says(world, tmp_path):
    made = anndata.read_h5ad(world / "one.h5")
    made.var.index.name = "feature"
    made.var["n"] = range(made.n_vars)
    made.raw = made
    made.uns["more"] = {"table": pd.DataFrame({"a": [1, 2]})}
    made.obsm["table"] = pd.DataFrame({"u": range(12)}, index=made.obs_names)
    made.write_h5ad(tmp_path / "a.h5ad")
    kinds = ["x", "y"]
    with h5py.File(tmp_path / "a.h5ad", "r+") as hdf5:
        for where in ("var", "raw/var", "uns/more/table", "obsm/table"):
            table = hdf5[where]
            rows = len(table[table.attrs["_index"]])
            table["__categories/kind"] = kinds  # as AnnData 0.7 wrote it
            table["kind"] = np.arange(rows, dtype="i1") % 2
            table["kind"].attrs["categories"] = table["__categories/kind"].ref
            table.attrs["column-order"] = [*table.attrs["column-order"], "kind"]
    subset(tmp_path / "a.h5ad", where="id!=r0", output=tmp_path / "b.h5")
    with h5py.File(tmp_path / "b.h5") as hdf5:
        for where in ("var", "raw/var"):
            assert set(hdf5[where]) == {"_index", "n", "kind"}
            assert hdf5[where].attrs["_index"] == "_index"
    found = anndata.read_h5ad(tmp_path / "b.h5")
    for table in (found.var, found.raw.var):
        assert list(table.index) == list(made.var_names)
        assert list(table["kind"][:3]) == ["x", "y", "x"]
    assert list(found.uns["more"]["table"]["kind"]) == kinds
    assert list(found.obsm["table"]["kind"][:3]) == ["y", "x", "y"]


def test_columns_in_an_encoding_that_is_not_known_are_named(world, tmp_path, caplog):
    anndata.read_h5ad(world / "one.h5").write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as hdf5:
        hdf5["obs"].create_group("range").attrs["encoding-type"] = "interval"
        hdf5["obs"].attrs["column-order"] = [*hdf5["obs"].attrs["column-order"], "range"]
    report = subset(tmp_path / "a.h5ad", ids=["r1"], output=tmp_path / "b.h5")
    assert report.dropped == ("obs/range",)
    assert "left out what cannot be taken along: obs/range" in caplog.text


@pytest.mark.parametrize("source", ["one.h5", "tokens.h5"])
def test_join_undoes_subset(world, tmp_path, source):
    for name, where in (("a", "length<=30"), ("b", "length>30")):
        subset(world / source, where=where, output=tmp_path / f"{name}.h5")
    report = join([tmp_path / "a.h5", tmp_path / "b.h5"], output=tmp_path / "c.h5")
    found = compare(tmp_path / "c.h5", world / source, tolerance=0)
    assert (report.num_rows, report.dropped) == (12, ())
    assert found.is_within
    assert not found.setting_differences
    assert check_seal(tmp_path / "c.h5")


def test_join_keeps_where_the_rows_of_each_file_come_from(world, tmp_path):
    (tmp_path / "t.tsv").write_text("id\tspecies\tn\nr0\tyeast\t1\nr1\tfly\t2\n")
    annotate(world / "first.h5", tmp_path / "t.tsv", output=tmp_path / "a.h5")
    join([tmp_path / "a.h5", world / "last.h5"], output=tmp_path / "c.h5")
    with open_embeddings(tmp_path / "c.h5") as file:
        assert file.ids == list(SEQUENCES)
        assert file.obs["species"].tolist() == ["yeast", "fly", *[""] * 10]
        assert file.obs["n"][:2].tolist() == [1, 2]
        assert np.isnan(file.obs["n"][2:]).all()
        made = file.provenance
    assert [item["name"].rpartition("/")[2] for item in made["inputs"]] == ["first.fa", "last.fa"]
    assert made["counts"]["records"] == 12
    assert "run" not in made
    (step,) = made["history"]
    assert [source["rows"] for source in step["sources"]] == [5, 7]
    assert step["sources"][0]["history"][0]["command"] == "annotate"
    assert verify(tmp_path / "c.h5", sample=12).is_within
    assert search(world / "first.fa", tmp_path / "c.h5", k=1).hits.columns()["subject"] == list(SEQUENCES)[:5]


def test_join_of_umaps_is_theirs_and_of_graphs_is_named(world, tmp_path, caplog):
    for name in ("first", "last"):
        made = anndata.read_h5ad(world / f"{name}.h5")
        made.obsm["X_pca"] = made.X[:, :2].copy()
        made.obsp["graph"] = scipy.sparse.eye(made.n_obs, format="csr")
        made.write_h5ad(tmp_path / f"{name}.h5ad")
    report = join([tmp_path / "first.h5ad", tmp_path / "last.h5ad"], output=tmp_path / "c.h5")
    assert report.dropped == ("obsp/graph",)
    assert "left out what other programs added and joined rows cannot have: obsp/graph" in caplog.text
    found = anndata.read_h5ad(tmp_path / "c.h5")
    np.testing.assert_array_equal(found.obsm["X_pca"], found.X[:, :2])


def test_join_refuses_what_does_not_belong_together(world, tmp_path):
    output = tmp_path / "c.h5"
    with pytest.raises(DuplicateIdError, match=r"5 ids are also in .*first.h5 \(r0, r1, r2 ...\)"):
        join([world / "first.h5", world / "one.h5"], output=output)
    with pytest.raises(ConfigError, match="expected the same layers and features"):
        join([world / "one.h5", world / "max.h5"], output=output)
    with pytest.raises(ConfigError, match=r"of kind pooled, .* of kind tokens"):
        join([world / "one.h5", world / "tokens.h5"], output=output)
    subset(world / "windows.h5", ids=["r1"], output=tmp_path / "a.h5")
    with pytest.raises(ConfigError, match=r"hold vectors of another kind .*pooling: 'mean' against 'max'"):
        join([tmp_path / "a.h5", world / "max.h5"], output=output)
    with pytest.raises(ConfigError, match="1 file, expected two or more"):
        join([world / "one.h5"], output=output)
    assert not output.exists()


def test_join_keeps_apart_what_was_cut_in_different_windows(world, tmp_path):
    subset(world / "windows.h5", ids=["r1"], output=tmp_path / "a.h5")
    with pytest.raises(ConfigError, match=r"window: 16 against None.*per_window: True against None"):
        join([tmp_path / "a.h5", world / "max.h5"], output=tmp_path / "c.h5")


def test_join_of_rows_read_in_different_ways_says_so(world, tmp_path, caplog):
    (tmp_path / "x.fa").write_text(">x1\nAC-GTACGTACGT\n")
    options = {"model": str(world / "bert"), "layers": (0, 1), "dtype": "float32"}
    extract(tmp_path / "x.fa", **options, gaps="strip", output=tmp_path / "x.h5")
    join([world / "first.h5", tmp_path / "x.h5"], output=tmp_path / "c.h5")
    assert "read in different ways (gaps: 'error' against 'strip')" in caplog.text
    with pytest.raises(ConfigError, match="does not say of which files it was made"):
        verify(tmp_path / "c.h5")
    with pytest.raises(ConfigError, match="use the files it was joined from"):
        search(world / "first.fa", tmp_path / "c.h5", mode="kmer")
    join([tmp_path / "c.h5", world / "last.h5"], output=tmp_path / "d.h5")  # and so do rows joined once more
    with pytest.raises(ConfigError, match="does not say of which files it was made"):
        verify(tmp_path / "d.h5")


def test_joined_rows_whose_sources_share_ids_are_read_again(world, tmp_path):
    subset(world / "one.h5", ids=["r1", "r7"], output=tmp_path / "a.h5")
    (tmp_path / "x.fa").write_text(">r1\nACGTACGTTACG\n>x2\nACGTACGTACGTA\n")
    options = {"model": str(world / "bert"), "layers": (0, 1), "dtype": "float32"}
    extract(tmp_path / "x.fa", **options, output=tmp_path / "x.h5")
    subset(tmp_path / "x.h5", where="id!=r1", output=tmp_path / "b.h5")
    join(
        [tmp_path / "x.h5", subset(tmp_path / "a.h5", ids=["r7"], output=tmp_path / "c.h5").output],
        output=tmp_path / "d.h5",
    )
    join([tmp_path / "a.h5", tmp_path / "b.h5"], output=tmp_path / "e.h5")
    for name in ("d.h5", "e.h5"):
        report = verify(tmp_path / name)
        assert report.is_within
        assert (report.missing, report.other_sequence) == ((), ())
        assert len(search(tmp_path / "x.fa", tmp_path / name, mode="kmer").hits.columns()["query"])


def test_annotate_adds_typed_columns_and_names_what_does_not_match(world, tmp_path, caplog):
    (tmp_path / "t.csv").write_text("gene,kind,n,score\nr0,x,1,0.5\nr1,NA,2,1e3\nr2,x,,\nzz,y,4,1\n")
    report = annotate(world / "one.h5", tmp_path / "t.csv", output=tmp_path / "a.h5")
    assert report.columns == ("kind", "n", "score")
    assert report.without_values == tuple(f"r{row}" for row in range(3, 12))
    assert report.num_unknown_ids == 1
    assert "9 of 12 rows are not in" in caplog.text
    found = anndata.read_h5ad(tmp_path / "a.h5").obs
    assert found["kind"].isna().tolist() == [False, True, False, *[True] * 9]
    assert found["score"][:2].tolist() == [0.5, 1000]
    assert found["n"].dtype == float
    assert same_rows(tmp_path / "a.h5", world / "one.h5")


def test_annotate_matches_json_lines_by_key(world, tmp_path):
    table = tmp_path / "t.jsonl"
    table.write_text(
        '{"id": "r1", "x": 1, "y": 2}\n{"id": "r2", "y": 5, "x": 6}\n{"z": 4, "y": 8, "id": "r3"}\n'
    )
    report = annotate(world / "one.h5", table, output=tmp_path / "a.h5")
    assert report.columns == ("x", "y", "z")
    with open_embeddings(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file.obs["x"][1:4], [1, 6, np.nan])
        np.testing.assert_array_equal(file.obs["y"][1:4], [2, 5, 8])
        np.testing.assert_array_equal(file.obs["z"][1:4], [np.nan, np.nan, 4])
    for text in ("{}\n", '{"id": "r1", "x": 1}\n{"x": 2}\n'):
        table.write_text(text)
        with pytest.raises(LabelError, match="no 'id', expected it in every row"):
            annotate(world / "one.h5", table, output=tmp_path / "b.h5")


def test_annotate_keeps_leading_zeros(world, tmp_path):
    (tmp_path / "t.tsv").write_text("id\tcluster\nr0\t007\nr1\t7\n")
    annotate(world / "one.h5", tmp_path / "t.tsv", output=tmp_path / "a.h5")
    with open_embeddings(tmp_path / "a.h5") as file:
        assert file.obs["cluster"][:2].tolist() == ["007", "7"]


def test_annotate_in_place_replaces_columns_only_on_request(world, tmp_path):
    shutil.copy(world / "tokens.h5", tmp_path / "a.h5")
    (tmp_path / "t.tsv").write_text("id\tn\n" + "".join(f"r{row}\t{row}\n" for row in range(12)))
    annotate(tmp_path / "a.h5", tmp_path / "t.tsv")
    before = (tmp_path / "a.h5").read_bytes()
    with pytest.raises(ConfigError, match="has 'n' already; set overwrite=True"):
        annotate(tmp_path / "a.h5", tmp_path / "t.tsv")
    assert (tmp_path / "a.h5").read_bytes() == before
    (tmp_path / "t.tsv").write_text("id\tn\nr1\tone\n")
    annotate(tmp_path / "a.h5", tmp_path / "t.tsv", overwrite=True)
    with open_embeddings(tmp_path / "a.h5") as file:
        assert file.obs["n"].tolist() == ["", "one", *[""] * 10]
        assert list(file.obs).count("n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "t.tsv"]


@pytest.mark.parametrize("name", ["a\0b", ".", "..", "a\nb", "a/b", " "])
def test_annotate_refuses_names_that_no_file_can_hold(world, tmp_path, name):
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": "r1", name: "x"}) + "\n")
    with pytest.raises(ConfigError, match="cannot be a name in the file"):
        annotate(world / "one.h5", tmp_path / "t.jsonl", output=tmp_path / "a.h5")


def test_annotate_in_place_opens_what_it_wrote_before_it_replaces_anything(world, tmp_path, monkeypatch):
    file = Path(shutil.copy(world / "one.h5", tmp_path / "one.h5"))
    before = file.read_bytes()
    (tmp_path / "more.tsv").write_text("id\tkind\nr1\tphage\n")
    monkeypatch.setattr(rewriting._Rows, "_write_var", lambda self, layer: None)
    with pytest.raises(StoreError, match=r"one\.h5.*var"):
        annotate(file, tmp_path / "more.tsv")
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more.tsv", "one.h5"]


def test_annotate_in_place_keeps_the_mode_and_what_another_process_wrote(world, tmp_path, monkeypatch):
    path, first, second = (tmp_path / name for name in ("a.h5", "one.tsv", "two.tsv"))
    shutil.copy(world / "one.h5", path)
    path.chmod(0o600)
    first.write_text("id\tk\nr1\tx\n")
    second.write_text("id\tm\nr1\ty\n")
    read = editing._read_table

    def slowly(name, file):
        if name == str(second):  # another command begins and ends while this one reads
            annotate(path, first)
        return read(name, file)

    monkeypatch.setattr(editing, "_read_table", slowly)
    with pytest.raises(StoreError, match="was written by another process meanwhile"):
        annotate(path, second)
    assert path.stat().st_mode & 0o777 == 0o600
    with open_embeddings(path) as file:
        assert file.obs["k"][1] == "x"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("id\tlength\nr1\t3\n", ConfigError, r"\.tsv: column 'length' is one that genoembed writes"),
        ("id\ta/b\nr1\t3\n", ConfigError, "'a/b' cannot be a name in the file"),
        ("id\tk\nr1\t3\nr1\t4\n", LabelError, "r1.*has a row already"),
        ("id\tk\nzz\t3\n", LabelError, "none of its ids .zz. is in"),
        ("id\nr1\n", LabelError, "has no column of values"),
        ("r1\tx\nr2\ty\n", LabelError, "begins with the id 'r1', expected names of columns"),
    ],
)
def test_table_that_cannot_be_added_is_an_error_with_the_way_out(world, tmp_path, text, error, message):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(error, match=message):
        annotate(world / "one.h5", tmp_path / "t.tsv", output=tmp_path / "a.h5")
    assert not (tmp_path / "a.h5").exists()


def test_annotate_never_replaces_a_file_that_is_not_whole_or_not_ours(world, tmp_path):
    anndata.read_h5ad(world / "one.h5").write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "t.tsv").write_text("id\tk\nr1\tx\n")
    before = (tmp_path / "a.h5ad").read_bytes()
    with pytest.raises(StoreError, match="is not replaced"):
        annotate(tmp_path / "a.h5ad", tmp_path / "t.tsv")
    assert (tmp_path / "a.h5ad").read_bytes() == before
    annotate(tmp_path / "a.h5ad", tmp_path / "t.tsv", output=tmp_path / "b.h5")
    with open_embeddings(tmp_path / "b.h5") as file:
        assert file.changes == ()
        assert file.provenance["history"][0]["sources"][0]["changed"]


def test_files_of_the_first_schema_are_cut_too(tmp_path):
    path = ARCHIVES / "v1" / "tokens.h5"
    subset(path, ids=["ctg 3"], output=tmp_path / "a.h5")
    with open_embeddings(tmp_path / "a.h5") as file:
        assert (len(file), file.schema_version, file.obs["unread"].tolist()) == (1, 2, [-1])
    assert same_rows(tmp_path / "a.h5", path)


def test_file_that_holds_no_embeddings_is_refused(tmp_path):
    (tmp_path / "x.h5").write_text(">a\nACGT\n")
    with pytest.raises(StoreFormatError, match="is not an HDF5 file"):
        subset(tmp_path / "x.h5", ids=["a"], output=tmp_path / "y.h5")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(("source", "good_blocks"), [("one.h5", 1), ("tokens.h5", 1), ("more.h5ad", 25)])
def test_full_disk_ends_the_writing_at_the_block(world, tmp_path, monkeypatch, source, good_blocks, error):
    path = world / source
    if source == "more.h5ad":
        made = anndata.read_h5ad(world / "one.h5")
        made.obsm["X_big"] = np.zeros((12, 40))  # copied after the two layers, 22 blocks
        made.write_h5ad(path := tmp_path / source)
    files: list[AtomicFile] = []
    monkeypatch.setattr(rewriting, "AtomicFile", lambda target: files.append(AtomicFile(target)) or files[-1])
    monkeypatch.setattr(rewriting, "SLAB_BYTES", 64)
    blocks: list[object] = []

    def failing(parts):
        def wrapped(*args):
            for part in parts(*args):
                blocks.append(part)
                if len(blocks) > good_blocks:
                    files[-1].error = error
                yield part

        return wrapped

    for name in ("_blocks", "_token_runs"):
        monkeypatch.setattr(rewriting, name, failing(getattr(rewriting, name)))
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else StoreError):
        subset(path, where="id!=r3", output=tmp_path / "out.h5")
    assert len(blocks) == good_blocks + 1
    assert not (tmp_path / "out.h5").exists()


def test_tokens_of_scattered_rows_are_found_in_one_look(world, tmp_path, monkeypatch):
    looks: list[object] = []
    found = EmbeddingFile.num_tokens.fget
    monkeypatch.setattr(EmbeddingFile, "num_tokens", property(lambda file: looks.append(file) or found(file)))
    subset(world / "tokens.h5", ids=["r0", "r2", "r4", "r6", "r8"], output=tmp_path / "out.h5")
    assert len(looks) <= 3  # lengths, spans, and the one layer
