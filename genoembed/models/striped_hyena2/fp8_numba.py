"""Sums of FP8 products on CPUs, compiled by numba: an optional extra, several times as fast as in PyTorch.

In: activations of E4M3 and weights in bfloat16. Out: the sums that
:mod:`genoembed.models.striped_hyena2.fp8` describes, bit for bit.

T rows, K inputs, G groups of 32 of them, N outputs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from numpy.typing import NDArray

    _Float32: TypeAlias = NDArray[np.float32]
    _Int32: TypeAlias = NDArray[np.int32]
    _Int16: TypeAlias = NDArray[np.int16]
    _Int8: TypeAlias = NDArray[np.int8]

_BLOCK = 256
"""Outputs that are computed together: what they need of a group stays in the innermost caches."""
_ROWS = 64
"""Rows that take a group of weights from the cache before the next group comes."""
_BIAS, _FRACTION_BITS, _KEPT, _LOWEST = 127, 13, -1 << 10, -30
_NO_EXPONENT = -64
"""Exponent of zeros, as the activations have it."""


_Function = TypeVar("_Function", bound="Callable[..., None]")


def _compiled(function: _Function) -> _Function:
    """Compile at the first call, and keep the result for other processes where a folder can be written to."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        compiled: _Function = njit(cache=True, **options)(function)
    except RuntimeError:  # no such folder
        compiled = njit(**options)(function)
    return compiled


def sum_products(
    left_TGK: _Float32, left_exponents_TGK: _Int8, weight_NK: _Int16, scale: float, *, num_threads: int
) -> _Float32:
    """Add up products, group by group: ``(T, N)``.

    Activations are values of E4M3 with their exponents, weights the bits of bfloat16 numbers. NaN is carried
    from weights, not from activations.
    """
    sums_TN = np.empty((len(left_TGK), len(weight_NK)), dtype=np.float32)
    starts = range(0, len(weight_NK), _BLOCK)
    compute = partial(_sum_block, left_TGK, left_exponents_TGK, weight_NK, np.float32(scale), sums_TN)
    if num_threads == 1 or len(starts) == 1:
        for start in starts:
            compute(start)
    else:
        with ThreadPoolExecutor(
            num_threads
        ) as pool:  # the compiled code does not hold the interpreter's lock
            list(pool.map(compute, starts))
    return sums_TN


@_compiled
def _sum_block(
    left_TGK: _Float32,
    left_exponents_TGK: _Int8,
    weight_NK: _Int16,
    scale: np.float32,
    all_sums_TN: _Float32,
    start: int,
) -> None:
    """Add up the products of a block of outputs."""
    num_rows, num_groups, _ = left_TGK.shape
    right_GKN = np.zeros((num_groups, 32, _BLOCK), dtype=np.float32)
    right_exponents_GKN = np.full((num_groups, 32, _BLOCK), _NO_EXPONENT, dtype=np.int8)
    has_nan_N = np.zeros(_BLOCK, dtype=np.bool_)
    count = min(_BLOCK, len(weight_NK) - start)
    for group in range(num_groups):
        for k in range(min(32, weight_NK.shape[1] - 32 * group)):
            _encode(
                weight_NK[start : start + count, 32 * group + k],
                scale,
                right_GKN[group, k],
                right_exponents_GKN[group, k],
                has_nan_N,
            )
    sums_TN = np.zeros((num_rows, _BLOCK), dtype=np.float32)
    bits_TN = sums_TN.view(np.int32)
    largest_N = np.empty(_BLOCK, dtype=np.int8)
    unit_N = np.empty(_BLOCK, dtype=np.float32)
    total_N = np.empty(_BLOCK, dtype=np.int32)
    unit_bits_N = unit_N.view(np.int32)
    for first in range(0, num_rows, _ROWS):
        for group in range(num_groups):
            right_KN, right_exponents_KN = right_GKN[group], right_exponents_GKN[group]
            for row in range(first, min(num_rows, first + _ROWS)):
                sum_N, bits_N = sums_TN[row], bits_TN[row]
                _find_largest(left_exponents_TGK[row, group], right_exponents_KN, bits_N, largest_N)
                for n in range(_BLOCK):
                    unit_bits_N[n] = (_BIAS + _FRACTION_BITS - np.int32(largest_N[n])) << 23
                for n in range(_BLOCK):
                    total_N[n] = np.int32(sum_N[n] * unit_N[n])
                _add_products(left_TGK[row, group], right_KN, unit_N, total_N)
                for n in range(_BLOCK):
                    unit_bits_N[n] = (_BIAS - _FRACTION_BITS + np.int32(largest_N[n])) << 23
                for n in range(_BLOCK):
                    sum_N[n] = np.float32(total_N[n]) * unit_N[n]
                for n in range(_BLOCK):
                    bits_N[n] &= _KEPT
    for row in range(num_rows):
        for n in range(count):
            all_sums_TN[row, start + n] = np.float32(np.nan) if has_nan_N[n] else sums_TN[row, n]


