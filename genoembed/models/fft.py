"""Causal convolution with filters as long as the input, through FFT.

B sequences, C channels, L positions, N positions of an FFT.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fft_length(length: int) -> int:
    """Return how many positions are transformed for a causal convolution: enough, and a number that is fast.

    Example:
        >>> fft_length(1000), fft_length(1_000_002)
        (2048, 2097152)
    """
    # the last tap reaches the last position, hence 2 L - 1; a large prime factor would take ten times as long
    needed = max(1, 2 * length - 1)
    powers = (factor << max(0, math.ceil(math.log2(needed / factor))) for factor in (1, 3, 5, 9, 15))
    return min(power for power in powers if power >= needed)


def fft_convolution(x_BCL: Tensor, taps_CL: Tensor, skip_C: Tensor) -> Tensor:
    """Convolve each channel with its filter, ``y[t] = sum_s taps[s] x[t - s] + skip x[t]``.

    Computed in the dtype of the taps (float32 or float64) and rounded once.

    Example:
        >>> x = torch.tensor([[[1.0, 10.0, 100.0]]])
        >>> fft_convolution(x, torch.tensor([[1.0, 0.5, 0.25]]), torch.zeros(1)).round(decimals=3)
        tensor([[[  1.0000,  10.5000, 105.2500]]])
    """
    length = x_BCL.shape[2]
    num = fft_length(length)
    wide_BCL = x_BCL.to(taps_CL.dtype)
    spectrum_BCN = torch.fft.rfft(wide_BCL, n=num) * torch.fft.rfft(taps_CL, n=num)
    y_BCL = torch.fft.irfft(spectrum_BCN, n=num)[..., :length]
    return torch.addcmul(y_BCL, wide_BCL, skip_C[:, None]).to(x_BCL.dtype)
