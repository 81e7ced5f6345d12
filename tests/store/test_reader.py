"""What the reader promises: everything that was written, lazily, and clear errors for everything else."""

from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils.data import DataLoader

from genoembed.contracts import EmbeddingBlock, ObsRow, TokenBlock
from genoembed.errors import (
    LayerError,
    MissingExtraError,
    SchemaVersionError,
    StoreError,
    StoreFormatError,
)
from genoembed.store import EmbeddingWriter, open_embeddings
from genoembed.store import schema as matrix
from genoembed.store.merging import read_block
from genoembed.store.schema import OBS_COLUMNS, escape_name
from tests.data.archives import make
from tests.store.blocks import obs_row, pooled_block, side_by_side, token_block, write_file

KINDS = ("pooled", "tokens")
ARCHIVES = Path(__file__).parents[1] / "data" / "archives"
WEIRD_IDS = ["a/b", "/", ".", "..", "with space", "tab\tid", "sp|P1|é", "日本語", "%2F", "", "X", "a" * 3000]

names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
values = st.floats(-1000, 1000, width=32)
numbers = st.integers(-(2**62), 2**62)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
obs_rows = st.builds(
    ObsRow,
    id=names,
    description=names,
    length=numbers,
    start=numbers,
    end=numbers,
    strand=st.sampled_from("+-"),
    source=names,
    n_windows=numbers,
    sha256=names,
    flags=names,
)
row_lists = st.lists(obs_rows, max_size=6, unique_by=lambda row: row.id)
layer_lists = st.lists(names, min_size=1, max_size=3, unique=True)


def table(embeddings):
    columns = [embeddings.obs[name] for name in OBS_COLUMNS if name in embeddings.obs]
    return list(zip(embeddings.ids, *columns, strict=True))


def expected_table(rows):
    return [tuple(asdict(row).values()) for row in rows]


# --- everything that was written ------------------------------------------------------------------


@given(data=st.data(), rows=row_lists, layers=layer_lists, provenance=st.dictionaries(st.text(), json_values))
@settings(deadline=None, max_examples=40)
def test_pooled_file_round_trip(tmp_path_factory, data, rows, layers, provenance):
    path = tmp_path_factory.mktemp("round") / "a.h5"
    widths = st.integers(1, 4)
    matrices = {
        name: data.draw(hnp.arrays(np.float32, (len(rows), data.draw(widths)), elements=values))
        for name in layers
    }
    cut = data.draw(st.integers(0, len(rows)))
    blocks = [
        EmbeddingBlock(rows=tuple(rows[part]), matrices={name: m[part] for name, m in matrices.items()})
        for part in (slice(cut), slice(cut, None))
    ]
    write_file(path, *blocks, provenance=provenance)
    with open_embeddings(path) as embeddings:
        assert embeddings.layers == layers
        assert table(embeddings) == expected_table(rows)
        assert embeddings.provenance == provenance
        for name, written in matrices.items():
            np.testing.assert_array_equal(embeddings[name][:], written)
        np.testing.assert_array_equal(embeddings.X, matrices[layers[0]])
        adata = embeddings.to_anndata()
    np.testing.assert_array_equal(adata.X, matrices[layers[0]])
    assert list(adata.obs_names) == [row.id for row in rows]
    shutil.rmtree(path.parent)


@given(data=st.data(), rows=row_lists, layers=layer_lists)
@settings(deadline=None, max_examples=30)
def test_token_file_round_trip(tmp_path_factory, data, rows, layers):
    path = tmp_path_factory.mktemp("round") / "a.h5"
    lengths = np.array(
        data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows))), np.int64
    )
    tokens = {
        name: data.draw(hnp.arrays(np.float32, (int(lengths.sum()), 2), elements=values)) for name in layers
    }
    block = TokenBlock(rows=tuple(rows), lengths=lengths, values=tokens, spans=side_by_side(lengths))
    write_file(path, block)
    with open_embeddings(path) as embeddings:
        assert (embeddings.kind, embeddings.layers, len(embeddings)) == ("tokens", layers, len(rows))
        assert table(embeddings) == expected_table(rows)
        ends = np.cumsum(lengths)
        for row, length, end in zip(rows, lengths, ends, strict=True):
            for name in layers:
                found = embeddings.tokens(row.id, name)
                np.testing.assert_array_equal(found, tokens[name][end - length : end])
            assert embeddings.token_spans(row.id).tolist() == [[2 * at, 2 * at + 2] for at in range(length)]
    shutil.rmtree(path.parent)


