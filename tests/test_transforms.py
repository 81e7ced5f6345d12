"""Transforms against their definitions, and as files."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from genoembed import fit_transform
from genoembed.contracts import EmbeddingBlock
from genoembed.errors import ConfigError, SchemaVersionError, ShapeError, StoreError, StoreFormatError
from genoembed.pipeline.embedding_file import VectorSource, load_transform
from genoembed.pooling.transform import fit, measure_isotropy, measure_moments
from tests.store.blocks import obs_row, write_file


def background(count=400, width=6, *, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width))
    return (rng.normal(size=(count, width)) @ mixing + 8).astype(np.float32)


def fitted(rows, **options):
    moments = measure_moments(VectorSource(rows), with_covariance=options["method"] != "center")
    return fit(moments, **options)


def write_vectors(path, vectors, *, layers=("blocks.1",), provenance=None, names=None):
    ids = names or [f"r{n}" for n in range(len(vectors))]
    block = EmbeddingBlock(
        rows=tuple(obs_row(name) for name in ids), matrices=dict.fromkeys(layers, np.asarray(vectors))
    )
    return write_file(path, block, provenance=provenance)


def test_moments_are_those_of_numpy_in_any_blocks():
    rows = np.concatenate([background(20_000, 3), np.full((2, 3), np.nan, np.float32)])
    moments = measure_moments(VectorSource(rows))
    wide = rows[:-2].astype(np.float64)
    np.testing.assert_allclose(moments.mean, wide.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(wide.T, bias=True), rtol=1e-9)
    assert (moments.num_rows, moments.num_unusable) == (20_000, 2)


def test_center_makes_the_mean_zero():
    rows = background()
    moved = fitted(rows, method="center").apply_float64(rows)
    np.testing.assert_allclose(moved.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(moved + rows.astype(np.float64).mean(axis=0), rows, rtol=1e-12)


@pytest.mark.parametrize("axes", ["pca", "zca"])
def test_whiten_makes_the_covariance_the_identity(axes):
    rows = background()
    moved = fitted(rows, method="whiten", axes=axes).apply_float64(rows)
    np.testing.assert_allclose(moved.mean(axis=0), 0, atol=1e-10)
    np.testing.assert_allclose(np.cov(moved.T, bias=True), np.eye(6), atol=1e-8)


def test_whiten_zca_is_the_inverse_root_of_the_covariance_and_turns_nothing():
    rows = background()
    matrix = fitted(rows, method="whiten", axes="zca").matrix
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    covariance = np.cov(rows.astype(np.float64).T, bias=True)
    np.testing.assert_allclose(matrix @ covariance @ matrix, np.eye(6), atol=1e-8)


def test_whiten_keeps_the_strongest_components():
    rows = background()
    transform = fitted(rows, method="whiten", components=2)
    assert (transform.output_width, transform.components) == (2, 2)
    whole = fitted(rows, method="whiten").apply_float64(rows)
    np.testing.assert_allclose(transform.apply_float64(rows), whole[:, :2], atol=1e-10)
    assert (np.diff(transform.variances) <= 0).all()


def test_whiten_leaves_out_directions_without_variance():
    rows = np.concatenate([background(width=4), np.ones((400, 1), np.float32)], axis=1)
    for axes, width in (("pca", 4), ("zca", 5)):
        transform = fitted(rows, method="whiten", axes=axes)
        assert (transform.output_width, transform.components) == (width, 4)
        assert np.abs(transform.apply_float64(rows)).max() < 20


def test_full_shrinkage_only_centers_and_scales():
    rows = background()
    moved = fitted(rows, method="whiten", axes="zca", shrinkage=1.0).apply_float64(rows)
    centered = rows.astype(np.float64) - rows.astype(np.float64).mean(axis=0)
    factor = np.sqrt(np.trace(np.cov(centered.T, bias=True)) / 6)
    np.testing.assert_allclose(moved * factor, centered, atol=1e-9)


def test_remove_top_takes_out_the_first_directions_once():
    rows = background()
    transform = fitted(rows, method="remove-top", components=2)
    centered = rows.astype(np.float64) - transform.mean
    _, _, directions = np.linalg.svd(centered, full_matrices=False)
    wanted = centered - centered @ directions[:2].T @ directions[:2]
    moved = transform.apply_float64(rows)
    np.testing.assert_allclose(moved, wanted, atol=1e-9)
    np.testing.assert_allclose(moved @ transform.matrix, 0, atol=1e-9)
    again = transform.apply_float64(moved + transform.mean)
    np.testing.assert_allclose(again, moved, atol=1e-9)
    np.testing.assert_allclose(transform.matrix.T @ transform.matrix, np.eye(2), atol=1e-12)


def test_remove_top_takes_one_direction_a_hundred_features_by_default():
    rng = np.random.default_rng(0)
    for width, removed in ((20, 1), (250, 2)):
        rows = rng.normal(size=(300, width)).astype(np.float32)
        assert fitted(rows, method="remove-top").components == removed


def test_isotropy_is_that_of_all_pairs():
    rows = background(60)
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    cosines = unit @ unit.T
    wanted = (cosines.sum() - 60) / (60 * 59)
    found = measure_isotropy(rows, pairs=200_000)
    assert found.mean_cosine == pytest.approx(wanted, abs=0.01)
    assert found.resultant == pytest.approx(np.linalg.norm(unit.mean(axis=0)), rel=1e-12)
    assert found == measure_isotropy(rows, pairs=200_000)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"method": "turn"}, "method is 'turn'; set method to one of center, whiten, remove-top"),
        ({"method": "center", "components": 2}, "but method is 'center'; leave components out"),
        ({"method": "whiten", "components": 9}, "components is 9; set components to 1 to 6"),
        ({"method": "whiten", "shrinkage": 1.5}, "shrinkage is 1.5; set shrinkage to 0 to 1"),
        ({"method": "remove-top", "axes": "zca"}, "are for 'whiten', and method is 'remove-top'"),
    ],
)
def test_fit_refuses_options_that_do_not_go_together(options, problem):
    with pytest.raises(ConfigError, match=problem):
        fitted(background(), **options)


def test_fit_refuses_too_few_rows_and_rows_that_are_equal():
    with pytest.raises(ConfigError, match="1 rows to fit on, expected 2 or more"):
        measure_moments(VectorSource(np.ones((1, 3))))
    with pytest.raises(ConfigError, match="all rows are equal"):
        fitted(np.ones((5, 3)), method="whiten")


def test_apply_refuses_another_width_and_leaves_its_input_alone():
    rows = background()
    transform = fitted(rows, method="remove-top")
    before = rows.copy()
    transform.apply(rows)
    np.testing.assert_array_equal(rows, before)
    with pytest.raises(ShapeError, match=r"expected \(N, 6\), as the fit had"):
        transform.apply(rows[:, :3])


@pytest.mark.parametrize(
    "options",
    [{"method": "center"}, {"method": "whiten", "axes": "zca"}, {"method": "remove-top", "components": 3}],
)
def test_fit_transform_writes_what_it_fitted(tmp_path, options):
    rows = background()
    source = write_vectors(tmp_path / "b.h5", rows)
    report = fit_transform(source, output=tmp_path / "t.h5", **options)
    loaded = load_transform(report.output)
    np.testing.assert_array_equal(loaded.transform.apply(rows), fitted(rows, **options).apply(rows))
    assert loaded.settings == {"layer": "blocks.1"}
    assert (report.num_rows, report.width, report.layer) == (400, 6, "blocks.1")
    assert report.before.mean_cosine > 0.8
    assert abs(report.after.mean_cosine) < 0.05
    assert report.after.resultant < report.before.resultant
    assert (report.explained is None) == (options["method"] == "center")
    again = fit_transform(source, output=tmp_path / "again.h5", **options)
    assert (again.before, again.after) == (report.before, report.after)


def test_fit_transform_refuses_to_replace_a_file(tmp_path):
    source = write_vectors(tmp_path / "b.h5", background())
    (tmp_path / "t.h5").write_text("mine")
    with pytest.raises(StoreError, match="exists already"):
        fit_transform(source, output=tmp_path / "t.h5")
    with pytest.raises(StoreError, match="another kind"):
        fit_transform(source, output=tmp_path / "t.h5", overwrite=True)
    (tmp_path / "t.h5").unlink()
    fit_transform(source, output=tmp_path / "t.h5")
    fit_transform(source, output=tmp_path / "t.h5", overwrite=True)
    assert load_transform(tmp_path / "t.h5").transform.num_rows == 400


def test_load_transform_refuses_other_newer_and_damaged_files(tmp_path):
    source = write_vectors(tmp_path / "b.h5", background())
    with pytest.raises(StoreFormatError, match="expected a file of fit-transform"):
        load_transform(source)
    with pytest.raises(StoreError, match="cannot be opened"):
        load_transform(tmp_path / "absent.h5")
    (tmp_path / "text").write_text("x")
    with pytest.raises(StoreFormatError, match="is not an HDF5 file"):
        load_transform(tmp_path / "text")
    fit_transform(source, output=tmp_path / "t.h5")
    with h5py.File(tmp_path / "t.h5", "r+") as file:
        file["arrays/mean"][0] = 17
    with pytest.raises(StoreFormatError, match="its digest is not that of its values"):
        load_transform(tmp_path / "t.h5")
    with h5py.File(tmp_path / "t.h5", "r+") as file:
        file.attrs["genoembed-transform"] = 2
    with pytest.raises(SchemaVersionError, match="format version 2 is newer"):
        load_transform(tmp_path / "t.h5")
