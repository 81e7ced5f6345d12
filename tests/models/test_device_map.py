"""One model over several devices: the vectors are those of a single one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genoembed import extract, load_model, open_embeddings
from tests.by_hand import STRIPED, folder_of, model_of, random_dna, write_fasta


def vectors(tmp_path, model):
    fasta = write_fasta(tmp_path / "in.fa", {f"r{n}": random_dna(20 + n, n) for n in range(4)})
    extract(fasta, model=model, layers=[0, "final"], output=tmp_path / "out.h5", overwrite=True)
    with open_embeddings(tmp_path / "out.h5") as file:
        return {layer: file[layer][:] for layer in file.layers}


def blocks_on_disk(module):
    """Everything on the CPU, but the blocks, which are fetched from the disk one by one."""
    return {
        name: "disk" if isinstance(child, torch.nn.ModuleList) or name == "encoder" else "cpu"
        for name, child in module.named_children()
    }


@pytest.mark.parametrize("family", ["llama", "bert", STRIPED])
def test_model_over_memory_and_disk_gives_the_vectors_of_one_device(family, tmp_path):
    placed = load_model(
        str(folder_of(family)),
        device="cpu",
        dtype="float32",
        device_map=blocks_on_disk(model_of(family).module),
    )
    assert {parameter.device.type for parameter in placed.module.parameters()} == {"cpu", "meta"}
    assert placed.device == torch.device("cpu")
    expected = vectors(tmp_path, model_of(family))
    for layer, matrix in vectors(tmp_path, placed).items():
        np.testing.assert_array_equal(matrix, expected[layer])


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto takes the GPU")
def test_device_auto_without_a_gpu_is_the_cpu(tmp_path):
    placed = load_model(str(folder_of("llama")), device="auto", dtype="float32")
    assert placed.device == torch.device("cpu")
    expected = vectors(tmp_path, model_of("llama"))
    for layer, matrix in vectors(tmp_path, placed).items():
        np.testing.assert_array_equal(matrix, expected[layer])


def test_inputs_go_where_weights_run_that_wait_elsewhere(monkeypatch):
    model = model_of("llama")
    monkeypatch.setattr(
        type(model.module), "parameters", lambda *_: iter([torch.empty(1, device="meta")]), raising=False
    )
    monkeypatch.setattr(
        model.module.layers, "_hf_hook", SimpleNamespace(execution_device="cuda:1"), raising=False
    )
    assert model.device == torch.device("cuda:1")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_model_over_two_gpus_gives_the_vectors_of_one(tmp_path):
    module = model_of(STRIPED).module
    half = {f"blocks.{index}": int(index >= 2) for index in range(4)}
    rest = {name: 1 if name == "norm" else 0 for name, _ in module.named_children() if name != "blocks"}
    placed = load_model(str(folder_of(STRIPED)), dtype="float32", device_map=half | rest)
    expected = vectors(tmp_path, load_model(str(folder_of(STRIPED)), device="cuda:0", dtype="float32"))
    for layer, matrix in vectors(tmp_path, placed).items():
        np.testing.assert_allclose(matrix, expected[layer], rtol=1e-5, atol=1e-5)
