"""Streaming corpora: every base once over all shards, the same stream from the same seed, exact resume."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genoembed.batching.pack import pack_bins
from genoembed.config.pretrain import CorpusConfig
from genoembed.errors import AlphabetError, ConfigError, EmptyRecordError, InputFileError
from genoembed.pretraining.corpus import CorpusCounts, CorpusState, DocumentStream
from genoembed.sequences import reverse_complement

PLAIN = CorpusConfig(both_strands=False, shuffle_documents=1)


def write_fasta(path, sequences):
    text = "".join(f">r{number}\n{sequence}\n" for number, sequence in enumerate(sequences))
    path.write_text(text)
    return path


def random_sequences(number, *, seed=0, longest=60):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACGT"), rng.integers(1, longest))) for _ in range(number)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three files, ids repeated across them, one with soft-masked bases and N-runs."""
    folder = tmp_path_factory.mktemp("corpus")
    paths = [
        write_fasta(folder / f"{name}.fa", random_sequences(number, seed=number))
        for name, number in (("one", 40), ("two", 7))
    ]
    third = folder / "three.fa.gz"
    third.write_bytes(
        gzip.compress(b">r0\nacgtN\nNNNNNNNNN\nNttGG\n>r1\nNNNNNNNNNNNNA\n>r0\nACNNNNNNNNNTA\n")
    )
    return [*paths, third]


def records_of(paths):
    """Sequences of the files, read without the package, upper-cased."""
    records = []
    for path in paths:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        records += ["".join(part.split("\n")[1:]).upper() for part in text.split(">")[1:]]
    return records


def split_by_hand(record, n_run_bp, max_document_bp):
    """Documents of a record, letter by letter, and the bases left out."""
    documents, position = [""], 0
    left_out = 0
    while position < len(record):
        run = 0
        while position + run < len(record) and record[position + run] == "N":
            run += 1
        if n_run_bp is not None and run >= n_run_bp:
            documents.append("")
            left_out += run
            position += run
        else:
            documents[-1] += record[position : position + max(1, run)]
            position += max(1, run)
    step = max_document_bp or max(1, len(record))
    pieces = [text[at : at + step] for text in documents for at in range(0, len(text), step)]
    return [piece.encode() for piece in pieces], left_out


def canonical(documents):
    """How often each document is there, whatever its strand."""
    return Counter(min(document, reverse_complement(document)) for document in documents)


def test_stream_splits_n_runs_upper_cases_and_counts(tmp_path):
    path = tmp_path / "a.fa"
    path.write_text(">a\nNNNNacgtNNNNNNttNNNGG\n>b\nNNNN\n>a\nCCN\n")
    stream = DocumentStream([path], config=PLAIN.changed(n_run_bp=4))
    assert list(stream) == [b"ACGT", b"TTNNNGG", b"CCN"]
    counts = stream.counts
    assert (counts.documents, counts.bases, counts.n_runs, counts.n_bases) == (3, 14, 3, 14)
    assert (counts.reversed_documents, counts.cut_documents) == (0, 0)
    assert (counts.read.records, counts.read.bases, counts.read.upper_cased) == (3, 28, 6)
    assert counts.read.renamed == 1


def test_stream_keeps_n_runs_where_none_are_to_be_split(tmp_path):
    path = tmp_path / "a.fa"
    path.write_text(">a\nANNNNNNNNNNNNNNNNNNNNC\n")
    assert list(DocumentStream([path], config=PLAIN.changed(n_run_bp=None))) == [b"A" + b"N" * 20 + b"C"]


def test_stream_cuts_documents_and_counts_them(tmp_path):
    path = write_fasta(tmp_path / "a.fa", ["ACGTACG", "ACG"])
    stream = DocumentStream([path], config=PLAIN.changed(max_document_bp=3))
    assert list(stream) == [b"ACG", b"TAC", b"G", b"ACG"]
    assert stream.counts.cut_documents == 1


