"""The training stream: every base once an epoch, exact skipping, disjoint shards, honest comparison."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed import CharTokenizer
from genoembed.config.pretrain import CorpusConfig
from genoembed.errors import ConfigError
from genoembed.pretraining.corpus import DocumentStream, is_heldout
from genoembed.pretraining.stream import PackedStream, PaddedCounts, RowShape, read_heldout
from genoembed.training.start import token_rules

RULES = token_rules(CharTokenizer(), name="bytes")
CORPUS = CorpusConfig(seed=4, both_strands=False, shuffle_documents=8)
STREAM = RowShape(packing="stream", window=16, seed=4, rows_per_batch=2)
BINS = replace(STREAM, packing="bins")


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("corpus") / "c.fa"
    records = ["".join(generator.choice(list("ACGT"), size)) for size in generator.integers(3, 40, 60)]
    path.write_text("".join(f">r{i}\n{record}\n" for i, record in enumerate(records)))
    return str(path)


def stream(fasta, rows=STREAM, skip=0, **corpus):
    return PackedStream([fasta], corpus=CORPUS.changed(**corpus), rules=RULES, rows=rows, skip_rows=skip)


def take(packed, count):
    return [row["input_ids"].tolist() for row in itertools.islice(packed, count)]


@pytest.mark.parametrize("rows", [STREAM, BINS])
def test_an_epoch_holds_every_base_once(fasta, rows):
    packed = stream(fasta, rows)
    bases = Counter()
    for row in packed:
        if packed.epoch:
            break
        bases += Counter(i for i in row["input_ids"].tolist() if i > 1)
    expected = Counter(b"".join(DocumentStream([fasta], config=CORPUS)))
    assert bases == expected


@pytest.mark.parametrize("rows", [STREAM, BINS])
def test_skipping_gives_the_rows_that_come_next(fasta, rows):
    whole = take(stream(fasta, rows), 300)
    for skip in (0, 1, 57, 250):
        part = stream(fasta, rows, skip)
        assert take(part, 300 - skip) == whole[skip:]
        assert part.epoch >= 1


def test_iterating_again_starts_again(fasta):
    packed = stream(fasta)
    assert take(packed, 20) == take(packed, 20)
    assert packed.packed.rows == 20


def test_epochs_differ(fasta):
    packed = stream(fasta, BINS)
    epochs = {0: [], 1: []}
    for row in packed:
        if packed.epoch > 1:
            break
        epochs[packed.epoch].append(row["input_ids"].tolist())
    assert epochs[0] != epochs[1]


def test_counts_are_of_the_rows_given(fasta):
    packed = stream(fasta, BINS)
    rows = list(itertools.islice(packed, 40))
    real = sum(int((row["segment_ids"] >= 0).sum()) for row in rows)
    assert (packed.packed.rows, packed.packed.slots, packed.packed.tokens) == (40, 640, real)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 5), st.integers(2, 20))
@settings(max_examples=60, deadline=None)
def test_padded_counts_are_those_of_padded_batches(sizes, rows_per_batch, window):
    counts = PaddedCounts(rows_per_batch=rows_per_batch)
    pieces = []
    for size in sizes:
        counts.add(size, window)
        pieces += [window] * (size // window) + ([size % window] if size % window else [])
    full = len(pieces) // rows_per_batch * rows_per_batch
    batches = [pieces[i : i + rows_per_batch] for i in range(0, full, rows_per_batch)]
    assert counts.tokens == sum(pieces[:full])
    assert counts.slots == sum(max(batch) * rows_per_batch for batch in batches)
    assert counts.slots_per_token >= 1


def test_padded_cost_is_above_one_for_documents_of_many_lengths(fasta):
    packed = stream(fasta)
    take(packed, 60)
    assert 1.05 < packed.padded_cost < 2


@given(st.text("ACGT", min_size=1, max_size=60), st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_a_record_and_its_other_strand_are_on_one_side(sequence, fraction):
    other = sequence.translate(str.maketrans("ACGT", "TGCA"))[::-1]
    assert is_heldout(sequence.encode(), fraction) == is_heldout(other.encode(), fraction)
    assert is_heldout(sequence.encode(), fraction) <= is_heldout(sequence.encode(), min(1, fraction * 1.5))


def test_the_split_is_whole_and_disjoint_and_near_its_share(fasta):
    everything = sorted(DocumentStream([fasta], config=CORPUS))
    training = list(DocumentStream([fasta], config=CORPUS.changed(heldout_fraction=0.3)))
    heldout = list(DocumentStream([fasta], config=CORPUS.changed(heldout_fraction=0.3, heldout=True)))
    assert sorted(training + heldout) == everything
    assert 6 <= len(heldout) <= 30


def test_records_of_the_other_side_are_counted(fasta):
    one = DocumentStream([fasta], config=CORPUS.changed(heldout_fraction=0.3))
    assert one.counts.other_side_records == 0
    documents = list(one)
    assert one.counts.other_side_records == 60 - len(documents) > 0


def test_heldout_rows_are_spread_and_the_same_every_time(fasta):
    options = {"corpus": CORPUS, "rules": RULES, "rows": BINS}
    every = read_heldout([fasta], num_rows=10_000, **options)
    some = read_heldout([fasta], num_rows=5, **{**options, "corpus": CORPUS.changed(seed=9)})
    assert len(some) == 5 < len(every)
    assert some.tokens_per_base == 1.0
    ends = every.tensors["input_ids"][[0, -1]]
    assert torch.equal(some.tensors["input_ids"][[0, -1]], ends)


def test_heldout_without_documents_is_refused(tmp_path):
    path = tmp_path / "one.fa"
    path.write_text(">a\nACGT\n")
    config = CORPUS.changed(heldout_fraction=1e-9, heldout=True)
    with pytest.raises(ConfigError, match="no document in a share of 1e-09 of 1 records; set a larger"):
        read_heldout([str(path)], corpus=config, rules=RULES, rows=STREAM, num_rows=4)
