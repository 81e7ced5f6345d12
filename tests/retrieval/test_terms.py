"""Terms of DNA: canonical, hashed, none for ambiguous letters, each at the token that has seen it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import ConfigError, ShapeError
from genoembed.retrieval.terms import NO_TERM, KmerTerms, TokenTerms, collate_terms
from genoembed.sequences.records import reverse_complement

CODES = {letter: code for code, letter in enumerate("ACGT")}


def slow_terms(sequence, k):
    """Number canonical k-mers letter by letter."""
    found = []
    for end in range(1, len(sequence) + 1):
        kmer = sequence[max(end - k, 0) : end].decode()
        if len(kmer) < k or set(kmer) - set("ACGT"):
            found.append(NO_TERM)
            continue
        other = reverse_complement(kmer.encode()).decode()
        numbers = [sum(CODES[c] * 4 ** (k - 1 - i) for i, c in enumerate(strand)) for strand in (kmer, other)]
        found.append(min(numbers))
    return found


@settings(deadline=None, max_examples=60)
@given(st.text("ACGTN", max_size=60).map(str.encode), st.integers(1, 9))
def test_kmer_terms_equal_the_loop(sequence, k):
    assert KmerTerms(k=k).of(sequence).tolist() == slow_terms(sequence, k)


@settings(deadline=None, max_examples=60)
@given(st.text("ACGTNRY", min_size=1, max_size=80).map(str.encode), st.sampled_from([3, 11, 21, 31]))
def test_kmer_terms_of_both_strands_are_the_same(sequence, k):
    kmers = KmerTerms(k=k, num_terms=1000)
    forward, backward = kmers.of(sequence), kmers.of(reverse_complement(sequence))
    assert sorted(forward.tolist()) == sorted(backward.tolist())
    assert forward.max() < 1000


def test_kmer_terms_take_lower_case_and_rna():
    kmers = KmerTerms(k=3)
    assert kmers.of(b"acguu").tolist() == kmers.of(b"ACGTT").tolist()


def test_kmer_terms_have_lexical_power_that_letters_lack():
    generator = np.random.default_rng(0)
    first, second = ("".join(generator.choice(list("ACGT"), 1000)).encode() for _ in range(2))
    shared = {k: len(set(KmerTerms(k=k).of(first)) & set(KmerTerms(k=k).of(second)) - {-1}) for k in (1, 9)}
    assert shared[1] == 2  # A or T, C or G: everything
    assert shared[9] < 30  # of about 990


def test_hashed_terms_spread_evenly_and_rarely_collide():
    generator = np.random.default_rng(0)
    sequence = "".join(generator.choice(list("ACGT"), 20_000)).encode()
    exact = KmerTerms(k=21, num_terms=2**62).of(sequence)
    hashed = KmerTerms(k=21, num_terms=2**10).of(sequence)
    assert len(np.unique(exact[20:])) == len(sequence) - 20
    counts = np.bincount(hashed[20:], minlength=2**10)
    # 19.5 a bucket on average; Poisson
    assert counts.min() > 2
    assert counts.max() < 45


def test_collate_terms_puts_a_term_on_the_token_of_its_last_base():
    # tokens: special, bases 0-2, bases 3-4, base 5, special
    starts = np.array([-1, 0, 3, 5, -1])
    terms = collate_terms([b"ACGTAC"], KmerTerms(k=3), base_starts=[starts])
    assert terms.ids.tolist() == [KmerTerms(k=3).of(b"ACGTAC")[2:].tolist()]
    assert terms.positions.tolist() == [[1, 2, 2, 3]]


def test_collate_terms_of_short_and_ambiguous_rows_are_empty():
    terms = collate_terms([b"AC", b"ACG", b"NNNNN"], KmerTerms(k=3))
    assert terms.ids.tolist() == [[NO_TERM], [6], [NO_TERM]]
    assert collate_terms([b"AC"], KmerTerms(k=3)).ids.shape == (1, 0)


def test_terms_refuse_what_does_not_fit():
    with pytest.raises(ShapeError, match="base_starts: 1 for 2 sequences"):
        collate_terms([b"A", b"C"], KmerTerms(), base_starts=[None])
    terms = collate_terms([b"ACGT"], KmerTerms(k=3))
    with pytest.raises(ShapeError, match=r"ids \(1, 2\) and positions \(1, 1\)"):
        TokenTerms(ids=terms.ids, positions=terms.positions[:, :1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, "k to 1 or more bases"),
        ({"k": 32}, "31 bases or less"),
        ({"num_terms": 1}, "num_terms to 2"),
    ],
)
def test_kmer_terms_refuse_a_config(values, message):
    with pytest.raises(ConfigError, match=message):
        KmerTerms(**values)
