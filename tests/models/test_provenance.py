"""Digests and licenses of model folders."""

from __future__ import annotations

import hashlib

import pytest

from genoembed.models.provenance import (
    backbone_files,
    file_digest,
    read_license,
    weight_files,
    weights_digest,
)


def test_digest_of_one_file_is_its_own(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert weights_digest(tmp_path) == hashlib.sha256(b"weights").hexdigest()


def test_digest_of_shards_depends_on_names_and_contents(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"1")
    (tmp_path / "b.safetensors").write_bytes(b"2")
    one, two = (hashlib.sha256(content).hexdigest() for content in (b"1", b"2"))
    expected = hashlib.sha256(f"{one}  a.safetensors\n{two}  b.safetensors\n".encode()).hexdigest()
    assert weights_digest(tmp_path) == expected
    (tmp_path / "b.safetensors").write_bytes(b"3")
    assert weights_digest(tmp_path) != expected


def test_digest_of_a_folder_without_weights_is_empty(tmp_path):
    assert weights_digest(tmp_path) == ""


def test_safetensors_come_before_pickles(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert [path.name for path in weight_files(tmp_path)] == ["pytorch_model.bin"]
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]
    assert [path.name for path in backbone_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "heads.safetensors").write_bytes(b"x")
    assert len(weight_files(tmp_path)) == 2
    assert [path.name for path in backbone_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert [path.name for path in backbone_files(tmp_path)] == ["pytorch_model.bin"]


def test_cached_file_is_named_by_its_digest(tmp_path):
    blob = tmp_path / ("ab" * 32)
    blob.write_bytes(b"large")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert file_digest(link) == "ab" * 32
    assert file_digest(blob) == hashlib.sha256(b"large").hexdigest()


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: cc-by-nc-sa-4.0\ntags: [dna]\n---\n# Model\n", "cc-by-nc-sa-4.0"),
        ("---\ntags: [dna]\n---\n", "unknown"),
        ("---\nlicense: [\n---\n", "unknown"),
        ("# license: mit\n", "unknown"),
    ],
)
def test_license_is_read_from_the_card(card, expected, tmp_path):
    assert read_license(tmp_path) == "unknown"
    (tmp_path / "README.md").write_text(card)
    assert read_license(tmp_path) == expected