def all_shards(paths, config, epoch=0):
    streams = [
        DocumentStream(paths, config=config.changed(shard=shard), epoch=epoch)
        for shard in range(config.num_shards)
    ]
    return [list(stream) for stream in streams], [stream.counts for stream in streams]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    num_shards=st.integers(1, 5),
    epoch=st.integers(0, 3),
    n_run_bp=st.sampled_from([None, 1, 2, 9, 10, 11]),
    max_document_bp=st.sampled_from([None, 1, 7, 30]),
    shuffle_documents=st.sampled_from([1, 2, 13, 500]),
    shuffle_bp=st.sampled_from([1, 90, 2**28]),
)
def test_shards_hold_every_base_once_and_counts_add_up(corpus, epoch, **options):
    documents, counts = all_shards(corpus, CorpusConfig(**options), epoch)
    by_hand = [split_by_hand(r, options["n_run_bp"], options["max_document_bp"]) for r in records_of(corpus)]
    expected = [document for pieces, _ in by_hand for document in pieces]
    given_out = [document for shard in documents for document in shard]
    assert canonical(given_out) == canonical(expected)
    assert max(map(len, documents)) - min(map(len, documents)) <= 1
    assert sum(c.n_bases for c in counts) == sum(left_out for _, left_out in by_hand)
    assert [c.documents for c in counts] == [len(shard) for shard in documents]
    assert [c.bases for c in counts] == [sum(map(len, shard)) for shard in documents]
    total = sum(map(len, records_of(corpus)))
    assert sum(c.bases + c.n_bases for c in counts) == total == counts[0].read.bases


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 3),
    shuffle_documents=st.sampled_from([1, 5, 500]),
    share=st.floats(0, 1),
    num_shards=st.integers(1, 3),
)
def test_resumed_stream_goes_on_exactly_with_the_same_counts(corpus, epoch, share, num_shards, **options):
    config = CorpusConfig(num_shards=num_shards, shard=num_shards - 1, max_document_bp=20, **options)
    whole = list(uninterrupted := DocumentStream(corpus, config=config, epoch=epoch))
    stream = DocumentStream(corpus, config=config, epoch=epoch)
    before = list(islice(stream, round(share * len(whole))))
    stored = json.loads(json.dumps(stream.state.to_dict()))
    resumed = DocumentStream.resume(corpus, state=CorpusState.from_dict(stored), config=config)
    assert resumed.state == stream.state
    assert before + list(resumed) == whole
    assert resumed.counts == uninterrupted.counts
    assert resumed.state.documents == len(whole)