def test_token_blocks_are_joined(tmp_path):
    first, second = token_block([2, 3]), token_block([4, 0], prefix="s", seed=1)
    with open_embeddings(write_file(tmp_path / "a.h5", first, second)) as embeddings:
        assert embeddings["blocks.1"].shape == (9, 3)
        np.testing.assert_array_equal(embeddings.tokens("r1"), first.values["blocks.1"][2:])
        np.testing.assert_array_equal(embeddings.tokens("s0"), second.values["blocks.1"])
        assert embeddings.tokens("s1").shape == (0, 3)
        assert embeddings.feature_names == ["blocks.1:0", "blocks.1:1", "blocks.1:2"]


def test_weird_ids_are_only_text(tmp_path):
    block = pooled_block(WEIRD_IDS)
    path = write_file(tmp_path / "a.h5", block)
    with open_embeddings(path) as embeddings:
        assert embeddings.ids == WEIRD_IDS
        for row, record_id in enumerate(WEIRD_IDS):
            assert embeddings.index_of(record_id) == row
    assert list(anndata.read_h5ad(path).obs_names) == WEIRD_IDS


@given(left=names, right=names)
def test_escape_name_is_one_link_and_keeps_names_apart(left, right):
    assert "/" not in escape_name(left)
    assert escape_name(left) not in {"", "."}
    assert (escape_name(left) == escape_name(right)) == (left == right)


# --- other readers --------------------------------------------------------------------------------


def test_anndata_reads_a_pooled_file(tmp_path):
    block = pooled_block(["a", "b", "c"], ("blocks.1", "blocks/2"))
    provenance = {
        "model": {"id": "mini", "layers": 32},
        "counts": [1, 2],
        "bytes": 2**70,
        "window": None,
        "inputs": [{"path": "a.fa"}],
        "rc": True,
        "a/b": "x\0y",
        "pools": ["mean"],
        "scores": [0.5],
    }
    adata = anndata.read_h5ad(write_file(tmp_path / "a.h5", block, provenance=provenance))
    np.testing.assert_array_equal(adata.X, block.matrices["blocks.1"])
    np.testing.assert_array_equal(adata.obsm["blocks%2F2"], block.matrices["blocks/2"])
    assert list(adata.obs_names) == ["a", "b", "c"]
    assert list(adata.obs.columns) == list(OBS_COLUMNS)
    assert adata.obs["strand"].dtype == "category"
    assert adata.obs["length"].tolist() == [12, 12, 12]
    assert list(adata.var_names) == [f"blocks.1:{i}" for i in range(4)]
    mirror = adata.uns["genoembed"]
    assert mirror["model"] == {"id": "mini", "layers": 32}
    assert mirror["counts"].tolist() == [1, 2]
    assert mirror["scores"].tolist() == [0.5]
    assert mirror["pools"].tolist() == ["mean"]
    assert mirror["bytes"] == str(2**70)
    assert mirror["inputs"] == '[{"path": "a.fa"}]'
    assert mirror["rc"] == True  # noqa: E712 - a NumPy bool
    assert mirror["a%2Fb"] == r"x\x00y"
    assert "window" not in mirror


def test_anndata_can_use_and_write_what_it_read(tmp_path):
    adata = anndata.read_h5ad(write_file(tmp_path / "a.h5", pooled_block(["a", "b", "c"], ("l", "m"))))
    subset = adata[["c", "a"], :2].copy()
    subset.write_h5ad(tmp_path / "b.h5ad")
    again = anndata.read_h5ad(tmp_path / "b.h5ad")
    np.testing.assert_array_equal(again.X, adata.X[[2, 0], :2])
    with open_embeddings(tmp_path / "b.h5ad") as embeddings:
        assert (embeddings.ids, embeddings.layers) == (["c", "a"], ["l", "m"])
        # scanpy took columns of X; the copy of the layer in obsm is whole
        np.testing.assert_array_equal(embeddings.X, adata.obsm["l"][[2, 0]])


def test_anndata_backed_mode_reads_a_pooled_file(tmp_path):
    block = pooled_block(["a", "b"])
    adata = anndata.read_h5ad(write_file(tmp_path / "a.h5", block), backed="r")
    np.testing.assert_array_equal(adata.X[:], block.matrices["blocks.1"])
    adata.file.close()


