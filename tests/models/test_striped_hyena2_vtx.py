"""StripedHyena 2 against the reference implementation, live, on three random models.

Optional: runs where the package ``vtx`` is installed (``pip install --no-deps vtx einops tqdm``). It runs in
a process of its own (this file as a script), because it litters the process (see ``tests.vortex_live``).

Observed with vtx 1.1.0 and torch 2.13.0 on a CPU, largest of the three models, all lengths together. float32:
logits 3.4e-5 (at rms 2.9), module outputs 3.1e-5 (at rms 8.9), relative rms 9e-7. bfloat16: rms error of the
logits against the reference in float32 is 0.9997 to 1.0071 times the reference's own, of blocks 0.9997 to
1.0009.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vortex_live import CONSTANTS, HAS_VTX, build_reference, cast_reference, stirred_weights

SEEDS = (0, 1, 2)
LENGTHS = (1, 6, 128, 300)
LOGITS_ATOL, MODULE_ATOL, RELATIVE_RMS, BF16_RMS_RATIO = 5e-4, 2e-4, 1e-5, 1.2
GOLDEN_RMS = 4.5
"""Size of the values for which the absolute tolerances were set; larger values get as much more."""


def random_description(seed: int) -> dict[str, object]:
    """Describe a random model, in the reference's own keys; every kind of block occurs."""
    rng = random.Random(seed)
    kinds = ["attn", "hcl", "hcm", "hcs", *rng.choices(["attn", "hcl", "hcm", "hcs"], k=rng.randint(0, 3))]
    rng.shuffle(kinds)
    heads, head_size = rng.choice([(2, 16), (3, 8), (4, 12), (1, 32)])
    width = heads * head_size
    divisors = [group for group in range(1, width + 1) if width % group == 0]
    description: dict[str, object] = {
        f"{kind}_layer_idxs": [index for index, other in enumerate(kinds) if other == kind]
        for kind in ("attn", "hcl", "hcm", "hcs")
    }
    description |= {
        **CONSTANTS,
        "hidden_size": width,
        "num_filters": width,
        "num_layers": len(kinds),
        "num_attention_heads": heads,
        "inner_mlp_size": rng.randrange(16, 100),
        "hcs_filter_length": rng.choice([7, 5]),
        "hcs_filter_groups": rng.choice(divisors),
        "hcm_filter_groups": rng.choice(divisors),
        "state_size": rng.choice([16, 4]),
        "rotary_emb_base": rng.choice([10000, 1000000]),
        "max_seqlen": 8192,
        "evo2_style_activations": seed != SEEDS[-1],
    }
    if seed % 2:
        description |= {"use_interpolated_rotary_pos_emb": True, "rotary_emb_scaling_factor": 32}
    return description


def random_inputs(seed: int) -> dict[str, torch.Tensor]:
    """Letters of DNA, some other bytes, and ids beyond the bytes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for length in LENGTHS:
        letters = torch.tensor([65, 67, 71, 84])[torch.randint(4, (2, length), generator=generator)]
        others = torch.randint(512, (2, length), generator=generator)
        inputs[str(length)] = torch.where(torch.rand(2, length, generator=generator) < 0.9, letters, others)
    return inputs


def rms(x: torch.Tensor) -> float:
    """Root mean square."""
    return x.double().square().mean().sqrt().item()


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three random models and let the reference run them."""
    from genoembed.models.striped_hyena2.convert import read_vortex_config
    from genoembed.models.striped_hyena2.modeling import StripedHyena2ForCausalLM

    root = tmp_path_factory.mktemp("vtx")
    for seed in SEEDS:
        config = root / f"{seed}.yml"
        config.write_text(json.dumps(random_description(seed)))
        torch.manual_seed(seed)
        model = StripedHyena2ForCausalLM(read_vortex_config(config))
        weights = stirred_weights(model)
        save_file(weights, root / f"{seed}.weights.safetensors")
        save_file(random_inputs(seed), root / f"{seed}.inputs.safetensors")
    command = [sys.executable, str(Path(__file__).resolve()), *map(str, SEEDS)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.vtx
@pytest.mark.skipif(not HAS_VTX, reason="needs the packages vtx, einops and tqdm")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", SEEDS)
def test_random_model_equals_reference(reference_folder: Path, seed: int, dtype: str) -> None:
    from genoembed.models.striped_hyena2.convert import convert_checkpoint
    from genoembed.models.striped_hyena2.modeling import StripedHyena2ForCausalLM

    chosen = getattr(torch, dtype)
    folder = convert_checkpoint(
        reference_folder / f"{seed}.weights.safetensors",
        reference_folder / f"{seed}.{dtype}",
        config=reference_folder / f"{seed}.yml",
        dtype=chosen,
    )
    model = StripedHyena2ForCausalLM.from_pretrained(folder, dtype=chosen).eval()
    stored = load_file(reference_folder / f"{seed}.outputs.safetensors")
    errors: dict[str, list[list[torch.Tensor]]] = {}
    for length, input_ids in random_inputs(seed).items():
        with torch.inference_mode():
            output = model(input_ids, output_hidden_states=True)
        ours = {"logits": output.logits, "norm": output.hidden_states[-1]}
        ours |= {f"blocks.{index}": hidden for index, hidden in enumerate(output.hidden_states[1:-1])}
        for name, value in ours.items():
            theirs = stored[f"{dtype}/{length}/{name}"].float()
            truth = stored[f"float32/{length}/{name}"]
            assert value.shape == truth.shape
            errors.setdefault(name, []).append([value.float() - truth, theirs - truth, truth])
    assert len(errors) == model.config.num_hidden_layers + 1
    for name, pieces in errors.items():
        assert len(pieces) == len(LENGTHS)
        error, reference_error, truth = (
            torch.cat([part.flatten() for part in parts]) for parts in zip(*pieces, strict=True)
        )
        if dtype == "float32":
            tolerance = LOGITS_ATOL if name == "logits" else MODULE_ATOL
            assert error.abs().max() <= tolerance * max(1.0, rms(truth) / GOLDEN_RMS), name
            assert rms(error) <= RELATIVE_RMS * rms(truth), name
        else:
            assert rms(error) <= BF16_RMS_RATIO * rms(reference_error), name


def run_reference(seeds: list[str]) -> None:
    """Run in its own process: the reference on the models in the current folder, in both precisions."""
    for seed in seeds:
        description = json.loads(Path(f"{seed}.yml").read_text())
        model = build_reference(description, load_file(f"{seed}.weights.safetensors"))
        outputs = {}
        for dtype in ("float32", "bfloat16"):
            cast_reference(model, getattr(torch, dtype))
            for length, input_ids in load_file(f"{seed}.inputs.safetensors").items():
                with torch.inference_mode():
                    for name, value in _reference_outputs(model, input_ids).items():
                        outputs[f"{dtype}/{length}/{name}"] = value.clone().contiguous()
        save_file(outputs, f"{seed}.outputs.safetensors")


def _reference_outputs(model: torch.nn.Module, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs = {}
    names = [f"blocks.{index}" for index in range(len(model.blocks) - 1)] + ["norm"]

    def keep(name):
        return lambda _module, _inputs, output: outputs.__setitem__(
            name, output[0] if isinstance(output, tuple) else output
        )

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    outputs["logits"] = model(input_ids)[0]
    for handle in handles:
        handle.remove()
    return outputs


if __name__ == "__main__":
    run_reference(sys.argv[1:])
