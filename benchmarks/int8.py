"""Whether 8-bit integers make the linear layers of a CPU faster: products alone, then whole forward passes.

Weights are rounded per output channel, activations as they come: per tensor by PyTorch's own dynamic layers
(FBGEMM, oneDNN), per token around ``torch._int_mm``. Beside each stand float32 and bfloat16, by turns. The
whole pass replaces every linear layer of the bundled model, and of a wider one of random weights, and says
how far its vectors are from those of float32. Worth an option of its own is a whole pass that is 1.3 times as
fast as bfloat16::

    python benchmarks/int8.py --threads 1
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from measuring import (
    Figure,
    file_results,
    interleave,
    option_parser,
    random_dna,
    ratio,
    rms,
    spread,
    use_threads,
)
from torch import nn

from genoembed import StripedHyena2Config, StripedHyena2Model, load_model
from genoembed.models.layers import capture

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

TOKENS = 2048
LEAST_SPEEDUP = 1.3
WIDTHS = (512, 1024, 4096)
LAYER = "blocks.{}.mlp.l3"


class PackedLinear(nn.Module):
    """A linear layer of PyTorch's dynamic quantization: activations are rounded per tensor.

    Args:
        linear: What it stands for.
        engine: ``fbgemm`` or ``onednn``.
    """

    def __init__(self, linear: nn.Linear, engine: str) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        rounded = torch.quantize_per_channel(weight, scales.double(), zeros, axis=0, dtype=torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach().float()
        torch.backends.quantized.engine = engine
        self.engine = engine
        self.packed = torch.ops.quantized.linear_prepack(rounded, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        torch.backends.quantized.engine = self.engine
        # FBGEMM's sums overflow in 16 bits without VNNI, unless the range is halved
        return torch.ops.quantized.linear_dynamic(x.float(), self.packed, reduce_range=False).to(x.dtype)


class IntegerLinear(nn.Module):
    """A linear layer around ``torch._int_mm``: activations are rounded per token.

    Args:
        linear: What it stands for.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_NK = linear.weight.detach().float()
        self.scale_N = weight_NK.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.weight_KN = (weight_NK / self.scale_N[:, None]).round().to(torch.int8).t()
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        x_TK = x.flatten(0, -2).float()
        scale_T1 = x_TK.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        sums_TN = torch._int_mm((x_TK / scale_T1).round().to(torch.int8), self.weight_KN)
        y_TN = sums_TN.float() * scale_T1 * self.scale_N
        y_TN = y_TN if self.bias is None else y_TN + self.bias
        return y_TN.unflatten(0, x.shape[:-1]).to(x.dtype)


FORMS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "int8, FBGEMM": partial(PackedLinear, engine="fbgemm"),
    "int8, oneDNN": partial(PackedLinear, engine="onednn"),
    "int8, torch._int_mm": IntegerLinear,
}


def compare_products(
    inputs: int, outputs: int, *, rounds: int, tokens: int
) -> tuple[list[Figure], list[dict]]:
    """Time one linear layer in each form.

    Args:
        inputs: Of the layer.
        outputs: Of the layer.
        rounds: Interleaved.
        tokens: Rows.

    Returns:
        Ratios of bfloat16 to each form, and rows of the table.
    """
    torch.manual_seed(inputs + outputs)
    linear = nn.Linear(inputs, outputs, bias=False)
    x_TK = torch.randn(tokens, inputs)
    half, x_half = linear.weight.detach().bfloat16(), x_TK.bfloat16()
    actions = {"float32": lambda: F.linear(x_TK, linear.weight), "bfloat16": lambda: F.linear(x_half, half)}
    layers = {form: build(linear) for form, build in FORMS.items()}
    actions |= {form: partial(layer, x_TK) for form, layer in layers.items()}
    with torch.inference_mode():
        exact = F.linear(x_TK.double(), linear.weight.double())
        errors = {name: rms(action().double() - exact) / rms(exact) for name, action in actions.items()}
        samples = interleave(actions, rounds=rounds)
    label = f"{inputs} to {outputs}"
    figures = [ratio(f"bfloat16 over {form}, {label}", samples["bfloat16"], samples[form]) for form in FORMS]
    operations = 2 * tokens * inputs * outputs
    rows = [
        {
            "layer": label,
            "form": name,
            "ms": 1e3 * spread(taken)["seconds"],
            "CPU ms": 1e3 * spread(taken)["cpu_seconds"],
            "GOP/s": operations / spread(taken)["cpu_seconds"] / 1e9,
            "relative error": errors[name],
        }
        for name, taken in samples.items()
    ]
    return figures, rows


