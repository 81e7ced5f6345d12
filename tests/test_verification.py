"""``verify`` embeds again what a file says it holds; ``certify`` compares alone with batched."""

from __future__ import annotations

import dataclasses
import json
import random

import h5py
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from genoembed import certify, extract, verify
from genoembed.errors import ConfigError, InputFileError
from tests.tiny_models import build_tiny

LETTERS = random.Random(5)
SEQUENCES = {f"r{n}": "".join(LETTERS.choices("ACGT", k=20 + 3 * n)) for n in range(12)}


def write_fasta(path, sequences):
    path.write_text("".join(f">{name} about it\n{text}\n" for name, text in sequences.items()))
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(build_tiny("bert", tmp_path_factory.mktemp("verify") / "bert"))


@pytest.fixture
def made(bert, tmp_path):
    """An input, and a function that extracts it."""
    fasta = write_fasta(tmp_path / "a.fa", SEQUENCES)

    def extract_it(**options):
        output = tmp_path / "a.h5"
        extract(fasta, model=bert, output=output, **{"layers": (0, 2), "dtype": "float32"} | options)
        return output

    return fasta, extract_it


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "none", "layers": 1},
        {"window": 16, "stride": 8, "per_window": True},
        {"fusion": "weighted", "fusion_weights": (1.0, 2.0), "rc": "concat"},
        {"out_dtype": "float16", "skip_first": 3, "pooling": "max"},
    ],
)
def test_file_holds_what_its_recipe_gives(options, made):
    _, extract_it = made
    threads = torch.get_num_threads()
    report = verify(extract_it(**options), sample=5, threads=2)
    assert torch.get_num_threads() == threads
    assert report.is_within
    assert (report.num_sampled, report.missing, report.other_sequence) == (5, (), ())
    assert report.same_weights is True
    assert all(layer.num_compared >= 5 for layer in report.layers)
    assert report.tolerance == (1e-3 if "out_dtype" in options else 1e-5)


def test_changed_values_are_found(made):
    _, extract_it = made
    path = extract_it()
    with h5py.File(path, "r+") as file:
        file["X"][3, 0] += 0.25
    report = verify(path)
    assert report.num_sampled == 12
    assert not report.is_within
    assert [layer.num_outside for layer in report.layers] == [1, 0]
    assert report.layers[0].worst[0][0] == "r3"
    assert report.layers[0].max_absolute == pytest.approx(0.25, rel=1e-3)


def test_changed_and_missing_sequences_are_found(made, tmp_path):
    _, extract_it = made
    changed = {**SEQUENCES, "r2": "ACGT" * 6}
    del changed["r5"]
    report = verify(extract_it(), write_fasta(tmp_path / "moved.fa", changed))
    assert (report.missing, report.other_sequence) == (("r5",), ("r2",))
    assert not report.is_within
    assert report.layers[0].num_compared == 10
    assert report.layers[0].num_outside == 0


def test_other_weights_are_found(made, tmp_path):
    _, extract_it = made
    other = build_tiny("esm", tmp_path / "esm")
    path = extract_it(layers=0)
    report = verify(path, model=str(build_tiny("bert", tmp_path / "same")), sample=2)
    assert report.same_weights is True
    assert report.is_within
    assert verify(path, model=str(other), sample=2).same_weights is False
    wider = build_tiny("bert", tmp_path / "wider")
    AutoModel.from_config(AutoConfig.from_pretrained(wider, hidden_size=24)).save_pretrained(wider)
    message = r"layer 'encoder.layer.0' of 'r\d+' has shape \(16,\), the model gives \(24,\); .* set model"
    with pytest.raises(ConfigError, match=message):
        verify(path, model=str(wider), sample=2)


def test_sample_is_drawn_by_seed_and_failed_records_are_left_out(bert, tmp_path):
    fasta = write_fasta(tmp_path / "a.fa", SEQUENCES)
    path = tmp_path / "a.h5"
    extract(fasta, model=bert, layers=0, dtype="float32", skip_first=25, on_error="skip", output=path)
    report = verify(path, sample=50)
    assert report.num_sampled == sum(len(text) > 25 for text in SEQUENCES.values()) == 10
    assert report.is_within


def test_standard_input_and_lost_files_say_what_to_do(made):
    fasta, extract_it = made
    path = extract_it()
    fasta.unlink()
    with pytest.raises(InputFileError, match=r"a\.fa: "):
        verify(path)
    with pytest.raises(ConfigError, match="sample is 0; set sample to 1 or more"):
        verify(path, sample=0)
    with pytest.raises(ConfigError, match="threads is 0; set threads to 1 or more"):
        verify(path, threads=0)
    with pytest.raises(ConfigError, match="'pooling' is not an option"):
        verify(path, pooling="max")


def test_certificate_measures_alone_against_batched(made, bert):
    fasta, extract_it = made
    proof = certify(fasta, model=bert, layers=(0, 2), dtype="float32", sample=6)
    assert (proof.num_records, proof.dtype, proof.tolerance) == (6, "float32", 1e-5)
    assert proof.is_within
    assert 0 < proof.max_absolute < 1e-5  # matrix products of other shapes round otherwise
    assert proof.min_cosine > 1 - 1e-6
    assert json.loads(json.dumps(dataclasses.asdict(proof)))["layers"] == list(proof.layers)
    found = verify(extract_it(), sample=4, certificate=True).certificate
    assert found is not None
    assert (found.num_records, found.is_within) == (4, True)


def test_certificate_finds_a_model_that_depends_on_its_batch(made, bert, monkeypatch):
    from genoembed.models.genomic_model import GenomicModel

    fasta, _ = made
    forward = GenomicModel.forward

    def leaky(self, batch, layers, reduce=None):
        def spoiled(path, activations):
            return reduce(path, activations + 0.01 * len(activations))

        return forward(self, batch, layers, spoiled)

    monkeypatch.setattr(GenomicModel, "forward", leaky)
    proof = certify(fasta, model=bert, layers=0, dtype="float32")
    assert not proof.is_within
    assert proof.max_absolute > 0.01


def test_sample_of_certify_is_seeded(made, bert):
    fasta, _ = made
    first, again = (certify(fasta, model=bert, layers=0, sample=3, seed=4) for _ in range(2))
    assert first == again
    assert np.isfinite(first.max_relative)