def test_stream_is_the_same_for_the_same_seed_and_epoch_only(corpus):
    orders = {
        (seed, epoch): tuple(DocumentStream(corpus, config=CorpusConfig(seed=seed), epoch=epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    for (seed, epoch), order in orders.items():
        assert tuple(DocumentStream(corpus, config=CorpusConfig(seed=seed), epoch=epoch)) == order


def test_strands_do_not_depend_on_shards_or_the_shuffle(corpus):
    base = CorpusConfig(seed=5)
    whole = Counter(DocumentStream(corpus, config=base))
    for other in (base.changed(num_shards=3), base.changed(shuffle_documents=1)):
        documents, _ = all_shards(corpus, other)
        assert Counter(document for shard in documents for document in shard) == whole


def test_about_half_of_the_documents_are_reversed_and_counted(tmp_path):
    sequences = ["ACG" + "A" * number for number in range(1, 601)]
    path = write_fasta(tmp_path / "a.fa", sequences)
    stream = DocumentStream([path], config=CorpusConfig(shuffle_documents=1))
    documents = list(stream)
    turned = [given != read.encode() for given, read in zip(documents, sequences, strict=True)]
    assert 240 < sum(turned) < 360
    assert stream.counts.reversed_documents == sum(turned)
    for given_out, read, is_turned in zip(documents, sequences, turned, strict=True):
        assert given_out == (reverse_complement(read.encode()) if is_turned else read.encode())


def test_files_come_in_another_order_in_another_epoch(tmp_path):
    paths = [write_fasta(tmp_path / f"{base}.fa", [base * 5]) for base in "ACGT"]
    orders = {tuple(DocumentStream(paths, config=PLAIN, epoch=epoch)) for epoch in range(8)}
    assert len(orders) > 2
    assert {frozenset(order) for order in orders} == {frozenset(c.encode() * 5 for c in "ACGT")}


def test_shuffle_mixes_the_files(tmp_path):
    paths = [write_fasta(tmp_path / f"{base}.fa", [base] * 200) for base in "AG"]
    config = CorpusConfig(both_strands=False, shuffle_documents=300)
    first = Counter(islice(DocumentStream(paths, config=config), 100))
    assert min(first[b"A"], first[b"G"]) > 10


@pytest.mark.parametrize("limit", [{"shuffle_documents": 50}, {"shuffle_bp": 50_000}])
def test_stream_memory_is_that_of_the_buffer(tmp_path, limit):
    path = tmp_path / "many.fa"
    path.write_text("".join(f">{n}\n{'ACGTTGCA' * 125}\n" for n in range(10_000)))
    stream = DocumentStream([path], config=CorpusConfig(**limit))
    next(stream)
    tracemalloc.start()
    try:
        bases = sum(map(len, stream))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert bases == 9_999_000
    assert peak < bases / 2


def test_stream_of_documents_packs_the_same_after_batches_are_left_out(corpus):
    def packed(start):
        stream = DocumentStream(corpus, config=CorpusConfig(seed=3), epoch=1)
        batches = pack_bins(stream, window=32, batch_size=2, buffer_documents=10, seed=3)
        return [batch.labels for batch in islice(batches, start, None)]

    whole, rest = packed(0), packed(4)
    assert len(rest) == len(whole) - 4 > 4
    assert all(torch.equal(one, other) for one, other in zip(whole[4:], rest, strict=True))


def test_policies_reach_the_reader(tmp_path):
    path = tmp_path / "a.fa"
    path.write_text(">a\nAC-GXT\n>b\n>c\nTT\n")
    lenient = PLAIN.changed(invalid="mask", gaps="strip", empty="skip")
    stream = DocumentStream([path], config=lenient)
    assert list(stream) == [b"ACGNT", b"TT"]
    read = stream.counts.read
    assert (read.masked_bases, read.gaps_stripped, read.skipped_empty) == (1, 1, 1)
    with pytest.raises(AlphabetError, match=r"a\.fa:2: record 'a': gap '-' at position 3"):
        list(DocumentStream([path], config=PLAIN))
    with pytest.raises(EmptyRecordError, match="record 'b': has no bases"):
        list(DocumentStream([path], config=lenient.changed(empty="error")))


def test_stream_logs_its_counts(corpus, caplog):
    with caplog.at_level("INFO", logger="genoembed.pretraining.corpus"):
        number = len(list(DocumentStream(corpus, config=CorpusConfig(), epoch=2)))
    assert f"corpus, epoch 2: {number} documents, " in caplog.text


def test_stream_refuses_files_that_it_cannot_read_again(tmp_path):
    with pytest.raises(ConfigError, match=r"^paths: no file; name at least one; epoch: -1, expected 0"):
        DocumentStream([], epoch=-1)
    with pytest.raises(ConfigError, match=r"^paths: '-' can be read only once; save it to a file first"):
        DocumentStream(["-"])
    with pytest.raises(InputFileError, match=r"none\.fa: file not found"):
        DocumentStream([tmp_path / "none.fa"])


def test_stream_refuses_a_shard_without_documents(tmp_path):
    path = write_fasta(tmp_path / "a.fa", ["ACGT", "N" * 20])
    with pytest.raises(ConfigError, match=r"^shard 1 of 2: no document in 2 records; give more sequence"):
        list(DocumentStream([path], config=CorpusConfig(num_shards=2, shard=1)))


def test_resume_follows_files_to_another_folder(tmp_path):
    sequences = random_sequences(30)
    first = write_fasta(tmp_path / "a.fa", sequences)
    stream = DocumentStream([first])
    list(islice(stream, 11))
    (tmp_path / "moved").mkdir()
    moved = first.rename(tmp_path / "moved" / "a.fa")
    assert list(DocumentStream.resume([moved], state=stream.state)) == list(
        islice(DocumentStream([moved]), 11, None)
    )


def test_resume_refuses_other_files_or_settings_and_shows_the_difference(tmp_path, corpus):
    state = DocumentStream(corpus, config=CorpusConfig(seed=4)).state
    with pytest.raises(
        ConfigError, match=r"^seed: 9, but 4 in the state; .*; shard: 1, but 0 .*; num_shards: 2"
    ):
        DocumentStream.resume(corpus, state=state, config=CorpusConfig(seed=9, num_shards=2, shard=1))
    for others in (corpus[:2], corpus[::-1]):
        with pytest.raises(ConfigError, match=r"^paths: names, sizes or order of the files are not those"):
            DocumentStream.resume(others, state=state)
    with pytest.raises(ConfigError, match=r"^corpus state: 9999 documents given, but the files have fewer"):
        DocumentStream.resume(corpus, state=replace(state, documents=9999))


def test_config_reports_all_problems_at_once():
    with pytest.raises(
        ConfigError,
        match=r"seed is -1; set seed to 0 or more; .*max_document_bp is '9'; set .*invalid is 'drop'",
    ):
        CorpusConfig(
            seed=-1, n_run_bp=0, max_document_bp="9", shuffle_documents=None, both_strands=1, invalid="drop"
        )
    with pytest.raises(ConfigError, match=r"^shard: 2 of 2; set shard to 0 to num_shards - 1"):
        CorpusConfig(shard=2, num_shards=2)


def test_state_refuses_values_that_are_not_a_state():
    state = CorpusState(epoch=0, documents=1, files_sha256="x", config=CorpusConfig())
    values = state.to_dict()
    assert CorpusState.from_dict(values) == state
    for damaged in (
        {**values, "config": {**state.config.to_dict(), "color": 1}},
        {**values, "place": 1},
        {key: value for key, value in values.items() if key != "config"},
        {key: value for key, value in values.items() if key != "epoch"},
    ):
        with pytest.raises(
            ConfigError, match=r"^corpus state: .*; the state is damaged or from another version"
        ):
            CorpusState.from_dict(damaged)


def test_counts_begin_at_zero():
    assert all(value == 0 for name, value in asdict(CorpusCounts()).items() if name != "read")
