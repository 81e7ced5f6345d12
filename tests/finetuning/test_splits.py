"""Splits: every row on one side, the same for the same seed, kin never on two sides, leaks found."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.config.labeled import SplitConfig
from genoembed.errors import ConfigError, LabelError
from genoembed.finetuning.labeled import LabeledSequence
from genoembed.finetuning.splits import check_leaks, group_clusters, split_rows
from genoembed.sequences import reverse_complement
from genoembed.sequences.homology import Clusters, cluster_homologs
from genoembed.training.augment import Augmented, point_mutations

METHODS = ("random", "stratified", "homology")


def rows_of(labels, **fields):
    return [
        LabeledSequence(id=f"r{i}", sequence=b"A", label=label, source="a.tsv", line=i + 2, **fields)
        for i, label in enumerate(labels)
    ]


def as_lists(splits):
    return [side.tolist() for side in splits.sides().values()]


@settings(max_examples=60)
@given(
    labels=st.lists(st.sampled_from("aaaabbc"), min_size=12, max_size=80),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_split_puts_every_row_on_one_side_the_same_for_the_same_seed(labels, method, seed, data):
    rows = rows_of(labels)
    numbers = data.draw(st.lists(st.integers(0, 40), min_size=len(rows), max_size=len(rows)))
    clusters = Clusters(labels=np.unique(numbers, return_inverse=True)[1])
    config = SplitConfig(split=method, validation_fraction=0.2, test_fraction=0.2, seed=seed)
    try:
        splits = split_rows(rows, kind="class", config=config, clusters=clusters)
    except ConfigError:
        assert method == "homology"  # a few large clusters may leave a side empty, which is said
        return
    assert sorted(chain.from_iterable(as_lists(splits))) == list(range(len(rows)))
    assert all(side == sorted(side) for side in as_lists(splits))
    assert as_lists(split_rows(rows, kind="class", config=config, clusters=clusters)) == as_lists(splits)
    if method == "homology":
        sides = [set(clusters.labels[side]) for side in splits.sides().values()]
        assert all(one.isdisjoint(other) for one, other in combinations(sides, 2))
    else:
        exact = np.array([0.6, 0.2, 0.2]) * len(rows)
        assert np.abs(np.array(list(map(len, as_lists(splits)))) - exact).max() <= 1.0


@pytest.mark.parametrize("method", ["random", "stratified"])
def test_split_changes_with_the_seed(method):
    rows = rows_of("ab" * 50)
    one, two = (
        split_rows(rows, kind="class", config=SplitConfig(split=method, seed=seed)) for seed in (0, 1)
    )
    assert as_lists(one) != as_lists(two)


def test_split_stratified_keeps_the_shares_of_classes():
    labels = ["a"] * 700 + ["b"] * 250 + ["c"] * 50
    rows = rows_of(np.random.default_rng(0).permutation(labels).tolist())
    splits = split_rows(rows, kind="class", config=SplitConfig(validation_fraction=0.1, test_fraction=0.2))
    for members, share in zip(as_lists(splits), (0.7, 0.1, 0.2), strict=True):
        counted = Counter(rows[index].label for index in members)
        assert all(abs(counted[name] - share * total) <= 1 for name, total in Counter(labels).items())


def test_split_stratified_keeps_the_spread_of_numbers():
    values = np.random.default_rng(0).exponential(size=300)
    rows = rows_of([(float(value),) for value in values])
    splits = split_rows(rows, kind="regression", config=SplitConfig(test_fraction=0.2))
    tenths = np.digitize(values, np.quantile(values, np.arange(0.1, 1, 0.1)))
    assert np.bincount(tenths[splits.test], minlength=10).tolist() == pytest.approx([6] * 10, abs=1)


def test_split_stratified_keeps_the_shares_of_each_of_several_labels():
    rng = np.random.default_rng(0)
    labels = [
        tuple(n for n, p in (("a", 0.5), ("b", 0.2), ("c", 0.06)) if rng.random() < p) for _ in range(500)
    ]
    splits = split_rows(rows_of(labels), kind="multilabel", config=SplitConfig(test_fraction=0.2))
    for name in "abc":
        total = sum(name in label for label in labels)
        assert sum(name in labels[index] for index in splits.test) == pytest.approx(0.2 * total, abs=2)


def test_split_homology_keeps_homologs_together_and_shares_near():
    rng = np.random.default_rng(1)
    dna = np.frombuffer(b"ACGT", np.uint8)
    rows = []
    for family in range(120):
        ancestor = rng.choice(dna, 300).tobytes()
        for _ in range(int(rng.integers(1, 8))):
            copy = point_mutations(Augmented(ancestor), rng, rate=0.05).sequence
            bases = reverse_complement(copy) if rng.random() < 0.5 else copy
            label = "ab"[family % 4 == 0]
            rows.append(LabeledSequence(id=str(len(rows)), sequence=bases, label=label, source="a"))
    clusters = cluster_homologs([row.sequence for row in rows])
    assert len(clusters.sizes) == 120
    config = SplitConfig(split="homology", validation_fraction=0.1, test_fraction=0.2)
    splits = split_rows(rows, kind="class", config=config, clusters=clusters)
    assert check_leaks(rows, splits, clusters, policy="error") is splits
    assert len(splits.test) / len(rows) == pytest.approx(0.2, abs=0.02)
    shares = [np.mean([rows[index].label == "b" for index in side]) for side in (splits.test, splits.train)]
    assert shares[0] == pytest.approx(shares[1], abs=0.04)
    by_row = split_rows(rows, kind="class", config=SplitConfig(test_fraction=0.2))
    with pytest.raises(ConfigError, match="homologs: ") as caught:
        check_leaks(rows, by_row, clusters, policy="error")
    num_leaked = int(re.search(r"(\d+) of \d+ test rows", str(caught.value))[1])
    assert num_leaked > len(by_row.test) / 2


def test_split_homology_puts_a_giant_family_into_training_and_warns(caplog):
    rows = rows_of("ab" * 50)
    clusters = Clusters(labels=np.array([0] * 95 + [1, 2, 3, 4, 5]))
    with caplog.at_level("WARNING"):
        splits = split_rows(rows, kind="class", config=SplitConfig(split="homology"), clusters=clusters)
    assert set(range(95)) <= set(splits.train.tolist())
    assert "were requested: clusters are large" in caplog.text


def test_split_by_column_takes_the_usual_names():
    rows = [
        LabeledSequence(id=str(i), sequence=b"A", label="x", source="a.tsv", line=i + 2, split=name)
        for i, name in enumerate(["train", "DEV", "test", "val", "training"])
    ]
    splits = split_rows(rows, kind="class", config=SplitConfig(split="column"))
    assert as_lists(splits) == [[0, 4], [1, 3], [2]]
    with pytest.raises(
        LabelError, match=r"a\.tsv:2: record 'r0': the split column has None, expected one of"
    ):
        split_rows(rows_of("x"), kind="class", config=SplitConfig(split="column"))
    with pytest.raises(ConfigError, match="no row of 1 is left for train; mark some in the file"):
        split_rows(rows_of("x", split="test"), kind="class", config=SplitConfig(split="column"))


def test_split_by_groups_of_the_file():
    rows = [
        LabeledSequence(id=str(i), sequence=b"A", label="x", source="a", group=f"g{i // 2}")
        for i in range(60)
    ]
    clusters = Clusters(labels=group_clusters(rows))
    splits = split_rows(rows, kind="class", config=SplitConfig(split="homology"), clusters=clusters)
    for side in splits.sides().values():
        assert sorted(Counter(int(index) // 2 for index in side).values()) == [2] * (len(side) // 2)
    with pytest.raises(ConfigError, match="record 'r0' has no group; set group_column"):
        group_clusters(rows_of("x"))


def test_split_refuses_what_cannot_be():
    with pytest.raises(ConfigError, match="no row of 3 is left for validation"):
        split_rows(rows_of("abc"), kind="class", config=SplitConfig(split="random"))
    with pytest.raises(ConfigError, match="needs a cluster for each row, but none are given"):
        split_rows(rows_of("abc"), kind="class", config=SplitConfig(split="homology"))
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        SplitConfig(validation_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ConfigError, match="split is 'kmeans'; set split to one of random, stratified"):
        SplitConfig(split="kmeans")


def leaky():
    rng = np.random.default_rng(0)
    gene = rng.choice(np.frombuffer(b"ACGT", np.uint8), 400).tobytes()
    other = rng.choice(np.frombuffer(b"ACGT", np.uint8), 400).tobytes()
    bases = [gene, other, point_mutations(Augmented(gene), rng, rate=0.05).sequence, other[:200] + gene[:0]]
    rows = [
        LabeledSequence(id=f"r{i}", sequence=one, label="x", source="a.tsv", line=i + 2)
        for i, one in enumerate(bases)
    ]
    splits = split_rows(
        [
            LabeledSequence(id=row.id, sequence=row.sequence, label="x", source="a", split=side)
            for row, side in zip(rows, ("train", "train", "test", "train"), strict=True)
        ],
        kind="class",
        config=SplitConfig(split="column"),
    )
    return rows, splits, cluster_homologs(bases)


def test_leaks_are_reported_with_an_example_and_kept(caplog):
    rows, splits, clusters = leaky()
    with caplog.at_level("WARNING"):
        assert check_leaks(rows, splits, clusters) is splits
    (message,) = caplog.messages
    found = re.fullmatch(
        r"0 of 0 validation rows and 1 of 1 test rows have homologs among the rows to train on; "
        r"first: r2 \(a\.tsv:4\) and r0 \(a\.tsv:2\), identity (.*); 0 rows to train on dropped",
        message,
    )
    assert float(found[1]) == pytest.approx(0.95, abs=0.03)


def test_leaks_are_dropped_from_training_or_an_error(caplog):
    rows, splits, clusters = leaky()
    with caplog.at_level("WARNING"):
        left = check_leaks(rows, splits, clusters, policy="drop")
    assert as_lists(left) == [[1, 3], [], [2]]
    assert caplog.messages[0].endswith("; 1 rows to train on dropped")
    with pytest.raises(ConfigError, match=r"homologs: .* 1 of 1 test rows .*set split='homology'"):
        check_leaks(rows, splits, clusters, policy="error")
    with pytest.raises(ConfigError, match="3 labels for 4 rows"):
        check_leaks(rows, splits, Clusters(labels=np.arange(3)))
    with pytest.raises(ConfigError, match="leaves nothing to train on"):
        check_leaks(rows, splits, Clusters(labels=np.zeros(4, dtype=np.int64)), policy="drop")
