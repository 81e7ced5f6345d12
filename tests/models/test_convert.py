"""Conversion of original checkpoints: what comes out, and everything that must be refused."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import genoembed  # noqa: F401 - registers StripedHyena 2 with transformers
from genoembed.errors import CheckpointError, ModelError, StoreError
from genoembed.models.load import load_model
from genoembed.models.striped_hyena2 import convert as convert_module
from genoembed.models.striped_hyena2.convert import checkpoint_files, convert_checkpoint, read_tensors
from tests.models.conftest import make_batch

GOLDEN = Path(__file__).parents[1] / "golden"
STYLES = {"a_base": "evo2_golden_7bstyle.pt", "b_1m": "evo2_golden_40bstyle.pt"}
FLOAT32 = ("log_poles", "residues", "inv_freq", "fp8_scales")


def original(style: str) -> dict[str, torch.Tensor]:
    path = GOLDEN / style / STYLES[style]
    return {key: read() for key, read in read_tensors(path, path=path).items()}


def convert(style: str, output: Path, **options) -> Path:
    config = GOLDEN / style / "config.yml"
    return convert_checkpoint(GOLDEN / style / STYLES[style], output, config=config, **options)


def convert_tensors(tensors: dict[str, object], folder: Path, **options) -> Path:
    source = folder / "changed.pt"
    torch.save(tensors, source)
    return convert_checkpoint(source, folder / "out", config=GOLDEN / "b_1m" / "config.yml", **options)


@pytest.mark.parametrize("style", STYLES)
def test_golden_checkpoint_keeps_every_tensor(style, tmp_path):
    stored = original(style)
    converted = load_file(convert(style, tmp_path / "out") / "model.safetensors")
    assert converted.keys() == stored.keys() - {"unembed.weight"}
    assert len(converted) > 80
    for key, tensor in converted.items():
        assert tensor.dtype == (torch.float32 if key.endswith(FLOAT32) else torch.bfloat16)
        assert torch.equal(tensor, stored[key].to(tensor.dtype))


@pytest.mark.parametrize("style", STYLES)
def test_converted_folder_opens_with_transformers(style, tmp_path):
    folder = convert(style, tmp_path / "out")
    stored = original(style)
    for auto_class in (AutoModel, AutoModelForCausalLM):
        module, info = auto_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(module.norm.scale, stored["norm.scale"].to(torch.bfloat16).float())
    assert AutoTokenizer.from_pretrained(folder)("ACGT").input_ids == [65, 67, 71, 84]
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["StripedHyena2ForCausalLM"], "bfloat16")
    assert stat.S_IMODE(folder.stat().st_mode) & 0o500 == 0o500


def test_converted_folder_loads_through_the_door(tmp_path):
    model = load_model(str(convert("b_1m", tmp_path / "out")), device="cpu")
    assert model.max_length == 1048576
    assert [layer.path for layer in model.resolve([-1, "final"])] == ["blocks.7.mlp.l3", "norm"]
    assert (model.is_causal, model.module.config.rotary_emb_scaling_factor) == (True, 128.0)


def test_float32_keeps_what_is_stored_wider(tmp_path):
    converted = load_file(convert("b_1m", tmp_path / "out", dtype=torch.float32) / "model.safetensors")
    stored = original("b_1m")
    assert torch.equal(converted["norm.scale"], stored["norm.scale"])
    assert {tensor.dtype for tensor in converted.values()} == {torch.float32}


def test_shards_hold_the_same_tensors_and_keep_their_limit(tmp_path):
    whole = load_file(convert("a_base", tmp_path / "whole") / "model.safetensors")
    folder = convert("a_base", tmp_path / "shards", max_shard_bytes=200_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files == sorted(path.name for path in folder.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file_name in files:
        shard = load_file(folder / file_name)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 200_000
        for key, tensor in shard.items():
            assert index["weight_map"][key] == file_name
            assert torch.equal(tensor, whole.pop(key))
    assert not whole
    assert load_model(str(folder), device="cpu").module.num_parameters() > 0


def test_a_tensor_larger_than_the_limit_gets_its_own_shard(tmp_path):
    folder = convert("b_1m", tmp_path / "out", max_shard_bytes=1)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == len(original("b_1m")) - 1
    assert all(len(load_file(path)) == 1 for path in files)


@pytest.mark.parametrize("given", ["model.pt", "model.pt.part0", "model.pt.part11"])
def test_pieces_are_joined_in_numeric_order(given, tmp_path):
    content = (GOLDEN / "b_1m" / STYLES["b_1m"]).read_bytes()
    size = -(-len(content) // 12)
    for number in range(12):
        piece = content[number * size : (number + 1) * size]
        (tmp_path / f"model.pt.part{number}").write_bytes(piece)
    folder = convert_checkpoint(tmp_path / given, tmp_path / "out", config=GOLDEN / "b_1m" / "config.yml")
    expected = load_file(convert("b_1m", tmp_path / "whole") / "model.safetensors")
    converted = load_file(folder / "model.safetensors")
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)
    assert "model.pt.part11" in (folder / "README.md").read_text()


def test_a_missing_piece_is_named(tmp_path):
    for number in (0, 1, 3):
        (tmp_path / f"m.pt.part{number}").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pieces \[2\] are missing; fetch m.pt.part2 too"):
        checkpoint_files(tmp_path / "m.pt")


def test_an_absent_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nope.pt: file not found, and no pieces"):
        checkpoint_files(tmp_path / "nope.pt")


def test_pieces_need_room(tmp_path, monkeypatch):
    for number in (0, 1):
        (tmp_path / f"m.pt.part{number}").write_bytes(b"12345")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: usage._replace(free=9))
    with pytest.raises(CheckpointError, match="needs 10 bytes, but 9 are free"):
        convert_checkpoint(tmp_path / "m.pt", tmp_path / "out", config=GOLDEN / "b_1m" / "config.yml")


def test_safetensors_source_gives_the_same(tmp_path):
    tensors = {key: tensor.clone() for key, tensor in original("b_1m").items()}
    save_file(tensors, tmp_path / "weights.safetensors")
    folder = convert_checkpoint(
        tmp_path / "weights.safetensors", tmp_path / "out", config=GOLDEN / "b_1m" / "config.yml"
    )
    expected = load_file(convert("b_1m", tmp_path / "whole") / "model.safetensors")
    converted = load_file(folder / "model.safetensors")
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_nesting_prefix_and_old_format_are_tolerated(zipped, tmp_path):
    nested = {"module": {f"module.{key}": tensor for key, tensor in original("b_1m").items()}}
    source = tmp_path / "nested.pt"
    torch.save(nested, source, _use_new_zipfile_serialization=zipped)
    folder = convert_checkpoint(source, tmp_path / "out", config=GOLDEN / "b_1m" / "config.yml")
    assert len(load_file(folder / "model.safetensors")) == len(original("b_1m")) - 1


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_pickled_code_is_refused_and_not_run(tmp_path):
    target = tmp_path / "executed"
    with pytest.raises(CheckpointError, match="could run code; rejected, nothing was run"):
        convert_tensors({**original("b_1m"), "x._extra_state": Malicious(target)}, tmp_path)
    assert not target.exists()
    assert not (tmp_path / "out").exists()


def test_code_inside_ignored_buffers_is_never_opened(tmp_path):
    target = tmp_path / "executed"
    buffer = io.BytesIO()
    torch.save(Malicious(target), buffer)
    convert_tensors({**original("b_1m"), "blocks.0.projections._extra_state": buffer}, tmp_path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("norm.scale"), r"1 tensors are missing \(norm.scale\)"),
        (lambda t: t.update(stray=torch.zeros(1)), r"1 tensors have no place in the model \(stray\)"),
        (
            lambda t: t.update({"norm.scale": torch.zeros(3)}),
            r"norm.scale is \(3,\), expected \(48,\)\); check that name or config",
        ),
        (
            lambda t: t.update({"unembed.weight": t["unembed.weight"] + 1}),
            "unembed.weight differs from embedding_layer.weight, expected one tied matrix",
        ),
        (lambda t: t.update(step=3), "step hold no tensors, expected tensors only"),
        (lambda t: t.pop("blocks.2.inner_mha_cls.Wqkv.weight"), "are missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, expected, tmp_path):
    tensors = original("b_1m")
    change(tensors)
    with pytest.raises(CheckpointError, match=expected) as caught:
        convert_tensors(tensors, tmp_path)
    assert caught.value.path.endswith("changed.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed.pt"]


def test_many_problems_are_counted_and_cut_short(tmp_path):
    tensors = {key: value for key, value in original("b_1m").items() if ".mlp." not in key}
    with pytest.raises(CheckpointError, match=r"24 tensors are missing \(.* and 19 more\)"):
        convert_tensors(tensors, tmp_path)


def test_absent_frequencies_are_computed_and_logged(tmp_path, caplog):
    stored = original("b_1m")
    tensors = {key: value for key, value in stored.items() if not key.endswith("inv_freq")}
    with caplog.at_level(logging.WARNING):
        folder = convert_tensors(tensors, tmp_path)
    assert "rotary frequencies are not stored" in caplog.text
    computed = load_file(folder / "model.safetensors")["blocks.2.inner_mha_cls.rotary_emb.inv_freq"]
    assert torch.equal(computed, stored["blocks.2.inner_mha_cls.rotary_emb.inv_freq"])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"nothing like a checkpoint"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_are_refused(content, suffix, tmp_path):
    source = tmp_path / f"damaged{suffix}"
    source.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint .* fetch it again"):
        convert_checkpoint(source, tmp_path / "out", config=GOLDEN / "b_1m" / "config.yml")
    assert not (tmp_path / "out").exists()


def test_nobody_is_told_to_switch_safe_loading_off(tmp_path):
    source = tmp_path / "text.pt"
    source.write_text(">a\nA\n")
    with pytest.raises(CheckpointError, match="not in PyTorch's format") as caught:
        convert_checkpoint(source, tmp_path / "out", config=GOLDEN / "b_1m" / "config.yml")
    assert "weights_only" not in str(caught.value)


def test_an_absent_checkpoint_of_unknown_name_is_called_absent(tmp_path):
    with pytest.raises(CheckpointError, match=r"mine\.pt: file not found"):
        convert_checkpoint(tmp_path / "mine.pt", tmp_path / "out")


def test_other_content_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list, expected tensors by name"):
        convert_checkpoint(tmp_path / "list.pt", tmp_path / "out", config=GOLDEN / "b_1m" / "config.yml")


def test_an_existing_folder_is_kept_unless_told(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    with pytest.raises(StoreError, match="exists already; set overwrite"):
        convert("b_1m", folder)
    with pytest.raises(StoreError, match="so genoembed did not write it"):
        convert("b_1m", folder, overwrite=True)
    (folder / "mine.txt").unlink()
    convert("b_1m", folder)
    (folder / "mine.txt").write_text("kept")
    with pytest.raises(StoreError, match=r"holds 'mine\.txt', which genoembed did not write"):
        convert("b_1m", folder, overwrite=True)
    assert (folder / "mine.txt").read_text() == "kept"
    (folder / "mine.txt").unlink()
    convert("b_1m", folder, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_folder_of_the_checkpoint_is_never_replaced(tmp_path):
    source = shutil.copy(GOLDEN / "b_1m" / STYLES["b_1m"], tmp_path / "model.pt")
    with pytest.raises(StoreError, match="so genoembed did not write it"):
        convert_checkpoint(source, tmp_path, config=GOLDEN / "b_1m" / "config.yml", overwrite=True)
    assert source.is_file()


def test_blocks_of_a_converted_model_equal_its_hidden_states(tmp_path):
    model = load_model(str(convert("a_base", tmp_path / "out")), device="cpu")
    batch = make_batch([65, 67, 71, 84, 78, 65, 67], [84, 84, 65])
    paths = [*(f"blocks.{index}" for index in range(11)), *(layer.path for layer in model.resolve("all"))]
    captured = model.forward(batch, [*paths, "norm"])
    with torch.inference_mode():
        states = model.module(batch.input_ids, output_hidden_states=True).hidden_states
    for index in range(10):
        assert torch.equal(captured[f"blocks.{index}"], states[index + 1])
        # a number means the MLP's output, before the residual sum
        assert not torch.allclose(captured[f"blocks.{index}.mlp.l3"], states[index + 1])
    assert torch.equal(captured["norm"], states[-1])


def test_configuration_must_be_known_and_said_once(tmp_path):
    source = GOLDEN / "b_1m" / STYLES["b_1m"]
    with pytest.raises(ModelError, match=r"'evo2_golden_40bstyle' is not the name of a known checkpoint"):
        convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(ModelError, match="both name and config are given"):
        convert_checkpoint(source, tmp_path / "out", name="evo2_7b", config="x.yml")


def test_name_is_read_off_the_file(tmp_path):
    shutil.copy(GOLDEN / "b_1m" / STYLES["b_1m"], tmp_path / "evo2_40b.pt.part0")
    with pytest.raises(CheckpointError, match=r"evo2_40b.pt.part0: .* tensors are missing"):
        convert_checkpoint(tmp_path / "evo2_40b.pt.part0", tmp_path / "out")