def replace_linears(model: nn.Module, build: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Copy a model with other linear layers.

    Args:
        model: Left as it is.
        build: Makes one of each.

    Returns:
        The copy.
    """
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, build(module))
    return model


@torch.inference_mode()
def vectors(model: nn.Module, ids_BL: Tensor, layer: str) -> Tensor:
    """Embed rows: the mean of a layer over the tokens.

    Args:
        model: Any form of it.
        ids_BL: int64.
        layer: Path of a module that is in every form, a replaced layer too.

    Returns:
        float32, one vector a row.
    """
    with capture(model, [layer]) as found:
        model(ids_BL)
    return found[layer].float().mean(dim=1)


def moved_by_neighbor(model: nn.Module, ids_BL: Tensor, layer: str) -> float:
    """Measure how far a vector moves where another row is in the batch, relative to its largest value.

    Args:
        model: Any form of it.
        ids_BL: int64; a part of the row is taken.
        layer: Path of a module.

    Returns:
        The largest difference. Promised is 1e-5 in float32, 1e-2 in bfloat16.
    """
    row_1L = ids_BL[:1, :256]
    alone, beside = (
        vectors(model, row_1L, layer),
        vectors(model, torch.cat((row_1L, row_1L.clamp(max=65))), layer),
    )
    return float((beside[:1] - alone).abs().max() / alone.abs().max())


def compare_passes(
    name: str, model: nn.Module, *, rounds: int, tokens: int
) -> tuple[list[Figure], list[dict]]:
    """Time whole passes to the last block but three, as ``--layer 28`` of 32 runs them.

    Args:
        name: Of the model.
        model: In float32.
        rounds: Interleaved.
        tokens: Of the row.

    Returns:
        Figures, with the goal, and rows of the table.
    """
    layer = LAYER.format(max(0, len(model.blocks) - 4))
    models = {"float32": model, "bfloat16": copy.deepcopy(model).to(torch.bfloat16)}
    replaced = {
        f"{form}, {dtype} between": replace_linears(models[dtype], build)
        for dtype in ("float32", "bfloat16")
        for form, build in FORMS.items()
    }
    models |= replaced
    ids_BL = random_dna(1, tokens)
    actions = {form: partial(vectors, each, ids_BL, layer) for form, each in models.items()}
    exact = actions["float32"]()
    center = exact.mean()
    errors = {form: rms(action() - exact) / rms(exact - center) for form, action in actions.items()}
    moved = {form: moved_by_neighbor(each, ids_BL, layer) for form, each in models.items()}
    samples = interleave(actions, rounds=rounds)
    figures = [
        ratio(f"{name}: bfloat16 over {form}", samples["bfloat16"], samples[form], at_least=LEAST_SPEEDUP)
        for form in replaced
    ]
    rows = [
        {
            "model": name,
            "form": form,
            "ms": 1e3 * spread(taken)["seconds"],
            "CPU ms": 1e3 * spread(taken)["cpu_seconds"],
            "relative error of the vector": errors[form],
            "moved by its batch": moved[form],
        }
        for form, taken in samples.items()
    ]
    return figures, rows


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = option_parser(__doc__)
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    warnings.filterwarnings("ignore", message="torch.ao.quantization|.*quantize", category=UserWarning)
    tokens, widths = (64, (64,)) if options.quick else (TOKENS, WIDTHS)
    config = load_model(device="cpu", dtype="float32").network.config
    narrow = [(config.hidden_size, config.hidden_size)]
    narrow += [(config.hidden_size, config.intermediate_size), (config.intermediate_size, config.hidden_size)]
    figures, products, passes = [], [], []
    for inputs, outputs in [*narrow, *((width, width) for width in widths)]:
        rounds = options.rounds if inputs > 2000 or options.quick else 5 * options.rounds
        more, rows = compare_products(inputs, outputs, rounds=rounds, tokens=tokens)
        figures += more
        products += rows
    torch.manual_seed(0)
    wide = (
        {"hidden_size": 64, "intermediate_size": 96}
        if options.quick
        else {"hidden_size": 512, "intermediate_size": 1408}
    )
    models = {
        "bundled model": load_model(device="cpu", dtype="float32").module,
        f"hidden {wide['hidden_size']}, random weights": StripedHyena2Model(
            StripedHyena2Config(
                **wide,
                num_attention_heads=max(2, wide["hidden_size"] // 64),
                num_hidden_layers=7,
                attn_layer_idxs=[3],
                hcs_layer_idxs=[0, 4],
                hcm_layer_idxs=[1, 5],
                hcl_layer_idxs=[2, 6],
            )
        ).eval(),
    }
    for name, model in models.items():
        more, rows = compare_passes(name, model, rounds=options.rounds, tokens=tokens)
        figures += more
        passes += rows
    file_results(
        "int8",
        "Linear layers in 8-bit integers on a CPU",
        options,
        figures=figures,
        tables={
            f"One linear layer, {tokens:,} tokens": products,
            f"A pass of one row of {tokens:,} tokens": passes,
        },
        remarks=[
            "int8: weights rounded per output channel; activations per tensor (FBGEMM, oneDNN), or per token "
            "(torch._int_mm). The products of float32 and int8 take and give float32, those of "
            "bfloat16 bfloat16; in whole passes, `between` is the type of everything else.",
            "Error of a vector: rms over that of the vector less its mean. Moved by its batch: largest "
            "difference between 256 bases alone and beside a row of A, over the largest value; genoembed "
            "promises 1e-2 in bfloat16 and 1e-5 in float32.",
            f"An option would need a whole pass {LEAST_SPEEDUP} times as fast as bfloat16.",
        ],
    )


if __name__ == "__main__":
    main()
