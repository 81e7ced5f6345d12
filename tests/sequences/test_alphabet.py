"""Reverse complement and the agreement of its table with the alphabet."""

import pytest
from Bio.Seq import reverse_complement as bio_reverse_complement
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.errors import AlphabetError
from genoembed.sequences import DNA_IUPAC, read_sequences, reverse_complement
from genoembed.sequences.records import is_protein

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


@pytest.mark.parametrize("gaps", ["error", "strip"])
@pytest.mark.parametrize("letters", [b"MKVLAAGWWLKE", b"mktayiakqr*", b"MSKGEELFTGVVPILVELDGDVNGHKFSVSG"])
def test_protein_is_named_and_never_masked(letters, gaps, tmp_path):
    path = tmp_path / "p.fa"
    path.write_bytes(b">dna\nACGTNNRYKM\n>p\n" + letters + b"\n")
    for invalid in ("error", "mask"):
        with pytest.raises(AlphabetError, match=r"record 'p': .*protein") as caught:
            list(read_sequences(path, invalid=invalid, gaps=gaps))
        assert "mask" not in str(caught.value)
    if gaps == "strip":
        assert [record.id for record in read_sequences(path, invalid="skip", gaps=gaps)] == ["dna"]


@pytest.mark.parametrize("letters", [b"ACGTACGTLCGT", b"RYKMSWBDHVN", b"ACGUACGUXXXX", b"NNNNNNNNNNNNL"])
def test_bases_with_a_wrong_letter_are_no_protein(letters):
    assert not is_protein(letters)