def test_plain_h5py_reads_a_token_file_as_the_format_page_says(tmp_path):
    block = token_block([2, 0, 3], ("a/b",))
    with h5py.File(write_file(tmp_path / "a.h5", block)) as hdf5:
        ids = hdf5["obs/_index"].asstr()[:].tolist()
        offsets = hdf5["tokens/offsets"][:]
        row = ids.index("r2")
        found = hdf5["tokens/a%2Fb/values"][offsets[row] : offsets[row + 1]]
        assert hdf5.attrs["genoembed-layers"].tolist() == ["a/b"]
        assert hdf5.attrs["encoding-type"] == "genoembed-tokens"
    np.testing.assert_array_equal(found, block.values["a/b"][2:])


def test_example_of_the_format_page_reads_both_kinds():
    page = (Path(__file__).parents[2] / "docs" / "FORMAT.md").read_text(encoding="utf-8")
    example = {}
    exec(page.split("```python\n")[1].split("```")[0], example)
    for path in (ARCHIVES / version / f"{kind}.h5" for version in ("v1", "v2") for kind in KINDS):
        with open_embeddings(path) as embeddings:
            for row, record_id in enumerate(embeddings.ids):
                for layer in (None, "blocks/10"):
                    found = example["read_vectors"](path, record_id, layer)
                    np.testing.assert_array_equal(found, embeddings.vectors(row, layer))
            assert example["read_provenance"](path) == embeddings.provenance


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_archived_files_are_read(kind, version):
    with open_embeddings(ARCHIVES / f"v{version}" / f"{kind}.h5") as embeddings:
        assert embeddings.schema_version == version
        assert embeddings.layers == ["blocks.28.mlp.l3", "blocks/10"]
        assert ("unread" in embeddings.obs) == (version > 1)
        assert table(embeddings) == [row[: len(embeddings.obs) + 1] for row in expected_table(make.ROWS)]
        assert embeddings.provenance["note"] == "Grüße"
        rows = 3 if embeddings.kind == "pooled" else 5
        np.testing.assert_array_equal(embeddings["blocks.28.mlp.l3"], make.eighths(rows, 4, -5))
        np.testing.assert_array_equal(embeddings["blocks/10"], make.eighths(rows, 2, 100))
        if embeddings.kind == "tokens":
            np.testing.assert_array_equal(embeddings.tokens("ctg 3"), make.eighths(5, 4, -5)[2:])
            if version > 1:
                np.testing.assert_array_equal(embeddings.token_spans("ctg 3"), make.SPANS[2:])
            else:
                with pytest.raises(StoreError, match="does not say which bases each token has"):
                    embeddings.token_spans("ctg 3")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_schema_1_are_written_with_what_is_unknown(kind, tmp_path):
    with open_embeddings(ARCHIVES / "v1" / f"{kind}.h5") as old:
        write_file(tmp_path / "a.h5", read_block(old))
    with open_embeddings(tmp_path / "a.h5") as new:
        assert new.schema_version == 2
        assert new.obs["unread"].tolist() == [-1, -1, -1]
        if kind == "tokens":
            with pytest.raises(StoreError, match="extract again"):
                new.token_spans("ctg 3")
            assert len(new.token_spans("sp|P1/2|é ü")) == 0


def test_bases_have_the_values_of_their_tokens(tmp_path):
    rows = (obs_row("a", length=7), obs_row("b", length=5))
    spans = np.array([[0, 3], [3, 4], [4, 6], [0, 3], [1, 4], [2, 5]])
    values = {"x": np.arange(6, dtype=np.float32)[:, None]}
    block = TokenBlock(rows=rows, lengths=np.array([3, 3]), values=values, spans=spans)
    with open_embeddings(write_file(tmp_path / "a.h5", block)) as embeddings:
        np.testing.assert_array_equal(embeddings.bases("a")[:, 0], [0, 0, 0, 1, 2, 2, np.nan])
        np.testing.assert_array_equal(embeddings.bases("b")[:, 0], [3, 3.5, 4, 4.5, 5])
        np.testing.assert_array_equal(embeddings.token_spans("b"), spans[3:])


