"""The split of the corpus: whole contigs, every group, no copies left in training."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import split_corpus
from describe_machine import describe_machine
from split_corpus import Contig, canonical_kmers, shared_fractions

COMPLEMENT = bytes.maketrans(b"ACGT", b"TGCA")


def random_sequence(length, seed):
    return bytes(np.random.default_rng(seed).choice(list(b"ACGT"), length).astype(np.uint8))


def contig(number, sequence, *, group="g", tag="t"):
    return Contig(group=group, tag=tag, number=str(number), sequence=sequence)


def test_canonical_kmers_equal_coding_by_hand():
    sequence = random_sequence(40, 1) + b"N" + random_sequence(35, 2)
    expected = []
    for at in range(len(sequence) - 31):
        kmer = sequence[at : at + 32]
        if b"N" not in kmer:
            strands = (kmer, kmer.translate(COMPLEMENT)[::-1])
            expected.append(min(int("".join(str(b"ACGT".index(x)) for x in s), 4) for s in strands))
    assert len(expected) == 13
    assert canonical_kmers(sequence).tolist() == expected


@pytest.mark.parametrize("length", [0, 31])
def test_canonical_kmers_of_a_short_sequence_are_none(length):
    assert len(canonical_kmers(b"A" * length)) == 0


def test_shared_fractions_see_copies_on_either_strand():
    alone, copied = random_sequence(500, 3), random_sequence(500, 4)
    corpus = [
        contig(1, alone),
        contig(2, copied),
        contig(3, b"T" + copied.translate(COMPLEMENT)[::-1]),
        contig(4, random_sequence(300, 5)),
    ]
    assert shared_fractions(corpus[:2], corpus) == {"g|t|1": 0.0, "g|t|2": 1.0}
    assert shared_fractions(corpus[1:3], corpus)["g|t|2"] == 1.0


def test_split_corpus_leaves_copies_in_training_and_serves_every_group():
    copied = random_sequence(12_000, 9)
    corpus = [
        contig(k, random_sequence(12_000, 100 + k), group=group, tag=tag)
        for k, (group, tag) in enumerate(g for g in (("a", "x"), ("a", "y"), ("b", "z")) for _ in range(6))
    ] + [contig(90, copied, group="b", tag="twin"), contig(91, copied, group="b", tag="twin")]
    chosen = split_corpus.split_corpus(corpus, least=24_000, most=24_000)
    assert len(chosen) == 4
    assert not {"b|twin|90", "b|twin|91"} & chosen
    assert {header.rsplit("|", 1)[0] for header in chosen} == {"a|x", "a|y", "b|z"}


def test_split_corpus_depends_on_the_seed_and_not_on_the_order():
    corpus = [contig(n, random_sequence(12_000, n)) for n in range(12)]
    chosen = split_corpus.split_corpus(corpus, least=24_000)
    assert split_corpus.split_corpus(corpus[::-1], least=24_000) == chosen
    others = [split_corpus.split_corpus(corpus, least=24_000, seed=seed) for seed in range(1, 5)]
    assert any(other != chosen for other in others)


def test_very_long_contigs_stay_in_training():
    corpus = [contig(1, random_sequence(200_001, 1)), contig(2, random_sequence(12_000, 2))]
    assert split_corpus.split_corpus(corpus) == {"g|t|2"}


def test_main_writes_every_contig_once(tmp_path, capsys):
    sequences = {f"genome|{n}": random_sequence(15_000, n) for n in range(10)}
    fasta = "".join(f">{name}\n{sequence.decode().lower()}\n" for name, sequence in sequences.items())
    corpus = tmp_path / "gh_plant.fa.gz"
    corpus.write_bytes(gzip.compress(fasta.encode()))
    train, heldout = tmp_path / "train.fa", tmp_path / "heldout.fa"
    split_corpus.main([str(corpus), "--train", str(train), "--heldout", str(heldout)])
    written = [dict(split_corpus.read_fasta(path)) for path in (train, heldout)]
    assert {f"plant|{name}": sequence for name, sequence in sequences.items()} == written[0] | written[1]
    assert len(written[1]) == 4
    assert len(written[0]) == 6
    counts = json.loads(capsys.readouterr().out)["plant"]
    assert (counts["contigs"], counts["heldout_contigs"], counts["heldout_bases"]) == (10, 4, 60_000)


def test_read_corpus_refuses_foreign_headers(tmp_path):
    (tmp_path / "x.fa").write_text(">chr1\nACGT\n")
    with pytest.raises(ValueError, match=r"header 'chr1', expected 'tag\|n'"):
        split_corpus.read_corpus([tmp_path / "x.fa"])


def test_describe_machine_states_facts_and_no_places():
    facts = describe_machine(("numpy", "no-such-package"))
    assert facts["numpy"] == np.__version__
    assert "no-such-package" not in facts
    assert facts["cores"] >= 1
    assert facts["ram_gib"] > 0
    assert "/" not in json.dumps({key: value for key, value in facts.items() if key != "cpu"})
