"""What the emulation of FP8 costs: one input projection of Evo 2 1B, against the plain product in bfloat16.

Weights and activations are random; the forms take turns. What the device has runs: PyTorch and numba on a
CPU, PyTorch and Triton on a GPU, and the hardware itself on Hopper. Each form of the emulation is compared
with the others first: they must give the same bits. What the hardware gives otherwise is counted::

    python benchmarks/fp8.py --threads 1
    python benchmarks/fp8.py --device cuda
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from measuring import Figure, file_results, interleave, option_parser, ratio, spread, use_threads

from genoembed.models.striped_hyena2.fp8 import emulate_product, emulation_form, fp8_linear, has_hopper_sums

WIDTH = 1920
"""Hidden size of Evo 2 1B."""


def forms_on(device: torch.device) -> list[str]:
    """List the forms of the emulation that run on a device, the fastest first."""
    return list(dict.fromkeys([emulation_form(device), "torch"]))


def synchronized(action):
    """Let an action end when its last kernel does."""

    def run():
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def compare(
    num_tokens: int, width: int, *, rounds: int, device: torch.device
) -> tuple[list[Figure], list[dict[str, object]], list[str]]:
    """Time the plain product and the forms of FP8.

    Args:
        num_tokens: Rows.
        width: Inputs; there are three times as many outputs.
        rounds: Interleaved rounds.
        device: What multiplies.

    Returns:
        Figures, rows of the table, and what the hardware gives otherwise.
    """
    generator = torch.Generator().manual_seed(num_tokens)
    x_TK = torch.randn(num_tokens, width, generator=generator).bfloat16().to(device)
    weight_NK = (torch.randn(3 * width, width, generator=generator) * width**-0.5).bfloat16().to(device)
    scales = torch.tensor([16.0, 256.0], device=device)
    actions = {
        form: partial(emulate_product, x_TK, weight_NK, scales, form=form) for form in forms_on(device)
    }
    found = [action() for action in actions.values()]
    assert all(torch.equal(one, found[0]) for one in found), "the forms differ"
    remarks = []
    if has_hopper_sums(device):
        actions["hardware"] = partial(fp8_linear, x_TK, weight_NK, scales, is_native=True)
        others = int((actions["hardware"]() != found[0]).sum())
        remarks.append(
            f"{num_tokens:,} tokens: {others:,} of {found[0].numel():,} numbers of the hardware differ from "
            "the emulation's."
        )
    forms = list(actions)
    actions["plain bfloat16"] = partial(F.linear, x_TK, weight_NK)
    samples = interleave({name: synchronized(action) for name, action in actions.items()}, rounds=rounds)
    plain = samples["plain bfloat16"]
    figures = [
        ratio(f"{form} over plain bfloat16, {num_tokens:,} tokens", samples[form], plain) for form in forms
    ]
    rows = [{"tokens": num_tokens, "form": name, **spread(taken)} for name, taken in samples.items()]
    return figures, rows, remarks


def main() -> None:
    """Measure, print, file."""
    parser = option_parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; results of the latter are fp8_cuda")
    options = parser.parse_args()
    use_threads(options.threads)
    device = torch.device(options.device)
    figures, rows, remarks = [], [], []
    width = 64 if options.quick else WIDTH
    for num_tokens in (1, 16) if options.quick else (1, 16, 1000):
        more, timed, said = compare(num_tokens, width, rounds=options.rounds, device=device)
        figures += more
        rows += timed
        remarks += said
    file_results(
        "fp8" if device.type == "cpu" else f"fp8_{device.type}",
        "FP8 emulation against the plain product",
        options,
        figures=figures,
        tables={f"One projection, {width:,} to {3 * width:,}": rows},
        remarks=[
            "One product alone: in a model, the other products, the filters and attention cost as much with "
            "FP8 as without.",
            "All forms of the emulation gave the same bits.",
            *remarks,
        ],
        packages=tuple(name for name in ("numba", "triton") if find_spec(name) is not None),
    )


if __name__ == "__main__":
    main()
