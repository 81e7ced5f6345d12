"""Matrix products as the FP8 tensor cores of NVIDIA Hopper compute them, on any device.

In: activations, weights, and the two fixed scales of a checkpoint. Out: the product in bfloat16, as
Transformer Engine returns it on Hopper. Promised: all forms of the emulation (PyTorch, numba on CPUs, Triton
on GPUs) equal exact integer arithmetic bit for bit, and a row does not depend on the rows beside it.

Evo 2's 1B, 20B and 40B checkpoints were trained with such input projections and give other numbers without
them. What makes them special is less the eight bits than the sum:

1. The weights are rounded to bfloat16. Weights and activations, times their scales in float32 and clamped to
   448, are rounded to E4M3: a sign, an exponent of -6 to 8 and a significand of four bits (with exponent -6
   also one below 1). NaN stays NaN, infinity becomes 448.
2. The inputs are taken in groups of 32. The products of a group and the sum so far are aligned to the largest
   of their exponents, where the exponent of a product is the sum of its factors' (products lie in [1, 4): two
   integer bits) and zeros have none. What each holds below 13 fractional bits is cut off, toward zero. They
   are added exactly, and of the normalized result 13 fractional bits are kept, again toward zero.
3. The last sum is multiplied in float32 with the reciprocals of both scales and rounded to bfloat16.

To multiply dequantized values with float32 sums does not give these numbers. The model of the sum is that of
Khattak and Mikaitis (arXiv 2512.07004) and Xie et al. (arXiv 2511.10909), who measured the hardware.

T rows, K inputs, N outputs, G groups of 32 inputs.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from genoembed.errors import MissingExtraError, ModelError
from genoembed.models.precision import without_autocast

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_LOG = logging.getLogger(__name__)

Fp8Form: TypeAlias = Literal["native", "emulated", "off"]
"""How a projection runs: in hardware, in software with the same result, or as an ordinary product."""

EmulationForm: TypeAlias = Literal["torch", "numba", "triton"]
"""What computes the emulation."""

GROUP = 32
"""Inputs that the hardware adds at once."""
LARGEST = 448.0
"""Largest number of E4M3."""
_FRACTION_BITS = 13
_HOPPER = 9
"""Compute capability of the GPUs whose FP8 sums are emulated."""
_CUT_BITS = 23 - _FRACTION_BITS
"""Low bits of a float32 that a sum does not keep."""
NO_EXPONENT = -64
"""Exponent of zeros: less than that of any product, even beside the largest number."""
_BIAS = 127
"""Added to the exponent in a float32."""
_LOWEST, _HIGHEST = -6, 8
"""Exponents of E4M3."""
_CPU_ELEMENTS, _DEVICE_ELEMENTS = 1 << 18, 1 << 25
"""Products that the PyTorch form holds at a time, for each thread of a CPU and on another device."""


def fp8_linear(x: Tensor, weight_NK: Tensor, scales: Tensor, *, is_native: bool) -> Tensor:
    """Multiply activations with weights in FP8.

    Gradients pass straight through: they are those of the product without rounding, as Transformer Engine's
    are but for the rounding of the gradients themselves. The scales stay as they are.

    Args:
        x: Activations. Floating, shape ``(..., K)``.
        weight_NK: Weights.
        scales: What activations and weights are multiplied with. float32, shape ``(2,)``.
        is_native: Let GPUs multiply that have these sums in hardware, and emulate them elsewhere.

    Returns:
        bfloat16, shape ``(..., N)``.
    """
    x_TK = x.flatten(0, -2)
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight_NK.requires_grad)
    multiply = _StraightThrough.apply if needs_gradient else _product
    product_TN: Tensor = multiply(x_TK, weight_NK, scales, is_native)
    return product_TN.unflatten(0, x.shape[:-1])


class _StraightThrough(torch.autograd.Function):
    """The product forward; backward that of an ordinary linear layer."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, scales: Tensor, is_native: bool) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        return _product(x_TK, weight_NK, scales, is_native)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weight_NK = ctx.saved_tensors
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (gradient_TN @ weight_NK.to(gradient_TN.dtype)).to(x_TK.dtype)
        if ctx.needs_input_grad[1]:
            weight_gradient = (gradient_TN.t() @ x_TK.to(gradient_TN.dtype)).to(weight_NK.dtype)
        return x_gradient, weight_gradient, None, None


