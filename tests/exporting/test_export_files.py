"""``export``: every container reads back as what the file holds; what does not fit is refused."""

from __future__ import annotations

import csv
import io
import json

import h5py
import numpy as np
import pytest

from genoembed import export
from genoembed.contracts import EmbeddingBlock, ObsRow, TokenBlock
from genoembed.errors import ConfigError, LayerError, StoreError
from genoembed.exporting import files as blocks
from genoembed.store.writer import EmbeddingWriter
from tests.store.blocks import side_by_side

IDS = ("a/b%", "..", "plain", "Grüße")
LENGTHS = (3, 0, 1, 4)
SPANS = side_by_side(LENGTHS)
GENERATOR = np.random.default_rng(2)
POOLED = {
    name: GENERATOR.normal(size=(4, width)).astype(np.float32) for name, width in (("x", 3), ("y/z", 2))
}
TOKENS = {
    name: GENERATOR.normal(size=(8, width)).astype(np.float32) for name, width in (("x", 3), ("y/z", 2))
}
FACTS = {"note": "Grüße", "model": {"dtype": "float32"}}


def obs_rows():
    return tuple(
        ObsRow(
            id=name, description=f"about {name}, really", length=number, start=0, end=number, strand="+",
            source="a.fa", n_windows=1, sha256="s", flags="",
        )
        for name, number in zip(IDS, LENGTHS, strict=True)
    )  # fmt: skip


@pytest.fixture
def pooled(tmp_path):
    with EmbeddingWriter(tmp_path / "a.h5", kind="pooled") as writer:
        writer.append(EmbeddingBlock(rows=obs_rows(), matrices=POOLED))
        writer.finish(FACTS)
    return tmp_path / "a.h5"


@pytest.fixture
def tokens(tmp_path):
    with EmbeddingWriter(tmp_path / "t.h5", kind="tokens", dtype="float16") as writer:
        writer.append(TokenBlock(rows=obs_rows(), lengths=np.array(LENGTHS), values=TOKENS, spans=SPANS))
        writer.finish(FACTS)
    return tmp_path / "t.h5"


