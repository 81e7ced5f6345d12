"""How near a forward pass comes to the time of its own matrix products.

Three kinds of run alternate: the forward pass to the last block; its products alone (every Linear at its own
shape into memory that is there already, and the attention of its attention blocks); one large square product,
whose speed is the machine's peak. The limit is the floating-point operations of projections, MLP and causal
attention at that peak. What the filters need comes on top and is listed separately: as a direct sum, and as
executed where torch can count it (nothing inside custom operators). For the bundled model the bytes that have
to move stand beside it, at the measured speed of a large copy::

    python benchmarks/speed_limit.py
    python benchmarks/speed_limit.py --parts mini --dtypes bfloat16
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from measuring import Figure, file_results, interleave, option_parser, random_dna, spread, use_threads
from speed_vortex import DESCRIPTION
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from genoembed import StripedHyena2Config, StripedHyena2Model, load_model
from genoembed.models.layers import capture
from genoembed.models.registry import find_model
from genoembed.models.striped_hyena2.convert import vortex_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from measuring import Sample
    from torch import Tensor

KINDS = {"attention": "attn", "hcs": "hcs", "hcm": "hcm", "hcl": "hcl"}
SQUARE = 4096
COPIED_BYTES = 1 << 28
GOALS = {("hidden 512", "bfloat16"): 0.60, ("hidden 4096", "bfloat16"): 0.75, ("mini", "bfloat16"): 0.35}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a forward pass to the last block has to do, in floating-point operations and bytes."""

    linear: float
    attention: float
    """Scores and mixing, the causal half only."""
    filters: float
    """Short filters, inner filters as direct sums, long ones by their recurrence."""
    moved_bytes: float
    """Weights once; what lies between two products, written once and read once."""


def count_work(config: StripedHyena2Config, batch: int, length: int, item_bytes: int) -> Work:
    """Count from the configuration, whatever the implementation does.

    Args:
        config: Shape of the model.
        batch: Rows.
        length: Tokens of a row.
        item_bytes: Of an activation.

    Returns:
        The work of all blocks.
    """
    tokens, width, inner = batch * length, config.hidden_size, config.intermediate_size
    per_block = 3 * width * width + width * width + 3 * width * inner
    taps = {
        "hcs": config.hcs_filter_length,
        "hcm": config.hcm_filter_length + 1,
        "hcl": 2 * config.state_size + 1,
    }
    kinds = [config.block_kind(index) for index in range(config.num_hidden_layers)]
    hyena = [kind for kind in kinds if kind != "attention"]
    num_attention = len(kinds) - len(hyena)
    per_token = sum(2 * taps[kind] * width for kind in hyena)
    per_token += len(hyena) * (2 * 3 * width * config.short_filter_length + 2 * width)
    return Work(
        linear=2.0 * tokens * per_block * len(kinds),
        attention=2.0 * batch * length * length * width * num_attention,
        filters=float(tokens * per_token),
        moved_bytes=len(kinds) * item_bytes * (per_block + tokens * (18.0 * width + 6.0 * inner)),
    )


def counted_filter_flops(forward: Callable[[], object]) -> float:
    """Count what the filters execute, as far as it runs through torch's own products.

    Args:
        forward: Runs the model once.

    Returns:
        Floating-point operations of batched products and convolutions; Linears and attention left out.
    """
    with FlopCounterMode(display=False) as counter:
        forward()
    by_operator = counter.get_flop_counts().get("Global", {})
    return float(
        sum(
            flops
            for operator, flops in by_operator.items()
            if any(word in str(operator) for word in ("bmm", "convolution"))
        )
    )


