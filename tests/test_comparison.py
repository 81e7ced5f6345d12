"""``compare``: how far two embedding files agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from genoembed import compare
from genoembed.comparison import difference, tolerance_of
from genoembed.contracts import EmbeddingBlock, ObsRow, TokenBlock
from genoembed.errors import ConfigError, LayerError
from genoembed.store.writer import EmbeddingWriter


def rows(ids, sha256="s", flags=""):
    return tuple(
        ObsRow(
            id=name, description="", length=4, start=0, end=4, strand="+", source="a.fa",
            n_windows=1, sha256=sha256, flags=flags,
        )
        for name in ids
    )  # fmt: skip


def write(path, ids, matrices, *, dtype="float32", sha256="s", out_dtype="float32", flags=""):
    with EmbeddingWriter(path, kind="pooled", dtype=out_dtype) as writer:
        writer.append(EmbeddingBlock(rows=rows(ids, sha256, flags), matrices=matrices))
        writer.finish({"model": {"dtype": dtype}})
    return path


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)


def test_equal_files_in_another_order_are_equal(vectors, tmp_path):
    one = write(tmp_path / "a.h5", "abcd", {"x": vectors})
    other = write(tmp_path / "b.h5", "dcba", {"x": vectors[::-1]})
    report = compare(one, other)
    assert report.is_within
    assert report.is_reordered
    assert (report.layers[0].num_compared, report.layers[0].max_absolute) == (4, 0)
    assert report.layers[0].min_cosine == report.layers[0].mean_cosine == 1
    assert report.layers[0].worst == ()


def test_difference_is_found_and_named(vectors, tmp_path):
    changed = vectors.copy()
    changed[2, 1] += 0.5
    one, other = (
        write(tmp_path / f"{name}.h5", "abcd", {"x": matrix, "y": vectors})
        for name, matrix in (("a", vectors), ("b", changed))
    )
    report = compare(one, other, output=tmp_path / "d.tsv")
    assert not report.is_within
    x, y = report.layers
    assert (x.num_outside, y.num_outside) == (1, 0)
    assert x.worst[0][0] == "c"
    assert x.max_absolute == pytest.approx(0.5, rel=1e-6)
    a, b = vectors[2].astype(float), changed[2].astype(float)
    assert x.min_cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert x.max_relative == pytest.approx(0.5 / max(np.abs(a).max(), np.abs(b).max()), rel=1e-6)
    lines = [line.split("\t") for line in (tmp_path / "d.tsv").read_text().splitlines()]
    assert [line[0] + line[1] for line in lines if line[5] == "no"] == ["cx"]
    assert len(lines) == 1 + 8
    assert compare(one, other, tolerance=1).is_within
    assert compare(one, other, layer="y").is_within


def test_strangers_and_other_sequences_are_differences(vectors, tmp_path):
    one = write(tmp_path / "a.h5", "abcd", {"x": vectors})
    other = write(tmp_path / "b.h5", "bcde", {"x": vectors[[1, 2, 3, 0]]})
    report = compare(one, other)
    assert (report.only_in_first, report.only_in_second) == (("a",), ("e",))
    assert report.layers[0].num_outside == 0
    assert not report.is_within
    changed = compare(one, write(tmp_path / "c.h5", "abcd", {"x": vectors}, sha256="t"))
    assert changed.other_sequence == tuple("abcd")
    assert not changed.is_within


def test_records_without_a_vector_equal_each_other_only(vectors, tmp_path):
    spoiled = vectors.copy()
    spoiled[1] = np.nan
    one = write(tmp_path / "a.h5", "abcd", {"x": spoiled}, flags="failed")
    assert compare(one, write(tmp_path / "b.h5", "abcd", {"x": spoiled}, flags="failed")).is_within
    report = compare(one, write(tmp_path / "c.h5", "abcd", {"x": vectors}))
    assert report.layers[0].num_outside == 1
    assert report.layers[0].max_relative == np.inf
    assert report.layers[0].min_cosine == 1


def test_tolerance_follows_the_types_of_numbers(vectors, tmp_path):
    noisy = vectors * (1 + 1e-4)
    one = write(tmp_path / "a.h5", "abcd", {"x": vectors})
    assert compare(one, one).tolerance == 1e-5
    assert not compare(one, write(tmp_path / "b.h5", "abcd", {"x": noisy})).is_within
    half = compare(one, write(tmp_path / "c.h5", "abcd", {"x": noisy}, dtype="bfloat16"))
    assert (half.tolerance, half.is_within) == (1e-2, True)
    assert half.setting_differences == ("dtype: 'float32' against 'bfloat16'",)
    stored = compare(one, write(tmp_path / "d.h5", "abcd", {"x": vectors}, out_dtype="float16"))
    assert (stored.tolerance, stored.is_within) == (1e-3, True)
    assert tolerance_of(["something"]) == 1e-2


def test_token_files_are_compared_by_their_worst_token(tmp_path):
    values = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)

    def tokens(name, lengths, matrix):
        with EmbeddingWriter(tmp_path / name, kind="tokens") as writer:
            spans = np.zeros((len(matrix), 2), np.int64)
            block = TokenBlock(rows=rows("abc"), lengths=np.array(lengths), values={"x": matrix}, spans=spans)
            writer.append(block)
            writer.finish({})
        return tmp_path / name

    one = tokens("a.h5", [2, 0, 4], values)
    assert compare(one, one).is_within
    changed = values.copy()
    changed[5] *= -1
    report = compare(one, tokens("b.h5", [2, 0, 4], changed))
    assert report.layers[0].num_outside == 1
    assert report.layers[0].min_cosine == pytest.approx(-1)
    assert compare(one, tokens("c.h5", [2, 1, 3], values)).layers[0].num_outside == 2


def test_files_that_cannot_be_compared_are_refused(vectors, tmp_path):
    one = write(tmp_path / "a.h5", "abcd", {"x": vectors})
    with pytest.raises(ConfigError, match="expected a layer in common"):
        compare(one, write(tmp_path / "b.h5", "abcd", {"z": vectors}))
    with pytest.raises(ConfigError, match=r"layer 'x' has 5 features in .* and 2 in"):
        compare(one, write(tmp_path / "c.h5", "abcd", {"x": vectors[:, :2]}))
    with pytest.raises(LayerError, match="layer 'q' is not among"):
        compare(one, one, layer="q")
    with pytest.raises(ConfigError, match="tolerance is -1"):
        compare(one, one, tolerance=-1)


NUMBERS = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=50)
@given(hnp.arrays(np.float32, (2, 4), elements=NUMBERS))
def test_difference_is_symmetric_and_zero_for_equals_only(pair):
    first, second = pair
    assert difference(first, second) == difference(second, first)
    assert difference(first, first) == (1.0, 0.0, 0.0)
    assert (difference(first, second).absolute == 0) == (first == second).all()
    assert difference(first, second).relative <= 2