def _product(x_TK: Tensor, weight_NK: Tensor, scales: Tensor, is_native: bool) -> Tensor:
    if is_native and has_hopper_sums(x_TK.device):
        return _multiply_natively(x_TK, weight_NK, scales)
    return emulate_product(x_TK, weight_NK, scales)


def has_hopper_sums(device: torch.device) -> bool:
    """Check whether a device has the tensor cores that are emulated elsewhere: later ones add otherwise."""
    return device.type == "cuda" and torch.version.hip is None and _capability(device) == _HOPPER


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _multiply_natively(x_TK: Tensor, weight_NK: Tensor, scales: Tensor) -> Tensor:
    """Multiply with the tensor cores of Hopper, summing as Transformer Engine lets them in forward passes."""
    inverse = scales.float().reciprocal()
    product_TN = torch._scaled_mm(
        _encode(x_TK, scales[0]),
        _encode(weight_NK, scales[1]).t(),  # the second factor must lie in memory column by column
        scale_a=inverse[0],
        scale_b=inverse[1],
        out_dtype=torch.bfloat16,
        # Without it, sums are moved to float32 registers now and then, and are less cut off: in backward
        # passes only.
        use_fast_accum=True,
    )
    return product_TN[: x_TK.shape[0], : weight_NK.shape[0]]


def _encode(x_RK: Tensor, scale: Tensor) -> Tensor:
    """Round scaled values to E4M3, with zeros up to the multiples of 16 that the hardware takes."""
    num_rows, num_inputs = x_RK.shape
    if num_rows % 16 or num_inputs % 16:
        x_RK = F.pad(x_RK, (0, -num_inputs % 16, 0, -num_rows % 16))
    x_RK = x_RK.to(torch.bfloat16).float().mul_(scale)
    return x_RK.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def emulation_form(device: torch.device) -> EmulationForm:
    """Choose the fastest form of the emulation that runs on a device."""
    if device.type == "cpu" and _numba_sums() is not None:
        return "numba"
    if device.type == "cuda" and _triton_works(device):
        return "triton"
    return "torch"


@cache
def _numba_sums() -> Callable[..., Any] | None:
    """Return the sums that numba compiles; None where it is not installed, or not for this NumPy."""
    try:
        from genoembed.models.striped_hyena2.fp8_numba import sum_products
    except ImportError:
        return None
    return sum_products


@cache
def _triton_sums() -> Callable[..., Tensor] | None:
    """Return the sums that Triton compiles; None where it is not installed."""
    from genoembed.models.striped_hyena2.fp8_triton import IS_INSTALLED, sum_on_gpu

    return sum_on_gpu if IS_INSTALLED else None


@cache
def _triton_works(device: torch.device) -> bool:
    """Check, once, that Triton compiles for a device and that its sums are those of PyTorch.

    It needs a C compiler, which is often missing, and drivers for its version.
    """
    if _triton_sums() is None:
        return False
    generator = torch.Generator().manual_seed(0)
    # three groups, the last one in part, and tiles in part
    x_TK, weight_NK = (torch.randn(size, 70, generator=generator).to(device) for size in (11, 37))
    scale = torch.tensor(40.0, device=device)
    left_TK = round_to_e4m3(x_TK, scale)
    try:
        sums_TN = _sum_with_triton(left_TK, weight_NK, scale)
        if torch.equal(sums_TN, _sum_in_torch(left_TK, weight_NK, scale)):
            return True
    except torch.OutOfMemoryError:  # says nothing about Triton
        raise
    except Exception as error:  # noqa: BLE001 - whatever Triton lacks, PyTorch gives the same numbers
        _LOG.debug("Triton fails on %s", device, exc_info=True)
        reason = f"fails: {type(error).__name__}: {error}".splitlines()[0]
    else:
        reason = "gives other sums"
    _LOG.warning("FP8 is emulated by PyTorch, which takes longer, for Triton %s", reason)
    return False