class Products:
    """The products of a model alone: every Linear once, and the attention of its attention blocks.

    Args:
        model: Gives the shapes.
        batch: Rows.
        length: Tokens of a row.
        dtype: Of weights and activations.
    """

    def __init__(self, model: nn.Module, batch: int, length: int, dtype: torch.dtype) -> None:
        tokens, config = batch * length, model.config
        self.weights = [
            module.weight.detach() for module in model.blocks.modules() if isinstance(module, nn.Linear)
        ]
        sizes = {size for weight in self.weights for size in weight.shape}
        self.inputs = {size: torch.randn(tokens, size).to(dtype) for size in sizes}
        self.outputs = {size: torch.empty(tokens, size, dtype=dtype) for size in sizes}
        head_size = config.hidden_size // config.num_attention_heads
        shape = (3, batch, config.num_attention_heads, length, head_size)
        self.num_attention = len(config.attn_layer_idxs)
        self.heads = torch.randn(shape if self.num_attention else (3, 1, 1, 1, 1)).to(dtype).unbind()

    @torch.inference_mode()
    def run_linears(self) -> None:
        """Multiply by every weight."""
        for weight in self.weights:
            torch.mm(self.inputs[weight.shape[1]], weight.t(), out=self.outputs[weight.shape[0]])

    @torch.inference_mode()
    def run_attention(self) -> None:
        """Attend as often as there are attention blocks."""
        for _ in range(self.num_attention):
            F.scaled_dot_product_attention(*self.heads, is_causal=True)


@torch.inference_mode()
def run_forward(model: nn.Module, input_ids: Tensor, last: str) -> None:
    """Run a model to its last block.

    Args:
        model: A StripedHyena 2 model.
        input_ids: int64, shape ``(B, L)``.
        last: Path of the last block.
    """
    with capture(model, [last]):
        model(input_ids)