def test_archives_are_what_the_script_makes_today(tmp_path):
    """Schema 2 is still what is written: else a new version of the schema is due."""
    make.make_pooled(tmp_path / "pooled.h5")
    make.make_tokens(tmp_path / "tokens.h5")
    for name in ("pooled.h5", "tokens.h5"):
        assert described(tmp_path / name) == described(ARCHIVES / "v2" / name)


def described(path):
    found = {}
    with h5py.File(path) as hdf5:
        hdf5.visititems(
            lambda name, node: found.update({name: (getattr(node, "shape", None), sorted(node.attrs))})
        )
        found["/"] = sorted(hdf5.attrs)
    return found


# --- lazy matrices --------------------------------------------------------------------------------


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_matrix_indexes_as_numpy_does(tmp_path_factory, data):
    whole = np.arange(12 * 5, dtype=np.float32).reshape(12, 5)
    path = tmp_path_factory.mktemp("index") / "a.h5"
    write_file(path, EmbeddingBlock(rows=tuple(obs_row(str(i)) for i in range(12)), matrices={"l": whole}))
    one_row = st.integers(-12, 11)
    row_list = st.lists(one_row, max_size=5).map(lambda rows: np.array(rows, np.int64))
    masks = hnp.arrays(bool, 12)
    rows = data.draw(one_row | st.slices(12) | row_list | masks)
    column = data.draw(st.integers(-5, 4) | st.slices(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "SLAB_BYTES", data.draw(st.sampled_from([1, 60, 10_000])))
        with open_embeddings(path) as embeddings:
            np.testing.assert_array_equal(embeddings.X[rows], whole[rows])
            np.testing.assert_array_equal(embeddings.X[rows, column], whole[rows, column])
    shutil.rmtree(path.parent)


def test_matrix_columns_by_list_are_as_in_numpy(tmp_path):
    block = pooled_block(["a", "b", "c"])
    whole = block.matrices["blocks.1"]
    with open_embeddings(write_file(tmp_path / "a.h5", block)) as embeddings:
        np.testing.assert_array_equal(embeddings.X[:, [3, 0]], whole[:, [3, 0]])
        np.testing.assert_array_equal(embeddings.X[[2, 0], [3, 1]], whole[[2, 0], [3, 1]])
        np.testing.assert_array_equal(np.asarray(embeddings.X, dtype=np.float64), whole.astype(np.float64))
        assert (embeddings.X.shape, embeddings.X.ndim, len(embeddings.X)) == ((3, 4), 2, 3)
        assert repr(embeddings.X) == "LazyMatrix(3 x 4, float32)"
        with pytest.raises(IndexError, match="out of range"):
            embeddings.X[3]
        with pytest.raises(IndexError, match="rows must be a number, a slice or one list"):
            embeddings.X[[[0, 1]]]
        with pytest.raises(ValueError, match="cannot become an array without a copy"):
            np.array(embeddings.X, copy=False)


# --- to other libraries ---------------------------------------------------------------------------


def test_to_pandas_of_pooled_vectors(tmp_path):
    block = pooled_block(["a", "b"], ("l", "m"))
    path = write_file(tmp_path / "a.h5", block, feature_names=list("wxyz"))
    with open_embeddings(path) as embeddings:
        expected = pd.DataFrame(
            block.matrices["l"], index=pd.Index(["a", "b"], name="id"), columns=list("wxyz")
        )
        pd.testing.assert_frame_equal(embeddings.to_pandas(), expected)
        assert list(embeddings.to_pandas("m").columns) == ["m:0", "m:1", "m:2", "m:3"]


def test_to_pandas_of_tokens(tmp_path):
    block = token_block([2, 0, 1])
    with open_embeddings(write_file(tmp_path / "a.h5", block)) as embeddings:
        frame = embeddings.to_pandas()
    assert list(frame.index) == [("r0", 0), ("r0", 1), ("r2", 0)]
    np.testing.assert_array_equal(frame.loc["r2"], block.values["blocks.1"][2:])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_to_torch_feeds_a_dataloader(tmp_path, workers):
    block = pooled_block([f"r{i}" for i in range(10)])
    embeddings = open_embeddings(write_file(tmp_path / "a.h5", block))
    loader = DataLoader(
        embeddings.to_torch(), batch_size=4, num_workers=workers, multiprocessing_context=None
    )
    batches = list(loader)
    embeddings.close()
    assert [record_id for ids, _ in batches for record_id in ids] == [f"r{i}" for i in range(10)]
    torch.testing.assert_close(
        torch.cat([vectors for _, vectors in batches]), torch.from_numpy(block.matrices["blocks.1"])
    )


def test_to_torch_survives_pickling_and_closing(tmp_path):
    block = token_block([2, 3])
    with open_embeddings(write_file(tmp_path / "a.h5", block)) as embeddings:
        dataset = embeddings.to_torch()
        assert len(dataset) == 2
    copied = pickle.loads(pickle.dumps(dataset))
    record_id, vectors = copied[-1]
    assert (record_id, tuple(vectors.shape)) == ("r1", (3, 3))
    with pytest.raises(IndexError, match="out of range"):
        copied[2]


class RowsOf:
    """What users write around an open file."""

    def __init__(self, matrix):
        self.matrix = matrix

    def __len__(self):
        return len(self.matrix)

    def __getitem__(self, row):
        return self.matrix[row]


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_open_file_and_its_matrices_go_to_workers_of_a_dataloader(tmp_path, method):
    block = pooled_block([f"r{i}" for i in range(10)], ("a", "b"))
    with open_embeddings(write_file(tmp_path / "a.h5", block)) as embeddings:
        rows = RowsOf(embeddings["b"])
        loader = DataLoader(rows, batch_size=4, num_workers=1, multiprocessing_context=method)
        found = torch.cat(list(loader)).numpy()
    np.testing.assert_array_equal(found, block.matrices["b"])


def test_pickled_file_is_opened_again_wherever_that_happens(tmp_path, monkeypatch):
    monkeypatch.chdir(write_file(tmp_path / "a.h5", pooled_block(["a", "b"])).parent)
    embeddings = open_embeddings("a.h5")
    stored, copied = pickle.dumps(embeddings), copy.copy(embeddings)
    monkeypatch.chdir("/")
    again = pickle.loads(stored)
    embeddings.close()
    assert again.ids == copied.ids == ["a", "b"]
    for thing in (embeddings, embeddings.X):
        with pytest.raises(StoreError, match="is closed; open it again"):
            pickle.dumps(thing)
    write_file(tmp_path / "new.h5", pooled_block(["another"])).rename(tmp_path / "a.h5")
    with pytest.raises(StoreError, match="has changed since it was opened in another process"):
        pickle.loads(stored)


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    with open_embeddings(write_file(tmp_path / "a.h5", pooled_block(["a"]))) as embeddings:
        monkeypatch.setitem(sys.modules, "anndata", None)
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(MissingExtraError, match=r"to_anndata needs anndata; .*install .*\[analysis\]"):
            embeddings.to_anndata()
        with pytest.raises(MissingExtraError, match=r"to_pandas needs pandas; .*install .*\[analysis\]"):
            embeddings.to_pandas()


def test_store_imports_no_torch_anndata_or_pandas():
    code = "import sys, genoembed.store; print({'torch', 'anndata', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


# --- asking for what is not there -----------------------------------------------------------------


def test_unknown_names_suggest_near_ones(tmp_path):
    path = write_file(tmp_path / "a.h5", pooled_block(["chr1", "chr2"], ("blocks.1", "blocks.2")))
    with open_embeddings(path) as embeddings:
        with pytest.raises(
            LayerError, match=r"layer 'block\.2' is not among .* did you mean 'blocks\.2'\?"
        ) as caught:
            embeddings["block.2"]
        assert caught.value.spec == "block.2"
        with pytest.raises(
            StoreError, match=r"record 'chr_2' is not among the 2 records.*did you mean 'chr2'\?"
        ):
            embeddings.index_of("chr_2")
        with pytest.raises(LayerError, match="'final'"):
            embeddings.to_torch("final")
        with pytest.raises(KeyError, match="color"):
            embeddings.obs["color"]


def test_pooled_file_has_no_tokens(tmp_path):
    with open_embeddings(write_file(tmp_path / "a.h5", pooled_block(["a"]))) as embeddings:
        with pytest.raises(StoreError, match="one pooled vector a record, and so no tokens"):
            embeddings.tokens("a")


def test_token_file_has_no_matrix_of_records(tmp_path):
    with open_embeddings(write_file(tmp_path / "a.h5", token_block([1]))) as embeddings:
        with pytest.raises(StoreError, match=r"a vector for every token, and so no X; use tokens\(id\)"):
            embeddings.X  # noqa: B018
        with pytest.raises(StoreError, match="which AnnData cannot"):
            embeddings.to_anndata()


def test_closed_file_says_so(tmp_path):
    with open_embeddings(write_file(tmp_path / "a.h5", pooled_block(["a"]))) as embeddings:
        vectors, obs = embeddings.X, embeddings.obs
        assert "pooled, 1 records, blocks.1 (4)" in repr(embeddings)
        assert repr(obs).startswith("ObsTable(description, length")
    assert repr(embeddings).endswith("closed)")
    for ask in (
        lambda: embeddings.ids,
        lambda: vectors[0],
        lambda: obs["length"],
        lambda: embeddings.provenance,
    ):
        with pytest.raises(StoreError, match=r"a\.h5: is closed; open it again with open_embeddings"):
            ask()


# --- files that are no embedding files ------------------------------------------------------------


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(StoreError, match=r"no\.h5: cannot be opened \(No such file or directory\)"):
        open_embeddings(tmp_path / "no.h5")
    with pytest.raises(StoreError, match=r"cannot be opened \(Is a directory\)"):
        open_embeddings(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty, expected an HDF5 file"), (b">a\nACGT\n", "is not an HDF5 file")]
)
def test_file_that_is_not_hdf5_is_refused(tmp_path, content, message):
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(StoreFormatError, match=message):
        open_embeddings(tmp_path / "a.h5")


def test_hdf5_of_another_program_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as hdf5:
        hdf5["X"] = np.ones((2, 2))
    with pytest.raises(
        StoreFormatError, match="no attribute genoembed-schema, so genoembed did not write it"
    ):
        open_embeddings(tmp_path / "a.h5")


def test_file_cut_off_anywhere_is_a_store_error(tmp_path):
    content = (ARCHIVES / "v1" / "pooled.h5").read_bytes()
    cut = tmp_path / "cut.h5"
    lengths = [*range(0, 200, 7), *range(200, len(content), 611), len(content) - 1]
    for length in lengths:
        cut.write_bytes(content[:length])
        with pytest.raises(StoreFormatError, match=r"cut.h5: (is|cannot|has)"):
            open_embeddings(cut)
    assert len(lengths) > 50


@pytest.mark.parametrize(("version", "supported"), [(3, 2), (99, 2)])
def test_newer_schema_is_refused(tmp_path, version, supported):
    path = write_file(tmp_path / "a.h5", pooled_block(["a"]))
    with h5py.File(path, "a") as hdf5:
        hdf5.attrs["genoembed-schema"] = version
    message = (
        rf"a\.h5: format version {version} is newer than this genoembed reads \(1-2\); upgrade genoembed"
    )
    with pytest.raises(SchemaVersionError, match=message) as caught:
        open_embeddings(path)
    assert (caught.value.found, caught.value.supported) == (version, supported)


@pytest.mark.parametrize("version", [0, -1, "one", 1.5])
def test_version_that_is_none_is_refused(tmp_path, version):
    path = write_file(tmp_path / "a.h5", pooled_block(["a"]))
    with h5py.File(path, "a") as hdf5:
        hdf5.attrs["genoembed-schema"] = version
    with pytest.raises(StoreFormatError, match=r"attribute genoembed-schema is .*, expected 1 to 2"):
        open_embeddings(path)


def members(path):
    found = []
    with h5py.File(path) as hdf5:
        hdf5.visit(found.append)
    return found


@pytest.mark.parametrize("name", ["pooled.h5", "tokens.h5"])
def test_missing_member_is_a_store_error_or_not_needed(tmp_path, name):
    optional = {"layers", "obsp", "varm", "varp"}
    missed = 0
    for member in members(ARCHIVES / "v1" / name):
        is_mirror = member.startswith("uns/genoembed/") and not member.endswith("provenance_json")
        if is_mirror or member in optional or member == "obsm/blocks.28.mlp.l3":
            continue
        damaged = shutil.copy(ARCHIVES / "v1" / name, tmp_path / "damaged.h5")
        with h5py.File(damaged, "a") as hdf5:
            del hdf5[member]
        with pytest.raises(
            StoreFormatError, match=r"damaged.h5: (/.* is missing, expected a dataset|cannot be read)"
        ):
            open_embeddings(damaged)
        missed += 1
    assert missed > 15


def resize(name, rows):
    def damage(hdf5):
        hdf5[name].resize(rows, axis=0)

    return damage


def replaced(name, value):
    def damage(hdf5):
        attributes = dict(hdf5[name].attrs)
        del hdf5[name]
        hdf5[name] = value
        hdf5[name].attrs.update(attributes)

    return damage


def attribute(name, value):
    def damage(hdf5):
        hdf5.attrs[name] = value

    return damage


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("pooled.h5", resize("X", 2), r"/X has shape \(2, 4\).*expected \(3, D\)"),
        ("pooled.h5", resize("obsm/blocks%2F10", 4), r"/obsm/blocks%2F10 has shape \(4, 2\)"),
        (
            "pooled.h5",
            resize("obs/length", 2),
            r"/obs/length has shape \(2,\), expected \(3,\), the rows of /obs",
        ),
        ("pooled.h5", resize("obs/strand/codes", 2), r"/obs/strand/codes has shape \(2,\)"),
        (
            "pooled.h5",
            replaced("var/_index", ["a"]),
            r"/var/_index has shape \(1,\), expected \(4,\), the features",
        ),
        ("pooled.h5", replaced("X", [["a"] * 4] * 3), "/X has shape .* and dtype object"),
        (
            "pooled.h5",
            attribute("encoding-type", "zarr"),
            "encoding-type is 'zarr', expected anndata or genoembed",
        ),
        ("pooled.h5", attribute("genoembed-layers", []), "genoembed-layers is empty"),
        ("pooled.h5", attribute("genoembed-layers", ["x", "y"]), "/obsm/y is missing"),
        ("pooled.h5", attribute("genoembed-layers", h5py.Empty("f")), "cannot be read"),
        (
            "tokens.h5",
            resize("tokens/blocks%2F10/values", 4),
            r"values has shape \(4, 2\).*expected \(5, D\)",
        ),
        ("tokens.h5", resize("tokens/offsets", 3), r"/tokens/offsets has shape \(3,\), expected \(4,\)"),
        ("tokens.h5", replaced("tokens/offsets", [0, 3, 2, 5]), "/tokens/offsets does not rise from 0"),
        ("tokens.h5", replaced("tokens/offsets", [1, 2, 2, 5]), "/tokens/offsets does not rise from 0"),
    ],
)
def test_parts_that_disagree_are_a_store_error(tmp_path, name, damage, message):
    damaged = shutil.copy(ARCHIVES / "v1" / name, tmp_path / "damaged.h5")
    with h5py.File(damaged, "a") as hdf5:
        damage(hdf5)
    with pytest.raises(StoreFormatError, match=message):
        open_embeddings(damaged)


