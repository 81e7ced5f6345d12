"""Reverse complement and the agreement of its table with the alphabet."""

import pytest
from Bio.Seq import reverse_complement as bio_reverse_complement
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.sequences import DNA_IUPAC, reverse_complement

LETTERS = (DNA_IUPAC + DNA_IUPAC.lower()).decode()


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet=LETTERS))
def test_reverse_complement_twice_is_identity_and_agrees_with_biopython(text):
    sequence = text.encode()
    once = reverse_complement(sequence)
    assert reverse_complement(once) == sequence
    assert once.decode() == bio_reverse_complement(text)


@pytest.mark.parametrize(("letter", "expected"), [(b"U", b"A"), (b"u", b"a"), (b"-", b"-"), (b"", b"")])
def test_reverse_complement_of_other_letters(letter, expected):
    assert reverse_complement(letter) == expected
