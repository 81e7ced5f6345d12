"""Checkpoints with FP8 scales: what conversion keeps, when the projections run in FP8, and what comes out."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import pickle
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, TrainingArguments

from genoembed.errors import CheckpointError, ConfigError, ModelError, PrecisionWarning
from genoembed.models import registry
from genoembed.models.load import load_model
from genoembed.models.registry import find_model
from genoembed.models.striped_hyena2 import convert as convert_module
from genoembed.models.striped_hyena2 import fp8 as fp8_module
from genoembed.models.striped_hyena2.configuration import StripedHyena2Config
from genoembed.models.striped_hyena2.convert import convert_checkpoint, read_vortex_config, vortex_arguments
from genoembed.training.start import load_causal
from genoembed.training.trainer import ResumableTrainer
from tests.models.conftest import make_batch
from tests.oracles import hopper_product

GOLDEN = Path(__file__).parents[1] / "golden" / "b_1m"
CHECKPOINT = GOLDEN / "evo2_golden_40bstyle.pt"
HYENA_BLOCKS = (0, 1, 3, 4, 5, 6)
ROWS = ([65, 67, 71, 84, 78] * 12, [84, 84, 67, 65] * 9)


@cache
def stored_checkpoint() -> dict[str, object]:
    with torch.serialization.safe_globals([io.BytesIO]):
        return torch.load(CHECKPOINT, map_location="cpu", weights_only=True)


def stored_scales(block: int) -> torch.Tensor:
    state = stored_checkpoint()[f"blocks.{block}.projections._extra_state"]
    return torch.load(io.BytesIO(state.getvalue()), map_location="cpu", weights_only=True)["scale_fwd"][:2]


def description(folder: Path, **changes: object) -> Path:
    content = yaml.safe_load((GOLDEN / "config.yml").read_text()) | changes
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def convert(folder: Path, checkpoint: Path = CHECKPOINT, *, dtype=torch.float32, **changes: object) -> Path:
    return convert_checkpoint(
        checkpoint, folder / "model", config=description(folder, **changes), dtype=dtype
    )


@pytest.fixture(scope="module")
def needing(tmp_path_factory) -> Path:
    """A folder whose projections need FP8; not to be changed."""
    return convert(tmp_path_factory.mktemp("needing"), use_fp8_input_projections=True)


@pytest.fixture(scope="module")
def optional(tmp_path_factory) -> Path:
    """A folder with scales that are not needed; not to be changed."""
    return convert(tmp_path_factory.mktemp("optional"))


@pytest.fixture
def known_tiny(monkeypatch):
    """Let the registry know a checkpoint that needs FP8, ``evo2_tiny``."""
    content = yaml.safe_load((GOLDEN / "config.yml").read_text())
    small = dataclasses.replace(
        find_model("evo2_40b"), name="evo2_tiny", merged_sha256=None, config=vortex_arguments(content)
    )
    for module in (registry, convert_module):
        monkeypatch.setattr(module, "known_models", lambda: (small,))
    return small


def load(folder: Path, **options: object):
    return load_model(str(folder), device="cpu", **{"dtype": "float32", **options})


def final_states(model) -> torch.Tensor:
    return model.forward(make_batch(*ROWS), ["norm"])["norm"][0]


# what conversion keeps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_kept_in_float32(tmp_path, dtype):
    converted = load_file(convert(tmp_path, dtype=dtype) / "model.safetensors")
    found = {key: tensor for key, tensor in converted.items() if key.endswith("fp8_scales")}
    assert len(found) == len(HYENA_BLOCKS)
    for block in HYENA_BLOCKS:
        scales = found[f"blocks.{block}.projections.fp8_scales"]
        assert scales.dtype == torch.float32
        assert torch.equal(scales, stored_scales(block))


@pytest.mark.parametrize(
    ("changes", "need"),
    [
        ({"use_fp8_input_projections": True}, "needed"),
        ({"use_fp8_input_projections": True, "model_name": "my-evo2-7b-8k"}, "optional"),
        ({"use_fp8_input_projections": False}, "optional"),
    ],
)
def test_description_says_whether_they_are_needed(tmp_path, changes, need):
    folder = convert(tmp_path, **changes)
    assert json.loads((folder / "config.json").read_text())["fp8_projections"] == need


def test_registry_says_whether_they_are_needed(tmp_path, known_tiny):
    folder = convert_checkpoint(CHECKPOINT, tmp_path / "model", name="evo2_tiny")
    assert json.loads((folder / "config.json").read_text())["fp8_projections"] == "needed"
    assert load(folder).fp8 == "emulated"


def test_scales_survive_saving_and_casting(needing, tmp_path):
    module = AutoModelForCausalLM.from_pretrained(needing, dtype=torch.bfloat16)
    for cast in (module, module.half(), module.to(torch.bfloat16)):
        assert torch.equal(cast.blocks[4].projections.fp8_scales, stored_scales(4))
    module.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert torch.equal(again.blocks[4].projections.fp8_scales, stored_scales(4))
    assert (again.config.fp8_projections, again.fp8_form) == ("needed", "emulated")


def test_a_safetensors_file_may_hold_them_as_well(needing, tmp_path):
    original = load_file(GOLDEN / "weights.safetensors")
    states = stored_checkpoint()
    for block in HYENA_BLOCKS:
        key = f"blocks.{block}.projections._extra_state"
        original[key] = torch.tensor(list(states[key].getvalue()), dtype=torch.uint8)
    save_file(original, tmp_path / "weights.safetensors")
    folder = convert(tmp_path, tmp_path / "weights.safetensors", use_fp8_input_projections=True)
    assert load(folder).fp8 == "emulated"


class Trap:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("trap",)


def zipped(content: object) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer


def bomb() -> io.BytesIO:
    """A small file that unpacks to 8 MB."""
    source, buffer = zipped({"scale_fwd": torch.ones(1 << 21)}), io.BytesIO()
    with (
        zipfile.ZipFile(source) as stored,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in stored.infolist():
            packed.writestr(member.filename, stored.read(member))
    return buffer


UNREADABLE = {
    "none": lambda: zipped(None),
    "no file": lambda: io.BytesIO(b"nothing"),
    "pickled bytes": lambda: torch.tensor(list(pickle.dumps({"scale_fwd": Trap()})), dtype=torch.uint8),
    "code": lambda: zipped({"scale_fwd": torch.ones(3), "more": Trap()}),
    "damaged": lambda: io.BytesIO(zipped({"scale_fwd": torch.ones(3)}).getvalue()[:-100]),
    "bomb": bomb,
    "too large": lambda: zipped({"scale_fwd": torch.ones(1 << 19)}),
    "another key": lambda: zipped({"scale": torch.ones(3)}),
    "too few": lambda: zipped({"scale_fwd": torch.ones(1)}),
    "a number": lambda: zipped({"scale_fwd": 3.0}),
    "a matrix": lambda: zipped({"scale_fwd": torch.ones(2, 2)}),
    "half precision": lambda: zipped({"scale_fwd": torch.ones(3).half()}),
    "zero": lambda: zipped({"scale_fwd": torch.tensor([1.0, 0.0, 1.0])}),
    "not a number": lambda: zipped({"scale_fwd": torch.tensor([1.0, torch.nan, 1.0])}),
    "text": lambda: "scales",
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_state_that_cannot_be_read_safely_is_absent(kind, tmp_path, known_tiny, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    key = "blocks.3.projections._extra_state"
    torch.save({**stored_checkpoint(), key: UNREADABLE[kind]()}, tmp_path / "changed.pt")
    with caplog.at_level(logging.INFO):
        folder = convert(tmp_path, tmp_path / "changed.pt", use_fp8_input_projections=True)
    assert f"{key}: its FP8 scales are left out: " in caplog.text
    assert "no FP8 scales are stored; the projections will run without FP8" in caplog.text
    assert "weights_only" not in caplog.text
    assert not Path("trap").exists()
    assert not any(name.endswith("fp8_scales") for name in load_file(folder / "model.safetensors"))
    assert load(folder).fp8 is None
    with pytest.raises(CheckpointError, match=rf"evo2_tiny needs FP8 scales, but none can be read of {key};"):
        convert_checkpoint(tmp_path / "changed.pt", tmp_path / "other", name="evo2_tiny")


# when the projections run in FP8


def test_auto_follows_the_need(needing, optional):
    assert (load(needing).fp8, load(optional).fp8) == ("emulated", "off")
    assert load(needing, fp8="emulate").provenance["fp8"] == "emulated"
    assert load(optional, fp8="emulate").provenance["fp8"] == "emulated"


def test_optional_scales_change_nothing_unless_requested(optional, tmp_path):
    plain = convert(tmp_path, GOLDEN / "weights.safetensors")
    assert load(plain).provenance["fp8"] is None
    with_scales = load(optional)
    assert with_scales.provenance["fp8"] == "off"
    weights = load_file(plain / "model.safetensors")
    rounded = with_scales.module.state_dict()
    assert {key for key in weights if not torch.equal(weights[key], rounded[key])}  # the .pt is bfloat16
    with_scales.module.load_state_dict(weights, strict=False)
    assert torch.equal(final_states(with_scales), final_states(load(plain)))


def test_off_warns_where_fp8_is_needed(needing, optional):
    with pytest.warns(
        PrecisionWarning, match=r"trained with 8-bit .* FP8 is off; without them .* much worse"
    ):
        off = load(needing, fp8="off")
    assert off.provenance["fp8"] == "off"
    optional_off = load(optional, fp8="off")
    assert torch.equal(final_states(off), final_states(optional_off))
    on = load(needing)
    difference = (final_states(on) - final_states(off)).norm() / final_states(off).norm()
    assert 0.01 < difference < 0.3


def test_a_model_without_scales_has_nothing_to_emulate(tmp_path, tiny_folder):
    folder = convert(tmp_path, GOLDEN / "weights.safetensors")
    for source in (folder, tiny_folder("bert")):
        with pytest.raises(
            ModelError, match="it has no FP8 scales, so there is nothing to emulate; leave fp8"
        ):
            load(source, fp8="emulate")
    with pytest.raises(ModelError, match=r"no FP8 scales, .* convert a checkpoint"):
        load(folder).module.set_fp8("emulate")
    assert load(tiny_folder("bert"), fp8="off").provenance["fp8"] is None
    with pytest.raises(ModelError, match="fp8 is 'on', expected one of auto, emulate, off"):
        load(folder, fp8="on")


def test_float16_is_refused_where_fp8_runs(needing):
    with pytest.raises(ModelError, match=r"dtype is float16, .* set dtype to bfloat16 or float32"):
        load(needing, dtype="float16")
    with pytest.warns(PrecisionWarning):
        assert load(needing, dtype="float16", fp8="off").fp8 == "off"


@pytest.fixture
def outdated(tmp_path, known_tiny) -> Path:
    """A folder of ``evo2_tiny`` from a release that left the scales out."""
    folder = convert_checkpoint(CHECKPOINT, tmp_path / "outdated", name="evo2_tiny")
    weights = load_file(folder / "model.safetensors")
    kept = {key: tensor for key, tensor in weights.items() if not key.endswith("fp8_scales")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["fp8_projections"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_folder_of_an_earlier_release_is_to_be_converted_again(outdated):
    with pytest.raises(
        CheckpointError, match=r"no FP8 scales, which evo2_tiny needs: .*convert the checkpoint"
    ):
        load(outdated)
    with pytest.warns(PrecisionWarning, match="much worse"):
        assert load(outdated, fp8="off").fp8 is None


def test_pretraining_does_not_go_on_from_a_folder_of_an_earlier_release(outdated):
    with pytest.raises(CheckpointError, match="no FP8 scales, which evo2_tiny needs"):
        load_causal(str(outdated))


def test_training_in_fp8_says_so(needing, optional, tmp_path, caplog):
    for folder, is_said in ((needing, True), (optional, False)):
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
        ResumableTrainer(model=load_causal(str(folder)).model, args=arguments, callbacks=[])
        assert ("input projections run in FP8 (emulated), in training as well" in caplog.text) is is_said
        caplog.clear()


def test_folder_that_was_fine_tuned_without_scales_goes_on_without(outdated):
    (outdated / "genoembed_finetuned.json").write_text("{}")
    assert load(outdated).fp8 is None


def test_scales_that_are_missing_from_the_weights_are_named(needing, tmp_path):
    weights = load_file(needing / "model.safetensors")
    del weights["blocks.1.projections.fp8_scales"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((needing / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"blocks\.1\.projections\.fp8_scales"):
        load(tmp_path)


def test_configuration_refuses_what_no_checkpoint_has(tmp_path):
    with pytest.raises(
        ConfigError, match="fp8_projections is 'yes'; it must be one of none, optional, needed"
    ):
        StripedHyena2Config(fp8_projections="yes")
    with pytest.raises(ConfigError, match="qkv_proj_bias must be False where fp8_projections is not 'none'"):
        StripedHyena2Config(fp8_projections="needed", qkv_proj_bias=True)
    path = description(tmp_path, use_fp8_input_projections=True)
    assert read_vortex_config(path).fp8_projections == "needed"


# what comes out


@torch.inference_mode()
def projected(model, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs of a block's projections."""
    seen = {}
    module = model.module.blocks[block].projections
    handle = module.register_forward_hook(lambda _m, args, out: seen.update(x=args[0], y=out))
    try:
        model.module(torch.tensor([ROWS[0][:6]]))
    finally:
        handle.remove()
    return seen["x"][0], seen["y"][0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", [0, 5])
def test_projections_equal_the_oracle(needing, dtype, block):
    model = load(needing, dtype=dtype)
    x, y = projected(model, block)
    assert y.dtype == model.dtype
    weight = model.module.blocks[block].projections.weight
    scales = stored_scales(block)
    expected = torch.tensor(hopper_product(x.tolist(), weight.tolist(), scales.tolist()))
    assert torch.equal(y.float(), expected)


def test_attention_and_mlp_run_without_fp8(needing, monkeypatch):
    shapes = []
    emulate = fp8_module.emulate_product

    def counting(x, weight, scales):
        shapes.append(tuple(weight.shape))
        return emulate(x, weight, scales)

    monkeypatch.setattr(fp8_module, "emulate_product", counting)
    final_states(load(needing))
    assert shapes == [(144, 48)] * len(HYENA_BLOCKS)


def test_a_captured_layer_changes_nothing(needing):
    model = load(needing)
    plain = final_states(model)
    captured = model.forward(make_batch(*ROWS), ["blocks.3.projections", "norm"])
    assert torch.equal(captured["norm"][0], plain)


def test_rows_do_not_depend_on_their_batch(needing):
    model = load(needing)
    together = final_states(model)
    alone = model.forward(make_batch(ROWS[0]), ["norm"])["norm"][0]
    # in float32 sums differ in the last bit, which may round to the other of two numbers of eight bits
    assert (together - alone).norm() / alone.norm() < 1e-2


@torch.inference_mode()
def test_blocks_of_a_sequence_give_what_the_whole_gives(needing):
    module = load(needing).module
    ids = torch.tensor([ROWS[0]])
    whole = module(ids).last_hidden_state
    cache, parts = None, []
    for part in ids.split(17, dim=1):
        output = module(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.last_hidden_state)
    assert (torch.cat(parts, dim=1) - whole).norm() / whole.norm() < 1e-2


def test_hopper_multiplies_itself_unless_told_to_emulate(needing, monkeypatch):
    # PyTorch has the product for CPUs as well, with other sums: close, not equal
    monkeypatch.setattr(fp8_module, "has_hopper_sums", lambda _device: True)
    emulated, native = load(needing, fp8="emulate"), load(needing)
    assert (emulated.fp8, native.fp8) == ("emulated", "native")
    x, y = projected(emulated, 0)
    assert (x.shape[0] % 16, y.shape) == (6, (6, 144))
    found = projected(native, 0)[1]
    assert found.shape == y.shape
    assert 0 < (found - y).abs().max() < 0.02 * y.abs().max()


# gradients


def test_gradients_pass_straight_through(needing):
    projections = load(needing).module.blocks[0].projections
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
    projections.requires_grad_(True)
    weights = torch.randn(2, 5, 144, generator=torch.Generator().manual_seed(1))
    (projections(x) * weights).sum().backward()
    found = x.grad.clone(), projections.weight.grad.clone()
    x.grad = projections.weight.grad = None
    (F.linear(x, projections.weight) * weights).sum().backward()
    # the product is rounded to bfloat16, and so is its gradient
    for one, other in zip(found, (x.grad, projections.weight.grad), strict=True):
        assert (one - other).norm() / other.norm() < 1e-2
    assert not projections.fp8_scales.requires_grad


def test_autocast_decides_the_type_of_the_product(needing):
    projections = load(needing).module.blocks[0].projections
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = projections(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = projections(x)
    assert (expected.dtype, found.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(expected, found.float())


@pytest.mark.parametrize("is_cast", [False, True])
def test_training_steps_lower_the_loss(needing, is_cast):
    module = AutoModelForCausalLM.from_pretrained(needing, dtype=torch.float32).train()
    module.activation_checkpointing_enable()
    ids = torch.tensor([ROWS[0]])
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_cast):
            loss = module(ids, labels=ids).loss
        loss.backward()
        assert module.blocks[0].projections.weight.grad.norm() > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