@pytest.mark.parametrize(
    ("damage", "ask"),
    [
        (replaced("obs/strand/codes", np.array([0, 1, 2])), lambda embeddings: embeddings.obs["strand"]),
        (replaced("obs/_index", np.array([b"a", b"\xff", b"c"])), lambda embeddings: embeddings.ids),
        (replaced("obs/_index", np.array([1, 2, 3])), lambda embeddings: embeddings.ids),
        (replaced("uns/genoembed/provenance_json", "{"), lambda embeddings: embeddings.provenance),
        (replaced("uns/genoembed/provenance_json", "[1]"), lambda embeddings: embeddings.provenance),
    ],
)
def test_damage_inside_is_found_when_it_is_read(tmp_path, damage, ask):
    damaged = shutil.copy(ARCHIVES / "v1" / "pooled.h5", tmp_path / "damaged.h5")
    with h5py.File(damaged, "a") as hdf5:
        damage(hdf5)
    with open_embeddings(damaged) as embeddings:
        with pytest.raises(
            StoreFormatError, match=r"damaged\.h5: (cannot be read|/uns/genoembed/provenance_json is)"
        ):
            ask(embeddings)


def test_file_opens_while_another_is_written_over_it(tmp_path):
    path = write_file(tmp_path / "a.h5", pooled_block(["old"]))
    with open_embeddings(path) as before:
        with EmbeddingWriter(path, kind="pooled", overwrite=True) as writer:
            writer.append(pooled_block(["new"]))
            writer.finish({})
        assert before.ids == ["old"]
    with open_embeddings(path) as after:
        assert after.ids == ["new"]
