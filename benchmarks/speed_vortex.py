"""StripedHyena 2 against the reference implementation: same weights, forward to the last block.

Both models sit in one process and run by turns; what they return is compared in the same run. float32:
largest and rms difference; bfloat16: rms error of either one against the reference in float32 (where that is
left out, against ours). Runs that would take too long or need too much memory are left out, and the page says
so. Ours is timed with its backward pass too::

    python benchmarks/speed_vortex.py --rounds 5
    python benchmarks/speed_vortex.py --lengths 2048 --batches 1 --dtypes bfloat16

Needs the package ``vtx``: ``pip install --no-deps vtx einops tqdm``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

sys.path.insert(1, str(Path(__file__).parents[1]))  # for the tests' way to run the reference

from measuring import (
    GIB,
    Figure,
    available_bytes,
    file_results,
    interleave,
    option_parser,
    random_dna,
    ratio,
    rms,
    spread,
    use_threads,
)

from genoembed.models.layers import capture
from genoembed.models.striped_hyena2.convert import read_vortex_config
from genoembed.models.striped_hyena2.modeling import StripedHyena2ForCausalLM
from tests.vortex_live import CONSTANTS, HAS_VTX, build_reference, cast_reference, stirred_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

DESCRIPTION: dict[str, object] = {
    **CONSTANTS,
    "hidden_size": 512,
    "num_filters": 512,
    "num_layers": 11,
    "num_attention_heads": 8,
    "inner_mlp_size": 1408,
    "attn_layer_idxs": [3, 10],
    "hcl_layer_idxs": [2, 6, 9],
    "hcm_layer_idxs": [1, 5, 8],
    "hcs_layer_idxs": [0, 4, 7],
    "hcs_filter_length": 7,
    "hcs_filter_groups": 32,
    "hcm_filter_groups": 32,
    "state_size": 16,
    "rotary_emb_base": 10000,
    "max_seqlen": 32768,
}
LAST = f"blocks.{DESCRIPTION['num_layers'] - 1}"
GOALS = {("float32", 8192): 2.0, ("bfloat16", 8192): 5.0}
NEVER_SLOWER = 1.0
LARGEST_RMS = {"float32": 1e-5, "bfloat16": 1.2}
"""float32: rms of the difference over rms of the values; bfloat16: our rms error over the reference's."""


def build_pair() -> tuple[nn.Module, nn.Module]:
    """Build both models with the same random weights, in float32.

    Returns:
        Ours and the reference.
    """
    # the reference opens a log file where it stands, and has much to say
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    os.chdir(tempfile.mkdtemp(prefix="vortex-log-"))
    config = Path("model.yml")
    config.write_text(json.dumps(DESCRIPTION))
    torch.manual_seed(0)
    ours = StripedHyena2ForCausalLM(read_vortex_config(config)).eval()
    weights = stirred_weights(ours)
    del weights["unembed.weight"]  # tied
    ours.load_state_dict(weights)
    return ours, build_reference(DESCRIPTION, weights)