@_compiled
def _encode(
    weight_N: _Int16, scale: np.float32, value_N: _Float32, exponent_N: _Int8, has_nan_N: NDArray[np.bool_]
) -> None:
    """Round scaled weights to E4M3, ties to even."""
    bits_N = value_N.view(np.int32)
    step_N = np.empty(len(weight_N), dtype=np.float32)
    step_bits_N = step_N.view(np.int32)
    for n in range(len(weight_N)):
        bits_N[n] = np.int32(weight_N[n]) << 16
    for n in range(len(weight_N)):
        has_nan_N[n] |= value_N[n] != value_N[n]
        value_N[n] = max(np.float32(-448.0), min(np.float32(448.0), value_N[n] * scale))
    for n in range(len(weight_N)):
        step_bits_N[n] = max((bits_N[n] >> 23) & 0xFF, _BIAS - 6) - 3 << 23
    for n in range(len(weight_N)):
        value_N[n] = np.rint(value_N[n] / step_N[n]) * step_N[n]
    for n in range(len(weight_N)):
        exponent = max((bits_N[n] >> 23) & 0xFF, _BIAS - 6) - _BIAS
        exponent_N[n] = np.int8(_NO_EXPONENT if bits_N[n] & 0x7FFFFFFF == 0 else exponent)


# Each loop over n becomes vector instructions. Eight inputs at a time, so that what they are added to is read
# and written once for all of them, and in names of their own, for the compiler does not unroll such a loop.


@_compiled
def _find_largest(left_K: _Int8, right_KN: _Int8, bits_N: _Int32, largest_N: _Int8) -> None:
    """Find the largest exponent of the products and the sum so far."""
    for n in range(_BLOCK):
        largest_N[n] = np.int8(max(((bits_N[n] >> 23) & 0xFF) - _BIAS, _LOWEST))
    for k in range(0, 32, 8):
        a, b, c, d = left_K[k], left_K[k + 1], left_K[k + 2], left_K[k + 3]
        e, f, g, h = left_K[k + 4], left_K[k + 5], left_K[k + 6], left_K[k + 7]
        p, q, r, s = right_KN[k], right_KN[k + 1], right_KN[k + 2], right_KN[k + 3]
        t, u, v, w = right_KN[k + 4], right_KN[k + 5], right_KN[k + 6], right_KN[k + 7]
        for n in range(_BLOCK):
            one = max(max(np.int8(a + p[n]), np.int8(b + q[n])), max(np.int8(c + r[n]), np.int8(d + s[n])))
            two = max(max(np.int8(e + t[n]), np.int8(f + u[n])), max(np.int8(g + v[n]), np.int8(h + w[n])))
            largest_N[n] = max(largest_N[n], max(one, two))


@_compiled
def _add_products(left_K: _Float32, right_KN: _Float32, unit_N: _Float32, total_N: _Int32) -> None:
    """Add the products, in units of the last bit that is kept of each: the conversion cuts toward zero."""
    for k in range(0, 32, 8):
        a, b, c, d = left_K[k], left_K[k + 1], left_K[k + 2], left_K[k + 3]
        e, f, g, h = left_K[k + 4], left_K[k + 5], left_K[k + 6], left_K[k + 7]
        p, q, r, s = right_KN[k], right_KN[k + 1], right_KN[k + 2], right_KN[k + 3]
        t, u, v, w = right_KN[k + 4], right_KN[k + 5], right_KN[k + 6], right_KN[k + 7]
        for n in range(_BLOCK):
            x = unit_N[n]
            one = np.int32(a * p[n] * x) + np.int32(b * q[n] * x)
            two = np.int32(c * r[n] * x) + np.int32(d * s[n] * x)
            three = np.int32(e * t[n] * x) + np.int32(f * u[n] * x)
            four = np.int32(g * v[n] * x) + np.int32(h * w[n] * x)
            total_N[n] += one + two + three + four
