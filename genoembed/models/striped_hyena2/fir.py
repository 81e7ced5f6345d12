"""Depthwise filters of a few taps over channels-last rows, with a backward pass as fast as the forward.

A convolution library reads ``(B, L, D)`` in place when told that it is an image of one line with its channels
last, and keeps the sums of all taps in registers. Its own weight gradient is about 50 times slower than that
for such images on CPUs, so the gradient is written out here.

B rows, F positions of a row with what precedes them, N outputs, D channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from genoembed.models.precision import without_autocast


def depthwise_correlation(x_BFD: Tensor, taps_DK: Tensor, *, left_zeros: int) -> Tensor:
    """Correlate each channel with its taps, after ``left_zeros`` zeros before each row.

    ``y[n] = sum_k taps[k] x[n + k - left_zeros]``, summed in float32 (float64 for float64), rounded once.
    The caller chooses the dtype; autocast has no say, neither here nor in the backward pass.

    Example:
        >>> x = torch.tensor([[[1.0], [10.0], [100.0]]])
        >>> depthwise_correlation(x, torch.tensor([[0.5, 1.0]]), left_zeros=1).flatten()
        tensor([  1.0000,  10.5000, 105.0000])
    """
    output: Tensor = _DepthwiseCorrelation.apply(x_BFD, taps_DK, left_zeros)
    return output


class _DepthwiseCorrelation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BFD: Tensor, taps_DK: Tensor, left_zeros: int) -> Tensor:
        ctx.save_for_backward(x_BFD, taps_DK)
        ctx.left_zeros = left_zeros
        num_outputs = x_BFD.shape[1] + left_zeros - taps_DK.shape[1] + 1
        with without_autocast(x_BFD.device):
            return _correlate(x_BFD, taps_DK, zeros=left_zeros)[:, :num_outputs]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BND: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_BFD, taps_DK = ctx.saved_tensors
        num_taps, zeros = taps_DK.shape[1], ctx.left_zeros
        grad_x = grad_taps = None
        with without_autocast(x_BFD.device):
            if ctx.needs_input_grad[0]:
                every = _correlate(grad_BND, taps_DK.flip(1), zeros=num_taps - 1)
                grad_x = every[:, zeros : zeros + x_BFD.shape[1]]
            if ctx.needs_input_grad[1]:
                taps = [_tap_gradient(x_BFD, grad_BND, shift=k - zeros) for k in range(num_taps)]
                grad_taps = torch.stack(taps, dim=1).to(taps_DK.dtype)
        return grad_x, grad_taps, None


def _correlate(x_BFD: Tensor, taps_DK: Tensor, *, zeros: int) -> Tensor:
    """Correlate with ``zeros`` zeros before and after each row."""
    if x_BFD.device.type == "cpu" and not torch.backends.mkldnn.is_available():
        return _shift_and_add(x_BFD, taps_DK, zeros=zeros)
    line = x_BFD.contiguous().transpose(1, 2).unsqueeze(2)  # (B, D, 1, F), channels last in memory
    taps = taps_DK[:, None, None, :]
    return F.conv2d(line, taps, padding=(0, zeros), groups=taps_DK.shape[0]).squeeze(2).transpose(1, 2)


def _shift_and_add(x_BFD: Tensor, taps_DK: Tensor, *, zeros: int) -> Tensor:
    """The same where torch has no such library, and would run channel after channel."""
    wide = torch.float64 if x_BFD.dtype == torch.float64 else torch.float32
    padded = F.pad(x_BFD, (0, 0, zeros, zeros)).to(wide)
    num_taps = taps_DK.shape[1]
    length = padded.shape[1] - num_taps + 1
    total = padded[:, :length] * taps_DK[:, 0]
    for k in range(1, num_taps):
        total = torch.addcmul(total, padded[:, k : k + length], taps_DK[:, k].to(wide))
    return total.to(x_BFD.dtype)


def _tap_gradient(x_BFD: Tensor, grad_BND: Tensor, *, shift: int) -> Tensor:
    """``sum_n grad[n] x[n + shift]`` of each channel; half-precision products are summed in float32."""
    first = max(0, -shift)
    last = min(grad_BND.shape[1], x_BFD.shape[1] - shift)
    if last <= first:
        return grad_BND.new_zeros(grad_BND.shape[2])
    products = grad_BND[:, first:last] * x_BFD[:, first + shift : last + shift]
    if products.dtype in (torch.float32, torch.float64):
        return products.sum(dim=(0, 1))
    # a sum over rows is a product with a row of ones, which matrix units do
    flat = products.reshape(-1, products.shape[2])
    return torch.mm(flat.new_ones(1, flat.shape[0]), flat)[0]