class Report:
    """Collects rows and figures, case by case.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: object) -> None:
        self.options = options
        self.figures: list[Figure] = []
        self.rows: list[dict[str, object]] = []
        self.bytes_rows: list[dict[str, object]] = []

    def measure(
        self, group: str, name: str, model: nn.Module, dtype: str, *, batch: int, length: int
    ) -> None:
        """Time one model.

        Args:
            group: Which goal it is held against.
            name: What the rows say.
            model: In ``dtype`` already.
            dtype: ``float32`` or ``bfloat16``.
            batch: Rows.
            length: Tokens of a row.
        """
        chosen = getattr(torch, dtype)
        input_ids = random_dna(batch, length)
        last = f"blocks.{model.config.num_hidden_layers - 1}"
        products = Products(model, batch, length, chosen)
        left, right = (torch.randn(SQUARE, SQUARE).to(chosen) for _ in range(2))
        product = torch.empty_like(left)
        source, target = (torch.ones(COPIED_BYTES, dtype=torch.uint8) for _ in range(2))
        samples = interleave(
            {
                "forward": lambda: run_forward(model, input_ids, last),
                "linears": products.run_linears,
                "attention": products.run_attention,
                "square": lambda: torch.mm(left, right, out=product),
                "copy": lambda: target.copy_(source),
            },
            rounds=self.options.rounds,
            budget_s=self.options.budget_s,
        )
        work = count_work(model.config, batch, length, item_bytes=left.element_size())
        counted = counted_filter_flops(lambda: run_forward(model, input_ids, last))
        label = f"{name}, {dtype}, {batch} x {length}"
        self._add(group, label, dtype, samples, work, counted, tokens=batch * length)

    def _add(
        self,
        group: str,
        label: str,
        dtype: str,
        samples: dict[str, list[Sample]],
        work: Work,
        counted: float,
        *,
        tokens: int,
    ) -> None:
        square_flops = 2.0 * SQUARE**3
        limits = [(work.linear + work.attention) / square_flops * s.seconds for s in samples["square"]]
        own = [a.seconds + b.seconds for a, b in zip(samples["linears"], samples["attention"], strict=True)]
        moving = [work.moved_bytes / (2 * COPIED_BYTES) * sample.seconds for sample in samples["copy"]]
        goal = GOALS.get((group, dtype))
        self._share(f"limit at peak over forward, {label}", limits, samples["forward"], goal)
        self._share(f"own products over forward, {label}", own, samples["forward"])
        seconds = {name: spread(found)["seconds"] for name, found in samples.items()}
        self.rows.append(
            {
                "case": label,
                "tokens_per_s": round(tokens / seconds["forward"]),
                "forward s": seconds["forward"],
                "linears alone s": seconds["linears"],
                "attention alone s": seconds["attention"],
                "peak GFLOP/s": square_flops / seconds["square"] / 1e9,
                "linear GFLOP": work.linear / 1e9,
                "attention GFLOP": work.attention / 1e9,
                "filters GFLOP, direct": work.filters / 1e9,
                "filters GFLOP, counted": counted / 1e9,
                "others": spread(samples["forward"])["others"],
            }
        )
        if group == "mini":
            self._share(f"time of the bytes over forward, {label}", moving, samples["forward"])
            self.bytes_rows.append(
                {
                    "case": label,
                    "GB that must move": work.moved_bytes / 1e9,
                    "copy GB/s": 2 * COPIED_BYTES / seconds["copy"] / 1e9,
                    "s for the bytes": work.moved_bytes / (2 * COPIED_BYTES) * seconds["copy"],
                    "forward s": seconds["forward"],
                }
            )

    def _share(
        self, name: str, parts: list[float], forward: list[Sample], at_least: float | None = None
    ) -> None:
        shares = sorted(part / sample.seconds for part, sample in zip(parts, forward, strict=True))
        middle = (shares[(len(shares) - 1) // 2] + shares[len(shares) // 2]) / 2
        self.figures.append(
            Figure(name=name, value=middle, low=shares[0], high=shares[-1], at_least=at_least)
        )


def build_512() -> StripedHyena2Model:
    """Build the model of the comparison with Vortex.

    Returns:
        Random weights, float32.
    """
    torch.manual_seed(0)
    return StripedHyena2Model(StripedHyena2Config(**vortex_arguments(DESCRIPTION))).eval()


def build_block(kind: str) -> StripedHyena2Model:
    """Build a model of one block of Evo 2 7B's width; being block 0, it has an activation in its MLP.

    Args:
        kind: ``attention``, ``hcs``, ``hcm`` or ``hcl``.

    Returns:
        Random weights, bfloat16.
    """
    shape = {
        key: value
        for key, value in find_model("evo2_7b").config.items()
        if not key.endswith("_layer_idxs") and key != "num_hidden_layers"
    }
    lists = {f"{KINDS[kind]}_layer_idxs": [0]}
    torch.manual_seed(0)
    model = StripedHyena2Model(StripedHyena2Config(**shape, **lists, num_hidden_layers=1))
    return model.eval().to(torch.bfloat16)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes the process's own.
    """
    parser = option_parser(__doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=("512", "4096", "mini"), default=["512", "4096", "mini"]
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--block-length", type=int, default=2048, help="tokens of the blocks at hidden 4096")
    parser.add_argument("--budget-s", type=float, default=120, help="of the rounds of one case, two at least")
    options = parser.parse_args(arguments)
    if options.quick:
        options.length, options.block_length, options.rounds = 1024, 128, 2
    use_threads(options.threads)
    report = Report(options)
    for dtype in options.dtypes:
        chosen = getattr(torch, dtype)
        if "512" in options.parts:
            model = build_512().to(chosen)
            report.measure(
                "hidden 512", "hidden 512, 11 blocks", model, dtype, batch=1, length=options.length
            )
        if "mini" in options.parts:
            model = load_model(device="cpu", dtype=dtype).module
            report.measure("mini", "bundled model", model, dtype, batch=1, length=options.length)
    if "4096" in options.parts:
        for kind in KINDS:
            model = build_block(kind)
            name = f"hidden 4096, one {kind} block"
            report.measure("hidden 4096", name, model, "bfloat16", batch=1, length=options.block_length)
            del model
    file_results(
        "speed_limit",
        "Forward passes against their own matrix products",
        options,
        figures=report.figures,
        tables={"Work and time": report.rows, "Bytes of the bundled model": report.bytes_rows},
        remarks=[
            f"Peak: a {SQUARE} x {SQUARE} x {SQUARE} product in the same dtype, in the same rounds.",
            "Linears alone write into memory that is there already; a forward pass has to get its own.",
            "Bytes: weights once; what lies between products, or norm and product, written and read once.",
            "Filters, direct: 2 operations a tap and channel; long filters by their recurrence of 16 states.",
        ],
    )


if __name__ == "__main__":
    main()