def emulate_product(
    x_TK: Tensor, weight_NK: Tensor, scales: Tensor, *, form: EmulationForm | None = None
) -> Tensor:
    """Multiply as Hopper's tensor cores do.

    Args:
        x_TK: Activations, rounded to bfloat16 before anything else.
        weight_NK: Weights, rounded to bfloat16 before anything else.
        scales: What activations and weights are multiplied with. float32, shape ``(2,)``.
        form: What computes; None takes the fastest that there is. All give the same bits.

    Returns:
        bfloat16, shape ``(T, N)``.

    Example:
        >>> x, scales = torch.tensor([[1.0, 0.5]]), torch.tensor([4.0, 2.0])
        >>> emulate_product(x, torch.tensor([[2.0, 3.0]]), scales)
        tensor([[3.5000]], dtype=torch.bfloat16)
    """
    with without_autocast(x_TK.device):  # also where forms are compared: their sums are float32
        sum_products = _FORMS[form or emulation_form(x_TK.device)]
        sums_TN = sum_products(round_to_e4m3(x_TK, scales[0]), weight_NK, scales[1])
        return (sums_TN * output_scale(scales)).to(torch.bfloat16)


def _sum_in_torch(left_TK: Tensor, weight_NK: Tensor, scale: Tensor) -> Tensor:
    """Add up products in PyTorch, a tile of rows and columns at a time."""
    left_TGK = _grouped(left_TK)
    rows, columns = _tile_shape(left_TGK.device)
    sums_TN = left_TGK.new_empty(left_TGK.shape[0], weight_NK.shape[0])
    for column in range(0, weight_NK.shape[0], columns):
        right_NGK = _grouped(round_to_e4m3(weight_NK[column : column + columns], scale))
        right_GKN = right_NGK.permute(1, 2, 0).contiguous()
        right_powers_GKN = _powers_of_256(right_GKN)
        for row in range(0, left_TGK.shape[0], rows):
            sums_TN[row : row + rows, column : column + columns] = _sum_tile(
                left_TGK[row : row + rows].transpose(0, 1), right_GKN, right_powers_GKN
            )
    return sums_TN


def _sum_with_numba(left_TK: Tensor, weight_NK: Tensor, scale: Tensor) -> Tensor:
    """Add up products in code that numba compiles."""
    sum_products = _numba_sums()
    if sum_products is None:
        raise MissingExtraError(package="numba", extra="fp8", purpose="this form of FP8")
    left_TGK = _grouped(left_TK)
    left_exponents_TGK = exponents(left_TGK).masked_fill_(left_TGK == 0, NO_EXPONENT).to(torch.int8)
    sums = sum_products(
        left_TGK.numpy(),
        left_exponents_TGK.numpy(),
        weight_NK.detach().to(torch.bfloat16).view(torch.int16).numpy(),
        float(scale),
        num_threads=torch.get_num_threads(),
    )
    sums_TN = torch.from_numpy(sums)
    has_nan_T = left_TGK.isnan().flatten(1).any(1)
    if bool(has_nan_T.any()):  # integers do not carry it
        sums_TN[has_nan_T] = torch.nan
    return sums_TN


def _sum_with_triton(left_TK: Tensor, weight_NK: Tensor, scale: Tensor) -> Tensor:
    """Add up products in code that Triton compiles."""
    sum_products = _triton_sums()
    if sum_products is None:
        message = (
            "this form of FP8 needs Triton, which comes with PyTorch for CUDA on Linux; take another form"
        )
        raise ModelError(message)
    sums_TN: Tensor = sum_products(left_TK, weight_NK.to(torch.bfloat16), scale.float())
    return sums_TN


_FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "torch": _sum_in_torch,
    "numba": _sum_with_numba,
    "triton": _sum_with_triton,
}


def output_scale(scales: Tensor) -> Tensor:
    """Return what sums of products are multiplied with: one float32, each step of it rounded."""
    inverse = scales.float().reciprocal()
    return inverse[0] * inverse[1]


def round_to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """Round scaled values to E4M3, ties to even; float32.

    Example:
        >>> round_to_e4m3(torch.tensor([1.0625, 1.1875, -1e9, float("inf")]), torch.tensor(2.0)).tolist()
        [2.0, 2.5, -448.0, 448.0]
    """
    # in arithmetic, for not every device knows torch.float8_e4m3fn
    x = (x.to(torch.bfloat16).float() * scale.float()).clamp_(-LARGEST, LARGEST)
    # four bits of significand: steps of an eighth of the power of two below the value
    step = _power_of_two(exponents(x) - 3)
    return x.div_(step).round_().mul_(step)


