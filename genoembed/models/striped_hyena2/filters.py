"""Filters laid out as matrices for products over chunks of a sequence.

G filter groups, K taps, D channels, S states, C chunk length.

Filters laid out once for many sequences: matrices that depend on weights and length only.
Depthwise filters of a few taps over channels-last rows, with a backward pass as fast as the forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from genoembed.models.precision import without_autocast

if TYPE_CHECKING:
    from collections.abc import Callable


def toeplitz_matrix(taps: Tensor, *, num_rows: int, history: int) -> Tensor:
    """Lay filters out as banded matrices that turn ``history + num_rows`` inputs into ``num_rows`` outputs.

    Entry ``[i, j]`` is ``taps[history + i - j]``, zero outside the filter. Built by shearing one repeated
    row, so that the gradient is a dense sum, not a scatter.

    Example:
        >>> toeplitz_matrix(torch.tensor([[1.0, 2.0]]), num_rows=2, history=1)[0]
        tensor([[2., 1., 0.],
                [0., 2., 1.]])
    """
    num_filters, num_taps = taps.shape
    kept = min(num_taps, history + num_rows)
    span = history + 2 * num_rows - 1  # columns of the sheared rectangle, one row shift to the right per row
    # row 0, read right to left from column history + num_rows - 1: taps[0], taps[1], ...
    first_row = taps[:, :kept].flip(-1)
    # place tap 0 of row 0 at column num_rows - 1 + history, later cut to columns num_rows - 1 onwards
    left = history + num_rows - kept
    row = F.pad(first_row, (left, span - left - kept + 1))  # one longer than span: this shears the rows
    sheared = row[:, None, :].expand(num_filters, num_rows, span + 1).reshape(num_filters, -1)
    rectangle = sheared[:, : num_rows * span].view(num_filters, num_rows, span)
    return rectangle[:, :, num_rows - 1 :]


def convolution_matrix(taps: Tensor, *, chunk: int, dtype: torch.dtype) -> Tensor:
    """Lay filters out for :func:`causal_convolution`; worth keeping while the taps stay."""
    history = -(-(taps.shape[1] - 1) // chunk) * chunk
    return toeplitz_matrix(taps.to(_accumulator(dtype)), num_rows=chunk, history=history).to(dtype)


class ModalMatrices(NamedTuple):
    """A modal filter laid out for chunks of C positions."""

    inside_DCC: Tensor
    """What input j of a chunk gives to output i, at ``[:, j, i]``."""
    entering_DCS: Tensor
    """What input j of a chunk adds to the state after it."""
    leaving_DSC: Tensor
    """What the state before a chunk gives to output i."""
    decay_DS: Tensor
    """What is left of a state after a chunk. float32 or float64."""


def modal_matrices(log_poles: Tensor, residues: Tensor, *, chunk: int, dtype: torch.dtype) -> ModalMatrices:
    """Lay a modal filter out for :func:`modal_convolution`; worth keeping while poles and residues stay."""
    accumulator = _accumulator(dtype)
    log_poles, residues = log_poles.to(accumulator), residues.to(accumulator)
    steps = torch.arange(chunk, device=log_poles.device, dtype=accumulator)
    decay_DSC = torch.exp(log_poles[:, :, None] * steps)  # a mode's value after 0 .. C - 1 steps
    impulse_DC = torch.bmm(residues[:, None], decay_DSC)[:, 0]
    inside_DCC = toeplitz_matrix(impulse_DC, num_rows=chunk, history=0).transpose(1, 2)
    # what the state before the chunk still gives after 1 .. C steps
    leaving_DSC = (residues * torch.exp(log_poles))[:, :, None] * decay_DSC
    return ModalMatrices(
        inside_DCC.to(dtype),
        decay_DSC.flip(-1).transpose(1, 2).to(dtype),
        leaving_DSC.to(dtype),
        torch.exp(log_poles * chunk),
    )


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


_Built = TypeVar("_Built")


class FilterCache:
    """What was built last of the weights of one filter."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._weights: tuple[Tensor, ...] = ()
        self._built: object = None

    def get(
        self, build: Callable[[], _Built], weights: tuple[Tensor, ...], key: tuple[object, ...]
    ) -> _Built:
        """Give what ``build`` returns, built anew only for another key or other weights.

        Example:
            >>> cache, weight = FilterCache(), torch.ones(2)
            >>> first = cache.get(lambda: weight * 2, (weight,), ())
            >>> cache.get(lambda: weight * 2, (weight,), ()) is first
            True
            >>> weight.data[0] = 5.0
            >>> cache.get(lambda: weight * 2, (weight,), ())
            tensor([10.,  2.])
        """
        is_same = key == self._key and all(
            kept.dtype == now.dtype and kept.device == now.device and torch.equal(kept, now)
            for kept, now in zip(self._weights, weights, strict=True)
        )
        if not is_same:
            self._built = build()
            self._weights = tuple(weight.detach().clone() for weight in weights)
            self._key = key
        built: _Built = self._built  # type: ignore[assignment]
        return built


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
