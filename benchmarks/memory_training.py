"""What a step of fine-tuning holds in memory: weights, states of the optimizer, activations.

A StripedHyena 2 of random weights takes one step on random rows, in a process of its own for each setting;
weights and states are counted, and the process's peak is read from the system, above that of a process that
only loads the libraries.

Example::

    python benchmarks/memory_training.py --threads 1
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measuring import Figure, file_results, option_parser, use_threads

from genoembed import CharTokenizer, StripedHyena2Config, StripedHyena2ForCausalLM
from genoembed.config.finetune import EncoderConfig
from genoembed.models.load import load_model
from genoembed.training.checkpointing import checkpoint_activations
from genoembed.training.encoder import Encoder
from genoembed.training.optimizers import build_optimizer, parameter_groups
from genoembed.training.tuning import frozen_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, checkpointed": {"checkpointed": True},
    "full, adafactor": {"optim": "adafactor"},
    "full, adafactor, checkpointed": {"optim": "adafactor", "checkpointed": True},
    "lora": {"tuning": "lora"},
    "lora, 16 bits": {"tuning": "lora", "dtype": "bfloat16"},
    "lora, 16 bits, checkpointed": {"tuning": "lora", "dtype": "bfloat16", "checkpointed": True},
}
MB = 1e6


def build(folder: Path, *, width: int, blocks: int, bases: int) -> None:
    """Write a model of random weights: a third of its blocks of each kind but for two of attention."""
    attention = [blocks // 2, blocks - 1]
    others = [number for number in range(blocks) if number not in attention]
    kinds = {f"{kind}_layer_idxs": others[first::3] for first, kind in enumerate(("hcs", "hcm", "hcl"))}
    config = StripedHyena2Config(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=max(2, width // 64),
        intermediate_size=width * 8 // 3 // 8 * 8,
        attn_layer_idxs=attention,
        max_position_embeddings=bases,
        **kinds,
    )
    StripedHyena2ForCausalLM(config).save_pretrained(folder)
    CharTokenizer().save_pretrained(folder)


def take_step(
    folder: str,
    *,
    rows: int,
    bases: int,
    tuning: str = "full",
    dtype: str = "float32",
    optim: str = "adamw",
    checkpointed: bool = False,
) -> dict[str, float]:
    """Take one step as a run does, and count what it holds."""
    held = frozen_dtype(tuning, dtype)
    genomic = load_model(folder, device="cpu", dtype=held)
    encoder = Encoder(genomic, EncoderConfig(model=folder, tuning=tuning))
    if checkpointed:
        checkpoint_activations(encoder.backbone, captured=encoder.layers)
    groups = parameter_groups(encoder, rate_of=lambda _: 1e-5, weight_decay=0.01)
    optimizer = build_optimizer(optim, groups, betas=(0.9, 0.999), eps=1e-8)
    ids = torch.randint(65, 85, (rows, bases), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    encoder.train()
    encoder.pooled(ids, mask, mask.bool()).square().sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "parameters_M": sum(p.numel() for p in encoder.parameters()) / 1e6,
        "weights_MB": sum(p.numel() * p.element_size() for p in encoder.parameters()) / MB,
        "states_MB": sum(s.numel() * s.element_size() for s in states if torch.is_tensor(s)) / MB,
    }


def measure(folder: Path, settings: Mapping[str, Any] | None, *, threads: int) -> dict[str, float]:
    """Take a step in a process of its own; None only loads the libraries."""
    words = [sys.executable, __file__, "--step", str(folder), json.dumps(settings), "--threads", str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = option_parser(__doc__)
    parser.add_argument("--step", nargs=2, metavar=("FOLDER", "SETTINGS"), help="one step, by itself")
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    if options.step is not None:
        folder, settings = options.step[0], json.loads(options.step[1])
        found = {} if settings is None else take_step(folder, **settings)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB  # KiB on Linux
        print(json.dumps(found | {"peak_MB": peak}))
        return
    size = (
        {"width": 32, "blocks": 6, "bases": 64}
        if options.quick
        else {"width": 384, "blocks": 12, "bases": 768}
    )
    shape = {"rows": 2, "bases": size["bases"]}
    table = []
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), **size)
        base = measure(Path(folder), None, threads=options.threads)["peak_MB"]
        for name, settings in SETTINGS.items():
            if options.quick and "16 bits, checkpointed" not in name:
                continue
            found = measure(Path(folder), {**settings, **shape}, threads=options.threads)
            row = {key: round(value, 1) for key, value in found.items()}
            table.append({"setting": name, **row, "above_libraries_MB": round(found["peak_MB"] - base, 1)})
    rows = {row["setting"]: row for row in table}
    figures = []
    if not options.quick:
        figures = [
            Figure(
                name="weights of LoRA in 16 bits over those in 32",
                value=rows["lora, 16 bits"]["weights_MB"] / rows["lora"]["weights_MB"],
                at_most=0.6,
            ),
            Figure(
                name="states of Adafactor over those of AdamW",
                value=rows["full, adafactor"]["states_MB"] / rows["full"]["states_MB"],
                at_most=0.05,
            ),
            Figure(
                name="peak above the libraries, checkpointed over not (full)",
                value=rows["full, checkpointed"]["above_libraries_MB"] / rows["full"]["above_libraries_MB"],
                at_most=0.9,
            ),
            Figure(
                name="peak above the libraries, LoRA in 16 bits and checkpointed over full",
                value=rows["lora, 16 bits, checkpointed"]["above_libraries_MB"]
                / rows["full"]["above_libraries_MB"],
                at_most=0.5,
            ),
        ]
    file_results(
        "memory_training",
        "Memory of a step of fine-tuning",
        options,
        figures=figures,
        tables={f"One step of {shape['rows']} rows of {shape['bases']} bases": table},
        remarks=[f"Libraries alone: {base:.0f} MB."],
    )


if __name__ == "__main__":
    main()
