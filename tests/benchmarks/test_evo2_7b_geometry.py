"""The random model of a registry shape: official names and types, and weights that stay in their files."""

from __future__ import annotations

import sys
from pathlib import Path

import evo2_7b_geometry
import pytest
import torch
from safetensors import safe_open

import genoembed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = genoembed.StripedHyena2Config(
        hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=6,
        attn_layer_idxs=[3],
        hcs_layer_idxs=[0, 4],
        hcm_layer_idxs=[1, 5],
        hcl_layer_idxs=[2],
        intermediate_size=96,
        max_position_embeddings=512,
    )
    place = tmp_path_factory.mktemp("geometry") / "model"
    written = evo2_7b_geometry.write_random_model(place, config)
    assert written["shards"] == 3
    return place


def test_folder_holds_every_tensor_in_its_stored_type(folder):
    config = genoembed.StripedHyena2Config.from_pretrained(folder)
    expected = genoembed.StripedHyena2ForCausalLM(config).state_dict()
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            found |= {key: shard.get_tensor(key) for key in shard.keys()}
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.shape == expected[key].shape
        kept = torch.float32 if key.endswith(evo2_7b_geometry.STAYS_FLOAT32) else torch.bfloat16
        assert tensor.dtype == kept
        assert torch.isfinite(tensor).all()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_loaded_weights_are_pages_of_the_files(folder):
    model = genoembed.load_model(str(folder), device="cpu", dtype="bfloat16")
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(folder) in line
    ]
    matrices = {
        name: parameter
        for name, parameter in model.module.named_parameters()
        if ".mlp." in name or name.endswith("Wqkv.weight")
    }
    assert len(matrices) == 6 * 3 + 1
    for name, parameter in matrices.items():
        assert any(first <= parameter.data_ptr() < last for first, last in mapped), f"{name} was copied"


def test_command_runs_on_the_folder_and_is_watched(folder, tmp_path):
    fasta = evo2_7b_geometry.write_record(tmp_path / "a.fa", 300)
    found = evo2_7b_geometry.run_extract(folder, fasta, tmp_path / "out.h5", layer="4", threads=1)
    assert found["layers"] == ["blocks.4.mlp.l3"]
    assert found["shape"] == [1, 64]
    assert found["is_finite"] is True
    assert found["rms"] > 0
    assert found["peak_rss_gib"] > 0.1
    if sys.platform == "linux":
        assert 0.05 < found["peak_anonymous_gib"] <= found["peak_rss_gib"]
