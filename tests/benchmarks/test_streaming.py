"""The input that the streaming benchmark makes, and what it counts."""

from __future__ import annotations

import gzip

import streaming

from genoembed import read_sequences


def test_genome_is_what_it_says_and_the_same_each_time(tmp_path):
    first, second = tmp_path / "a.fa.gz", tmp_path / "b.fa.gz"
    facts = streaming.write_genome(first, num_records=1100, mean_length=100)
    assert streaming.write_genome(second, num_records=1100, mean_length=100) == facts
    text = gzip.decompress(first.read_bytes())
    assert text == gzip.decompress(second.read_bytes())
    assert max(map(len, text.split(b"\n")[1:2])) <= streaming.LINE
    records = list(read_sequences(first, keep_case=True))
    assert len(records) == facts["records"] == 1100
    assert sum(len(record.sequence) for record in records) == facts["bases"]
    lower = sum(sum(map(record.sequence.count, b"acgt")) for record in records)
    assert lower == facts["soft_masked"] > 0
    assert 80 < facts["bases"] / 1100 < 120


def test_stream_counts_every_base_in_the_batches(tmp_path):
    path = tmp_path / "a.fa.gz"
    facts = streaming.write_genome(path, num_records=50, mean_length=3000)
    found = streaming.stream(str(path), reading_only=False)
    assert (found["records"], found["bases"]) == (50, facts["bases"])
    assert found["slots"] >= facts["bases"]
    assert found["batches"] >= facts["bases"] / streaming.BATCH_TOKENS
    assert streaming.stream(str(path), reading_only=True)["batches"] == 0