def exponents(x: Tensor) -> Tensor:
    """Return the exponents of values of E4M3; those of zero and of small values are the lowest. int32."""
    exponent = (x.view(torch.int32) >> 23).bitwise_and_(0xFF).sub_(_BIAS)
    return exponent.clamp_(_LOWEST, _HIGHEST)  # that of NaN as well, whatever it is


def _power_of_two(exponent: Tensor) -> Tensor:
    """Build float32 powers of two from their bits; exponents of -126 to 127."""
    return (exponent + _BIAS).bitwise_left_shift_(23).view(torch.float32)


def _tile_shape(device: torch.device) -> tuple[int, int]:
    """Return how many rows and columns are computed at a time."""
    if device.type != "cpu":
        return _DEVICE_ELEMENTS // (GROUP * 1024), 1024
    return _CPU_ELEMENTS * torch.get_num_threads() // (GROUP * 256), 256


def _grouped(x_RK: Tensor) -> Tensor:
    """View a matrix as groups of inputs, zeros behind the last one: ``(R, G, 32)``."""
    return F.pad(x_RK, (0, -x_RK.shape[1] % GROUP)).unflatten(1, (-1, GROUP))


def _sum_tile(left_GTK: Tensor, right_GKN: Tensor, right_powers_GKN: Tensor) -> Tensor:
    """Add up the products of a tile, group by group; float32."""
    left_powers_GTK = _powers_of_256(left_GTK)
    num_groups, num_rows, _ = left_GTK.shape
    # the sum so far is one more term of each group
    terms = left_GTK.new_empty(GROUP + 1, num_rows, right_GKN.shape[2])
    products, total_TN = terms[:GROUP], terms[GROUP].zero_()
    bits_TN = total_TN.view(torch.int32)
    sum_TN, unit_TN = torch.empty_like(total_TN), torch.empty_like(total_TN)
    # 0-dimensional tensors, for a number would be copied into one each time
    exponent_mask = bits_TN.new_tensor(0xFF << 23)
    kept_mask = bits_TN.new_tensor(-1 << _CUT_BITS)
    last_bit = total_TN.new_tensor(2.0**-_FRACTION_BITS)
    for group in range(num_groups):
        if group % GROUP == 0:
            chunk = slice(group, group + GROUP)
            units_GTN = _units_of_products(left_powers_GTK[chunk], right_powers_GKN[chunk])
        torch.bitwise_and(bits_TN, exponent_mask, out=unit_TN.view(torch.int32))
        unit_TN.mul_(last_bit)
        torch.maximum(unit_TN, units_GTN[group % GROUP], out=unit_TN)
        torch.mul(left_GTK[group].t()[:, :, None], right_GKN[group][:, None, :], out=products)
        # Exact but for the cut: divisions by powers of two, and integers of 15 bits. PyTorch cuts off much
        # faster within a division than in a pass of its own.
        torch.div(terms, unit_TN, rounding_mode="trunc", out=terms)
        torch.sum(terms, dim=0, out=sum_TN)
        torch.mul(sum_TN, unit_TN, out=total_TN)
        bits_TN.bitwise_and_(kept_mask)
    return total_TN


def _units_of_products(left_powers_GTK: Tensor, right_powers_GKN: Tensor) -> Tensor:
    """Return the last fractional bit that the largest product of each group allows; float32 powers of two."""
    # One matrix product finds the largest sum of two exponents: with 256 to the power of each in the place of
    # the values, 32 terms add up to less than 256 times the largest. These powers are exact even where
    # matrix products round their factors to bfloat16 or TF32. No products at all: a unit below all others.
    sums_GTN = torch.bmm(left_powers_GTK, right_powers_GKN)
    floor_log2 = (sums_GTN.view(torch.int32) >> 23).sub_(_BIAS - 128)
    return _power_of_two(floor_log2.bitwise_right_shift_(3).add_(2 - 128 // 8 - _FRACTION_BITS))


def _powers_of_256(x: Tensor) -> Tensor:
    # one less each, so that the powers of all sums, -12 to 16, are in the range of float32
    return _power_of_two((exponents(x) - 1) * 8).masked_fill_(x == 0, 0.0)
