"""Homologs are found by k-mers, on both strands and as fragments; other sequences are not, repeats or no."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from genoembed.errors import ConfigError
from genoembed.sequences import reverse_complement
from genoembed.sequences.homology import (
    Clusters,
    HomologyConfig,
    build_sketches,
    cluster_homologs,
    pair_identities,
    strand_free,
)
from genoembed.training.augment import Augmented, point_mutations


def random_dna(rng, length) -> bytes:
    return rng.choice(np.frombuffer(b"ACGT", np.uint8), length).tobytes()


def mutated(sequence, rng, rate) -> bytes:
    return point_mutations(Augmented(sequence), rng, rate=rate).sequence


def canonical_kmers(sequence: bytes, k: int) -> set[bytes]:
    """The slow way: every k-mer of ACGT that is no microsatellite, on its first strand."""
    kmers = set()
    for start in range(len(sequence) - k + 1):
        kmer = sequence.upper()[start : start + k]
        repeats = any(kmer[period:] == kmer[:-period] for period in range(1, min(6, k // 3) + 1))
        if set(kmer) <= set(b"ACGT") and not repeats:
            kmers.add(min(kmer, reverse_complement(kmer)))
    return kmers


def identity(left: bytes, right: bytes, config=None) -> float:
    sketches = build_sketches([left, right], config=config)
    return float(pair_identities(sketches, np.array([0]), np.array([1]))[0])


@settings(max_examples=60)
@given(
    sequences=st.lists(st.text("ACGTNacgt", max_size=40).map(str.encode), min_size=1, max_size=5),
    k=st.integers(4, 9),
)
def test_sketch_that_is_large_enough_has_every_kmer_once(sequences, k):
    sketches = build_sketches(sequences, config=HomologyConfig(kmer_size=k))
    assert len(sketches) == len(sequences)
    for index, sequence in enumerate(sequences):
        sketch = sketches.of(index)
        assert len(sketch) == len(canonical_kmers(sequence, k))
        assert (np.diff(sketch.astype(object)) > 0).all()


def test_sketches_do_not_depend_on_neighbors_or_chunks(monkeypatch):
    rng = np.random.default_rng(0)
    sequences = [random_dna(rng, length) for length in (3, 50, 700, 0, 16, 400)]
    together = build_sketches(sequences)
    monkeypatch.setattr("genoembed.sequences.homology._CHUNK_BASES", 60)
    in_chunks = build_sketches(sequences)
    assert together.hashes.tolist() == in_chunks.hashes.tolist()
    for index, sequence in enumerate(sequences):
        alone = build_sketches([sequence])
        assert together.of(index).tolist() == alone.of(0).tolist()
    assert len(together.of(2)) == 400


@settings(max_examples=60)
@given(st.text("ACGT", min_size=5, max_size=60), st.text("ACGT", min_size=5, max_size=60))
@example("AAACCC", "AGGGTT")
def test_identity_of_whole_sketches_is_the_root_of_the_exact_containment(left, right):
    left, right = left.encode(), right.encode()
    a, b = canonical_kmers(left, 5), canonical_kmers(right, 5)
    shared, smaller = len(a & b), min(len(a), len(b))
    expected = (shared / smaller) ** (1 / 5) if shared and shared >= min(2, smaller) else 0.0
    assert identity(left, right, HomologyConfig(kmer_size=5)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rate", [0.0, 0.03, 0.1, 0.15])
def test_identity_estimates_the_share_of_unchanged_bases(rate):
    rng = np.random.default_rng(1)
    sequences = [random_dna(rng, 3000) for _ in range(20)]
    found = [identity(one, reverse_complement(mutated(one, rng, rate))) for one in sequences]
    assert np.mean(found) == pytest.approx(1 - rate, abs=0.015)


def test_homologs_are_clustered_on_both_strands_as_fragments_and_through_others():
    rng = np.random.default_rng(2)
    gene, stranger = random_dna(rng, 900), random_dna(rng, 900)
    bridge = gene[600:] + random_dna(rng, 10) + stranger[:300]
    family = [
        gene,
        mutated(gene, rng, 0.1),
        reverse_complement(mutated(gene, rng, 0.1)),
        gene[200:350].lower(),
    ]
    alone = [random_dna(rng, 900), stranger]
    assert cluster_homologs([*family, *alone]).labels.tolist() == [0, 0, 0, 0, 1, 2]
    assert cluster_homologs([*family, *alone, bridge]).labels.tolist() == [0, 0, 0, 0, 1, 0, 0]


def test_unrelated_sequences_are_apart_even_where_repeats_are_shared():
    rng = np.random.default_rng(3)
    repeats = (b"A" * 60, b"CA" * 40, b"CAG" * 30, b"GATTA" * 30)
    sequences = [b"".join(random_dna(rng, 100) + repeat for repeat in repeats) for _ in range(30)]
    assert len(cluster_homologs(sequences).sizes) == 30
    far = random_dna(rng, 1000)
    assert len(cluster_homologs([far, mutated(far, rng, 0.4)]).sizes) == 2


def test_short_sequences_are_homologs_of_equal_ones_only():
    sequences = [b"ACGT", b"acgt", b"AACC", b"GGTT", b"ACGTN", b""]
    clusters = cluster_homologs(sequences)
    assert clusters.labels.tolist() == [0, 0, 1, 1, 2, 3]
    assert clusters.unsketched == 6


def test_large_families_are_found_whole_and_unmixed():
    rng = np.random.default_rng(4)
    ancestors = [random_dna(rng, 300) for _ in range(3)]
    motif = random_dna(rng, 17)  # two k-mers that all have: far more sequences than partners tried
    members = [mutated(ancestors[index % 3], rng, 0.08) + motif for index in range(300)]
    labels = cluster_homologs(members).labels
    assert labels.tolist() == [index % 3 for index in range(300)]


def test_clusters_are_the_same_partition_in_any_order():
    rng = np.random.default_rng(5)
    ancestors = [random_dna(rng, 400) for _ in range(12)]
    sequences = [mutated(ancestors[int(rng.integers(12))], rng, 0.05) for _ in range(60)]
    labels = cluster_homologs(sequences).labels
    order = rng.permutation(60)
    shuffled = cluster_homologs([sequences[index] for index in order]).labels
    for one in range(60):
        same = labels[order] == labels[order[one]]
        assert (same == (shuffled == shuffled[one])).all()


def test_clusters_list_their_members():
    clusters = Clusters(labels=np.array([0, 1, 0, 2]))
    assert [members.tolist() for members in clusters.members()] == [[0, 2], [1], [3]]
    assert clusters.sizes.tolist() == [2, 1, 1]
    assert cluster_homologs([]).labels.tolist() == []


def test_strand_free_spells_both_strands_alike():
    assert strand_free(b"acgtt") == strand_free(reverse_complement(b"ACGTT")) == b"AACGT"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kmer_size": 32}, "kmer_size is 32; set kmer_size to 4 to 31"),
        ({"sketch_size": 0}, "sketch_size is 0"),
        ({"identity": 80.0}, "identity is 80.0; set identity above 0, at most 1"),
    ],
)
def test_homology_config_refuses_what_makes_no_sense(options, match):
    with pytest.raises(ConfigError, match=match):
        HomologyConfig(**options)
