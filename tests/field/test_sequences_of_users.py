"""Sequences as users have them: in a file that a tool wrote, in a dictionary, in a run that stopped early."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from genoembed import embed, extract, open_embeddings, read_sequences
from genoembed.errors import ConfigError
from genoembed.models.genomic_model import GenomicModel

FIELD = Path(__file__).parent


def test_region_behind_a_blank_inside_a_line_has_the_bases_of_the_file_without_it(tmp_path):
    spaced = FIELD / "space_in_line.fa"  # as an editor for plasmids exports a construct
    (tmp_path / "plain.fa").write_text(spaced.read_text().replace("AAC TCG", "AACTCG"))
    found = [
        next(read_sequences(path, regions="construct:201-260")).sha256
        for path in (spaced, tmp_path / "plain.fa")
    ]
    (whole,) = read_sequences(spaced)
    assert found == [hashlib.sha256(whole.sequence[200:260]).hexdigest()] * 2


def test_names_of_a_dictionary_and_letters_of_a_string_are_not_embedded():
    genes = {"KRAS": "ACGTTGCA" * 10, "MYC": "TTGACCAG" * 10, "HBB": "GGCATCGA" * 10}
    with pytest.raises(ConfigError, match="sequences is a dict, which has names and sequences"):
        embed(genes, layers=3)
    with pytest.raises(ConfigError, match="sequences is one sequence, expected a list of them"):
        embed("ATGCATGC", layers=3)
    assert embed(genes.values(), layers=3).X.shape == (3, 128)


@pytest.mark.parametrize("regions", [None, ["r1:1-100", "r30:5-90"]])
def test_file_that_is_changed_once_it_was_read_is_recorded_as_it_was_read(tmp_path, monkeypatch, regions):
    fasta, before = tmp_path / "a.fa", "".join(f">r{row}\n{'ACGTTGCA' * 15}\n" for row in range(40))
    fasta.write_text(before)
    forward = GenomicModel.forward

    def changing(self, *args, **options):
        fasta.write_text(before.replace("TTG", "GGG"))
        return forward(self, *args, **options)

    monkeypatch.setattr(GenomicModel, "forward", changing)
    extract(fasta, output=tmp_path / "a.h5", layers=1, regions=regions)
    assert fasta.read_text() != before
    with open_embeddings(tmp_path / "a.h5") as file:
        (facts,) = file.provenance["inputs"]
        assert facts["sha256"] == hashlib.sha256(before.encode()).hexdigest()
        letters = ("ACGTTGCA" * 15).encode()
        first = letters[:100] if regions else letters
        assert file.obs["sha256"][0] == hashlib.sha256(first).hexdigest()
