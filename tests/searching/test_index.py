"""The approximate index: what it finds, and when it is built again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import MissingExtraError, ShapeError, StoreError
from genoembed.pipeline.embedding_file import VectorSource
from genoembed.searching.index import Origin, build_index, open_index
from genoembed.searching.neighbors import NO_ROW, Neighbors, Owners, exact_neighbors
from genoembed.searching.run import recall_of

METRICS = ("cosine", "dot", "euclidean")


def clustered(count, *, seed=0, width=12):
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(20, width))
    return (centers[rng.integers(0, 20, count)] + 0.4 * rng.normal(size=(count, width))).astype(np.float32)


def origin_of(path, *, metric="cosine", layer="a", transform=None):
    return Origin(path=path, layer=layer, metric=metric, transform=transform)


@pytest.fixture
def stored(tmp_path):
    """A file that stands for an embedding file, and its rows."""
    rows = clustered(80)
    path = tmp_path / "vectors.h5"
    path.write_bytes(rows.tobytes())
    return path, VectorSource(rows)


@pytest.mark.parametrize("metric", METRICS)
def test_index_finds_nearly_all_true_neighbors_and_scores_them_right(metric):
    rows, queries = clustered(1500), clustered(60, seed=1)
    source = VectorSource(rows)
    index = build_index(source, metric=metric)
    found = index.neighbors(queries, source, k=10)
    exact = exact_neighbors(queries, source, k=10, metric=metric)
    assert recall_of(found, exact, metric=metric) > 0.97
    same = found.rows == exact.rows
    assert same.mean() > 0.9
    np.testing.assert_allclose(found.scores[same], exact.scores[same], atol=1e-4, rtol=1e-5)


def test_more_effort_finds_no_less():
    rng = np.random.default_rng(0)
    source = VectorSource(rng.normal(size=(3000, 24)).astype(np.float32))
    queries = rng.normal(size=(50, 24))
    index = build_index(source, metric="cosine")
    exact = exact_neighbors(queries, source, k=10)
    recalls = [
        recall_of(index.neighbors(queries, source, k=10, effort=effort), exact, metric="cosine")
        for effort in (10, 400)
    ]
    assert recalls[0] < recalls[1]
    assert recalls[1] > 0.97


def test_index_keeps_own_rows_out_however_many_they_are():
    rows = clustered(300)
    numbers = np.arange(300) // 100
    owners = Owners(queries=numbers[::50], rows=numbers)
    source = VectorSource(rows)
    index = build_index(source, metric="cosine")
    found = index.neighbors(rows[::50], source, k=5, owners=owners)
    assert (found.rows != NO_ROW).all()
    assert (numbers[found.rows] != numbers[::50][:, None]).all()
    exact = exact_neighbors(rows[::50], source, k=5, owners=owners)
    assert recall_of(found, exact, metric="cosine") > 0.9


def test_index_leaves_out_rows_that_cannot_be_compared():
    rows = clustered(40).astype(np.float64)
    rows[3], rows[5] = np.nan, 0
    source = VectorSource(rows)
    index = build_index(source, metric="cosine")
    found = index.neighbors(rows[:6], source, k=40)
    assert {3, 5}.isdisjoint(found.rows.ravel().tolist())
    assert (found.rows[[3, 5]] == NO_ROW).all()
    assert (found.rows[0] != NO_ROW).sum() == 38


def test_index_answers_a_single_query_as_one_of_many():
    rows = clustered(50).astype(np.float64)
    rows[7] = np.nan
    source = VectorSource(rows)
    index = build_index(source, metric="cosine")
    many, one = (index.neighbors(rows[:count], source, k=50) for count in (3, 1))
    np.testing.assert_array_equal(one.rows, many.rows[:1])
    np.testing.assert_array_equal(one.scores, many.scores[:1])
    assert one.rows[0, -1] == NO_ROW


def test_index_refuses_another_width():
    source = VectorSource(clustered(20))
    index = build_index(source, metric="cosine")
    with pytest.raises(ShapeError, match="expected \\(Q, 12\\)"):
        index.neighbors(np.ones((1, 3)), source, k=1)


@pytest.mark.parametrize("metric", METRICS)
def test_open_index_takes_what_it_wrote(stored, metric):
    path, source = stored
    built, where, is_new = open_index(source, origin_of(path, metric=metric))
    opened, again, is_second_new = open_index(source, origin_of(path, metric=metric))
    assert (is_new, is_second_new) == (True, False)
    assert where == again
    assert where.parent == path.parent
    queries = clustered(7, seed=5)
    first, second = (index.neighbors(queries, source, k=6) for index in (built, opened))
    np.testing.assert_array_equal(first.rows, second.rows)
    np.testing.assert_array_equal(first.scores, second.scores)


def test_open_index_builds_again_when_the_file_has_changed(stored):
    path, source = stored
    _, where, _ = open_index(source, origin_of(path))
    before = where.read_bytes()
    other = VectorSource(clustered(80, seed=4))
    path.write_bytes(clustered(80, seed=4).tobytes())
    os.utime(path, ns=(1, 1))
    index, _, is_new = open_index(other, origin_of(path))
    assert is_new
    assert where.read_bytes() != before
    found = index.neighbors(clustered(80, seed=4)[:5], other, k=1)
    assert found.rows.ravel().tolist() == [0, 1, 2, 3, 4]
    assert [entry.name for entry in path.parent.iterdir() if entry.name.endswith(".tmp")] == []


def test_open_index_takes_that_of_a_copy_with_the_same_content(stored):
    path, source = stored
    _, where, _ = open_index(source, origin_of(path))
    shutil.copy(path, path.with_name("copy.h5"))
    path.with_name("copy.h5").replace(path)
    os.utime(path, ns=(1, 1))
    assert open_index(source, origin_of(path))[1:] == (where, False)


def test_open_index_keeps_one_for_each_layer_metric_and_transform(stored):
    path, source = stored
    origins = [
        origin_of(path),
        origin_of(path, layer="b"),
        origin_of(path, metric="dot"),
        origin_of(path, transform="ab"),
    ]
    assert len({origin.index_path() for origin in origins}) == 4
    assert all(open_index(source, origin)[2] for origin in origins)
    assert not any(open_index(source, origin)[2] for origin in origins)
    wanted = origins[0].index_path()
    assert open_index(source, origins[1], path=wanted)[2]  # it is of another layer
    assert open_index(source, origins[0])[2]


def test_index_is_a_file_that_usearch_reads(stored):
    path, source = stored
    _, where, _ = open_index(source, origin_of(path))
    opened = pytest.importorskip("usearch.index").Index.restore(str(where))
    assert (len(opened), opened.ndim) == (80, 12)
    facts = json.loads(where.with_name(f"{where.name}.json").read_text())
    assert facts["source"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert facts["index"]["sha256"] == hashlib.sha256(where.read_bytes()).hexdigest()


def test_index_whose_bytes_have_changed_is_built_again_and_the_log_says_why(stored, caplog):
    path, source = stored
    _, where, _ = open_index(source, origin_of(path))
    content = bytearray(where.read_bytes())
    content[-5] ^= 1
    where.write_bytes(content)
    os.utime(where, ns=(1, 1))
    with caplog.at_level("INFO"):
        assert open_index(source, origin_of(path))[2]
    assert f"{where.name} has changed since it was built" in caplog.text


def test_any_changed_byte_of_an_index_or_of_its_facts_has_it_built_again(stored):
    path, source = stored
    _, where, _ = open_index(source, origin_of(path, metric="dot"))
    expected = open_index(source, origin_of(path, metric="dot"))[0].neighbors(clustered(80)[:4], source, k=3)
    generator = np.random.default_rng(0)
    for changed in (where, where.with_name(f"{where.name}.json")):
        content, found = changed.read_bytes(), changed.stat()
        for place in generator.choice(len(content), min(len(content), 100), replace=False):
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(generator.integers(8))
            changed.write_bytes(damaged)
            os.utime(changed, ns=(found.st_atime_ns, found.st_mtime_ns))  # as if nothing had happened
            index, _, is_new = open_index(source, origin_of(path, metric="dot"))
            assert is_new, f"{changed.name}: byte {place}"
            np.testing.assert_array_equal(index.neighbors(clustered(80)[:4], source, k=3).rows, expected.rows)


@pytest.mark.parametrize("facts", [b"[" * 100_000, b"{}", b"[]", b'"facts"', b'{"facts": 1}', b"\xff"])
def test_facts_of_an_index_that_are_none_have_it_built_again(stored, facts):
    path, source = stored
    _, where, _ = open_index(source, origin_of(path))
    where.with_name(f"{where.name}.json").write_bytes(facts)
    assert open_index(source, origin_of(path))[2]


def test_full_disk_keeps_half_an_index_from_being_taken(stored, monkeypatch):
    path, source = stored
    index = build_index(source, metric="cosine")
    monkeypatch.setattr(index, "_index", Truncating(index._index))
    with pytest.raises(StoreError, match="cannot be written completely; free space"):
        index.save(path.with_name("x.index"))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


class Truncating:
    """What usearch does on a full disk: it writes a part, and says nothing."""

    def __init__(self, index):
        self.serialized_length = index.serialized_length
        self._content = index.save()

    def save(self, path):
        Path(path).write_bytes(self._content[:100])


@pytest.mark.parametrize("damage", [b"", b"something else", None])
def test_open_index_builds_again_when_the_index_is_damaged(stored, damage):
    path, source = stored
    _, where, _ = open_index(source, origin_of(path))
    where.write_bytes(where.read_bytes()[:-100] if damage is None else damage)
    index, _, is_new = open_index(source, origin_of(path))
    assert is_new
    assert index.neighbors(clustered(80)[:3], source, k=1).rows.ravel().tolist() == [0, 1, 2]


def test_open_index_works_where_it_cannot_be_kept(stored, caplog):
    path, source = stored
    index, where, is_new = open_index(source, origin_of(path), path=path.parent / "absent" / "x.index")
    assert (where, is_new) == (None, True)
    assert "the index is not kept" in caplog.text
    assert index.neighbors(clustered(80)[:2], source, k=1).rows.ravel().tolist() == [0, 1]


def test_approximate_search_names_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "usearch.index", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[search\]"):
        build_index(VectorSource(clustered(5)), metric="cosine")


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), k=st.integers(1, 6), metric=st.sampled_from(METRICS))
def test_recall_of_exact_is_one_and_of_nothing_is_zero(seed, k, metric):
    rng = np.random.default_rng(seed)
    rows = rng.integers(-2, 3, size=(20, 3)).astype(float) + 0.5
    exact = exact_neighbors(rows[:4], VectorSource(rows), k=k, metric=metric)
    assert recall_of(exact, exact, metric=metric) == 1
    nothing = Neighbors(np.full((4, k), NO_ROW), np.full((4, k), np.nan))
    assert recall_of(nothing, exact, metric=metric) == 0
