"""Time that stopping at the deepest captured layer saves, against a full forward pass.

A StripedHyena 2 model of the bundled model's shape with random weights (32 blocks, Evo 2 7B's pattern). Full
passes and passes that capture one layer alternate within one run, so that both see the same machine; the
order within a pair alternates too. Prints medians, their ratio and how many modules each kind of pass
called::

    python benchmarks/early_exit.py --layer 8 --pairs 15 --json benchmarks/results/early_exit.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from describe_machine import describe_machine

from genoembed import StripedHyena2Config, StripedHyena2ForCausalLM
from genoembed.models.layers import capture


def build_model() -> StripedHyena2ForCausalLM:
    """Random weights in the shape of the bundled model."""
    torch.manual_seed(0)
    return StripedHyena2ForCausalLM(StripedHyena2Config()).eval()


@torch.inference_mode()
def run_full(model: torch.nn.Module, input_ids: torch.Tensor) -> None:
    """Every block and the logits."""
    model(input_ids)


@torch.inference_mode()
def run_to_layer(model: torch.nn.Module, input_ids: torch.Tensor, path: str) -> None:
    """Stop behind one module."""
    with capture(model, [path]):
        model(input_ids)


def count_calls(model: torch.nn.Module, forward: object) -> int:
    """Count the modules without children that a pass calls."""
    calls = []
    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [leaf.register_forward_pre_hook(lambda *_: calls.append(1)) for leaf in leaves]
    forward()
    for handle in handles:
        handle.remove()
    return len(calls)


def measure(model: torch.nn.Module, input_ids: torch.Tensor, path: str, pairs: int) -> dict[str, list[float]]:
    """Seconds of alternating passes, after one of each to warm up."""
    passes = {
        "full": lambda: run_full(model, input_ids),
        "captured": lambda: run_to_layer(model, input_ids, path),
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for pair in range(pairs + 1):
        for name in sorted(passes, reverse=bool(pair % 2)):
            start = time.perf_counter()
            passes[name]()
            if pair:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Measure, print, file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = build_model()
    input_ids = torch.tensor([65, 67, 71, 84])[torch.randint(4, (arguments.rows, arguments.length))]
    path = model.embedding_layer_template.format(index=arguments.layer)
    seconds = measure(model, input_ids, path, arguments.pairs)
    medians = {name: median(values) for name, values in seconds.items()}
    ratios = [full / short for full, short in zip(seconds["full"], seconds["captured"], strict=True)]
    result = {
        "machine": describe_machine() | {"threads": arguments.threads, "note": arguments.note},
        "model": {"blocks": len(model.blocks), "hidden_size": model.config.hidden_size, "dtype": "float32"},
        "input": {"rows": arguments.rows, "length": arguments.length},
        "layer": path,
        "pairs": arguments.pairs,
        "seconds_median": medians,
        "seconds_range": {name: [min(values), max(values)] for name, values in seconds.items()},
        "full_over_captured": medians["full"] / medians["captured"],
        "full_over_captured_median_of_pairs": median(ratios),
        "time_saved": 1 - medians["captured"] / medians["full"],
        "leaf_modules_called": {
            "full": count_calls(model, lambda: run_full(model, input_ids)),
            "captured": count_calls(model, lambda: run_to_layer(model, input_ids, path)),
        },
    }
    print(json.dumps(result, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
