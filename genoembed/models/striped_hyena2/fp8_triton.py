"""Sums of FP8 products on GPUs, compiled by Triton, which comes with PyTorch for CUDA on Linux.

In: activations of E4M3 and weights in bfloat16. Out: the sums that
:mod:`genoembed.models.striped_hyena2.fp8` describes, bit for bit. Triton's interpreter
(``TRITON_INTERPRET=1``) runs the same code on CPUs.

T rows, K inputs of a group, N outputs. Within the kernel these are the numbers of a tile.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # not for every system: what is here can be read without it, not called
    triton = None

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

IS_INSTALLED = triton is not None
"""Whether Triton can be imported."""
_TILE_ROWS, _TILE_COLUMNS = 8, 32
"""Sums that four warps hold at a time: with the 32 products of each they fit into registers."""


def _compiled(function: Callable[..., None]) -> Any:
    return triton.jit(function) if IS_INSTALLED else function


def sum_on_gpu(left_TK: Tensor, weight_NK: Tensor, scale: Tensor) -> Tensor:
    """Add up products, group by group: float32, ``(T, N)``.

    Activations are values of E4M3 in float32, weights bfloat16 numbers that are not multiplied with their
    scale yet: no copy of them is made.
    """
    num_rows, num_inputs = left_TK.shape
    num_columns = len(weight_NK)
    sums_TN = left_TK.new_empty(num_rows, num_columns)
    grid = (triton.cdiv(num_rows, _TILE_ROWS), triton.cdiv(num_columns, _TILE_COLUMNS))
    # Triton launches on the current device, whichever holds the tensors
    with torch.cuda.device(left_TK.device) if left_TK.is_cuda else nullcontext():
        _sum_tile[grid](
            left_TK.contiguous(),
            weight_NK.detach().contiguous(),
            scale,
            sums_TN,
            num_rows,
            num_columns,
            num_inputs,
            TILE_ROWS=_TILE_ROWS,
            TILE_COLUMNS=_TILE_COLUMNS,
            enable_fp_fusion=False,
        )
    return sums_TN


@_compiled
def _sum_tile(
    left_ptr,
    weight_ptr,
    scale_ptr,
    sums_ptr,
    num_rows,
    num_columns,
    num_inputs,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Add up the products of a tile of rows and outputs."""
    # in 64 bits, for a batch of long sequences has more numbers than 32 count
    rows_T = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    columns_N = tl.program_id(1).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    is_row_T, is_column_N = rows_T < num_rows, columns_N < num_columns
    scale = tl.load(scale_ptr)
    sums_TN = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    has_nan_T = tl.zeros((TILE_ROWS,), tl.int32)
    has_nan_N = tl.zeros((TILE_COLUMNS,), tl.int32)
    for first in range(0, num_inputs, 32):
        inputs_K = first + tl.arange(0, 32)
        is_input_K = inputs_K < num_inputs
        left_KT = tl.load(
            left_ptr + rows_T[None, :] * num_inputs + inputs_K[:, None],
            mask=is_input_K[:, None] & is_row_T[None, :],
            other=0.0,
        )
        weight_KN = tl.load(
            weight_ptr + columns_N[None, :] * num_inputs + inputs_K[:, None],
            mask=is_input_K[:, None] & is_column_N[None, :],
            other=0.0,
        )
        right_KN = weight_KN.to(tl.float32) * scale
        # integers do not carry NaN, and none may be made of it
        has_nan_T |= tl.max((left_KT != left_KT).to(tl.int32), axis=0)
        has_nan_N |= tl.max((right_KN != right_KN).to(tl.int32), axis=0)
        left_KT = tl.where(left_KT != left_KT, 0.0, left_KT)
        right_KN = _round_to_e4m3(tl.where(right_KN != right_KN, 0.0, right_KN))
        exponents_KTN = _exponents(left_KT)[:, :, None] + _exponents(right_KN)[:, None, :]
        # that of a sum of nothing is -127, below which no shift goes
        of_sums_TN = ((sums_TN.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
        largest_TN = tl.maximum(tl.max(exponents_KTN, axis=0), tl.maximum(of_sums_TN, -30))
        # Units of the last bit that is kept of each: 13 below the largest exponent. Products of E4M3 are
        # exact in float32, times a power of two as well, and the conversion cuts toward zero. Terms have 15
        # bits, so that 33 of them are far from the end of 32.
        per_unit_TN = ((127 + 13 - largest_TN) << 23).to(tl.float32, bitcast=True)
        terms_KTN = (left_KT[:, :, None] * right_KN[:, None, :] * per_unit_TN[None, :, :]).to(tl.int32)
        totals_TN = tl.sum(terms_KTN, axis=0) + (sums_TN * per_unit_TN).to(tl.int32)
        unit_TN = ((127 - 13 + largest_TN) << 23).to(tl.float32, bitcast=True)
        sums_TN = totals_TN.to(tl.float32) * unit_TN
        # of the 23 fractional bits of a float32, the highest 13
        sums_TN = (sums_TN.to(tl.int32, bitcast=True) & -1024).to(tl.float32, bitcast=True)
    sums_TN = tl.where((has_nan_T[:, None] | has_nan_N[None, :]) != 0, float("nan"), sums_TN)
    tl.store(
        sums_ptr + rows_T[:, None] * num_columns + columns_N[None, :],
        sums_TN,
        mask=is_row_T[:, None] & is_column_N[None, :],
    )


@_compiled
def _round_to_e4m3(x):
    """Round to E4M3, ties to even; not NaN."""
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127 - 6)
    # Beside 1.5 * 2**23 steps, a float32 has no bits below a step: the addition rounds. A step is an eighth
    # of the power of two below the value.
    beside = ((exponent - 3) << 23).to(tl.float32, bitcast=True) * 12582912.0
    return (x + beside) - beside


@_compiled
def _exponents(x):
    """Return the exponents of values of E4M3, -64 for zeros: less than that of any product."""
    exponent = ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    return tl.where(x == 0.0, -64, tl.maximum(exponent, -6))