@pytest.fixture(params=[1 << 21, 4], ids=["one block", "blocks"])
def _block_size(request, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK_VALUES", request.param)


def token_runs(values):
    ends = np.cumsum(LENGTHS)
    return [values[end - length : end].astype(np.float16) for end, length in zip(ends, LENGTHS, strict=True)]


def test_h5ad_is_the_file_or_one_layer_of_it(pooled):
    anndata = pytest.importorskip("anndata")
    report = export(pooled, "h5ad")
    assert (report.output, report.num_records) == (pooled.with_suffix(".h5ad"), 4)
    whole = anndata.read_h5ad(report.output)
    np.testing.assert_array_equal(whole.X, POOLED["x"])
    alone = anndata.read_h5ad(export(pooled, "h5ad", layer="y/z", overwrite=True).output)
    np.testing.assert_array_equal(alone.X, POOLED["y/z"])
    assert list(alone.obs_names) == list(IDS)
    assert list(alone.var_names) == ["y/z:0", "y/z:1"]
    assert list(alone.obs["length"]) == list(LENGTHS)


@pytest.mark.usefixtures("_block_size")
def test_npz_needs_no_pickle(pooled, tokens):
    with np.load(export(pooled, "npz").output, allow_pickle=False) as found:
        assert found["ids"].tolist() == list(IDS)
        np.testing.assert_array_equal(found["X"], POOLED["x"])
        np.testing.assert_array_equal(found["y/z"], POOLED["y/z"])
        assert found["length"].tolist() == list(LENGTHS)
        assert found["feature_names"].tolist() == ["x:0", "x:1", "x:2"]
        assert json.loads(str(found["provenance"])) == FACTS
    with np.load(export(tokens, "npz").output, allow_pickle=False) as found:
        assert found["offsets"].tolist() == [0, 3, 3, 4, 8]
        assert found["X"].dtype == np.float16
        np.testing.assert_array_equal(found["y/z"], TOKENS["y/z"].astype(np.float16))


@pytest.mark.usefixtures("_block_size")
def test_parquet_has_a_list_a_layer(pooled, tokens):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(export(pooled, "parquet").output)
    assert table["id"].to_pylist() == list(IDS)
    assert table["description"].to_pylist()[0] == "about a/b%, really"
    assert table["length"].to_pylist() == list(LENGTHS)
    np.testing.assert_array_equal(np.array(table["y/z"].to_pylist(), np.float32), POOLED["y/z"])
    assert json.loads(table.schema.metadata[b"genoembed"]) == FACTS
    found = parquet.read_table(export(tokens, "parquet").output)["x"].to_pylist()
    for run, expected in zip(found, token_runs(TOKENS["x"]), strict=True):
        np.testing.assert_array_equal(np.array(run, np.float16).reshape(-1, 3), expected)


@pytest.mark.usefixtures("_block_size")
def test_csv_reads_back_bit_by_bit(pooled):
    report = export(pooled, "csv", layer="x")
    text = report.output.read_text(encoding="utf-8")
    header, *lines = csv.reader(io.StringIO(text))
    assert header == ["id", "x:0", "x:1", "x:2"]
    assert [line[0] for line in lines] == list(IDS)
    np.testing.assert_array_equal(np.array([line[1:] for line in lines], np.float32), POOLED["x"])
    assert report.num_bytes == len(text.encode())


@pytest.mark.usefixtures("_block_size")
def test_uniprot_h5_has_a_dataset_a_record(pooled, tokens):
    with h5py.File(export(pooled, "uniprot-h5", layer="x").output, "r") as file:
        assert len(file) == 4
        assert {dataset.attrs["original_id"] for dataset in file.values()} == set(IDS)
        np.testing.assert_array_equal(file["a%2Fb%25"][:], POOLED["x"][0])
        np.testing.assert_array_equal(file["plain"][:], POOLED["x"][2])
    with h5py.File(export(tokens, "uniprot-h5", layer="x").output, "r") as file:
        for name, expected in zip(("a%2Fb%25", "..", "plain", "Grüße"), token_runs(TOKENS["x"]), strict=True):
            assert isinstance(file[name], h5py.Dataset)
            np.testing.assert_array_equal(file[name][:], expected)


@pytest.mark.parametrize(
    ("kind", "to", "problem"),
    [
        ("tokens", "h5ad", "holds a vector for every token, but AnnData has one row per record"),
        ("tokens", "csv", "one line per token is too much; .*; .* holds 2 layers"),
        ("pooled", "csv", r"holds 2 layers \(x, y/z\), but csv one; set layer to one"),
        ("pooled", "uniprot-h5", "holds 2 layers"),
        ("pooled", "xlsx", "to is 'xlsx', expected one of h5ad, npz, parquet, csv, uniprot-h5"),
    ],
)
def test_what_does_not_fit_is_refused(kind, to, problem, request):
    with pytest.raises(ConfigError, match=problem):
        export(request.getfixturevalue(kind), to)


def test_files_stay_unless_told_and_nothing_is_left_behind(pooled, monkeypatch):
    target = pooled.with_suffix(".npz")
    target.write_text("mine")
    with pytest.raises(StoreError, match="exists already"):
        export(pooled, "npz")
    with pytest.raises(LayerError, match="layer 'q' is not among"):
        export(pooled, "npz", layer="q", overwrite=True)
    with pytest.raises(StoreError, match=r"is also read, as .*, and would be lost"):
        export(pooled, "h5ad", output=pooled, overwrite=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("genoembed.exporting.files._put_matrix", full)
    with pytest.raises(StoreError, match=r"cannot be written .*No space left on device"):
        export(pooled, "npz", overwrite=True)
    assert target.read_text() == "mine"
    assert sorted(path.name for path in pooled.parent.iterdir()) == ["a.h5", "a.npz"]
