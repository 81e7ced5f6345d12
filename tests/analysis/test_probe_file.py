"""The probe over an embedding file."""

from __future__ import annotations

import numpy as np
import pytest

from genoembed.analysis import probe, probe_file
from genoembed.contracts import EmbeddingBlock, ObsRow, TokenBlock
from genoembed.errors import ConfigError, LayerError, StoreError
from genoembed.store import EmbeddingWriter

IDS = [f"r{number}" for number in range(60)]
CLASSES = np.array(["x", "y"])[np.arange(60) // 2 % 2]
MATRICES = {
    "blocks.0": np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32),
    "blocks.1": (np.random.default_rng(1).normal(size=(60, 3)) + 3 * (CLASSES == "y")[:, None]).astype(
        np.float32
    ),
}


def obs_row(name):
    return ObsRow(
        id=name, description="", length=4, start=0, end=4, strand="+", source="a.fa", n_windows=1,
        sha256="", flags="",
    )  # fmt: skip


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "a.h5"
    with EmbeddingWriter(path, kind="pooled") as writer:
        writer.append(EmbeddingBlock(rows=tuple(map(obs_row, IDS)), matrices=MATRICES))
        writer.finish({"version": "1"})
    return path


def test_probe_file_equals_the_probe_of_its_matrices(stored):
    shuffled = dict(sorted(zip(IDS, CLASSES, strict=True), key=lambda pair: hash(pair) % 7))
    result = probe_file(stored, shuffled | {"elsewhere": "x"}, seed=2)
    assert result == probe(MATRICES, CLASSES, seed=2)
    assert result.recommended.name == "blocks.1"


def test_probe_file_takes_layers_and_groups_by_name(stored):
    labels = dict(zip(IDS, CLASSES, strict=True))
    groups = {name: number // 4 for number, name in enumerate(IDS)}
    result = probe_file(stored, labels, groups=groups, layers=["blocks.1"])
    assert result == probe(
        {"blocks.1": MATRICES["blocks.1"]}, CLASSES, groups=[number // 4 for number in range(60)]
    )
    assert result.is_grouped


def test_probe_file_skips_unlabelled_records_only_when_told(stored):
    labels = dict(zip(IDS[:50], CLASSES[:50], strict=True))
    with pytest.raises(ConfigError, match=r"labels: 10 record\(s\).*'r50'.*set unlabelled='skip'"):
        probe_file(stored, labels)
    result = probe_file(stored, labels, unlabelled="skip")
    assert result.num_rows == 50
    assert result == probe({name: matrix[:50] for name, matrix in MATRICES.items()}, CLASSES[:50])


def test_probe_file_wants_a_group_for_each_labelled_record(stored):
    labels = dict(zip(IDS, CLASSES, strict=True))
    with pytest.raises(ConfigError, match=r"groups: 60 record\(s\) of the file have none"):
        probe_file(stored, labels, groups={})


def test_probe_file_names_an_unknown_layer(stored):
    with pytest.raises(LayerError, match=r"did you mean 'blocks\.1'"):
        probe_file(stored, dict(zip(IDS, CLASSES, strict=True)), layers=["blocks.11"])


def test_probe_file_refuses_a_file_of_tokens(tmp_path):
    block = TokenBlock(
        rows=(obs_row("r0"),), lengths=np.array([2]), values={"b": np.zeros((2, 3), np.float32)}
    )
    with EmbeddingWriter(tmp_path / "t.h5", kind="tokens") as writer:
        writer.append(block)
        writer.finish({"version": "1"})
    with pytest.raises(StoreError, match="a vector for every token"):
        probe_file(tmp_path / "t.h5", {"r0": "x"})
