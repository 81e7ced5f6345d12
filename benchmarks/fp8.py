"""What the emulation of FP8 costs: one input projection of Evo 2 1B, against the plain product in bfloat16.

Weights and activations are random; the forms take turns. Each form is compared with the others first: they
must give the same bits::

    python benchmarks/fp8.py --threads 1
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from measuring import Figure, file_results, interleave, option_parser, ratio, spread, use_threads

from genoembed.models.striped_hyena2.fp8 import emulate_product

WIDTH = 1920
"""Hidden size of Evo 2 1B."""
FORMS = ("numba", "torch")


def compare(num_tokens: int, width: int, *, rounds: int) -> tuple[list[Figure], list[dict[str, object]]]:
    """Time the plain product and both forms of the emulation.

    Args:
        num_tokens: Rows.
        width: Inputs; there are three times as many outputs.
        rounds: Interleaved rounds.

    Returns:
        Figures and rows of the table.
    """
    generator = torch.Generator().manual_seed(num_tokens)
    x_TK = torch.randn(num_tokens, width, generator=generator).bfloat16()
    weight_NK = (torch.randn(3 * width, width, generator=generator) * width**-0.5).bfloat16()
    scales = torch.tensor([16.0, 256.0])
    found = [emulate_product(x_TK, weight_NK, scales, form=form) for form in FORMS]
    assert torch.equal(*found), "the forms differ"
    actions = {"plain bfloat16": partial(F.linear, x_TK, weight_NK)} | {
        form: partial(emulate_product, x_TK, weight_NK, scales, form=form) for form in FORMS
    }
    samples = interleave(actions, rounds=rounds)
    plain = samples["plain bfloat16"]
    figures = [
        ratio(f"{form} over plain bfloat16, {num_tokens:,} tokens", samples[form], plain) for form in FORMS
    ]
    rows = [{"tokens": num_tokens, "form": name, **spread(taken)} for name, taken in samples.items()]
    return figures, rows


def main() -> None:
    """Measure, print, file."""
    options = option_parser(__doc__).parse_args()
    use_threads(options.threads)
    figures, rows = [], []
    width = 64 if options.quick else WIDTH
    for num_tokens in (1, 16) if options.quick else (1, 16, 1000):
        more, timed = compare(num_tokens, width, rounds=options.rounds)
        figures += more
        rows += timed
    file_results(
        "fp8",
        "FP8 emulation against the plain product",
        options,
        figures=figures,
        tables={f"One projection, {width:,} to {3 * width:,}": rows},
        remarks=[
            "One product alone: in a model, the other products, the filters and attention cost as much with "
            "FP8 as without.",
            "Both forms gave the same bits.",
        ],
        packages=("numba",),
    )


if __name__ == "__main__":
    main()
