"""The sequences that the benchmark of the layer sweep makes: two kinds that a probe can tell."""

from __future__ import annotations

import layer_sweep
import numpy as np

from genoembed import read_sequences
from genoembed.probing.cross_validation import encode_target
from genoembed.probing.sweep import sweep
from genoembed.sequences.composition import kmer_frequencies


def test_sequences_are_two_kinds_and_the_same_each_time(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        layer_sweep.write_sequences(folder, number=40, bases=200)
    for name in ("two.fa", "labels.tsv"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    records = list(read_sequences(folders[0] / "two.fa"))
    rows = [line.split("\t") for line in (folders[0] / "labels.tsv").read_text().splitlines()[1:]]
    assert [record.id for record in records] == [name for name, _ in rows]
    assert {len(record.sequence) for record in records} == {200}
    features = kmer_frequencies([record.sequence for record in records], k=2)
    codes = encode_target(np.array([label for _, label in rows]), task="classification")
    (layer,) = sweep({"kmers": features}, codes, np.arange(40) // 2 % 4, task="classification").layers
    assert layer.metrics["mcc"].mean > 0.8