@torch.inference_mode()
def run_to_last_block(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Run a model, leave out the final norm and the logits.

    Args:
        model: Either one.
        input_ids: int64, shape ``(B, L)``.

    Returns:
        The residual stream after the last block, shape ``(B, L, D)``.
    """
    with capture(model, [LAST]) as outputs:
        model(input_ids)
    return outputs[LAST]


def run_both_ways(model: nn.Module, input_ids: Tensor) -> None:
    """Run a forward pass to the last block and its backward pass.

    Args:
        model: Ours.
        input_ids: int64, shape ``(B, L)``.
    """
    with capture(model, [LAST]) as outputs:
        model(input_ids)
    outputs[LAST].float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def saved_bytes_per_token(model: nn.Module, length: int = 256) -> float:
    """Count what a backward pass must keep.

    Args:
        model: Ours.
        length: Tokens to try it with.

    Returns:
        Bytes a token.
    """
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(random_dna(1, length)).logits
    total = sum(size for place, size in storages.items() if place not in weights)
    del output
    return total / length


def reference_bytes(batch: int, length: int, dtype: str) -> float:
    """Estimate the reference's peak memory, from what its code keeps at a time.

    Args:
        batch: Rows.
        length: Tokens of a row.
        dtype: Of the run.

    Returns:
        Bytes.
    """
    width, inner, states = (DESCRIPTION[key] for key in ("hidden_size", "inner_mlp_size", "state_size"))
    item = 4 if dtype == "float32" else 2
    modal_filter = 3 * width * states * length * 4
    spectra = batch * width * 2 * length * 8 * 4
    activations = batch * length * (3 * inner + 16 * width) * item
    return modal_filter + spectra + activations


class Comparison:
    """Runs one shape after the other and keeps what was found.

    Args:
        ours: Model in float32.
        reference: Model in float32.
        options: Of the command line.
    """

    def __init__(self, ours: nn.Module, reference: nn.Module, options: object) -> None:
        self.ours, self.reference, self.options = ours, reference, options
        self.truth: dict[tuple[int, int], Tensor] = {}
        self.s_per_token: float | None = None
        self.figures: list[Figure] = []
        self.forward: list[dict[str, object]] = []
        self.backward: list[dict[str, object]] = []
        self.agreement: list[dict[str, object]] = []
        self.remarks: list[str] = []

    def use_dtype(self, dtype: str) -> None:
        """Cast both models as each is run in this type; call it with float32 first.

        Args:
            dtype: ``float32`` or ``bfloat16``.
        """
        self.ours.to(getattr(torch, dtype))
        cast_reference(self.reference, getattr(torch, dtype))
        self.s_per_token = None

    def compare(self, dtype: str, batch: int, length: int) -> None:
        """Time the forward passes of both, compare what they return, and time our backward pass.

        Args:
            dtype: Type in use.
            batch: Rows.
            length: Tokens of a row.
        """
        label = f"{dtype} {batch} x {length}"
        input_ids = random_dna(batch, length)
        outputs: dict[str, Tensor] = {}
        actions = {"ours": lambda: outputs.update(ours=run_to_last_block(self.ours, input_ids))}
        reason = self._reason_to_skip(dtype, batch, length)
        if reason:
            self.remarks.append(f"{label}: the reference was left out, {reason}")
        else:
            actions["vortex"] = lambda: outputs.update(vortex=run_to_last_block(self.reference, input_ids))
        samples = interleave(actions, rounds=self.options.rounds, budget_s=self.options.budget_s)
        for name, found in samples.items():
            tokens_per_s = batch * length / spread(found)["seconds"]
            row = {"dtype": dtype, "batch": batch, "length": length, "what": name}
            self.forward.append({**row, "tokens_per_s": round(tokens_per_s), **spread(found)})
        if "vortex" in samples:
            self.s_per_token = spread(samples["vortex"])["seconds"] / (batch * length)
            goal = GOALS.get((dtype, length), NEVER_SLOWER)
            self.figures.append(
                ratio(f"vortex over ours, {label}", samples["vortex"], samples["ours"], at_least=goal)
            )
        self._check(label, dtype, (batch, length), outputs)

    def _reason_to_skip(self, dtype: str, batch: int, length: int) -> str:
        expected_s = (self.s_per_token or 0.0) * batch * length
        if expected_s > self.options.max_run_s:
            return f"a run would take about {expected_s:.0f} s, over --max-run-s {self.options.max_run_s:.0f}"
        needed, there = reference_bytes(batch, length, dtype), available_bytes()
        if needed > 0.8 * there:
            return f"it would need about {needed / GIB:.0f} GiB of {there / GIB:.0f} GiB available"
        return ""

    def _check(self, label: str, dtype: str, shape: tuple[int, int], outputs: dict[str, Tensor]) -> None:
        """Compare results: a wrong answer has no speed."""
        ours = outputs["ours"].float()
        theirs = outputs["vortex"].float() if "vortex" in outputs else None
        row: dict[str, object] = {"shape": label, "rms of values": rms(ours)}
        measure = None
        if dtype == "float32":
            self.truth[shape] = ours if theirs is None else theirs
            if theirs is not None:
                row |= {"largest difference": float((ours - theirs).abs().max())}
                measure = rms(ours - theirs) / rms(theirs)
        elif shape in self.truth and theirs is not None:
            truth = self.truth[shape]
            row |= {"our rms error": rms(ours - truth), "its rms error": rms(theirs - truth)}
            measure = rms(ours - truth) / rms(theirs - truth)
        if measure is not None:
            name = "rms difference" if dtype == "float32" else "our rms error over the reference's"
            self.figures.append(Figure(name=f"{name}, {label}", value=measure, at_most=LARGEST_RMS[dtype]))
        self.agreement.append(row)

    def time_backward(self, dtype: str, batch: int, length: int) -> None:
        """Time our forward and backward pass together.

        Args:
            dtype: Type in use.
            batch: Rows.
            length: Tokens of a row.
        """
        needed = saved_bytes_per_token(self.ours) * batch * length
        if needed > 0.6 * available_bytes():
            label = f"{dtype} {batch} x {length}"
            self.remarks.append(
                f"{label}: our backward pass was left out, it would keep about {needed / GIB:.0f} GiB"
            )
            return
        input_ids = random_dna(batch, length)
        samples = interleave(
            {
                "forward": lambda: run_to_last_block(self.ours, input_ids),
                "forward and backward": lambda: run_both_ways(self.ours, input_ids),
            },
            rounds=self.options.rounds,
            budget_s=self.options.budget_s,
        )
        for name, found in samples.items():
            tokens_per_s = batch * length / spread(found)["seconds"]
            row = {"dtype": dtype, "batch": batch, "length": length, "what": name}
            self.backward.append({**row, "tokens_per_s": round(tokens_per_s), **spread(found)})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes the process's own.
    """
    parser = option_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--max-run-s", type=float, default=300, help="leave out a longer run of the reference"
    )
    parser.add_argument(
        "--budget-s", type=float, default=600, help="of the rounds of one shape, two at least"
    )
    parser.add_argument("--no-backward", action="store_true")
    options = parser.parse_args(arguments)
    if not HAS_VTX:
        parser.error("vtx is not installed: pip install --no-deps vtx einops tqdm")
    if options.quick:
        options.lengths, options.batches, options.rounds = [256, 1024], [1], 2
    if options.results is not None:
        options.results = options.results.resolve()
    use_threads(options.threads)
    started = time.perf_counter()
    comparison = Comparison(*build_pair(), options)
    for dtype in sorted(options.dtypes, reverse=True):  # float32 first: it is what bfloat16 is held against
        comparison.use_dtype(dtype)
        for length in options.lengths:
            for batch in options.batches:
                comparison.compare(dtype, batch, length)
                if not options.no_backward:
                    comparison.time_backward(dtype, batch, length)
    parameters = sum(parameter.numel() for parameter in comparison.ours.parameters())
    remarks = [
        f"{parameters / 1e6:.1f} M random weights, hidden 512, 11 blocks (2 attention, 3 of each filter).",
        "Reference: vtx as it is, its own attention, FP8 off, three stand-ins for CUDA-only parts; bfloat16 "
        "in its own mixed layout (poles and residues float32).",
        *comparison.remarks,
        f"The whole run took {time.perf_counter() - started:.0f} s.",
    ]
    file_results(
        "speed_vortex",
        "StripedHyena 2 against Vortex",
        options,
        figures=comparison.figures,
        tables={
            "Forward to the last block": comparison.forward,
            "Ours with its backward pass": comparison.backward,
            "Agreement": comparison.agreement,
        },
        remarks=remarks,
        packages=("vtx",),
    )


if __name__ == "__main__":
    main()
