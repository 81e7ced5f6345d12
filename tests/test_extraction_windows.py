"""`extract` on records longer than the context, on windows, and on regions with flanks."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from genoembed.errors import ConfigError, EmptyPoolError, SequenceLengthError
from tests.by_hand import (
    ALL_FAMILIES,
    CAUSAL,
    CONTEXT,
    LETTER_FAMILIES,
    STRIPED,
    embed,
    embed_files,
    model_of,
    random_dna,
    reference_of,
    revcomp,
    write_fasta,
)

TOLERANCE = 1e-5
LONG = {"long": random_dna(200, 11), "short": random_dna(20, 12), "edge": random_dna(65, 13)}
LIMITED = tuple(family for family in LETTER_FAMILIES if family not in ("mamba", "custom_conv"))
"""Families with one token per base whose context is ``CONTEXT`` tokens."""


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def matrix_of(found):
    return next(iter(found.matrices.values()))


def poolings(family):
    return ("mean", "max", "last", "weighted_mean", "mean_std", *(() if family in CAUSAL else ("first",)))


@pytest.mark.parametrize("family", LIMITED)
def test_record_over_the_context_is_the_mean_of_its_windows(family, tmp_path):
    reference = reference_of(family)
    window = CONTEXT - reference.num_special
    for method in poolings(family):
        found = embed(tmp_path, LONG, model_of(family), pooling=method)
        expected = [
            reference.windowed(sequence, "final", method, window=window) for sequence in LONG.values()
        ]
        assert_close(matrix_of(found), expected)
        assert found.obs["n_windows"][:2] == [len(reference.windows(200, window)), 1]
        assert found.obs["n_windows"][0] > 2
        assert found.report.counts.windows == sum(found.obs["n_windows"])


@pytest.mark.parametrize("family", LETTER_FAMILIES)
@pytest.mark.parametrize(("window", "stride", "skip_first"), [(30, 30, 0), (30, 7, 4), (40, None, 15)])
def test_windows_and_strides_of_ones_own(family, window, stride, skip_first, tmp_path):
    reference = reference_of(family)
    for method in ("mean", "max"):
        found = embed(
            tmp_path,
            LONG,
            model_of(family),
            pooling=method,
            window=window,
            stride=stride,
            skip_first=skip_first,
        )
        expected = [
            reference.windowed(sequence, "final", method, window=window, stride=stride, skip_first=skip_first)
            for sequence in LONG.values()
        ]
        assert_close(matrix_of(found), expected)


@pytest.mark.parametrize("family", LETTER_FAMILIES)
def test_mean_over_windows_is_the_mean_of_the_tokens_that_are_stored(family, tmp_path):
    """Overlaps count once: pooling the per-token file gives the pooled file."""
    options = {"window": 30, "stride": 11}
    pooled = embed(tmp_path, LONG, model_of(family), **options)
    tokens = embed(tmp_path, LONG, model_of(family), pooling="none", **options)
    assert tokens.lengths == [len(sequence) for sequence in LONG.values()]
    ends = np.cumsum(tokens.lengths)
    per_record = np.split(matrix_of(tokens).astype(np.float64), ends[:-1])
    assert_close(matrix_of(pooled), [vectors.mean(axis=0) for vectors in per_record])


@pytest.mark.parametrize("family", LETTER_FAMILIES)
@pytest.mark.parametrize("rc", ["none", "mean"])
def test_tokens_over_windows_stand_at_their_base(family, rc, tmp_path):
    reference = reference_of(family)

    def by_hand(sequence):
        return np.concatenate(
            [
                reference.token_vectors(sequence[start:end], "final", (first - start, past - start))
                for start, end, first, past in reference.windows(len(sequence), 30, 11)
            ]
        )

    found = embed(tmp_path, LONG, model_of(family), pooling="none", rc=rc, window=30, stride=11)
    expected = [by_hand(sequence) for sequence in LONG.values()]
    if rc == "mean":
        backward = [by_hand(revcomp(sequence))[::-1] for sequence in LONG.values()]
        expected = [(one + other) / 2 for one, other in zip(expected, backward, strict=True)]
    assert_close(matrix_of(found), np.concatenate(expected))


@pytest.mark.parametrize("family", LETTER_FAMILIES)
def test_row_a_window(family, tmp_path):
    reference = reference_of(family)
    found = embed(tmp_path, LONG, model_of(family), per_window=True, window=30, stride=11)
    expected, ids, spans, digests = [], [], [], []
    for name, sequence in LONG.items():
        for start, end, first, past in reference.windows(len(sequence), 30, 11):
            expected.append(
                reference.pooled(sequence[start:end], "final", "mean", core=(first - start, past - start))
            )
            ids.append(f"{name}:{first + 1}-{past}")
            spans.append((first, past))
            digests.append(hashlib.sha256(sequence[start:end].encode()).hexdigest())
    assert found.ids == ids
    assert list(zip(found.obs["start"], found.obs["end"], strict=True)) == spans
    assert found.obs["length"] == [past - first for first, past in spans]
    assert found.obs["sha256"] == digests
    assert set(found.obs["n_windows"]) == {1}
    assert_close(matrix_of(found), expected)


@pytest.mark.parametrize("family", ["esm", "llama", STRIPED])
def test_row_a_window_on_both_strands_is_about_the_same_bases(family, tmp_path):
    reference = reference_of(family)
    sequence = LONG["long"]
    found = embed(tmp_path, {"x": sequence}, model_of(family), per_window=True, window=30, rc="concat")
    forward, backward = np.split(matrix_of(found), 2, axis=1)
    other = revcomp(sequence)
    for row, (start, end, first, past) in enumerate(reference.windows(len(sequence), 30)):
        assert_close(
            forward[row],
            reference.pooled(sequence[start:end], "final", "mean", core=(first - start, past - start)),
        )
        core_start, core_end = len(other) - past, len(other) - first
        if family in CAUSAL:
            seen_start, seen_end = max(0, core_end - 30), core_end
        else:
            seen_start, seen_end = len(other) - end, len(other) - start
        core = (core_start - seen_start, core_end - seen_start)
        assert_close(backward[row], reference.pooled(other[seen_start:seen_end], "final", "mean", core=core))


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize(("rc", "window"), [("mean", 30), ("concat", 41), ("mean", None)])
def test_strands_of_a_windowed_record_are_symmetric(family, rc, window, tmp_path):
    """Windows are cut from the start of each strand, so it does not matter which one is given."""
    options = {"rc": rc, "window": window, "stride": window and 17, "skip_first": 3}
    other = {name: revcomp(sequence) for name, sequence in LONG.items()}
    found = matrix_of(embed(tmp_path, LONG, model_of(family), **options))
    turned = matrix_of(embed(tmp_path, other, model_of(family), **options))
    if rc == "concat":
        half = turned.shape[1] // 2
        turned = np.concatenate([turned[:, half:], turned[:, :half]], axis=1)
    assert_close(found, turned)


def test_bpe_windows_count_each_base_once(tmp_path):
    reference = reference_of("gpt_neox")
    sequence = LONG["long"]
    assert len(reference.tokens(sequence)[0]) < len(sequence)
    found = embed(tmp_path, {"x": sequence}, model_of("gpt_neox"), window=30, stride=11)
    assert_close(matrix_of(found)[0], reference.windowed(sequence, "final", "mean", window=30, stride=11))


def test_bpe_record_that_fits_in_tokens_is_not_cut(tmp_path):
    reference = reference_of("gpt_neox")
    sequence = next(
        text
        for text in (random_dna(80, seed) for seed in range(100))
        if len(reference.tokens(text)[0]) <= CONTEXT
    )
    found = embed(tmp_path, {"x": sequence}, model_of("gpt_neox"))
    assert found.obs["n_windows"] == [1]
    assert_close(matrix_of(found)[0], reference.pooled(sequence, "final", "mean"))


def test_window_with_more_tokens_than_the_context_names_the_record(tmp_path):
    records = {"fine": "ACGT", "dense": "N" * 70}
    message = r"input\.fa:3: record 'dense': bases 1-70 make 70 tokens.*context is 64; set window to 64"
    with pytest.raises(SequenceLengthError, match=message):
        embed(tmp_path, records, model_of("gpt_neox"), window=70)


@pytest.mark.parametrize("family", ["llama", "bert", STRIPED])
def test_window_over_the_context_is_refused(family, tmp_path):
    if family == "bert":  # tokens are letters with special ones around: known only when a record is read
        with pytest.raises(SequenceLengthError, match=r"make 67 tokens.*set window to 62 or less"):
            embed(tmp_path, LONG, model_of(family), window=65)
        return
    if family == STRIPED:
        with pytest.raises(ConfigError, match=r"window is 65, but the model's context holds 64 bases"):
            embed(tmp_path, LONG, model_of(family), window=65)
        return
    with pytest.raises(SequenceLengthError, match=r"make 65 tokens.*set window to 64 or less"):
        embed(tmp_path, LONG, model_of(family), window=65)


def test_stride_that_would_lose_bases_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"stride is 65, but the model's context holds 64 bases"):
        embed(tmp_path, LONG, model_of("llama"), stride=65)
    with pytest.raises(ConfigError, match=r"stride is 65, but window is 60"):
        embed(tmp_path, LONG, model_of("llama"), stride=65, window=60)


def test_stride_without_any_context_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"stride is 10, but the model states no context.*set window"):
        embed(tmp_path, LONG, model_of("mamba"), stride=10)


def test_record_of_a_model_without_context_is_one_window(tmp_path):
    found = embed(tmp_path, LONG, model_of("mamba"))
    assert found.obs["n_windows"] == [1, 1, 1]
    expected = [reference_of("mamba").pooled(sequence, "final", "mean") for sequence in LONG.values()]
    assert_close(matrix_of(found), expected)


def test_skip_first_that_swallows_a_record_names_it(tmp_path):
    with pytest.raises(EmptyPoolError, match=r"record 'short': .*bases 1-20; skip_first is 20, set it lower"):
        embed(tmp_path, LONG, model_of("llama"), skip_first=20)


def test_skip_first_may_swallow_a_window_of_a_longer_record(tmp_path):
    """The last window answers for 5 bases, of which each is among the first 50 that it shows."""
    sequence = LONG["edge"]
    reference = reference_of(STRIPED)
    assert reference.windows(65, 60, 60)[-1] == (5, 65, 60, 65)
    found = embed(tmp_path, {"x": sequence}, model_of(STRIPED), window=60, stride=60, skip_first=58)
    expected = reference.windowed(sequence, "final", "mean", window=60, stride=60, skip_first=58)
    assert_close(matrix_of(found)[0], expected)


@pytest.fixture
def genome(tmp_path):
    return write_fasta(tmp_path / "genome.fa", {"chr1": random_dna(500, 21), "chr2": random_dna(90, 22)})


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_bed_row_and_place_of_the_same_bases_are_identical(family, genome, tmp_path):
    bed = tmp_path / "regions.bed"
    bed.write_text("chr1\t100\t130\nchr2\t0\t40\n")
    options = {"flank": 9}
    from_bed = embed_files(tmp_path, genome, model_of(family), regions=bed, **options)
    places = ["chr1:101-130", "chr2:1-40"]
    from_places = embed_files(tmp_path, genome, model_of(family), regions=places, **options)
    np.testing.assert_array_equal(matrix_of(from_bed), matrix_of(from_places))
    for column in ("start", "end", "strand", "length", "sha256"):
        assert from_bed.obs[column] == from_places.obs[column]
    assert (from_bed.obs["start"], from_bed.obs["end"]) == ([100, 0], [130, 40])
    assert from_bed.ids == ["chr1:101-130(+)", "chr2:1-40(+)"]
    assert [facts["name"] for facts in from_bed.provenance["regions"]] == [str(bed)]
    assert from_bed.provenance["regions"][0]["sha256"] == hashlib.sha256(bed.read_bytes()).hexdigest()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_flanks_are_seen_but_not_pooled(family, genome, tmp_path):
    reference = reference_of(family)
    chr1, chr2 = random_dna(500, 21), random_dna(90, 22)
    found = embed_files(tmp_path, genome, model_of(family), regions=["chr1:101-130", "chr2:1-40(-)"], flank=9)
    expected = [
        reference.pooled(chr1[91:139], "final", "mean", core=(9, 39)),
        reference.pooled(revcomp(chr2[0:49]), "final", "mean", core=(9, 49)),
    ]
    assert_close(matrix_of(found), expected)
    bare = embed_files(tmp_path, genome, model_of(family), regions=["chr1:101-130", "chr2:1-40(-)"])
    assert np.abs(matrix_of(bare) - matrix_of(found)).max() > 1e-4
    assert found.obs["length"] == [30, 40]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_minus_strand_is_the_reverse_complement_of_the_region(family, genome, tmp_path):
    region = random_dna(500, 21)[100:130]
    minus = embed_files(tmp_path, genome, model_of(family), regions="chr1:101-130(-)")
    alone = embed(tmp_path, {"x": revcomp(region)}, model_of(family))
    assert_close(matrix_of(minus), matrix_of(alone))
    both = embed_files(
        tmp_path, genome, model_of(family), regions=["chr1:101-130(-)", "chr1:101-130"], rc="mean", flank=5
    )
    assert_close(matrix_of(both)[0], matrix_of(both)[1])


@pytest.mark.parametrize("family", ["bert", STRIPED])
def test_tokens_of_a_region_are_its_core(family, genome, tmp_path):
    chr1 = random_dna(500, 21)
    found = embed_files(
        tmp_path, genome, model_of(family), regions="chr1:101-130(-)", flank=9, pooling="none"
    )
    expected = reference_of(family).token_vectors(revcomp(chr1[91:139]), "final", (9, 39))
    assert_close(matrix_of(found), expected)


@pytest.mark.parametrize("strand", ["+", "-"])
def test_windows_of_a_region_are_named_in_the_contigs_coordinates(strand, genome, tmp_path):
    found = embed_files(
        tmp_path,
        genome,
        model_of("llama"),
        regions=f"chr1:101-200({strand})",
        flank=20,
        window=40,
        per_window=True,
    )
    spans = list(zip(found.obs["start"], found.obs["end"], strict=True))
    assert len(spans) > 2
    in_order = spans if strand == "+" else spans[::-1]
    assert in_order[0][0] == 100
    assert in_order[-1][1] == 200
    assert all(one[1] == other[0] for one, other in itertools.pairwise(in_order))
    assert found.ids == [f"chr1:101-200({strand}):{start + 1}-{end}" for start, end in spans]
    assert set(found.obs["strand"]) == {strand}


@pytest.mark.parametrize("strand", ["+", "-"])
def test_region_longer_than_the_context_pools_its_core_only(strand, genome, tmp_path):
    """Tokens of the region, pooled, are the region's vector: flanks and overlaps are in neither."""
    options = {"regions": f"chr1:101-300({strand})", "flank": 30}
    tokens = embed_files(tmp_path, genome, model_of("esm"), pooling="none", **options)
    assert tokens.lengths == [200]
    pooled = embed_files(tmp_path, genome, model_of("esm"), **options)
    assert_close(matrix_of(pooled)[0], matrix_of(tokens).astype(np.float64).mean(axis=0))


def test_region_shorter_than_a_token_has_the_vector_of_its_token(tmp_path):
    reference = reference_of("gpt_neox")
    sequence = next(
        text
        for text in (random_dna(40, seed) for seed in range(100))
        if 21 not in [start for start, _ in reference.tokens(text)[1]]
    )
    genome = write_fasta(tmp_path / "small.fa", {"chr1": sequence})
    found = embed_files(tmp_path, genome, model_of("gpt_neox"), regions="chr1:22-22", flank=40)
    assert_close(matrix_of(found)[0], reference.pooled(sequence, "final", "mean", core=(21, 22)))
    tokens = embed_files(
        tmp_path, genome, model_of("gpt_neox"), regions="chr1:22-22", flank=40, pooling="none"
    )
    assert tokens.lengths == [1]
    assert_close(matrix_of(tokens)[0], matrix_of(found)[0])
